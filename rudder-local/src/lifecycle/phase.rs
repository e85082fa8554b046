//! The phase of a machine, and the rules for changing it.
//!
//! Capturing a machine and starting it exclude each other. A start that fails or is dropped leaves the phase as it was,
//! and a watcher that is dropped publishes an end, so that no caller waits forever.

use rudder_core::{Error, ErrorKind, Result, backend::Exit};
use std::sync::Arc;
use tokio::sync::{OwnedRwLockReadGuard, OwnedRwLockWriteGuard, RwLock, watch};

/// The phase of a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Phase {
    /// It has never been started.
    Defined,
    /// It is being started.
    Starting,
    /// It runs.
    Running,
    /// It has ended.
    Ended(Exit),
}

impl Phase {
    fn is_at_rest(&self) -> bool {
        matches!(self, Self::Defined | Self::Ended(_))
    }
}

/// The life cycle of one machine. Clones share the same machine.
#[derive(Debug, Clone)]
pub struct Lifecycle {
    /// The name of the machine, for messages.
    vm: Arc<str>,
    phase: watch::Sender<Phase>,
    /// Held for reading while a disk is captured, and for writing while the machine is started.
    disks: Arc<RwLock<()>>,
}

impl Lifecycle {
    /// Returns the life cycle of a newly defined machine of this name.
    #[must_use]
    pub fn new(vm: &str) -> Self {
        Self { vm: vm.into(), phase: watch::Sender::new(Phase::Defined), disks: Arc::default() }
    }

    fn conflict(&self, message: &'static str) -> Error {
        Error::new(ErrorKind::Conflict, message).with_context("vm", &*self.vm)
    }

    /// Returns the current phase.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.phase.borrow().clone()
    }

    /// Returns an error unless the machine runs.
    ///
    /// # Errors
    /// `Conflict`.
    pub fn check_running(&self) -> Result<()> {
        match &*self.phase.borrow() {
            Phase::Running => Ok(()),
            _ => Err(self.conflict("expected a running machine, but found that it does not run")),
        }
    }

    /// Begins to start the machine.
    ///
    /// # Errors
    /// `Conflict` when it runs, is being started, or is being captured.
    pub fn start(&self) -> Result<Starting> {
        let disks = Arc::clone(&self.disks).try_write_owned().map_err(|_| match *self.phase.borrow() {
            Phase::Starting => self.conflict(ALREADY_RUNNING),
            _ => self.conflict("expected a machine at rest, but found a disk being captured"),
        })?;
        let mut before = None;
        self.phase.send_if_modified(|phase| {
            let at_rest = phase.is_at_rest();
            if at_rest {
                before = Some(std::mem::replace(phase, Phase::Starting));
            }
            at_rest
        });
        match before {
            None => Err(self.conflict(ALREADY_RUNNING)),
            before => Ok(Starting { phase: self.phase.clone(), before, _disks: disks }),
        }
    }

    /// Keeps a machine that does not run from being started, for as long as the guard exists.
    ///
    /// # Errors
    /// `Conflict` when it runs or is being started.
    pub fn at_rest(&self) -> Result<AtRest> {
        let running = || self.conflict("expected a machine that has ended, but found a running one");
        let disks = Arc::clone(&self.disks).try_read_owned().map_err(|_| running())?;
        if !self.phase.borrow().is_at_rest() {
            return Err(running());
        }
        Ok(AtRest { _disks: disks })
    }

    /// Waits until the machine has ended, as [`Machine::wait`](rudder_core::backend::Machine::wait) promises.
    ///
    /// # Errors
    /// `Conflict` when it was never started, or its start failed.
    pub async fn wait(&self) -> Result<Exit> {
        let mut phase = self.phase.subscribe();
        if *phase.borrow() == Phase::Defined {
            return Err(self.conflict("expected a machine that was started, but found one that was not"));
        }
        match phase.wait_for(Phase::is_at_rest).await.as_deref() {
            Ok(Phase::Ended(exit)) => Ok(exit.clone()),
            _ => Err(self.conflict("expected a machine that was started, but its start failed")),
        }
    }

    /// Waits until the machine is not being started any more.
    pub async fn started(&self) {
        // Cannot fail while `self` holds the sender.
        let _ = self.phase.subscribe().wait_for(|phase| *phase != Phase::Starting).await;
    }

    /// Waits until the machine neither runs nor is being started, also after this life cycle is dropped.
    pub fn rest(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut phase = self.phase.subscribe();
        async move {
            // If the sender has been dropped, the machine has ended as well.
            let _ = phase.wait_for(Phase::is_at_rest).await;
        }
    }
}

const ALREADY_RUNNING: &str = "expected a machine that does not run, but found a running one";

/// Proof that a machine is being started. Dropping it restores the phase before the start.
#[derive(Debug)]
pub struct Starting {
    phase: watch::Sender<Phase>,
    before: Option<Phase>,
    _disks: OwnedRwLockWriteGuard<()>,
}

impl Starting {
    /// Publishes that the machine runs.
    pub fn finish(mut self) -> Running {
        self.before = None;
        self.phase.send_replace(Phase::Running);
        Running { phase: self.phase.clone(), ended: false }
    }
}

impl Drop for Starting {
    fn drop(&mut self) {
        if let Some(before) = self.before.take() {
            self.phase.send_replace(before);
        }
    }
}

/// Proof that a machine runs. Dropping it publishes that the machine was killed with its lab.
#[derive(Debug)]
pub struct Running {
    phase: watch::Sender<Phase>,
    ended: bool,
}

impl Running {
    /// Publishes how the machine ended.
    pub fn end(mut self, exit: Exit) {
        // First, because the machine may be running again by the time that this is dropped.
        self.ended = true;
        self.phase.send_replace(Phase::Ended(exit));
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.ended {
            self.phase.send_replace(Phase::Ended(Exit::Killed { why: "its lab was dropped".to_owned() }));
        }
    }
}

/// Proof that a machine does not run. It cannot be started while this exists.
#[derive(Debug)]
pub struct AtRest {
    _disks: OwnedRwLockReadGuard<()>,
}

#[cfg(test)]
mod tests;
