//! Waiting: always for one of four, the thing itself, the end of the machine, a cancellation, a deadline.

use super::{limit::Deadline, log::lock, panic::panicked};
use crate::{
    Error, ErrorKind, Result,
    backend::{Death, Exit, Machine},
};
use std::{
    future::Future,
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

/// How long a conversation that broke waits for the machine to explain it. A dead machine does so at once; a guest that
/// switches itself off stops its SSH server first and is off some seconds later, without hardware acceleration many.
const EXPLANATION: Duration = Duration::from_secs(15);
/// How long a machine is asked whether it has ended when something failed on its own or at its limit.
const GLANCE: Duration = Duration::from_millis(50);

/// What every wait of a build watches beside the thing it waits for.
#[derive(Debug, Clone)]
pub(super) struct Guard {
    pub(super) halt: CancellationToken,
    pub(super) deadline: Deadline,
}

impl Guard {
    /// Between two phases: whether to go on.
    pub(super) fn halted(&self) -> Result<()> {
        if self.halt.is_cancelled() { Err(cancelled()) } else { Ok(()) }
    }

    /// Waits for something that needs no machine. On cancellation or at the deadline its future is dropped.
    pub(super) async fn wait<T>(&self, thing: impl Future<Output = Result<T>>) -> Result<T> {
        tokio::select! {
            biased;
            () = self.halt.cancelled() => Err(cancelled()),
            result = thing => result,
            () = self.deadline.passed() => Err(self.deadline.error()),
        }
    }

    /// Waits for something that needs the machine to run and ends by itself at `limit`; `doing` ends the sentence
    /// "… while".
    pub(super) async fn watch<T>(
        &self,
        machine: &Arc<dyn Machine>,
        doing: &str,
        limit: &Limit,
        thing: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        tokio::select! {
            biased;
            () = self.halt.cancelled() => Err(cancelled()),
            exit = machine.wait() => Err(ended(&exit?, doing)),
            result = thing => match result {
                Ok(value) => Ok(value),
                Err(error) => Err(self.explain(machine, doing, limit, error).await),
            },
            error = panicked(machine, doing) => Err(error),
            () = self.deadline.passed() => Err(self.deadline.error()),
        }
    }

    /// A conversation that broke because its machine ended is the machine's failure. The hypervisor may need a moment to
    /// see it, which it gets until the next limit: what failed at its limit is told at once.
    pub(super) async fn explain(
        &self,
        machine: &Arc<dyn Machine>,
        doing: &str,
        limit: &Limit,
        error: Error,
    ) -> Error {
        let broke = matches!(
            error.kind(),
            ErrorKind::Protocol | ErrorKind::GuestUnreachable | ErrorKind::Io | ErrorKind::MachineDied
        );
        let left = limit.left().min(self.deadline.left(Instant::now()));
        let patience = if broke { left.clamp(GLANCE, EXPLANATION) } else { GLANCE };
        match timeout(patience, machine.wait()).await {
            Ok(Ok(exit)) => ended(&exit, doing).with_source(error),
            _ => error,
        }
    }
}

/// When the thing that is waited for gives up by itself, where that is known.
#[derive(Debug, Default)]
pub(super) struct Limit(Mutex<Option<Instant>>);

impl Limit {
    /// A limit that passes after this time.
    pub(super) fn after(time: Duration) -> Self {
        let limit = Self::default();
        limit.set(Some(time));
        limit
    }

    /// Starts anew, with this time from now or without an end.
    pub(super) fn set(&self, time: Option<Duration>) {
        *lock(&self.0) = time.and_then(|time| Instant::now().checked_add(time));
    }

    fn left(&self) -> Duration {
        lock(&self.0).map_or(Duration::MAX, |end| end.saturating_duration_since(Instant::now()))
    }
}

/// The caller cancelled, or another VM of the build failed first.
pub(super) fn cancelled() -> Error {
    Error::new(ErrorKind::Cancelled, "the build was cancelled")
}

/// A machine ended that should have been running.
pub(super) fn ended(exit: &Exit, doing: &str) -> Error {
    let (kind, message) = match exit {
        Exit::PoweredOff => (ErrorKind::MachineDied, format!("the guest switched itself off while {doing}")),
        Exit::Killed { why } => {
            (ErrorKind::MachineDied, format!("the machine was killed while {doing}: {why}"))
        }
        Exit::Died { cause, detail } => {
            let what = match cause {
                Death::Hypervisor => "the hypervisor's process ended",
                Death::GuestPanic => "the guest's kernel panicked",
                Death::IoError => "a disk of the machine could not be read or written on the host",
                Death::HostDiskFull => "the host has no space left for a disk of the machine",
            };
            let kind = match cause {
                Death::HostDiskFull => ErrorKind::HostDiskFull,
                _ => ErrorKind::MachineDied,
            };
            let detail = if detail.is_empty() { String::new() } else { format!(": {detail}") };
            (kind, format!("{what} while {doing}{detail}"))
        }
    };
    let error = Error::new(kind, message);
    match (exit, kind) {
        (Exit::PoweredOff, _) => {
            error.with_help("a guest must stay on until its last step has ended; Rudder switches it off")
        }
        (_, ErrorKind::HostDiskFull) => error.with_help("free some space, or build in another store"),
        _ => error,
    }
}
