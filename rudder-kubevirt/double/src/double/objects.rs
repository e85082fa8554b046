//! The custom resources that the double handles, and the fields of their specifications that it reads.

use kube::{
    Resource,
    core::{ApiResource, DynamicObject, GroupVersionKind},
};
use rudder_core::{Error, ErrorKind, Result, units::Quantity};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::Value;
use std::{collections::BTreeMap, fmt};

/// The group of KubeVirt's objects.
pub(super) const KUBEVIRT: &str = "kubevirt.io";
/// The group of KubeVirt's aggregated API.
pub(super) const SUBRESOURCES: &str = "subresources.kubevirt.io";

pub(super) fn virtual_machines() -> ApiResource {
    resource(KUBEVIRT, "v1", "VirtualMachine", "virtualmachines")
}

pub(super) fn instances() -> ApiResource {
    resource(KUBEVIRT, "v1", "VirtualMachineInstance", "virtualmachineinstances")
}

pub(super) fn data_volumes() -> ApiResource {
    resource("cdi.kubevirt.io", "v1beta1", "DataVolume", "datavolumes")
}

fn resource(group: &str, version: &str, kind: &str, plural: &str) -> ApiResource {
    ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, kind), plural)
}

/// The namespace and name of an object.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Key {
    pub(super) namespace: String,
    pub(super) name: String,
}

impl Key {
    pub(super) fn new(namespace: impl Into<String>, name: impl Into<String>) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }

    pub(super) fn of<K: Resource>(object: &K) -> Self {
        let meta = object.meta();
        Self::new(meta.namespace.clone().unwrap_or_default(), meta.name.clone().unwrap_or_default())
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

pub(super) fn uid<K: Resource>(object: &K) -> &str {
    object.meta().uid.as_deref().unwrap_or_default()
}

pub(super) fn is_deleted<K: Resource>(object: &K) -> bool {
    object.meta().deletion_timestamp.is_some()
}

/// Returns the name of the controlling owner of this kind.
pub(super) fn controller<'o, K: Resource>(object: &'o K, kind: &str) -> Option<&'o str> {
    let owners = object.meta().owner_references.iter().flatten();
    let mut controllers = owners.filter(|owner| owner.controller == Some(true));
    controllers.find(|owner| owner.kind == kind).map(|owner| owner.name.as_str())
}

/// Returns the text at a JSON pointer (RFC 6901); empty if there is none.
pub(super) fn text<'o>(object: &'o DynamicObject, pointer: &str) -> &'o str {
    object.data.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

pub(super) fn phase(object: &DynamicObject) -> &str {
    text(object, "/status/phase")
}

/// Reads the part of an object at a JSON pointer; the default where it is absent.
///
/// # Errors
/// `InvalidInput` when it has another form.
pub(super) fn read<T: DeserializeOwned + Default>(object: &DynamicObject, pointer: &str) -> Result<T> {
    match object.data.pointer(pointer) {
        None | Some(Value::Null) => Ok(T::default()),
        Some(value) => T::deserialize(value).map_err(|error| {
            let message = format!("expected {pointer} of {} to be readable, but it is not", Key::of(object));
            Error::new(ErrorKind::InvalidInput, message).with_source(error)
        }),
    }
}

/// Reads a quantity of Kubernetes, in bytes.
pub(super) fn bytes(quantity: &str) -> Result<u64> {
    quantity.parse::<Quantity>().map(Quantity::ceil).map_err(|error| {
        Error::new(ErrorKind::InvalidInput, format!("expected a quantity, but found {quantity:?}"))
            .with_source(error)
    })
}

/// `spec` of a DataVolume.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct DataVolumeSpec {
    pub(super) source: DataVolumeSource,
    pub(super) pvc: Option<ClaimSpec>,
    pub(super) storage: Option<ClaimSpec>,
}

impl DataVolumeSpec {
    pub(super) fn claim(&self) -> Option<&ClaimSpec> {
        self.pvc.as_ref().or(self.storage.as_ref())
    }
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct DataVolumeSource {
    pub(super) http: Option<HttpSource>,
    pub(super) blank: Option<Value>,
    pub(super) pvc: Option<ClaimSource>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct HttpSource {
    pub(super) url: String,
    pub(super) checksum: Option<String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct ClaimSource {
    pub(super) namespace: Option<String>,
    pub(super) name: String,
}

/// `spec.pvc` or `spec.storage` of a DataVolume.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct ClaimSpec {
    pub(super) access_modes: Vec<String>,
    pub(super) volume_mode: Option<String>,
    pub(super) storage_class_name: Option<String>,
    pub(super) resources: Resources,
}

impl ClaimSpec {
    /// Returns the requested size in bytes.
    pub(super) fn size(&self) -> Result<Option<u64>> {
        self.resources.requests.get("storage").map(|quantity| bytes(quantity)).transpose()
    }
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct Resources {
    pub(super) requests: BTreeMap<String, String>,
}

/// `spec` of a VirtualMachineInstance.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct InstanceSpec {
    pub(super) domain: Domain,
    pub(super) volumes: Vec<InstanceVolume>,
    pub(super) access_credentials: Vec<Value>,
    pub(super) termination_grace_period_seconds: Option<u64>,
    pub(super) hostname: Option<String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Domain {
    pub(super) cpu: Cpu,
    pub(super) memory: Memory,
    pub(super) resources: Resources,
    pub(super) devices: Devices,
    pub(super) firmware: Firmware,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct Cpu {
    pub(super) cores: Option<u32>,
    pub(super) sockets: Option<u32>,
    pub(super) threads: Option<u32>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct Memory {
    pub(super) guest: Option<String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct Firmware {
    pub(super) bootloader: Bootloader,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct Bootloader {
    pub(super) efi: Option<Efi>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Efi {
    pub(super) secure_boot: Option<bool>,
    pub(super) persistent: Option<bool>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct Devices {
    pub(super) disks: Vec<Disk>,
    pub(super) interfaces: Vec<Interface>,
    pub(super) tpm: Option<Tpm>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct Tpm {
    pub(super) enabled: Option<bool>,
    pub(super) persistent: Option<bool>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Disk {
    pub(super) name: String,
    pub(super) boot_order: Option<u32>,
    pub(super) disk: Option<DiskTarget>,
    pub(super) lun: Option<DiskTarget>,
    pub(super) cdrom: Option<DiskTarget>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct DiskTarget {
    pub(super) bus: Option<String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Interface {
    pub(super) name: String,
    pub(super) model: Option<String>,
    pub(super) mac_address: Option<String>,
    pub(super) ports: Vec<Port>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct Port {
    pub(super) port: u16,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct InstanceVolume {
    pub(super) name: String,
    pub(super) persistent_volume_claim: Option<ClaimVolume>,
    pub(super) data_volume: Option<DataVolumeVolume>,
    pub(super) empty_disk: Option<EmptyDisk>,
    pub(super) cloud_init_no_cloud: Option<CloudInit>,
    pub(super) secret: Option<SecretVolume>,
}

/// A Secret as a disk: an ISO 9660 file system with its keys as files.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct SecretVolume {
    pub(super) secret_name: String,
    pub(super) volume_label: String,
}

impl InstanceVolume {
    /// Returns the name of the claim with the content, if it is in a claim.
    pub(super) fn claim(&self) -> Option<&str> {
        let claim = self.persistent_volume_claim.as_ref().map(|volume| &volume.claim_name);
        claim.or_else(|| self.data_volume.as_ref().map(|volume| &volume.name)).map(String::as_str)
    }
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct ClaimVolume {
    pub(super) claim_name: String,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct DataVolumeVolume {
    pub(super) name: String,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct EmptyDisk {
    pub(super) capacity: String,
}

/// `cloudInitNoCloud` of a volume.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct CloudInit {
    pub(super) secret_ref: Option<Reference>,
    pub(super) user_data: Option<String>,
    pub(super) network_data_secret_ref: Option<Reference>,
    pub(super) network_data: Option<String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct Reference {
    pub(super) name: String,
}
