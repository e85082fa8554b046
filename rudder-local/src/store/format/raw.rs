//! Raw disks: the bytes of the disk themselves, without anything that says so.
//!
//! Sources: UEFI 2.10, 5.3 (GPT) and 5.2 (MBR); ECMA-119 (ISO 9660).

use super::{Found, Image, ImageFormat, SECTOR, foreign, human, invalid, not_an_image};

/// A disk with a table of that kind.
const GPT: &str = "a GPT disk";

impl Image {
    /// Anything may be a disk. Taken as one is what begins like a disk; and what is nothing else that we know, is not
    /// text, and is made of whole sectors.
    pub(super) fn raw(&self) -> Found {
        let at = |offset: u64, magic: &[u8]| -> Found<bool> { Ok(self.bytes(offset, magic.len())? == magic) };
        let iso = at(0x8001, b"CD001")?;
        let disk = iso
            || at(510, &[0x55, 0xaa])?
            || at(512, b"EFI PART")?
            || at(4096, b"EFI PART")?
            || at(0x438, &[0x53, 0xef])? // ext2, 3, 4
            || at(0, b"XFSB")?
            || at(0x1_0040, b"_BHRfS_M")?;
        if !disk && let Some(other) = foreign::by_shape(&self.head) {
            return Err(other.into());
        }
        let end = if iso { None } else { self.end_of_partitions()? };
        if !self.size.is_multiple_of(SECTOR) {
            let size = self.size;
            return Err(match end {
                Some((end, what)) if end < size => invalid(
                    format!(
                        "expected a disk of whole sectors, but found {what} that ends at byte {end} and {} bytes after it",
                        size - end
                    ),
                    format!("cut off what does not belong to the disk: truncate -s {end} FILE"),
                ),
                Some((end, what)) if end > size => invalid(
                    format!("expected a whole disk, but found {what} of {end} bytes that is cut short after {size}"),
                    "download the image again",
                ),
                _ => not_an_image(&format!(
                    "{size} bytes of unknown data, which is not a multiple of {SECTOR}"
                )),
            }
            .into());
        }
        let remark = match end {
            Some((end, what)) if end > self.size => Some(format!(
                "the image looks cut short: {what} ends at {}, and the image at {}",
                human(end),
                human(self.size)
            )),
            // Whoever enlarged a disk left zeros. What an MBR names need not be all of its disk.
            Some((end, what @ GPT)) if self.bytes(end, 4096)?.iter().any(|byte| *byte != 0) => Some(format!(
                "{} bytes follow the end of {what}; they become a part of the disk",
                self.size - end
            )),
            _ => None,
        };
        Ok(super::Recognised { remark, ..self.done(ImageFormat::Raw, self.size)? })
    }

    /// Where the disk ends by its partition table, and which table that is; `None` where there is none to be sure of.
    fn end_of_partitions(&self) -> Found<Option<(u64, &'static str)>> {
        for sector in [SECTOR, 4096] {
            if self.bytes(sector, 8)? == b"EFI PART" {
                // The header at the end of the disk says where its copy at the beginning is, and the reverse.
                let last = self.le64(sector + 32)?;
                let end = last.checked_add(1).and_then(|sectors| sectors.checked_mul(sector));
                return Ok(end.filter(|end| *end > sector).map(|end| (end, GPT)));
            }
        }
        if self.bytes(510, 2)? != [0x55, 0xaa] {
            return Ok(None);
        }
        let mut end = None;
        for entry in [446, 462, 478, 494] {
            let table = self.bytes(entry, 16)?;
            // A boot sector of a file system has code or names there.
            if !matches!(table.first(), Some(0 | 0x80)) {
                return Ok(None);
            }
            let (start, count) = (u64::from(self.le32(entry + 8)?), u64::from(self.le32(entry + 12)?));
            if table.get(4) != Some(&0) {
                end = end.max(Some((start + count) * SECTOR));
            }
        }
        Ok(end.map(|end| (end, "an MBR disk")))
    }
}
