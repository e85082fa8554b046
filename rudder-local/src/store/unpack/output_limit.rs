//! Limits the output of unpacking: to what the disk to be made from it can hold, and never more than the store allows.

use super::super::ImageFormat;
use super::{
    super::{durable::human, format},
    Packing,
};
use rudder_core::{Error, ErrorKind, Result};

/// Number of leading bytes needed to know the format.
const HEAD: usize = 512;

/// Counts the unpacked bytes, and refuses what exceeds the limits.
pub(super) struct OutputLimit {
    /// The store's limit.
    limit: u64,
    /// The size of the disk.
    disk: Option<u64>,
    /// The beginning, until the format is known.
    head: Vec<u8>,
    /// What the disk and its format allow, once the format is known.
    allowed: Option<u64>,
    written: u64,
}

impl OutputLimit {
    pub(super) fn new(limit: u64, disk: Option<u64>) -> Self {
        Self { limit, disk, head: Vec::new(), allowed: None, written: 0 }
    }

    /// Counts unpacked bytes before they are written.
    pub(super) fn count(&mut self, bytes: &[u8], packing: Packing) -> Result<()> {
        self.written += bytes.len() as u64;
        if self.written > self.limit {
            let limit = human(self.limit);
            return Err(Error::new(
                ErrorKind::InvalidImage,
                format!("expected at most {limit} in the {packing} file, but found more"),
            )
            .with_help("raise StoreOptions::unpacked_limit if the image is really this large"));
        }
        let Some(disk) = self.disk else { return Ok(()) };
        if self.allowed.is_none() && self.head.len() < HEAD {
            let missing = (HEAD - self.head.len()).min(bytes.len());
            self.head.extend_from_slice(&bytes[..missing]);
        }
        if self.head.len() >= HEAD && self.allowed.is_none() {
            let (format, size) = format::guess(&self.head);
            if let Some(size) = size.filter(|size| *size > disk) {
                return Err(too_large(
                    disk,
                    &format!("a {format} image of {} in the {packing} file", human(size)),
                ));
            }
            self.allowed = Some(disk.saturating_add(overhead(format, disk)));
        }
        match self.allowed {
            Some(allowed) if self.written > allowed => {
                let written = human(self.written);
                Err(too_large(disk, &format!("at least {written} in the {packing} file")))
            }
            _ => Ok(()),
        }
    }
}

/// Returns a generous estimate of what a format needs besides the content of a disk of this size.
fn overhead(format: ImageFormat, disk: u64) -> u64 {
    match format {
        // The footer of a fixed VHD, whose beginning looks like that of a raw disk.
        ImageFormat::Raw => 512,
        // Blocks of up to 256 MiB, the last of which is complete; their state; a log ([MS-VHDX], 2.2 and 2.5).
        ImageFormat::Vhdx => disk / 32 + (320 << 20),
        // The smallest clusters need a thirty-second for their tables; blocks have 2 MiB and are complete.
        _ => disk / 16 + (8 << 20),
    }
}

fn too_large(disk: u64, found: &str) -> Error {
    Error::new(
        ErrorKind::InvalidInput,
        format!("expected an image for a disk of {}, but found {found}", human(disk)),
    )
    .with_help("raise the size of the disk, or check that the URL names the right image")
}
