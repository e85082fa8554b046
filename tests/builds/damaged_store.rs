//! What the examples report and do when the store was changed from outside. Needs no machine.

use crate::support::{Bench, one_vm};
use rudder::{
    backend::{LabId, ModuleDraft, Retention},
    content::Content,
    digest::Digest,
    hardware::Bus,
    module::{CapturedDisk, Module, Provenance, TemplateMachine},
    plan::PlannedNetwork,
    store::Store,
};
use std::fs;

/// Publishes a module with one small disk.
async fn publish(bench: &Bench, name: &str, content: &[u8]) -> Module {
    let store = Store::open(bench.store()).unwrap();
    let lab = store.create_lab(&LabId::new(name), name, Retention::EndWithOwner).unwrap();
    fs::write(lab.path().join("disk"), content).unwrap();
    let mut machine = TemplateMachine::new("vm", 1, 64 << 20);
    machine.disks.push(CapturedDisk::new(
        "root",
        Bus::Virtio,
        "disk",
        "raw",
        content.len() as u64,
        Content::of(content),
    ));
    let provenance = Provenance::new("", Digest::of(b""));
    let draft = ModuleDraft::new(name, vec![machine], PlannedNetwork::default(), provenance);
    store.publish(&lab, draft).await.unwrap()
}

#[tokio::test]
async fn a_damaged_module_is_reported_and_others_stay_usable() {
    let bench = Bench::new();
    let record = publish(&bench, "base", b"one").await.path.unwrap();
    let text = fs::read_to_string(&record).unwrap();
    for (damaged, reason) in [
        (text.replace("\"format\": 1", "\"format\": 3"), "found format 3"),
        (text.replace("vm.root.raw", "../../x"), "../../x"),
        ("{".to_owned(), "it cannot be parsed"),
    ] {
        fs::write(&record, damaged).unwrap();
        let file = record.to_str().unwrap();
        for command in [&["list"][..], &["show", "base"], &["gc"]] {
            let (code, _, error) = bench.run("modules", command);
            assert_eq!(code, 1, "{command:?}: {error}");
            assert!(error.contains(file) && error.contains(reason), "{command:?}: {error}");
            assert!(!error.contains("no modules yet"), "{error}");
        }
        let ended = bench.build(&one_vm("layer", "{buildRef: {name: base}}", ""));
        assert_ne!(ended.code, 0);
        assert!(ended.stderr.contains(file), "{}", ended.stderr);
        assert!(record.exists());
    }
    publish(&bench, "good", b"two").await;
    let (code, list, _) = bench.run("modules", &["list"]);
    assert!(code == 1 && list.contains("good"), "{list}");
    assert_eq!(bench.run("modules", &["show", "good"]).0, 0);
    assert_eq!(bench.run("modules", &["remove", "base"]).0, 0);
    assert_eq!(bench.run("modules", &["gc"]).0, 0);
    bench.expect_clean();
}

#[tokio::test]
async fn a_lost_pointer_is_repaired_by_naming_the_version() {
    let bench = Bench::new();
    let first = publish(&bench, "base", b"one").await;
    let (_, lease) = Store::open(bench.store()).unwrap().lease_module("base", &first.digest).unwrap();
    publish(&bench, "base", b"two").await;
    drop(lease);
    fs::remove_file(first.path.as_ref().unwrap().with_file_name("replaced")).unwrap();
    fs::remove_file(bench.store().join("modules/base/current")).unwrap();
    let (code, _, error) = bench.run("modules", &["list"]);
    assert!(
        code == 1 && error.contains("modules repair base ") && error.contains(&first.digest.short()),
        "{error}"
    );
    let (code, _, error) = bench.run("modules", &["gc"]);
    assert!(code == 1 && error.contains("modules repair base"), "{error}");
    assert_eq!(bench.run("modules", &["repair", "base", &first.digest.short()]).0, 0);
    let (code, list, _) = bench.run("modules", &["list"]);
    assert!(code == 0 && list.contains(&first.digest.short()), "{list}");
    assert_eq!(bench.run("modules", &["gc"]).0, 0);
    bench.expect_clean();
}

#[test]
fn builds_and_gc_refuse_a_directory_that_is_not_a_store() {
    for backend in ["qemu", "memory"] {
        let bench = Bench::new();
        let (thesis, hidden) =
            (bench.store().join("labs/thesis"), bench.store().join("modules/x/.terraform"));
        fs::create_dir_all(&thesis).unwrap();
        fs::create_dir_all(&hidden).unwrap();
        let (code, _, error) = bench.run("modules", &["--backend", backend, "gc"]);
        assert!(code == 1 && error.contains("rudder-store.json"), "{error}");
        let mut command = bench.command(&one_vm("web", "{blank: {}}", ""));
        command.args(["--backend", backend]);
        let output = command.output().unwrap();
        assert!(!output.status.success());
        assert!(thesis.exists() && hidden.exists());
        assert_eq!(fs::read_dir(bench.store()).unwrap().count(), 2);
    }
}
