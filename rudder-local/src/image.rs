//! Disk images, through qemu-img: overlays on images in the store, and their backing files.

mod base;
mod map;
#[cfg(test)]
mod tests;

pub(crate) use {
    base::Base,
    map::{Extent, map},
};

use crate::lab_storage::LabStorage;
use rudder_core::{Error, ErrorKind, Result, units::human_bytes};
use std::path::Path;

/// The size of a sector; sizes of disks are multiples of it.
const SECTOR: u64 = 512;

/// The backing file of an overlay.
#[derive(Debug)]
pub struct Backing<'a> {
    /// Path of the file; absolute, so that QEMU cannot interpret it as anything else.
    pub path: &'a Path,
    /// Its format, in QEMU's naming: never guessed from the content, which a guest may have written.
    pub format: &'a str,
}

/// Creates a qcow2 file in the lab: an overlay on another image, which is never changed, or a blank disk.
pub async fn create(storage: &LabStorage, file: &str, backing: Option<Backing<'_>>, size: u64) -> Result<()> {
    let mut command = storage.qemu_img().args(["create", "-q", "-f", "qcow2"]);
    if let Some(backing) = backing {
        command = command.args(["-F", backing.format, "-b"]).args([backing.path]);
    }
    let finished = command.args([file.to_owned(), size.to_string()]).run(None).await?;
    finished.success("create a disk").map(drop)
}

/// Returns the size of a new disk: as requested, but never smaller than its backing file.
pub fn size_over(image: u64, requested: Option<u64>) -> Result<u64> {
    match requested {
        Some(requested) if requested < image => Err(Error::new(
            ErrorKind::InvalidInput,
            format!(
                "expected a disk at least as large as its image, {}, but found {}",
                human_bytes(image),
                human_bytes(requested)
            ),
        )
        .with_help(format!("set the disk's size to {} or more", rounded(image)))),
        requested => Ok(requested.unwrap_or(image).next_multiple_of(SECTOR)),
    }
}

/// Rounds a size up to one that is written with a whole number.
fn rounded(size: u64) -> String {
    let unit = if size >= 10 << 30 { 1 << 30 } else { 1 << 20 };
    human_bytes(size.next_multiple_of(unit))
}

/// Checks the structure of a captured disk.
pub async fn check(storage: &LabStorage, file: &str) -> Result<()> {
    let finished = storage.qemu_img().args(["check", "-q", "-f", "qcow2", file]).run(None).await?;
    finished.success("check the captured disk").map(drop)
}
