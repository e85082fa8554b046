//! The result of a build: template VMs, captured disks, provenance. `module.json` is this, as JSON.

use crate::{
    digest::Digest,
    event::Timing,
    plan::{Bus, Firmware, PlannedNetwork, PlannedNic},
};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// A module: halted template VMs, ready to be cloned as a group.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Module {
    /// The version of this format; 1.
    pub format: u32,
    /// Its name, a Name.
    pub name: String,
    /// The digest of what was published: the same for the same disks and templates.
    pub digest: Digest,
    /// When it was published.
    pub created: jiff::Timestamp,
    /// Its VMs, in the manifest's order.
    pub machines: Vec<TemplateMachine>,
    /// The networks that its clones get.
    pub network: PlannedNetwork,
    /// How to make it again.
    pub provenance: Provenance,
    /// Where its `module.json` is, for backends that have files. Not part of the record.
    #[serde(skip)]
    pub path: Option<PathBuf>,
}

/// A halted VM of a module, with the base values that clones get.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
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
    /// Its cards.
    pub nics: Vec<PlannedNic>,
    /// Its disks; the first boots.
    pub disks: Vec<CapturedDisk>,
    /// What it keeps outside its disks.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub state: Vec<CapturedState>,
    /// Carried along for user interfaces.
    #[serde(default)]
    pub invisible: bool,
}

/// A disk after capture. `file` is relative to the directory of `module.json` once published.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
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
    /// What the file takes, in bytes.
    pub size: u64,
    /// sha256 of the file.
    pub sha256: Digest,
}

/// What a machine keeps outside its disks, after capture. `file` as in [`CapturedDisk`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CapturedState {
    /// What it is.
    pub kind: StateKind,
    /// The file or object that holds it.
    pub file: String,
    /// Its format: `raw`, `qcow2`, `swtpm`…
    pub format: String,
    /// What the file takes, in bytes.
    pub size: u64,
    /// sha256 of the file.
    pub sha256: Digest,
}

/// What a machine keeps outside its disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
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
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Provenance {
    /// The manifest as given, secrets masked.
    pub manifest: String,
    /// The digest of the plan.
    pub plan: Digest,
    /// Every input, with what it was.
    pub inputs: Vec<InputRecord>,
    /// Versions: `rudder`, the backend, what it drives.
    pub versions: std::collections::BTreeMap<String, String>,
    /// How long each phase took.
    pub timings: Vec<Timing>,
    /// Why it cannot be repeated from its manifest alone; empty: it can.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub not_repeatable: Vec<String>,
    /// What was likely wrong and did not stop the build: a machine that had to be killed at its end…
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

impl Provenance {
    /// The record of a build of this manifest (secrets masked) and plan, with nothing else known yet.
    pub fn new(manifest: impl Into<String>, plan: Digest) -> Self {
        Self {
            manifest: manifest.into(),
            plan,
            inputs: Vec::new(),
            versions: std::collections::BTreeMap::new(),
            timings: Vec::new(),
            not_repeatable: Vec::new(),
            warnings: Vec::new(),
        }
    }
}

/// An input of a build: what was asked for, and what came.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InputRecord {
    /// What it is for: `source of VM web`, `file app.tar`…
    pub role: String,
    /// Its URL, or `module NAME/VM`. Credentials in it are masked.
    pub url: String,
    /// Bytes as served.
    pub size: u64,
    /// sha256 of the bytes as served.
    pub sha256: Digest,
}

impl InputRecord {
    /// The role of an ISO. It shapes a build and is not needed afterwards: how long it stays cached is up to `isoCacheTTL`,
    /// whatever was built of it.
    pub const ISO: &'static str = "ISO";
}
