//! Inspecting a build from a program: its id, its machines while it runs, and its end after the handle was dropped.

use super::plans::*;
use rudder_core::{
    ErrorKind,
    build::{Build, BuildHandle},
    event::{Event, EventKind, Outcome, VmPhase},
    memory::{Guest, MemoryBackend, Response},
};
use serde_json::Value;
use std::{sync::Arc, time::Duration};

const LIMIT: Duration = Duration::from_secs(60);

fn start(backend: &MemoryBackend, plan: Value) -> BuildHandle {
    Build::new(read(plan), Arc::new(backend.clone())).start()
}

/// Waits for an event.
async fn until(build: &BuildHandle, like: impl Fn(&EventKind) -> bool) -> Event {
    let mut events = build.events();
    while let Some(event) = events.next().await {
        if like(&event.kind) {
            return event;
        }
    }
    panic!("the build ended without such an event");
}

fn hanging() -> MemoryBackend {
    MemoryBackend::new().every_machine(|guest| {
        guest
            .screen("a screen")
            .on("begin", Response::ok("").writes("/begun", "1\n"))
            .on("work", Response::ok("").hangs())
            .on("look", Response::ok("").reads("/begun"))
    })
}

fn hangs_in_work() -> Value {
    plan(vec![vm("a", vec![shell("begin", "begin"), shell("work", "work")])])
}

#[tokio::test(start_paused = true)]
async fn events_and_reports_name_their_build() {
    let backend = MemoryBackend::new().every_machine(|guest| guest.on("work", Response::fails(3, "no\n")));
    let builds = [(); 2].map(|()| start(&backend, plan(vec![vm("a", vec![shell("work", "work")])])));
    assert_ne!(builds[0].id(), builds[1].id());
    for build in builds {
        let (id, mut events) = (build.id().clone(), build.events());
        let error = build.outcome().await.unwrap_err();
        assert_eq!(error.build_failure().unwrap().report.build_id, Some(id.clone()));
        while let Some(event) = events.next().await {
            assert_eq!(event.build_id, id);
            if let EventKind::Finished { outcome: Outcome::Failed(report), .. } = event.kind {
                assert_eq!(report.build_id, Some(id.clone()));
            }
        }
    }
    let cancelled = start(&backend, plan(vec![vm("a", vec![])]));
    let id = cancelled.id().clone();
    cancelled.cancel();
    let error = cancelled.outcome().await.unwrap_err();
    assert_eq!(error.build_failure().unwrap().report.build_id, Some(id));
}

#[tokio::test(start_paused = true)]
async fn a_slow_reader_is_told_which_build_lost_events() {
    let output: String = (0..50).map(|n| format!("line {n}\n")).collect();
    let backend = MemoryBackend::new().every_machine(|guest| guest.on("work", Response::ok(output)));
    let plan = read(plan(vec![vm("a", vec![shell("work", "work")])]));
    let build = Build::new(plan, Arc::new(backend)).event_capacity(1).start();
    let (id, mut events) = (build.id().clone(), build.events());
    build.outcome().await.unwrap();
    let mut lagged = 0;
    while let Some(event) = events.next().await {
        assert_eq!(event.build_id, id);
        lagged += u32::from(matches!(event.kind, EventKind::Lagged { .. }));
    }
    assert!(lagged > 0);
}

#[tokio::test(start_paused = true)]
async fn a_program_can_access_a_machine_of_a_running_build() {
    let backend = hanging();
    let build = start(&backend, hangs_in_work());
    assert_eq!(build.machine("a").unwrap_err().kind(), ErrorKind::NotFound);
    until(&build, |kind| matches!(kind, EventKind::StepStarted { step: 2, .. })).await;

    let machine = build.machine("a").unwrap();
    let guest = machine.guest(LIMIT).await.unwrap();
    assert_eq!(guest.command("look").await.unwrap().stdout, "1\n");
    assert!(machine.console().text().await.unwrap().contains("a screen"));
    assert_eq!(build.machine("b").unwrap_err().kind(), ErrorKind::NotFound);

    build.cancel();
    let canceller = build.canceller();
    canceller.ended().await;
    assert!(build.machines().is_empty(), "they are gone with the build");
    assert!(guest.command("true").await.is_err());
    drop(guest);
    assert_eq!(machine.guest(LIMIT).await.unwrap_err().kind(), ErrorKind::MachineDied);
    drop((machine, build));
    assert_eq!(backend.leftovers().await, Vec::<String>::new());
}

#[tokio::test(start_paused = true)]
async fn a_program_can_log_in_while_the_guest_is_booting() {
    let slow = |guest: Guest| guest.boot_delay(Duration::from_secs(20));
    let backend = hanging().every_machine(slow);
    let build = start(&backend, hangs_in_work());
    until(&build, |kind| *kind == EventKind::VmPhase { phase: VmPhase::Booting }).await;
    let guest = build.machine("a").unwrap().guest(LIMIT).await.unwrap();
    assert_eq!(guest.user(), "root");
    drop(guest);
    drop(build);
}

#[tokio::test(start_paused = true)]
async fn the_end_of_the_clean_up_can_be_awaited_after_the_handle_is_dropped() {
    let backend = hanging();
    let build = start(&backend, hangs_in_work());
    until(&build, |kind| matches!(kind, EventKind::StepStarted { step: 2, .. })).await;
    let (first, second) = (build.canceller(), build.canceller());
    drop(build);
    tokio::join!(first.ended(), second.ended());
    assert_eq!(backend.inventory().labs, Vec::<String>::new(), "the lab is gone by then");
    assert_eq!(backend.leftovers().await, Vec::<String>::new());
    first.ended().await;

    // The same when the future of the outcome is dropped.
    let build = start(&backend, hangs_in_work());
    until(&build, |kind| matches!(kind, EventKind::StepStarted { step: 2, .. })).await;
    let canceller = build.canceller();
    let outcome = build.outcome();
    drop(outcome);
    canceller.ended().await;
    assert_eq!(backend.inventory().labs, Vec::<String>::new());
}

#[test]
fn a_build_has_ended_once_its_runtime_is_dropped() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let backend = hanging();
    let canceller = runtime.block_on(async {
        let build = start(&backend, hangs_in_work());
        until(&build, |kind| matches!(kind, EventKind::StepStarted { step: 2, .. })).await;
        build.canceller()
    });
    drop(runtime);
    let other = tokio::runtime::Builder::new_current_thread().build().unwrap();
    other.block_on(canceller.ended());
    drop(other);
    assert!(backend.inventory().running.is_empty());
}
