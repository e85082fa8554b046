//! Records on disk stay readable: `records/` contains a record of each format, written by the version that introduced
//! it. These files are never changed.
#![allow(clippy::unwrap_used)]

use rudder_core::{
    ErrorKind,
    content::{Content, ContentId},
    hardware::{Bus, Firmware, NicModel},
    module::{InputRole, Module, StateKind, Timing},
};
use serde_json::{Value, json};
use std::path::Path;

const MODULE_1: &str = include_str!("records/module-1.json");

fn path() -> &'static Path {
    Path::new("store/web/module.json")
}

fn read(record: &str) -> Module {
    Module::from_record(path(), record.as_bytes()).unwrap()
}

/// Returns the record of format 1 with one change.
fn changed(change: impl FnOnce(&mut Value)) -> String {
    let mut record = serde_json::from_str(MODULE_1).unwrap();
    change(&mut record);
    record.to_string()
}

#[test]
fn a_module_of_format_1_is_written_unchanged() {
    assert_eq!(read(MODULE_1).to_record().unwrap(), MODULE_1);
}

#[test]
fn the_content_digest_equals_the_recorded_digest() {
    let module = read(MODULE_1);
    let digest = Module::content_digest(&module.name, &module.machines, &module.network).unwrap();
    assert_eq!(digest, module.digest);
}

#[test]
fn a_module_of_format_1_is_read_with_all_its_values() {
    let module = read(MODULE_1);
    assert_eq!((module.name.as_str(), module.path.as_ref()), ("web", None));
    let [web, gateway] = &module.machines[..] else { panic!("expected two machines") };
    assert_eq!((web.cpus, web.memory, web.firmware, web.tpm), (2, 2 << 30, Firmware::UefiSecureBoot, true));
    let nics: Vec<_> = web.nics.iter().map(|nic| (nic.name.as_str(), nic.slot, nic.ip, nic.model)).collect();
    let fixed = "10.20.0.10".parse().ok();
    assert_eq!(nics, [("nic1", 3, fixed, NicModel::E1000), ("lan", 1, None, NicModel::Ne2kPci)]);
    let disks: Vec<_> =
        web.disks.iter().map(|disk| (disk.bus, disk.file.as_str(), disk.content.size)).collect();
    assert_eq!(
        disks,
        [(Bus::Virtio, "web.disk.qcow2", Some(734_003_200)), (Bus::Scsi, "web.data.qcow2", Some(196_616))]
    );
    let state: Vec<_> = web.state.iter().map(|state| state.kind).collect();
    assert_eq!(state, [StateKind::FirmwareVariables, StateKind::Tpm]);
    assert!(gateway.invisible && gateway.state.is_empty());
    assert!(module.network.declared && module.network.vpcs[0].internet);
    let subnet = &module.network.subnets[0];
    assert_eq!((subnet.vpc.as_str(), subnet.cidr.to_string().as_str()), ("office", "10.20.0.0/24"));
    let provenance = &module.provenance;
    assert_eq!(provenance.inputs[0].role, InputRole::source("web"));
    let timing = Timing::new(Some("web".to_owned()), "SourceImporting", 812);
    assert_eq!(provenance.timings[1], timing);
    assert_eq!((provenance.not_repeatable.len(), provenance.warnings.len()), (1, 1));
}

#[test]
fn unverifiable_content_requires_format_2() {
    let mut module = read(MODULE_1);
    module.machines[0].disks[0].content = Content::identified(ContentId::Cluster("snapshot/1".to_owned()));
    module.provenance.inputs[0].content = Content::unknown();
    let record = module.to_record().unwrap();
    assert!(record.starts_with("{\n  \"format\": 2,"), "{record}");
    assert_eq!(read(&record), module);
}

#[test]
fn a_module_without_state_and_invisible_machines_is_read() {
    let module = read(&changed(|record| {
        for machine in record["machines"].as_array_mut().unwrap() {
            let machine = machine.as_object_mut().unwrap();
            machine.remove("state");
            machine.remove("invisible");
        }
        let provenance = record["provenance"].as_object_mut().unwrap();
        provenance.remove("not_repeatable");
        provenance.remove("warnings");
    }));
    assert!(module.machines.iter().all(|machine| machine.state.is_empty() && !machine.invisible));
    assert!(module.provenance.not_repeatable.is_empty() && module.provenance.warnings.is_empty());
}

#[test]
fn a_module_of_a_later_format_is_refused_whatever_it_contains() {
    for record in [changed(|record| record["format"] = json!(3)), json!({"format": 3}).to_string()] {
        let error = Module::from_record(path(), record.as_bytes()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert_eq!(
            error.report(),
            "expected a module of format 2 or earlier in store/web/module.json, but found format 3\n  help: a later version of Rudder created this module: use that version, or build the module again"
        );
    }
}

#[test]
fn an_invalid_record_is_refused_with_its_file_name() {
    let cases = [
        ("{".to_owned(), "it cannot be parsed"),
        ("{}".to_owned(), "it has no format number"),
        (changed(|record| record["format"] = json!(0)), "it has no format number"),
        (changed(|record| record["machines"] = json!(1)), "it cannot be parsed"),
        (
            changed(|record| record["machines"][0]["disks"][0]["file"] = json!("../x")),
            "it refers to the file \"../x\", which is not in its directory",
        ),
        (
            changed(|record| record["machines"][0]["state"][1]["file"] = json!("..")),
            "it refers to the file \"..\", which is not in its directory",
        ),
        (
            changed(|record| record["machines"][1]["disks"][0]["format"] = json!("raw,x=y")),
            "it contains the invalid format name \"raw,x=y\"",
        ),
    ];
    for (record, found) in cases {
        let error = Module::from_record(path(), record.as_bytes()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{record}");
        let expected = format!("expected the record of a module in store/web/module.json, but {found}");
        assert_eq!(error.to_string(), expected);
    }
}
