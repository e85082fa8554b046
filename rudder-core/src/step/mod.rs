//! Provisioning steps, run over a [`Session`].
//!
//! [`run`] runs one step within its limits. However the step ends (by itself, at its deadline or cancelled), the processes that it
//! started in the guest are ended and its temporary files are removed before `run` returns, provided that this finishes within
//! [`StepContext::settle`].

mod file;
mod handbuild;
mod reboot;
mod shell;

#[cfg(test)]
mod tests;

#[cfg(feature = "memory")]
pub(crate) use reboot::command_of;

use crate::{
    Error, ErrorKind, Result,
    event::{CommandStatus, OutputStream},
    guest::Session,
    plan::{PlannedStep, StepAction},
    secret::{Masker, PieceMasker},
};
use futures::future::BoxFuture;
use std::{collections::BTreeMap, fmt, path::PathBuf, time::Duration};
use tokio::time::Instant;

/// The context in which a step runs.
pub struct StepContext<'a> {
    /// The connection; a step that restarts the guest replaces it with a new one.
    pub session: &'a mut Session,
    /// Called with every line of output, masked, while the step runs.
    pub output: &'a mut (dyn FnMut(OutputStream, &str) + Send),
    /// Masks secrets in the output.
    pub masker: &'a Masker,
    /// Completes when the build has run out of time; the step's own limit is part of its plan.
    pub deadline: BoxFuture<'a, ()>,
    /// Completes when the step is cancelled.
    pub cancelled: BoxFuture<'a, ()>,
    /// Environment variables of a `shell` step in addition to its own, which take precedence.
    pub variables: BTreeMap<String, String>,
    /// For a `file` step whose content is behind a URL: the path of the fetched file.
    pub fetched: Option<PathBuf>,
    /// For a `handbuild` step: the person to wait for.
    pub person: Option<Person<'a>>,
    /// Called at once with the reason why the step is stopped, before its processes in the guest have ended.
    pub stopped: &'a mut (dyn FnMut(&Error) + Send),
    /// How long the guest then has to end the processes and to clean up; zero if the guest is no longer needed.
    pub settle: Duration,
}

/// A person who works on a guest by hand.
pub struct Person<'a> {
    /// Completes when the person is done.
    pub done: BoxFuture<'a, ()>,
    /// How long the guest may take afterwards to let Rudder log in again.
    pub login_limit: Duration,
}

impl fmt::Debug for Person<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Person").field("login_limit", &self.login_limit).finish_non_exhaustive()
    }
}

impl fmt::Debug for StepContext<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StepContext").field("session", &self.session).finish_non_exhaustive()
    }
}

/// The result of a step.
#[derive(Debug)]
#[non_exhaustive]
pub struct StepOutcome {
    /// How its command ended, if it has one and that has ended.
    pub exit: Option<CommandStatus>,
    /// Whether the step succeeded. Errors: `StepFailed`, `TimedOut` (its own limit or the build's), `Cancelled`, `GuestUnreachable`
    /// and `Protocol` for the connection, `Unsupported` for kinds of step that the engine does not run.
    pub result: Result<()>,
}

impl From<Result<()>> for StepOutcome {
    fn from(result: Result<()>) -> Self {
        Self { exit: None, result }
    }
}

/// Runs one step. Dropping the future stops the step as well, but does not wait for the guest to clean up.
pub async fn run(step: &PlannedStep, context: StepContext<'_>) -> StepOutcome {
    let StepContext {
        session,
        output,
        masker,
        deadline,
        cancelled,
        variables,
        fetched,
        person,
        stopped: tell,
        settle,
    } = context;
    let limit = step.timeout.and_then(|timeout| Instant::now().checked_add(timeout));
    let mut lines = MaskedLines { pieces: [masker.pieces(), masker.pieces()], output };
    let mut masked = |stream: OutputStream, line: &str| lines.push(stream, line);
    // A dropped step leaves behind either the previous session or the new one, never none.
    let before = session.guest().clone();
    let observation = reboot::Observation::default();
    let ended = {
        let inputs = StepInputs { variables, fetched, person };
        let working = perform(&step.action, session, &mut masked, inputs, &observation);
        tokio::select! {
            outcome = working => Ok(outcome),
            () = cancelled => Err(Error::new(ErrorKind::Cancelled, "the step was cancelled")),
            () = deadline => Err(timed_out(None, &observation)),
            () = sleep_until(limit) => Err(timed_out(step.timeout, &observation)),
        }
    };
    drop(lines);
    match ended {
        Ok(outcome) => outcome,
        Err(stopped) => {
            tell(&stopped);
            before.settle(settle).await;
            StepOutcome::from(Err(stopped))
        }
    }
}

/// Masks the output of a step on its way to the receiver: what may be the beginning of a secret is held back until the next line,
/// or until this value is dropped at the end.
struct MaskedLines<'a, 'm> {
    pieces: [PieceMasker<'m>; 2],
    output: &'a mut (dyn FnMut(OutputStream, &str) + Send),
}

impl MaskedLines<'_, '_> {
    fn push(&mut self, stream: OutputStream, line: &str) {
        let more = line.len() >= crate::guest::MAX_LINE;
        let pieces = &mut self.pieces[usize::from(stream == OutputStream::Stderr)];
        pieces.push(line, more, &mut |line| (self.output)(stream, line));
    }
}

impl Drop for MaskedLines<'_, '_> {
    fn drop(&mut self) {
        for (pieces, stream) in self.pieces.iter_mut().zip([OutputStream::Stdout, OutputStream::Stderr]) {
            pieces.finish(&mut |line| (self.output)(stream, line));
        }
    }
}

/// Inputs that only some kinds of step take.
struct StepInputs<'a> {
    variables: BTreeMap<String, String>,
    fetched: Option<PathBuf>,
    person: Option<Person<'a>>,
}

async fn perform(
    action: &StepAction,
    session: &mut Session,
    output: &mut (dyn FnMut(OutputStream, &str) + Send),
    inputs: StepInputs<'_>,
    observation: &reboot::Observation,
) -> StepOutcome {
    match action {
        StepAction::Shell { script, env, execute_command } => {
            let mut variables = inputs.variables;
            variables.extend(env.clone());
            shell::run(session.guest(), script, variables, execute_command.as_deref(), output).await
        }
        StepAction::File { content, label, destination } => {
            file::run(session.guest(), content, inputs.fetched.as_deref(), label, destination).await.into()
        }
        StepAction::Reboot { command } => reboot::run(session, command, output, observation).await,
        StepAction::Handbuild { .. } => handbuild::run(session, inputs.person).await.into(),
        StepAction::WindowsUpdate { .. } => Err(Error::new(
            ErrorKind::Unsupported,
            "expected a shell, file, reboot or handbuild step, but found windows-update",
        ))
        .into(),
    }
}

async fn sleep_until(until: Option<Instant>) {
    match until {
        Some(until) => tokio::time::sleep_until(until).await,
        None => std::future::pending().await,
    }
}

/// Returns the error for a step that was stopped at its own limit or (`None`) at the build's.
fn timed_out(own: Option<Duration>, observation: &reboot::Observation) -> Error {
    let limit = match own {
        Some(timeout) => format!("its limit of {} s", timeout.as_secs_f64()),
        None => "the time limit of the build".to_owned(),
    };
    let error = Error::new(
        ErrorKind::TimedOut,
        match observation.description() {
            Some(description) => format!("the step did not end within {limit}: {description}"),
            None => format!("the step did not end within {limit}, and was stopped"),
        },
    );
    if own.is_some() {
        error.with_help("increase `stepTimeout`, or check the last lines of output")
    } else {
        error
    }
}
