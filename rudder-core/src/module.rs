//! The result of a build: template VMs, captured disks, provenance. `module.json` is this, as JSON.

use crate::{
    Error, ErrorKind, Result,
    digest::Digest,
    event::Timing,
    hardware::{Bus, Firmware},
    plan::{PlannedNetwork, PlannedNic},
};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// A module: halted template VMs, ready to be cloned as a group.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Module {
    /// The version of this format; at most [`FORMAT`](Self::FORMAT).
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

impl Module {
    /// The version of the format that is written, and the latest that is read.
    pub const FORMAT: u32 = 1;

    /// What helps when a module is damaged.
    pub const REPAIR: &str = "restore the file from a copy, or build the module again";

    /// Reads a record; `path` is where it is, for messages.
    ///
    /// # Errors
    /// `Unsupported` for a later format; `InvalidInput` for what is no record, and for one that names files elsewhere.
    pub fn from_record(path: &Path, bytes: &[u8]) -> Result<Self> {
        let no_json = |error| Self::damaged(path, "it is not what was written").with_source(error);
        let value: serde_json::Value = serde_json::from_slice(bytes).map_err(no_json)?;
        // The number first: what else a later version writes is not for this one to judge.
        match value.get("format").and_then(serde_json::Value::as_u64) {
            None | Some(0) => return Err(Self::damaged(path, "it has no format number")),
            Some(format) if format > u64::from(Self::FORMAT) => {
                let message = format!(
                    "expected a module of format {} or earlier in {}, but found format {format}",
                    Self::FORMAT,
                    path.display()
                );
                return Err(Error::new(ErrorKind::Unsupported, message).with_help(
                    "a later version of Rudder made this module: use that version, or build the module again",
                ));
            }
            Some(_) => {}
        }
        let module: Self = serde_json::from_value(value).map_err(no_json)?;
        for machine in &module.machines {
            let disks = machine.disks.iter().map(|disk| (&disk.file, &disk.format));
            let state = machine.state.iter().map(|state| (&state.file, &state.format));
            for (file, format) in disks.chain(state) {
                if !is_file_name(file) {
                    return Err(Self::damaged(
                        path,
                        &format!("it names the file {file:?}, which is not beside it"),
                    ));
                }
                if !crate::units::is_name(format) {
                    return Err(Self::damaged(path, &format!("it names the format {format:?}")));
                }
            }
        }
        Ok(module)
    }

    /// The error of a record that cannot be used; `found` says what is wrong with it.
    #[must_use]
    pub fn damaged(path: &Path, found: &str) -> Error {
        let message = format!("expected the record of a module in {}, but {found}", path.display());
        Error::new(ErrorKind::InvalidInput, message).with_help(Self::REPAIR)
    }

    /// The files beside its record, with their sizes in bytes.
    pub fn files(&self) -> impl Iterator<Item = (&str, u64)> {
        self.machines.iter().flat_map(|machine| {
            let disks = machine.disks.iter().map(|disk| (disk.file.as_str(), disk.size));
            disks.chain(machine.state.iter().map(|state| (state.file.as_str(), state.size)))
        })
    }
}

/// Whether this is the name of a file, and no path.
fn is_file_name(text: &str) -> bool {
    !text.contains(['/', '\0']) && !matches!(text, "" | "." | "..")
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
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
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
