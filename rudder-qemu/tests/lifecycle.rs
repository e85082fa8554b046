//! The life cycle of machines on real QEMU: start, wait, stop in every order, death, capture. Nothing is left
//! afterwards.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use common::{Fixture, blank_machine, eventually, qemu_of};
use rudder_core::{
    ErrorKind,
    backend::{Backend, Death, Exit, ImportRequest, Progress, ProgressEvent, Site, SiteFile, Stop},
    hardware::Bus,
    module::{Provenance, TemplateMachine},
    plan::PlannedSource,
};
use std::{
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

fn killed(exit: &Exit) -> bool {
    matches!(exit, Exit::Killed { .. })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_starts_stops_and_starts_again() {
    let fixture = Fixture::new().await;
    let lab = fixture.lab().await;
    let spec = blank_machine(&*lab, "web", &[Bus::Virtio]).await;
    let machine = lab.create_machine(&spec).await.unwrap();
    assert_eq!(machine.wait().await.unwrap_err().kind(), ErrorKind::Conflict);
    assert_eq!(machine.stop(Stop::Kill).await.unwrap_err().kind(), ErrorKind::Conflict);
    assert_eq!(machine.dial(22).await.map(drop).unwrap_err().kind(), ErrorKind::Conflict);
    assert_eq!(machine.screenshot().await.unwrap_err().kind(), ErrorKind::Conflict);

    for _ in 0..2 {
        machine.start().await.unwrap();
        assert_eq!(machine.start().await.unwrap_err().kind(), ErrorKind::Conflict);
        let waiters: Vec<_> = (0..3)
            .map(|_| {
                tokio::spawn({
                    let machine = Arc::clone(&machine);
                    async move { machine.wait().await }
                })
            })
            .collect();
        assert!(killed(&machine.stop(Stop::Kill).await.unwrap()));
        for waiter in waiters {
            assert!(killed(&waiter.await.unwrap().unwrap()));
        }
        assert!(killed(&machine.wait().await.unwrap()));
        assert!(killed(&machine.stop(Stop::Kill).await.unwrap()));
    }

    assert_eq!(lab.create_machine(&spec).await.map(drop).unwrap_err().kind(), ErrorKind::Conflict);
    lab.destroy().await.unwrap();
    lab.destroy().await.unwrap();
    drop((machine, lab));
    fixture.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_does_not_power_off_is_killed_after_the_limit() {
    let fixture = Fixture::new().await;
    let lab = fixture.lab().await;
    let machine = lab.create_machine(&blank_machine(&*lab, "web", &[Bus::Virtio]).await).await.unwrap();
    machine.start().await.unwrap();
    let exit = machine.stop(Stop::Graceful { limit: Duration::from_millis(300) }).await.unwrap();
    assert_eq!(exit, Exit::Killed { why: "did not power off within 300ms".to_owned() });
    lab.destroy().await.unwrap();
    drop((machine, lab));
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
    // The host's network does not lead to the guest; a socket in the lab does.
    assert_eq!(machine.reachable_at(22), None);
    assert!(machine.proxy_command(22).unwrap().ends_with(" nc -U m0.p22"));
    assert_eq!(machine.proxy_command(23), None);
    tokio::net::UnixStream::connect(lab_file(&fixture, "m0.p22")).await.unwrap();
    assert_eq!(machine.dial(23).await.map(drop).unwrap_err().kind(), ErrorKind::InvalidInput);
    let mut greeting = [0; 4];
    machine.display().await.unwrap().read_exact(&mut greeting).await.unwrap();
    assert_eq!(&greeting, b"RFB ");
    machine.serial().await.unwrap().write_all(b"x").await.unwrap();
    assert_eq!(machine.serial_tail(100).await.unwrap(), b"");
    assert!(machine.screenshot().await.unwrap().starts_with(b"\x89PNG"));
    assert_eq!(machine.access().len(), 3);
    lab.destroy().await.unwrap();
    drop((machine, lab));
    fixture.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn served_files_are_for_the_machines_of_the_lab_only() {
    let fixture = Fixture::new().await;
    let lab = fixture.lab().await;
    let machine = lab.create_machine(&blank_machine(&*lab, "web", &[Bus::Virtio]).await).await.unwrap();
    machine.start().await.unwrap();
    let files = [("x".to_owned(), SiteFile::bytes(b"hello".as_slice()))];
    let served = lab.serve(Site::new(files.into(), |request| panic!("{request:?}"))).await.unwrap();
    assert_eq!(served.addresses, [("default".to_owned(), "10.0.2.1".parse().unwrap())].into());
    // Listens on the gateway's address, not on this host.
    let own: Vec<String> = std::fs::read_dir("/proc/self/fd")
        .unwrap()
        .flatten()
        .filter_map(|entry| std::fs::read_link(entry.path()).ok())
        .filter_map(|target| Some(target.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned()))
        .collect();
    let qemu = format!("/proc/{}/fd", qemu_of(fixture.dir.path()));
    let of_qemu = std::fs::read_dir(qemu).unwrap().flatten().filter_map(|entry| {
        Some(
            std::fs::read_link(entry.path())
                .ok()?
                .to_str()?
                .strip_prefix("socket:[")?
                .strip_suffix(']')?
                .to_owned(),
        )
    });
    let sockets: Vec<String> = own.into_iter().chain(of_qemu).collect();
    for table in ["tcp", "tcp6", "udp", "udp6"] {
        let table = std::fs::read_to_string(format!("/proc/net/{table}")).unwrap_or_default();
        let inodes = table.lines().skip(1).filter_map(|line| line.split_whitespace().nth(9));
        let ours: Vec<&str> = inodes.filter(|inode| sockets.iter().any(|socket| socket == inode)).collect();
        assert_eq!(ours, Vec::<&str>::new(), "{table}");
    }
    lab.destroy().await.unwrap();
    drop((served, machine, lab));
    fixture.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_qemu_is_detected_and_reported_as_killed() {
    let fixture = Fixture::new().await;
    let lab = fixture.lab().await;
    let machine = lab.create_machine(&blank_machine(&*lab, "web", &[Bus::Virtio]).await).await.unwrap();
    machine.start().await.unwrap();
    let pid = rustix::process::Pid::from_raw(qemu_of(fixture.dir.path())).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    let exit = tokio::time::timeout(Duration::from_secs(20), machine.wait()).await.unwrap().unwrap();
    let Exit::Died { cause: Death::Hypervisor, detail } = exit else { panic!("{exit:?}") };
    assert!(detail.starts_with("QEMU was ended by signal 9"), "{detail}");
    lab.destroy().await.unwrap();
    drop((machine, lab));
    fixture.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn written_data_is_captured_and_published() {
    let fixture = Fixture::new().await;
    let lab = fixture.lab().await;
    let spec = blank_machine(&*lab, "web", &[Bus::Virtio, Bus::Scsi]).await;
    let path = lab_file(&fixture, &spec.disks[1].volume.id);
    let written = std::process::Command::new("qemu-io")
        .args(["-f", "qcow2", "-c", "write -P 7 1M 5M"])
        .arg(&path)
        .output();
    assert!(written.unwrap().status.success());
    let machine = lab.create_machine(&spec).await.unwrap();
    machine.start().await.unwrap();
    assert_eq!(machine.capture("disk0", &Progress::none()).await.unwrap_err().kind(), ErrorKind::Conflict);
    machine.stop(Stop::Kill).await.unwrap();
    let received = Arc::new(Mutex::new(Vec::new()));
    let progress = Progress::new({
        let received = Arc::clone(&received);
        move |event| received.lock().unwrap().push(event)
    });
    let mut disks = Vec::new();
    for disk in ["disk0", "disk1"] {
        disks.push(machine.capture(disk, &progress).await.unwrap());
    }
    assert_eq!(machine.capture("disk9", &progress).await.unwrap_err().kind(), ErrorKind::NotFound);
    let whole = ProgressEvent::Bytes { task: "verify disk1".to_owned(), done: 5 << 20, total: Some(5 << 20) };
    assert_eq!(received.lock().unwrap().last(), Some(&whole));
    assert!(disks.iter().all(|disk| disk.virtual_size == 64 << 20 && disk.content.size.unwrap() < 1 << 20));

    let mut template = TemplateMachine::new("web", 1, 64 << 20);
    template.disks = disks;
    let provenance = Provenance::new("name: web\n", rudder_core::digest::Digest::of(b""));
    let draft = rudder_core::backend::ModuleDraft::new("base", vec![template], common::network(), provenance);
    let module = lab.publish(draft).await.unwrap();
    lab.destroy().await.unwrap();
    drop((machine, lab));

    // The next layer is based on it.
    let lab = fixture.lab().await;
    let parent = rudder_core::plan::PlannedBuildRef::new("base", module.digest, "web");
    let mut request = ImportRequest::new("child", "disk1", PlannedSource::BuildRef(parent), None);
    request.parent_disk = Some("disk1".to_owned());
    let imported = lab.import(&request, &Progress::none()).await.unwrap();
    assert_eq!(imported.volume.virtual_size, 64 << 20);
    let read = std::process::Command::new("qemu-io")
        .args(["-f", "qcow2", "-c", "read -P 7 1M 5M", "-c", "read -P 0 6M 1M"])
        .arg(lab_file(&fixture, &imported.volume.id))
        .output()
        .unwrap();
    assert!(read.status.success(), "{}", String::from_utf8_lossy(&read.stdout));
    request.size = Some(32 << 20);
    let error = lab.import(&request, &Progress::none()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    assert_eq!(fixture.backend.remove_module("base").await.unwrap_err().kind(), ErrorKind::Conflict);
    lab.destroy().await.unwrap();
    drop(lab);
    fixture.backend.remove_module("base").await.unwrap();
    fixture.assert_clean().await;
}

/// Returns the path of a file of the only lab.
fn lab_file(fixture: &Fixture, file: &str) -> std::path::PathBuf {
    let labs = std::fs::read_dir(fixture.dir.path().join("labs")).unwrap();
    let lab = labs.flatten().find(|entry| !entry.file_name().to_string_lossy().starts_with('.')).unwrap();
    lab.path().join(file)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_lab_and_a_dropped_start_leave_nothing() {
    let fixture = Fixture::new().await;
    let lab = fixture.lab().await;
    let machine = lab.create_machine(&blank_machine(&*lab, "web", &[Bus::Virtio]).await).await.unwrap();
    tokio::select! {
        biased;
        () = eventually("QEMU runs", || !common::processes_below(fixture.dir.path()).is_empty()) => {}
        started = machine.start() => panic!("started before its process was seen: {started:?}"),
    }
    eventually("QEMU has ended", || common::processes_below(fixture.dir.path()).is_empty()).await;
    machine.start().await.unwrap();
    drop(lab);
    assert!(killed(&machine.wait().await.unwrap()));
    drop(machine);
    fixture.assert_clean().await;
}
