//! What the suite must be told of this backend: how it looks from outside, how its machines are killed, how an owner dies.

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

/// Set for the process that plays an owner: the directory of the store.
const STORE: &str = "RUDDER_EXAMPLE_STORE";

/// The backend under test, on a store of its own.
#[derive(Debug)]
pub(crate) struct ProcessesAdapter {
    store: Store,
    /// Removed with this; `None`: the store is another's.
    _directory: Option<tempfile::TempDir>,
    /// How this program is started again, to play an owner.
    owner: (PathBuf, Vec<std::ffi::OsString>),
}

impl ProcessesAdapter {
    /// On a new store; `owner` starts a program that makes [`another`](Self::another) and calls `own` on it.
    ///
    /// # Errors
    /// File errors.
    pub(crate) fn new(owner: Command) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("rudder-example-").tempdir();
        let directory = directory.map_err(|error| Error::io("make a directory", error))?;
        let path = directory.path().canonicalize().map_err(|error| Error::io("find a directory", error))?;
        Ok(Self { store: Store::open(path)?, _directory: Some(directory), owner: parts(&owner) })
    }

    /// On the store of whoever started this process.
    ///
    /// # Errors
    /// `InvalidInput` when nobody did.
    pub(crate) fn another(owner: Command) -> Result<Self> {
        let none = || Error::new(ErrorKind::InvalidInput, format!("expected a store in {STORE}"));
        let store = std::env::var_os(STORE).ok_or_else(none)?;
        Ok(Self { store: Store::open(store)?, _directory: None, owner: parts(&owner) })
    }

    /// The processes of the backend, by where they work.
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

/// Whether a process has this in its environment.
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
        // One that has only just begun may not have its environment yet.
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
