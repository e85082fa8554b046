//! Steps that wait for a person: reported, reachable, resumed, and ended by everything that ends other steps.

use super::{Ended, build_with, plans::*};
use rudder_core::{
    ErrorKind,
    backend::Death,
    build::{Build, BuildHandle, PausedDeadline},
    event::{Event, EventKind},
    memory::{MemoryBackend, Response},
};
use serde_json::{Value, json};
use std::{sync::Arc, time::Duration};
use tokio::time::Instant;

const HOUR: Duration = Duration::from_secs(3600);

fn handbuild(instructions: &str) -> Value {
    json!({"name": "by hand", "timeout": null, "action": {"handbuild": {"instructions": instructions}}})
}

/// Runs a build to its end; `person` is called at every pause.
async fn with_person(
    backend: &MemoryBackend,
    plan: Value,
    options: impl FnOnce(Build) -> Build,
    person: impl AsyncFn(&BuildHandle, &Event),
) -> Ended {
    let handle = options(Build::new(read(plan), Arc::new(backend.clone()))).start();
    let (mut reader, mut events) = (handle.events(), Vec::new());
    while let Some(event) = reader.next().await {
        if matches!(event.kind, EventKind::Paused { .. }) {
            person(&handle, &event).await;
        }
        events.push(event);
    }
    let ended = Ended { events, outcome: handle.outcome().await, specs: Vec::new() };
    assert_eq!(backend.leftovers().await, Vec::<String>::new());
    ended
}

#[tokio::test(start_paused = true)]
async fn the_limit_of_a_build_is_suspended_while_a_vm_is_paused() {
    let backend = MemoryBackend::new().every_machine(|guest| {
        guest.answers(|execution| {
            let name = execution.script.strip_prefix("done by ")?;
            Some(Response::ok("").writes("/done", format!("{name}\n")))
        })
    });
    let steps = |name: &str| vec![handbuild("press hunter2"), shell("after", &format!("done by {name}"))];
    let plan = plan(vec![vm("a", steps("a")), vm("b", steps("b"))]);
    let begin = Instant::now();
    let ended = with_person(
        &backend,
        plan,
        |build| build,
        async |handle, event| {
            let EventKind::Paused { step, instructions, .. } = &event.kind else { unreachable!() };
            assert_eq!((*step, instructions.as_str()), (1, "press ***"));
            let vm = event.vm.as_deref().unwrap();
            let paused = handle.paused();
            let this = paused.iter().find(|paused| paused.vm() == vm).unwrap();
            assert_eq!((this.step(), this.instructions(), this.machine().name()), (1, "press hunter2", vm));
            // Far longer than the limit of the build, which is 30 minutes.
            tokio::time::sleep(24 * HOUR).await;
            handle.resume(vm).unwrap();
            assert!(handle.paused().iter().all(|paused| paused.vm() != vm));
            let again = handle.resume(vm).unwrap_err();
            assert_eq!(again.kind(), ErrorKind::Conflict);
            assert_eq!(
                again.to_string(),
                format!("expected VM {vm} to be paused for a person, but it is not")
            );
        },
    )
    .await;
    ended.module();
    assert!(begin.elapsed() >= 24 * HOUR);
    for name in ["a", "b"] {
        let done = backend.read_file("web", name, "/done").unwrap();
        assert_eq!(String::from_utf8(done).unwrap(), format!("{name}\n"));
        let of = |event: &Event| event.vm.as_deref() == Some(name);
        let paused = ended.place(|event| of(event) && matches!(event.kind, EventKind::Paused { .. }));
        let resumed = ended.place(|event| {
            of(event) && matches!(event.kind, EventKind::Resumed { step: 1, millis } if millis >= 86_400_000)
        });
        let after =
            ended.place(|event| of(event) && matches!(event.kind, EventKind::StepStarted { step: 2, .. }));
        assert!(paused < resumed && resumed < after);
    }
    let lines = ended.events.iter().map(Event::to_json).collect::<Vec<_>>().join("\n");
    assert!(!lines.contains("hunter2"), "{lines}");
}

#[tokio::test(start_paused = true)]
async fn the_limit_can_be_kept_running_during_a_pause() {
    let ended = with_person(
        &MemoryBackend::new(),
        plan(vec![vm("a", vec![handbuild("wait")])]),
        |build| build.paused_deadline(PausedDeadline::Runs),
        async |_, _| {},
    )
    .await;
    assert_eq!(ended.error().kind(), ErrorKind::TimedOut);
    let message = &ended.failure().report.message;
    assert!(message.contains("the build did not end within 30m"), "{message}");
}

#[tokio::test(start_paused = true)]
async fn a_pause_ends_at_the_limit_of_its_step() {
    let mut step = handbuild("wait");
    step["timeout"] = json!(60_000);
    let plan = plan(vec![vm("a", vec![step])]);
    let ended = with_person(&MemoryBackend::new(), plan, |build| build, async |_, _| {}).await;
    assert_eq!(ended.error().kind(), ErrorKind::TimedOut);
    let message = &ended.failure().report.message;
    assert!(message.contains("step 1 (by hand): the step did not end within its limit of 60 s"), "{message}");
}

#[tokio::test(start_paused = true)]
async fn a_pause_ends_on_cancellation_and_with_its_machine() {
    let build = || plan(vec![vm("a", vec![handbuild("wait")]), vm("b", vec![shell("work", "true")])]);
    let cancelled = with_person(
        &MemoryBackend::new(),
        build(),
        |build| build,
        async |handle, _| {
            tokio::time::sleep(HOUR).await;
            handle.cancel();
        },
    )
    .await;
    assert!(cancelled.is_cancelled());

    let dying = |guest: rudder_core::memory::Guest| guest.dies_after_power_on(Death::GuestPanic, HOUR);
    let died =
        with_person(&MemoryBackend::new().machine("a", dying), build(), |build| build, async |_, _| {}).await;
    assert_eq!(died.error().kind(), ErrorKind::MachineDied);
    let message = &died.failure().report.message;
    assert!(message.contains("the guest's kernel panicked while running step 1 (by hand)"), "{message}");
}

#[tokio::test(start_paused = true)]
async fn a_locked_build_warns_about_inputs_it_cannot_lock() {
    let backend = MemoryBackend::new();
    let resume = async |handle: &BuildHandle, event: &Event| {
        handle.resume(event.vm.as_deref().unwrap()).unwrap();
    };
    let by_hand = || plan(vec![vm("a", vec![shell("work", "true"), handbuild("click")])]);
    let first = with_person(&backend, by_hand(), |build| build, resume).await;
    assert_eq!(first.warnings(), Vec::<&str>::new());
    let locked = |build: Build| build.locked(first.module());
    let second = with_person(&backend, by_hand(), locked, resume).await;
    let expected = "the inputs of this build are locked, but the manual work in step 2 (by hand) is not";
    assert_eq!(second.warnings(), [expected]);
    assert_eq!(second.module().provenance.warnings, [format!("vm a: {expected}")]);

    let alone = || plan(vec![vm("a", vec![])]);
    let third = build_with(&backend, alone(), |build| build.locked(first.module()), &[]).await;
    assert_eq!(third.warnings(), Vec::<&str>::new());
}
