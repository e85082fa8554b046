//! A guest that writes to its serial console without end: the host stores a bounded amount of it while the machine
//! runs, when its lab was kept, and when its owner has died.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use common::{Fixture, sector, sector_machine};
use rudder_core::{
    backend::{Backend, LabSpec, Retention, SERIAL_KEPT, Stop},
    hardware::Bus,
};
use std::{os::unix::fs::MetadataExt, path::Path};
use tokio::{io::AsyncReadExt, net::UnixStream};

/// More than is stored anywhere, in bytes.
const FLOOD: usize = 800 << 10;
/// Maximum size on disk of the record of a machine, in bytes.
const RECORD: u64 = 512 << 10;

/// Returns the total size of the serial console records in a directory, and the time of the last write to them.
fn recorded(directory: &Path) -> (u64, i64) {
    let entries = std::fs::read_dir(directory).unwrap().flatten();
    let records = entries.filter(|entry| entry.file_name().to_string_lossy().contains("serial.log"));
    let metadata: Vec<_> = records.map(|entry| entry.metadata().unwrap()).collect();
    assert!(!metadata.is_empty(), "nothing is recorded");
    let written = metadata.iter().map(|file| file.mtime() * 1_000_000_000 + file.mtime_nsec()).max();
    (metadata.iter().map(std::fs::Metadata::len).sum(), written.unwrap_or_default())
}

/// Reads this many bytes; the stream must not end earlier.
async fn read(stream: &mut (impl AsyncReadExt + Unpin), bytes: usize) {
    stream.read_exact(&mut vec![0; bytes]).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn endless_output_of_a_guest_is_bounded() {
    let fixture = Fixture::new().await;
    let mut spec = LabSpec::new("test", common::network());
    spec.retention = Retention::MayBeKept;
    let lab = fixture.backend.open_lab(&spec).await.unwrap();
    let guest = sector::write_endlessly("a line of a guest that never rests\r\n");
    let machine =
        lab.create_machine(&sector_machine(&*lab, &guest, Bus::Virtio, 1 << 20).await).await.unwrap();
    machine.start().await.unwrap();
    let directory = fixture.dir.path().join("labs").join(spec.id.as_str());
    let idle = machine.serial().await.unwrap();
    let mut reader = machine.serial().await.unwrap();
    read(&mut reader, FLOOD).await;
    assert!(recorded(&directory).0 <= RECORD);
    let tail = machine.serial_tail(usize::MAX).await.unwrap();
    assert!((SERIAL_KEPT..=FLOOD).contains(&tail.len()), "{} bytes are kept", tail.len());

    // The bound still holds after the machine has ended, and its last output is preserved.
    machine.stop(Stop::Kill).await.unwrap();
    assert!(machine.serial_tail(SERIAL_KEPT).await.unwrap().len() == SERIAL_KEPT);
    assert!(recorded(&directory).0 <= RECORD);
    drop((idle, reader));

    // Once the lab is kept and its owner has died, the guest continues to write. Nothing is recorded, and any client may
    // connect to the console.
    machine.start().await.unwrap();
    let mut reader = machine.serial().await.unwrap();
    read(&mut reader, 1000).await;
    lab.keep(None).await.unwrap();
    drop(reader);
    let access = machine.access();
    let line = access.iter().find(|line| line.contains("serial console")).unwrap();
    let (_, socket) = line.rsplit_once("nc -U ").unwrap();
    drop((machine, lab));
    let mut client = UnixStream::connect(socket).await.unwrap();
    // What was on its way to the record when that was closed has arrived by then.
    read(&mut client, FLOOD).await;
    let before = recorded(&directory);
    read(&mut client, FLOOD).await;
    assert_eq!(recorded(&directory), before);
    drop(client);
    fixture.backend.remove_lab(&spec.id).await.unwrap();
    fixture.assert_clean().await;
}
