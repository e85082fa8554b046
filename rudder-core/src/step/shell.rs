//! `shell` steps: run a script in the guest.

use super::StepOutcome;
use crate::{
    Error, ErrorKind,
    event::{CommandStatus, OutputStream},
    guest::{Guest, Script},
};
use std::{collections::BTreeMap, sync::Arc};

pub(super) async fn run(
    guest: &Guest,
    script: &Arc<str>,
    env: BTreeMap<String, String>,
    execute_command: Option<&str>,
    output: &mut (dyn FnMut(OutputStream, &str) + Send),
) -> StepOutcome {
    let script = Script::new(Arc::clone(script)).env(env).execute_command(execute_command.map(str::to_owned));
    match guest.run(&script, output).await {
        Ok(status) => {
            let result = if status.success() { Ok(()) } else { Err(failed(&status)) };
            StepOutcome { exit: Some(status), result }
        }
        Err(error) => StepOutcome { exit: None, result: Err(error) },
    }
}

fn failed(status: &CommandStatus) -> Error {
    let error = Error::new(
        ErrorKind::StepFailed,
        format!("expected the script to end with exit code 0, but found {status}"),
    );
    match status {
        CommandStatus::Code(126) => error.with_help(
            "check the permissions: exit code 126 means that the \
             command was found, but could not be executed",
        ),
        CommandStatus::Code(127) => error.with_help(
            "install the command: exit code 127 means that a command or the interpreter of \
                 the script was not found",
        ),
        CommandStatus::Code(137) => error.with_help(
            "check the memory of the guest: exit code 137 means that \
             the process was killed",
        ),
        CommandStatus::Signal(name) if name == "KILL" => {
            error.with_help("check whether the guest ran out of memory")
        }
        _ => error,
    }
}
