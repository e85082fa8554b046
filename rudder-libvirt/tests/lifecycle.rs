//! The life cycle of machines on a real libvirt: start, wait, stop in every order, death, capture. Nothing is left
//! afterwards.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use common::{
    Fixture, backend, blank_machine, daemon::orphans, eventually, qemus_of, sector, sector_machine,
};
use rudder_core::{
    ErrorKind,
    backend::{Backend, Death, Exit, LabSpec, LabState, Machine, ModuleDraft, Progress, Retention, Stop},
    digest::Digest,
    hardware::Bus,
    module::{Provenance, TemplateMachine},
};
use rustix::process::{Pid, Signal, kill_process};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

fn killed(exit: &Exit) -> bool {
    matches!(exit, Exit::Killed { .. })
}

/// Waits until a guest is listening for its power button.
async fn ready(machine: &dyn Machine) {
    while machine.serial_tail(100).await.unwrap() != b"ready" {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_starts_stops_and_starts_again() {
    let fixture = Fixture::new().await;
    let lab = fixture.lab().await;
    let spec = blank_machine(&*lab, "web", &[Bus::Virtio]).await;
    let machine = lab.create_machine(&spec).await.unwrap();
    assert_eq!(fixture.daemon.domains(), [format!("rudder.{}.web", lab.id())]);
    assert_eq!(machine.wait().await.unwrap_err().kind(), ErrorKind::Conflict);
    assert_eq!(machine.stop(Stop::Kill).await.unwrap_err().kind(), ErrorKind::Conflict);
    assert_eq!(machine.dial(22).await.map(drop).unwrap_err().kind(), ErrorKind::Conflict);
    assert_eq!(machine.screenshot().await.unwrap_err().kind(), ErrorKind::Conflict);

    for _ in 0..2 {
        machine.start().await.unwrap();
        assert_eq!(machine.start().await.unwrap_err().kind(), ErrorKind::Conflict);
        let waiting = Arc::clone(&machine);
        let waiter = tokio::spawn(async move { waiting.wait().await });
        assert!(killed(&machine.stop(Stop::Kill).await.unwrap()));
        assert!(killed(&waiter.await.unwrap().unwrap()));
        assert!(killed(&machine.stop(Stop::Kill).await.unwrap()));
    }

    assert_eq!(lab.create_machine(&spec).await.map(drop).unwrap_err().kind(), ErrorKind::Conflict);
    lab.destroy().await.unwrap();
    lab.destroy().await.unwrap();
    assert_eq!(machine.start().await.unwrap_err().kind(), ErrorKind::Conflict);
    drop((machine, lab));
    fixture.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn machines_start_with_disks_on_every_bus() {
    let fixture = Fixture::new().await;
    let lab = fixture.lab().await;
    for first in [Bus::Virtio, Bus::Scsi, Bus::Sata, Bus::Usb, Bus::Ide] {
        let buses = [first, Bus::Virtio, Bus::Scsi, Bus::Sata, Bus::Usb, Bus::Ide];
        let mut spec = blank_machine(&*lab, &format!("vm, \"{first:?}\" ü"), &buses).await;
        spec.seed = Some(rudder_core::backend::Seed::new(
            String::new(),
            Vec::new(),
            None,
            Arc::from(vec![0; 1 << 20].as_slice()),
        ));
        let machine = lab.create_machine(&spec).await.unwrap();
        machine.start().await.unwrap();
        assert!(killed(&machine.stop(Stop::Graceful { limit: Duration::from_millis(100) }).await.unwrap()));
    }
    lab.destroy().await.unwrap();
    drop(lab);
    fixture.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_reach_port_display_and_serial_console() {
    let fixture = Fixture::new().await;
    let lab = fixture.lab().await;
    let machine = lab.create_machine(&blank_machine(&*lab, "web", &[Bus::Virtio]).await).await.unwrap();
    machine.start().await.unwrap();
    // This guest never configures its address.
    let error = machine.dial(22).await.map(drop).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::GuestUnreachable);
    assert_eq!(machine.reachable_at(22), None);
    assert_eq!(machine.dial(23).await.map(drop).unwrap_err().kind(), ErrorKind::InvalidInput);
    // Two viewers at once, while other clients use the serial console and take a screenshot.
    let (mut one, mut other) = (machine.display().await.unwrap(), machine.display().await.unwrap());
    for display in [&mut one, &mut other] {
        let mut greeting = [0; 4];
        display.read_exact(&mut greeting).await.unwrap();
        assert_eq!(&greeting, b"RFB ");
    }
    machine.serial().await.unwrap().write_all(b"x").await.unwrap();
    assert_eq!(machine.serial_tail(100).await.unwrap(), b"");
    assert!(machine.screenshot().await.unwrap().starts_with(b"\x89PNG"));
    assert_eq!(machine.access().len(), 3);
    lab.destroy().await.unwrap();
    drop((machine, lab));
    fixture.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_exit_reason_is_distinguished() {
    let fixture = Fixture::new().await;
    let lab = fixture.lab().await;
    let mut machines = Vec::new();
    let guests = [sector::power_off("bye"), sector::power_off_on_button(), sector::panic(), sector::idle()];
    for (index, guest) in guests.into_iter().enumerate() {
        let mut spec = sector_machine(&*lab, &guest, Bus::Virtio, 1 << 20).await;
        spec.name = format!("guest{index}");
        machines.push(lab.create_machine(&spec).await.unwrap());
    }
    let [off, button, panic, rest] = machines.as_slice() else { panic!() };

    off.start().await.unwrap();
    assert_eq!(off.wait().await.unwrap(), Exit::PoweredOff);
    assert_eq!(off.serial_tail(3).await.unwrap(), b"bye");

    button.start().await.unwrap();
    ready(&**button).await;
    let exit = button.stop(Stop::Graceful { limit: Duration::from_secs(60) }).await.unwrap();
    assert_eq!(exit, Exit::PoweredOff);

    panic.start().await.unwrap();
    let exit = panic.wait().await.unwrap();
    assert!(matches!(exit, Exit::Died { cause: Death::GuestPanic, .. }), "{exit:?}");
    assert!(panic.screenshot().await.unwrap().starts_with(b"\x89PNG"), "a last screenshot is kept");

    rest.start().await.unwrap();
    let [qemu] = qemus_of(fixture.dir.path())[..] else { panic!("expected one QEMU") };
    kill_process(Pid::from_raw(qemu).unwrap(), Signal::KILL).unwrap();
    let exit = rest.wait().await.unwrap();
    assert!(matches!(exit, Exit::Died { cause: Death::Hypervisor, .. }), "{exit:?}");
    rest.start().await.unwrap();
    fixture.daemon.virsh(&["destroy", &format!("rudder.{}.guest3", lab.id())]);
    let exit = rest.wait().await.unwrap();
    assert!(
        matches!(&exit, Exit::Died { detail, .. } if detail.contains("was destroyed from outside")),
        "{exit:?}"
    );

    lab.destroy().await.unwrap();
    drop((machines, lab));
    fixture.assert_clean().await;
}

/// The processes of machines are orphans, and libvirt waits until the host's init has reaped them.
#[tokio::test(flavor = "multi_thread")]
async fn exit_reasons_are_reported_when_the_init_of_the_host_is_slow() {
    let fixture = Fixture::new().await;
    let lab = fixture.lab().await;
    let qemu = || {
        let [qemu] = qemus_of(fixture.dir.path())[..] else { panic!("expected one QEMU") };
        orphans::hold(qemu);
        qemu
    };
    let is_held = |name: &str| {
        // A query through libvirt would block, too.
        let status =
            fixture.dir.path().join(format!("libvirt/run/libvirt/qemu/run/rudder.{}.{name}.xml", lab.id()));
        assert!(status.exists(), "expected libvirt not to have released {name} yet");
    };

    let rest = sector_machine(&*lab, &sector::idle(), Bus::Virtio, 1 << 20).await;
    let rest = lab.create_machine(&rest).await.unwrap();
    rest.start().await.unwrap();
    let pid = qemu();
    kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
    let since = Instant::now();
    let exit = rest.wait().await.unwrap();
    assert!(since.elapsed() < Duration::from_secs(5), "it took {:?}", since.elapsed());
    assert!(
        matches!(&exit, Exit::Died { cause: Death::Hypervisor, detail } if detail.contains("signal 9")),
        "{exit:?}"
    );
    is_held("guest");
    // Starting it again waits until libvirt has released it.
    let again = tokio::spawn({
        let rest = Arc::clone(&rest);
        async move { rest.start().await }
    });
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(!again.is_finished(), "expected the start to wait");
    orphans::release(pid);
    again.await.unwrap().unwrap();
    let pid = qemu();
    assert!(killed(&rest.stop(Stop::Kill).await.unwrap()));
    is_held("guest");
    orphans::release(pid);

    // A guest that powers off is not dead, however late libvirt reports it.
    let mut off = sector_machine(&*lab, &sector::power_off_on_button(), Bus::Virtio, 1 << 20).await;
    off.name = "off".to_owned();
    let off = lab.create_machine(&off).await.unwrap();
    off.start().await.unwrap();
    ready(&*off).await;
    let pid = qemu();
    let late = tokio::spawn(async move {
        tokio::time::sleep(Duration::from_secs(3)).await;
        orphans::release(pid);
    });
    let exit = off.stop(Stop::Graceful { limit: Duration::from_secs(60) }).await.unwrap();
    assert_eq!(exit, Exit::PoweredOff);
    late.await.unwrap();

    lab.destroy().await.unwrap();
    drop((rest, off, lab));
    fixture.assert_clean().await;
}

fn template(disks: &[rudder_core::module::CapturedDisk]) -> TemplateMachine {
    let mut template = TemplateMachine::new("web", 1, 64 << 20);
    template.disks = disks.to_vec();
    template
}

#[tokio::test(flavor = "multi_thread")]
async fn a_module_is_also_a_set_of_halted_domains() {
    let fixture = Fixture::new().await;
    for _ in 0..2 {
        let lab = fixture.lab().await;
        let spec = blank_machine(&*lab, "web", &[Bus::Virtio, Bus::Scsi]).await;
        let machine = lab.create_machine(&spec).await.unwrap();
        machine.start().await.unwrap();
        assert_eq!(
            machine.capture("disk0", &Progress::none()).await.unwrap_err().kind(),
            ErrorKind::Conflict
        );
        machine.stop(Stop::Kill).await.unwrap();
        let mut disks = Vec::new();
        for disk in ["disk0", "disk1"] {
            disks.push(machine.capture(disk, &Progress::none()).await.unwrap());
        }
        let mut provenance = Provenance::new("name: web\n", Digest::of(b""));
        provenance.versions = lab.versions();
        let draft = ModuleDraft::new("base", vec![template(&disks)], common::network(), provenance);
        let module = lab.publish(draft).await.unwrap();
        lab.destroy().await.unwrap();
        assert_eq!(fixture.daemon.domains(), ["base.web"]);

        // It can be started; what is written then is discarded, and the module stays unchanged.
        let disk = module.path.unwrap().parent().unwrap().join(&module.machines[0].disks[0].file);
        let before = std::fs::read(&disk).unwrap();
        fixture.daemon.virsh(&["start", "base.web"]);
        fixture.daemon.virsh(&["destroy", "base.web"]);
        assert!(before == std::fs::read(&disk).unwrap());
    }
    // Domains that a builder did not define are added by the next reap.
    fixture.daemon.virsh(&["undefine", "base.web"]);
    fixture.backend.reap().await.unwrap();
    assert_eq!(fixture.daemon.domains(), ["base.web"]);
    // The domains of a module that another process removed from the store are removed from libvirt.
    fixture.backend.store().remove_module("base").await.unwrap();
    fixture.backend.reap().await.unwrap();
    assert_eq!(fixture.daemon.domains(), Vec::<String>::new());
    fixture.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn dropped_labs_are_removed_and_foreign_domains_stay() {
    let fixture = Fixture::new().await;
    let foreign = fixture.dir.path().join("foreign.xml");
    std::fs::write(
        &foreign,
        "<domain type='qemu'><name>rudder-like</name><memory>65536</memory><os><type>hvm</type></os></domain>",
    )
    .unwrap();
    fixture.daemon.virsh(&["define", foreign.to_str().unwrap()]);
    let lab = fixture.lab().await;
    let machine = lab.create_machine(&blank_machine(&*lab, "web", &[Bus::Virtio]).await).await.unwrap();
    machine.start().await.unwrap();
    // Another backend on the same store, as in another process: the lab is alive, so it is not touched.
    let other = backend(fixture.dir.path(), &fixture.daemon);
    assert_eq!(other.reap().await.unwrap().removed, Vec::<String>::new());
    assert_eq!(fixture.daemon.domains().len(), 2);
    drop((machine, lab));
    eventually("the domain is removed", || fixture.daemon.domains() == ["rudder-like"]).await;
    other.reap().await.unwrap();
    assert_eq!(fixture.daemon.domains(), ["rudder-like"]);
    fixture.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kept_lab_stays_until_it_is_removed() {
    let fixture = Fixture::new().await;
    let mut spec = LabSpec::new("test", common::network());
    spec.retention = Retention::MayBeKept;
    let lab = fixture.backend.open_lab(&spec).await.unwrap();
    let machine = lab.create_machine(&blank_machine(&*lab, "web", &[Bus::Virtio]).await).await.unwrap();
    machine.start().await.unwrap();
    lab.keep(None).await.unwrap();
    let access = machine.access();
    assert!(access.iter().any(|line| line.contains("virt-viewer")), "{access:?}");
    drop((machine, lab));
    let Fixture { backend: first, daemon, dir, permit: _permit } = fixture;
    drop(first);
    let other = backend(dir.path(), &daemon);
    other.reap().await.unwrap();
    assert_eq!(other.labs().await.unwrap()[0].state, LabState::Kept { expires: None });
    assert_eq!(qemus_of(dir.path()).len(), 1);
    other.remove_lab(&spec.id).await.unwrap();
    assert_eq!(other.remove_lab(&spec.id).await.unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(daemon.domains(), Vec::<String>::new());
    assert_eq!(qemus_of(dir.path()), Vec::<i32>::new());
}
