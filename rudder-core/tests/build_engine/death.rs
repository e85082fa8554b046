//! Machines that end unexpectedly: detected at once and reported with the right cause, in any phase.

use super::{Ended, build, plans::*};
use rudder_core::{
    ErrorKind,
    backend::Death,
    event::{EventKind, VmPhase as V},
    memory::{MemoryBackend, Response, Silence},
};
use std::time::Duration;

/// Returns how long a VM was in this phase, in milliseconds.
fn took(ended: &Ended, phase: &str) -> u64 {
    let Some(EventKind::Finished { timings, .. }) = ended.events.last().map(|event| &event.kind) else {
        panic!("expected a last word")
    };
    timings.iter().find(|timing| timing.vm.is_some() && timing.phase == phase).unwrap().millis
}

#[tokio::test(start_paused = true)]
async fn a_machine_that_dies_in_a_step_is_reported_with_its_cause() {
    for (cause, words, kind) in [
        (
            Death::Hypervisor,
            "the hypervisor's process ended while running step 1 (work)",
            ErrorKind::MachineDied,
        ),
        (
            Death::GuestPanic,
            "the guest's kernel panicked while running step 1 (work)",
            ErrorKind::MachineDied,
        ),
        (Death::IoError, "a disk of the machine could not be read or written", ErrorKind::MachineDied),
        (Death::HostDiskFull, "the host has no space left", ErrorKind::HostDiskFull),
    ] {
        let backend = MemoryBackend::new().machine("a", |guest| {
            guest.on("work", Response::ok("half\n").wait(Duration::from_secs(1)).dies(cause))
        });
        let ended = build(&backend, plan(vec![vm("a", vec![shell("work", "work")])])).await;
        let report = &ended.failure().report;
        assert_eq!(ended.error().kind(), kind, "{report}");
        assert!(report.message.contains(words), "{report}");
        assert_eq!(report.output_tail, ["half"]);
        assert!(took(&ended, "Provisioning") <= 2000, "{report}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_panic_on_the_serial_console_is_reported_at_once() {
    let console = "[    0.1] Kernel panic - not syncing: IO-APIC + timer doesn't work!\r\n";
    let backend =
        MemoryBackend::new().machine("a", |guest| guest.serial(console).never_answers(Silence::Accepts));
    let ended = build(&backend, plan(vec![vm("a", vec![shell("work", "work")])])).await;
    let report = &ended.failure().report;
    assert_eq!(ended.error().kind(), ErrorKind::MachineDied);
    let words = "the guest's kernel panicked while booting: [    0.1] Kernel panic - not syncing: IO-APIC";
    assert!(report.message.contains(words), "{report}");
    assert!(took(&ended, "Booting") <= 10_000, "{report}");
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_powers_off_in_a_step_is_reported_as_such() {
    let backend =
        MemoryBackend::new().machine("a", |guest| guest.on("work", Response::ok("bye\n").powers_off()));
    let ended =
        build(&backend, plan(vec![vm("a", vec![shell("work", "work"), shell("more", "true")])])).await;
    let report = &ended.failure().report;
    assert_eq!(ended.error().kind(), ErrorKind::MachineDied);
    assert!(report.message.contains("the guest powered itself off while running step 1 (work)"), "{report}");
    assert!(took(&ended, "Provisioning") <= 2000, "{report}");
}

#[tokio::test(start_paused = true)]
async fn a_machine_that_dies_while_booting_fails_without_waiting_for_ssh() {
    let backend = MemoryBackend::new().machine("a", |guest| {
        guest
            .boot_delay(Duration::from_secs(60))
            .dies_after_power_on(Death::GuestPanic, Duration::from_secs(3))
    });
    let ended = build(&backend, plan(vec![vm("a", vec![])])).await;
    let report = &ended.failure().report;
    assert!(report.message.contains("the guest's kernel panicked while booting"), "{report}");
    assert!(report.serial_tail.iter().any(|line| line.contains("Kernel panic")), "{report}");
    assert!(took(&ended, "Booting") <= 5000, "{report}");
}

#[tokio::test(start_paused = true)]
async fn a_machine_that_dies_at_a_barrier_or_while_shutting_down_is_reported() {
    let backend = MemoryBackend::new()
        .machine("a", |guest| guest.dies_after_power_on(Death::Hypervisor, Duration::from_secs(30)))
        .machine("b", |guest| guest.on("work", Response::ok("").wait(Duration::from_secs(60))));
    let plan_of_two = plan(vec![vm("a", vec![]), vm("b", vec![shell("slow", "work")])]);
    let ended = build(&backend, plan_of_two).await;
    let report = &ended.failure().report;
    assert!(
        report.message.contains("vm a: the hypervisor's process ended while waiting for the other VMs"),
        "{report}"
    );

    let backend = MemoryBackend::new().machine("a", |guest| guest.dies_in_shutdown(Death::IoError));
    let ended = build(&backend, plan(vec![vm("a", vec![])])).await;
    let report = &ended.failure().report;
    assert!(report.message.contains("while shutting down"), "{report}");
    assert_eq!(report.phase, Some(V::ShuttingDown));
}
