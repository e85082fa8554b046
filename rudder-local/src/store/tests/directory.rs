//! Which directories are stores, who may open them, and who may read their content.

use super::{child::Child, collect::publish, *};
use proptest::{prelude::*, test_runner::TestCaseResult};
use rudder_core::backend::{KeptLab, LabId, LabState, Retention};
use std::{
    collections::BTreeMap,
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    process,
};

/// Returns everything below a directory: kinds, modes, and contents.
pub(super) fn snapshot(root: &Path) -> BTreeMap<PathBuf, (u32, Vec<u8>)> {
    let mut all = BTreeMap::new();
    let mut open = vec![root.to_owned()];
    while let Some(path) = open.pop() {
        let Ok(meta) = fs::symlink_metadata(&path) else { continue };
        let content = if meta.is_dir() {
            open.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            Vec::new()
        } else if meta.is_symlink() {
            fs::read_link(&path).unwrap().into_os_string().into_encoded_bytes()
        } else if meta.is_file() {
            fs::read(&path).unwrap()
        } else {
            Vec::new()
        };
        all.insert(path, (meta.mode(), content));
    }
    all
}

fn assert_private(root: &Path) {
    for (path, (mode, _)) in snapshot(root) {
        let is_link = mode & 0o170_000 == 0o120_000;
        let expected = if path.is_dir() { 0o700 } else { 0o600 };
        assert!(is_link || mode & 0o777 == expected, "{} has mode {mode:o}", path.display());
    }
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// Creates a store like earlier versions did: without a marker, accessible to others.
async fn earlier_store(root: &Path) {
    let store = open(root);
    publish(&store, "base", b"one").await.unwrap();
    let lab = store.create_lab(&LabId::new("kept"), "kept", Retention::MayBeKept).unwrap();
    lab.mark_kept(None).unwrap();
    fs::remove_file(root.join(layout::MARKER)).unwrap();
    for (path, (mode, _)) in snapshot(root) {
        match mode & 0o170_000 {
            0o040_000 => set_mode(&path, 0o755),
            0o100_000 => set_mode(&path, 0o444),
            _ => {}
        }
    }
}

#[test]
fn a_directory_that_is_not_a_store_is_refused_and_left_unchanged() {
    let trees: [&[&str]; 12] = [
        &["labs/thesis/", "modules/x/.terraform/"],
        &["labs/thesis/chapter.tex"],
        &["modules/base/"],
        &["notes.txt"],
        &[".git/HEAD", "README.md"],
        &["lost+found/"],
        &[".hidden"],
        &["rudder-store.json.bak"],
        &["blobs/sha256/", "labs/"],
        &["memory/base/novel.txt"],
        &["memory.txt"],
        &["store/rudder-store.json"],
    ];
    for tree in trees {
        let dir = tempfile::tempdir().unwrap();
        for entry in tree {
            let path = dir.path().join(entry);
            fs::create_dir_all(if entry.ends_with('/') { &path } else { path.parent().unwrap() }).unwrap();
            if !entry.ends_with('/') {
                fs::write(&path, "mine").unwrap();
            }
        }
        let before = snapshot(dir.path());
        let error = Store::open(dir.path()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{tree:?}");
        assert!(error.report().contains(dir.path().to_str().unwrap()), "{}", error.report());
        assert_eq!(snapshot(dir.path()), before, "{tree:?}");
    }
    for place in ["/", "/usr", "/tmp"] {
        assert!(Store::open(place).is_err(), "{place}");
    }
}

#[tokio::test]
async fn an_unmarked_store_is_recognised_unless_it_contains_foreign_entries() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("store");
    earlier_store(&root).await;
    let version = fs::read_dir(root.join("modules/base")).unwrap().next().unwrap().unwrap().path();
    for foreign in [
        "mine.txt",
        "labs/thesis/chapter.tex",
        "labs/notes.txt",
        "modules/notes.txt",
        "modules/base/.terraform",
        "modules/base/mine",
        "modules/Mine/x",
        "blobs/mine",
        "blobs/sha256/zz/x",
        "index/urls/mine.json",
        "downloads/mine.part",
        "locks/mine",
    ] {
        let path = root.join(foreign);
        let parent_was_there = path.parent().unwrap().exists();
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, "mine").unwrap();
        let before = snapshot(&root);
        let error = Store::open(&root).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{foreign}");
        assert_eq!(snapshot(&root), before, "{foreign}");
        fs::remove_file(&path).unwrap();
        if !parent_was_there {
            fs::remove_dir(path.parent().unwrap()).unwrap();
        }
    }
    for there in ["labs", "modules/other", "blobs/sha256/ab"] {
        let path = root.join(there);
        let aside = dir.path().join("aside");
        let was_there = fs::rename(&path, &aside).is_ok();
        symlink(dir.path(), &path).unwrap();
        let before = snapshot(&root);
        assert!(Store::open(&root).is_err(), "{there}");
        assert_eq!(snapshot(&root), before, "{there}");
        fs::remove_file(&path).unwrap();
        if was_there {
            fs::rename(&aside, &path).unwrap();
        }
    }

    let store = Store::open(&root).unwrap();
    assert_private(&root);
    assert_eq!(store.module("base").unwrap().name, "base");
    assert_eq!(store.labs().unwrap()[0].state, LabState::Kept { expires: None });
    assert!(version.exists());
    assert_eq!(store.reap().await.unwrap().removed, Vec::<String>::new());
}

#[test]
fn a_later_or_damaged_marker_is_refused() {
    let fixture = Fixture::new();
    let root = fixture.store.root();
    let marker = root.join(layout::MARKER);
    for (text, kind, part) in [
        ("{\"format\": 2, \"more\": []}", ErrorKind::Unsupported, "found format 2"),
        ("{\"format\": 99}", ErrorKind::Unsupported, "later version"),
        ("", ErrorKind::InvalidInput, "an empty file"),
        ("{\"form", ErrorKind::InvalidInput, "invalid JSON"),
        ("{}", ErrorKind::InvalidInput, "no format number"),
        ("{\"format\": 0}", ErrorKind::InvalidInput, "no format number"),
        ("{\"format\": 1, \"id\": 7}", ErrorKind::InvalidInput, "unexpected fields"),
    ] {
        fs::write(&marker, text).unwrap();
        let before = snapshot(root);
        let error = Store::open(root).unwrap_err();
        assert_eq!(error.kind(), kind, "{text}");
        assert!(error.report().contains(part), "{text}: {}", error.report());
        assert_eq!(snapshot(root), before, "{text}");
    }
    // The content that the error's help suggests.
    fs::write(&marker, "{\"format\": 1}").unwrap();
    Store::open(root).unwrap();
    // A symbolic link, a directory or a FIFO is not a marker, and opening a FIFO does not block.
    let elsewhere = fixture.dir.path().join("elsewhere");
    fs::rename(&marker, &elsewhere).unwrap();
    symlink(&elsewhere, &marker).unwrap();
    assert!(Store::open(root).is_err());
    fs::remove_file(&marker).unwrap();
    fs::create_dir(&marker).unwrap();
    assert!(Store::open(root).is_err());
    fs::remove_dir(&marker).unwrap();
    assert!(process::Command::new("mkfifo").arg(&marker).status().unwrap().success());
    assert!(Store::open(root).is_err());
}

#[test]
fn a_symbolic_link_instead_of_a_store_directory_is_refused() {
    for directory in ["blobs", "blobs/sha256", "modules", "index", "index/urls", "downloads", "labs", "locks"]
    {
        let fixture = Fixture::new();
        let root = fixture.store.root();
        let elsewhere = fixture.dir.path().join("elsewhere");
        fs::rename(root.join(directory), &elsewhere).unwrap();
        symlink(&elsewhere, root.join(directory)).unwrap();
        let error = Store::open(root).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Conflict, "{directory}");
        assert!(error.report().contains("a symbolic link"), "{}", error.report());
    }
    // The path to a store may contain one: its owner chose it.
    let fixture = Fixture::new();
    let link = fixture.dir.path().join("link");
    symlink(fixture.store.root(), &link).unwrap();
    assert_eq!(Store::open(&link).unwrap().root(), fixture.store.root());
    let dangling = fixture.dir.path().join("dangling");
    symlink(fixture.dir.path().join("nowhere"), &dangling).unwrap();
    assert!(Store::open(&dangling).is_err());
    assert!(!fixture.dir.path().join("nowhere").exists());
}

#[test]
fn a_store_of_another_user_is_refused_even_for_root() {
    if !rustix::process::geteuid().is_root() {
        // Only root can give a directory away; here, root's directories serve as another user's.
        assert!(Store::open("/usr").unwrap_err().report().contains("belongs to user 0"));
        return;
    }
    for part in ["", "labs", "modules"] {
        let fixture = Fixture::new();
        let root = fixture.store.root();
        std::os::unix::fs::chown(root.join(part), Some(12345), None).unwrap();
        let before = snapshot(root);
        let error = Store::open(root).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        assert!(error.report().contains("belongs to user 12345"), "{}", error.report());
        assert_eq!(snapshot(root), before);
    }
    // The same for an empty directory.
    let dir = tempfile::tempdir().unwrap();
    std::os::unix::fs::chown(dir.path(), Some(12345), None).unwrap();
    assert!(Store::open(dir.path()).is_err());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn a_directory_shared_between_users_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    set_mode(dir.path(), 0o1777);
    assert!(Store::open(dir.path()).unwrap_err().report().contains("sticky"));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[tokio::test]
async fn only_its_owner_can_read_a_store() {
    let fixture = Fixture::new();
    let store = &fixture.store;
    let url = fixture.write("secret.img", &raw_disk(1024));
    let image = fixture.image(&url, None).await.unwrap();
    store.file(&planned(&url, None), &Progress::none()).await.unwrap();
    store.keep_cached(&image.lease, Duration::from_secs(60)).unwrap();
    publish(store, "base", b"one").await.unwrap();
    publish(store, "base", b"two").await.unwrap();
    let lab = store.create_lab(&LabId::new("a"), "a", Retention::EndWithOwner).unwrap();
    assert_private(store.root());
    drop(lab);

    // A copy that everyone can read, as made by `cp -r`, and a directory that its owner opened to others.
    for (path, (mode, _)) in snapshot(store.root()) {
        if mode & 0o170_000 != 0o120_000 {
            set_mode(&path, mode & 0o777 | 0o055);
        }
    }
    let store = Store::open(store.root()).unwrap();
    assert_private(store.root());
    set_mode(&store.root().join("labs"), 0o777);
    Store::open(store.root()).unwrap();
    assert_private(store.root());
    // A setgid directory passes its group to its content, which the group may still not read.
    let shared = fixture.dir.path().join("shared");
    fs::create_dir(&shared).unwrap();
    set_mode(&shared, 0o2775);
    let in_group = Store::open(shared.join("store")).unwrap();
    publish(&in_group, "base", b"one").await.unwrap();
    assert_private(in_group.root());
}

#[test]
fn a_store_is_private_under_any_umask() {
    for umask in ["000", "022", "077"] {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("new/store");
        let mut child = Child::start_with_umask(&root, "publish-once base", umask);
        child.wait_for("published");
        assert_private(&dir.path().join("new"));
    }
}

#[test]
fn a_read_only_store_can_be_read() {
    let fixture = Fixture::new();
    // A read-only mount is not needed for this: a complete store is opened without writing anything.
    let before = snapshot(fixture.store.root());
    let times = |root: &Path| fs::metadata(root).unwrap().mtime_nsec();
    let then = times(fixture.store.root());
    let store = Store::open(fixture.store.root()).unwrap();
    assert_eq!(store.modules().unwrap(), []);
    assert_eq!((snapshot(store.root()), times(store.root())), (before, then));
}

#[test]
fn a_store_can_be_created_concurrently() {
    for _ in 0..20 {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("store");
        let names: Vec<String> = std::thread::scope(|scope| {
            let open = || Store::open(&root).unwrap().name().to_owned();
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(open)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(names.iter().all(|name| *name == names[0] && name.len() == 32), "{names:?}");
        let left: Vec<_> = fs::read_dir(&root).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert!(!left.iter().any(|name| name.to_str().unwrap().starts_with('.')), "{left:?}");
    }
    // A temporary file of a process that was killed while writing the marker does no harm.
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join(".rudder-store-abc123"), "{").unwrap();
    Store::open(dir.path()).unwrap();
}

#[test]
fn a_mark_is_recognised_only_by_its_store() {
    let fixture = Fixture::new();
    let store = &fixture.store;
    assert!(store.recognises(&store.mark()) && store.recognises(store.name()));
    let other = Store::open(fixture.dir.path().join("other")).unwrap();
    assert!(!other.recognises(&store.mark()) && !other.recognises(store.name()));
    // Devices may have other numbers after the host restarts.
    assert!(store.recognises(&format!("{}/another-boot/1:2", store.name())));
    let (start, _) = store.mark().rsplit_once('/').map(|(a, b)| (a.to_owned(), b.to_owned())).unwrap();
    assert!(!store.recognises(&format!("{start}/1:2")));
    assert!(!store.recognises("") && !store.recognises("x/y"));
}

proptest! {
    /// No tree of regular files is taken for a store, and none is changed.
    #[test]
    fn no_other_directory_is_mistaken_for_a_store(entries in proptest::collection::btree_set(
        "(blobs|labs|modules|index|locks|downloads|memory|x)(/[a-z.]{1,3}){0,3}", 1..8)
    ) {
        let dir = tempfile::tempdir().unwrap();
        for entry in &entries {
            let path = dir.path().join(entry);
            // Not by path components, which omit a final dot.
            if !entry.split('/').any(|part| [".", ".."].contains(&part)) {
                // One may prevent another.
                let _ = fs::create_dir_all(path.parent().unwrap());
                let _ = fs::write(&path, "mine");
            }
        }
        refused(dir.path())?;
    }
}

fn refused(path: &Path) -> TestCaseResult {
    let before = snapshot(path);
    if before.len() > 1 {
        prop_assert!(Store::open(path).is_err());
        prop_assert_eq!(snapshot(path), before);
    }
    Ok(())
}

#[test]
fn one_handle_at_a_time_attaches_to_a_kept_lab() {
    let fixture = Fixture::new();
    let id = LabId::new("web");
    let attach =
        || fixture.store.attach_lab(&id).map(drop).map_err(|error| (error.kind(), error.to_string()));
    assert_eq!(attach().unwrap_err().0, ErrorKind::NotFound);
    let lab = fixture.store.create_lab(&id, "web", Retention::MayBeKept).unwrap();
    assert!(attach().unwrap_err().1.ends_with("it belongs to a running process"));
    lab.mark_kept(None).unwrap();
    assert!(attach().unwrap_err().1.ends_with("another process uses it"));
    drop(lab);
    let attached = fixture.store.attach_lab(&id).unwrap();
    assert!(attach().unwrap_err().1.ends_with("another process uses it"));
    attached.mark_kept(Some(std::time::SystemTime::now())).unwrap();
    drop(attached);
    assert!(attach().unwrap_err().1.ends_with("it has expired"));
}

#[test]
fn the_record_of_a_lab_that_an_earlier_version_kept_is_found() {
    let fixture = Fixture::new();
    let id = LabId::new("web");
    let lab = fixture.store.create_lab(&id, "web", Retention::MayBeKept).unwrap();
    fs::write(lab.path().join("kept.json"), "earlier").unwrap();
    let read = |name| fixture.store.lab_file(&id, name).unwrap();
    assert_eq!(read(KeptLab::FILE).as_deref(), Some(b"earlier".as_slice()));
    assert_eq!(read("ledger.json"), None, "only stored files are found");
    lab.store_file(KeptLab::FILE, b"now").unwrap();
    assert_eq!(read(KeptLab::FILE).as_deref(), Some(b"now".as_slice()));
}

#[test]
fn a_lab_that_stays_is_kept_once_it_is_complete() {
    let fixture = Fixture::new();
    let id = LabId::new("web");
    let open = || fixture.store.create_lab(&id, "web", Retention::UntilRemoved { expires: None }).unwrap();
    drop(open());
    assert_eq!(fixture.store.labs().unwrap(), [], "it could not be opened");
    let lab = open();
    lab.complete().unwrap();
    drop(lab);
    assert_eq!(fixture.store.labs().unwrap()[0].state, LabState::Kept { expires: None });
}
