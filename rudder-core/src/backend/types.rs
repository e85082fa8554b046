//! The nouns of the contract.

use super::LabId;
use crate::{
    capability::Capability,
    digest::Digest,
    hardware::{Bus, Firmware},
    module::{InputRecord, Module, Provenance, TemplateMachine, TemplateNetwork},
    plan::{PlannedBuildRef, PlannedNetwork, PlannedNic, PlannedSource, PlannedUrl},
};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeSet, fmt, sync::Arc, time::Duration};

/// What a lab is opened for.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct LabSpec {
    /// Its id.
    pub id: LabId,
    /// The name of the build or clone.
    pub name: String,
    /// Its networks.
    pub network: PlannedNetwork,
    /// Whether its machines may have to outlive their owner.
    pub retention: Retention,
    /// What its machines will need that not every host has: firmware, a TPM. A backend refuses a lab whose machines its host
    /// cannot make, before anything is downloaded for them.
    pub needs: BTreeSet<Capability>,
}

/// Whether the machines of a lab may have to outlive the process that made them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Retention {
    /// No: when the owner dies, however it dies, the backend ends them as soon as it can.
    #[default]
    EndWithOwner,
    /// The owner may call [`Lab::keep`](super::Lab::keep), and its machines then stay.
    MayBeKept,
}

impl LabSpec {
    /// A lab for a build or clone of this name, on these networks.
    pub fn new(name: impl Into<String>, network: PlannedNetwork) -> Self {
        let name = name.into();
        Self { id: LabId::new(&name), name, network, retention: Retention::default(), needs: BTreeSet::new() }
    }
}

/// What [`Lab::import`](super::Lab::import) is asked for.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ImportRequest {
    /// The machine it is for, for file names and labels.
    pub machine: String,
    /// The disk or CD-ROM it becomes, unique in the machine.
    pub disk: String,
    /// Whether it becomes a disk or a CD-ROM.
    pub kind: VolumeKind,
    /// Where it comes from.
    pub source: PlannedSource,
    /// Of a `buildRef`, which disk of the parent's VM; `None`: its boot disk.
    pub parent_disk: Option<String>,
    /// How large it shall be, in bytes; `None`: as large as the source.
    pub size: Option<u64>,
    /// How long the source stays cached after its last use, at least, where the backend caches sources.
    pub keep_for: Duration,
}

impl VolumeKind {
    /// Its name in messages: `disk`, `cdrom`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Disk => "disk",
            Self::Cdrom => "cdrom",
        }
    }
}

/// What a machine uses a volume as.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum VolumeKind {
    /// A disk that the machine may write to. The image is recognised by its content, and unpacked.
    #[default]
    Disk,
    /// A read-only CD-ROM: the bytes as they are served.
    Cdrom,
}

impl ImportRequest {
    /// Disk `disk` of machine `machine` from this source.
    pub fn new(
        machine: impl Into<String>,
        disk: impl Into<String>,
        source: PlannedSource,
        size: Option<u64>,
    ) -> Self {
        Self {
            machine: machine.into(),
            disk: disk.into(),
            kind: VolumeKind::Disk,
            source,
            parent_disk: None,
            size,
            keep_for: Duration::ZERO,
        }
    }

    /// A CD-ROM of machine `machine` from this URL; `name` is unique among its disks and CD-ROMs.
    pub fn cdrom(machine: impl Into<String>, name: impl Into<String>, url: PlannedUrl) -> Self {
        Self { kind: VolumeKind::Cdrom, ..Self::new(machine, name, PlannedSource::Url(url), None) }
    }
}

/// Content that a machine is given as a disk or a CD-ROM. The id means something to its backend only.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    /// The backend's name for it: a path, an object name.
    pub id: String,
    /// What the guest sees, in bytes.
    pub virtual_size: u64,
}

/// An imported source.
#[derive(Debug, Clone)]
pub struct Imported {
    /// The volume.
    pub volume: Volume,
    /// What it was made of, for the provenance; `None` for a blank disk.
    pub input: Option<InputRecord>,
}

/// A disk of a machine.
#[derive(Debug, Clone)]
pub struct MachineDisk {
    /// Its name, unique in the machine.
    pub name: String,
    /// How it is attached.
    pub bus: Bus,
    /// Its content.
    pub volume: Volume,
}

/// A NoCloud seed (cloud-init documentation, datasource NoCloud): what stands in its files.
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Seed {
    /// `meta-data`.
    pub meta_data: String,
    /// `user-data`.
    pub user_data: Vec<u8>,
    /// `network-config`.
    pub network_config: Option<String>,
    /// The same as a medium: a file system labelled `cidata`, for backends that attach media.
    pub image: Arc<[u8]>,
}

impl fmt::Debug for Seed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // User data may hold secrets.
        f.debug_struct("Seed").field("meta_data", &self.meta_data).finish_non_exhaustive()
    }
}

impl Seed {
    /// A seed of these files, and a medium that holds them.
    pub fn new(
        meta_data: String,
        user_data: Vec<u8>,
        network_config: Option<String>,
        image: Arc<[u8]>,
    ) -> Self {
        Self { meta_data, user_data, network_config, image }
    }
}

/// What a machine is made of.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct MachineSpec {
    /// Its name, a Name, unique in the lab.
    pub name: String,
    /// Cores.
    pub cpus: u32,
    /// Memory in bytes.
    pub memory: u64,
    /// Firmware.
    pub firmware: Firmware,
    /// Whether it has a TPM 2.0.
    pub tpm: bool,
    /// Its disks; the first boots.
    pub disks: Vec<MachineDisk>,
    /// Its cards.
    pub nics: Vec<PlannedNic>,
    /// The ports that [`Machine::dial`](super::Machine::dial) must reach.
    pub ports: Vec<u16>,
    /// A NoCloud seed.
    pub seed: Option<Seed>,
    /// CD-ROMs in order, read-only: volumes that were imported as [`VolumeKind::Cdrom`]. A disk that does not boot
    /// falls through to the first of them. Needs [`Capability::Isos`](crate::capability::Capability::Isos).
    pub cdroms: Vec<Volume>,
    /// A floppy: the image of a 1.44 MB disk. Needs [`Capability::Floppy`](crate::capability::Capability::Floppy).
    pub floppy: Option<Arc<[u8]>>,
    /// The VM of a module whose state outside its disks (firmware variables, TPM) it starts with, where it has any.
    pub state_of: Option<PlannedBuildRef>,
}

impl MachineSpec {
    /// A machine with BIOS and nothing attached.
    pub fn new(name: impl Into<String>, cpus: u32, memory: u64) -> Self {
        Self {
            name: name.into(),
            cpus,
            memory,
            firmware: Firmware::Bios,
            tpm: false,
            disks: Vec::new(),
            nics: Vec::new(),
            ports: Vec::new(),
            seed: None,
            cdroms: Vec::new(),
            floppy: None,
            state_of: None,
        }
    }
}

/// Why a machine ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "exit", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Exit {
    /// The guest switched it off.
    PoweredOff,
    /// [`Machine::stop`](super::Machine::stop) killed it, for this reason ("did not power off within 60 s", "was told to").
    Killed {
        /// Why.
        why: String,
    },
    /// It died.
    Died {
        /// How.
        cause: Death,
        /// What the hypervisor said of it: signal, last lines of its output.
        detail: String,
    },
}

/// How a machine died.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Death {
    /// The hypervisor's process ended or was killed by somebody else.
    Hypervisor,
    /// The guest's kernel panicked.
    GuestPanic,
    /// A disk could not be read or written on the host.
    IoError,
    /// The host has no space left for a disk.
    HostDiskFull,
}

/// What is to be published.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ModuleDraft {
    /// The name of the module.
    pub name: String,
    /// Its VMs, with what [`Machine::capture`](super::Machine::capture) returned.
    pub machines: Vec<TemplateMachine>,
    /// The networks that clones get.
    pub network: TemplateNetwork,
    /// How to make it again.
    pub provenance: Provenance,
}

impl ModuleDraft {
    /// A module of these VMs.
    pub fn new(
        name: impl Into<String>,
        machines: Vec<TemplateMachine>,
        network: impl Into<TemplateNetwork>,
        provenance: Provenance,
    ) -> Self {
        Self { name: name.into(), machines, network: network.into(), provenance }
    }

    /// The module of this draft, published now. `digest` names its content.
    #[must_use]
    pub fn into_module(self, digest: Digest) -> Module {
        let Self { name, machines, network, provenance } = self;
        let created = jiff::Timestamp::now();
        Module { name, digest, created, machines, network, provenance, path: None }
    }
}

/// What is here, what is missing.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct HostReport {
    /// Each thing that was looked at.
    pub findings: Vec<HostFinding>,
}

impl HostReport {
    /// Whether everything that is required is here.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.findings.iter().all(|finding| finding.present || !finding.required)
    }
}

/// One thing that a backend needs or can use.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostFinding {
    /// What: `qemu-system-x86_64`, `accelerator`…
    pub what: String,
    /// Whether it is here.
    pub present: bool,
    /// Whether nothing goes without it.
    pub required: bool,
    /// Its version, or what is wrong with it.
    pub detail: String,
    /// How to mend it.
    pub help: Option<String>,
}

/// What was removed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ReapReport {
    /// Each thing: "process 1234 of lab x", "lab x", "download y".
    pub removed: Vec<String>,
    /// Bytes of disk freed.
    pub freed: u64,
    /// What should have been removed and could not be, and why.
    pub failed: Vec<String>,
    /// What is not known well enough to be removed, or looks damaged: why it stays, and how to repair it.
    #[serde(default)]
    pub warnings: Vec<String>,
}

impl ReapReport {
    /// Adds what another found.
    pub fn merge(&mut self, other: Self) {
        self.removed.extend(other.removed);
        self.freed += other.freed;
        self.failed.extend(other.failed);
        // Both may have met the same.
        for warning in other.warnings {
            if !self.warnings.contains(&warning) {
                self.warnings.push(warning);
            }
        }
    }
}
