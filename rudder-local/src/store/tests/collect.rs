//! Modules and labs: created by one process, read by another, killed midway.

use super::{child::Child, *};
use rudder_core::backend::ReapReport;
use rudder_core::{
    backend::{LabId, LabState, ModuleDraft, Retention},
    hardware::Bus,
    module::{CapturedDisk, Module, Provenance, TemplateMachine},
    plan::PlannedNetwork,
};
use std::process::Command;

/// Publishes a module of one VM with one disk of this content.
pub(super) async fn publish(store: &Store, name: &str, content: &[u8]) -> Result<Module> {
    publish_from(store, name, content, Vec::new()).await
}

pub(super) async fn publish_from(
    store: &Store,
    name: &str,
    content: &[u8],
    inputs: Vec<InputRecord>,
) -> Result<Module> {
    let lab = store.create_lab(&LabId::new(name), name, Retention::EndWithOwner)?;
    fs::write(lab.path().join("captured"), content).unwrap();
    let disk = CapturedDisk::new(
        "rootdisk",
        Bus::Virtio,
        "captured",
        "raw",
        content.len() as u64,
        Content::of(content),
    );
    let mut machine = TemplateMachine::new("web", 1, 1 << 20);
    machine.disks.push(disk);
    let mut provenance = Provenance::new("", Digest::of(b""));
    provenance.inputs = inputs;
    store.publish(&lab, ModuleDraft::new(name, vec![machine], PlannedNetwork::default(), provenance)).await
}

fn disk_of(module: &Module) -> PathBuf {
    module.path.as_ref().unwrap().parent().unwrap().join(&module.machines[0].disks[0].file)
}

/// Asserts that every file of a module exists and matches its record.
pub(super) fn assert_whole(module: &Module) {
    let content = fs::read(disk_of(module)).unwrap();
    assert_eq!(Some(Digest::of(&content)), module.machines[0].disks[0].content.sha256());
}

#[tokio::test]
async fn publishing_replaces_the_module_of_the_same_name() {
    let fixture = Fixture::new();
    let store = &fixture.store;
    let first = publish(store, "base", b"one").await.unwrap();
    assert_eq!(store.module("base").unwrap(), first);
    assert_eq!(store.labs().unwrap(), []);
    let (_, lease) = store.lease_module("base", &first.digest).unwrap();
    let second = publish(store, "base", b"two").await.unwrap();
    assert_whole(&store.module("base").unwrap());
    assert_eq!(store.modules().unwrap(), std::slice::from_ref(&second));
    // A lab builds on the old one: it stays until the lab is gone.
    assert_whole(&first);
    assert_eq!(store.remove_module("base").await.unwrap_err().kind(), ErrorKind::Conflict);
    drop(lease);
    assert_eq!(store.collect(CollectPolicy::default()).await.unwrap().removed.len(), 1);
    assert!(!disk_of(&first).exists());
    let error = store.lease_module("base", &first.digest).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    // Publishing the same again yields the same module.
    assert_eq!(publish(store, "base", b"two").await.unwrap().digest, second.digest);
    store.remove_module("base").await.unwrap();
    assert_eq!(store.remove_module("base").await.unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(store.module("base").unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(fixture.names("modules"), Vec::<String>::new());
}

#[tokio::test]
async fn an_invalid_draft_changes_nothing() {
    let fixture = Fixture::new();
    let error = publish(&fixture.store, "../x", b"one").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    let lab = fixture.store.create_lab(&LabId::new("a"), "a", Retention::EndWithOwner).unwrap();
    let mut module = publish(&fixture.store, "good", b"one").await.unwrap();
    for file in ["/etc/hostname", "../../modules/good/current/module.json", "missing"] {
        module.machines[0].disks[0].file = file.into();
        let draft = ModuleDraft::new(
            "good",
            module.machines.clone(),
            PlannedNetwork::default(),
            module.provenance.clone(),
        );
        assert!(fixture.store.publish(&lab, draft).await.is_err(), "{file}");
    }
    assert_whole(&fixture.store.module("good").unwrap());
    assert_eq!(fixture.names("modules/good").len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_publisher_killed_at_any_moment_leaves_a_complete_module() {
    let fixture = Fixture::new();
    for round in 0..6 {
        let mut child = Child::start(fixture.store.root(), "publish base");
        child.wait_for(&format!("published {round}"));
        if round % 2 == 1 {
            // While the next one is being published.
            let half = |name: &String| name.starts_with('.');
            child.wait_until(|| fixture.names("modules/base").iter().any(half));
        }
        child.kill();
        assert_whole(&fixture.store.module("base").unwrap());
        fixture.store.reap().await.unwrap();
        let module = fixture.store.module("base").unwrap();
        assert_whole(&module);
        let mut whole = vec!["current".to_owned(), module.digest.to_string()];
        whole.sort();
        assert_eq!(fixture.names("modules/base"), whole);
        assert_eq!(fixture.names("labs"), Vec::<String>::new());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn labs_of_dead_owners_are_reaped_and_those_of_living_ones_are_not() {
    let fixture = Fixture::new();
    let store = &fixture.store;
    let mut child = Child::start(store.root(), "lab crash");
    let line = child.wait_for("lab crash-");
    let words: Vec<&str> = line.split(' ').collect();
    let sleepers: Vec<ProcessIdentity> =
        words[2..].iter().map(|pid| ProcessIdentity::of(pid.parse().unwrap()).unwrap()).collect();
    let mine = store.create_lab(&LabId::new("mine"), "mine", Retention::EndWithOwner).unwrap();
    assert_eq!(store.reap().await.unwrap(), ReapReport::default());
    assert!(store.labs().unwrap().iter().all(|lab| lab.state == LabState::Owned));
    assert_eq!(
        store.remove_lab(&LabId::parse(words[1]).unwrap()).await.unwrap_err().kind(),
        ErrorKind::Conflict
    );

    child.kill();
    assert!(sleepers.iter().all(ProcessIdentity::is_running));
    assert_eq!(store.labs().unwrap()[0].state, LabState::Abandoned);
    let report = store.reap().await.unwrap();
    assert_eq!(report.failed, Vec::<String>::new());
    assert_eq!(report.removed.len(), 3, "{report:?}");
    assert!(!sleepers.iter().any(ProcessIdentity::is_running));
    assert_eq!(fixture.names("labs"), [mine.id().as_str()]);
    mine.destroy().unwrap();
    mine.destroy().unwrap();
    assert_eq!(fixture.names("labs"), Vec::<String>::new());
}

#[tokio::test]
async fn a_kept_lab_stays_until_it_is_removed() {
    let fixture = Fixture::new();
    let store = &fixture.store;
    let id = LabId::new("kept");
    let lab = store.create_lab(&id, "kept", Retention::MayBeKept).unwrap();
    let mut process = Command::new("sleep").arg("600").current_dir(lab.path()).spawn().unwrap();
    lab.record_process(process.id(), "sleeper").unwrap();
    let identity = ProcessIdentity::of(process.id()).unwrap();
    lab.mark_kept(None).unwrap();
    drop(lab);
    assert_eq!(store.reap().await.unwrap(), ReapReport::default());
    assert_eq!(store.labs().unwrap()[0].state, LabState::Kept { expires: None });
    assert!(identity.is_running());
    assert_eq!(
        store.create_lab(&id, "again", Retention::EndWithOwner).unwrap_err().kind(),
        ErrorKind::Conflict
    );
    store.remove_lab(&id).await.unwrap();
    assert!(!identity.is_running());
    process.wait().unwrap();
    assert_eq!(store.labs().unwrap(), []);
    assert_eq!(store.remove_lab(&id).await.unwrap_err().kind(), ErrorKind::NotFound);
}

#[tokio::test]
async fn nothing_that_is_needed_is_collected() {
    let fixture = Fixture::new();
    let store = &fixture.store;
    let url = |size: usize| fixture.write(&format!("{size}.img"), &raw_disk(size));
    let leased = fixture.image(&url(1024), None).await.unwrap();
    let held = fixture.image(&url(2048), None).await.unwrap();
    let input = fixture.image(&url(4096), None).await.unwrap();
    let loose = fixture.image(&url(8192), None).await.unwrap().path;
    let lab = store.create_lab(&LabId::new("a"), "a", Retention::MayBeKept).unwrap();
    let (held_path, input_path) = (held.path.clone(), input.path.clone());
    lab.hold(held.lease).unwrap();
    lab.mark_kept(None).unwrap();
    drop(lab); // Now only its ledger says so.
    publish_from(store, "base", b"x", vec![input.input]).await.unwrap();
    drop(input.lease);

    let young = CollectPolicy::unused_for(Duration::from_secs(3600));
    assert_eq!(store.collect(young).await.unwrap(), ReapReport::default());
    let report = store.collect(CollectPolicy::default()).await.unwrap();
    assert_eq!(report.removed, [format!("blob {}", &loose.file_name().unwrap().to_str().unwrap()[..12])]);
    assert!(report.freed >= 8192);
    assert!(leased.path.exists() && held_path.exists() && input_path.exists() && !loose.exists());

    for lab in store.labs().unwrap() {
        store.remove_lab(&lab.id).await.unwrap();
    }
    store.remove_module("base").await.unwrap();
    assert_eq!(store.collect(CollectPolicy::default()).await.unwrap().removed.len(), 2);
    drop(leased);
    assert_eq!(store.collect(CollectPolicy::default()).await.unwrap().removed.len(), 1);
    assert_eq!(fixture.names("index/urls"), Vec::<String>::new());
    assert_eq!(fixture.names("index/images"), Vec::<String>::new());
    // What was collected is simply fetched again.
    assert_eq!(fixture.image(&url(1024), None).await.unwrap().virtual_size, 1024);
}

#[tokio::test]
async fn an_iso_is_cached_for_its_own_retention_time() {
    const HOUR: Duration = Duration::from_secs(3600);
    let fixture = Fixture::new();
    let store = &fixture.store;
    let file = async |name: &str| {
        let url = fixture.write(name, name.as_bytes());
        store.file(&planned(&url, None), &Progress::none()).await.unwrap()
    };
    let (iso, other) = (file("os.iso").await, file("other.iso").await);
    let (iso_path, other_path) = (iso.path.clone(), other.path.clone());
    store.keep_cached(&iso.lease, 2 * HOUR).unwrap();
    // A shorter promise of another build does not shorten the first.
    store.keep_cached(&iso.lease, HOUR / 60).unwrap();
    let inputs = [&iso.input, &other.input].map(|input| input.clone().role(InputRole::Iso));
    publish_from(store, "base", b"x", inputs.into()).await.unwrap();
    drop((iso, other));

    // Nothing was promised for the other; a module made from it does not need it.
    assert_eq!(store.collect(CollectPolicy::default()).await.unwrap().removed.len(), 1);
    assert!(iso_path.exists() && !other_path.exists());
    let used = |age: Duration| {
        let lock = format!("blob-{}", iso_path.file_name().unwrap().to_str().unwrap());
        let lock = fs::File::open(store.lock_path(&lock)).unwrap();
        lock.set_modified(std::time::SystemTime::now() - age).unwrap();
    };
    used(2 * HOUR - HOUR / 60);
    assert_eq!(store.collect(CollectPolicy::default()).await.unwrap(), ReapReport::default());
    // Using it restarts its time.
    drop(file("os.iso").await);
    used(HOUR);
    assert_eq!(store.collect(CollectPolicy::default()).await.unwrap(), ReapReport::default());
    used(2 * HOUR);
    assert_eq!(store.collect(CollectPolicy::unused_for(3 * HOUR)).await.unwrap(), ReapReport::default());
    assert_eq!(store.collect(CollectPolicy::default()).await.unwrap().removed.len(), 1);
    assert!(!iso_path.exists());
    assert_eq!(fixture.names("index/kept"), Vec::<String>::new());
}

#[tokio::test]
async fn the_unused_time_counts_from_the_end_of_the_last_use() {
    let fixture = Fixture::new();
    let store = &fixture.store;
    let url = fixture.write("os.iso", b"iso");
    let iso = store.file(&planned(&url, None), &Progress::none()).await.unwrap();
    let lock = store.lock_path(&format!("blob-{}", iso.input.content.sha256().unwrap()));
    let then = std::time::SystemTime::now() - Duration::from_secs(7200);
    fs::File::open(&lock).unwrap().set_modified(then).unwrap();
    drop(iso);
    let young = CollectPolicy::unused_for(Duration::from_secs(3600));
    assert_eq!(store.collect(young).await.unwrap(), ReapReport::default());
}
