//! Retries: only if another attempt could help, as often as the manifest says, in a new lab each time.

use super::{build, plans::*};
use rudder_core::{
    ErrorKind,
    backend::Death,
    event::EventKind,
    memory::{Fault, MemoryBackend, Operation},
};
use serde_json::json;
use std::time::Duration;

#[tokio::test(start_paused = true)]
async fn a_retried_build_can_succeed() {
    let backend = MemoryBackend::new().machine("a", |guest| {
        guest
            .boot_delay(Duration::from_secs(9))
            .dies_after_power_on(Death::Hypervisor, Duration::from_secs(1))
            .recovers_after(2)
    });
    let mut plan = plan(vec![vm("a", vec![])]);
    plan["retries"] = json!(2);
    let ended = build(&backend, plan).await;
    assert_eq!(ended.module().name, "web");
    let attempts: Vec<u32> = ended
        .events
        .iter()
        .filter_map(|event| match &event.kind {
            EventKind::BuildStarted { attempt, .. } => Some(*attempt),
            _ => None,
        })
        .collect();
    assert_eq!(attempts, [1, 2, 3]);
    let retrying = ended.place(|event| matches!(event.kind, EventKind::Retrying { attempt: 2, of: 3, .. }));
    let EventKind::Retrying { reason, .. } = &ended.events[retrying].kind else { unreachable!() };
    assert!(reason.contains("the hypervisor's process ended while booting"), "{reason}");
}

#[tokio::test(start_paused = true)]
async fn a_build_fails_after_its_retries_or_at_once_if_they_cannot_help() {
    for (kind, attempts) in [(ErrorKind::LaunchFailed, 3), (ErrorKind::HostMissing, 1)] {
        let backend = MemoryBackend::new().fails(Operation::Start, Fault::new(kind, "no"));
        let mut plan = plan(vec![vm("a", vec![])]);
        plan["retries"] = json!(2);
        let ended = build(&backend, plan).await;
        assert_eq!(ended.error().kind(), kind);
        let started =
            |event: &&rudder_core::event::Event| matches!(event.kind, EventKind::BuildStarted { .. });
        assert_eq!(ended.events.iter().filter(started).count(), attempts, "{kind:?}");
    }
}
