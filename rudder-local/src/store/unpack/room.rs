//! How much may come out of a packed file: what the disk can hold that is made of it, and never more than the store allows.

use super::super::ImageFormat;
use super::{
    super::{durable::human, format},
    Packing,
};
use rudder_core::{Error, ErrorKind, Result};

/// Enough of the beginning to know the format.
const HEAD: usize = 512;

/// Counts what comes out, and refuses what there is no room for.
pub(super) struct Room {
    /// What the store allows.
    limit: u64,
    /// The size of the disk.
    disk: Option<u64>,
    /// The beginning, until the format is known.
    head: Vec<u8>,
    /// What the disk and its format allow, once the format is known.
    allowed: Option<u64>,
    taken: u64,
}

impl Room {
    pub(super) fn new(limit: u64, disk: Option<u64>) -> Self {
        Self { limit, disk, head: Vec::new(), allowed: None, taken: 0 }
    }

    /// Takes note of bytes that came out, before they are written.
    pub(super) fn take(&mut self, bytes: &[u8], packing: Packing) -> Result<()> {
        self.taken += bytes.len() as u64;
        if self.taken > self.limit {
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
            let (format, size) = format::glance(&self.head);
            if let Some(size) = size.filter(|size| *size > disk) {
                return Err(too_large(
                    disk,
                    &format!("a {format} image of {} in the {packing} file", human(size)),
                ));
            }
            self.allowed = Some(disk.saturating_add(overhead(format, disk)));
        }
        match self.allowed {
            Some(allowed) if self.taken > allowed => {
                let taken = human(self.taken);
                Err(too_large(disk, &format!("at least {taken} in the {packing} file")))
            }
            _ => Ok(()),
        }
    }
}

/// What a format needs besides the content of a disk of this size, generously.
fn overhead(format: ImageFormat, disk: u64) -> u64 {
    match format {
        // The footer of a fixed VHD, which looks like a raw disk from its beginning.
        ImageFormat::Raw => 512,
        // Blocks of up to 256 MiB, of which the last is whole; their state; a log ([MS-VHDX], 2.2 and 2.5).
        ImageFormat::Vhdx => disk / 32 + (320 << 20),
        // The smallest clusters need a thirty-second for their tables; blocks have 2 MiB and are whole.
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
