//! Waits that always watch four things: the operation itself, the end of the machine, a cancellation, a deadline.

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

/// How long a broken connection waits for the machine to explain it. A dead machine does so at once; a guest that powers itself off
/// stops its SSH server first and is off some seconds later, or many seconds later without hardware acceleration.
const EXPLANATION_LIMIT: Duration = Duration::from_secs(15);
/// How long to wait for the end of a machine when an operation failed on its own or at its limit.
const END_CHECK: Duration = Duration::from_millis(50);

/// What every wait of a build watches besides the operation it waits for.
#[derive(Debug, Clone)]
pub(super) struct Guard {
    pub(super) halt: CancellationToken,
    pub(super) deadline: Deadline,
}

impl Guard {
    /// Returns an error if the build was cancelled; checked between two phases.
    pub(super) fn halted(&self) -> Result<()> {
        if self.halt.is_cancelled() { Err(cancelled()) } else { Ok(()) }
    }

    /// Waits for an operation that needs no machine. Its future is dropped on cancellation or at the deadline.
    pub(super) async fn wait<T>(&self, operation: impl Future<Output = Result<T>>) -> Result<T> {
        tokio::select! {
            biased;
            () = self.halt.cancelled() => Err(cancelled()),
            result = operation => result,
            () = self.deadline.passed() => Err(self.deadline.error()),
        }
    }

    /// Waits for an operation that needs the machine to run and ends by itself at `limit`; `doing` ends the sentence "… while".
    pub(super) async fn watch<T>(
        &self,
        machine: &Arc<dyn Machine>,
        doing: &str,
        limit: &Limit,
        operation: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        tokio::select! {
            biased;
            () = self.halt.cancelled() => Err(cancelled()),
            exit = machine.wait() => Err(ended(&exit?, doing)),
            result = operation => match result {
                Ok(value) => Ok(value),
                Err(error) => Err(self.explain(machine, doing, limit, error).await),
            },
            error = panicked(machine, doing) => Err(error),
            () = self.deadline.passed() => Err(self.deadline.error()),
        }
    }

    /// Turns an error that was caused by the end of the machine into the machine's failure. The hypervisor may need a moment to
    /// notice, and has until the next limit: an operation that failed at its limit is reported at once.
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
        let patience = if broke { left.clamp(END_CHECK, EXPLANATION_LIMIT) } else { END_CHECK };
        match timeout(patience, machine.wait()).await {
            Ok(Ok(exit)) => ended(&exit, doing).with_source(error),
            _ => error,
        }
    }
}

/// The time at which the awaited operation gives up by itself, where that is known.
#[derive(Debug, Default)]
pub(super) struct Limit(Mutex<Option<Instant>>);

impl Limit {
    /// Creates a limit that expires after this time.
    pub(super) fn after(time: Duration) -> Self {
        let limit = Self::default();
        limit.set(Some(time));
        limit
    }

    /// Restarts the limit, with this time from now or without an end.
    pub(super) fn set(&self, time: Option<Duration>) {
        *lock(&self.0) = time.and_then(|time| Instant::now().checked_add(time));
    }

    fn left(&self) -> Duration {
        lock(&self.0).map_or(Duration::MAX, |end| end.saturating_duration_since(Instant::now()))
    }
}

/// Returns the error for a build that the caller cancelled, or in which another VM failed first.
pub(super) fn cancelled() -> Error {
    Error::new(ErrorKind::Cancelled, "the build was cancelled")
}

/// Returns the error for a machine that ended when it should have been running.
pub(super) fn ended(exit: &Exit, doing: &str) -> Error {
    let (kind, message) = match exit {
        Exit::PoweredOff => (ErrorKind::MachineDied, format!("the guest powered itself off while {doing}")),
        Exit::Killed { why } => {
            (ErrorKind::MachineDied, format!("the machine was killed while {doing}: {why}"))
        }
        Exit::Unobserved => {
            (ErrorKind::MachineDied, format!("the machine ended while {doing}; how is not known"))
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
            error.with_help("keep the guest on until its last step has ended; Rudder powers it off")
        }
        (_, ErrorKind::HostDiskFull) => error.with_help("free some space, or build in another store"),
        _ => error,
    }
}
