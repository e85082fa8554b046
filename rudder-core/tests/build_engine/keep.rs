//! Keeping the machines of a failed build, and reporting how to log in to them.

use super::{build_with, plans::*, run};
use rudder_core::{
    Error, ErrorKind,
    backend::Backend,
    build::{Build, FailurePolicy, kept_labs, kept_machines},
    event::EventKind,
    memory::{Fault, MemoryBackend, Operation, Response},
};
use std::{os::unix::fs::PermissionsExt, sync::Arc, time::Duration};

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

/// Runs a build directly on the backend, whose labs have a directory for the key; keeps the machines if it fails.
async fn kept(backend: &MemoryBackend, plan: serde_json::Value) -> Error {
    let build = Build::new(read(plan), Arc::new(backend.clone())).on_failure(FailurePolicy::Keep);
    build.start().outcome().await.expect_err("a failure")
}

#[tokio::test(start_paused = true)]
async fn a_kept_lab_names_its_key_which_is_removed_with_it() {
    let backend = MemoryBackend::new().machine("a", |guest| guest.on("work", Response::fails(3, "no\n")));
    let error = kept(&backend, plan(vec![vm("a", vec![shell("work", "work")])])).await;
    let lab = error.build_failure().unwrap().kept.clone().unwrap();
    let key = lab.logins[0].key.clone().unwrap();
    assert!(key.is_absolute());
    assert_eq!(lab.access[0], format!("a: the key of root is {}", key.display()));
    assert_eq!((lab.logins[0].vm.as_str(), lab.logins[0].username.as_str()), ("a", "root"));
    assert_eq!(kept_labs(&backend).await.unwrap(), std::slice::from_ref(&lab), "others read the same");
    let shown = format!("{error:?}");
    assert!(
        shown.contains(&format!("kept for inspection as lab {}:\n    a: the key of root is", lab.id)),
        "{shown}"
    );

    backend.remove_lab(&lab.id).await.unwrap();
    assert!(!key.exists(), "the key goes with its lab");
    assert_eq!(backend.leftovers().await, Vec::<String>::new());
}

#[tokio::test(start_paused = true)]
async fn a_program_can_reach_the_machines_of_a_kept_lab() {
    let backend = MemoryBackend::new().machine("a", |guest| {
        guest
            .screen("a kept screen")
            .on("see", Response::ok("").writes("/seen", "seen\n"))
            .on("work", Response::fails(3, "no\n"))
            .on("look", Response::ok("").reads("/seen"))
    });
    let steps = vec![shell("see", "see"), shell("work", "work")];
    let error = kept(&backend, plan(vec![vm("a", steps)])).await;
    let lab = kept_labs(&backend).await.unwrap().remove(0);
    // As reported to this process with the failure, and as found by another process from the lab.
    let found = kept_machines(&backend, &lab).await.unwrap();
    for machines in [&error.build_failure().unwrap().machines, &found] {
        let [machine] = machines.as_slice() else { panic!("{machines:?}") };
        assert_eq!(machine.name(), "a");
        let guest = machine.guest(Duration::from_secs(60)).await.unwrap();
        assert_eq!(guest.command("look").await.unwrap().stdout, "seen\n");
        assert!(machine.console().text().await.unwrap().contains("a kept screen"));
        guest.close().await;
    }
    backend.remove_lab(&lab.id).await.unwrap();
    let closed = found[0].guest(Duration::from_secs(60)).await.unwrap_err();
    assert_eq!(closed.kind(), ErrorKind::MachineDied, "{closed:?}");
    assert_eq!(kept_machines(&backend, &lab).await.unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(backend.leftovers().await, Vec::<String>::new());
}

#[tokio::test(start_paused = true)]
async fn nothing_is_kept_without_a_machine_to_inspect() {
    let keep = |build: Build| build.on_failure(FailurePolicy::Keep);
    // No machine was ever started.
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
    assert!(ended.is_cancelled());
    assert_eq!(backend.leftovers().await, Vec::<String>::new());
}

#[tokio::test(start_paused = true)]
async fn a_lab_that_cannot_be_kept_is_removed_with_a_warning() {
    let backend = MemoryBackend::new()
        .machine("a", |guest| guest.on("work", Response::fails(3, "no\n")))
        .fails(Operation::Keep, Fault::new(rudder_core::ErrorKind::Unsupported, "not here"));
    let keep = |build: Build| build.on_failure(FailurePolicy::Keep);
    let ended = build_with(&backend, plan(vec![vm("a", vec![shell("work", "work")])]), keep, &[]).await;
    assert_eq!(ended.warnings(), ["the machines cannot be kept: not here"]);
    assert_eq!(ended.failure().kept, None);
}

#[tokio::test(start_paused = true)]
async fn kept_machines_are_removed_by_the_next_clean_up_once_they_have_expired() {
    let script =
        |backend: MemoryBackend| backend.machine("a", |guest| guest.on("work", Response::fails(3, "no\n")));
    for (time, left) in [(Duration::ZERO, 0), (Duration::from_secs(3600), 1)] {
        let backend = script(MemoryBackend::new());
        let keep = |build: Build| build.on_failure(FailurePolicy::Keep).keep_for(time);
        let plan = plan(vec![vm("a", vec![shell("work", "work")])]);
        let build = keep(Build::new(read(plan), Arc::new(backend.clone())));
        let error = build.start().outcome().await.expect_err("a failure");
        assert!(error.build_failure().unwrap().kept.is_some());
        backend.reap().await.unwrap();
        assert_eq!(kept_labs(&backend).await.unwrap().len(), left);
        assert_eq!(backend.inventory().running.len(), left);
    }
}

#[tokio::test(start_paused = true)]
async fn machines_of_a_remote_backend_are_reached_with_the_key_that_is_stored_there() {
    let reports = tempfile::tempdir().unwrap();
    let backend = MemoryBackend::new().remote().machine("a", |guest| {
        guest.on("work", Response::fails(3, "no\n")).on("look", Response::ok("seen\n"))
    });
    let plan = plan(vec![vm("a", vec![shell("work", "work")])]);
    let build = Build::new(read(plan), Arc::new(backend.clone())).on_failure(FailurePolicy::Keep);
    let error = build.report_dir(reports.path()).start().outcome().await.expect_err("a failure");
    let lab = error.build_failure().unwrap().kept.clone().unwrap();
    // The key is written here for `ssh -i`; a program on another host does not find it.
    let key = lab.logins[0].key.clone().unwrap();
    assert!(key.starts_with(reports.path()), "{key:?}");
    std::fs::remove_file(&key).unwrap();
    let machines = kept_machines(&backend, &lab).await.unwrap();
    let guest = machines[0].guest(Duration::from_secs(60)).await.unwrap();
    assert_eq!(guest.command("look").await.unwrap().stdout, "seen\n");
    guest.close().await;
    backend.remove_lab(&lab.id).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_build_that_loses_its_lab_fails_and_names_it() {
    let backend = MemoryBackend::new().every_machine(|guest| guest.on("work", Response::ok("").hangs()));
    let taken = backend.clone();
    let work = plan(vec![vm("a", vec![shell("work", "work")])]);
    let ended = run(
        &backend,
        work,
        |build| build,
        &[],
        |event, _| {
            if matches!(event.kind, EventKind::StepStarted { .. }) {
                let labs = taken.inventory().labs;
                assert!(taken.take_lab(&rudder_core::backend::LabId::parse(&labs[0]).unwrap()));
            }
        },
    )
    .await;
    assert_eq!(ended.error().kind(), ErrorKind::Conflict);
    assert!(ended.error().report().contains("this process has lost lab "), "{:?}", ended.error());
    assert_eq!(backend.leftovers().await, Vec::<String>::new());
}
