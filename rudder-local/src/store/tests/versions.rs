//! The current version of a module, and records that cannot be trusted.

use super::{collect::publish, directory::snapshot, *};
use rudder_core::backend::{LabId, Retention};
use serde_json::{Value, json};
use std::{os::unix::fs::symlink, process::Command};

fn copy(from: &Path, options: &str, to: &Path) {
    assert!(Command::new("cp").arg(options).args([from, to]).status().unwrap().success());
}

fn current(store: &Store, name: &str) -> PathBuf {
    store.root().join("modules").join(name).join("current")
}

/// Changes the record of a module.
fn edit(store: &Store, name: &str, change: impl FnOnce(&mut Value)) -> PathBuf {
    let path = store.module(name).unwrap().path.unwrap();
    let mut record = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut record);
    fs::write(&path, record.to_string()).unwrap();
    path
}

/// Publishes two versions, the older of which is in use.
async fn two_versions(
    fixture: &Fixture,
) -> (rudder_core::module::Module, rudder_core::module::Module, Lease) {
    let store = &fixture.store;
    let first = publish(store, "base", b"one").await.unwrap();
    let (_, lease) = store.lease_module("base", &first.digest).unwrap();
    let second = publish(store, "base", b"two").await.unwrap();
    (first, second, lease)
}

#[tokio::test]
async fn a_module_whose_pointer_is_lost_is_still_found() {
    for damage in ["removed", "dangling", "elsewhere", "directory", "file", "text"] {
        let fixture = Fixture::new();
        let store = &fixture.store;
        let module = publish(store, "base", b"one").await.unwrap();
        let pointer = current(store, "base");
        fs::remove_file(&pointer).unwrap();
        match damage {
            "dangling" => symlink(Digest::of(b"x").to_string(), &pointer).unwrap(),
            "elsewhere" => symlink(fixture.dir.path(), &pointer).unwrap(),
            "directory" => copy(module.path.as_ref().unwrap().parent().unwrap(), "-r", &pointer),
            "file" => fs::write(&pointer, "mine").unwrap(),
            "text" => fs::write(&pointer, module.digest.to_string()).unwrap(),
            _ => {}
        }
        assert_eq!(store.modules().unwrap(), std::slice::from_ref(&module), "{damage}");
        let before = snapshot(fixture.dir.path());
        let report = store.collect(CollectPolicy::default()).await.unwrap();
        assert_eq!((&report.removed, &report.failed), (&vec![], &vec![]), "{damage}");
        assert_eq!(store.modules().unwrap(), std::slice::from_ref(&module), "{damage}");
        // Only the pointer was changed.
        let after = snapshot(fixture.dir.path());
        for (path, found) in &before {
            assert!(
                *path == pointer || path.starts_with(store.root().join("locks")) || after[path] == *found
            );
        }
        // The name can be used as if it were new.
        let next = publish(store, "base", b"two").await.unwrap();
        assert_eq!(store.modules().unwrap(), [next], "{damage}");
        assert!(fs::symlink_metadata(&pointer).unwrap().is_symlink());
    }
}

#[tokio::test]
async fn without_a_pointer_the_only_version_that_is_not_replaced_is_current() {
    let fixture = Fixture::new();
    let store = &fixture.store;
    let (first, second, lease) = two_versions(&fixture).await;
    fs::remove_file(current(store, "base")).unwrap();
    assert_eq!(store.module("base").unwrap(), second);
    drop(lease);
    let report = store.reap().await.unwrap();
    assert_eq!(report.removed, [format!("module base {}, which was replaced", first.digest.short())]);
    assert_eq!(store.module("base").unwrap(), second);
}

#[tokio::test]
async fn ambiguous_versions_are_kept_until_one_is_chosen() {
    let fixture = Fixture::new();
    let store = &fixture.store;
    let (first, second, lease) = two_versions(&fixture).await;
    drop(lease);
    // As earlier versions left it: without marks.
    fs::remove_file(first.path.as_ref().unwrap().with_file_name("replaced")).unwrap();
    let report = store.reap().await.unwrap();
    assert_eq!(report.removed, Vec::<String>::new());
    assert!(report.warnings[0].contains("modules repair base"), "{report:?}");
    assert_eq!(store.module("base").unwrap(), second);

    fs::remove_file(current(store, "base")).unwrap();
    let error = store.module("base").unwrap_err();
    assert!(error.report().contains(&first.digest.short()), "{}", error.report());
    assert!(error.report().contains(&second.digest.short()), "{}", error.report());
    assert_eq!(store.modules().unwrap(), []);
    assert_eq!(store.damaged_modules().unwrap()[0].name, "base");
    let report = store.collect(CollectPolicy::default()).await.unwrap();
    assert_eq!(report.removed, Vec::<String>::new());
    assert!(report.warnings.iter().any(|line| line.contains("base")), "{report:?}");

    assert_eq!(store.repair_module("base", "").await.unwrap_err().kind(), ErrorKind::InvalidInput);
    assert_eq!(store.repair_module("base", "zz").await.unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(store.repair_module("../x", "").await.unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(store.repair_module("base", &first.digest.short()).await.unwrap(), first);
    assert_eq!(store.module("base").unwrap(), first);
    let report = store.reap().await.unwrap();
    assert_eq!(report.removed, [format!("module base {}, which was replaced", second.digest.short())]);
    assert_eq!(report.warnings, Vec::<String>::new());
}

#[tokio::test]
async fn after_switching_back_by_hand_both_versions_stay() {
    let fixture = Fixture::new();
    let store = &fixture.store;
    let (first, second, lease) = two_versions(&fixture).await;
    fs::remove_file(current(store, "base")).unwrap();
    symlink(first.digest.to_string(), current(store, "base")).unwrap();
    drop(lease);
    assert_eq!(store.reap().await.unwrap().removed, Vec::<String>::new());
    assert_eq!(store.module("base").unwrap(), first);
    assert!(second.path.unwrap().exists());
}

#[tokio::test]
async fn a_store_copied_without_links_is_readable_and_nothing_is_lost() {
    for options in ["-rL", "-a", "-r"] {
        let fixture = Fixture::new();
        let (_, second, lease) = two_versions(&fixture).await;
        let other = publish(&fixture.store, "other", b"three").await.unwrap();
        let root = fixture.dir.path().join("copy");
        copy(fixture.store.root(), options, &root);
        drop(lease);
        let copy = Store::open(&root).unwrap();
        let digests = |store: &Store| -> Vec<Digest> {
            store.modules().unwrap().into_iter().map(|module| module.digest).collect()
        };
        assert_eq!(digests(&copy), [second.digest, other.digest], "{options}");
        copy.collect(CollectPolicy::default()).await.unwrap();
        copy.collect(CollectPolicy::default()).await.unwrap();
        assert_eq!(digests(&copy), [second.digest, other.digest], "{options}");
        assert_eq!(digests(&fixture.store), [second.digest, other.digest], "{options}");
    }
}

#[tokio::test]
async fn a_damaged_record_is_an_error_and_other_modules_stay_usable() {
    type Change = fn(&mut Value);
    let changes: [(&str, ErrorKind, Change); 12] = [
        ("found format 3", ErrorKind::Unsupported, |r| r["format"] = json!(3)),
        ("found format 4294967297", ErrorKind::Unsupported, |r| r["format"] = json!(4_294_967_297_u64)),
        ("no format number", ErrorKind::InvalidInput, |r| r["format"] = json!("1")),
        ("no format number", ErrorKind::InvalidInput, |r| *r = json!([])),
        ("it cannot be parsed", ErrorKind::InvalidInput, |r| *r = json!({"format": 1})),
        ("\"../../x\"", ErrorKind::InvalidInput, |r| r["machines"][0]["disks"][0]["file"] = json!("../../x")),
        ("\"/etc/shadow\"", ErrorKind::InvalidInput, |r| {
            r["machines"][0]["disks"][0]["file"] = json!("/etc/shadow");
        }),
        ("\"..\"", ErrorKind::InvalidInput, |r| r["machines"][0]["disks"][0]["file"] = json!("..")),
        ("\"a/b\"", ErrorKind::InvalidInput, |r| {
            let state =
                json!({"kind": "tpm", "file": "a/b", "format": "swtpm", "size": 1, "sha256": r["digest"]});
            r["machines"][0]["state"] = json!([state]);
        }),
        ("the invalid format name", ErrorKind::InvalidInput, |r| {
            r["machines"][0]["disks"][0]["format"] = json!("raw,file.filename=/etc/shadow");
        }),
        ("module other", ErrorKind::InvalidInput, |r| r["name"] = json!("other")),
        ("but found none", ErrorKind::InvalidInput, |r| {
            r["machines"][0]["disks"][0]["file"] = json!("missing.raw");
        }),
    ];
    for (part, kind, change) in changes {
        let fixture = Fixture::new();
        let store = &fixture.store;
        let module = publish(store, "base", b"one").await.unwrap();
        let other = publish(store, "good", b"two").await.unwrap();
        let url = fixture.write("input.img", &raw_disk(1024));
        let input = fixture.image(&url, None).await.unwrap().path;
        let path = edit(store, "base", change);

        let error = store.module("base").unwrap_err();
        assert_eq!(error.kind(), kind, "{part}");
        let report = error.report();
        assert!(
            report.contains(part) && report.contains(path.parent().unwrap().to_str().unwrap()),
            "{report}"
        );
        assert_eq!(store.lease_module("base", &module.digest).unwrap_err().kind(), kind, "{part}");
        assert_eq!(store.modules().unwrap(), std::slice::from_ref(&other), "{part}");
        let damaged = store.damaged_modules().unwrap();
        assert_eq!((damaged.len(), damaged[0].name.as_str()), (1, "base"), "{part}");
        // What it was made from is unknown: everything that it might need stays.
        let report = store.collect(CollectPolicy::default()).await.unwrap();
        assert_eq!(report.removed, Vec::<String>::new(), "{part}");
        assert!(report.warnings.iter().any(|line| line.contains("base")), "{report:?}");
        assert!(path.exists() && input.exists());
        // Its name can be reused or given up.
        store.remove_module("base").await.unwrap();
        assert_eq!(store.damaged_modules().unwrap(), []);
        publish(store, "base", b"one").await.unwrap();
    }
}

#[tokio::test]
async fn module_files_that_are_irregular_or_incomplete_are_errors() {
    for damage in ["short", "long", "missing", "link", "directory", "fifo", "record-link", "record-directory"]
    {
        let fixture = Fixture::new();
        let store = &fixture.store;
        let module = publish(store, "base", b"one").await.unwrap();
        let directory = module.path.as_ref().unwrap().parent().unwrap();
        let file = match damage.strip_prefix("record-") {
            Some(_) => module.path.clone().unwrap(),
            None => directory.join(&module.machines[0].disks[0].file),
        };
        let moved = fixture.dir.path().join("moved");
        match damage {
            "short" => fs::write(&file, "on").unwrap(),
            "long" => fs::write(&file, "one!").unwrap(),
            _ => fs::rename(&file, &moved).unwrap(),
        }
        match damage.trim_start_matches("record-") {
            "link" => symlink(&moved, &file).unwrap(),
            "directory" => fs::create_dir(&file).unwrap(),
            "fifo" => assert!(Command::new("mkfifo").arg(&file).status().unwrap().success()),
            _ => {}
        }
        let report = store.module("base").unwrap_err().report();
        assert!(report.contains(file.to_str().unwrap()), "{damage}: {report}");
        assert_eq!(store.reap().await.unwrap().removed, Vec::<String>::new(), "{damage}");
        assert!(fs::symlink_metadata(&file).is_ok() || damage == "missing");
        if !damage.starts_with("record-") && damage != "directory" {
            // Building it again repairs it.
            let again = publish(store, "base", b"one").await.unwrap();
            assert_eq!(store.module("base").unwrap().digest, again.digest, "{damage}");
        }
    }
}

#[tokio::test]
async fn foreign_entries_among_modules_and_labs_are_never_touched() {
    let fixture = Fixture::new();
    let store = &fixture.store;
    let root = store.root().to_owned();
    publish(store, "base", b"one").await.unwrap();
    publish(store, "base", b"two").await.unwrap();
    let precious = fixture.dir.path().join("precious");
    for name in [".git", ".env", ".removed-00000000", ".new-abc123", "sub"] {
        fs::create_dir_all(precious.join(name)).unwrap();
        fs::write(precious.join(name).join("file"), "mine").unwrap();
    }
    let digest = Digest::of(b"x").to_string();
    fs::write(precious.join(&digest), "mine").unwrap();
    for link in [
        "modules/evil".to_owned(),
        "labs/evil-0123456789ab".to_owned(),
        "labs/.removed-evil-0123456789ab-00000000".to_owned(),
        "modules/base/.removed-00000000".to_owned(),
        format!("modules/base/{digest}"),
        format!("blobs/sha256/{}", &digest[..2]),
    ] {
        symlink(&precious, root.join(link)).unwrap();
    }
    for file in [
        "labs/thesis/chapter.tex",
        "labs/.hidden/file",
        "labs/.removed-mine/file",
        "labs/notes.txt",
        "modules/x/.terraform/state",
        "modules/x/.gitignore",
        "modules/base/.idea/file",
        "modules/base/.removed-mine/file",
        "modules/base/.new-thing/file",
        "modules/base/notes.txt",
        "downloads/mine.part",
        "downloads/.tmp-long-name",
        "index/urls/mine.json",
        "blobs/sha256/mine",
    ] {
        let path = root.join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "mine").unwrap();
    }
    fs::create_dir_all(root.join("labs/empty")).unwrap();
    fs::create_dir_all(root.join("modules/empty")).unwrap();
    // A directory named like a lab, without anything that identifies it as one.
    let before = snapshot(fixture.dir.path());
    for _ in 0..2 {
        let report = Store::open(&root).unwrap().collect(CollectPolicy::default()).await.unwrap();
        assert_eq!((&report.removed, &report.failed), (&vec![], &vec![]));
        for stranger in ["labs/thesis", "modules/evil", "modules/x/.terraform", "modules/base/.idea"] {
            let path = root.join(stranger).display().to_string();
            assert!(report.warnings.iter().any(|line| line.contains(&path)), "{stranger}: {report:#?}");
        }
    }
    let after = snapshot(fixture.dir.path());
    // The record of a verified file is removed with the file.
    let remembered = root.join("index/verified");
    for (path, found) in before.iter().filter(|(path, _)| !path.starts_with(&remembered)) {
        assert_eq!(after.get(path), Some(found), "{}", path.display());
    }
    assert_eq!(store.labs().unwrap(), []);
    assert_eq!(
        store.remove_lab(&LabId::parse("thesis").unwrap()).await.unwrap_err().kind(),
        ErrorKind::NotFound
    );
    assert_eq!(store.remove_module("x").await.unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(store.remove_module("evil").await.unwrap_err().kind(), ErrorKind::Conflict);
    store.remove_module("base").await.unwrap();
    for kept in ["modules/base/.idea/file", "modules/base/notes.txt"] {
        assert!(root.join(kept).exists());
    }
    // Nothing is created through a symbolic link either.
    let lab = LabId::parse("evil-0123456789ab").unwrap();
    let error = store.create_lab(&lab, "evil", Retention::EndWithOwner).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict);
    assert!(publish(store, "evil", b"one").await.is_err());
    assert_eq!(snapshot(&precious), snapshot_of(&before, &precious));
}

fn snapshot_of(
    all: &std::collections::BTreeMap<PathBuf, (u32, Vec<u8>)>,
    below: &Path,
) -> std::collections::BTreeMap<PathBuf, (u32, Vec<u8>)> {
    all.iter()
        .filter(|(path, _)| path.starts_with(below))
        .map(|(path, one)| (path.clone(), one.clone()))
        .collect()
}
