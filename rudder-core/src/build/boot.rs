//! The boot command: what is typed on a machine's display, and waited for on its screen, between power-on and login.

use super::{attempt::Attempt, guard::Limit, vm::Vm};
use crate::{
    Error, ErrorKind, Result,
    backend::Machine,
    console::Console,
    event::EventKind,
    keys::key_name,
    plan::{BootAction, PlannedMachine},
    units::human_duration,
};
use std::{sync::Arc, time::Duration};
use tokio::time::{Instant, sleep, timeout};

/// How long releasing keys may delay the end of a boot command.
const RELEASE_LIMIT: Duration = Duration::from_secs(2);

/// A boot command whose templates are filled in.
#[derive(Debug)]
pub(super) struct BootCommand(Vec<BootAction>);

impl BootCommand {
    /// Returns the boot command of a VM, if it has one.
    ///
    /// # Errors
    /// `InvalidInput` when the boot command refers to the server of the build's files and the VM cannot reach it.
    pub(super) fn of(attempt: &Attempt, planned: &PlannedMachine) -> Result<Option<Self>> {
        if planned.boot_command.is_empty() {
            return Ok(None);
        }
        let site = attempt.site_of(planned);
        let filled = |text: &str| match site {
            Some((address, port)) => Ok(text
                .replace("{{ .HTTPIP }}", &address.to_string())
                .replace("{{ .HTTPPort }}", &port.to_string())),
            None if text.contains("{{ .HTTPIP }}") || text.contains("{{ .HTTPPort }}") => {
                let message = "the boot command refers to the file server, but this VM has none";
                Err(Error::new(ErrorKind::InvalidInput, message).with_help(
                    "name the files to serve in `httpDirectory`, and give the VM a NIC on a managed subnet",
                ))
            }
            None => Ok(text.to_owned()),
        };
        let actions = planned.boot_command.iter().map(|action| {
            Ok(match action {
                BootAction::Type(text) => BootAction::Type(filled(text)?),
                BootAction::WaitText { text, limit } => {
                    BootAction::WaitText { text: filled(text)?, limit: *limit }
                }
                BootAction::WaitSerial { text, limit } => {
                    BootAction::WaitSerial { text: filled(text)?, limit: *limit }
                }
                other => other.clone(),
            })
        });
        actions.collect::<Result<_>>().map(|actions| Some(Self(actions)))
    }

    /// Performs the actions, from power-on. All keys are released, however this ends.
    pub(super) async fn run(self, vm: &Vm, machine: &Arc<dyn Machine>) -> Result<()> {
        let limit = Limit::default();
        let typing = self.type_on(vm, machine, &limit);
        vm.attempt.guard.watch(machine, "typing the boot command", &limit, typing).await
    }

    async fn type_on(&self, vm: &Vm, machine: &Arc<dyn Machine>, limit: &Limit) -> Result<()> {
        let (sink, start, of) = (&vm.attempt.sink, Instant::now(), self.0.len());
        // Dropping this future drops the console, which releases the keys that it holds.
        let console = Console::new(Arc::clone(machine));
        let mut result = Ok(());
        for (action, what) in self.0.iter().enumerate() {
            let doing = describe(what);
            let reported = EventKind::BootAction { action: action + 1, of, doing: doing.clone() };
            sink.emit(Some(vm.name()), reported);
            limit.set(match what {
                BootAction::WaitText { limit, .. } | BootAction::WaitSerial { limit, .. } => Some(*limit),
                _ => None,
            });
            result = perform(&console, what).await.map_err(|error| {
                error.with_context("boot command", format!("action {} of {of}: {doing}", action + 1))
            });
            if result.is_err() {
                break;
            }
        }
        // A failure is reported at once: the console releases its keys when it is dropped.
        if result.is_ok()
            && let Ok(Err(error)) = timeout(RELEASE_LIMIT, console.release_all()).await
        {
            result = Err(error.with_context("boot command", "releasing the held keys"));
        }
        if result.is_ok() {
            let millis = u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
            sink.emit(Some(vm.name()), EventKind::BootCommandDone { millis });
        }
        result
    }
}

async fn perform(console: &Console, action: &BootAction) -> Result<()> {
    match action {
        BootAction::Type(text) => console.type_text(text).await,
        BootAction::Press(keysym) => console.press(*keysym).await,
        BootAction::Hold(keysym) => console.hold(*keysym).await,
        BootAction::Release(keysym) => console.release(*keysym).await,
        BootAction::Wait(duration) => {
            sleep(*duration).await;
            Ok(())
        }
        BootAction::WaitText { text, limit } => console.wait_text(text, *limit).await.map(drop),
        BootAction::WaitSerial { text, limit } => console.wait_serial(text, *limit).await,
    }
}

/// Describes an action for people.
fn describe(action: &BootAction) -> String {
    let key = |keysym: &u32| match key_name(*keysym) {
        Some(name) => format!("<{name}>"),
        None => char::from_u32(*keysym).map_or_else(|| format!("key {keysym:#x}"), |key| format!("{key:?}")),
    };
    match action {
        BootAction::Type(text) => format!("type {text:?}"),
        BootAction::Press(keysym) => format!("press {}", key(keysym)),
        BootAction::Hold(keysym) => format!("hold {}", key(keysym)),
        BootAction::Release(keysym) => format!("release {}", key(keysym)),
        BootAction::Wait(duration) => format!("wait {}", human_duration(*duration)),
        BootAction::WaitText { text, limit } => {
            format!("wait up to {} for {text:?} on the screen", human_duration(*limit))
        }
        BootAction::WaitSerial { text, limit } => {
            format!("wait up to {} for {text:?} on the serial console", human_duration(*limit))
        }
    }
}
