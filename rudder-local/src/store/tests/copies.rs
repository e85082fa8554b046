//! Copies of stores, and labs about which too little is known: no process of another store is killed.

use super::{child::Child, *};
use rudder_core::backend::{LabId, LabState, Retention};
use std::process::Command;

/// The processes of a kept lab; killed on drop.
struct Kept {
    lab: LabId,
    processes: Vec<std::process::Child>,
}

impl Kept {
    /// Starts one process that is recorded, and one that only carries the id; `works_in_lab` decides where both run.
    fn new(store: &Store, works_in_lab: bool) -> Self {
        let id = LabId::new("kept");
        let lab = store.create_lab(&id, "kept", Retention::MayBeKept).unwrap();
        let start = || {
            let mut command = Command::new("sleep");
            command.arg("600").env(LAB_VARIABLE, id.as_str());
            if works_in_lab {
                command.current_dir(lab.path());
            }
            command.spawn().unwrap()
        };
        let processes = vec![start(), start()];
        lab.record_process(processes[0].id(), "sleeper").unwrap();
        lab.mark_kept(None).unwrap();
        Self { lab: id, processes }
    }

    fn wait(&mut self) {
        for process in &mut self.processes {
            process.wait().unwrap();
        }
    }

    fn running(&mut self) -> usize {
        self.processes
            .iter_mut()
            .filter_map(|process| process.try_wait().unwrap().is_none().then_some(()))
            .count()
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        for process in &mut self.processes {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

fn copy(from: &Path, to: &Path) {
    assert!(Command::new("cp").arg("-a").args([from, to]).status().unwrap().success());
}

fn edit_ledger(store: &Store, lab: &str, change: impl FnOnce(&mut serde_json::Value)) {
    let path = store.root().join("labs").join(lab).join("ledger.json");
    let mut ledger = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut ledger);
    fs::write(&path, ledger.to_string()).unwrap();
}

#[tokio::test]
async fn cleaning_up_a_copy_does_not_affect_the_original() {
    for works_in_lab in [true, false] {
        for swapped in [false, true] {
            let fixture = Fixture::new();
            let mut kept = Kept::new(&fixture.store, works_in_lab);
            let (mut original, mut copied) =
                (fixture.store.root().to_owned(), fixture.dir.path().join("copy"));
            copy(&original, &copied);
            if swapped {
                // The copy takes the place of the original, which continues to exist elsewhere.
                let aside = fixture.dir.path().join("aside");
                fs::rename(&original, &aside).unwrap();
                fs::rename(&copied, &original).unwrap();
                (original, copied) = (aside, original);
            }
            let copied = Store::open(copied).unwrap();
            edit_ledger(&copied, kept.lab.as_str(), |ledger| ledger["kept"] = false.into());
            let report = copied.reap().await.unwrap();
            assert_eq!(report.removed, [format!("lab {}", kept.lab)]);
            assert_eq!((report.failed, kept.running()), (Vec::new(), 2));

            // The original still recognises its own lab, wherever it was moved.
            let original = Store::open(original).unwrap();
            assert_eq!(original.labs().unwrap()[0].state, LabState::Kept { expires: None });
            original.remove_lab(&kept.lab).await.unwrap();
            kept.wait();
        }
    }
}

#[tokio::test]
async fn removing_a_kept_lab_from_a_copy_does_not_affect_the_original() {
    let fixture = Fixture::new();
    let mut kept = Kept::new(&fixture.store, true);
    let root = fixture.dir.path().join("copy");
    copy(fixture.store.root(), &root);
    let copied = Store::open(root).unwrap();
    copied.remove_lab(&kept.lab).await.unwrap();
    assert_eq!((copied.labs().unwrap(), kept.running()), (Vec::new(), 2));
    assert_eq!(fixture.store.labs().unwrap().len(), 1);
}

#[tokio::test]
async fn a_ledger_of_an_earlier_version_ends_only_processes_in_its_directory() {
    for works_in_lab in [true, false] {
        let fixture = Fixture::new();
        let mut kept = Kept::new(&fixture.store, works_in_lab);
        edit_ledger(&fixture.store, kept.lab.as_str(), |ledger| {
            ledger.as_object_mut().unwrap().remove("directory");
        });
        let root = fixture.dir.path().join("copy");
        copy(fixture.store.root(), &root);
        let copied = Store::open(root).unwrap();
        copied.remove_lab(&kept.lab).await.unwrap();
        assert_eq!(kept.running(), 2);
        fixture.store.remove_lab(&kept.lab).await.unwrap();
        if works_in_lab {
            kept.wait();
        } else {
            assert_eq!(kept.running(), 2);
        }
    }
}

#[tokio::test]
async fn a_ledger_of_another_host_or_boot_ends_no_process() {
    let fixture = Fixture::new();
    let mut kept = Kept::new(&fixture.store, true);
    // Only the recorded one: the other is found by its environment, which no process of another boot has.
    kept.processes[1].kill().unwrap();
    kept.processes[1].wait().unwrap();
    let mut stranger = Command::new("sleep").arg("600").spawn().unwrap();
    edit_ledger(&fixture.store, kept.lab.as_str(), |ledger| {
        ledger["processes"][0]["boot_id"] = "another".into();
        ledger["processes"][0]["pid"] = stranger.id().into();
    });
    kept.processes[0].kill().unwrap();
    kept.processes[0].wait().unwrap();
    fixture.store.remove_lab(&kept.lab).await.unwrap();
    assert!(stranger.try_wait().unwrap().is_none());
    stranger.kill().unwrap();
    stranger.wait().unwrap();
}

#[tokio::test]
async fn a_lab_with_an_unreadable_ledger_stays_with_everything_it_may_need() {
    for damage in ["missing", "", "{", "[]", "another", "link", "directory"] {
        let fixture = Fixture::new();
        let store = &fixture.store;
        let mut kept = Kept::new(store, true);
        let url = fixture.write("input.img", &raw_disk(1024));
        let input = fixture.image(&url, None).await.unwrap().path;
        let path = store.root().join("labs").join(kept.lab.as_str()).join("ledger.json");
        let moved = fixture.dir.path().join("moved");
        fs::rename(&path, &moved).unwrap();
        match damage {
            "missing" => {}
            "another" => {
                let text = fs::read_to_string(&moved).unwrap().replace(kept.lab.as_str(), "web-0123456789ab");
                fs::write(&path, text).unwrap();
            }
            "link" => std::os::unix::fs::symlink(&moved, &path).unwrap(),
            "directory" => fs::create_dir(&path).unwrap(),
            text => fs::write(&path, text).unwrap(),
        }
        assert_eq!(store.labs().unwrap()[0].state, LabState::Damaged, "{damage}");
        let report = store.collect(CollectPolicy::default()).await.unwrap();
        assert_eq!((&report.removed, &report.failed), (&vec![], &vec![]), "{damage}");
        assert!(report.warnings.iter().any(|line| line.contains(path.to_str().unwrap())), "{report:?}");
        let error = store.remove_lab(&kept.lab).await.unwrap_err();
        assert!(error.report().contains(path.to_str().unwrap()), "{}", error.report());
        assert_eq!(kept.running(), 2, "{damage}");
        assert!(path.parent().unwrap().exists() && input.exists(), "{damage}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_living_lab_stays_without_its_lock_or_ledger_file() {
    for file in ["lock", "ledger.json"] {
        let fixture = Fixture::new();
        let store = &fixture.store;
        let mut child = Child::start(store.root(), "lab living");
        let line = child.wait_for("lab living-");
        let id = line.split(' ').nth(1).unwrap();
        fs::remove_file(store.root().join("labs").join(id).join(file)).unwrap();
        let report = store.reap().await.unwrap();
        assert_eq!((report.removed, report.failed), (Vec::new(), Vec::new()), "{file}");
        assert_eq!(store.labs().unwrap()[0].state, LabState::Owned, "{file}");
        assert_eq!(
            store.remove_lab(&LabId::parse(id).unwrap()).await.unwrap_err().kind(),
            ErrorKind::Conflict,
            "{file}"
        );
        let pids: Vec<u32> = line.split(' ').skip(2).map(|pid| pid.parse().unwrap()).collect();
        let sleepers: Vec<_> = pids.iter().map(|pid| ProcessIdentity::of(*pid).unwrap()).collect();
        child.kill();
        if file == "lock" {
            store.reap().await.unwrap();
        }
        for sleeper in sleepers.iter().filter(|sleeper| sleeper.is_running()) {
            assert_eq!(file, "ledger.json");
            Command::new("kill").args(["-KILL", &sleeper.pid.to_string()]).status().unwrap();
        }
    }
}
