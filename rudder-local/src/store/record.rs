//! Records of the index, which detect their own damage: each carries a digest of its name and content.
//!
//! A record that is missing, damaged, or not a regular file counts as absent, and the store recreates it. Records written
//! before there were seals have none, and are accepted as they are.

use super::durable::{self, io_error};
use rudder_core::{Error, ErrorKind, Result, digest::Digest};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;
use std::{
    io::{self, Read},
    path::Path,
};

/// The field that holds the digest.
const SEAL: &str = "seal";
/// The largest size of a record, in bytes; real ones are far smaller.
const MAX_SIZE: u64 = 1 << 20;

/// Writes a record and its seal. Readers see either the old record or the new one.
pub(super) fn write<T: Serialize>(path: &Path, record: &T) -> Result<()> {
    let encode = |error| {
        Error::new(ErrorKind::Internal, format!("cannot encode {}", path.display())).with_source(error)
    };
    let mut value = serde_json::to_value(record).map_err(encode)?;
    let digest = seal(path, &value);
    if let Value::Object(fields) = &mut value {
        fields.insert(SEAL.to_owned(), Value::String(digest.to_string()));
    }
    durable::write_json(path, &value)
}

/// Reads a record. `None` when it is absent or damaged.
pub(super) fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    let mut text = Vec::new();
    match durable::open_regular(path).and_then(|file| file.take(MAX_SIZE).read_to_end(&mut text)) {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            return Err(io_error("read", path, error));
        }
        Err(error) => {
            warn_ignored(path, &error);
            return Ok(None);
        }
    }
    match parse(path, &text) {
        Ok(record) => Ok(Some(record)),
        Err(why) => {
            warn_ignored(path, &why);
            Ok(None)
        }
    }
}

/// Returns whether something exists at the path of a record that cannot be read as one.
pub(super) fn is_damaged<T: DeserializeOwned>(path: &Path) -> Result<bool> {
    Ok(path.symlink_metadata().is_ok() && read::<T>(path)?.is_none())
}

fn parse<T: DeserializeOwned>(path: &Path, text: &[u8]) -> Result<T, String> {
    let mut value: Value = serde_json::from_slice(text).map_err(|error| error.to_string())?;
    let claimed = value.as_object_mut().and_then(|fields| fields.remove(SEAL));
    if let Some(claimed) = claimed {
        let found = seal(path, &value).to_string();
        if claimed.as_str() != Some(&found) {
            return Err(format!("expected seal {claimed}, but found {found}"));
        }
    }
    serde_json::from_value(value).map_err(|error| error.to_string())
}

/// Returns the digest of a record without its seal. Fields are ordered by name, whatever their order in the file.
fn seal(path: &Path, record: &Value) -> Digest {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    Digest::of(format!("{name}\n{record}").as_bytes())
}

fn warn_ignored(path: &Path, why: &dyn std::fmt::Display) {
    tracing::warn!(path = %path.display(), %why, "ignoring a damaged record");
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde::Deserialize;
    use std::fs;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Sample {
        count: u64,
        what: Option<String>,
    }

    #[test]
    fn a_changed_or_truncated_record_is_absent() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        let sample = Sample { count: 17, what: Some("x".into()) };
        write(&path, &sample).unwrap();
        assert_eq!(read(&path).unwrap().as_ref(), Some(&sample));
        let text = fs::read(&path).unwrap();
        for at in 0..text.len() {
            let mut changed = text.clone();
            changed[at] ^= 1;
            fs::write(&path, &changed).unwrap();
            // A changed space between fields has no effect.
            let found = read::<Sample>(&path).unwrap();
            assert!(found.is_none_or(|found| found == sample), "byte {at}");
            fs::write(&path, &text[..at]).unwrap();
            let found = read::<Sample>(&path).unwrap();
            assert!(found.is_none_or(|found| found == sample && at + 1 >= text.len()), "cut to {at}");
        }
        // The record of something else.
        fs::write(&path, &text).unwrap();
        fs::copy(&path, dir.path().join("b.json")).unwrap();
        assert_eq!(read::<Sample>(&dir.path().join("b.json")).unwrap(), None);
    }

    #[test]
    fn a_record_without_a_seal_is_accepted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        durable::write_json(&path, &Sample { count: 1, what: None }).unwrap();
        assert_eq!(read(&path).unwrap(), Some(Sample { count: 1, what: None }));
    }

    #[test]
    fn anything_but_a_regular_file_is_absent() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        assert_eq!(read::<Sample>(&path).unwrap(), None);
        fs::create_dir(&path).unwrap();
        assert_eq!(read::<Sample>(&path).unwrap(), None);
        let (link, fifo) = (dir.path().join("link"), dir.path().join("fifo"));
        write(&dir.path().join("real"), &Sample { count: 1, what: None }).unwrap();
        std::os::unix::fs::symlink("real", &link).unwrap();
        assert_eq!(read::<Sample>(&link).unwrap(), None);
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0)
            .unwrap();
        assert_eq!(read::<Sample>(&fifo).unwrap(), None);
    }
}
