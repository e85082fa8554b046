//! Labs that were kept for inspection, and the record of how to log in to their machines.

use super::LabId;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::{
    io::Write as _,
    path::{Path, PathBuf},
};

/// Name of the record in the directory of a kept lab.
const RECORD: &str = "kept.json";

/// A lab that was kept for inspection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct KeptLab {
    /// The id of the lab, for [`Backend::remove_lab`](super::Backend::remove_lab).
    pub id: LabId,
    /// How to access each machine, one line each.
    pub access: Vec<String>,
    /// The login of each machine, where the build that kept the lab recorded it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub logins: Vec<KeptLogin>,
}

/// How to log in to a machine of a kept lab.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct KeptLogin {
    /// The name of the VM.
    pub vm: String,
    /// The name of the user.
    pub username: String,
    /// The port of the SSH server in the guest.
    pub port: u16,
    /// The file with the private key; absent where the manifest's author has the key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<PathBuf>,
}

impl KeptLab {
    /// Creates a kept lab with instructions on how to access its machines.
    #[must_use]
    pub fn new(id: LabId, access: Vec<String>) -> Self {
        Self { id, access, logins: Vec::new() }
    }

    /// Reads the record that the build left in this directory when it kept the lab; uses `access` where there is no record. For
    /// [`Backend::kept_labs`](super::Backend::kept_labs).
    #[must_use]
    pub fn read(id: LabId, directory: &Path, access: Vec<String>) -> Self {
        let record = std::fs::read(directory.join(RECORD)).ok();
        let recorded = record.and_then(|record| serde_json::from_slice::<Self>(&record).ok());
        // A record of another lab says nothing about this one.
        recorded.filter(|lab| lab.id == id).unwrap_or_else(|| Self::new(id, access))
    }

    /// Writes the record into the lab's directory, readable by this user only.
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
