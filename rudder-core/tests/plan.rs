//! Plans: defaults, overrides, references; and the digest changes exactly when the result would.
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use rudder_core::{
    capability::{Capabilities, Capability},
    check::check,
    diagnostic::Diagnostic,
    hardware::{Bus, Firmware, GuestShell, NicModel},
    manifest::{BareBuild, Document, Manifest, parse},
    module::Module,
    plan::{Inputs, Limits, Plan, PlanContext, PlannedSource, StepAction, plan, prepare},
};
use std::{collections::HashSet, time::Duration};

fn context() -> PlanContext {
    use Capability as C;
    let capabilities = [
        C::SourceUrl,
        C::SourceBlank,
        C::SourceBuildRef,
        C::SourceContainerDisk,
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
        C::Uefi,
        C::SecureBoot,
        C::Tpm,
    ];
    let inputs = Inputs::new()
        .config_map("scripts", "setup", "echo set up")
        .secret("keys", "id", "PRIVATE KEY\n")
        .secret("keys", "token", "t0ken");
    PlanContext::new(&Capabilities::new("example", capabilities)).inputs(inputs).modules([base_module()])
}

/// Returns a module `base` of one VM with a boot disk on sata and a data disk.
fn base_module() -> Module {
    let digest = "0".repeat(64);
    let disk = |name: &str| {
        serde_json::json!({
            "name": name, "bus": "sata", "file": name, "format": "qcow2", "virtual_size": 1 << 30, "size": 1 << 20,
            "sha256": digest
        })
    };
    let record = serde_json::json!({
        "format": 1, "name": "base", "digest": digest, "created": "2026-01-01T00:00:00Z",
        "machines": [{
            "name": "one", "cpus": 1, "memory": 1 << 30, "firmware": "bios", "tpm": false, "nics": [],
            "disks": [disk("system"), disk("data")]
        }],
        "network": {"declared": false, "vpcs": [], "subnets": []},
        "provenance": {
            "manifest": "", "plan": digest, "inputs": [], "versions": {}, "timings": [],
            "not_repeatable": ["source of VM one has no checksum"]
        }
    });
    Module::from_record(std::path::Path::new("module.json"), record.to_string().as_bytes()).unwrap()
}

fn planned(text: &str) -> Plan {
    let prepared = prepare("site.yaml", text.as_bytes(), &context());
    assert!(!prepared.has_errors(), "{}", prepared.render());
    prepared.into_plans().unwrap().remove(0)
}

const SMALL: &str = "
vms:
- name: web
  source: {url: 'https://example.org/debian.qcow2'}
  resources: {cpu: 1.5, memory: 512Mi}
";

#[test]
fn defaults_are_filled_in() {
    let plan = planned(SMALL);
    assert_eq!((plan.name.as_str(), plan.timeout, plan.retries), ("site", Duration::from_secs(1800), 0));
    assert_eq!(plan.iso_cache_ttl, Duration::from_secs(24 * 3600));
    assert_eq!(plan.manifest.trim(), SMALL.trim());
    let vm = &plan.machines[0];
    assert_eq!((vm.hardware.cpus, vm.hardware.memory), (2, 512 << 20));
    assert_eq!((vm.hardware.firmware, vm.hardware.tpm), (Firmware::Bios, false));
    let disk = &vm.hardware.disks[0];
    assert_eq!((disk.name.as_str(), disk.size, disk.bus), ("rootdisk", Some(20 << 30), Bus::Virtio));
    let nic = &vm.hardware.nics[0];
    assert_eq!(
        (nic.name.as_str(), nic.subnet.as_str(), nic.slot, nic.slot_pinned),
        ("nic1", "default", 1, false)
    );
    assert_eq!((nic.model, nic.ip), (NicModel::E1000, None));
    assert_eq!(nic.mac.bytes()[0] & 0b11, 0b10, "locally administered, unicast");
    let access = &vm.communicator;
    assert_eq!((access.username.as_str(), access.port, access.shell), ("root", 22, GuestShell::Bash));
    assert_eq!((access.timeout, &access.password), (Duration::from_secs(300), &None));
    assert_eq!(vm.hardware, vm.template);
    assert!(!plan.network.declared && plan.network.vpcs[0].internet);
    assert_eq!(plan.network.subnets[0].cidr.to_string(), "10.0.2.0/24");
    assert_eq!(plan.not_repeatable, ["source of VM web has no checksum"]);
}

#[test]
fn overrides_apply_to_the_build_and_not_to_clones() {
    let plan = planned(
        "
vms:
- name: web
  source: {blank: true}
  resources: {cpu: 1, memory: 1Gi}
  nics:
  - {name: lan, subnet: lan, mac: '52:54:00:00:00:01', slot: 4, model: virtio}
  - {name: free, subnet: lan}
network:
  vpcs: [{name: lab}]
  subnets: [{name: lan, vpc: lab, cidr: 10.1.0.0/24, unmanaged: true}]
buildOverrides:
  vpcs: [{name: lab, internet: true}]
  subnets: [{name: lan, unmanaged: false}]
  vms:
  - name: web
    resources: {cpu: 4}
    nics:
    - {name: other}
    - {name: lan, subnet: lan, ip: 10.1.0.9, model: e1000, slot: 1}
",
    );
    let vm = &plan.machines[0];
    assert_eq!((vm.hardware.cpus, vm.template.cpus, vm.hardware.memory), (4, 1, 1 << 30));
    let (base, build) = (&vm.template.nics, &vm.hardware.nics);
    assert_eq!((base[0].slot, base[1].slot), (4, 1));
    assert_eq!((build[1].mac, build[1].slot, build[1].model), (base[0].mac, 4, NicModel::Virtio));
    assert_eq!(build[1].ip, Some("10.1.0.9".parse().unwrap()));
    assert_eq!((build[0].name.as_str(), build[0].slot), ("other", 1));
    assert!(!plan.template_network.vpcs[0].internet && plan.network.vpcs[0].internet);
    let (template, build) = (&plan.template_network.subnets[0], &plan.network.subnets[0]);
    assert_eq!((template.unmanaged, template.dhcp), (true, false));
    assert_eq!((build.unmanaged, build.dhcp), (false, true));
}

#[test]
fn a_layer_inherits_the_disks_of_its_parent() {
    let plan = planned(
        "
vms:
- name: app
  source: {buildRef: {name: base}}
  resources: {cpu: 1, memory: 1Gi}
  cloudInit: {}
  disks: [{name: extra, size: 1Gi, bus: usb}]
",
    );
    let vm = &plan.machines[0];
    let disks: Vec<_> =
        vm.hardware.disks.iter().map(|d| (d.name.as_str(), d.size, d.bus, d.inherited)).collect();
    assert_eq!(
        disks,
        [
            ("system", None, Bus::Sata, true),
            ("data", None, Bus::Sata, true),
            ("extra", Some(1 << 30), Bus::Usb, false)
        ]
    );
    assert!(
        matches!(&vm.source, PlannedSource::BuildRef(parent) if parent.vm == "one" && parent.module == "base")
    );
    assert_eq!(plan.not_repeatable, ["module base, the source of VM app, is not repeatable itself"]);
}

#[test]
fn inputs_are_resolved_and_secrets_are_recorded() {
    let plan = planned(
        "
vms:
- name: web
  source: {url: 'https://user:p%40ss@example.org/debian.qcow2'}
  resources: {cpu: 1, memory: 1Gi}
  communicator: {sshPassword: hunter2, sshPrivateKeySecret: {name: keys, key: id}}
  provisioners:
  - type: shell
    shell: {scriptFrom: {configMapRef: {name: scripts, key: setup}}, env: {A: 1, B: true, C: x}}
  - type: file
    name: put the token
    stepTimeout: 90s
    file: {source: {secretRef: {name: keys, key: token}}, destination: /etc/token}
  - type: reboot
",
    );
    let mut secrets: Vec<_> = plan.secrets.iter().map(rudder_core::secret::Secret::expose).collect();
    secrets.sort_unstable();
    assert_eq!(secrets, ["PRIVATE KEY", "hunter2", "p%40ss", "p@ss", "t0ken"]);
    let steps = &plan.machines[0].steps;
    let StepAction::Shell { script, env, .. } = &steps[0].action else { panic!("{:?}", steps[0]) };
    assert_eq!(&**script, "echo set up");
    assert_eq!(env.iter().map(|(k, v)| format!("{k}={v}")).collect::<Vec<_>>(), ["A=1", "B=true", "C=x"]);
    assert_eq!((steps[1].name.as_str(), steps[1].timeout), ("put the token", Some(Duration::from_secs(90))));
    assert!(matches!(&steps[2].action, StepAction::Reboot { command } if command == "sudo reboot"));
    assert!(!format!("{plan:?}").contains("hunter2\")"));
}

#[test]
fn relative_files_are_resolved_against_the_base_directory() {
    let text = SMALL.replace("https://example.org/", "file:images/");
    let context = context().base_directory("/srv/builds");
    let plans = prepare("site.yaml", text.as_bytes(), &context).into_plans().unwrap();
    let PlannedSource::Url(url) = &plans[0].machines[0].source else { panic!() };
    assert_eq!(url.url.as_str(), "file:///srv/builds/images/debian.qcow2");
}

#[test]
fn a_refused_manifest_is_an_error_that_says_why() {
    let error = prepare("site.yaml", b"vms: []\n", &context()).into_plans().unwrap_err();
    assert!(error.to_string().starts_with("site.yaml has 1 error\nerror[missing-field]"), "{error}");
    let [finding] = error.diagnostics() else { panic!("{:?}", error.diagnostics()) };
    assert_eq!((finding.code.as_str(), finding.path.as_str()), ("missing-field", ""));
}

/// A manifest with everything that shapes the result, written out in full.
const FULL: &str = "
name: site
vms:
- name: web
  source: {url: 'https://example.org/debian.qcow2'}
  resources: {cpu: 1, memory: 1Gi}
  disks:
  - {name: root, size: 10Gi, bus: virtio}
  - {name: data, size: 1Gi, bus: scsi, storageClass: fast}
  communicator:
    sshUsername: admin
    sshPort: 22
    sshPassword: hunter2
    sshTimeout: 5m
  cloudInit: {userData: '#cloud-config', networkData: 'version: 2'}
  nics: [{name: lan, subnet: lan, slot: 2, ip: 10.1.0.5, mac: '52:54:00:00:00:01', model: virtio}]
  efiFirmware: {secureBoot: false}
  tpm: true
  provisioners:
  - type: shell
    name: install
    stepTimeout: 10m
    shell: {inline: [echo a, echo b], env: {A: x}, executeCommand: 'sudo bash {{ .Command }}'}
  - {type: file, file: {fileRef: motd, destination: /etc/motd}}
  - {type: reboot, reboot: {command: reboot -f}}
  invisible: false
files:
- {name: motd, inline: hello}
network:
  vpcs: [{name: lab, internet: false}]
  subnets: [{name: lan, vpc: lab, cidr: 10.1.0.0/24, dhcp: true, dns: 9.9.9.9}]
buildOverrides:
  vpcs: [{name: lab, internet: true}]
  vms: [{name: web, resources: {cpu: 2}}]
timeout: 30m
retries: 1
";

#[test]
fn the_digest_is_stable_across_versions() {
    // A change here changes the digest of every existing build: it must be intended.
    insta::assert_snapshot!(planned(FULL).digest, @"dcc09a0582614c92404256dd1751439d5e3afb52969ee3d68485fdeac8d18bd4");
    insta::assert_snapshot!(planned(SMALL).digest, @"b28025073d3581a7bc6e30352c16a41cb6558f8cdba0e03e331cae7c682b3b49");
}

#[test]
fn the_digest_ignores_fields_that_do_not_affect_the_result() {
    let digest = planned(FULL).digest;
    for (from, to) in [
        ("name: site", "# a comment\nname:   \"site\""),
        ("resources: {cpu: 1, memory: 1Gi}", "resources: {memory: 1024Mi, cpu: '1.0'}"),
        ("{name: root, size: 10Gi, bus: virtio}", "{size: 10Gi, name: root}"),
        ("    sshPort: 22\n", ""),
        ("sshTimeout: 5m", "sshTimeout: 9m"),
        ("name: install", "name: set up"),
        ("stepTimeout: 10m", "stepTimeout: 20m"),
        ("inline: [echo a, echo b]", "inline: \"echo a\\necho b\""),
        ("timeout: 30m", "timeout: 45m"),
        ("retries: 1", "retries: 2"),
        ("  invisible: false\n", ""),
        ("- {name: motd, inline: hello}", "- {name: motd, inline: hello}\n- {name: unused, inline: x}"),
    ] {
        assert!(FULL.contains(from), "{from}");
        assert_eq!(planned(&FULL.replace(from, to)).digest, digest, "{from} → {to}");
    }
    // The same in the resource form.
    let spec: String = FULL.lines().filter(|l| *l != "name: site").map(|l| format!("  {l}\n")).collect();
    let head =
        "apiVersion: ruddervirt.io/v1alpha1\nkind: VirtualMachineBuild\nmetadata: {name: site}\nspec:\n";
    assert_eq!(planned(&format!("{head}{spec}")).digest, digest);
}

#[test]
fn the_digest_changes_with_every_field_that_affects_the_result() {
    let sha = "1".repeat(64);
    let mut digests = HashSet::from([planned(FULL).digest]);
    for (from, to) in [
        ("name: site", "name: site2"),
        ("invisible: false", "invisible: true"),
        ("debian.qcow2", "other.qcow2"),
        ("debian.qcow2'}", &format!("debian.qcow2', checksum: {sha}}}")),
        ("cpu: 1,", "cpu: 3,"),
        ("memory: 1Gi", "memory: 2Gi"),
        ("name: root", "name: boot"),
        ("size: 10Gi", "size: 11Gi"),
        ("bus: virtio", "bus: sata"),
        ("bus: scsi", "bus: ide"),
        ("storageClass: fast", "storageClass: slow"),
        ("sshUsername: admin", "sshUsername: root"),
        ("sshPort: 22", "sshPort: 2222"),
        ("hunter2", "hunter3"),
        (
            "    sshPassword: hunter2\n",
            "    sshPassword: hunter2\n    sshPrivateKeySecret: {name: keys, key: id}\n",
        ),
        ("'#cloud-config'", "'#cloud-config\n'"),
        ("'version: 2'", "'version: 1'"),
        ("name: lan, subnet", "name: wan, subnet"),
        ("slot: 2", "slot: 3"),
        ("ip: 10.1.0.5", "ip: 10.1.0.6"),
        ("00:00:00:01", "00:00:00:02"),
        ("model: virtio", "model: e1000"),
        ("  efiFirmware: {secureBoot: false}\n", ""),
        ("secureBoot: false", "secureBoot: true"),
        ("tpm: true", "tpm: false"),
        ("echo b", "echo c"),
        ("{A: x}", "{A: y}"),
        ("{A: x}", "{B: x}"),
        ("sudo bash", "bash"),
        ("inline: hello", "inline: hullo"),
        ("destination: /etc/motd", "destination: /etc/issue"),
        ("reboot -f", "reboot"),
        ("internet: false", "internet: true"),
        ("internet: true", "internet: false"),
        ("cidr: 10.1.0.0/24", "cidr: 10.1.0.0/16"),
        ("dhcp: true", "dhcp: false"),
        ("dns: 9.9.9.9", "dns: 9.9.9.10"),
        ("dns: 9.9.9.9", "unmanaged: true"),
        ("resources: {cpu: 2}", "resources: {cpu: 4}"),
        ("  - {type: reboot, reboot: {command: reboot -f}}\n", ""),
    ] {
        assert!(FULL.contains(from), "{from}");
        assert!(digests.insert(planned(&FULL.replace(from, to)).digest), "{from} → {to}");
    }
}

#[test]
fn a_mirror_with_the_same_bytes_gives_the_same_digest() {
    let sha = "1".repeat(64);
    let text = FULL.replace("debian.qcow2'}", &format!("debian.qcow2', checksum: {sha}}}"));
    assert_eq!(planned(&text).digest, planned(&text.replace("example.org", "mirror.example.net")).digest);
}

/// Returns a build of `vms` VMs with `nics` NICs each.
fn build(vms: usize, nics: usize) -> String {
    let mut text = "vms:\n".to_owned();
    for vm in 0..vms {
        text += &format!(
            "- name: vm{vm}\n  source: {{blank: true}}\n  resources: {{cpu: 1, memory: 1Gi}}\n  nics:\n"
        );
        for nic in 0..nics {
            text += if nic % 2 == 0 { "  - {}\n" } else { "  - {model: virtio}\n" };
        }
    }
    text
}

/// Any mapping, mostly of words used in manifests.
fn any_yaml() -> impl Strategy<Value = serde_yaml::Value> {
    use serde_yaml::Value;
    const WORDS: &[&str] = &[
        "name",
        "vms",
        "source",
        "url",
        "blank",
        "buildRef",
        "vmName",
        "resources",
        "cpu",
        "memory",
        "disks",
        "size",
        "bus",
        "usb",
        "nics",
        "subnet",
        "ip",
        "mac",
        "slot",
        "10.0.2.5",
        "10.0.2.0/24",
        "network",
        "subnets",
        "vpcs",
        "vpc",
        "cidr",
        "unmanaged",
        "provisioners",
        "type",
        "shell",
        "inline",
        "file",
        "fileRef",
        "files",
        "bootCommand",
        "<enter><aOn>",
        "timeout",
        "30m",
        "1Gi",
        "web",
        "base",
        "buildOverrides",
        "cloudInit",
        "floppy",
        "checksum",
    ];
    let leaf = prop_oneof![
        proptest::sample::select(WORDS).prop_map(|word| Value::String(word.to_owned())),
        any::<i64>().prop_map(|n| Value::Number(n.into())),
        any::<bool>().prop_map(Value::Bool),
        Just(Value::Null),
        ".{0,8}".prop_map(Value::String),
    ];
    leaf.prop_recursive(6, 64, 6, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::Sequence),
            proptest::collection::vec((proptest::sample::select(WORDS), inner), 0..6).prop_map(|entries| {
                Value::Mapping(
                    entries.into_iter().map(|(key, value)| (Value::String(key.into()), value)).collect(),
                )
            }),
        ]
    })
}

proptest! {
    #[test]
    fn hardware_addresses_are_unique_and_plans_are_deterministic(vms in 1usize..6, nics in 1usize..9) {
        let text = build(vms, nics);
        let plan = planned(&text);
        prop_assert_eq!(&plan, &planned(&text));
        let all = plan.machines.iter().flat_map(|vm| &vm.hardware.nics);
        let macs: HashSet<_> = all.clone().map(|nic| nic.mac).collect();
        prop_assert_eq!(macs.len(), vms * nics);
        for vm in &plan.machines {
            let slots: HashSet<_> = vm.hardware.nics.iter().map(|nic| nic.slot).collect();
            prop_assert!(slots.len() == nics && slots.iter().all(|slot| (1..=9).contains(slot)));
        }
    }

    #[test]
    fn checking_and_planning_never_panic(value in any_yaml()) {
        let text = serde_yaml::to_string(&value).unwrap();
        let parsed = parse(text.as_bytes());
        for document in &parsed.documents {
            drop(check(document));
            let planned = plan(document, &context());
            let refused = planned.diagnostics.iter().any(Diagnostic::is_error);
            prop_assert!(planned.plan.is_none() || !refused);
            prop_assert!(planned.plan.is_some() || refused || parsed.has_errors());
            prop_assert!(planned.diagnostics.iter().all(|d| d.code != "internal"));
        }
    }
}

#[test]
fn a_manifest_built_by_a_program_is_planned_without_locations() {
    let bare: BareBuild = serde_yaml::from_str(SMALL).unwrap();
    let document = Document::from_manifest(Manifest::Bare(Box::new(bare)));
    let without = plan(&document, &context());
    assert!(without.diagnostics.iter().any(|d| d.code == "missing-field" && d.span.is_none()));
    let mut limits = Limits::default();
    limits.max_disk_size = None;
    let named = plan(&document, &context().default_name("site").limits(limits)).plan.unwrap();
    assert_eq!(named.digest, planned(SMALL).digest);
}
