//! The steps of provisioning, run over a [`Session`].
//!
//! [`run`] does one step within its limits. However it ends, by itself, at its deadline or cancelled, what it had
//! running in the guest is ended and what it put there for itself is removed before it returns.

mod file;
mod reboot;
mod shell;

#[cfg(test)]
mod tests;

use crate::{
    Error, ErrorKind, Result,
    event::{ExitStatus, OutputStream},
    guest::Session,
    plan::{PlannedStep, StepAction},
    secret::{Masker, PieceMasker},
};
use std::{fmt, path::PathBuf, time::Duration};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// After a step was stopped, its processes in the guest get so long to end.
const SETTLE: Duration = Duration::from_secs(10);

/// What a step works with.
pub struct StepContext<'a> {
    /// The connection; a step that restarts the guest leaves a new one.
    pub session: &'a mut Session,
    /// Hears every line of output, masked, while the step runs.
    pub output: &'a mut (dyn FnMut(OutputStream, &str) + Send),
    /// Takes secrets out of the output.
    pub masker: &'a Masker,
    /// The build's deadline; the step's own limit comes out of its plan.
    pub deadline: Option<Instant>,
    /// Ends the step.
    pub cancel: CancellationToken,
    /// Of a `file` step whose content is behind a URL: where it was fetched to.
    pub fetched: Option<PathBuf>,
}

impl fmt::Debug for StepContext<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StepContext")
            .field("session", &self.session)
            .field("deadline", &self.deadline)
            .finish()
    }
}

/// How a step ended.
#[derive(Debug)]
#[non_exhaustive]
pub struct StepOutcome {
    /// How its command ended, where it has one and it did.
    pub exit: Option<ExitStatus>,
    /// Whether it did what it should. Errors: `StepFailed`, `TimedOut` (its own limit or the build's), `Cancelled`,
    /// `GuestUnreachable` and `Protocol` for the connection, `Unsupported` for kinds of step that are not ours.
    pub result: Result<()>,
}

impl From<Result<()>> for StepOutcome {
    fn from(result: Result<()>) -> Self {
        Self { exit: None, result }
    }
}

/// Runs one step. Dropping the future stops it too, but then nobody waits until the guest is clean.
pub async fn run(step: &PlannedStep, context: StepContext<'_>) -> StepOutcome {
    let StepContext { session, output, masker, deadline, cancel, fetched } = context;
    let limit = step.timeout.map(|timeout| Instant::now() + timeout);
    // The nearer of the two, and which it is.
    let (until, own) = match (limit, deadline) {
        (Some(limit), Some(deadline)) if deadline < limit => (Some(deadline), false),
        (Some(limit), _) => (Some(limit), true),
        (None, deadline) => (deadline, false),
    };
    let mut maskers = [masker.pieces(), masker.pieces()];
    let mut masked = |stream: OutputStream, line: &str| {
        let pieces: &mut PieceMasker<'_> = &mut maskers[usize::from(stream == OutputStream::Stderr)];
        let more = line.len() >= crate::guest::MAX_LINE;
        output(stream, &pieces.mask(line, more));
    };
    // A session that a dropped step leaves behind is the one that was there before, or the new one: never none.
    let before = session.guest().clone();
    let seen = reboot::Seen::default();
    let stopped = {
        let working = act(&step.action, session, &mut masked, fetched.as_deref(), &seen);
        tokio::select! {
            outcome = working => return outcome,
            () = cancel.cancelled() => Error::new(ErrorKind::Cancelled, "the step was cancelled"),
            () = sleep_until(until) => timed_out(step, own, &seen),
        }
    };
    before.settle(SETTLE).await;
    StepOutcome::from(Err(stopped))
}

async fn act(
    action: &StepAction,
    session: &mut Session,
    output: &mut (dyn FnMut(OutputStream, &str) + Send),
    fetched: Option<&std::path::Path>,
    seen: &reboot::Seen,
) -> StepOutcome {
    match action {
        StepAction::Shell { script, env, execute_command } => {
            shell::run(session.guest(), script, env, execute_command.as_deref(), output).await
        }
        StepAction::File { content, label, destination } => {
            file::run(session.guest(), content, fetched, label, destination).await.into()
        }
        StepAction::Reboot { command } => reboot::run(session, command, output, seen).await,
        other => Err(Error::new(
            ErrorKind::Unsupported,
            format!("expected a shell, file or reboot step, but found {}", name(other)),
        ))
        .into(),
    }
}

fn name(action: &StepAction) -> &'static str {
    match action {
        StepAction::Shell { .. } => "shell",
        StepAction::File { .. } => "file",
        StepAction::Reboot { .. } => "reboot",
        StepAction::WindowsUpdate { .. } => "windows-update",
        StepAction::Handbuild { .. } => "handbuild",
    }
}

async fn sleep_until(until: Option<Instant>) {
    match until {
        Some(until) => tokio::time::sleep_until(until).await,
        None => std::future::pending().await,
    }
}

fn timed_out(step: &PlannedStep, own: bool, seen: &reboot::Seen) -> Error {
    let limit = match step.timeout {
        Some(timeout) if own => format!("its limit of {} s", timeout.as_secs_f64()),
        _ => "the build's deadline".to_owned(),
    };
    let error = Error::new(
        ErrorKind::TimedOut,
        match seen.words() {
            Some(words) => format!("the step did not end within {limit}: {words}"),
            None => format!("the step did not end within {limit}, and was stopped"),
        },
    );
    if own {
        error.with_help("give the step a longer `stepTimeout`, or look at its last lines of output")
    } else {
        error
    }
}
