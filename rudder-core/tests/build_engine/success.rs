//! Successful builds: order, overlap, and the contents of the module.

use super::{build, build_with, plans::*};
use rudder_core::{
    event::{BuildPhase as B, Event, EventKind, VmPhase as V},
    memory::{Fault, Guest, MemoryBackend, Operation, Response},
};
use serde_json::json;
use std::time::Duration;

#[tokio::test(start_paused = true)]
async fn a_build_runs_its_phases_and_leaves_only_a_module() {
    let backend = MemoryBackend::new()
        .machine("a", |guest| guest.on("make x", Response::ok("").writes("/opt/x", "hello\n")));
    let steps = vec![shell("write", "#!/bin/sh\nmake x\n"), file("http://files.test/tool", "/opt/tool")];
    let ended = build(&backend, plan(vec![vm("a", steps)])).await;
    let module = ended.module();
    assert_eq!(
        ended.build_phases(),
        [B::Pending, B::Networking, B::Building, B::CapturingDisks, B::TemplateProvisioning, B::Succeeded]
    );
    assert_eq!(
        ended.vm_phases("a"),
        [
            V::Pending,
            V::SourceImporting,
            V::Booting,
            V::Provisioning,
            V::ShuttingDown,
            V::DiskCaptured,
            V::Succeeded
        ]
    );
    assert_eq!((module.name.as_str(), module.machines.len()), ("web", 1));
    let machine = &module.machines[0];
    assert_eq!(machine.memory, 2 << 30, "clones get the base value, not the override of the build");
    let disks: Vec<&str> = machine.disks.iter().map(|disk| disk.name.as_str()).collect();
    assert_eq!(disks, ["rootdisk", "data"]);
    assert_eq!(backend.read_file("web", "a", "/opt/x").as_deref(), Some(b"hello\n".as_slice()));
    assert!(backend.read_file("web", "a", "/opt/tool").is_some());

    let provenance = &module.provenance;
    assert_eq!(provenance.versions["rudder"], env!("CARGO_PKG_VERSION"));
    assert_eq!(provenance.versions["backend"], "memory");
    let urls: Vec<&str> = provenance.inputs.iter().map(|input| input.url.as_str()).collect();
    assert!(
        urls.contains(&"http://images.test/base.qcow2") && urls.contains(&"http://files.test/tool"),
        "{urls:?}"
    );
    let fetched =
        ended.place(|event| matches!(&event.kind, EventKind::Input(input) if input.url.ends_with("/tool")));
    let booting = ended.place(|event| matches!(event.kind, EventKind::VmPhase { phase: V::Booting }));
    assert!(fetched < booting, "files are there before anything boots");
    let timed: Vec<&str> = provenance.timings.iter().map(|timing| timing.phase.as_str()).collect();
    assert!(timed.contains(&"Booting") && timed.contains(&"CapturingDisks"), "{timed:?}");
    assert!(ended.warnings().is_empty() && provenance.warnings.is_empty());
}

#[tokio::test(start_paused = true)]
async fn vms_are_provisioned_concurrently_and_shut_down_together() {
    let takes = |seconds| Response::ok("").wait(Duration::from_secs(seconds));
    let backend = MemoryBackend::new()
        .every_machine(|guest| guest.on("work slowly", takes(10)).on("work more slowly", takes(20)));
    let work = |how| vec![shell("work", how)];
    let plan = plan(vec![vm("a", work("work slowly")), vm("b", work("work more slowly"))]);
    let ended = build(&backend, plan).await;
    assert_eq!(ended.module().machines.len(), 2);
    let of = |vm: &'static str, like: fn(&EventKind) -> bool| {
        ended.place(move |event: &Event| event.vm.as_deref() == Some(vm) && like(&event.kind))
    };
    let started: fn(&EventKind) -> bool = |kind| matches!(kind, EventKind::StepStarted { .. });
    let finished: fn(&EventKind) -> bool = |kind| matches!(kind, EventKind::StepFinished { .. });
    let imported: fn(&EventKind) -> bool =
        |kind| matches!(kind, EventKind::VmPhase { phase: V::SourceImporting });
    let booting: fn(&EventKind) -> bool = |kind| matches!(kind, EventKind::VmPhase { phase: V::Booting });
    let shutting: fn(&EventKind) -> bool =
        |kind| matches!(kind, EventKind::VmPhase { phase: V::ShuttingDown });
    assert!(of("a", started) < of("b", finished) && of("b", started) < of("a", finished));
    assert!(of("b", imported) < of("a", booting) && of("a", imported) < of("b", booting));
    assert!(of("b", finished) < of("a", shutting), "the steps of one may need the others");
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_does_not_shut_down_is_killed_with_a_warning() {
    let backend = MemoryBackend::new().machine("a", Guest::ignores_shutdown);
    let ended = build(&backend, plan(vec![vm("a", vec![])])).await;
    let [warning] = ended.warnings()[..] else { panic!("expected one warning: {:?}", ended.warnings()) };
    assert!(warning.starts_with("the guest did not shut down within 2m and was killed ("), "{warning}");
    assert_eq!(ended.module().provenance.warnings, [format!("vm a: {warning}")]);
}

#[tokio::test(start_paused = true)]
async fn a_guest_may_be_powered_off_by_its_last_step() {
    let minute = Response::ok("").wait(Duration::from_secs(60));
    let backend = MemoryBackend::new().machine("b", |guest| guest.on("work", minute));
    let plan = plan(vec![vm("a", vec![shell("last", "poweroff")]), vm("b", vec![shell("slow", "work")])]);
    assert_eq!(build(&backend, plan).await.module().machines.len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_lab_that_cannot_be_removed_does_not_fail_the_build() {
    let fault = Fault::new(rudder_core::ErrorKind::Io, "the directory is busy");
    let backend = MemoryBackend::new().fails(Operation::Destroy, fault);
    let ended = super::run(&backend, plan(vec![vm("a", vec![])]), |build| build, &[], |_, _| {}).await;
    assert_eq!(ended.module().name, "web");
    let [warning] = ended.warnings()[..] else { panic!("expected one warning: {:?}", ended.warnings()) };
    assert!(warning.ends_with("is left to the next clean-up: the directory is busy"), "{warning}");
}

#[tokio::test(start_paused = true)]
async fn a_late_and_slow_reader_gets_all_important_events() {
    let noise: String = (0..500).map(|n| format!("line {n}\n")).collect();
    let backend = MemoryBackend::new().machine("a", |guest| guest.on("noise", Response::ok(noise)));
    let hooked = std::sync::Arc::new(super::Hooked::new(&backend, &[]));
    let plan = read(plan(vec![vm("a", vec![shell("noise", "noise")])]));
    let build = rudder_core::build::Build::new(plan, hooked).event_capacity(8).start();
    let mut early = build.events();
    let canceller = build.canceller();
    let mut late = early_end(build).await;
    canceller.cancel();
    let mut seen = Vec::new();
    while let Some(event) = late.next().await {
        seen.push(event);
    }
    let mut next = 0;
    let mut missed_in_all = 0;
    for event in &seen {
        if let EventKind::Lagged { missed } = event.kind {
            next += missed;
            missed_in_all += missed;
            assert_eq!(event.seq + 1, next);
        } else {
            assert_eq!(event.seq, next);
            next += 1;
        }
    }
    assert!(missed_in_all >= 492, "only the last 8 of 500 lines are kept, but {missed_in_all} were missed");
    let phases = seen.iter().filter(|event| matches!(event.kind, EventKind::VmPhase { .. })).count();
    assert_eq!(phases, 7, "phases are never lost");
    assert!(matches!(seen.last().unwrap().kind, EventKind::Finished { .. }));
    assert_eq!(early.next().await.unwrap(), seen[0], "another reader sees the same from the start");
}

/// Waits for the end of a build whose events are not being read, and returns a reader that starts then.
async fn early_end(build: rudder_core::build::BuildHandle) -> rudder_core::build::Events {
    let late = build.events();
    build.outcome().await.unwrap();
    late
}

#[tokio::test(start_paused = true)]
async fn a_locked_build_refuses_changed_inputs_before_it_boots() {
    let backend = MemoryBackend::new();
    let manifest = || plan(vec![vm("a", vec![])]);
    let first = build(&backend, manifest()).await;
    let same = build_with(&backend, manifest(), |build| build.locked(first.module()), &[]).await;
    assert_eq!(same.module().provenance.inputs, first.module().provenance.inputs);

    let backend = backend.source("http://images.test/base.qcow2", |source| source.revision(2));
    let changed = build_with(&backend, manifest(), |build| build.locked(first.module()), &[]).await;
    let failure = changed.failure();
    assert_eq!(changed.error().kind(), rudder_core::ErrorKind::ChecksumMismatch);
    assert!(failure.report.message.contains("http://images.test/base.qcow2"), "{}", failure.report);
    assert_eq!(changed.vm_phases("a"), [V::Pending, V::SourceImporting, V::Failed]);
}

#[tokio::test(start_paused = true)]
async fn unsupported_steps_are_refused_before_anything_starts() {
    let backend = MemoryBackend::new();
    let mut machine = vm("a", vec![]);
    machine["communicator"]["shell"] = json!("powershell");
    let ended = build(&backend, plan(vec![machine])).await;
    assert_eq!(ended.error().kind(), rudder_core::ErrorKind::Unsupported);
    assert_eq!(ended.build_phases(), [B::Pending, B::Failed]);
}
