//! Types of the records that are written to disk, separate from those in memory: a plan, an event or a module can change without
//! changing a file, and a file of an earlier version stays readable.
//!
//! Each record has a format number, and is converted to and from the type that the rest of the crate uses. A record of a later
//! format is rejected, whatever else it contains. Records of a single backend (labs, caches, locks) belong to its crate.

mod module;

use crate::{
    Error, ErrorKind, Result,
    digest::Digest,
    module::{Module, TemplateMachine, TemplateNetwork},
};
use module::{ModuleRecord, digested};
use std::path::Path;

/// Conversion of modules to and from their record, `module.json`.
impl Module {
    /// Format version that is written, and the latest one that can be read.
    pub const FORMAT: u32 = 2;

    /// Reads a record; `path` is its path, for messages.
    ///
    /// # Errors
    /// `Unsupported` for a later format; `InvalidInput` for bytes that are not a record, and for a record that names files
    /// elsewhere.
    pub fn from_record(path: &Path, bytes: &[u8]) -> Result<Self> {
        let not_a_record = |error| Self::damaged(path, "it cannot be parsed").with_source(error);
        let value: serde_json::Value = serde_json::from_slice(bytes).map_err(not_a_record)?;
        // The format number is checked first: this version cannot judge what else a later version writes.
        match value.get("format").and_then(serde_json::Value::as_u64) {
            None | Some(0) => return Err(Self::damaged(path, "it has no format number")),
            Some(format) if format > u64::from(Self::FORMAT) => {
                let message = format!(
                    "expected a module of format {} or earlier in {}, but found format {format}",
                    Self::FORMAT,
                    path.display()
                );
                return Err(Error::new(ErrorKind::Unsupported, message).with_help(
                    "a later version of Rudder created this module: use that version, or build the module \
                     again",
                ));
            }
            Some(_) => {}
        }
        let record: ModuleRecord = serde_json::from_value(value).map_err(not_a_record)?;
        record.try_into().map_err(|found: module::InvalidRecord| Self::damaged(path, &found.to_string()))
    }

    /// Encodes the module as its record: JSON that ends with a line feed. [`path`](Self::path) is not part of it.
    ///
    /// # Errors
    /// `Internal` when the module cannot be encoded.
    pub fn to_record(&self) -> Result<String> {
        let record = serde_json::to_string_pretty(&ModuleRecord::from(self.clone()));
        record.map(|text| text + "\n").map_err(|error| not_encoded(&self.name, error))
    }

    /// Computes the digest of a module of this name: the same for the same disks, templates and networks.
    ///
    /// # Errors
    /// `Internal` when the module cannot be encoded.
    pub fn content_digest(
        name: &str,
        machines: &[TemplateMachine],
        network: &TemplateNetwork,
    ) -> Result<Digest> {
        let text = digested(name, machines, network).map_err(|error| not_encoded(name, error))?;
        Ok(Digest::of(text.as_bytes()))
    }
}

fn not_encoded(module: &str, error: serde_json::Error) -> Error {
    Error::new(ErrorKind::Internal, format!("cannot encode module {module}")).with_source(error)
}
