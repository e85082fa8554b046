//! Labs that were kept for inspection, and the record of how to log in to their machines.

use super::LabId;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::{
    io::Write as _,
    path::{Path, PathBuf},
};

/// The record in the directory of a kept lab.
const RECORD: &str = "kept.json";

/// A lab that was kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct KeptLab {
    /// Its id, for [`Backend::remove_lab`](super::Backend::remove_lab).
    pub id: LabId,
    /// How to get into each machine, a line each.
    pub access: Vec<String>,
    /// The login of each machine, as far as the build that kept the lab wrote it down.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub logins: Vec<KeptLogin>,
}

/// How to log in to a machine of a kept lab.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct KeptLogin {
    /// The VM.
    pub vm: String,
    /// The user.
    pub username: String,
    /// The port of its SSH server, in the guest.
    pub port: u16,
    /// The file with the private key; absent where the manifest's author has the key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<PathBuf>,
}

impl KeptLab {
    /// A kept lab, and how to get into its machines.
    #[must_use]
    pub fn new(id: LabId, access: Vec<String>) -> Self {
        Self { id, access, logins: Vec::new() }
    }

    /// The kept lab in this directory, as the build that kept it wrote it down; with `access` where none did. For
    /// [`Backend::kept_labs`](super::Backend::kept_labs).
    #[must_use]
    pub fn read(id: LabId, directory: &Path, access: Vec<String>) -> Self {
        let record = std::fs::read(directory.join(RECORD)).ok();
        let recorded = record.and_then(|record| serde_json::from_slice::<Self>(&record).ok());
        // A record of another lab says nothing about this one.
        recorded.filter(|lab| lab.id == id).unwrap_or_else(|| Self::new(id, access))
    }

    /// Writes it down in the lab's directory, for this user only.
    pub(crate) fn write(&self, directory: &Path) -> Result<()> {
        let failed = |error| Error::io(format_args!("write {}", directory.join(RECORD).display()), error);
        let mut file = tempfile::NamedTempFile::new_in(directory).map_err(failed)?;
        serde_json::to_writer(&mut file, self).map_err(|error| failed(error.into()))?;
        file.flush().map_err(failed)?;
        file.persist(directory.join(RECORD)).map_err(|error| failed(error.error))?;
        Ok(())
    }
}

impl KeptLogin {
    pub(crate) fn new(vm: &str, username: &str, port: u16, key: Option<PathBuf>) -> Self {
        Self { vm: vm.to_owned(), username: username.to_owned(), port, key }
    }
}
