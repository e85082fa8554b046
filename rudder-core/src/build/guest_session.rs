//! How the engine interacts with a guest: seed, login, steps, powering off.

use super::{
    FailurePolicy,
    attempt::Attempt,
    guard::{self, Limit},
    machines::BuildMachine,
    panic::panicked,
    pause::pause,
    vm::Vm,
};
use crate::{
    Error, ErrorKind, Result,
    backend::{Machine, Seed},
    event::{CommandStatus, EventKind, OutputStream},
    guest::{BuildKey, Login, Session},
    media::cloud_init::{self, SeedLogin},
    plan::{PlannedContent, PlannedMachine, StepAction},
    step::{self, Person, StepContext, StepOutcome},
};
use futures::FutureExt as _;
use std::{net::Ipv4Addr, sync::Arc, time::Duration};
use tokio::time::{Instant, timeout};

/// How long a guest that may be kept has to end a stopped step and to clean up after it.
const SETTLE_LIMIT: Duration = Duration::from_secs(10);
/// How long the output of a step may take to arrive after its machine has ended.
const OUTPUT_GRACE: Duration = Duration::from_millis(250);

/// Returns the key that logs in to a VM: the author's if there is one, otherwise the build's.
fn key(attempt: &Attempt, planned: &PlannedMachine) -> Result<BuildKey> {
    planned.communicator.private_key.as_ref().map_or_else(|| Ok(attempt.key.clone()), BuildKey::import)
}

/// Creates the seed of a VM, new for every attempt, so that a guest whose disk belonged to another guest considers itself a new
/// instance.
pub(super) fn seed(attempt: &Attempt, planned: &PlannedMachine) -> Result<Option<Seed>> {
    let Some(config) = &planned.cloud_init else { return Ok(None) };
    let login = SeedLogin::new(&planned.communicator.username, key(attempt, planned)?.authorized_key());
    let instance = format!("{}-{}", attempt.lab.id(), planned.name);
    cloud_init::seed(&instance, &planned.name, &login, config).map(Some)
}

/// Combines a machine of a VM with the login to it.
pub(super) fn reachable(
    attempt: &Attempt,
    planned: &PlannedMachine,
    machine: Arc<dyn Machine>,
) -> Result<BuildMachine> {
    let communicator = &planned.communicator;
    let login = Login::new(&communicator.username, key(attempt, planned)?);
    let login = login.password(communicator.password.clone());
    Ok(BuildMachine::new(machine, communicator.port, Some(login)))
}

/// Waits for a working login.
pub(super) async fn log_in(vm: &Vm, defined: &BuildMachine) -> Result<Session> {
    let timeout = vm.planned().communicator.timeout;
    let limit = Limit::after(timeout);
    vm.attempt.guard.watch(defined.machine(), "booting", &limit, defined.session(timeout)).await
}

/// The failure of a step.
#[derive(Debug)]
pub(super) struct StepFailure {
    pub(super) error: Error,
    pub(super) exit: Option<CommandStatus>,
}

/// Runs the step at this index. However it ends, the processes that it started in the guest are ended as well.
pub(super) async fn run_step(
    vm: &Vm,
    machine: &Arc<dyn Machine>,
    session: &mut Session,
    index: usize,
) -> Result<(), StepFailure> {
    let (attempt, step) = (&vm.attempt, &vm.planned().steps[index]);
    let (sink, name, number) = (&attempt.sink, vm.name(), index + 1);
    sink.step_started(name, number, &step.name);
    let start = Instant::now();
    let limit = Limit::default();
    limit.set(step.timeout);
    let fetched = match &step.action {
        StepAction::File { content: PlannedContent::Url(url), .. } => attempt.media.get(url),
        _ => None,
    };
    let person = match &step.action {
        StepAction::Handbuild { instructions } => Some(Person {
            done: pause(vm, machine, number, instructions),
            login_limit: vm.planned().communicator.timeout,
        }),
        _ => None,
    };
    let deadline = attempt.guard.deadline.clone();
    let mut output = |stream: OutputStream, line: &str| sink.output(name, number, stream, line);
    let finished = |success: bool, exit: Option<CommandStatus>| {
        let millis = u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
        let name = step.name.clone();
        sink.emit(Some(vm.name()), EventKind::StepFinished { step: number, name, millis, success, exit });
    };
    // A stopped step is reported as failed before the guest is given time to clean up.
    let mut is_reported = false;
    let mut stopped = |error: &Error| {
        is_reported = true;
        finished(false, None);
        match error.kind() {
            ErrorKind::TimedOut if attempt.guard.deadline.has_passed() => {
                vm.announce(&attempt.guard.deadline.error());
            }
            _ => vm.announce(error),
        }
    };
    let settle = match attempt.options.on_failure {
        FailurePolicy::Keep => SETTLE_LIMIT,
        // The guest is removed with its machine.
        FailurePolicy::Destroy => Duration::ZERO,
    };
    let context = StepContext {
        session,
        output: &mut output,
        masker: sink.masker(),
        deadline: async move { deadline.passed().await }.boxed(),
        cancelled: Box::pin(attempt.guard.halt.cancelled()),
        variables: attempt.site_of(vm.planned()).map(site_variable).into_iter().collect(),
        fetched,
        person,
        stopped: &mut stopped,
        settle,
    };
    let doing = format!("running step {number} ({})", step.name);
    let StepOutcome { exit, result } = {
        let running = step::run(step, context);
        tokio::pin!(running);
        tokio::select! {
            biased;
            ended = machine.wait() => {
                // The last output of the step may still be on its way.
                let _ = timeout(OUTPUT_GRACE, running).await;
                StepOutcome::from(ended.and_then(|exit| Err(guard::ended(&exit, &doing))))
            }
            outcome = &mut running => outcome,
            error = panicked(machine, &doing) => StepOutcome::from(Err(error)),
        }
    };
    let result = match result {
        // A step ended by the build's deadline is a failure of the build, and the error names the field that raises the limit.
        Err(error) if error.kind() == ErrorKind::TimedOut && attempt.guard.deadline.has_passed() => {
            Err(attempt.guard.deadline.error())
        }
        Err(error) if error.kind() != ErrorKind::Cancelled && error.kind() != ErrorKind::TimedOut => {
            Err(attempt.guard.explain(machine, &doing, &limit, error).await)
        }
        other => other,
    };
    if !is_reported {
        finished(result.is_ok(), exit.clone());
    }
    result.map_err(|error| StepFailure { error, exit })
}

/// Returns the variable that tells scripts where the files of `httpDirectory` are served.
fn site_variable((address, port): (Ipv4Addr, u16)) -> (String, String) {
    ("RUDDER_HTTP_ADDR".to_owned(), format!("{address}:{port}"))
}

/// Asks the guest to power itself off from within; returns only if that fails.
pub(super) async fn power_off(session: &Session) -> Error {
    match session.guest().power_off().await {
        Ok(()) => std::future::pending().await,
        Err(error) => error,
    }
}
