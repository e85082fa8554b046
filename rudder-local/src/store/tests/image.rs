//! Packed images, local files, and files that are not images.

use super::{
    server::{Reply, Server},
    unpack::Packing,
    *,
};
use std::os::unix::fs::MetadataExt;
use tokio::io::{AsyncRead, AsyncReadExt};

const ALL: [Packing; 4] = [Packing::Gzip, Packing::Xz, Packing::Zstd, Packing::Bzip2];

/// Packs bytes in two members, as `cat a.gz b.gz` does.
pub(super) async fn pack(packing: Packing, bytes: &[u8]) -> Vec<u8> {
    use async_compression::tokio::bufread::{BzEncoder, GzipEncoder, XzEncoder, ZstdEncoder};
    let mut packed = Vec::new();
    let (one, two) = bytes.split_at(bytes.len() / 3);
    for part in [one, two] {
        let mut encoder: Box<dyn AsyncRead + Unpin> = match packing {
            Packing::Gzip => Box::new(GzipEncoder::new(part)),
            Packing::Xz => Box::new(XzEncoder::new(part)),
            Packing::Zstd => Box::new(ZstdEncoder::new(part)),
            Packing::Bzip2 => Box::new(BzEncoder::new(part)),
        };
        encoder.read_to_end(&mut packed).await.unwrap();
    }
    packed
}

/// Returns a disk of 8 MiB with some data in the middle.
fn sparse_disk() -> Vec<u8> {
    let mut disk = raw_disk(512);
    disk.resize(8 << 20, 0);
    disk[5 << 20..][..4096].copy_from_slice(&raw_disk(4096));
    disk
}

#[tokio::test]
async fn packed_images_are_unpacked() {
    for packing in ALL {
        let disk = sparse_disk();
        let served = pack(packing, &disk).await;
        let server = Server::start({
            let served = served.clone();
            // Interrupted once, so that unpacking and resuming are combined.
            move |request, number| {
                let reply = Reply::file(request, &served, "\"p\"");
                if number == 0 { reply.stop_after(served.len() / 2) } else { reply }
            }
        });
        let fixture = Fixture::new();
        let remote =
            fixture.image(&server.url("named-like-nothing"), Some(Digest::of(&served))).await.unwrap();
        assert_eq!(server.count(), 2);
        assert_eq!((remote.format, remote.virtual_size), (ImageFormat::Raw, 8 << 20), "{packing}");
        assert_eq!(fs::read(&remote.path).unwrap(), disk);
        assert_eq!(remote.digest, Digest::of(&disk));
        assert_eq!(remote.input.content, Content::of(&served));
        // Holes stay holes.
        assert!(fs::metadata(&remote.path).unwrap().blocks() * 512 < 1 << 20, "{packing}");
        fixture.assert_no_leftovers();

        let fixture = Fixture::new();
        let local = fixture.image(&fixture.write("disk", &served), None).await.unwrap();
        assert_eq!((local.digest, &local.input.content), (remote.digest, &remote.input.content));
        fixture.assert_no_leftovers();
    }
}

#[tokio::test]
async fn damaged_and_oversized_packed_images_are_refused() {
    for packing in ALL {
        let fixture = Fixture::new();
        let mut served = pack(packing, &raw_disk(100_352)).await;
        served.truncate(served.len() - 40_000);
        let error = fixture.image(&fixture.write("cut", &served), None).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidImage);
        assert_eq!(error.to_string(), format!("expected a complete {packing} file, but found a damaged one"));

        let options = StoreOptions { unpacked_limit: 1 << 20, ..StoreOptions::default() };
        let store = Store::open_with(fixture.store.root(), options).unwrap();
        let bomb = fixture.write("bomb", &pack(packing, &vec![0; 4 << 20]).await);
        let error = store.image(&planned(&bomb, None), &Progress::none()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidImage);
        assert_eq!(
            error.to_string(),
            format!("expected at most 1.0 MiB in the {packing} file, but found more")
        );
        fixture.assert_no_leftovers();
    }
    let fixture = Fixture::new();
    let twice = pack(Packing::Xz, &pack(Packing::Gzip, &raw_disk(1024)).await).await;
    let error = fixture.image(&fixture.write("twice", &twice), None).await.unwrap_err();
    assert_eq!(error.to_string(), "expected a disk image, but found gzip data inside xz data");
}

#[tokio::test]
async fn bytes_that_follow_gzip_or_bzip2_data_are_ignored_and_reported() {
    for packing in ALL {
        let fixture = Fixture::new();
        let disk = raw_disk(100_352);
        let mut served = pack(packing, &disk).await;
        // Padding with zeros is not worth a notice.
        served.extend([0; 512]);
        let url = fixture.write("padded", &served);
        let (progress, events) = recording_progress();
        let padded = fixture.store.image(&planned(&url, None), &progress).await;
        let notices = |events: &Mutex<Vec<ProgressEvent>>| {
            let events = events.lock().unwrap();
            let notices = events.iter().filter_map(|event| match event {
                ProgressEvent::Notice(notice) => Some(notice.clone()),
                _ => None,
            });
            notices.collect::<Vec<_>>()
        };
        assert_eq!(fs::read(padded.unwrap().path).unwrap(), disk, "{packing}");
        assert_eq!(notices(&events), Vec::<String>::new(), "{packing}");
        // As in OpenWrt's images.
        served.extend(b"FWx0 {\"metadata_version\": \"1.1\"}");
        let url = fixture.write("more", &served);
        let more = fixture.store.image(&planned(&url, Some(Digest::of(&served))), &progress).await;
        if matches!(packing, Packing::Gzip | Packing::Bzip2) {
            let more = more.unwrap();
            assert_eq!(fs::read(&more.path).unwrap(), disk);
            assert_eq!(more.input.content, Content::of(&served));
            let message = format!("ignored 544 bytes after the end of the {packing} data");
            assert_eq!(notices(&events), [message]);
        } else {
            let error = more.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidImage);
            let message = error.to_string();
            assert!(message.starts_with(&format!("expected only {packing} data, but found ")), "{message}");
            assert!(message.ends_with(" bytes of other data after its end"), "{message}");
        }
    }
}

/// What `zstd --long=31` and `xz --lzma2=dict=1536MiB` write.
#[tokio::test]
async fn data_that_needs_too_much_memory_to_unpack_is_refused_with_help() {
    let fixture = Fixture::new();
    // A frame with a window of 2 GiB, and an empty last block (RFC 8878, 3.1.1).
    let zstd = [0x28, 0xb5, 0x2f, 0xfd, 0, 21 << 3, 1, 0, 0];
    let error = fixture.image(&fixture.write("long.zst", &zstd), None).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "expected zstd data with a window of at most 128.0 MiB, but found a larger one"
    );
    assert!(error.help().unwrap().contains("zstd --long=27"), "{error:?}");
    // The header of a stream without checks, and of a block with LZMA2 and a dictionary of 1.5 GiB (.xz format, 2.1 and 3.1).
    let mut xz = b"\xfd7zXZ\0\0\0\xff\x12\xd9\x41".to_vec();
    let block = [2, 0, 0x21, 1, 37, 0, 0, 0];
    xz.extend(block);
    xz.extend(crc32(&block).to_le_bytes());
    xz.extend([0; 64]);
    let error = fixture.image(&fixture.write("dictionary.xz", &xz), None).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "expected xz data that can be unpacked with 128.0 MiB of memory, but found data that needs more"
    );
    assert!(error.help().unwrap().contains("xz -9"), "{error:?}");
}

/// CRC-32 (ISO 3309).
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg()))
    })
}

#[tokio::test]
async fn unpacking_stops_at_the_size_of_the_disk() {
    for packing in ALL {
        let fixture = Fixture::new();
        let room = 1 << 20;
        let import = async |name: &str, image: &[u8]| {
            let url = fixture.write(name, &pack(packing, image).await);
            fixture.store.image_for(&planned(&url, None), Some(room), &Progress::none()).await
        };
        let fits = import("fits", &sparse_disk()[..1 << 20]).await.unwrap();
        assert_eq!(fits.virtual_size, room);
        let error = import("large", &vec![0; 16 << 20]).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        let message = error.to_string();
        // It stopped within one chunk of the limit.
        let count = message.rsplit("at least ").next().unwrap();
        assert!(
            message.starts_with("expected an image for a disk of 1.0 MiB, but found at least "),
            "{message}"
        );
        assert!(count.starts_with("1.0 MiB") || count.starts_with("1.2 MiB"), "{message}");
        assert!(error.help().unwrap().contains("raise the size of the disk"), "{error:?}");
        // An image whose header contains the size of its disk is refused because of that size.
        let mut qcow2 = vec![0; 1024];
        qcow2[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
        qcow2[24..32].copy_from_slice(&(10_u64 << 30).to_be_bytes());
        let error = import("qcow2", &qcow2).await.unwrap_err();
        let message = format!(
            "expected an image for a disk of 1.0 MiB, but found a qcow2 image of 10.0 GiB in the {packing} file"
        );
        assert_eq!(error.to_string(), message);
        fixture.assert_no_leftovers();
    }
}

#[tokio::test]
async fn a_download_for_a_disk_that_is_too_small_is_resumed_for_a_larger_one() {
    let disk = sparse_disk();
    let served = pack(Packing::Gzip, &disk).await;
    let server = Server::start({
        let served = served.clone();
        move |request, _| Reply::file(request, &served, "\"p\"")
    });
    let fixture = Fixture::new();
    let url = planned(&server.url("disk.gz"), None);
    let import = |size: u64| {
        let url = &url;
        let store = &fixture.store;
        async move { store.image_for(url, Some(size), &Progress::none()).await }
    };
    let error = import(1 << 20).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    assert_eq!(fixture.names("blobs/sha256"), Vec::<String>::new());
    assert_eq!(fs::read(import(8 << 20).await.unwrap().path).unwrap(), disk);
    fixture.assert_no_leftovers();
}

#[tokio::test]
async fn a_file_that_is_not_an_image_is_refused_and_not_kept() {
    let server = Server::start(|_, number| match number {
        0 | 1 => Reply::ok(b"<!DOCTYPE html><html><body>Sign in</body></html>").with("ETag", "\"e\""),
        _ => Reply::ok(&raw_disk(1024)),
    });
    let fixture = Fixture::new();
    let url = server.url("disk.qcow2");
    let error = fixture.image(&url, None).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidImage);
    assert_eq!(
        error.report(),
        format!(
            "url {url}: expected a disk image, but found a web page\n  help: open the URL in a browser: it may \
             require a login, or be a page about the image"
        )
    );
    fixture.assert_no_leftovers();
    assert_eq!(fixture.names("blobs/sha256"), Vec::<String>::new());
    // With a checksum, the mismatch is the first error; the help says what was received.
    let error = fixture.image(&url, Some(Digest::of(b"disk"))).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ChecksumMismatch);
    assert!(error.help().unwrap().contains("found a web page"), "{error:?}");
    // What was received then does not prevent another attempt.
    assert_eq!(fixture.image(&url, None).await.unwrap().virtual_size, 1024);
}

#[tokio::test]
async fn a_local_file_is_copied_again_only_if_it_changed() {
    let fixture = Fixture::new();
    let url = fixture.write("disk.img", &raw_disk(4096));
    let path = url.to_file_path().unwrap();
    let old = std::time::SystemTime::now() - Duration::from_secs(60);
    let age = || fs::File::options().write(true).open(&path).unwrap().set_modified(old).unwrap();
    age();
    let (progress, events) = recording_progress();
    let copy = || async { fixture.store.image(&planned(&url, None), &progress).await };
    // Setting the time changes the file's identity right now: the file must settle before it is trusted.
    let mut copies = 0;
    let first = loop {
        events.lock().unwrap().clear();
        let image = copy().await.unwrap();
        if events.lock().unwrap().is_empty() {
            break image;
        }
        copies += 1;
        assert!(copies < 10_000, "a file that does not change is copied again and again");
    };
    assert_eq!(fs::read(&first.path).unwrap(), raw_disk(4096));
    fs::write(&path, raw_disk(8192)).unwrap();
    assert_eq!(copy().await.unwrap().virtual_size, 8192);
    // The copy is the store's own.
    assert_eq!(fs::read(&first.path).unwrap().len(), 4096);
    let gone = url::Url::from_file_path(fixture.dir.path().join("gone")).unwrap();
    assert_eq!(fixture.image(&gone, None).await.unwrap_err().kind(), ErrorKind::NotFound);
    let error = fixture.image(&"ftp://h/x".parse().unwrap(), None).await.unwrap_err();
    assert_eq!(error.to_string(), "expected a URL with http, https or file, but found ftp");
}
