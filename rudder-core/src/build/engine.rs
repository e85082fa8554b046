//! Drives a build from its first attempt to its outcome, and cleans up after every attempt.
//!
//! Everything that an attempt creates is in its lab, and the lab is held here. Whatever happens inside (failure, cancellation,
//! panic), the lab is destroyed, or kept when the caller asked for that, before the outcome is returned.

use super::{
    Build, BuildFailure, BuildOptions, FailurePolicy, Shared,
    attempt::{Attempt, Failure, Pending},
    guard::{Guard, cancelled},
    keep::keep,
    limit::{Deadline, RetryDecision, after_failure},
    machines::BuildMachine,
    sink::Sink,
};
use crate::{
    Error, ErrorKind,
    backend::{KeptLab, Lab},
    event::{BuildPhase, EventKind, FailureReport, Outcome},
    module::Module,
};
use futures::FutureExt as _;
use std::{
    panic::AssertUnwindSafe,
    sync::{Arc, atomic::Ordering},
};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

/// Runs a build to its end. Cleans up in every case, and turns panics of the engine's own work into failures.
pub(super) async fn run(
    build: Build,
    sink: Sink,
    cancel: CancellationToken,
    shared: &Shared,
) -> Result<Module, Error> {
    let Build { plan, backend, options } = build;
    let options = Arc::new(options);
    let deadline = Deadline::new(Instant::now(), plan.timeout);
    let mut attempt = 1;
    let (failure, kept) = loop {
        sink.started(&plan.name, &plan.digest.to_string(), backend.name(), attempt);
        sink.build_phase(BuildPhase::Pending);
        let pending = Pending {
            plan: Arc::clone(&plan),
            backend: Arc::clone(&backend),
            options: Arc::clone(&options),
            sink: sink.clone(),
            // A failing VM stops the others of its attempt, not the attempts that follow.
            guard: Guard { halt: cancel.child_token(), deadline: deadline.clone() },
            pauses: Arc::clone(&shared.pauses),
            machines: Arc::clone(&shared.machines),
        };
        let (result, opened) = one_attempt(pending).await;
        match result {
            Ok(module) => {
                sink.build_phase(BuildPhase::Succeeded);
                if let Some(opened) = opened {
                    destroy(&opened.lab, &options, &sink).await;
                    opened.machines.take();
                }
                sink.finished(Outcome::Built { module: module.name.clone(), path: module.path.clone() });
                return Ok(module);
            }
            Err(failure) => {
                sink.build_phase(BuildPhase::Failed);
                // A failure during a cancellation counts as the cancellation.
                let failure = if cancel.is_cancelled() { Failure::from(cancelled()) } else { failure };
                let left = deadline.left(Instant::now());
                match after_failure(attempt, plan.retries, &failure.error, left) {
                    RetryDecision::GiveUp => {
                        let is_failed = failure.error.kind() != ErrorKind::Cancelled;
                        break (failure, clean_up(opened, &options, &sink, is_failed).await);
                    }
                    RetryDecision::Again(next) => {
                        clean_up(opened, &options, &sink, false).await;
                        if cancel.is_cancelled() {
                            break (Failure::from(cancelled()), None);
                        }
                        attempt = next;
                        let reason = failure.error.story();
                        sink.emit(
                            None,
                            EventKind::Retrying { attempt, of: plan.retries.saturating_add(1), reason },
                        );
                    }
                }
            }
        }
    };
    let machines = if kept.is_some() { shared.machines.take() } else { Vec::new() };
    Err(report_failure(&plan.name, shared, &sink, failure, kept, machines))
}

/// Returns the failure of a build that cannot even start here.
pub(super) fn cannot_start(build: &Build, shared: &Shared, sink: &Sink, error: Error) -> Error {
    let Build { plan, backend, .. } = build;
    sink.started(&plan.name, &plan.digest.to_string(), backend.name(), 1);
    sink.build_phase(BuildPhase::Failed);
    report_failure(&plan.name, shared, sink, Failure::from(error), None, Vec::new())
}

/// Reports that a build has failed, as its last event.
fn report_failure(
    build: &str,
    shared: &Shared,
    sink: &Sink,
    failure: Failure,
    kept: Option<KeptLab>,
    machines: Vec<BuildMachine>,
) -> Error {
    let error = failure.error.with_context("build", build).map_text(|text| sink.mask(text));
    if error.kind() == ErrorKind::Cancelled {
        sink.finished(Outcome::Cancelled);
        let report = FailureReport { build_id: Some(shared.id.clone()), ..FailureReport::default() };
        return error.with_detail(BuildFailure { report, kept, machines });
    }
    let (kind, message) = (Some(error.kind()), error.story());
    let report = FailureReport { build_id: Some(shared.id.clone()), kind, message, ..*failure.report };
    let report = sink.masked_report(report);
    sink.finished(Outcome::Failed(Box::new(report.clone())));
    error.with_detail(BuildFailure { report, kept, machines })
}

/// Runs one attempt, and returns its result with what must be cleaned up afterwards.
async fn one_attempt(pending: Pending) -> (Result<Module, Failure>, Option<Arc<Attempt>>) {
    let opened = match catch_panic(pending.open()).await {
        Ok(opened) => opened,
        Err(failure) => return (Err(failure), None),
    };
    let attempt = Arc::clone(&opened.0);
    let work = async move { opened.build().await?.capture().await?.publish().await };
    let result = tokio::select! {
        biased;
        result = catch_panic(work) => result,
        lost = attempt.lab.ownership_lost() => Err(lost.with_context("lab", attempt.lab.id().as_str()).into()),
    };
    (result, Some(attempt))
}

/// Turns a panic inside an attempt into an ordinary failure, so that what it left behind is cleaned up.
async fn catch_panic<T>(work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    AssertUnwindSafe(work).catch_unwind().await.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
        let text = text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
        let error = Error::new(ErrorKind::Internal, format!("the engine panicked: {text}"));
        Err(error.with_help("this is a bug in Rudder or in the backend: please report it").into())
    })
}

/// Destroys the lab of a failed attempt, or keeps it.
async fn clean_up(
    attempt: Option<Arc<Attempt>>,
    options: &BuildOptions,
    sink: &Sink,
    may_keep: bool,
) -> Option<KeptLab> {
    let attempt = attempt?;
    let wanted = may_keep && options.on_failure == FailurePolicy::Keep;
    // Without a machine that was started there is nothing to inspect.
    if wanted && attempt.started.load(Ordering::Relaxed) {
        match timeout(options.cleanup_limit, keep(&attempt)).await {
            Ok(Ok(kept)) => {
                let (access, lab) = (kept.access.clone(), kept.id.to_string());
                sink.emit(None, EventKind::Kept { access, lab });
                return Some(kept);
            }
            Ok(Err(error)) => sink.warn(None, format!("the machines cannot be kept: {}", error.report())),
            Err(_) => sink.warn(None, "the machines cannot be kept: the backend did not answer"),
        }
    }
    destroy(&attempt.lab, options, sink).await;
    attempt.machines.take();
    None
}

/// Destroys a lab. What cannot be removed is reported, and hides neither a module nor a failure.
async fn destroy(lab: &Arc<dyn Lab>, options: &BuildOptions, sink: &Sink) {
    let left = match timeout(options.cleanup_limit, destroy_catching_panics(lab)).await {
        Ok(Ok(())) => return,
        Ok(Err(error)) => error.report(),
        Err(_) => format!("it took longer than {}", crate::units::human_duration(options.cleanup_limit)),
    };
    sink.warn(
        None,
        format!("lab {} could not be removed and is left to the next clean-up: {left}", lab.id()),
    );
}

async fn destroy_catching_panics(lab: &Arc<dyn Lab>) -> crate::Result<()> {
    catch_panic(async { Ok(lab.destroy().await?) }).await.map_err(|failure| failure.error)
}
