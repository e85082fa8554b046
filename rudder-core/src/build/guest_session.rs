//! What the engine says to a guest, and with what: seed, login, steps, switching off.

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
    event::{EventKind, ExitStatus, OutputStream},
    guest::{BuildKey, Login, Session},
    media::cloud_init::{self, SeedLogin},
    plan::{PlannedContent, PlannedMachine, StepAction},
    step::{self, Person, StepContext, StepOutcome},
};
use futures::FutureExt as _;
use std::{net::Ipv4Addr, sync::Arc, time::Duration};
use tokio::time::{Instant, timeout};

/// How long a guest that may be kept has to end a step that was stopped, and to clean up after it.
const SETTLE: Duration = Duration::from_secs(10);
/// How long the output of a step whose machine has ended may take to arrive.
const LAST_WORDS: Duration = Duration::from_millis(250);

/// The key that logs in to a VM: the author's, else the build's.
fn key(attempt: &Attempt, planned: &PlannedMachine) -> Result<BuildKey> {
    planned.communicator.private_key.as_ref().map_or_else(|| Ok(attempt.key.clone()), BuildKey::import)
}

/// The seed of a VM, new for every attempt: a guest whose disk was another's before takes itself for a new one.
pub(super) fn seed(attempt: &Attempt, planned: &PlannedMachine) -> Result<Option<Seed>> {
    let Some(config) = &planned.cloud_init else { return Ok(None) };
    let login = SeedLogin::new(&planned.communicator.username, key(attempt, planned)?.authorized_key());
    let instance = format!("{}-{}", attempt.lab.id(), planned.name);
    cloud_init::seed(&instance, &planned.name, &login, config).map(Some)
}

/// A machine of a VM, and how to log in to it.
pub(super) fn reachable(
    attempt: &Attempt,
    planned: &PlannedMachine,
    machine: Arc<dyn Machine>,
) -> Result<BuildMachine> {
    let communicator = &planned.communicator;
    let login = Login::new(&communicator.username, key(attempt, planned)?);
    let login = login.with_password(communicator.password.clone());
    Ok(BuildMachine::new(machine, communicator.port, Some(login)))
}

/// Waits for a working login.
pub(super) async fn log_in(vm: &Vm, defined: &BuildMachine) -> Result<Session> {
    let timeout = vm.planned().communicator.timeout;
    let limit = Limit::after(timeout);
    vm.attempt.guard.watch(defined.machine(), "booting", &limit, defined.session(timeout)).await
}

/// A step that failed.
#[derive(Debug)]
pub(super) struct StepFailure {
    pub(super) error: Error,
    pub(super) exit: Option<ExitStatus>,
}

/// Runs the step at this index. However it ends, what it runs in the guest is ended too.
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
    let finished = |success: bool, exit: Option<ExitStatus>| {
        let millis = u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
        let name = step.name.clone();
        sink.emit(Some(vm.name()), EventKind::StepFinished { step: number, name, millis, success, exit });
    };
    // A step that is stopped is told to have failed before anybody waits for the guest to clean up.
    let mut is_told = false;
    let mut stopped = |error: &Error| {
        is_told = true;
        finished(false, None);
        match error.kind() {
            ErrorKind::TimedOut if attempt.guard.deadline.has_passed() => {
                vm.announce(&attempt.guard.deadline.error());
            }
            _ => vm.announce(error),
        }
    };
    let settle = match attempt.options.on_failure {
        FailurePolicy::Keep => SETTLE,
        // The guest goes with its machine.
        FailurePolicy::Destroy => Duration::ZERO,
    };
    let context = StepContext {
        session,
        output: &mut output,
        masker: sink.masker(),
        deadline: async move { deadline.passed().await }.boxed(),
        cancel: attempt.guard.halt.clone(),
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
                // What the step wrote last may still be on its way.
                let _ = timeout(LAST_WORDS, running).await;
                StepOutcome::from(ended.and_then(|exit| Err(guard::ended(&exit, &doing))))
            }
            outcome = &mut running => outcome,
            error = panicked(machine, &doing) => StepOutcome::from(Err(error)),
        }
    };
    let result = match result {
        // A step that the build's deadline ended is the build's failure, and says which field raises it.
        Err(error) if error.kind() == ErrorKind::TimedOut && attempt.guard.deadline.has_passed() => {
            Err(attempt.guard.deadline.error())
        }
        Err(error) if error.kind() != ErrorKind::Cancelled && error.kind() != ErrorKind::TimedOut => {
            Err(attempt.guard.explain(machine, &doing, &limit, error).await)
        }
        other => other,
    };
    if !is_told {
        finished(result.is_ok(), exit.clone());
    }
    result.map_err(|error| StepFailure { error, exit })
}

/// How scripts learn where the files of `httpDirectory` are.
fn site_variable((address, port): (Ipv4Addr, u16)) -> (String, String) {
    ("RUDDER_HTTP_ADDR".to_owned(), format!("{address}:{port}"))
}

/// Asks the guest to switch itself off, from within; returns only when it cannot.
pub(super) async fn power_off(session: &Session) -> Error {
    match session.guest().power_off().await {
        Ok(()) => std::future::pending().await,
        Err(error) => error,
    }
}
