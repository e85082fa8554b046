//! Records in the directory of a lab, which a process of another version may have written.

use rudder_core::{Error, ErrorKind, Result};
use serde::de::DeserializeOwned;
use std::path::Path;

/// Parses a record with a format number. `what` and `path` name it in messages; `known` is the latest format that can be read, and
/// `help` says what to do about a later one.
///
/// # Errors
/// `Unsupported` for a later format; `InvalidInput` for what is not a record.
pub(crate) fn parse<T: DeserializeOwned>(
    what: &str,
    path: &Path,
    text: &[u8],
    known: u32,
    help: &'static str,
) -> Result<T> {
    let path = path.display();
    let no_record = |error| {
        let message = format!("expected a {what} in {path}, but found something else");
        Error::new(ErrorKind::InvalidInput, message).with_source(error)
    };
    let value: serde_json::Value = serde_json::from_slice(text).map_err(no_record)?;
    // The number first: this version cannot judge what else a later version writes.
    match value.get("format").and_then(serde_json::Value::as_u64) {
        Some(format) if format > u64::from(known) => {
            let message = format!(
                "expected a {what} of format {known} or earlier in {path}, but found format {format}"
            );
            Err(Error::new(ErrorKind::Unsupported, message).with_help(help))
        }
        _ => serde_json::from_value(value).map_err(no_record),
    }
}
