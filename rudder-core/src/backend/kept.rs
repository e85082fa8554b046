//! The record of a kept lab: how to log in to its machines.

use super::LabId;
use crate::{Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// The format version of the record; later versions are not read.
const FORMAT: u32 = 1;

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

/// What is written: the record of a version that wrote none has no format.
#[derive(Serialize, Deserialize)]
struct Record {
    #[serde(default = "first")]
    format: u32,
    #[serde(flatten)]
    lab: KeptLab,
}

fn first() -> u32 {
    FORMAT
}

impl KeptLab {
    /// The name of the [file](super::Lab::store_file) of the lab with the record.
    pub const FILE: &str = "kept.json";

    /// Creates a kept lab with instructions on how to access its machines.
    #[must_use]
    pub fn new(id: LabId, access: Vec<String>) -> Self {
        Self { id, access, logins: Vec::new() }
    }

    /// Reads the record of a lab.
    ///
    /// # Errors
    /// `Unsupported` for a record of a later version; `InvalidInput` for anything else that is not the record of this lab.
    pub fn from_record(id: &LabId, record: &[u8]) -> Result<Self> {
        let damaged = |found: String| {
            let message = format!("expected the record of the kept lab {id}, but found {found}");
            Error::new(ErrorKind::InvalidInput, message)
        };
        let value: serde_json::Value = serde_json::from_slice(record)
            .map_err(|error| damaged("something else".to_owned()).with_source(error))?;
        match value.get("format").and_then(serde_json::Value::as_u64) {
            Some(format) if format > u64::from(FORMAT) => {
                let message = format!(
                    "expected the record of the kept lab {id} to have format {FORMAT} or earlier, but found format {format}"
                );
                return Err(Error::new(ErrorKind::Unsupported, message)
                    .with_help("use the version of rudder that kept the lab, or a later one"));
            }
            _ => {}
        }
        let Record { lab, .. } = serde_json::from_value(value)
            .map_err(|error| damaged("something else".to_owned()).with_source(error))?;
        match lab.id == *id {
            true => Ok(lab),
            // A record of another lab says nothing about this one.
            false => Err(damaged(format!("that of lab {}", lab.id))),
        }
    }

    /// Returns the record, as [`from_record`](Self::from_record) reads it.
    ///
    /// # Errors
    /// `Internal` when the path of a key cannot be written as JSON, because it is not UTF-8.
    pub fn to_record(&self) -> Result<Vec<u8>> {
        let record = Record { format: FORMAT, lab: self.clone() };
        serde_json::to_vec_pretty(&record).map_err(|error| {
            Error::new(ErrorKind::Internal, format!("cannot write the record of the kept lab {}", self.id))
                .with_source(error)
        })
    }
}

impl KeptLogin {
    pub(crate) fn new(vm: &str, username: &str, port: u16, key: Option<PathBuf>) -> Self {
        Self { vm: vm.to_owned(), username: username.to_owned(), port, key }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn id() -> LabId {
        LabId::parse("web-0123456789ab").unwrap()
    }

    #[test]
    fn a_record_is_read_as_it_was_written() {
        let mut lab = KeptLab::new(id(), vec!["web: ssh".to_owned()]);
        lab.logins.push(KeptLogin::new("web", "root", 22, Some("/labs/a/login.key".into())));
        assert_eq!(KeptLab::from_record(&id(), &lab.to_record().unwrap()).unwrap(), lab);
    }

    #[test]
    fn a_record_without_a_format_is_of_the_first() {
        let record = br#"{"id": "web-0123456789ab", "access": ["a"], "logins": [{"vm": "a", "username": "b", "port": 22}]}"#;
        assert_eq!(KeptLab::from_record(&id(), record).unwrap().logins[0].username, "b");
    }

    #[test]
    fn rejects_records_of_later_formats_and_of_other_labs() {
        let later = KeptLab::from_record(&id(), br#"{"format": 2}"#).unwrap_err();
        assert_eq!(later.kind(), ErrorKind::Unsupported);
        assert!(later.to_string().contains("but found format 2"), "{later}");
        let other = KeptLab::new(LabId::parse("db-0123456789ab").unwrap(), Vec::new()).to_record().unwrap();
        let other = KeptLab::from_record(&id(), &other).unwrap_err();
        assert!(other.to_string().contains("that of lab db-0123456789ab"), "{other}");
        assert_eq!(KeptLab::from_record(&id(), b"[").unwrap_err().kind(), ErrorKind::InvalidInput);
    }
}
