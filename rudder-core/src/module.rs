//! The result of a build: template VMs, captured disks, provenance.
//!
//! How a module is written to `module.json` is decided in [`record`](crate::record).

use crate::{
    Error, ErrorKind,
    content::Content,
    digest::Digest,
    hardware::{Bus, Firmware, NicModel},
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

/// A module: halted template VMs, ready to be cloned as a group.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Module {
    /// Its name, a Name.
    pub name: String,
    /// The digest of what was published: the same for the same disks and templates.
    pub digest: Digest,
    /// When it was published.
    pub created: jiff::Timestamp,
    /// Its VMs, in the manifest's order.
    pub machines: Vec<TemplateMachine>,
    /// The networks that its clones get.
    pub network: TemplateNetwork,
    /// How to make it again.
    pub provenance: Provenance,
    /// Where its `module.json` is, for backends that have files. Not part of the record.
    pub path: Option<PathBuf>,
}

impl Module {
    /// What helps when a module is damaged.
    pub const REPAIR: &str = "restore the file from a copy, or build the module again";

    /// The error of a record that cannot be used; `found` says what is wrong with it.
    #[must_use]
    pub fn damaged(path: &Path, found: &str) -> Error {
        let message = format!("expected the record of a module in {}, but {found}", path.display());
        Error::new(ErrorKind::InvalidInput, message).with_help(Self::REPAIR)
    }

    /// The files beside its record, or the objects that hold its disks and state, and what they hold.
    pub fn files(&self) -> impl Iterator<Item = (&str, &Content)> {
        self.machines.iter().flat_map(|machine| {
            let disks = machine.disks.iter().map(|disk| (disk.file.as_str(), &disk.content));
            disks.chain(machine.state.iter().map(|state| (state.file.as_str(), &state.content)))
        })
    }
}

/// A module that is there and cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct DamagedModule {
    /// Its name.
    pub name: String,
    /// Why it cannot be used, and what helps; names the file.
    pub reason: String,
}

impl DamagedModule {
    /// A module that cannot be used, for this reason.
    #[must_use]
    pub fn new(name: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { name: name.into(), reason: reason.into() }
    }
}

/// A halted VM of a module, with the base values that clones get.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct TemplateMachine {
    /// Its name.
    pub name: String,
    /// Cores.
    pub cpus: u32,
    /// Memory in bytes.
    pub memory: u64,
    /// Firmware.
    pub firmware: Firmware,
    /// Whether it has a TPM.
    pub tpm: bool,
    /// Its NICs.
    pub nics: Vec<TemplateNic>,
    /// Its disks; the first boots.
    pub disks: Vec<CapturedDisk>,
    /// What it keeps outside its disks.
    pub state: Vec<CapturedState>,
    /// Carried along for user interfaces.
    pub invisible: bool,
}

impl TemplateMachine {
    /// A halted VM with BIOS, and nothing attached.
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
    /// Its name.
    pub name: String,
    /// The name of its subnet, one of the module's.
    pub subnet: String,
    /// Its place among the NICs, 1–9: pins the PCI slot.
    pub slot: u8,
    /// Whether the author pinned the slot.
    pub slot_pinned: bool,
    /// A fixed address.
    pub ip: Option<Ipv4Addr>,
    /// Its hardware address.
    pub mac: MacAddress,
    /// What the guest sees.
    pub model: NicModel,
}

/// The networks that the clones of a module get.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct TemplateNetwork {
    /// Whether the author declared it; otherwise it is one VPC with one subnet, DHCP and internet.
    pub declared: bool,
    /// Networks that cannot reach each other.
    pub vpcs: Vec<TemplateVpc>,
    /// Their segments.
    pub subnets: Vec<TemplateSubnet>,
}

/// A private network of a module.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct TemplateVpc {
    /// Its name.
    pub name: String,
    /// Whether its VMs reach the internet.
    pub internet: bool,
}

/// A segment of a VPC of a module.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct TemplateSubnet {
    /// Its name.
    pub name: String,
    /// The name of its VPC.
    pub vpc: String,
    /// Its addresses.
    pub cidr: Cidr,
    /// Whether addresses are handed out.
    pub dhcp: bool,
    /// DNS servers handed out; empty: the backend's own.
    pub dns: Vec<Ipv4Addr>,
    /// A bare layer-2 segment that a guest serves.
    pub unmanaged: bool,
}

/// A disk after capture. `file` is relative to the directory of `module.json` once published.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CapturedDisk {
    /// The disk's name in the manifest.
    pub name: String,
    /// How it is attached.
    pub bus: Bus,
    /// The file or object that holds it.
    pub file: String,
    /// `qcow2`, `raw`…
    pub format: String,
    /// What the guest sees, in bytes.
    pub virtual_size: u64,
    /// What the file or object holds: the bytes that it takes, not what the guest sees.
    pub content: Content,
}

/// What a machine keeps outside its disks, after capture. `file` as in [`CapturedDisk`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CapturedState {
    /// What it is.
    pub kind: StateKind,
    /// The file or object that holds it.
    pub file: String,
    /// Its format: `raw`, `qcow2`, `swtpm`…
    pub format: String,
    /// What the file or object holds: the bytes that it takes, not what the guest sees.
    pub content: Content,
}

/// What a machine keeps outside its disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum StateKind {
    /// The variables of its UEFI firmware: boot entries, Secure Boot keys.
    FirmwareVariables,
    /// The memory of its TPM.
    Tpm,
}

impl StateKind {
    /// Its name in records and file names: `firmware-variables`, `tpm`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::FirmwareVariables => "firmware-variables",
            Self::Tpm => "tpm",
        }
    }
}

/// How to make a module again.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Provenance {
    /// The manifest as given, secrets masked.
    pub manifest: String,
    /// The digest of the plan.
    pub plan: Digest,
    /// Every input, with what it was.
    pub inputs: Vec<InputRecord>,
    /// Versions: `rudder`, the backend, what it drives.
    pub versions: BTreeMap<String, String>,
    /// How long each phase took.
    pub timings: Vec<Timing>,
    /// Why it cannot be repeated from its manifest alone; empty: it can.
    pub not_repeatable: Vec<String>,
    /// What was likely wrong and did not stop the build: a machine that had to be killed at its end…
    pub warnings: Vec<String>,
}

impl Provenance {
    /// The record of a build of this manifest (secrets masked) and plan, with nothing else known yet.
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

/// How long a phase took.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Timing {
    /// The VM; absent: the build.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<String>,
    /// The phase's name.
    pub phase: String,
    /// Milliseconds.
    pub millis: u64,
}

/// An input of a build: what was asked for, and what came.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[non_exhaustive]
pub struct InputRecord {
    /// What it is for.
    pub role: InputRole,
    /// Its URL, or `module NAME/VM`. Credentials in it are masked.
    pub url: String,
    /// The bytes as served, as far as they are known.
    #[serde(flatten)]
    pub content: Content,
}

impl InputRecord {
    /// An input that came from this URL.
    pub fn new(role: InputRole, url: impl Into<String>, content: Content) -> Self {
        Self { role, url: url.into(), content }
    }

    /// The same for another purpose.
    #[must_use]
    pub fn with_role(self, role: InputRole) -> Self {
        Self { role, ..self }
    }
}

/// What an input of a build is for.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "kebab-case")]
#[non_exhaustive]
pub enum InputRole {
    /// A disk of a VM is made of it.
    Source {
        /// The VM.
        vm: String,
    },
    /// A file of the manifest.
    File,
    /// A CD-ROM. It shapes a build and is not needed afterwards: how long it stays cached is up to `isoCacheTTL`, whatever was
    /// built with it.
    Iso,
}

impl InputRole {
    /// The source of a VM.
    pub fn source(vm: impl Into<String>) -> Self {
        Self::Source { vm: vm.into() }
    }
}

/// For people: `source of VM web`, `file`, `ISO`.
impl fmt::Display for InputRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Source { vm } => write!(f, "source of VM {vm}"),
            Self::File => f.write_str("file"),
            Self::Iso => f.write_str("ISO"),
        }
    }
}
