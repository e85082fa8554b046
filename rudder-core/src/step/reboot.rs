//! `reboot` steps: restart the guest, and wait until it answers with a new boot identity.
//!
//! While the guest goes down, its old server may answer for a while, on the old connection and on new ones. Only the identity of
//! the boot that answers counts.

use super::StepOutcome;
use crate::{
    Error, ErrorKind, Result,
    event::{CommandStatus, OutputStream},
    guest::Session,
};
use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

/// A guest that has not answered for this long on the old connection is considered down. Trying new connections costs a guest that
/// is still up little; a connection to a guest that lost its power never ends by itself.
const CONSIDERED_DOWN: Duration = Duration::from_secs(2);
/// Time limit of one wait for a login; waits are repeated until the step's deadline.
const LOGIN_LIMIT: Duration = Duration::from_secs(600);
/// Interval between checks of a guest that still has its old identity.
const CHECK_INTERVAL: Duration = Duration::from_millis(500);
/// How long after a failed command the guest may take to go down; if it still answers after this, it was not restarted.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(2);

/// What was last observed, for the error at the deadline.
#[derive(Debug, Default)]
pub(super) struct Observation(Mutex<Option<&'static str>>);

impl Observation {
    fn set(&self, description: &'static str) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(description);
    }

    pub(super) fn description(&self) -> Option<&'static str> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(super) async fn run(
    session: &mut Session,
    command: &str,
    output: &mut (dyn FnMut(OutputStream, &str) + Send),
    observation: &Observation,
) -> StepOutcome {
    let mut exit = None;
    let result = restart(session, command, output, observation, &mut exit).await;
    StepOutcome { exit, result }
}

async fn restart(
    session: &mut Session,
    command: &str,
    output: &mut (dyn FnMut(OutputStream, &str) + Send),
    observation: &Observation,
    exit: &mut Option<CommandStatus>,
) -> Result<()> {
    let old = session.guest().boot_id().await?;
    let guest = session.guest().clone();
    observation.set("the reboot command did not end, and the guest is still running");
    let mut last = String::new();
    let line = as_root(command);
    let ended = {
        let mut heard = |stream: OutputStream, line: &str| {
            line.clone_into(&mut last);
            output(stream, line);
        };
        // The command may leave a connection on which nothing answers any more.
        tokio::select! {
            ended = guest.shell_line(&line, &mut heard) => ended,
            () = guest.closed(CONSIDERED_DOWN) => Err(Error::new(ErrorKind::GuestUnreachable, "the guest \
                 went down")),
        }
    };
    match ended {
        // 126 and 127: the shell could not even start the command.
        Ok(status @ CommandStatus::Code(126 | 127)) => {
            return Err(not_restarted(command, exit.insert(status), &last));
        }
        Ok(status @ CommandStatus::Code(1..)) => {
            // Killed by the shutdown that it started, or unable to start one.
            let status = exit.insert(status).clone();
            let down = tokio::time::timeout(SHUTDOWN_LIMIT, guest.closed(CONSIDERED_DOWN)).await.is_ok();
            if !down && guest.boot_id().await.is_ok_and(|now| now == old) {
                return Err(not_restarted(command, &status, &last));
            }
        }
        Ok(status) => *exit = Some(status),
        Err(error) if matches!(error.kind(), ErrorKind::GuestUnreachable) => {}
        // The session was closed while the server still answered; the guest may be going down.
        Err(error) => {
            if tokio::time::timeout(SHUTDOWN_LIMIT, guest.closed(CONSIDERED_DOWN)).await.is_err() {
                return Err(error);
            }
        }
    }
    observation.set("the boot identity of the guest has not changed: the reboot command did not restart it");
    guest.closed(CONSIDERED_DOWN).await;
    loop {
        observation.set("the guest went down, and has not answered since");
        match session.reconnect(LOGIN_LIMIT).await {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::GuestUnreachable => continue,
            Err(error) => return Err(error),
        }
        match session.guest().boot_id().await {
            Ok(now) if now != old => return Ok(()),
            // The old server, which may or may not be going down.
            Ok(_) => {
                observation.set(
                    "the boot identity of the guest has not changed: the reboot command did not restart it",
                );
                let _ = tokio::time::timeout(CHECK_INTERVAL, session.guest().closed(CONSIDERED_DOWN)).await;
            }
            Err(error) if error.kind() == ErrorKind::GuestUnreachable => {}
            // A server that is shutting down may refuse to run anything; it is not the new one.
            Err(error) if error.kind() == ErrorKind::Protocol => tokio::time::sleep(CHECK_INTERVAL).await,
            Err(error) => return Err(error),
        }
    }
}

/// Many small guests have no sudo, and their user is root: there, a leading `sudo` is ignored.
const WITHOUT_SUDO: &str =
    "if [ \"$(id -u)\" = 0 ] && ! command -v sudo >/dev/null 2>&1; then sudo() { \"$@\"; }; fi\n";

fn as_root(command: &str) -> String {
    let prelude = if command.starts_with("sudo ") { WITHOUT_SUDO } else { "" };
    format!("{prelude}{command}")
}

/// Returns the command from which a script of this step was made.
#[cfg(feature = "memory")]
pub(crate) fn command_of(script: &str) -> &str {
    script.strip_prefix(WITHOUT_SUDO).unwrap_or(script)
}

fn not_restarted(command: &str, status: &CommandStatus, last: &str) -> Error {
    let said = if last.is_empty() { "it wrote nothing".to_owned() } else { format!("it wrote: {last}") };
    Error::new(
        ErrorKind::StepFailed,
        format!("`{command}` did not restart the guest: it ended with {status}; {said}"),
    )
    .with_help("set `reboot.command` to a command that this user may run")
}
