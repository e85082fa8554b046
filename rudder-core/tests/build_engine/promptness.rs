//! Whichever limit expires, the failure is reported within a second, and collecting evidence delays nothing.

use super::{display::Display, hooks::*, plans::*};
use rudder_core::{
    ErrorKind,
    backend::Backend,
    build::{Build, FailurePolicy},
    event::{Event, EventKind, VmPhase},
    memory::{Guest as MemoryGuest, MemoryBackend, Operation, Response, Silence},
};
use serde_json::{Value, json};
use std::{
    sync::{Arc, atomic::Ordering::SeqCst},
    time::Duration,
};
use tokio::time::Instant;

const SECOND: Duration = Duration::from_secs(1);

/// Matches the event that starts the clock.
type Since = fn(&EventKind) -> bool;

/// When a failing build reports its failure.
#[derive(Debug)]
struct Report {
    /// Time from the event that starts the limit to the first event of a failed VM.
    failed: Option<Duration>,
    /// Time from that event to the outcome.
    outcome: Duration,
    kind: ErrorKind,
    report: String,
}

/// Runs a build to its end. The clock starts with the build, and again with each event that `since` matches.
async fn time(
    hooked: Hooked,
    plan: Value,
    policy: FailurePolicy,
    since: impl Fn(&EventKind) -> bool,
) -> Report {
    let backend: Arc<dyn Backend> = Arc::new(hooked);
    let mut begin = Instant::now();
    let handle = Build::new(read(plan), backend).on_failure(policy).start();
    let (mut reader, mut failed) = (handle.events(), None);
    while let Some(Event { kind, .. }) = reader.next().await {
        if matches!(kind, EventKind::VmPhase { phase: VmPhase::Failed }) {
            failed.get_or_insert(begin.elapsed());
        }
        if since(&kind) {
            begin = Instant::now();
        }
        if matches!(kind, EventKind::Paused { .. }) {
            handle.resume("a").unwrap();
        }
    }
    let error = handle.outcome().await.unwrap_err();
    Report { failed, outcome: begin.elapsed(), kind: error.kind(), report: error.report() }
}

/// From the start of the build.
fn start(_: &EventKind) -> bool {
    false
}

/// From the start of a step.
fn step(kind: &EventKind) -> bool {
    matches!(kind, EventKind::StepStarted { .. })
}

fn logs_in_within(millis: u64, steps: Vec<Value>) -> Value {
    let mut machine = vm("a", steps);
    machine["communicator"]["timeout"] = json!(millis);
    plan(vec![machine])
}

fn limited(millis: u64, action: Value) -> Value {
    json!({"name": "limited", "timeout": millis, "action": action})
}

fn waits(actions: Value) -> Value {
    let mut machine = vm("a", vec![]);
    machine["boot_command"] = actions;
    plan(vec![machine])
}

#[tokio::test(start_paused = true)]
async fn every_exceeded_limit_is_reported_within_a_second() {
    let silent = |how| MemoryBackend::new().machine("a", move |guest| guest.never_answers(how));
    let hangs = MemoryBackend::new().machine("a", |guest| guest.on("work", Response::ok("").hangs()));
    let idle = MemoryBackend::new().machine("a", |guest| guest.on("idle", Response::ok("")));
    let rejects = MemoryBackend::new().machine("a", MemoryGuest::rejects_credentials);
    let well = MemoryBackend::new();
    let of = |backend: &MemoryBackend| Hooked::new(backend, &[]);
    let screen = |backend: &MemoryBackend| Hooked::new(backend, &[]).with_display(Display::showing("boot:"));
    let stuck = |operation| Hooked::new(&MemoryBackend::new(), &[(operation, Hook::Hangs)]);
    let quick = |mut plan: Value, millis: u64| {
        plan["timeout"] = json!(millis);
        plan
    };
    let work = || shell("work", "work");
    let none = || plan(vec![vm("a", vec![])]);
    let cases: Vec<(&str, Hooked, Value, u64, Since)> = vec![
        ("a refused connection", of(&silent(Silence::Refuses)), logs_in_within(3000, vec![]), 3, start),
        ("a silent server", of(&silent(Silence::Accepts)), logs_in_within(3000, vec![]), 3, start),
        ("refused", of(&rejects), logs_in_within(3000, vec![]), 3, start),
        ("a step", of(&hangs), plan(vec![vm("a", vec![limited(4000, work()["action"].clone())])]), 4, step),
        (
            "a reboot",
            of(&idle),
            plan(vec![vm("a", vec![limited(4000, json!({"reboot": {"command": "idle"}}))])]),
            4,
            step,
        ),
        (
            "a text that does not come",
            screen(&well),
            waits(json!([{"wait-text": {"text": "login:", "limit": 4000}}])),
            4,
            start,
        ),
        (
            "a key held, and a line that does not come",
            screen(&well),
            waits(json!([{"hold": 0xffe3}, {"wait-serial": {"text": "login:", "limit": 4000}}])),
            4,
            |kind| matches!(kind, EventKind::BootAction { action: 1, .. }),
        ),
        ("the build, in a step", of(&hangs), quick(plan(vec![vm("a", vec![work()])]), 5000), 5, start),
        ("the build, in a boot", of(&silent(Silence::Accepts)), quick(none(), 5000), 5, start),
        ("the build, opening a lab", stuck(Operation::OpenLab), quick(none(), 5000), 5, start),
        ("the build, in a download", stuck(Operation::Import), quick(none(), 5000), 5, start),
        ("the build, starting", stuck(Operation::Start), quick(none(), 5000), 5, start),
        ("the build, capturing", stuck(Operation::Capture), quick(none(), 5000), 5, start),
        ("the build, publishing", stuck(Operation::Publish), quick(none(), 5000), 5, start),
    ];
    for (name, hooked, plan, limit, since) in cases {
        let report = time(hooked, plan, FailurePolicy::Destroy, since).await;
        let limit = Duration::from_secs(limit);
        assert!(report.outcome >= limit && report.outcome <= limit + SECOND, "{name}: {report:?}");
        assert!(report.failed.is_none_or(|failed| failed <= limit + SECOND), "{name}: {report:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_login_after_manual_work_has_a_limit() {
    let by_hand =
        json!({"name": "by hand", "timeout": null, "action": {"handbuild": {"instructions": "do"}}});
    let hooked = Hooked::new(&MemoryBackend::new(), &[]);
    let faults = hooked.faults();
    let since = move |kind: &EventKind| {
        let paused = matches!(kind, EventKind::Paused { .. });
        faults.deaf.fetch_or(paused, SeqCst);
        paused
    };
    let report = time(hooked, logs_in_within(3000, vec![by_hand]), FailurePolicy::Destroy, since).await;
    assert_eq!(report.kind, ErrorKind::TimedOut, "{report:?}");
    assert!(report.report.contains("after the person has finished"), "{report:?}");
    assert!(report.outcome >= 3 * SECOND && report.outcome <= 4 * SECOND, "{report:?}");
}

#[tokio::test(start_paused = true)]
async fn a_failure_does_not_wait_for_missing_evidence() {
    let silent = MemoryBackend::new().machine("a", |guest| guest.never_answers(Silence::Accepts));
    let hangs = MemoryBackend::new().machine("a", |guest| guest.on("work", Response::ok("").hangs()));
    let limited = plan(vec![vm("a", vec![limited(4000, shell("work", "work")["action"].clone())])]);
    for (backend, plan, limit, since) in
        [(&silent, logs_in_within(3000, vec![]), 3, start as Since), (&hangs, limited, 4, step)]
    {
        let report = time(Hooked::new(backend, &[]).mute(), plan, FailurePolicy::Destroy, since).await;
        let limit = Duration::from_secs(limit);
        assert!(
            report.failed.is_some_and(|failed| failed >= limit && failed <= limit + SECOND),
            "{report:?}"
        );
        assert!(report.outcome <= limit + 6 * SECOND, "{report:?}");
    }
}
