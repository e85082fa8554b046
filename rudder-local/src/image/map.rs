//! The extents of an image, as `qemu-img map` reports them.

use crate::lab_storage::LabStorage;
use rudder_core::{Error, ErrorKind, Result};
use serde::Deserialize;
use std::path::Path;

/// An extent of the disk, in bytes.
#[derive(Debug, Deserialize)]
pub(crate) struct Extent {
    pub(crate) start: u64,
    pub(crate) length: u64,
    /// Whether it reads as zeros.
    pub(crate) zero: bool,
    /// Its offset in the file; `None` if it is compressed or not in the file.
    pub(crate) offset: Option<u64>,
}

/// Passes each extent of an image to a function, in order.
pub(crate) async fn map(
    storage: &LabStorage,
    image: &Path,
    format: &str,
    mut visit: impl FnMut(Extent) + Send,
) -> Result<()> {
    let mut malformed = false;
    // A large disk with data everywhere has millions of them, so none is kept.
    let mut parse_line = |line: &[u8]| {
        let text = line.trim_ascii();
        let text = text.strip_prefix(b"[").unwrap_or(text);
        let text = text.strip_suffix(b"]").unwrap_or(text);
        let text = text.strip_suffix(b",").unwrap_or(text);
        match serde_json::from_slice(text) {
            Ok(extent) => visit(extent),
            Err(_) => malformed |= !text.is_empty(),
        }
    };
    let mut line = Vec::new();
    let command = storage.qemu_img().args(["map", "--output=json", "-f", format]).args([image]);
    let finished = command
        .run_watched(None, |mut piece| {
            while let Some(end) = piece.iter().position(|byte| *byte == b'\n') {
                line.extend_from_slice(&piece[..end]);
                parse_line(&line);
                line.clear();
                piece = &piece[end + 1..];
            }
            line.extend_from_slice(piece);
        })
        .await?;
    parse_line(&line);
    finished.success("read the extents of the disk")?;
    if malformed {
        let message = "expected a list of extents from qemu-img map, but found something else";
        return Err(Error::new(ErrorKind::Protocol, message));
    }
    Ok(())
}
