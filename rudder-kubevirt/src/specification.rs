//! A machine as a VirtualMachine: its hardware in the words of KubeVirt's API, and its seed as a Secret.

use crate::names::{Kind, VM, lab_labels, label_value, object_name};
use k8s_openapi::ByteString;
use rudder_core::{
    Error, ErrorKind, Result,
    backend::{LabId, MachineDisk, MachineSpec},
    hardware::{Bus, Firmware, NicModel},
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// What a process that attaches to the lab of a machine needs to know about it: the content of an annotation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct MachineRecord {
    /// The name of the machine in its lab.
    pub(crate) name: String,
    /// Its position among the machines of the lab.
    pub(crate) index: u32,
    /// The ports that may be dialled.
    pub(crate) ports: Vec<u16>,
    /// The disks.
    pub(crate) disks: Vec<DiskRecord>,
    /// Whether the machine has UEFI variables, and whether it has a TPM.
    pub(crate) uefi: bool,
    pub(crate) tpm: bool,
    /// Whether it was ever started.
    pub(crate) started: bool,
}

/// A disk of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct DiskRecord {
    pub(crate) name: String,
    pub(crate) bus: Bus,
    /// The name of the PersistentVolumeClaim.
    pub(crate) claim: String,
    pub(crate) virtual_size: u64,
}

impl MachineRecord {
    pub(crate) fn of(spec: &MachineSpec, index: u32) -> Self {
        let disk = |disk: &MachineDisk| DiskRecord {
            name: disk.name.clone(),
            bus: disk.bus,
            claim: disk.volume.id.clone(),
            virtual_size: disk.volume.virtual_size,
        };
        Self {
            name: spec.name.clone(),
            index,
            ports: spec.ports.clone(),
            disks: spec.disks.iter().map(disk).collect(),
            uefi: !matches!(spec.firmware, Firmware::Bios),
            tpm: spec.tpm,
            started: false,
        }
    }
}

/// Returns the name of the objects of a machine.
pub(crate) fn machine_name(lab: &LabId, machine: &str) -> String {
    object_name(&[lab.as_str(), machine])
}

/// Returns the files of a seed, as the keys of a Secret.
pub(crate) fn seed_files(spec: &MachineSpec) -> Option<BTreeMap<String, ByteString>> {
    let seed = spec.seed.as_ref()?;
    let mut files = BTreeMap::new();
    let mut add = |name: &str, content: &[u8]| files.insert(name.to_owned(), ByteString(content.to_owned()));
    add("meta-data", seed.meta_data.as_bytes());
    add("user-data", &seed.user_data);
    if let Some(network) = &seed.network_config {
        add("network-config", network.as_bytes());
    }
    Some(files)
}

/// Returns the specification of a VirtualMachine. `name` is that of its objects.
///
/// # Errors
/// `InvalidInput` for hardware that KubeVirt does not have, or not this way.
pub(crate) fn virtual_machine(spec: &MachineSpec, name: &str, lab: &LabId, build: &str) -> Result<Value> {
    let mut disks = Vec::new();
    let mut volumes = Vec::new();
    let mut attach = |device: Value, volume: Value| {
        disks.push(device);
        volumes.push(volume);
    };
    for (index, disk) in spec.disks.iter().enumerate() {
        let id = format!("disk{index}");
        attach(
            json!({"name": id, "bootOrder": index + 1, "disk": {"bus": bus(disk.bus)?}}),
            json!({"name": id, "persistentVolumeClaim": {"claimName": disk.volume.id}}),
        );
    }
    for (index, cdrom) in spec.cdroms.iter().enumerate() {
        let id = format!("cdrom{index}");
        attach(
            json!({"name": id, "bootOrder": spec.disks.len() + index + 1, "cdrom": {"bus": "sata"}}),
            json!({"name": id, "persistentVolumeClaim": {"claimName": cdrom.id, "readOnly": true}}),
        );
    }
    if spec.seed.is_some() {
        // The files of the seed as they are, on a disk with the label that cloud-init looks for. `cloudInitNoCloud` would write its
        // own meta-data, with another instance id.
        let secret = json!({"secretName": name, "volumeLabel": "cidata"});
        attach(json!({"name": "seed", "disk": {"bus": "virtio"}}), json!({"name": "seed", "secret": secret}));
    }
    if spec.floppy.is_some() {
        return Err(unsupported(
            "a floppy disk",
            "KubeVirt has none: serve its files as a CD-ROM or from httpDirectory",
        ));
    }
    let (interfaces, networks) = match spec.nics.as_slice() {
        [] => (json!([]), json!([])),
        [nic] => (
            json!([{"name": "nic1", "masquerade": {}, "model": model(nic.model), "macAddress": nic.mac.to_string()}]),
            json!([{"name": "nic1", "pod": {}}]),
        ),
        nics => {
            let found = format!("{} NICs on the network of the cluster", nics.len());
            return Err(unsupported(&found, "a machine has one NIC there; more need declared networks"));
        }
    };
    let mut devices = json!({
        "disks": disks,
        "interfaces": interfaces,
        "autoattachSerialConsole": true,
        "autoattachGraphicsDevice": true,
        "rng": {},
    });
    if spec.nics.is_empty() {
        devices["autoattachPodInterface"] = false.into();
    }
    if spec.tpm {
        devices["tpm"] = json!({"persistent": true});
    }
    let mut domain = json!({
        "cpu": {"cores": spec.cpus, "sockets": 1, "threads": 1},
        "memory": {"guest": spec.memory.to_string()},
        "devices": devices,
    });
    match spec.firmware {
        Firmware::Bios => domain["firmware"] = json!({"bootloader": {"bios": {}}}),
        firmware => {
            let secure_boot = firmware == Firmware::UefiSecureBoot;
            domain["firmware"] =
                json!({"bootloader": {"efi": {"secureBoot": secure_boot, "persistent": true}}});
            domain["features"] = json!({"smm": {"enabled": secure_boot}});
        }
    }
    let mut labels = lab_labels(Kind::Machine, lab, build);
    labels.insert(VM.to_owned(), label_value(&spec.name));
    Ok(json!({
        "runStrategy": "Manual",
        "template": {
            "metadata": {"labels": labels},
            "spec": {
                "domain": domain,
                "networks": networks,
                "volumes": volumes,
                "terminationGracePeriodSeconds": 0,
                // What moves a machine between nodes would interrupt a build for nothing.
                "evictionStrategy": "None",
            },
        },
    }))
}

pub(crate) fn bus(bus: Bus) -> Result<&'static str> {
    match bus {
        Bus::Virtio => Ok("virtio"),
        Bus::Scsi => Ok("scsi"),
        Bus::Sata => Ok("sata"),
        Bus::Usb => Ok("usb"),
        Bus::Ide => Err(unsupported("a disk on IDE", "use sata or virtio")),
    }
}

fn model(model: NicModel) -> &'static str {
    match model {
        NicModel::Virtio => "virtio",
        NicModel::E1000 => "e1000",
        NicModel::E1000e => "e1000e",
        NicModel::Rtl8139 => "rtl8139",
        NicModel::Pcnet => "pcnet",
        NicModel::Ne2kPci => "ne2k_pci",
    }
}

fn unsupported(what: &str, help: &'static str) -> Error {
    Error::new(ErrorKind::InvalidInput, format!("expected hardware that KubeVirt has, but found {what}"))
        .with_help(help)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use rudder_core::backend::Volume;

    fn lab() -> LabId {
        LabId::parse("web-0123456789ab").unwrap()
    }

    fn spec() -> MachineSpec {
        let mut spec = MachineSpec::new("web", 2, 1 << 30);
        spec.disks.push(MachineDisk::new("root", Bus::Virtio, Volume::new("claim", 1 << 30)));
        spec.disks.push(MachineDisk::new("data", Bus::Usb, Volume::new("other", 1 << 20)));
        spec.cdroms.push(Volume::new("iso", 1));
        spec
    }

    #[test]
    fn a_machine_boots_from_its_first_disk_and_then_from_its_cd_rom() {
        let machine = virtual_machine(&spec(), "web-1", &lab(), "web").unwrap();
        assert_eq!(machine["runStrategy"], "Manual");
        let devices = &machine["template"]["spec"]["domain"]["devices"];
        let order = |index: usize| {
            (devices["disks"][index]["name"].clone(), devices["disks"][index]["bootOrder"].clone())
        };
        assert_eq!((order(0), order(2)), ((json!("disk0"), json!(1)), (json!("cdrom0"), json!(3))));
        assert_eq!(devices["disks"][1]["disk"]["bus"], "usb");
        assert_eq!(machine["template"]["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"], "claim");
    }

    #[test]
    fn what_kubevirt_lacks_is_refused() {
        let mut ide = spec();
        ide.disks[0].bus = Bus::Ide;
        let mut floppy = spec();
        floppy.floppy = Some([0; 4].into());
        for spec in [ide, floppy] {
            assert_eq!(
                virtual_machine(&spec, "web-1", &lab(), "web").unwrap_err().kind(),
                ErrorKind::InvalidInput
            );
        }
    }

    #[test]
    fn secure_boot_needs_smm() {
        let mut secure = spec();
        secure.firmware = Firmware::UefiSecureBoot;
        let domain = &virtual_machine(&secure, "web-1", &lab(), "web").unwrap()["template"]["spec"]["domain"];
        assert_eq!(domain["features"]["smm"]["enabled"], true);
        assert_eq!(domain["firmware"]["bootloader"]["efi"], json!({"secureBoot": true, "persistent": true}));
    }
}
