//! Cancellation in each phase, on request and by dropping the handle.

use super::{Hooked, hooks::Hook, plans::*, run};
use rudder_core::{
    build::Build,
    event::{BuildPhase as B, EventKind, Outcome, VmPhase as V},
    memory::{Guest, MemoryBackend, Operation, Response, Silence},
};
use std::sync::Arc;

#[tokio::test(start_paused = true)]
async fn a_build_can_be_cancelled_in_every_phase() {
    let hangs = |operation| vec![(operation, Hook::Hangs)];
    let well = MemoryBackend::new;
    for (phase, backend, hooks) in [
        (V::Pending, well(), hangs(Operation::OpenLab)),
        (V::SourceImporting, well(), hangs(Operation::Import)),
        (V::SourceImporting, well(), hangs(Operation::Fetch)),
        (V::SourceImporting, well(), hangs(Operation::CreateMachine)),
        (V::Booting, well(), hangs(Operation::Start)),
        (V::Booting, well().every_machine(|guest| guest.never_answers(Silence::Accepts)), vec![]),
        (V::Provisioning, well().every_machine(|guest| guest.on("work", Response::ok("").hangs())), vec![]),
        (V::ShuttingDown, well().every_machine(Guest::ignores_shutdown), vec![]),
        (V::ShuttingDown, well(), hangs(Operation::Capture)),
        (V::DiskCaptured, well(), hangs(Operation::Publish)),
    ] {
        let steps = vec![file("http://files.test/tool", "/tool"), shell("work", "work")];
        let plan = plan(vec![vm("a", steps.clone()), vm("b", steps)]);
        let ended = run(
            &backend,
            plan,
            |build| build,
            &hooks,
            |event, handle| {
                if event.kind == (EventKind::VmPhase { phase }) {
                    handle.cancel();
                }
            },
        )
        .await;
        let case = format!("{phase:?} {hooks:?}");
        assert!(ended.is_cancelled(), "{case}: {}", ended.failure().report);
        let last = &ended.events.last().unwrap().kind;
        assert!(matches!(last, EventKind::Finished { outcome: Outcome::Cancelled, .. }), "{case}");
        assert_eq!(ended.build_phases().last(), Some(&B::Failed), "{case}");
        assert_eq!(backend.inventory().modules, Vec::<String>::new(), "{case}");
        assert_eq!(backend.leftovers().await, Vec::<String>::new(), "{case}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_cancellation_while_the_module_is_published_has_no_effect() {
    let backend = MemoryBackend::new();
    let ended = run(
        &backend,
        plan(vec![vm("a", vec![])]),
        |build| build,
        &[],
        |event, handle| {
            if event.kind == (EventKind::BuildPhase { phase: B::TemplateProvisioning }) {
                handle.cancel();
            }
        },
    )
    .await;
    // Either the build was cancelled before publishing began, or the module exists; never both.
    assert_eq!(ended.outcome.is_ok(), !backend.inventory().modules.is_empty());
    assert_eq!(backend.leftovers().await, Vec::<String>::new());
}

#[tokio::test(start_paused = true)]
async fn dropping_the_handle_cancels_and_cleans_up() {
    let inner = MemoryBackend::new().every_machine(|guest| guest.on("work", Response::ok("").hangs()));
    let backend = Arc::new(Hooked::new(&inner, &[]));
    let handle = Build::new(read(plan(vec![vm("a", vec![shell("work", "work")])])), backend).start();
    let mut events = handle.events();
    while let Some(event) = events.next().await {
        if matches!(event.kind, EventKind::StepStarted { .. }) {
            break;
        }
    }
    drop(handle);
    let mut last = None;
    while let Some(event) = events.next().await {
        last = Some(event.kind);
    }
    assert!(matches!(last, Some(EventKind::Finished { outcome: Outcome::Cancelled, .. })));
    assert_eq!(inner.leftovers().await, Vec::<String>::new());
}
