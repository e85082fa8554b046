//! VMs that wait for a person, and how they are resumed.

use super::{PausedDeadline, limit::Hold, log::lock, vm::Vm};
use crate::{Error, ErrorKind, Result, backend::Machine, event::EventKind};
use futures::future::BoxFuture;
use std::{
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// A VM that is waiting for a person.
#[derive(Clone)]
pub struct PausedVm {
    machine: Arc<dyn Machine>,
    step: usize,
    instructions: Arc<str>,
}

impl std::fmt::Debug for PausedVm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The instructions may contain secrets.
        f.debug_struct("PausedVm").field("vm", &self.vm()).field("step", &self.step).finish_non_exhaustive()
    }
}

impl PausedVm {
    /// Returns the name of the VM.
    #[must_use]
    pub fn vm(&self) -> &str {
        self.machine.name()
    }

    /// Returns the number of the waiting step, from 1.
    #[must_use]
    pub fn step(&self) -> usize {
        self.step
    }

    /// Returns what the person is asked to do, as written in the manifest; secrets in it are not masked.
    #[must_use]
    pub fn instructions(&self) -> &str {
        &self.instructions
    }

    /// Returns the machine, for its display and serial console. It must keep running: a machine that ends fails the build.
    #[must_use]
    pub fn machine(&self) -> &Arc<dyn Machine> {
        &self.machine
    }
}

/// The VMs of a build that are waiting for a person, longest wait first.
#[derive(Debug, Default)]
pub(super) struct Pauses(Mutex<Vec<(PausedVm, CancellationToken)>>);

impl Pauses {
    pub(super) fn list(&self) -> Vec<PausedVm> {
        lock(&self.0).iter().map(|(paused, _)| paused.clone()).collect()
    }

    pub(super) fn resume(&self, vm: &str) -> Result<()> {
        let mut pauses = lock(&self.0);
        let Some(place) = pauses.iter().position(|(paused, _)| paused.vm() == vm) else {
            let message = format!("expected VM {vm} to be paused for a person, but it is not");
            return Err(Error::new(ErrorKind::Conflict, message));
        };
        pauses.remove(place).1.cancel();
        Ok(())
    }
}

/// An active pause. However it ends, the VM is no longer among those that wait, and the build's limit runs again.
#[derive(Debug)]
struct Pause {
    pauses: Arc<Pauses>,
    resumed: CancellationToken,
    vm: Vm,
    step: usize,
    since: Instant,
    _hold: Option<Hold>,
}

/// Pauses a VM for a person, and reports that at once; the returned future completes when the person is done.
pub(super) fn pause(
    vm: &Vm,
    machine: &Arc<dyn Machine>,
    step: usize,
    instructions: &str,
) -> BoxFuture<'static, ()> {
    let attempt = &vm.attempt;
    let resumed = CancellationToken::new();
    let hold = match attempt.options.paused_deadline {
        PausedDeadline::Suspended => Some(attempt.guard.deadline.hold()),
        PausedDeadline::Runs => None,
    };
    let paused = PausedVm { machine: Arc::clone(machine), step, instructions: instructions.into() };
    lock(&attempt.pauses.0).push((paused, resumed.clone()));
    let pause = Pause {
        pauses: Arc::clone(&attempt.pauses),
        resumed,
        vm: vm.clone(),
        step,
        since: Instant::now(),
        _hold: hold,
    };
    let (instructions, access) = (instructions.to_owned(), machine.access());
    attempt.sink.emit(Some(vm.name()), EventKind::Paused { step, instructions, access });
    Box::pin(async move {
        pause.resumed.cancelled().await;
        let millis = millis(pause.since.elapsed());
        pause.vm.attempt.sink.emit(Some(pause.vm.name()), EventKind::Resumed { step: pause.step, millis });
    })
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

impl Drop for Pause {
    fn drop(&mut self) {
        let (vm, step) = (self.vm.name(), self.step);
        lock(&self.pauses.0).retain(|(paused, _)| paused.vm() != vm || paused.step != step);
    }
}
