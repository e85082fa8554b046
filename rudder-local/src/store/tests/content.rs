//! Stored content that has changed since: it is never used, it is reported, and repaired if possible.

use super::{
    collect::publish,
    server::{Reply, Server},
    *,
};
use proptest::prelude::*;
use std::{
    io::{Seek, Write},
    os::unix::fs::{PermissionsExt, symlink},
};

const ETAG: &str = "\"one\"";

fn serve(disk: &[u8]) -> Server {
    let disk = disk.to_vec();
    Server::start(move |request, _| Reply::file(request, &disk, ETAG))
}

fn writable(path: &Path) {
    fs::set_permissions(path, fs::Permissions::from_mode(0o644)).unwrap();
}

/// Overwrites bytes of the file, and restores its modification time.
fn overwrite(path: &Path, at: u64, bytes: &[u8]) {
    writable(path);
    let mut file = fs::File::options().write(true).open(path).unwrap();
    let modified = file.metadata().unwrap().modified().unwrap();
    file.seek(std::io::SeekFrom::Start(at)).unwrap();
    file.write_all(bytes).unwrap();
    file.set_modified(modified).unwrap();
}

fn cut(path: &Path, size: u64) {
    writable(path);
    fs::File::options().write(true).open(path).unwrap().set_len(size).unwrap();
}

fn fifo(path: &Path) {
    let (directory, mode) = (rustix::fs::CWD, rustix::fs::Mode::RWXU);
    rustix::fs::mknodat(directory, path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
}

type Damage = fn(&Path);

/// Ways to damage a file.
const DAMAGES: [(&str, Damage); 7] = [
    ("flipped", |path| overwrite(path, 20_000, b"????????")),
    ("cut", |path| cut(path, 30_000)),
    ("empty", |path| cut(path, 0)),
    ("longer", |path| cut(path, 200_000)),
    ("a link to what was there", |path| {
        let aside = path.with_extension("aside");
        fs::rename(path, &aside).unwrap();
        symlink(aside, path).unwrap();
    }),
    ("a directory", |path| {
        fs::remove_file(path).unwrap();
        fs::create_dir(path).unwrap();
        fs::write(path.join("thesis"), "mine").unwrap();
    }),
    ("a fifo", |path| {
        fs::remove_file(path).unwrap();
        fifo(path);
    }),
];

fn notices(events: &Mutex<Vec<ProgressEvent>>) -> Vec<String> {
    let events = std::mem::take(&mut *events.lock().unwrap());
    let notices = events.into_iter().filter_map(|event| match event {
        ProgressEvent::Notice(notice) => Some(notice),
        _ => None,
    });
    notices.collect()
}

#[tokio::test]
async fn a_damaged_blob_is_reported_and_fetched_again() {
    let disk = raw_disk(100_352);
    for promised in [Some(Digest::of(&disk)), None] {
        for (what, damage) in DAMAGES {
            let server = serve(&disk);
            let fixture = Fixture::new();
            let (progress, events) = recording_progress();
            let url = planned(&server.url("disk.img"), promised);
            let image = fixture.store.image(&url, &progress).await.unwrap();
            drop(image.lease);
            damage(&image.path);
            let again = fixture.store.image(&url, &progress).await.unwrap();
            assert_eq!(fs::read(&again.path).unwrap(), disk, "{what}");
            assert_eq!(server.count(), 2, "{what}");
            assert_eq!(server.requests()[1].header("if-none-match"), None, "{what}");
            let message = notices(&events);
            let path = image.path.display().to_string();
            assert!(
                message.iter().any(|message| message.contains(&path) && message.contains("damaged")),
                "{what}: {message:?}"
            );
            if what == "a directory" {
                // The user's file still exists somewhere.
                let siblings = fs::read_dir(image.path.parent().unwrap()).unwrap();
                assert!(siblings.flatten().any(|entry| entry.path().join("thesis").exists()));
            }
            // The repair is permanent.
            fixture.store.image(&url, &progress).await.unwrap();
            assert_eq!(notices(&events), Vec::<String>::new(), "{what}");
        }
    }
}

#[tokio::test]
async fn damaged_copies_of_files_and_unpacked_images_are_recreated() {
    let disk = raw_disk(100_352);
    let packed = image::pack(super::unpack::Packing::Gzip, &disk).await;
    for (what, damage) in DAMAGES {
        let fixture = Fixture::new();
        for (name, bytes) in [("plain", &disk), ("packed", &packed)] {
            let url = fixture.write(name, bytes);
            let image = fixture.image(&url, None).await.unwrap();
            damage(&image.path);
            let again = fixture.image(&url, None).await.unwrap();
            assert_eq!(fs::read(&again.path).unwrap(), disk, "{what}, {name}");
        }
        let url = planned(&fixture.write("file", &disk), None);
        let file = fixture.store.file(&url, &Progress::none()).await.unwrap();
        damage(&file.path);
        let again = fixture.store.file(&url, &Progress::none()).await.unwrap();
        assert_eq!(fs::read(&again.path).unwrap(), disk, "{what}");
    }
}

#[tokio::test]
async fn a_damaged_blob_that_cannot_be_fetched_again_is_an_error_that_names_it() {
    let disk = raw_disk(100_352);
    let server = Server::start({
        let disk = disk.clone();
        move |request, number| {
            if number == 0 { Reply::file(request, &disk, ETAG) } else { Reply::status(404) }
        }
    });
    let fixture = Fixture::new();
    for promised in [None, Some(Digest::of(&disk))] {
        let url = planned(&server.url("disk.img"), promised);
        if promised.is_none() {
            let image = fixture.store.image(&url, &Progress::none()).await.unwrap();
            overwrite(&image.path, 5000, b"damage");
        }
        let error = fixture.store.image(&url, &Progress::none()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        let path = fixture.store.blob_path(&Digest::of(&disk)).display().to_string();
        assert!(error.report().contains(&format!("damaged cached file {path}")), "{}", error.report());
    }
}

/// Returns how often the content of a stored file was read to be verified.
fn verifications(events: &Mutex<Vec<ProgressEvent>>) -> usize {
    let events = std::mem::take(&mut *events.lock().unwrap());
    let done = |event: &&ProgressEvent| matches!(event, ProgressEvent::Bytes { task, done, total } if task.starts_with("verify ") && Some(*done) == *total);
    events.iter().filter(done).count()
}

#[tokio::test]
async fn a_blob_is_hashed_once_per_change_and_not_per_build() {
    let disk = raw_disk(100_352);
    let server = serve(&disk);
    let fixture = Fixture::new();
    let (progress, events) = recording_progress();
    let url = planned(&server.url("disk.img"), Some(Digest::of(&disk)));
    let image = fixture.store.image(&url, &progress).await.unwrap();
    for _ in 0..3 {
        fixture.store.image(&url, &progress).await.unwrap();
    }
    assert_eq!(verifications(&events), 0);
    // The time changed, but not the content.
    writable(&image.path);
    for _ in 0..3 {
        fixture.store.image(&url, &progress).await.unwrap();
    }
    assert_eq!(verifications(&events), 1);
    // Without the record, as in a store from before there were any.
    fs::remove_dir_all(fixture.store.root().join("index/verified")).unwrap();
    for _ in 0..3 {
        fixture.store.image(&url, &progress).await.unwrap();
    }
    assert_eq!(verifications(&events), 1);
    assert_eq!(server.count(), 1);
}

#[tokio::test]
async fn a_damaged_index_is_rebuilt_and_nothing_is_lost() {
    let disk = raw_disk(100_352);
    let packed = image::pack(super::unpack::Packing::Gzip, &disk).await;
    let other = image::pack(super::unpack::Packing::Gzip, &raw_disk(50_176)).await;
    for dir in ["index/urls", "index/images", "index/verified"] {
        for (what, damage) in DAMAGES {
            let fixture = Fixture::new();
            let url = fixture.write("packed", &packed);
            let image = fixture.image(&url, None).await.unwrap();
            let name = fixture.names(dir).remove(0);
            fixture.image(&fixture.write("other", &other), None).await.unwrap();
            damage(&fixture.store.root().join(dir).join(name));
            let found = fixture.image(&url, None).await;
            match found {
                Ok(found) => assert_eq!(fs::read(&found.path).unwrap(), disk, "{dir}: {what}"),
                // The store does not remove a directory, so this may fail.
                Err(error) => assert_eq!(what, "a directory", "{dir}: {}", error.report()),
            }
            assert_eq!(fs::read(&image.path).unwrap(), disk, "{dir}: {what}");
        }
    }
}

#[tokio::test]
async fn swapped_records_are_not_trusted() {
    let fixture = Fixture::new();
    let images = [raw_disk(1024), raw_disk(2048)];
    let urls = [fixture.write("one", &images[0]), fixture.write("two", &images[1])];
    for url in &urls {
        fixture.image(url, None).await.unwrap();
    }
    for dir in ["index/urls", "index/images"] {
        let dir = fixture.store.root().join(dir);
        let names: Vec<PathBuf> = fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path()).collect();
        fs::copy(&names[0], dir.join("swap")).unwrap();
        fs::copy(&names[1], &names[0]).unwrap();
        fs::rename(dir.join("swap"), &names[1]).unwrap();
    }
    for (url, image) in urls.iter().zip(&images) {
        let found = fixture.image(url, None).await.unwrap();
        assert_eq!(&fs::read(found.path).unwrap(), image);
        assert_eq!(found.virtual_size, image.len() as u64);
    }
}

#[tokio::test]
async fn a_modified_partial_download_starts_over() {
    let disk = raw_disk(100_352);
    for (what, damage) in [
        ("flipped", (|path| overwrite(path, 20_000, b"????????")) as Damage),
        ("cut", |path| cut(path, 30_000)),
        ("longer", |path| {
            let mut file = fs::File::options().append(true).open(path).unwrap();
            file.write_all(b"more").unwrap();
        }),
        ("a link", |path| {
            let aside = path.with_extension("aside");
            fs::rename(path, &aside).unwrap();
            symlink(aside, path).unwrap();
        }),
    ] {
        let server = Server::start({
            let disk = disk.clone();
            move |request, number| {
                let reply = Reply::file(request, &disk, ETAG);
                // As many attempts as one call makes.
                if number < 3 { reply.stop_after(if number == 0 { 50_000 } else { 0 }) } else { reply }
            }
        });
        let fixture = Fixture::new();
        let url = planned(&server.url("disk.img"), None);
        fixture.store.image(&url, &Progress::none()).await.unwrap_err();
        let part = fixture.store.part_path(&Store::url_key(&url.url));
        assert_eq!(fs::metadata(&part).unwrap().len(), 50_000);
        damage(&part);
        let image = fixture.store.image(&url, &Progress::none()).await.unwrap();
        assert_eq!(fs::read(&image.path).unwrap(), disk, "{what}");
        // Bytes that a dying writer left after its last sum are just cut off.
        let expected = if what == "longer" { Some("bytes=50000-") } else { None };
        assert_eq!(server.requests()[3].header("range"), expected, "{what}");
    }
}

fn disk_of(module: &rudder_core::module::Module) -> PathBuf {
    module.path.as_ref().unwrap().parent().unwrap().join(&module.machines[0].disks[0].file)
}

fn check_disk(store: &Store, module: &rudder_core::module::Module) -> Result<PathBuf> {
    let disk = &module.machines[0].disks[0];
    store.captured_file(module, &disk.file, &disk.content, &Progress::none())
}

#[tokio::test]
async fn a_damaged_disk_of_a_module_is_an_error_until_the_module_is_rebuilt() {
    let disk = raw_disk(100_352);
    for (what, damage) in DAMAGES {
        let fixture = Fixture::new();
        let store = &fixture.store;
        let module = publish(store, "base", &disk).await.unwrap();
        let path = disk_of(&module);
        assert_eq!(check_disk(store, &module).unwrap(), path);
        store.verify_module(&module, &Progress::none()).await.unwrap();
        damage(&path);
        for error in [
            check_disk(store, &module).unwrap_err(),
            store.verify_module(&module, &Progress::none()).await.unwrap_err(),
        ] {
            assert_eq!(error.kind(), ErrorKind::InvalidImage, "{what}");
            let named = format!("{} of module base is damaged: ", path.display());
            assert!(error.to_string().starts_with(&named), "{what}: {error}");
            assert!(error.help().unwrap().contains("build the module again"), "{error:?}");
        }
        // Built again, it has the same digest: existing files must not be assumed to be intact.
        if what == "a directory" {
            assert!(publish(store, "base", &disk).await.is_err());
        } else {
            let again = publish(store, "base", &disk).await.unwrap();
            assert_eq!(again.digest, module.digest);
            assert_eq!(fs::read(check_disk(store, &again).unwrap()).unwrap(), disk, "{what}");
        }
    }
    let fixture = Fixture::new();
    let mut module = publish(&fixture.store, "base", &disk).await.unwrap();
    fs::remove_file(disk_of(&module)).unwrap();
    let error = check_disk(&fixture.store, &module).unwrap_err();
    assert!(error.to_string().ends_with("is damaged: it is missing"), "{error}");
    module.machines[0].disks[0].file = "../../../index/urls".into();
    let error = check_disk(&fixture.store, &module).unwrap_err();
    assert!(error.to_string().contains("expected a plain file name"), "{error}");
}

#[tokio::test]
async fn nothing_that_a_damaged_record_may_name_is_collected() {
    let disk = raw_disk(100_352);
    let packed = image::pack(super::unpack::Packing::Gzip, &disk).await;
    let fixture = Fixture::new();
    let store = &fixture.store;
    let image = fixture.image(&fixture.write("packed", &packed), None).await.unwrap();
    collect::publish_from(store, "base", b"x", vec![image.input]).await.unwrap();
    drop(image.lease);
    let record = store.image_record_path(&Digest::of(&packed));
    overwrite(&record, 10, b"????????");
    for _ in 0..2 {
        let report = store.collect(CollectPolicy::default()).await.unwrap();
        assert!(report.removed.is_empty() && report.warnings.len() == 1, "{report:?}");
        assert!(report.warnings[0].contains(&record.display().to_string()), "{report:?}");
        assert!(image.path.exists());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 8, failure_persistence: None, ..ProptestConfig::default() })]

    /// Changes twenty random bytes or ends of files in a store with everything in it: only what was stored is ever used afterwards.
    #[test]
    fn random_damage_is_never_used_silently(
        damages in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), any::<u8>()), 20)
    ) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        runtime.block_on(async {
            let disk = raw_disk(20_480);
            let packed = image::pack(super::unpack::Packing::Xz, &disk).await;
            let server = serve(&disk);
            let fixture = Fixture::new();
            let store = &fixture.store;
            let remote = server.url("disk.img");
            let local = fixture.write("packed", &packed);
            fixture.image(&remote, None).await.unwrap();
            fixture.image(&local, None).await.unwrap();
            let module = publish(store, "base", &disk).await.unwrap();
            let shelves = ["blobs/sha256", "index"].map(|dir| store.root().join(dir));
            let mut files: Vec<PathBuf> = shelves.iter().flat_map(|dir| files_below(dir)).collect();
            files.push(disk_of(&module));
            for (file, at, value) in &damages {
                let path = file.get(&files);
                let size = fs::metadata(path).unwrap().len();
                match value {
                    0..40 => cut(path, if size == 0 { 0 } else { at.index(size as usize) as u64 }),
                    _ if size == 0 => {}
                    _ => overwrite(path, at.index(size as usize) as u64, &[*value]),
                }
            }
            for (url, promised) in [(&remote, None), (&local, None), (&remote, Some(Digest::of(&disk)))] {
                let found = fixture.image(url, promised).await.unwrap();
                prop_assert_eq!(&fs::read(&found.path).unwrap(), &disk);
                prop_assert_eq!((found.virtual_size, found.format), (20_480, ImageFormat::Raw));
            }
            match check_disk(store, &module) {
                Ok(path) => prop_assert_eq!(&fs::read(path).unwrap(), &disk),
                Err(error) => prop_assert_eq!(error.kind(), ErrorKind::InvalidImage),
            }
            prop_assert!(files.iter().all(|path| path.exists()));
            Ok(())
        })?;
    }
}

fn files_below(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { files.extend(files_below(&path)) } else { files.push(path) }
    }
    files.sort();
    files
}
