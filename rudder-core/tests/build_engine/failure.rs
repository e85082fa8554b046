//! Failing builds: the error, its report, and the evidence.

use super::{build, build_with, hooks::Hook, plans::*};
use rudder_core::{
    ErrorKind,
    event::{BuildPhase as B, CommandStatus, VmPhase as V},
    memory::{Fault, Guest, MemoryBackend, Operation, Response, Silence},
};

#[tokio::test(start_paused = true)]
async fn a_failed_step_is_fully_reported_and_stops_the_other_machines() {
    let say = Response::ok("Reading package lists...\n").stderr("E: no such package\n").exit(3);
    let console = "\x1b[2J\x1b[0mDebian GNU/Linux\r\nlogin: ";
    let backend = MemoryBackend::new()
        .machine("a", |guest: Guest| guest.on("apt-get", say).serial(console))
        .machine("b", |guest| guest.on("forever", Response::ok("").hangs()));
    let steps = vec![shell("first", "true"), shell("install", "apt-get install nothing")];
    let ended = build(&backend, plan(vec![vm("b", vec![shell("wait", "forever")]), vm("a", steps)])).await;
    let failure = ended.failure();
    assert_eq!(ended.error().kind(), ErrorKind::StepFailed);
    let report = &failure.report;
    assert_eq!(report.vm.as_deref(), Some("a"));
    assert_eq!(report.phase, Some(V::Provisioning));
    assert_eq!(report.step.as_deref(), Some("2 (install)"));
    assert_eq!(report.exit, Some(CommandStatus::Code(3)));
    assert_eq!(report.output_tail, ["Reading package lists...", "E: no such package"]);
    assert_eq!(report.serial_tail, ["Debian GNU/Linux", "login:"]);
    assert!(report.message.starts_with("build web: vm a: step 2 (install): "), "{report}");
    assert_eq!(ended.vm_phases("b").last(), Some(&V::Failed));
    assert_eq!(ended.build_phases(), [B::Pending, B::Networking, B::Building, B::Failed]);
}

#[tokio::test(start_paused = true)]
async fn every_operation_of_the_backend_can_fail() {
    use Operation as O;
    for (operation, last) in [
        (O::OpenLab, V::Pending),
        (O::Import, V::SourceImporting),
        (O::Fetch, V::SourceImporting),
        (O::CreateMachine, V::SourceImporting),
        (O::Start, V::Booting),
        (O::Capture, V::ShuttingDown),
        (O::Publish, V::DiskCaptured),
    ] {
        let backend = MemoryBackend::new().fails(operation, Fault::new(ErrorKind::Io, "the shelf fell down"));
        let ended = build(&backend, plan(vec![vm("a", vec![file("http://files.test/tool", "/tool")])])).await;
        let failure = ended.failure();
        assert_eq!(ended.error().kind(), ErrorKind::Io, "{operation:?}");
        assert!(failure.report.message.contains("the shelf fell down"), "{operation:?}: {}", failure.report);
        let phases = ended.vm_phases("a");
        let phases: Vec<_> = phases.into_iter().filter(|phase| *phase != V::Failed).collect();
        assert_eq!(phases.last(), Some(&last), "{operation:?}");
        assert_eq!(ended.build_phases().last(), Some(&B::Failed));
        assert_eq!(backend.inventory().modules, Vec::<String>::new(), "{operation:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_bug_in_a_backend_is_an_ordinary_failure() {
    use Operation as O;
    for operation in [O::OpenLab, O::Import, O::Start, O::Capture, O::Publish] {
        let backend = MemoryBackend::new();
        let plan = plan(vec![vm("a", vec![])]);
        let ended = build_with(&backend, plan, |build| build, &[(operation, Hook::Panics)]).await;
        assert_eq!(ended.error().kind(), ErrorKind::Internal, "{operation:?}");
        let message = &ended.failure().report.message;
        assert!(message.contains(&format!("panicked: a bug in {operation:?}")), "{message}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_image_larger_than_its_disk_is_reported_with_both_sizes() {
    let backend =
        MemoryBackend::new().source("http://images.test/base.qcow2", |source| source.virtual_size(40 << 30));
    let ended = build(&backend, plan(vec![vm("a", vec![])])).await;
    let report = &ended.failure().report;
    assert_eq!(ended.error().kind(), ErrorKind::InvalidInput);
    assert!(report.message.contains("42949672960") && report.message.contains("21474836480"), "{report}");
    assert!(report.message.starts_with("build web: vm a: disk rootdisk: "), "{report}");
}

#[tokio::test(start_paused = true)]
async fn silence_and_refused_logins_are_distinguished() {
    for how in [Silence::Refuses, Silence::Accepts] {
        let backend = MemoryBackend::new().machine("a", |guest| guest.never_answers(how));
        let ended = build(&backend, plan(vec![vm("a", vec![])])).await;
        let report = &ended.failure().report;
        assert_eq!(ended.error().kind(), ErrorKind::GuestUnreachable, "{report}");
        assert!(report.message.contains("`sshTimeout`"), "{report}");
        assert_eq!(report.phase, Some(V::Booting));
        assert_eq!(report.serial_tail, ["Booting in memory"]);
    }
    let backend = MemoryBackend::new().machine("a", Guest::rejects_credentials);
    let ended = build(&backend, plan(vec![vm("a", vec![])])).await;
    assert_eq!(ended.error().kind(), ErrorKind::Authentication, "{}", ended.failure().report);
}
