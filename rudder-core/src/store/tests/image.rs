//! Packed images, files of this host, and what is no image.

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

/// A disk of 8 MiB with a little in the middle.
fn sparse_disk() -> Vec<u8> {
    let mut disk = raw_disk(512);
    disk.resize(8 << 20, 0);
    disk[5 << 20..][..4096].copy_from_slice(&raw_disk(4096));
    disk
}

#[tokio::test]
async fn packed_images_are_unpacked_on_the_way_in() {
    for packing in ALL {
        let disk = sparse_disk();
        let served = pack(packing, &disk).await;
        let server = Server::start({
            let served = served.clone();
            // Broken once, so that unpacking and resuming meet.
            move |asked, number| {
                let reply = Reply::file(asked, &served, "\"p\"");
                if number == 0 { reply.stop_after(served.len() / 2) } else { reply }
            }
        });
        let fixture = Fixture::new();
        let remote =
            fixture.image(&server.url("named-like-nothing"), Some(Digest::of(&served))).await.unwrap();
        assert_eq!(server.count(), 2);
        assert_eq!((remote.format, remote.virtual_size), (ImageFormat::Raw, 8 << 20), "{packing}");
        assert_eq!(fs::read(&remote.path).unwrap(), disk);
        assert_eq!((remote.digest, remote.input.sha256), (Digest::of(&disk), Digest::of(&served)));
        assert_eq!(remote.input.size, served.len() as u64);
        // Holes stay holes.
        assert!(fs::metadata(&remote.path).unwrap().blocks() * 512 < 1 << 20, "{packing}");
        fixture.assert_no_leftovers();

        let fixture = Fixture::new();
        let local = fixture.image(&fixture.write("disk", &served), None).await.unwrap();
        assert_eq!((local.digest, local.input.sha256), (remote.digest, remote.input.sha256));
        fixture.assert_no_leftovers();
    }
}

#[tokio::test]
async fn broken_and_bottomless_packages_are_refused() {
    for packing in ALL {
        let fixture = Fixture::new();
        let mut served = pack(packing, &raw_disk(100_352)).await;
        served.truncate(served.len() - 40_000);
        let error = fixture.image(&fixture.write("cut", &served), None).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidImage);
        assert_eq!(
            error.to_string(),
            format!("expected a whole {packing} file, but found one that is broken")
        );

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
    assert_eq!(error.to_string(), "expected a disk image, but found gzip inside xz");
}

#[tokio::test]
async fn what_is_no_image_is_refused_and_not_kept() {
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
            "url {url}: expected a disk image, but found a web page\n  help: check that the URL gives qcow2, raw, vmdk, \
             vdi, vhd or vhdx, plain or packed with gz, xz, zst or bz2"
        )
    );
    fixture.assert_no_leftovers();
    assert_eq!(fixture.names("blobs/sha256"), Vec::<String>::new());
    // With a checksum, that is what is wrong first; what came is said beside it.
    let error = fixture.image(&url, Some(Digest::of(b"disk"))).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ChecksumMismatch);
    assert!(error.help().unwrap().contains("found a web page"), "{error:?}");
    // What came then is no reason not to look again.
    assert_eq!(fixture.image(&url, None).await.unwrap().virtual_size, 1024);
}

#[tokio::test]
async fn a_local_file_is_copied_once_and_again_when_it_changed() {
    let fixture = Fixture::new();
    let url = fixture.write("disk.img", &raw_disk(4096));
    let path = url.to_file_path().unwrap();
    let old = std::time::SystemTime::now() - Duration::from_secs(60);
    let age = || fs::File::options().write(true).open(&path).unwrap().set_modified(old).unwrap();
    age();
    let (progress, heard) = listening();
    let copy = || async { fixture.store.image(&planned(&url, None), &progress).await };
    // The change of the time is itself a change of this moment: it must settle before it is trusted.
    let mut copies = 0;
    let first = loop {
        heard.lock().unwrap().clear();
        let image = copy().await.unwrap();
        if heard.lock().unwrap().is_empty() {
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
