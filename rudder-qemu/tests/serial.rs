//! A guest that writes on its serial console without end: what the host keeps of it is bounded, while it is built, when its lab
//! was kept, and when its owner is gone.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use common::{Place, sector, sector_machine};
use rudder_core::{
    backend::{Backend, LabSpec, Retention, SERIAL_KEPT, Stop},
    hardware::Bus,
};
use std::{os::unix::fs::MetadataExt, path::Path};
use tokio::{io::AsyncReadExt, net::UnixStream};

/// More than is kept anywhere, in bytes.
const FLOOD: usize = 800 << 10;
/// As much as a machine's record may take on disk, in bytes.
const RECORD: u64 = 512 << 10;

/// The size of all that is recorded of serial consoles in a directory, and when that was last written to.
fn recorded(directory: &Path) -> (u64, i64) {
    let entries = std::fs::read_dir(directory).unwrap().flatten();
    let records = entries.filter(|entry| entry.file_name().to_string_lossy().contains("serial.log"));
    let metadata: Vec<_> = records.map(|entry| entry.metadata().unwrap()).collect();
    assert!(!metadata.is_empty(), "nothing is recorded");
    let written = metadata.iter().map(|file| file.mtime() * 1_000_000_000 + file.mtime_nsec()).max();
    (metadata.iter().map(std::fs::Metadata::len).sum(), written.unwrap_or_default())
}

/// Reads this much; the stream must not end before.
async fn read(stream: &mut (impl AsyncReadExt + Unpin), bytes: usize) {
    stream.read_exact(&mut vec![0; bytes]).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_guest_writes_without_end_is_bounded() {
    let place = Place::new().await;
    let mut spec = LabSpec::new("test", common::network());
    spec.retention = Retention::MayBeKept;
    let lab = place.backend.open_lab(&spec).await.unwrap();
    let guest = sector::write_without_end("a line of a guest that never rests\r\n");
    let machine =
        lab.create_machine(&sector_machine(&*lab, &guest, Bus::Virtio, 1 << 20).await).await.unwrap();
    machine.start().await.unwrap();
    let directory = place.dir.path().join("labs").join(spec.id.as_str());
    let idle = machine.serial().await.unwrap();
    let mut reader = machine.serial().await.unwrap();
    read(&mut reader, FLOOD).await;
    assert!(recorded(&directory).0 <= RECORD);
    let tail = machine.serial_tail(usize::MAX).await.unwrap();
    assert!((SERIAL_KEPT..=FLOOD).contains(&tail.len()), "{} bytes are kept", tail.len());

    // Its end changes nothing of that, and its last words survive.
    machine.stop(Stop::Kill).await.unwrap();
    assert!(machine.serial_tail(SERIAL_KEPT).await.unwrap().len() == SERIAL_KEPT);
    assert!(recorded(&directory).0 <= RECORD);
    drop((idle, reader));

    // Kept and left by its owner, it writes on; nothing is recorded, and the console is free for whoever comes.
    machine.start().await.unwrap();
    let mut reader = machine.serial().await.unwrap();
    read(&mut reader, 1000).await;
    let kept = lab.keep().await.unwrap();
    drop(reader);
    let line = kept.access.iter().find(|line| line.contains("serial console")).unwrap();
    let (_, socket) = line.rsplit_once("nc -U ").unwrap();
    drop((machine, lab));
    let mut person = UnixStream::connect(socket).await.unwrap();
    read(&mut person, 1000).await;
    let before = recorded(&directory);
    read(&mut person, FLOOD).await;
    assert_eq!(recorded(&directory), before);
    drop(person);
    place.backend.remove_lab(&kept.id).await.unwrap();
    place.assert_clean().await;
}
