//! Disk images, through qemu-img: overlays on what is in the store, and what they stand on.

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

/// Sizes of disks are whole sectors.
const SECTOR: u64 = 512;

/// What an overlay stands on.
#[derive(Debug)]
pub struct Backing<'a> {
    /// The file; absolute, so that it is nothing else to QEMU.
    pub path: &'a Path,
    /// Its format, as QEMU calls it: never guessed from the content, which a guest may have written.
    pub format: &'a str,
}

/// Makes a qcow2 file of the lab: on another image, which is never changed, or blank.
pub async fn create(storage: &LabStorage, file: &str, backing: Option<Backing<'_>>, size: u64) -> Result<()> {
    let mut command = storage.qemu_img().args(["create", "-q", "-f", "qcow2"]);
    if let Some(backing) = backing {
        command = command.args(["-F", backing.format, "-b"]).args([backing.path]);
    }
    let finished = command.args([file.to_owned(), size.to_string()]).run(None).await?;
    finished.success("create a disk").map(drop)
}

/// The size of a new disk: as large as wanted, and never smaller than what it stands on.
pub fn size_over(image: u64, wanted: Option<u64>) -> Result<u64> {
    match wanted {
        Some(wanted) if wanted < image => Err(Error::new(
            ErrorKind::InvalidInput,
            format!(
                "expected a disk at least as large as its image, {}, but found {}",
                human_bytes(image),
                human_bytes(wanted)
            ),
        )
        .with_help(format!("set the disk's size to {} or more", whole(image)))),
        wanted => Ok(wanted.unwrap_or(image).next_multiple_of(SECTOR)),
    }
}

/// The smallest size that is written with a whole number and holds this.
fn whole(size: u64) -> String {
    let unit = if size >= 10 << 30 { 1 << 30 } else { 1 << 20 };
    human_bytes(size.next_multiple_of(unit))
}

/// Checks the structure of a captured disk.
pub async fn check(storage: &LabStorage, file: &str) -> Result<()> {
    let finished = storage.qemu_img().args(["check", "-q", "-f", "qcow2", file]).run(None).await?;
    finished.success("check the captured disk").map(drop)
}
