//! What the suite needs to know about this backend: what it leaves on the host, how its machines are killed, how an owner dies.

use super::Processes;
use async_trait::async_trait;
use rudder_core::{
    Error, ErrorKind, Result,
    backend::{Backend, LabId},
    testing::{Adapter, Owners},
};
use rudder_local::store::{LAB_VARIABLE, Store};
use rustix::process::{Pid, Signal, kill_process};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::Duration,
};

/// The environment variable with the directory of the store, for the process that acts as an owner.
const STORE: &str = "RUDDER_EXAMPLE_STORE";

/// The backend under test, on a store of its own.
#[derive(Debug)]
pub(crate) struct ProcessesAdapter {
    store: Store,
    /// Removed on drop; `None` if the store belongs to another process.
    _directory: Option<tempfile::TempDir>,
    /// The command that starts this program again, to act as an owner.
    owner: (PathBuf, Vec<std::ffi::OsString>),
}

impl ProcessesAdapter {
    /// Creates an adapter on a new store; `owner` starts a program that creates [`another`](Self::another) and calls `own` on it.
    ///
    /// # Errors
    /// File errors.
    pub(crate) fn new(owner: Command) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("rudder-example-").tempdir();
        let directory = directory.map_err(|error| Error::io("make a directory", error))?;
        let path = directory.path().canonicalize().map_err(|error| Error::io("find a directory", error))?;
        Ok(Self { store: Store::open(path)?, _directory: Some(directory), owner: parts(&owner) })
    }

    /// Creates an adapter on the store of the process that started this one.
    ///
    /// # Errors
    /// `InvalidInput` when no store was passed.
    pub(crate) fn another(owner: Command) -> Result<Self> {
        let none = || Error::new(ErrorKind::InvalidInput, format!("expected a store in {STORE}"));
        let store = std::env::var_os(STORE).ok_or_else(none)?;
        Ok(Self { store: Store::open(store)?, _directory: None, owner: parts(&owner) })
    }

    /// Returns the processes of the backend, which it finds by their working directories.
    fn processes(&self) -> Vec<i32> {
        let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        let is_ours = |pid: &i32| {
            fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd.starts_with(self.store.root()))
        };
        pids.filter(is_ours).collect()
    }
}

fn parts(command: &Command) -> (PathBuf, Vec<std::ffi::OsString>) {
    (command.get_program().into(), command.get_args().map(Into::into).collect())
}

/// Returns whether a process has this variable in its environment.
fn has(pid: i32, name: &str, value: &str) -> bool {
    let variables = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
    variables.split(|byte| *byte == 0).any(|variable| variable == format!("{name}={value}").as_bytes())
}

fn entries(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.map(|entry| entry.path().display().to_string()).collect()
}

#[async_trait]
impl Adapter for ProcessesAdapter {
    fn backend(&self) -> Arc<dyn Backend> {
        Arc::new(Processes::new(self.store.clone()))
    }

    async fn another(&self) -> Result<Arc<dyn Backend>> {
        Ok(Arc::new(Processes::new(Store::open(self.store.root())?)))
    }

    async fn traces(&self) -> Result<Vec<String>> {
        let mut traces: Vec<String> =
            self.processes().into_iter().map(|pid| format!("process {pid}")).collect();
        traces.extend(entries(&self.store.root().join("labs")));
        traces.extend(entries(&self.store.root().join("modules")));
        Ok(traces)
    }

    async fn is_running(&self, lab: &LabId, machine: &str) -> Result<bool> {
        let is_it = |pid: &i32| has(*pid, LAB_VARIABLE, lab.as_str()) && has(*pid, "RUDDER_MACHINE", machine);
        Ok(self.processes().iter().any(is_it))
    }

    async fn kill(&self, lab: &LabId, machine: &str) -> Result<()> {
        let is_it = |pid: &i32| has(*pid, LAB_VARIABLE, lab.as_str()) && has(*pid, "RUDDER_MACHINE", machine);
        let find = || self.processes().into_iter().find(is_it).and_then(Pid::from_raw);
        let mut pid = find();
        // A process that has only just started may not have its environment yet.
        for _ in 0..100 {
            if pid.is_some() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
            pid = find();
        }
        let none = || Error::new(ErrorKind::NotFound, format!("expected a process of {lab}/{machine}"));
        let killed = kill_process(pid.ok_or_else(none)?, Signal::KILL);
        killed.map_err(|error| Error::io("kill a process", error.into()))
    }

    fn owners(&self) -> Owners {
        let mut command = Command::new(&self.owner.0);
        command.args(&self.owner.1).env(STORE, self.store.root());
        Owners::Process(command)
    }
}
