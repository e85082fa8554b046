//! Images in every format, compared byte for byte with what their authors put into them.

#![allow(clippy::unwrap_used)]

use super::*;
use crate::{
    accelerator::Accelerator,
    host::{Host, Programs},
    store::Store,
};
use rudder_core::{
    backend::{ImportRequest, Imported, LabSpec, Progress, ProgressEvent},
    plan::{PlannedNetwork, PlannedSource, PlannedUrl},
};
use std::{
    fs,
    path::PathBuf,
    process::Command,
    sync::{Arc, Mutex},
};

/// A lab, and a directory with a user's images.
struct Fixture {
    storage: LabStorage,
    notices: Arc<Mutex<Vec<String>>>,
    dir: tempfile::TempDir,
}

/// Size of a disk whose last bytes are as distinct as its first.
const SIZE: u64 = (8 << 20) + 64 * 1024;

impl Fixture {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path().join("store")).unwrap();
        let host = Host::examine(&Programs::default(), Accelerator::Tcg).await.unwrap();
        let spec = LabSpec::new("test", PlannedNetwork::default());
        let storage = LabStorage::open(&store, Arc::new(host), &spec).await.unwrap();
        Self { storage, notices: Arc::default(), dir }
    }

    fn path(&self, file: &str) -> PathBuf {
        self.dir.path().join(file)
    }

    /// Writes a raw disk of the user, and returns its content.
    fn raw(&self) -> Vec<u8> {
        let mut disk = vec![0; usize::try_from(SIZE).unwrap()];
        disk[..512].fill(1);
        disk[510..512].copy_from_slice(&[0x55, 0xaa]);
        disk[446..510].fill(0);
        disk[5 << 20..(5 << 20) + 70_000].fill(2);
        let end = disk.len();
        disk[end - 4096..].fill(3);
        fs::write(self.path("disk.raw"), &disk).unwrap();
        disk
    }

    fn qemu_img(&self, args: &[&str]) {
        let output = Command::new("qemu-img").args(args).current_dir(self.dir.path()).output().unwrap();
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// Returns the disk in a format, as a file of the user.
    fn convert(&self, format: &str, options: &[&str]) -> Vec<u8> {
        let mut args = vec!["convert", "-f", "raw", "-O", format];
        args.extend(options);
        args.extend(["disk.raw", "image"]);
        self.qemu_img(&args);
        fs::read(self.path("image")).unwrap()
    }

    async fn import(&self, bytes: &[u8], size: Option<u64>) -> Result<Imported> {
        fs::write(self.path("image"), bytes).unwrap();
        let url = url::Url::from_file_path(self.path("image")).unwrap();
        let request = ImportRequest::new("web", "root", PlannedSource::Url(PlannedUrl::new(url)), size);
        let notices = Arc::clone(&self.notices);
        let progress = Progress::new(move |event| {
            if let ProgressEvent::Notice(notice) = event {
                notices.lock().unwrap().push(notice);
            }
        });
        self.storage.import(&request, &progress).await
    }

    /// Returns what a guest reads from a volume.
    fn content(&self, imported: &Imported) -> Vec<u8> {
        let volume = self.storage.path(&imported.volume.id);
        self.qemu_img(&["convert", "-f", "qcow2", "-O", "raw", volume.to_str().unwrap(), "read.raw"]);
        fs::read(self.path("read.raw")).unwrap()
    }

    /// Returns the store's files and their content.
    fn blobs(&self) -> Vec<(PathBuf, Vec<u8>)> {
        let mut found = Vec::new();
        for prefix in fs::read_dir(self.path("store/blobs/sha256")).unwrap() {
            for blob in fs::read_dir(prefix.unwrap().path()).unwrap() {
                let path = blob.unwrap().path();
                found.push((path.clone(), fs::read(path).unwrap()));
            }
        }
        found
    }
}

/// Changes the footers of a VHD, and their checksums.
fn patch_vhd(image: &mut [u8], patch: impl Fn(&mut [u8])) {
    let end = image.len() - 512;
    for at in [0, end] {
        let footer = &mut image[at..at + 512];
        if !footer.starts_with(b"conectix") {
            continue;
        }
        patch(footer);
        footer[64..68].fill(0);
        let sum = !footer.iter().map(|byte| u32::from(*byte)).sum::<u32>();
        footer[64..68].copy_from_slice(&sum.to_be_bytes());
    }
}

#[test]
fn a_disk_is_never_smaller_than_its_image() {
    assert_eq!(size_over(1000, None).unwrap(), 1024);
    assert_eq!(size_over(1024, Some(2048)).unwrap(), 2048);
    assert_eq!(
        size_over(3 << 30, Some(1 << 30)).unwrap_err().report(),
        "expected a disk at least as large as its image, 3Gi, but found 1Gi\n  help: set the disk's size to 3Gi or more"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn every_format_is_read_with_its_original_size_and_content() {
    let fixture = Fixture::new().await;
    let disk = fixture.raw();
    let formats: [(&str, &[&str]); 10] = [
        ("raw", &[]),
        ("qcow2", &[]),
        ("qcow2", &["-c"]),
        ("qcow2", &["-o", "compat=0.10,cluster_size=512"]),
        ("vmdk", &["-o", "subformat=monolithicSparse"]),
        ("vmdk", &["-o", "subformat=streamOptimized"]),
        ("vdi", &[]),
        ("vhdx", &[]),
        ("vpc", &["-o", "subformat=dynamic,force_size=on"]),
        ("vpc", &["-o", "subformat=fixed,force_size=on"]),
    ];
    for (format, options) in formats {
        let image = fixture.convert(format, options);
        let imported = fixture.import(&image, None).await.unwrap();
        assert_eq!(imported.volume.virtual_size, SIZE, "{format} {options:?}");
        assert!(fixture.content(&imported) == disk, "{format} {options:?}");
        // The excess of a larger disk is empty.
        let imported = fixture.import(&image, Some(SIZE + (1 << 20))).await.unwrap();
        let (same, more) = {
            let mut content = fixture.content(&imported);
            let more = content.split_off(disk.len());
            (content == disk, more)
        };
        assert!(same && more.iter().all(|byte| *byte == 0), "{format} {options:?}");
        assert_eq!(more.len(), 1 << 20);
    }
    assert_eq!(*fixture.notices.lock().unwrap(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vhd_has_its_declared_size_whatever_its_geometry_and_creator() {
    let fixture = Fixture::new().await;
    let disk = fixture.raw();
    for subformat in ["dynamic", "fixed"] {
        let image = fixture.convert("vpc", &["-o", &format!("subformat={subformat},force_size=on")]);
        for creator in
            [b"vbox", b"vpc ", b"win ", b"d2v ", b"vs  ", b"qemu", b"qem2", b"tap\0", b"CTXS", b"abcd"]
        {
            let mut image = image.clone();
            patch_vhd(&mut image, |footer| {
                footer[28..32].copy_from_slice(creator);
                // 128 × 8 × 16 sectors, so that the last 64 KiB are beyond.
                footer[56..60].copy_from_slice(&[0, 128, 8, 16]);
            });
            let imported = fixture.import(&image, Some(SIZE + 512)).await.unwrap();
            let content = fixture.content(&imported);
            let same = content[..disk.len()] == disk && content[disk.len()..] == [0; 512];
            assert!(same, "{subformat} {}", creator.escape_ascii());
        }
    }
    let notices = fixture.notices.lock().unwrap();
    assert!(notices.iter().any(|notice| notice.contains("geometry")), "{notices:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_truncated_image_is_refused() {
    let fixture = Fixture::new().await;
    fixture.raw();
    let formats: [(&str, &[&str]); 6] = [
        ("qcow2", &[]),
        ("qcow2", &["-c"]),
        ("vmdk", &["-o", "subformat=monolithicSparse"]),
        ("vmdk", &["-o", "subformat=streamOptimized"]),
        ("vdi", &[]),
        ("vpc", &["-o", "subformat=dynamic,force_size=on"]),
    ];
    // A fixed VHD without its end cannot be distinguished from a raw disk.
    // For VHDX, whole blocks of 8 MiB extend beyond the end of the disk.
    let vhdx = (fixture.convert("vhdx", &[]), "vhdx", vec![9 << 20]);
    let cut = formats.into_iter().map(|(format, options)| {
        let image = fixture.convert(format, options);
        let lengths = vec![image.len() - 64 * 1024, image.len() / 2 / 512 * 512];
        (image, format, lengths)
    });
    for (image, format, lengths) in cut.chain([vhdx]).collect::<Vec<_>>() {
        for length in lengths {
            let error = fixture.import(&image[..length], None).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidImage, "{format} cut to {length}: {error:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_with_damaged_tables_is_refused() {
    let fixture = Fixture::new().await;
    fixture.raw();
    let mut image = fixture.convert("qcow2", &[]);
    // The first entry of the first table, whose offset is in the header, now points into the header.
    let table = usize::try_from(u64::from_be_bytes(image[40..48].try_into().unwrap())).unwrap();
    image[table..table + 8].copy_from_slice(&(1_u64 << 63 | 0x200).to_be_bytes());
    let error = fixture.import(&image, None).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidImage);
    assert!(!error.report().contains("-r all"), "{}", error.report());
}

/// CRC-32C (Castagnoli), which protects the headers and the log of a VHDX.
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg()))
    })
}

/// Adds an entry to the log of a VHDX that writes `sector`, 4 KiB, at this offset of the file ([MS-VHDX], 2.3).
fn leave_in_log(image: &mut [u8], offset: u64, sector: &[u8]) {
    let length = image.len() as u64;
    let headers = [64 * 1024, 128 * 1024];
    let number = |image: &[u8], at: usize| u64::from_le_bytes(image[at + 8..at + 16].try_into().unwrap());
    let current = headers.into_iter().max_by_key(|at| number(image, *at)).unwrap();
    let log =
        usize::try_from(u64::from_le_bytes(image[current + 72..current + 80].try_into().unwrap())).unwrap();
    let guid = [7_u8; 16];
    let sequence = 1_u64.to_le_bytes();
    let mut entry = vec![0; 8192];
    entry[..4].copy_from_slice(b"loge");
    entry[8..12].copy_from_slice(&8192_u32.to_le_bytes());
    entry[16..24].copy_from_slice(&sequence);
    entry[24..28].copy_from_slice(&1_u32.to_le_bytes());
    entry[32..48].copy_from_slice(&guid);
    entry[48..56].copy_from_slice(&length.to_le_bytes());
    entry[56..64].copy_from_slice(&length.to_le_bytes());
    entry[64..68].copy_from_slice(b"desc");
    entry[68..72].copy_from_slice(&sector[4092..]);
    entry[72..80].copy_from_slice(&sector[..8]);
    entry[80..88].copy_from_slice(&offset.to_le_bytes());
    entry[88..96].copy_from_slice(&sequence);
    entry[4096..4100].copy_from_slice(b"data");
    entry[4104..8188].copy_from_slice(&sector[8..4092]);
    entry[8188..8192].copy_from_slice(&sequence[..4]);
    let sum = crc32c(&entry);
    entry[4..8].copy_from_slice(&sum.to_le_bytes());
    image[log..log + 8192].copy_from_slice(&entry);
    let header = &mut image[current..current + 4096];
    header[48..64].copy_from_slice(&guid);
    header[4..8].fill(0);
    let sum = crc32c(header);
    header[4..8].copy_from_slice(&sum.to_le_bytes());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_of_a_vhdx_is_replayed_on_a_copy_and_the_store_is_not_changed() {
    let fixture = Fixture::new().await;
    let mut disk = fixture.raw();
    let mut image = fixture.convert("vhdx", &[]);
    // The offset of the disk's first sector in the file.
    let at =
        image.windows(510).position(|bytes| bytes[..446] == [1; 446] && bytes[446..] == [0; 64]).unwrap();
    let sector = [9; 4096];
    leave_in_log(&mut image, at as u64, &sector);
    disk[..4096].copy_from_slice(&sector);
    let imported = fixture.import(&image, None).await.unwrap();
    assert!(fixture.content(&imported) == disk);
    let blobs = fixture.blobs();
    assert_eq!(blobs.len(), 1);
    assert!(blobs[0].1 == image, "the image of the store is what was fetched");
    let notices = fixture.notices.lock().unwrap().clone();
    assert!(notices.iter().any(|notice| notice.contains("replaying its log")), "{notices:?}");

    // A log that cannot be replayed: the advice refers to the original.
    let tables = 192 * 1024;
    image[tables..tables + 2 * 64 * 1024].fill(0);
    let error = fixture.import(&image, None).await.unwrap_err();
    let report = error.report();
    assert_eq!(error.kind(), ErrorKind::InvalidImage);
    assert!(!report.contains("qemu-img check") && !report.contains("-r all"), "{report}");
}
