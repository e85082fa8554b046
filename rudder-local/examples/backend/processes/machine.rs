//! One machine: a process, from its start to its end, for any reason.
//!
//! ```text
//! Defined ──start──▶ Running ──stop · killed · died──▶ Ended ──start──▶ Running …
//! ```
//! A separate task waits for the process and publishes how it ended; all callers wait for that task.

use super::blocking;
use async_trait::async_trait;
use rudder_core::{
    Error, ErrorKind, Result,
    backend::{BoxedStream, Death, Exit, Machine, MachineSpec, Progress, SerialLog, Stop},
    content::Content,
    digest::Digest,
    module::{CapturedDisk, CapturedState},
};
use rudder_local::{
    lab_storage::adopt,
    process::{Invocation, Lifetime, OwnedChild},
    store::{LAB_VARIABLE, LabDir},
};
use std::{
    fs,
    path::Path,
    process::Stdio,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};
use tokio::sync::watch;
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

#[derive(Debug, Clone)]
enum Life {
    Defined,
    Running { pid: u32 },
    Ended(Exit),
}

#[derive(Debug)]
pub(super) struct ProcessMachine {
    spec: MachineSpec,
    dir: Arc<LabDir>,
    life: Arc<watch::Sender<Life>>,
    /// Held while the machine is started or its disks are read.
    turn: tokio::sync::Mutex<()>,
    plug: Arc<Mutex<Plug>>,
    /// Whether processes outlive their owner.
    released: AtomicBool,
    /// The switch that lets the current one do so.
    switch: Mutex<Arc<AtomicBool>>,
    /// The task that waits for it.
    watcher: Mutex<Option<AbortOnDropHandle<()>>>,
}

/// The role of a machine's process in the ledger of its lab.
fn role(machine: &str) -> String {
    format!("sleep of {machine}")
}

/// The switch that kills the process.
#[derive(Debug, Default)]
struct Plug {
    pulled: CancellationToken,
    /// Why it was pulled; the first reason counts.
    why: Option<String>,
}

impl ProcessMachine {
    /// Defines a machine, which outlives its owner if it is kept.
    pub(super) fn new(spec: MachineSpec, dir: Arc<LabDir>, is_kept: bool) -> Self {
        let life = Arc::new(watch::Sender::new(Life::Defined));
        let turn = tokio::sync::Mutex::default();
        Self {
            spec,
            dir,
            life,
            turn,
            plug: Arc::default(),
            released: AtomicBool::new(is_kept),
            switch: Mutex::default(),
            watcher: Mutex::default(),
        }
    }

    /// Attaches to a machine of a kept lab.
    pub(super) fn attach(spec: MachineSpec, dir: Arc<LabDir>) -> Result<Self> {
        let role = role(&spec.name);
        let machine = Self::new(spec, dir, true);
        match adopt(&machine.dir, &role)? {
            Some(process) => machine.watch(process),
            None if machine.dir.processes(&role).is_empty() => {}
            None => drop(machine.life.send_replace(Life::Ended(Exit::Unobserved))),
        }
        Ok(machine)
    }

    /// Waits, in a task, for the process, and publishes how it ended.
    fn watch(&self, mut process: OwnedChild) {
        let Some(pid) = process.pid() else { return };
        let pulled = CancellationToken::new();
        let plug = Plug { pulled: pulled.clone(), why: None };
        *self.plug.lock().unwrap_or_else(PoisonError::into_inner) = plug;
        self.life.send_replace(Life::Running { pid });
        let (life, dir, plug) = (Arc::clone(&self.life), Arc::clone(&self.dir), Arc::clone(&self.plug));
        let watcher = tokio::spawn(async move {
            let ended = tokio::select! {
                ended = process.wait() => ended,
                () = pulled.cancelled() => {
                    process.kill();
                    process.wait().await
                }
            };
            let why = plug.lock().unwrap_or_else(PoisonError::into_inner).why.take();
            let exit = match (why, ended) {
                (Some(why), _) => Exit::Killed { why },
                (None, Ok(status)) if status.success() => Exit::PoweredOff,
                (None, ended) => {
                    let detail = ended.map_or_else(|error| error.to_string(), |status| status.to_string());
                    Exit::Died { cause: Death::Hypervisor, detail }
                }
            };
            // If the lab is gone, there is no ledger to update.
            let _ = blocking(move || dir.forget_process(pid)).await;
            life.send_replace(Life::Ended(exit));
        });
        let watcher = Some(AbortOnDropHandle::new(watcher));
        *self.watcher.lock().unwrap_or_else(PoisonError::into_inner) = watcher;
    }

    fn error(&self, kind: ErrorKind, message: &str) -> Error {
        Error::new(kind, message.to_owned()).with_context("vm", &self.spec.name)
    }

    fn life(&self) -> Life {
        self.life.borrow().clone()
    }

    /// Pulls the plug, unless it was pulled before.
    fn pull(&self, why: &str) {
        let mut plug = self.plug.lock().unwrap_or_else(PoisonError::into_inner);
        plug.why.get_or_insert_with(|| why.to_owned());
        plug.pulled.cancel();
    }

    /// Kills the process, if it runs, and waits until it has ended.
    pub(super) async fn end(&self, why: &str) {
        // Waits for a start in progress.
        let _turn = self.turn.lock().await;
        if let Life::Running { .. } = self.life() {
            self.pull(why);
            // It runs, so it can be waited for.
            let _ = self.wait().await;
        }
    }

    /// Kills the process, because its owner is gone.
    pub(super) fn abandon(&self) {
        self.pull("its owner has ended");
    }

    /// Lets the process outlive its owner: from now on only the ledger of its lab knows it.
    pub(super) fn release(&self) {
        self.released.store(true, Ordering::SeqCst);
        self.switch.lock().unwrap_or_else(PoisonError::into_inner).store(true, Ordering::SeqCst);
    }

    /// Returns a guard that keeps the machine off, so that its disks can be read.
    async fn at_rest(&self) -> Result<tokio::sync::MutexGuard<'_, ()>> {
        let turn = self.turn.lock().await;
        match self.life() {
            Life::Running { .. } => {
                Err(self.error(ErrorKind::Conflict, "expected it to be off, but it runs"))
            }
            _ => Ok(turn),
        }
    }

    /// Returns the process ID, or an error unless the machine runs.
    fn running(&self) -> Result<u32> {
        match self.life() {
            Life::Running { pid } => Ok(pid),
            _ => Err(self.error(ErrorKind::Conflict, "expected it to run, but it does not")),
        }
    }

    fn unsupported<T>(&self, what: &str) -> Result<T> {
        Err(self.error(ErrorKind::Unsupported, what))
    }
}

#[async_trait]
impl Machine for ProcessMachine {
    fn name(&self) -> &str {
        &self.spec.name
    }

    async fn start(&self) -> Result<()> {
        let _turn = self.at_rest().await?;
        self.dir.check_open()?;
        let process = Invocation::new(Path::new("sleep"), Lifetime::Kept)
            .args(["infinity"])
            // Found by these when its owner is dead: the ledger kills no process that does not carry the lab's id.
            .variable(LAB_VARIABLE, self.dir.id().as_str())
            .variable("RUDDER_MACHINE", &self.spec.name)
            .directory(self.dir.path())
            .spawn(Stdio::null(), Stdio::null(), Stdio::null())
            .await?;
        let Some(pid) = process.pid() else {
            return Err(self.error(ErrorKind::LaunchFailed, "expected sleep to run, but it has ended"));
        };
        let (dir, role) = (Arc::clone(&self.dir), role(&self.spec.name));
        blocking(move || dir.record_process(pid, role)).await?;
        // No await from here on: it runs, or it does not.
        if self.released.load(Ordering::SeqCst) {
            process.release_switch().store(true, Ordering::SeqCst);
        }
        *self.switch.lock().unwrap_or_else(PoisonError::into_inner) = process.release_switch();
        self.watch(process);
        Ok(())
    }

    async fn wait(&self) -> Result<Exit> {
        let mut life = self.life.subscribe();
        let life = life.wait_for(|life| !matches!(life, Life::Running { .. })).await;
        match life.as_deref() {
            Ok(Life::Ended(exit)) => Ok(exit.clone()),
            _ => Err(self.error(ErrorKind::Conflict, "expected it to have been started, but it never was")),
        }
    }

    async fn stop(&self, how: Stop) -> Result<Exit> {
        match how {
            Stop::Kill => self.pull("on request"),
            // A sleeping process has no power button: it is waited for, and then killed.
            Stop::Graceful { limit } => {
                if let Ok(exit) = tokio::time::timeout(limit, self.wait()).await {
                    return exit;
                }
                self.pull(&format!("did not power off within {limit:?}"));
            }
        }
        self.wait().await
    }

    async fn dial(&self, port: u16) -> Result<BoxedStream> {
        self.running()?;
        if !self.spec.ports.contains(&port) {
            return Err(self.error(ErrorKind::InvalidInput, "expected one of the machine's ports"));
        }
        Err(self.error(ErrorKind::GuestUnreachable, "expected a listener, but a sleeping process has none"))
    }

    async fn display(&self) -> Result<BoxedStream> {
        self.unsupported("a process that sleeps has no display")
    }

    async fn serial(&self) -> Result<BoxedStream> {
        self.unsupported("a process that sleeps has no serial console")
    }

    async fn serial_log(&self, _from: u64) -> Result<SerialLog> {
        Err(Error::new(ErrorKind::Unsupported, "a process that sleeps has no serial console"))
    }
    async fn screenshot(&self) -> Result<Vec<u8>> {
        self.unsupported("a process that sleeps has no screen")
    }

    fn access(&self) -> Vec<String> {
        self.running().map(|pid| format!("{}: process {pid}", self.spec.name)).into_iter().collect()
    }

    async fn capture(&self, disk: &str, progress: &Progress) -> Result<CapturedDisk> {
        let _turn = self.at_rest().await?;
        let found = self.spec.disks.iter().find(|found| found.name == disk);
        let found = found.ok_or_else(|| {
            self.error(ErrorKind::NotFound, &format!("expected a disk {disk:?}, but it has none"))
        })?;
        let file = format!("captured-{:016x}.raw", rand::random::<u64>());
        let (from, to) = (found.volume.id.clone(), self.dir.path().join(&file));
        let (size, sha256) = blocking(move || {
            let copy = || {
                fs::copy(&from, &to)?;
                // Reads back what was written, which is what gets reported.
                fs::read(&to)
            };
            let bytes = copy().map_err(|error| Error::io("capture a disk", error))?;
            Ok((bytes.len() as u64, Digest::of(&bytes)))
        })
        .await?;
        progress.bytes(&format!("copy {disk}"), size, Some(size));
        Ok(CapturedDisk::new(
            disk.to_owned(),
            found.bus,
            file,
            "raw",
            found.volume.virtual_size,
            Content::of_bytes(size, sha256),
        ))
    }

    async fn capture_state(&self) -> Result<Vec<CapturedState>> {
        // It has no state outside its disks.
        self.at_rest().await.map(|_turn| Vec::new())
    }
}
