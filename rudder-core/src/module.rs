//! The result of a build: template VMs, captured disks, provenance.
//!
//! The format of `module.json` is defined in [`record`](crate::record).

use crate::{
    Error, ErrorKind,
    content::Content,
    digest::Digest,
    hardware::{Bus, Firmware, NicModel},
    timestamp::Timestamp,
    units::{Cidr, MacAddress},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    fmt,
    net::Ipv4Addr,
    path::{Path, PathBuf},
};

/// A module: powered-off template VMs, ready to be cloned as a group.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Module {
    /// The name of the module, a Name.
    pub name: String,
    /// The digest of what was published: the same for the same disks and templates.
    pub digest: Digest,
    /// When it was published.
    pub created: Timestamp,
    /// The VMs, in the order of the manifest.
    pub machines: Vec<TemplateMachine>,
    /// The networks that clones get.
    pub network: TemplateNetwork,
    /// How to build the module again.
    pub provenance: Provenance,
    /// The path of its `module.json`, for backends that have files. Not part of the record.
    pub path: Option<PathBuf>,
}

impl Module {
    /// Help text for a damaged module.
    pub const REPAIR: &str = "restore the file from a copy, or build the module again";

    /// Creates the error for a record that cannot be used; `found` says what is wrong with it.
    #[must_use]
    pub fn damaged(path: &Path, found: &str) -> Error {
        let message = format!("expected the record of a module in {}, but {found}", path.display());
        Error::new(ErrorKind::InvalidInput, message).with_help(Self::REPAIR)
    }

    /// Returns the files beside the record, or the objects, that hold disks and state, with their content.
    pub fn files(&self) -> impl Iterator<Item = (&str, &Content)> {
        self.machines.iter().flat_map(|machine| {
            let disks = machine.disks.iter().map(|disk| (disk.file.as_str(), &disk.content));
            disks.chain(machine.state.iter().map(|state| (state.file.as_str(), &state.content)))
        })
    }
}

/// A module that exists but cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct DamagedModule {
    /// The name of the module.
    pub name: String,
    /// Why it cannot be used, and how to fix that; names the file.
    pub reason: String,
}

impl DamagedModule {
    /// Creates a damaged module with the reason why it cannot be used.
    #[must_use]
    pub fn new(name: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { name: name.into(), reason: reason.into() }
    }
}

/// A powered-off VM of a module, with the base values that clones get.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct TemplateMachine {
    /// The name of the VM.
    pub name: String,
    /// Number of CPU cores.
    pub cpus: u32,
    /// Memory in bytes.
    pub memory: u64,
    /// The firmware that the VM boots with.
    pub firmware: Firmware,
    /// Whether the VM has a TPM.
    pub tpm: bool,
    /// The NICs.
    pub nics: Vec<TemplateNic>,
    /// The disks; the VM boots from the first.
    pub disks: Vec<CapturedDisk>,
    /// State that the VM keeps outside its disks.
    pub state: Vec<CapturedState>,
    /// Passed through for user interfaces.
    pub invisible: bool,
}

impl TemplateMachine {
    /// Creates a powered-off VM with BIOS and nothing attached.
    pub fn new(name: impl Into<String>, cpus: u32, memory: u64) -> Self {
        Self {
            name: name.into(),
            cpus,
            memory,
            firmware: Firmware::Bios,
            tpm: false,
            nics: Vec::new(),
            disks: Vec::new(),
            state: Vec::new(),
            invisible: false,
        }
    }
}

/// A NIC of a template VM.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct TemplateNic {
    /// The name of the NIC.
    pub name: String,
    /// The name of its subnet, one of the module's.
    pub subnet: String,
    /// The position among the NICs, 1–9, which determines the PCI slot.
    pub slot: u8,
    /// Whether the author pinned the slot.
    pub slot_pinned: bool,
    /// The static address, if any.
    pub ip: Option<Ipv4Addr>,
    /// The hardware address.
    pub mac: MacAddress,
    /// The model that the guest sees.
    pub model: NicModel,
}

/// The networks that the clones of a module get.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct TemplateNetwork {
    /// Whether the author declared the network; otherwise it is one VPC with one subnet, DHCP and internet.
    pub declared: bool,
    /// Private networks that cannot reach each other.
    pub vpcs: Vec<TemplateVpc>,
    /// The subnets of the VPCs.
    pub subnets: Vec<TemplateSubnet>,
}

/// A VPC of a module.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct TemplateVpc {
    /// The name of the VPC.
    pub name: String,
    /// Whether its VMs can reach the internet.
    pub internet: bool,
}

/// A subnet of a VPC of a module.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct TemplateSubnet {
    /// The name of the subnet.
    pub name: String,
    /// The name of its VPC.
    pub vpc: String,
    /// The address range.
    pub cidr: Cidr,
    /// Whether DHCP hands out addresses.
    pub dhcp: bool,
    /// DNS servers to hand out; empty for the backend's own.
    pub dns: Vec<Ipv4Addr>,
    /// Whether the subnet is a bare layer-2 segment, on which a guest provides any services.
    pub unmanaged: bool,
}

/// A captured disk. Once published, `file` is relative to the directory of `module.json`.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct CapturedDisk {
    /// The disk's name in the manifest.
    pub name: String,
    /// The bus that the disk is attached to.
    pub bus: Bus,
    /// The file or object that contains the disk.
    pub file: String,
    /// The format of the file: `qcow2`, `raw`…
    pub format: String,
    /// Size seen by the guest, in bytes.
    pub virtual_size: u64,
    /// The content of the file or object: its stored bytes, not the disk that the guest sees.
    pub content: Content,
}

impl CapturedDisk {
    /// Creates a captured disk: its name in the manifest and its bus, the file or object with its format and content, and the size
    /// that the guest sees in bytes.
    pub fn new(
        name: impl Into<String>,
        bus: Bus,
        file: impl Into<String>,
        format: impl Into<String>,
        virtual_size: u64,
        content: Content,
    ) -> Self {
        Self { name: name.into(), bus, file: file.into(), format: format.into(), virtual_size, content }
    }
}

/// Captured state that a machine keeps outside its disks. `file` is as in [`CapturedDisk`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct CapturedState {
    /// The kind of state.
    pub kind: StateKind,
    /// The file or object that contains the state.
    pub file: String,
    /// The format of the file: `raw`, `qcow2`, `swtpm`…
    pub format: String,
    /// The content of the file or object: its stored bytes.
    pub content: Content,
}

impl CapturedState {
    /// Creates a captured state: its kind, and the file or object with its format and content.
    pub fn new(
        kind: StateKind,
        file: impl Into<String>,
        format: impl Into<String>,
        content: Content,
    ) -> Self {
        Self { kind, file: file.into(), format: format.into(), content }
    }
}

/// Kinds of state that a machine keeps outside its disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum StateKind {
    /// The variables of the UEFI firmware: boot entries, Secure Boot keys.
    FirmwareVariables,
    /// The memory of the TPM.
    Tpm,
}

impl StateKind {
    /// Returns the name used in records and file names: `firmware-variables` or `tpm`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::FirmwareVariables => "firmware-variables",
            Self::Tpm => "tpm",
        }
    }
}

/// How a module was built, and how to build it again.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Provenance {
    /// The manifest as given, with secrets masked.
    pub manifest: String,
    /// The digest of the plan.
    pub plan: Digest,
    /// Every input, with the content that was used.
    pub inputs: Vec<InputRecord>,
    /// Versions of `rudder`, the backend, and the programs that it drives.
    pub versions: BTreeMap<String, String>,
    /// The duration of each phase.
    pub timings: Vec<Timing>,
    /// Reasons why the build cannot be repeated from the manifest alone; empty if it can.
    pub not_repeatable: Vec<String>,
    /// Probable problems that did not stop the build, such as a machine that had to be killed at its end.
    pub warnings: Vec<String>,
}

impl Provenance {
    /// Creates the provenance of a build of this manifest (secrets masked) and plan, with everything else empty.
    pub fn new(manifest: impl Into<String>, plan: Digest) -> Self {
        Self {
            manifest: manifest.into(),
            plan,
            inputs: Vec::new(),
            versions: BTreeMap::new(),
            timings: Vec::new(),
            not_repeatable: Vec::new(),
            warnings: Vec::new(),
        }
    }
}

/// The duration of a phase.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[non_exhaustive]
pub struct Timing {
    /// The VM; absent: the build.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<String>,
    /// The name of the phase.
    pub phase: String,
    /// The duration in milliseconds.
    pub millis: u64,
}

impl Timing {
    /// Creates the duration of a phase of a VM, or of the build for `None`, in milliseconds.
    pub fn new(vm: Option<String>, phase: impl Into<String>, millis: u64) -> Self {
        Self { vm, phase: phase.into(), millis }
    }
}

/// An input of a build: what was requested, and what was received.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[non_exhaustive]
pub struct InputRecord {
    /// What the input is for.
    pub role: InputRole,
    /// The URL of the input, or `module NAME/VM`. Credentials in it are masked.
    pub url: String,
    /// What is known about the bytes as served.
    #[serde(flatten)]
    pub content: Content,
}

impl InputRecord {
    /// Creates the record of an input from this URL.
    pub fn new(role: InputRole, url: impl Into<String>, content: Content) -> Self {
        Self { role, url: url.into(), content }
    }

    /// Returns the same input with another role.
    #[must_use]
    pub fn role(self, role: InputRole) -> Self {
        Self { role, ..self }
    }
}

/// The role of an input in a build.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "kebab-case")]
#[non_exhaustive]
pub enum InputRole {
    /// The source of a VM's disk.
    Source {
        /// The VM.
        vm: String,
    },
    /// A file of the manifest.
    File,
    /// A CD-ROM. It is used during the build and not needed afterwards: how long it stays cached depends on `isoCacheTTL` alone,
    /// not on modules built with it.
    Iso,
}

impl InputRole {
    /// Returns the role of the source of a VM.
    pub fn source(vm: impl Into<String>) -> Self {
        Self::Source { vm: vm.into() }
    }
}

/// Formats the role for people: `source of VM web`, `file`, `ISO`.
impl fmt::Display for InputRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Source { vm } => write!(f, "source of VM {vm}"),
            Self::File => f.write_str("file"),
            Self::Iso => f.write_str("ISO"),
        }
    }
}
