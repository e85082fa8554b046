//! A VM of a manifest: source, hardware, communicator, media.

use super::{KeyRef, Provisioner, Scalar, Unknown, ValueFrom};
use crate::secret::Secret;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A VM of the module.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Vm {
    /// Required: a Name that other VMs of the build resolve.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Required: the initial content of the boot disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<Source>,
    /// Required: cores and memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resources: Option<Resources>,
    /// Disks; by default one `rootdisk` of 20Gi on virtio. The first one is the boot disk and receives the source.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<Disk>,
    /// How to connect to the guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub communicator: Option<Communicator>,
    /// If present (even empty), a NoCloud seed is attached.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cloud_init: Option<CloudInit>,
    /// NICs; one by default. If any is declared, all must be declared.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub nics: Vec<Nic>,
    /// Keys that are typed on the display before the login over SSH.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub boot_command: Vec<String>,
    /// If present, the VM boots with UEFI, otherwise with BIOS.
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
    /// Hint for user interfaces, copied to the template; default false.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub invisible: Option<bool>,
    /// Keys that Rudder does not know.
    #[serde(flatten)]
    #[schemars(skip)]
    pub unknown: Unknown,
}

/// The initial content of a boot disk: exactly one of the fields.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Source {
    /// An http, https or file URL of a disk image.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// sha256 of the bytes at `url`, as served.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub checksum: Option<String>,
    /// An empty disk, for installing from `isos`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub blank: Option<bool>,
    /// A module that has been built.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub build_ref: Option<BuildRef>,
    /// An OCI image that contains one disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub container_disk: Option<String>,
    /// A volume of the cluster.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source_pvc: Option<SourcePvc>,
    /// Keys that Rudder does not know.
    #[serde(flatten)]
    #[schemars(skip)]
    pub unknown: Unknown,
}

/// A VM of a module that has been built.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct BuildRef {
    /// The module.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The VM; required if the module has several.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vm_name: Option<String>,
    /// The namespace in which a cluster backend looks for the module.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// Keys that Rudder does not know.
    #[serde(flatten)]
    #[schemars(skip)]
    pub unknown: Unknown,
}

/// A volume of the cluster.
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
    /// A Quantity of cores; rounded up, at least 1.
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
    /// Required: a unique Name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// A Quantity of bytes; default 20Gi.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<Scalar>,
    /// virtio (default), scsi, sata, usb or ide.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bus: Option<String>,
    /// The storage class, for cluster backends.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub storage_class: Option<String>,
    /// Keys that Rudder does not know.
    #[serde(flatten)]
    #[schemars(skip)]
    pub unknown: Unknown,
}

/// How to connect to the guest.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Communicator {
    /// `ssh`, the only type.
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
    /// A password that is tried in addition to the key. It is a secret.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub ssh_password: Option<Secret>,
    /// The private key for the login; by default a new ed25519 key pair for each build.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ssh_private_key_secret: Option<KeyRef>,
    /// Limit from power-on (or the end of the boot command) to a working login; default 5m.
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
    /// User data, delivered as written, in any form that cloud-init accepts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user_data: Option<String>,
    /// User data from a named input.
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

/// A NIC.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Nic {
    /// The name that overrides refer to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// A declared subnet; by default the default subnet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subnet: Option<String>,
    /// Pins the NIC to a PCI slot, 1–9.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slot: Option<i64>,
    /// An IPv4 address inside the subnet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ip: Option<String>,
    /// The hardware address; by default derived from the build.
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
    /// Entries in the top-level `files`.
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
    /// The name of an entry in the top-level `files`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Keys that Rudder does not know.
    #[serde(flatten)]
    #[schemars(skip)]
    pub unknown: Unknown,
}
