//! Every diagnostic of checking and planning, as rendered for people.
//!
//! `diagnostics/CODE.yaml` is a manifest, `diagnostics/CODE.txt` the complete rendered text about it. If the first line
//! is `# run: plan`, the manifest is also planned, on a backend with all capabilities; `# run: plan on nothing` plans
//! it on one without any. With `RUDDER_UPDATE=1` the texts are written again: review the changes before committing them.
#![allow(clippy::unwrap_used)]

use rudder_core::{
    capability::{Capabilities, Capability},
    check::{check, codes},
    diagnostic,
    manifest::parse_named,
    module::Module,
    plan::{Inputs, Limits, PlanContext, prepare},
};
use std::{collections::BTreeSet, fs, path::PathBuf};

fn directory() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/diagnostics")
}

fn everything() -> Capabilities {
    use Capability as C;
    Capabilities::new(
        "example",
        [
            C::SourceUrl,
            C::SourceBlank,
            C::SourceBuildRef,
            C::SourceContainerDisk,
            C::SourcePvc,
            C::DiskVirtio,
            C::DiskScsi,
            C::DiskSata,
            C::DiskUsb,
            C::DiskIde,
            C::NicModels,
            C::NicSlots,
            C::CloudInit,
            C::Networks,
            C::UnmanagedSubnets,
            C::Isos,
            C::Floppy,
            C::HttpDirectory,
            C::Uefi,
            C::SecureBoot,
            C::Tpm,
            C::Display,
            C::Serial,
            C::Screenshot,
            C::Clone,
        ],
    )
}

/// Returns a module `base` of two VMs, `one` and `two`, each with a boot disk and a data disk.
fn base_module() -> Module {
    let digest = "0".repeat(64);
    let disk = |name: &str| {
        serde_json::json!({
            "name": name, "bus": "virtio", "file": name, "format": "qcow2", "virtual_size": 1 << 30, "size": 1 << 20,
            "sha256": digest
        })
    };
    let machine = |name: &str| {
        serde_json::json!({
            "name": name, "cpus": 1, "memory": 1 << 30, "firmware": "bios", "tpm": false, "nics": [],
            "disks": [disk("rootdisk"), disk("data")]
        })
    };
    let record = serde_json::json!({
        "format": 1, "name": "base", "digest": digest, "created": "2026-01-01T00:00:00Z",
        "machines": [machine("one"), machine("two")],
        "network": {"declared": false, "vpcs": [], "subnets": []},
        "provenance": {"manifest": "", "plan": digest, "inputs": [], "versions": {}, "timings": []}
    });
    Module::from_record(std::path::Path::new("module.json"), record.to_string().as_bytes()).unwrap()
}

fn findings(name: &str, text: &str) -> String {
    let run = text.lines().next().and_then(|line| line.strip_prefix("# run: ")).unwrap_or("check");
    let name = format!("{name}.yaml");
    if run == "check" {
        let parsed = parse_named(&name, text.as_bytes());
        let mut diagnostics = parsed.diagnostics;
        for document in &parsed.documents {
            diagnostics.extend(check(document));
        }
        diagnostic::sort(&mut diagnostics);
        return diagnostic::render(&diagnostics, &name, text);
    }
    let capabilities = if run == "plan on nothing" { Capabilities::new("bare", []) } else { everything() };
    let mut limits = Limits::default();
    limits.max_cpu = Some(4);
    limits.max_memory = Some(4 << 30);
    limits.max_disks = Some(2);
    limits.max_vms = Some(4);
    let inputs = Inputs::new().config_map("scripts", "setup", "true").secret("keys", "binary", [0xff]);
    let context = PlanContext::new(&capabilities).limits(limits).inputs(inputs).modules([base_module()]);
    prepare(&name, text.as_bytes(), &context).render()
}

/// Returns the names of the manifests in the directory, sorted.
fn cases() -> Vec<String> {
    let files = fs::read_dir(directory()).unwrap().map(|entry| entry.unwrap().path());
    let yaml = files.filter(|path| path.extension().is_some_and(|extension| extension == "yaml"));
    let mut names: Vec<_> = yaml.map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned()).collect();
    names.sort();
    names
}

#[test]
fn every_diagnostic_has_the_expected_text() {
    let mut wrong = Vec::new();
    for name in cases() {
        let text = fs::read_to_string(directory().join(format!("{name}.yaml"))).unwrap();
        let found = findings(&name, &text);
        let file = directory().join(format!("{name}.txt"));
        if std::env::var_os("RUDDER_UPDATE").is_some() {
            fs::write(&file, &found).unwrap();
        }
        let expected = fs::read_to_string(&file).unwrap_or_default();
        if found != expected {
            wrong.push(format!("== {name}: expected\n{expected}\nbut found\n{found}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_code_has_a_case() {
    // Reported only because of a bug.
    let mut missing: BTreeSet<&str> =
        codes::ALL.iter().map(|code| code.name).filter(|n| *n != "internal").collect();
    for name in cases() {
        let text = fs::read_to_string(directory().join(format!("{name}.yaml"))).unwrap();
        let found = findings(&name, &text);
        if found.contains(&format!("[{name}]")) {
            missing.remove(name.as_str());
        }
    }
    assert!(missing.is_empty(), "no case of its own: {missing:?}");
}
