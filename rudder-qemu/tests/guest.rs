//! What guests do, seen from outside: they boot from every bus, power off, panic, and fill the host's disk.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;
#[path = "../../rudder-local/tests/common/small_disk.rs"]
mod small_disk;

use common::{Fixture, eventually, sector, sector_machine};
use rudder_core::{
    ErrorKind,
    backend::{Backend, Death, Exit, ImportRequest, Machine, Progress, Stop},
    hardware::{Bus, NicModel},
    plan::{PlannedSource, PlannedUrl},
};
use rudder_local::store::Store;
use rudder_qemu::{Accelerator, QemuBackend};
use small_disk::{SmallDisk, may_mount};
use std::{process::Command, time::Duration};
use url::Url;

const DISK: u64 = 64 << 20;

async fn wait(machine: &dyn Machine) -> Exit {
    tokio::time::timeout(Duration::from_secs(120), machine.wait()).await.unwrap().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_boots_from_every_bootable_bus_and_powers_off() {
    let fixture = Fixture::new().await;
    for bus in [Bus::Virtio, Bus::Scsi, Bus::Sata, Bus::Ide] {
        let lab = fixture.lab().await;
        let mut spec = sector_machine(&*lab, &sector::power_off("hello, \"world\""), bus, DISK).await;
        // Additional disks on any bus make no difference.
        let request = ImportRequest::new("guest", "extra", PlannedSource::Blank, Some(DISK));
        for other in [Bus::Virtio, Bus::Scsi, Bus::Sata, Bus::Usb, Bus::Ide] {
            let volume = lab.import(&request, &Progress::none()).await.unwrap().volume;
            let name = format!("extra-{other:?}").to_lowercase();
            spec.disks.push(rudder_core::backend::MachineDisk::new(name, other, volume));
        }
        let models = [
            NicModel::E1000,
            NicModel::Virtio,
            NicModel::E1000e,
            NicModel::Rtl8139,
            NicModel::Pcnet,
            NicModel::Ne2kPci,
        ];
        spec.nics = (1..).zip(models).map(|(slot, model)| common::nic(slot, model)).collect();
        let machine = lab.create_machine(&spec).await.unwrap();
        machine.start().await.unwrap();
        assert_eq!(wait(&*machine).await, Exit::PoweredOff, "{bus:?}");
        assert_eq!(machine.serial_tail(1000).await.unwrap(), b"hello, \"world\"", "{bus:?}");
        assert_eq!(machine.serial_tail(2).await.unwrap(), b"d\"");
        lab.destroy().await.unwrap();
    }
    fixture.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blank_disk_falls_through_to_the_cd_and_boots_after_the_installation() {
    let fixture = Fixture::new().await;
    let installed = sector::power_off("installed");
    let cdrom = fixture.dir.path().join("install.iso");
    std::fs::write(&cdrom, sector::cdrom(&sector::install("installing, ", &installed))).unwrap();
    let other = fixture.dir.path().join("other.iso");
    std::fs::write(&other, vec![0; 1 << 20]).unwrap();
    // The second combination leaves no space for CD-ROMs on IDE.
    for buses in [&[Bus::Virtio][..], &[Bus::Ide; 3], &[Bus::Sata], &[Bus::Scsi]] {
        let lab = fixture.lab().await;
        let mut spec = common::blank_machine(&*lab, "web", buses).await;
        for (name, path) in [("other", &other), ("cdrom", &cdrom)] {
            let url = PlannedUrl::new(Url::from_file_path(path).unwrap());
            let request = ImportRequest::cdrom("web", name, url);
            spec.cdroms.push(lab.import(&request, &Progress::none()).await.unwrap().volume);
        }
        let machine = lab.create_machine(&spec).await.unwrap();
        machine.start().await.unwrap();
        // Firmware skips the CD-ROM that does not boot. The bootable one resets the machine, which then boots the disk.
        assert_eq!(wait(&*machine).await, Exit::PoweredOff, "{buses:?}");
        let output = String::from_utf8(machine.serial_tail(1000).await.unwrap()).unwrap();
        assert_eq!(output, "installing, installed", "{buses:?}");
        lab.destroy().await.unwrap();
    }
    assert_eq!(std::fs::read(&other).unwrap(), vec![0; 1 << 20]);
    fixture.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_powers_off_when_its_power_button_is_pressed() {
    let fixture = Fixture::new().await;
    let lab = fixture.lab().await;
    let spec = sector_machine(&*lab, &sector::power_off_on_button(), Bus::Virtio, DISK).await;
    let machine = lab.create_machine(&spec).await.unwrap();
    machine.start().await.unwrap();
    while machine.serial_tail(100).await.unwrap() != b"ready" {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let exit = machine.stop(Stop::Graceful { limit: Duration::from_secs(120) }).await.unwrap();
    assert_eq!(exit, Exit::PoweredOff);
    assert_eq!(machine.stop(Stop::Kill).await.unwrap(), Exit::PoweredOff);
    // A second run has its own console.
    machine.start().await.unwrap();
    assert!(matches!(machine.stop(Stop::Kill).await.unwrap(), Exit::Killed { .. }));
    lab.destroy().await.unwrap();
    drop((machine, lab));
    fixture.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_panic_is_detected_and_leaves_a_screenshot() {
    let fixture = Fixture::new().await;
    let lab = fixture.lab().await;
    let machine =
        lab.create_machine(&sector_machine(&*lab, &sector::panic(), Bus::Virtio, DISK).await).await.unwrap();
    machine.start().await.unwrap();
    let Exit::Died { cause: Death::GuestPanic, detail } = wait(&*machine).await else { panic!() };
    assert_eq!(detail, "the guest's kernel panicked");
    assert!(machine.screenshot().await.unwrap().starts_with(b"\x89PNG"));
    assert_eq!(machine.serial_tail(100).await.unwrap(), b"Kernel panic");
    lab.destroy().await.unwrap();
    drop((machine, lab));
    fixture.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_of_the_host_is_reported_as_the_cause() {
    if !may_mount("a_full_disk_of_the_host_is_reported_as_the_cause") {
        return;
    }
    // Waits for its turn among the tests.
    let fixture = Fixture::new().await;
    let root = fixture.dir.path().join("small");
    let small = SmallDisk::mount(&root, 12);
    let store = Store::open(root.join("store")).unwrap();
    let backend = QemuBackend::builder(store).accelerator(Accelerator::Tcg).build();
    let spec = rudder_core::backend::LabSpec::new("full", common::network());
    let lab = backend.open_lab(&spec).await.unwrap();
    let machine = lab
        .create_machine(&sector_machine(&*lab, &sector::fill_disk(), Bus::Virtio, DISK).await)
        .await
        .unwrap();
    machine.start().await.unwrap();
    let Exit::Died { cause, detail } = wait(&*machine).await else { panic!() };
    assert_eq!(cause, Death::HostDiskFull);
    assert_eq!(
        detail,
        "the host has no space left for the machine's disks: write of disk0 failed: No space left on device"
    );
    // There is no space for a copy either.
    let error = machine.capture("root", &Progress::none()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::HostDiskFull, "{}", error.report());
    lab.destroy().await.unwrap();
    drop((machine, lab));
    eventually("the lab is removed", || std::fs::read_dir(root.join("store/labs")).unwrap().count() == 0)
        .await;
    drop(small);
    fixture.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_message_of_a_qemu_that_refuses_to_start_is_reported() {
    let fixture = Fixture::new().await;
    let lab = fixture.lab().await;
    let spec = common::blank_machine(&*lab, "web", &[Bus::Virtio]).await;
    let machine = lab.create_machine(&spec).await.unwrap();
    let labs = std::fs::read_dir(fixture.dir.path().join("labs")).unwrap();
    let directory = labs.flatten().next().unwrap().path();
    std::fs::write(directory.join(&spec.disks[0].volume.id), "not a disk").unwrap();
    let error = machine.start().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::LaunchFailed);
    assert!(error.report().starts_with("vm web: QEMU refused to start: "), "{}", error.report());
    assert!(error.report().contains("Image is not in qcow2 format"), "{}", error.report());
    assert_eq!(machine.wait().await.unwrap_err().kind(), ErrorKind::Conflict);
    lab.destroy().await.unwrap();
    drop((machine, lab));
    fixture.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_larger_than_its_disk_is_refused_with_both_sizes() {
    let fixture = Fixture::new().await;
    let lab = fixture.lab().await;
    let image = fixture.dir.path().join("an image, of \"2 MiB\" é.img");
    let made =
        Command::new("qemu-img").args(["create", "-q", "-f", "vmdk"]).arg(&image).arg("2M").status().unwrap();
    assert!(made.success());
    let url = url::Url::from_file_path(&image).unwrap();
    let source = PlannedSource::Url(PlannedUrl::new(url));
    let request = |size| ImportRequest::new("web", "root", source.clone(), size);
    let error = lab.import(&request(Some(1 << 20)), &Progress::none()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    assert_eq!(
        error.report(),
        "vm web: disk root: expected a disk at least as large as its image, 2Mi, but found 1Mi\n  \
         help: set the disk's size to 2Mi or more"
    );
    assert_eq!(lab.import(&request(None), &Progress::none()).await.unwrap().volume.virtual_size, 2 << 20);
    lab.destroy().await.unwrap();
    drop(lab);
    fixture.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_qemu_no_lab_is_opened() {
    let fixture = Fixture::with(1, |builder| builder).await;
    let store = Store::open(fixture.dir.path()).unwrap();
    let backend = QemuBackend::builder(store).qemu("/nonexistent/qemu-system-x86_64").build();
    let spec = rudder_core::backend::LabSpec::new("none", common::network());
    let error = backend.open_lab(&spec).await.map(drop).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::HostMissing);
    assert!(error.help().unwrap().contains("apt-get install"));
    fixture.assert_clean().await;
}
