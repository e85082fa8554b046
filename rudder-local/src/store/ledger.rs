//! Ledgers: records about labs that let other processes clean up after a dead owner.

use super::{
    Use,
    durable::{self, io_error},
    identity::DirectoryIdentity,
    process::ProcessIdentity,
};
use rudder_core::{
    Error, ErrorKind, Result,
    backend::{LabId, LabInfo, LabState},
    timestamp::Timestamp,
};
use serde::{Deserialize, Serialize};
use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// The name of the ledger's file, in the directory of its lab.
pub(super) const LEDGER: &str = "ledger.json";

/// The record about a lab.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Ledger {
    /// Id of the lab.
    pub id: LabId,
    /// Its purpose: the name of a build or clone.
    pub purpose: String,
    /// The process that opened it.
    pub owner: ProcessIdentity,
    /// Time of creation.
    pub created: Timestamp,
    /// Whether it was kept: it then stays, whatever happens to its owner.
    pub kept: bool,
    /// When a kept lab expires.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires: Option<Timestamp>,
    /// Processes that belong to it.
    pub processes: Vec<RecordedProcess>,
    /// Blobs and modules that it needs.
    pub uses: Vec<Use>,
    /// The directory that the ledger was written for: in a copy of the store, its processes are those of the original. `None` in
    /// ledgers of earlier versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub directory: Option<DirectoryIdentity>,
}

/// A process of a lab.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordedProcess {
    /// Its role, such as `qemu of web`.
    pub role: String,
    /// Its identity.
    #[serde(flatten)]
    pub identity: ProcessIdentity,
}

/// A lab found in the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LabEntry {
    /// Its id: the name of its directory.
    pub id: LabId,
    /// Its directory.
    pub path: PathBuf,
    /// Whether it is in use.
    pub state: LabState,
    /// Its ledger; `None` when that cannot be read.
    pub ledger: Option<Ledger>,
}

impl LabEntry {
    /// Returns the lab as [`Backend::labs`](rudder_core::backend::Backend::labs) lists it.
    #[must_use]
    pub fn info(&self) -> LabInfo {
        let name = self.ledger.as_ref().map_or("", |ledger| &ledger.purpose);
        LabInfo::new(self.id.clone(), name, self.state)
    }
}

/// Reads the ledger of a lab; `None` when the lab itself no longer exists.
///
/// # Errors
/// `InvalidInput` when it is missing or cannot be read; the message names the file.
pub(super) fn read(lab: &Path, id: &str) -> Result<Option<Ledger>> {
    let path = lab.join(LEDGER);
    let damaged = |found: &str| {
        let message = format!("expected the ledger of lab {id} in {}, but {found}", path.display());
        Error::new(ErrorKind::InvalidInput, message).with_help(format!(
            "remove {} by hand once nothing of the lab runs any more; until then it is kept, with all cached inputs",
            lab.display()
        ))
    };
    let bytes = match durable::read_regular(&path) {
        Ok(bytes) => bytes,
        Err(_) if fs::symlink_metadata(lab).is_err() => return Ok(None),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(damaged("found none")),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            return Err(io_error("read", &path, error));
        }
        Err(error) => return Err(damaged("it cannot be read").with_source(error)),
    };
    let ledger: Ledger = serde_json::from_slice(&bytes)
        .map_err(|error| damaged("its content is invalid").with_source(error))?;
    if ledger.id.as_str() != id {
        return Err(damaged(&format!("it belongs to lab {}", ledger.id)));
    }
    Ok(Some(ledger))
}
