//! Random damage to a store, its cache and its modules: nothing damaged is used silently, and nothing else disappears.

use super::{
    collect::{assert_whole, publish},
    directory::snapshot,
    *,
};
use proptest::prelude::*;
use rudder_core::{
    backend::{LabId, Retention},
    module::Module,
};
use std::{collections::BTreeSet, os::unix::fs::symlink, process::Command};

/// The part of the store that is damaged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    Marker,
    Pointer,
    Record,
    Disk,
    Version,
    Module,
    Ledger,
    LabLock,
    Lab,
    UrlRecord,
    ImageRecord,
    Locks,
}

/// How it is damaged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Damage {
    Removed,
    Emptied,
    /// Cut to half of its length.
    Cut,
    Garbage,
    /// A later format, for files with a format number.
    Later,
    /// A symbolic link to its new location outside the store.
    Linked,
    LinkedNowhere,
    /// A directory with a user's file in it.
    Directory,
    Fifo,
    /// Its content is that of the other module, lab or record.
    Swapped,
}

const PARTS: [Part; 12] = [
    Part::Marker,
    Part::Pointer,
    Part::Record,
    Part::Disk,
    Part::Version,
    Part::Module,
    Part::Ledger,
    Part::LabLock,
    Part::Lab,
    Part::UrlRecord,
    Part::ImageRecord,
    Part::Locks,
];
const DAMAGES: [Damage; 10] = [
    Damage::Removed,
    Damage::Emptied,
    Damage::Cut,
    Damage::Garbage,
    Damage::Later,
    Damage::Linked,
    Damage::LinkedNowhere,
    Damage::Directory,
    Damage::Fifo,
    Damage::Swapped,
];

/// A store with two modules, a kept lab, a cached image, and a user's files beside and among them.
struct Scene {
    fixture: Fixture,
    hurt: Module,
    well: Module,
    lab: String,
    url: url::Url,
    image: PathBuf,
}

impl Scene {
    async fn new() -> Self {
        let fixture = Fixture::new();
        let store = &fixture.store;
        let hurt = publish(store, "hurt", b"a disk of a module").await.unwrap();
        let well = publish(store, "well", b"another disk, as long").await.unwrap();
        let url = fixture.write("input.img", &raw_disk(1024));
        let image = fixture.image(&url, None).await.unwrap();
        let lab = store.create_lab(&LabId::new("kept"), "kept", Retention::MayBeKept).unwrap();
        lab.hold(image.lease).unwrap();
        lab.mark_kept(None).unwrap();
        let lab = lab.id().as_str().to_owned();
        for file in ["labs/thesis/chapter", "modules/hurt/.git/HEAD", "modules/mine/.terraform/state"] {
            let path = store.root().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "mine").unwrap();
        }
        Self { hurt, well, lab, url, image: image.path, fixture }
    }

    fn outside(&self) -> PathBuf {
        self.fixture.dir.path().join("outside")
    }

    fn path(&self, part: Part) -> PathBuf {
        let root = self.fixture.store.root();
        let version = self.hurt.path.as_ref().unwrap().parent().unwrap();
        let only =
            |directory: &str| fs::read_dir(root.join(directory)).unwrap().next().unwrap().unwrap().path();
        match part {
            Part::Marker => root.join(layout::MARKER),
            Part::Pointer => root.join("modules/hurt/current"),
            Part::Record => version.join("module.json"),
            Part::Disk => version.join(&self.hurt.machines[0].disks[0].file),
            Part::Version => version.to_owned(),
            Part::Module => root.join("modules/hurt"),
            Part::Ledger => root.join("labs").join(&self.lab).join("ledger.json"),
            Part::LabLock => root.join("labs").join(&self.lab).join("lock"),
            Part::Lab => root.join("labs").join(&self.lab),
            Part::UrlRecord => only("index/urls"),
            Part::ImageRecord => only("index/images"),
            Part::Locks => root.join("locks"),
        }
    }

    /// Damages a part, if anything is left of it. Nothing is lost: the original is moved out of the store.
    fn damage(&self, part: Part, damage: Damage) {
        let path = self.path(part);
        let Ok(meta) = fs::symlink_metadata(&path) else { return };
        let outside = self.outside().join(format!("{part:?}-{damage:?}"));
        fs::create_dir_all(&outside).unwrap();
        let moved = outside.join("moved");
        let content = if meta.is_file() { fs::read(&path).unwrap() } else { b"{}".to_vec() };
        fs::rename(&path, &moved).unwrap();
        match damage {
            Damage::Removed => {}
            Damage::Emptied => fs::write(&path, "").unwrap(),
            Damage::Cut => fs::write(&path, &content[..content.len() / 2]).unwrap(),
            Damage::Garbage => fs::write(&path, "\0garbage{").unwrap(),
            Damage::Later => {
                let text = String::from_utf8_lossy(&content).replace("\"format\": 1", "\"format\": 7");
                fs::write(&path, text).unwrap();
            }
            Damage::Linked => symlink(&moved, &path).unwrap(),
            Damage::LinkedNowhere => symlink(outside.join("nowhere"), &path).unwrap(),
            Damage::Directory => {
                fs::create_dir(&path).unwrap();
                fs::write(path.join("mine"), "mine").unwrap();
            }
            Damage::Fifo => assert!(Command::new("mkfifo").arg(&path).status().unwrap().success()),
            Damage::Swapped => {
                let text =
                    String::from_utf8_lossy(&content).replace("hurt", "well").replace(&self.lab, "kept-1");
                fs::write(&path, text).unwrap();
            }
        }
    }

    /// Uses the store as a program does, and cleans it up, twice.
    async fn use_it(&self) {
        for _ in 0..2 {
            // A store that is refused is not used at all.
            let Ok(store) = Store::open(self.fixture.store.root()) else { return };
            for store in [&store, &self.fixture.store] {
                // Either may fail; what counts is what exists afterwards.
                let _ = store.reap().await;
                let _ = store.collect(CollectPolicy::default()).await;
                let _ = store.image(&planned(&self.url, None), &Progress::none()).await;
                let _ = store.labs();
            }
        }
    }

    fn check(&self, damages: &BTreeSet<(Part, Damage)>) {
        let is_hurt = |parts: &[Part]| damages.iter().any(|(part, _)| parts.contains(part));
        let store = match Store::open(self.fixture.store.root()) {
            Ok(store) => store,
            Err(error) => {
                assert!(is_hurt(&[Part::Marker, Part::Locks]), "{}", error.report());
                // Without its marker it would be taken for a store of an earlier version, if it had no foreign entries.
                assert!(error.report().contains(self.fixture.dir.path().to_str().unwrap()));
                self.fixture.store.clone()
            }
        };
        assert!(self.image.exists() || lab_is_gone(damages), "an input that a kept lab needs was collected");
        assert_eq!(store.module("well").unwrap(), self.well);
        assert_whole(&self.well);
        match store.module("hurt") {
            Ok(module) => {
                // Only a module that is as it was published is accepted.
                assert_eq!(module, self.hurt);
                assert_eq!(
                    Some(fs::metadata(self.path(Part::Disk)).unwrap().len()),
                    self.hurt.machines[0].disks[0].content.size
                );
            }
            Err(error) => {
                assert!(is_hurt(&[Part::Pointer, Part::Record, Part::Disk, Part::Version, Part::Module]));
                if error.kind() != ErrorKind::NotFound {
                    assert!(error.report().contains("hurt"), "{}", error.report());
                    assert_eq!(store.damaged_modules().unwrap()[0].name, "hurt");
                }
            }
        }
    }
}

/// Returns whether nothing identifies the lab as one any more: then nothing needs the image.
fn lab_is_gone(damages: &BTreeSet<(Part, Damage)>) -> bool {
    let removed = |part| damages.contains(&(part, Damage::Removed));
    damages.iter().any(|(part, _)| *part == Part::Lab) || (removed(Part::Ledger) && removed(Part::LabLock))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damage_is_never_used_silently_and_nothing_else_is_lost(
        damages in proptest::collection::btree_set(
            (proptest::sample::select(&PARTS[..]), proptest::sample::select(&DAMAGES[..])), 1..=20)
    ) {
        // One damage of each part: what was moved out of the store is not damaged again.
        let mut parts = BTreeSet::new();
        let damages: BTreeSet<_> = damages.into_iter().filter(|(part, _)| parts.insert(*part)).collect();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let scene = Scene::new().await;
            // Files before the directories that they are in.
            for (part, damage) in damages.iter().filter(|(part, _)| !matches!(part, Part::Version | Part::Module | Part::Lab)) {
                scene.damage(*part, *damage);
            }
            for part in [Part::Version, Part::Module, Part::Lab] {
                for (part, damage) in damages.iter().filter(|(one, _)| *one == part) {
                    scene.damage(*part, *damage);
                }
            }
            let before = snapshot(scene.fixture.dir.path());
            scene.use_it().await;
            let after = snapshot(scene.fixture.dir.path());
            // Records of the cache are recreated, locks come and go, a pointer is repaired.
            let may_change = [
                scene.fixture.store.root().join("index"),
                scene.fixture.store.root().join("locks"),
                scene.path(Part::Pointer),
            ];
            for (path, (_, content)) in &before {
                let is_image = *path == scene.image && lab_is_gone(&damages);
                if !is_image && !may_change.iter().any(|one| path.starts_with(one)) {
                    let found = after.get(path).map(|(_, content)| content);
                    assert!(found == Some(content), "{} after {damages:?}", path.display());
                }
            }
            scene.check(&damages);
        });
    }
}
