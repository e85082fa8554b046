//! Each limit ends its wait, is named in the error, and so is the field that raises it.

use super::{build, build_with, hooks::Hook, plans::*};
use rudder_core::{
    ErrorKind,
    memory::{MemoryBackend, Operation, Response, Silence},
};
use serde_json::json;
use std::time::Duration;

#[tokio::test(start_paused = true)]
async fn a_step_over_its_limit_is_ended_in_the_guest() {
    let backend =
        MemoryBackend::new().machine("a", |guest| guest.on("work", Response::ok("started\n").hangs()));
    let mut step = shell("work", "work");
    step["timeout"] = json!(5000);
    let ended = build(&backend, plan(vec![vm("a", vec![step])])).await;
    let report = &ended.failure().report;
    assert_eq!(ended.error().kind(), ErrorKind::TimedOut);
    assert!(
        report.message.contains("step 1 (work): the step did not end within its limit of 5 s"),
        "{report}"
    );
    assert!(report.message.contains("`stepTimeout`"), "{report}");
    assert_eq!(report.output_tail, ["started"]);
}

#[tokio::test(start_paused = true)]
async fn a_build_over_its_limit_fails_in_every_phase() {
    let hanging = MemoryBackend::new().machine("a", |guest| guest.on("work", Response::ok("").hangs()));
    let silent = MemoryBackend::new().machine("a", |guest| guest.never_answers(Silence::Accepts));
    let well = MemoryBackend::new();
    for (backend, hooks) in [
        (&hanging, vec![]),
        (&silent, vec![]),
        (&well, vec![(Operation::Import, Hook::Hangs)]),
        (&well, vec![(Operation::Capture, Hook::Hangs)]),
        (&well, vec![(Operation::Publish, Hook::Hangs)]),
    ] {
        let mut plan = plan(vec![vm("a", vec![shell("work", "work")])]);
        plan["timeout"] = json!(60_000);
        plan["retries"] = json!(3);
        let ended = build_with(backend, plan, |build| build, &hooks).await;
        let report = &ended.failure().report;
        assert_eq!(ended.error().kind(), ErrorKind::TimedOut, "{hooks:?}: {report}");
        assert!(report.message.contains("the build did not end within 1m"), "{report}");
        assert!(report.message.contains("`timeout`"), "{report}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_login_has_its_own_limit_from_power_on() {
    let backend = MemoryBackend::new().machine("a", |guest| guest.never_answers(Silence::Refuses));
    let mut machine = vm("a", vec![]);
    machine["communicator"]["timeout"] = json!(42_000);
    let ended = build(&backend, plan(vec![machine])).await;
    let report = &ended.failure().report;
    assert_eq!(ended.error().kind(), ErrorKind::GuestUnreachable);
    assert!(report.message.contains("42 s") && report.message.contains("`sshTimeout`"), "{report}");
}

#[tokio::test(start_paused = true)]
async fn cleaning_up_has_its_own_limit() {
    let backend = MemoryBackend::new();
    let options = |build: rudder_core::build::Build| build.cleanup_limit(Duration::from_secs(7));
    let hooks = [(Operation::Destroy, Hook::Hangs)];
    let ended = super::run(&backend, plan(vec![vm("a", vec![])]), options, &hooks, |_, _| {}).await;
    assert_eq!(ended.module().name, "web");
    let [warning] = ended.warnings()[..] else { panic!("expected one warning: {:?}", ended.warnings()) };
    assert!(warning.ends_with("it took longer than 7s"), "{warning}");
}
