//! Keeping the machines of a failed build, and saying how to get in.

use super::{build_with, plans::*, run};
use rudder_core::{
    backend::Backend,
    build::{Build, FailurePolicy},
    event::EventKind,
    memory::{Fault, MemoryBackend, Operation, Response},
};
use std::os::unix::fs::PermissionsExt;

#[tokio::test(start_paused = true)]
async fn a_failed_build_is_kept_with_a_command_line_that_logs_in() {
    let dir = tempfile::tempdir().unwrap();
    let reports = dir.path().join("reports");
    let backend = MemoryBackend::new().machine("a", |guest| guest.on("work", Response::fails(3, "no\n")));
    let keep = |build: Build| build.on_failure(FailurePolicy::Keep).report_dir(&reports);
    let ended = run(&backend, plan(vec![vm("a", vec![shell("work", "work")])]), keep, &[], |_, _| {}).await;
    let kept = ended.failure().kept.clone().unwrap();
    let event = ended.place(|event| matches!(event.kind, EventKind::Kept { .. }));
    let EventKind::Kept { access, lab } = &ended.events[event].kind else { unreachable!() };
    assert_eq!((access, lab.as_str()), (&kept.access, kept.id.as_str()));
    let key = reports.join(format!("{lab}.key"));
    let line = format!(
        "a: ssh -i {} -o IdentitiesOnly=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null \
         -p 40022 root@127.0.0.1",
        key.display()
    );
    assert_eq!(access[0], line);
    assert_eq!(std::fs::metadata(&key).unwrap().permissions().mode() & 0o777, 0o600);
    assert!(std::fs::read_to_string(&key).unwrap().starts_with("-----BEGIN OPENSSH PRIVATE KEY-----"));

    assert_eq!(backend.inventory().running.len(), 1, "it still runs");
    Backend::remove_lab(&backend, &kept.id).await.unwrap();
    assert_eq!(backend.leftovers().await, Vec::<String>::new());
}

#[tokio::test(start_paused = true)]
async fn nothing_is_kept_of_what_nobody_can_look_at() {
    let keep = |build: Build| build.on_failure(FailurePolicy::Keep);
    // No machine was ever on.
    let fault = Fault::new(rudder_core::ErrorKind::Download, "404");
    let backend = MemoryBackend::new().fails(Operation::Import, fault);
    let ended = build_with(&backend, plan(vec![vm("a", vec![])]), keep, &[]).await;
    assert_eq!(ended.failure().kept, None);
    // The caller cancelled.
    let backend = MemoryBackend::new().every_machine(|guest| guest.on("work", Response::ok("").hangs()));
    let ended =
        run(&backend, plan(vec![vm("a", vec![shell("work", "work")])]), keep, &[], |event, handle| {
            if matches!(event.kind, EventKind::StepStarted { .. }) {
                handle.cancel();
            }
        })
        .await;
    assert!(ended.failure().is_cancelled());
    assert_eq!(backend.leftovers().await, Vec::<String>::new());
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_kept_is_removed_and_that_is_told() {
    let backend = MemoryBackend::new()
        .machine("a", |guest| guest.on("work", Response::fails(3, "no\n")))
        .fails(Operation::Keep, Fault::new(rudder_core::ErrorKind::Unsupported, "not here"));
    let keep = |build: Build| build.on_failure(FailurePolicy::Keep);
    let ended = build_with(&backend, plan(vec![vm("a", vec![shell("work", "work")])]), keep, &[]).await;
    assert_eq!(ended.warnings(), ["the machines cannot be kept: not here"]);
    assert_eq!(ended.failure().kept, None);
}
