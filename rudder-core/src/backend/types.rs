//! Types of the contract.

use super::{LabId, Retention};
use crate::{
    capability::Capability,
    digest::Digest,
    hardware::{Bus, Firmware},
    module::{InputRecord, Module, Provenance, TemplateMachine, TemplateNetwork},
    plan::{PlannedBuildRef, PlannedNetwork, PlannedNic, PlannedSource, PlannedUrl},
    timestamp::Timestamp,
};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeSet, fmt, sync::Arc, time::Duration};

/// Specification of a lab to open.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct LabSpec {
    /// The id of the lab.
    pub id: LabId,
    /// The name of the build or clone.
    pub name: String,
    /// The networks of the lab.
    pub network: PlannedNetwork,
    /// How long the lab lives.
    pub retention: Retention,
    /// What the machines will need that not every host has: firmware, a TPM. A backend refuses a lab whose machines its host cannot
    /// run before anything is downloaded for them.
    pub needs: BTreeSet<Capability>,
}

impl LabSpec {
    /// Creates the specification of a lab for a build or clone of this name, with these networks.
    pub fn new(name: impl Into<String>, network: PlannedNetwork) -> Self {
        let name = name.into();
        Self { id: LabId::new(&name), name, network, retention: Retention::default(), needs: BTreeSet::new() }
    }
}

/// Request to [`Lab::import`](super::Lab::import).
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ImportRequest {
    /// The machine that the volume is for; used in file names and labels.
    pub machine: String,
    /// The name of the disk or CD-ROM, unique in the machine.
    pub disk: String,
    /// Whether to import a disk or a CD-ROM.
    pub kind: VolumeKind,
    /// The source to import.
    pub source: PlannedSource,
    /// For a `buildRef`, which disk of the parent's VM; `None` for its boot disk.
    pub parent_disk: Option<String>,
    /// Size of the volume in bytes; `None` for the size of the source.
    pub size: Option<u64>,
    /// Minimum time that the source stays cached after its last use, where the backend caches sources.
    pub keep_for: Duration,
}

impl VolumeKind {
    /// Returns the name used in messages: `disk` or `cdrom`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Disk => "disk",
            Self::Cdrom => "cdrom",
        }
    }
}

/// How a machine uses a volume.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum VolumeKind {
    /// A disk that the machine may write to. The image format is detected from its content, and the image is unpacked.
    #[default]
    Disk,
    /// A read-only CD-ROM with the bytes as served.
    Cdrom,
}

impl ImportRequest {
    /// Creates a request for disk `disk` of machine `machine` from this source.
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

    /// Creates a request for a CD-ROM of machine `machine` from this URL; `name` is unique among the machine's disks and CD-ROMs.
    pub fn cdrom(machine: impl Into<String>, name: impl Into<String>, url: PlannedUrl) -> Self {
        Self { kind: VolumeKind::Cdrom, ..Self::new(machine, name, PlannedSource::Url(url), None) }
    }
}

/// Content attached to a machine as a disk or a CD-ROM. The id has a meaning only to its backend.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Volume {
    /// The backend's name for the volume: a path or an object name.
    pub id: String,
    /// Size seen by the guest, in bytes.
    pub virtual_size: u64,
}

impl Volume {
    /// Creates a volume from the backend's name for it, and the size that the guest sees in bytes.
    pub fn new(id: impl Into<String>, virtual_size: u64) -> Self {
        Self { id: id.into(), virtual_size }
    }
}

/// An imported source.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Imported {
    /// The volume.
    pub volume: Volume,
    /// The content that the volume was made from, for the provenance; `None` for a blank disk.
    pub input: Option<InputRecord>,
}

impl Imported {
    /// Creates what an import returns: the volume, and the content it was made from; `None` for a blank disk.
    pub fn new(volume: Volume, input: impl Into<Option<InputRecord>>) -> Self {
        Self { volume, input: input.into() }
    }
}

/// A disk of a machine.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct MachineDisk {
    /// The name of the disk, unique in the machine.
    pub name: String,
    /// The bus that the disk is attached to.
    pub bus: Bus,
    /// The content of the disk.
    pub volume: Volume,
}

impl MachineDisk {
    /// Creates a disk of this name with the content of a volume.
    pub fn new(name: impl Into<String>, bus: Bus, volume: Volume) -> Self {
        Self { name: name.into(), bus, volume }
    }
}

/// The files of a NoCloud seed (cloud-init documentation, datasource NoCloud).
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Seed {
    /// `meta-data`.
    pub meta_data: String,
    /// `user-data`.
    pub user_data: Vec<u8>,
    /// `network-config`.
    pub network_config: Option<String>,
    /// The same files as a medium: a file system labelled `cidata`, for backends that attach media.
    pub image: Arc<[u8]>,
}

impl fmt::Debug for Seed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // User data may contain secrets.
        f.debug_struct("Seed").field("meta_data", &self.meta_data).finish_non_exhaustive()
    }
}

impl Seed {
    /// Creates a seed from these files and a medium that contains them.
    pub fn new(
        meta_data: String,
        user_data: Vec<u8>,
        network_config: Option<String>,
        image: Arc<[u8]>,
    ) -> Self {
        Self { meta_data, user_data, network_config, image }
    }
}

/// Specification of a machine to create.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct MachineSpec {
    /// The name of the machine: a Name, unique in the lab.
    pub name: String,
    /// Number of CPU cores.
    pub cpus: u32,
    /// Memory in bytes.
    pub memory: u64,
    /// The firmware that the machine boots with.
    pub firmware: Firmware,
    /// Whether the machine has a TPM 2.0.
    pub tpm: bool,
    /// The disks; the machine boots from the first.
    pub disks: Vec<MachineDisk>,
    /// The NICs.
    pub nics: Vec<PlannedNic>,
    /// The guest ports that [`Machine::dial`](super::Machine::dial) must be able to reach.
    pub ports: Vec<u16>,
    /// The NoCloud seed, if any.
    pub seed: Option<Seed>,
    /// CD-ROMs in order, read-only: volumes imported as [`VolumeKind::Cdrom`]. If the disk is not bootable, the machine boots from
    /// the first of them. Needs [`Capability::Isos`](crate::capability::Capability::Isos).
    pub cdroms: Vec<Volume>,
    /// The image of a 1.44 MB floppy disk. Needs [`Capability::Floppy`](crate::capability::Capability::Floppy).
    pub floppy: Option<Arc<[u8]>>,
    /// The VM of a module whose state outside its disks (firmware variables, TPM) the machine starts with, where that VM has any.
    pub state_of: Option<PlannedBuildRef>,
}

impl MachineSpec {
    /// Creates the specification of a machine with BIOS and nothing attached.
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
    /// The guest powered off.
    PoweredOff,
    /// [`Machine::stop`](super::Machine::stop) killed it, for this reason ("did not power off within 60s", "an immediate stop was requested").
    Killed {
        /// The reason.
        why: String,
    },
    /// The machine died.
    Died {
        /// The cause.
        cause: Death,
        /// Details from the hypervisor: a signal, the last lines of its output.
        detail: String,
    },
    /// The machine ended while no process watched it, and the hypervisor does not record how.
    Unobserved,
}

/// How a machine died.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Death {
    /// The hypervisor's process exited, or something other than Rudder killed it.
    Hypervisor,
    /// The guest's kernel panicked.
    GuestPanic,
    /// A disk could not be read or written on the host.
    IoError,
    /// The host has no space left for a disk.
    HostDiskFull,
}

/// A module to publish.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ModuleDraft {
    /// The name of the module.
    pub name: String,
    /// The VMs, with what [`Machine::capture`](super::Machine::capture) returned.
    pub machines: Vec<TemplateMachine>,
    /// The networks that clones get.
    pub network: TemplateNetwork,
    /// How to build the module again.
    pub provenance: Provenance,
}

impl ModuleDraft {
    /// Creates a draft of a module with these VMs.
    pub fn new(
        name: impl Into<String>,
        machines: Vec<TemplateMachine>,
        network: impl Into<TemplateNetwork>,
        provenance: Provenance,
    ) -> Self {
        Self { name: name.into(), machines, network: network.into(), provenance }
    }

    /// Converts the draft to a module published now. `digest` identifies its content.
    #[must_use]
    pub fn into_module(self, digest: Digest) -> Module {
        let Self { name, machines, network, provenance } = self;
        let created = Timestamp::now();
        Module { name, digest, created, machines, network, provenance, path: None }
    }
}

/// Report of what exists on the host and what is missing.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct HostReport {
    /// One entry for each requirement that was checked.
    pub findings: Vec<HostFinding>,
}

impl HostReport {
    /// Returns whether everything that is required is present.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.findings.iter().all(|finding| finding.present || !finding.required)
    }
}

/// A single prerequisite of a backend, required or optional.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct HostFinding {
    /// What was checked: `qemu-system-x86_64`, `accelerator`…
    pub what: String,
    /// Whether it is present.
    pub present: bool,
    /// Whether the backend cannot work without it.
    pub required: bool,
    /// Its version, or what is wrong with it.
    pub detail: String,
    /// How to fix it.
    pub help: Option<String>,
}

impl HostFinding {
    /// Creates the finding that something is present, with its version. It counts as required.
    pub fn present(what: impl Into<String>, detail: impl Into<String>) -> Self {
        let (what, detail) = (what.into(), detail.into());
        Self { what, present: true, required: true, detail, help: None }
    }

    /// Creates the finding that something is missing or unusable, with what is wrong with it. It counts as required.
    pub fn missing(what: impl Into<String>, detail: impl Into<String>) -> Self {
        Self { present: false, ..Self::present(what, detail) }
    }

    /// Marks it as something that the backend can work without.
    #[must_use]
    pub fn optional(mut self) -> Self {
        self.required = false;
        self
    }

    /// Sets how to fix it.
    #[must_use]
    pub fn help(mut self, help: impl Into<Option<String>>) -> Self {
        self.help = help.into();
        self
    }
}

/// Report of what was removed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ReapReport {
    /// One entry per removed item: "process 1234 of lab x", "lab x", "download y".
    pub removed: Vec<String>,
    /// Bytes of disk space freed.
    pub freed: u64,
    /// What should have been removed but could not be, and why.
    pub failed: Vec<String>,
    /// What was left in place because too little is known about it or it appears to be damaged: why it stays, and how to repair it.
    #[serde(default)]
    pub warnings: Vec<String>,
}

impl ReapReport {
    /// Merges another report into this one.
    pub fn merge(&mut self, other: Self) {
        self.removed.extend(other.removed);
        self.freed += other.freed;
        self.failed.extend(other.failed);
        // Both reports may contain the same warning.
        for warning in other.warnings {
            if !self.warnings.contains(&warning) {
                self.warnings.push(warning);
            }
        }
    }
}
