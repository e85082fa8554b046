//! A VM of a manifest: source, hardware, communicator, media.

use super::{KeyRef, Provisioner, Scalar, Unknown, ValueFrom};
use crate::secret::Secret;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A VM of the module.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Vm {
    /// Required, a Name; other VMs of the build resolve it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Required: what the boot disk starts from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<Source>,
    /// Required: cores and memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resources: Option<Resources>,
    /// Disks; left out, one `rootdisk` of 20Gi on virtio. The first boots and receives the source.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<Disk>,
    /// How to talk to the guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub communicator: Option<Communicator>,
    /// Present (even empty): a NoCloud seed is attached.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cloud_init: Option<CloudInit>,
    /// Network cards; left out, one. Declaring any means declaring all.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub nics: Vec<Nic>,
    /// Typed on the display before SSH is tried.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub boot_command: Vec<String>,
    /// Present: UEFI. Absent: BIOS.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub efi_firmware: Option<EfiFirmware>,
    /// A TPM 2.0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tpm: Option<bool>,
    /// CD-ROMs, in order.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub isos: Vec<Iso>,
    /// Files on a 1.44 MB floppy, during the build only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub floppy: Option<FileNames>,
    /// Steps, in order; the first failure fails the build.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub provisioners: Vec<Provisioner>,
    /// Carried to the template for user interfaces; default false.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub invisible: Option<bool>,
    /// Keys that Rudder does not know.
    #[serde(flatten)]
    #[schemars(skip)]
    pub unknown: Unknown,
}

/// What a boot disk starts from: exactly one of these.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Source {
    /// A disk image behind http, https or file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// sha256 of the bytes behind `url`, as served.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub checksum: Option<String>,
    /// An empty disk, for installing from `isos`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub blank: Option<bool>,
    /// A module built before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub build_ref: Option<BuildRef>,
    /// An OCI image that holds one disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub container_disk: Option<String>,
    /// A volume in the cluster.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source_pvc: Option<SourcePvc>,
    /// Keys that Rudder does not know.
    #[serde(flatten)]
    #[schemars(skip)]
    pub unknown: Unknown,
}

/// A VM of a module built before.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct BuildRef {
    /// The module.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The VM; required if the module has several.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vm_name: Option<String>,
    /// Where a cluster backend looks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// Keys that Rudder does not know.
    #[serde(flatten)]
    #[schemars(skip)]
    pub unknown: Unknown,
}

/// A volume in the cluster.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct SourcePvc {
    /// The PersistentVolumeClaim.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Its namespace.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// Keys that Rudder does not know.
    #[serde(flatten)]
    #[schemars(skip)]
    pub unknown: Unknown,
}

/// Cores and memory.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Resources {
    /// A Quantity; the guest sees it rounded up, at least 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu: Option<Scalar>,
    /// A Quantity of bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<Scalar>,
    /// Keys that Rudder does not know.
    #[serde(flatten)]
    #[schemars(skip)]
    pub unknown: Unknown,
}

/// A disk.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Disk {
    /// Required, unique, a Name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// A Quantity of bytes; default 20Gi.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<Scalar>,
    /// virtio (default), scsi, sata, usb or ide.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bus: Option<String>,
    /// For cluster backends.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub storage_class: Option<String>,
    /// Keys that Rudder does not know.
    #[serde(flatten)]
    #[schemars(skip)]
    pub unknown: Unknown,
}

/// How to talk to the guest.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Communicator {
    /// `ssh`, the only one.
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub r#type: Option<String>,
    /// `bash` (default) or `powershell`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shell: Option<String>,
    /// Default root.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ssh_username: Option<String>,
    /// Default 22.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ssh_port: Option<i64>,
    /// Tried beside the key. A secret.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub ssh_password: Option<Secret>,
    /// The key to log in with; left out, a fresh ed25519 pair per build.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ssh_private_key_secret: Option<KeyRef>,
    /// From power-on (after the boot command) to a working login; default 5m.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ssh_timeout: Option<Scalar>,
    /// Keys that Rudder does not know.
    #[serde(flatten)]
    #[schemars(skip)]
    pub unknown: Unknown,
}

/// A NoCloud seed.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct CloudInit {
    /// Delivered as written, in whatever form cloud-init takes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user_data: Option<String>,
    /// The same from a named input.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user_data_from: Option<ValueFrom>,
    /// The network-config of the seed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network_data: Option<String>,
    /// Keys that Rudder does not know.
    #[serde(flatten)]
    #[schemars(skip)]
    pub unknown: Unknown,
}

/// A network card.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Nic {
    /// What overrides refer to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// A declared subnet; left out, the default one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subnet: Option<String>,
    /// 1–9: pins the PCI slot.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slot: Option<i64>,
    /// An IPv4 address inside the subnet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ip: Option<String>,
    /// The hardware address; left out, derived from the build.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
    /// e1000 (default), virtio, e1000e, rtl8139, pcnet or ne2k_pci.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Keys that Rudder does not know.
    #[serde(flatten)]
    #[schemars(skip)]
    pub unknown: Unknown,
}

/// UEFI firmware.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct EfiFirmware {
    /// Default false.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub secure_boot: Option<bool>,
    /// Keys that Rudder does not know.
    #[serde(flatten)]
    #[schemars(skip)]
    pub unknown: Unknown,
}

/// A CD-ROM.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Iso {
    /// Required: http, https or file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// sha256 of the bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub checksum: Option<String>,
    /// Keys that Rudder does not know.
    #[serde(flatten)]
    #[schemars(skip)]
    pub unknown: Unknown,
}

/// A list of files of the build.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct FileNames {
    /// Entries of the top-level `files`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<FileRef>,
    /// Keys that Rudder does not know.
    #[serde(flatten)]
    #[schemars(skip)]
    pub unknown: Unknown,
}

/// A file of the build.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct FileRef {
    /// The name of an entry of the top-level `files`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Keys that Rudder does not know.
    #[serde(flatten)]
    #[schemars(skip)]
    pub unknown: Unknown,
}
