//! Translates the specification of an instance to that of a machine on the node.

use super::{
    node::{Node, SUBNET},
    objects::{CloudInit, Disk, InstanceSpec, InstanceVolume, Interface, Key},
    volumes::StoredVolume,
};
use rudder_core::{
    Error, ErrorKind, Result,
    backend::{MachineDisk, MachineSpec, Progress, Volume, VolumeKind},
    digest::Digest,
    hardware::{Bus, Firmware, NicModel},
    plan::{PlannedNic, PlannedSource},
    units::MacAddress,
};
use serde_json::Value;
use std::{collections::HashMap, sync::Arc};

/// The volumes that an instance uses, and how.
#[derive(Debug, Default)]
pub(super) struct Attachments<'s> {
    /// Writable disks in boot order: their names, and their claims.
    pub(super) disks: Vec<(&'s Disk, Attached<'s>)>,
    /// CD-ROMs in boot order.
    pub(super) cdroms: Vec<(&'s Disk, Attached<'s>)>,
    /// The cloud-init seed.
    pub(super) seed: Option<SeedSource<'s>>,
}

/// Where a seed comes from.
#[derive(Debug, Clone, Copy)]
pub(super) enum SeedSource<'s> {
    /// KubeVirt makes it.
    CloudInit(&'s CloudInit),
    /// The files in the Secret of this name, which is attached with the label `cidata`.
    Secret(&'s str),
}

/// What is attached as a disk or a CD-ROM.
#[derive(Debug, Clone)]
pub(super) enum Attached<'s> {
    Claim(Arc<StoredVolume>),
    /// A blank disk of this size that ends with the instance.
    Empty(&'s str),
}

/// Sorts the disks of an instance.
///
/// # Errors
/// `InvalidInput` for volumes and disks that the double does not know.
pub(super) fn attachments<'s>(
    spec: &'s InstanceSpec,
    claims: &HashMap<String, Arc<StoredVolume>>,
) -> Result<Attachments<'s>> {
    let mut attachments = Attachments::default();
    let mut disks: Vec<&Disk> = spec.domain.devices.disks.iter().collect();
    disks.sort_by_key(|disk| disk.boot_order.unwrap_or(u32::MAX));
    for disk in disks {
        let volume = spec.volumes.iter().find(|volume| volume.name == disk.name);
        let volume = volume.ok_or_else(|| invalid(format!("there is no volume for disk {}", disk.name)))?;
        if let Some(cloud_init) = &volume.cloud_init_no_cloud {
            attachments.seed = Some(SeedSource::CloudInit(cloud_init));
            continue;
        }
        if let Some(secret) = volume.secret.as_ref().filter(|secret| secret.volume_label == "cidata") {
            attachments.seed = Some(SeedSource::Secret(&secret.secret_name));
            continue;
        }
        let attached = attached(volume, claims)?;
        match disk.cdrom {
            Some(_) => attachments.cdroms.push((disk, attached)),
            None => attachments.disks.push((disk, attached)),
        }
    }
    Ok(attachments)
}

fn attached<'s>(
    volume: &'s InstanceVolume,
    claims: &HashMap<String, Arc<StoredVolume>>,
) -> Result<Attached<'s>> {
    if let Some(claim) = volume.claim() {
        let stored = claims.get(claim).ok_or_else(|| invalid(format!("there is no claim {claim}")))?;
        return Ok(Attached::Claim(stored.clone()));
    }
    match &volume.empty_disk {
        Some(empty) => Ok(Attached::Empty(&empty.capacity)),
        None => {
            Err(invalid(format!("the double of KubeVirt does not know the source of volume {}", volume.name)))
        }
    }
}

/// Returns the specification of the machine of an instance, without seed and state.
pub(super) async fn machine_spec(
    node: &Node,
    key: &Key,
    spec: &InstanceSpec,
    attachments: &Attachments<'_>,
    ports: &[u16],
) -> Result<MachineSpec> {
    let domain = &spec.domain;
    let threads = [domain.cpu.cores, domain.cpu.sockets, domain.cpu.threads];
    let cpus = threads.into_iter().flatten().product();
    let memory = domain.memory.guest.as_ref().or(domain.resources.requests.get("memory"));
    let memory = memory.ok_or_else(|| invalid("there is no memory"))?;
    let mut machine = MachineSpec::new(&key.name, cpus, super::objects::bytes(memory)?);
    machine.firmware = match &domain.firmware.bootloader.efi {
        None => Firmware::Bios,
        Some(efi) if efi.secure_boot == Some(false) => Firmware::Uefi,
        Some(_) => Firmware::UefiSecureBoot,
    };
    machine.tpm = domain.devices.tpm.as_ref().is_some_and(|tpm| tpm.enabled != Some(false));
    for (disk, attached) in &attachments.disks {
        let volume = volume(node, key, disk, attached, VolumeKind::Disk).await?;
        machine.disks.push(MachineDisk::new(&disk.name, bus(disk)?, volume));
    }
    for (disk, attached) in &attachments.cdroms {
        machine.cdroms.push(volume(node, key, disk, attached, VolumeKind::Cdrom).await?);
    }
    for (index, interface) in domain.devices.interfaces.iter().enumerate() {
        machine.nics.push(nic(key, index, interface)?);
    }
    let listed = domain.devices.interfaces.iter().flat_map(|interface| &interface.ports);
    machine.ports = listed.map(|port| port.port).collect();
    if machine.ports.is_empty() {
        machine.ports = ports.to_vec();
    }
    Ok(machine)
}

async fn volume(
    node: &Node,
    key: &Key,
    disk: &Disk,
    attached: &Attached<'_>,
    kind: VolumeKind,
) -> Result<Volume> {
    let progress = Progress::none();
    match (attached, kind) {
        (Attached::Claim(stored), VolumeKind::Cdrom) => stored.cdrom(node, &progress).await,
        (Attached::Claim(stored), _) => stored.disk(node, &progress).await,
        (Attached::Empty(capacity), _) => {
            let key = Key::new(&key.name, &disk.name);
            let size = Some(super::objects::bytes(capacity)?);
            node.import(&key, kind, (PlannedSource::Blank, None), size, &progress).await
        }
    }
}

fn bus(disk: &Disk) -> Result<Bus> {
    let target = disk.disk.as_ref().or(disk.lun.as_ref());
    match target.and_then(|target| target.bus.as_deref()) {
        Some("virtio") => Ok(Bus::Virtio),
        Some("scsi") => Ok(Bus::Scsi),
        // The default of KubeVirt for a disk without a bus.
        Some("sata") | None => Ok(Bus::Sata),
        Some("usb") => Ok(Bus::Usb),
        Some(other) => Err(invalid(format!("disk {} has the unknown bus {other}", disk.name))),
    }
}

fn nic(key: &Key, index: usize, interface: &Interface) -> Result<PlannedNic> {
    let model = interface.model.as_deref().unwrap_or("virtio");
    let model: NicModel = serde_json::from_value(Value::String(model.to_owned()))
        .map_err(|_| invalid(format!("interface {} has the unknown model {model}", interface.name)))?;
    let mac = match &interface.mac_address {
        Some(mac) => mac
            .parse()
            .map_err(|_| invalid(format!("interface {} has the invalid address {mac}", interface.name)))?,
        None => derived_mac(key, &interface.name),
    };
    let slot = u8::try_from(index + 1).map_err(|_| invalid("there are too many interfaces"))?;
    Ok(PlannedNic {
        name: interface.name.clone(),
        subnet: SUBNET.to_owned(),
        slot,
        slot_pinned: false,
        ip: None,
        mac,
        model,
    })
}

/// Returns the hardware address of an interface without one: always the same for the same instance.
pub(super) fn derived_mac(key: &Key, interface: &str) -> MacAddress {
    let digest = Digest::of(format!("{key} {interface}").as_bytes());
    let mut bytes = [0; 6];
    bytes.copy_from_slice(&digest.as_bytes()[..6]);
    // Locally administered, unicast (IEEE 802, clause 8.2).
    bytes[0] = bytes[0] & !0b01 | 0b10;
    MacAddress::new(bytes)
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidInput, message.into())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::{from_value, json};

    fn spec() -> InstanceSpec {
        from_value(json!({
            "domain": {
                "memory": {"guest": "64Mi"},
                "devices": {
                    "disks": [
                        {"name": "iso", "bootOrder": 2, "cdrom": {"bus": "sata"}},
                        {"name": "data", "disk": {"bus": "usb"}},
                        {"name": "root", "bootOrder": 1, "disk": {"bus": "virtio"}},
                        {"name": "seed", "disk": {}},
                    ],
                },
            },
            "volumes": [
                {"name": "data", "emptyDisk": {"capacity": "1Gi"}},
                {"name": "root", "emptyDisk": {"capacity": "2Gi"}},
                {"name": "iso", "emptyDisk": {"capacity": "1Mi"}},
                {"name": "seed", "cloudInitNoCloud": {"userData": "#cloud-config"}},
            ],
        }))
        .unwrap()
    }

    #[test]
    fn disks_are_attached_in_boot_order() {
        let spec = spec();
        let attachments = attachments(&spec, &HashMap::new()).unwrap();
        let names: Vec<_> = attachments.disks.iter().map(|(disk, _)| disk.name.as_str()).collect();
        assert_eq!(names, ["root", "data"]);
        assert_eq!(bus(attachments.disks[1].0).unwrap(), Bus::Usb);
        assert_eq!(attachments.cdroms.len(), 1);
        assert!(attachments.seed.is_some());
    }

    #[test]
    fn a_volume_of_an_unknown_kind_is_refused() {
        let mut spec = spec();
        spec.volumes[0].empty_disk = None;
        let error = attachments(&spec, &HashMap::new()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        spec.volumes.clear();
        assert!(attachments(&spec, &HashMap::new()).is_err());
    }

    #[test]
    fn an_interface_without_an_address_always_gets_the_same() {
        let key = Key::new("ns", "web");
        let interface = Interface { name: "default".to_owned(), ..Interface::default() };
        let nic = |interface: &Interface| nic(&key, 0, interface);
        assert_eq!(nic(&interface).unwrap().mac, derived_mac(&key, "default"));
        assert_eq!(nic(&interface).unwrap().model, NicModel::Virtio);
        let unknown = Interface { model: Some("token-ring".to_owned()), ..interface };
        assert!(nic(&unknown).is_err());
    }
}
