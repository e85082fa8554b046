#![allow(clippy::unwrap_used)]
use super::*;
use crate::{
    accelerator::Accelerator,
    host::{Host, Programs},
    store::Store,
};
use rudder_core::{
    backend::{ImportRequest, LabSpec},
    plan::{PlannedNetwork, PlannedSource},
};
use std::process::Command;

/// A lab with a volume of this size, in bytes, which is an overlay on another image.
struct Fixture {
    storage: LabStorage,
    volume: String,
    _dir: tempfile::TempDir,
}

impl Fixture {
    async fn with(size: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let host = Host::examine(&Programs::default(), Accelerator::Tcg).await.unwrap();
        let spec = LabSpec::new("test", PlannedNetwork::default());
        let storage = LabStorage::open(&store, Arc::new(host), &spec).await.unwrap();
        let request = ImportRequest::new("web", "root", PlannedSource::Blank, Some(size));
        let volume = storage.import(&request, &Progress::none()).await.unwrap().volume.id;
        Self { storage, volume, _dir: dir }
    }

    /// Writes with qemu-io(1): each pattern is a byte, an offset and a length.
    fn write(&self, file: &str, patterns: &[(u8, u64, u64)]) {
        let mut command = Command::new("qemu-io");
        command.arg("-f").arg("qcow2").current_dir(self.storage.dir().path());
        for (byte, start, length) in patterns {
            command.arg("-c").arg(format!("write -P {byte} {start} {length}"));
        }
        let output = command.arg(file).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    async fn capture(&self, target: &str) -> Result<Captured> {
        capture(&self.storage, &self.volume, target, "root", &Progress::none()).await
    }

    /// Returns whether QEMU reads both the same; if one is longer, its excess must be zeroes.
    fn same(&self, one: &str, other: &str) -> bool {
        let mut command = Command::new("qemu-img");
        command.args(["compare", "-q", "-f", "qcow2", "-F", "qcow2", one, other]);
        command.current_dir(self.storage.dir().path()).status().unwrap().success()
    }

    fn files(&self) -> Vec<String> {
        let entries = fs::read_dir(self.storage.dir().path()).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_equals_the_disk_and_is_reproducible() {
    // Slightly more than two L2 tables, with an end inside a cluster.
    let size = (1 << 30) + 3 * CLUSTER as u64 + 512;
    let fixture = Fixture::with(size).await;
    fixture.write(
        &fixture.volume,
        &[
            (1, 0, 512),
            (2, CLUSTER as u64 - 512, 1024),
            (3, CHUNK as u64 * 3 - 512, 4 * CHUNK as u64),
            (0, CHUNK as u64 * 4, CHUNK as u64),
            (4, (512 << 20) - 512, 1024),
            (5, size - 512, 512),
        ],
    );
    // Incompressible data among compressible data.
    let noise: Vec<u8> =
        (0_u64..40_000).flat_map(|number| Digest::of(&number.to_le_bytes()).as_bytes().to_owned()).collect();
    let file = fixture.storage.path("noise");
    fs::write(&file, noise).unwrap();
    let output = Command::new("qemu-io")
        .args(["-f", "qcow2", "-c", &format!("write -s noise {} 1279488", 100 << 20), &fixture.volume])
        .current_dir(fixture.storage.dir().path())
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");

    let captured = fixture.capture("one.qcow2").await.unwrap();
    assert_eq!(captured.virtual_size, size);
    assert!(fixture.same(&fixture.volume, "one.qcow2"));
    assert_eq!(captured.size, fs::metadata(fixture.storage.path("one.qcow2")).unwrap().len());
    assert!((1_279_488..2 << 20).contains(&captured.size), "{captured:?}");
    assert_eq!(fixture.capture("two.qcow2").await.unwrap(), captured);
    let mut files = fixture.files();
    files.retain(|name| name.contains(".part") || name.contains(".nbd"));
    assert_eq!(files, [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_disk_is_captured() {
    for size in [512, 1 << 20] {
        let fixture = Fixture::with(size).await;
        fixture.capture("copy.qcow2").await.unwrap();
        assert!(fixture.same(&fixture.volume, "copy.qcow2"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_differs_is_detected() {
    let size = 16 << 20;
    let fixture = Fixture::with(size).await;
    fixture.write(&fixture.volume, &[(1, 0, 4096), (1, 9 << 20, 4096)]);
    let storage = &fixture.storage;
    let source = Reader::open(storage, &fixture.volume, size).await.unwrap();
    let differences: [&[_]; 4] = [
        &[],
        // A different byte; data where there was none; zeroes where there was data.
        &[(2, 512, 512)],
        &[(1, 15 << 20, 512)],
        &[(0, 9 << 20, 4096)],
    ];
    for (number, difference) in differences.into_iter().enumerate() {
        let name = format!("copy{number}");
        let part = Part(storage.path(&name));
        let chunks = pack(&source, &part, |_, _| {}).await.unwrap();
        fixture.write(&name, difference);
        let verified = verify(storage, &name, size, &chunks, |_, _| {}).await;
        match verified {
            Ok(()) => assert!(difference.is_empty(), "{difference:?}"),
            Err(error) => {
                assert!(!difference.is_empty(), "{error}");
                assert_eq!(
                    error.to_string(),
                    "expected an intact copy of the machine's disk, but its content differs from that of the disk"
                );
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unreadable_disk_is_reported_with_the_output_of_qemu() {
    let fixture = Fixture::with(1 << 20).await;
    fs::write(fixture.storage.path(&fixture.volume), "no image").unwrap();
    let error = fixture.capture("copy.qcow2").await.unwrap_err();
    assert!(error.to_string().contains("Image is not in qcow2 format"), "{error}");
    assert!(fixture.files().iter().all(|name| !name.contains("copy")), "{:?}", fixture.files());
}
