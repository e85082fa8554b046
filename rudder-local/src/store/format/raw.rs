//! Raw disks: the bytes of the disk themselves, without a header.
//!
//! Sources: UEFI 2.10, 5.3 (GPT) and 5.2 (MBR); ECMA-119 (ISO 9660).

use super::{Image, ImageFormat, RecogniseResult, SECTOR, foreign, human, invalid, not_an_image};

/// Name of a disk with a GUID partition table.
const GPT: &str = "a GPT disk";

impl Image {
    /// Recognises a raw disk. Anything may be one, so accepts what begins like a disk, and what neither is text nor looks like
    /// any other kind of file. Either must consist of whole sectors.
    pub(super) fn raw(&self) -> RecogniseResult {
        let at = |offset: u64, magic: &[u8]| -> RecogniseResult<bool> {
            Ok(self.bytes(offset, magic.len())? == magic)
        };
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
                        "expected a disk of whole sectors, but found {what} that ends at byte {end}, followed by {} bytes",
                        size - end
                    ),
                    format!("remove the bytes that follow the disk: truncate -s {end} FILE"),
                ),
                Some((end, what)) if end > size => invalid(
                    format!("expected a complete disk, but found {what} of {end} bytes that is truncated to {size}"),
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
                "the image appears to be truncated: {what} ends at {}, but the image at {}",
                human(end),
                human(self.size)
            )),
            // An enlarged disk has zeros there. The partitions of an MBR need not cover the whole disk.
            Some((end, what @ GPT)) if self.bytes(end, 4096)?.iter().any(|byte| *byte != 0) => Some(format!(
                "{} bytes follow the end of {what}; they become part of the disk",
                self.size - end
            )),
            _ => None,
        };
        Ok(super::Recognised { remark, ..self.recognised(ImageFormat::Raw, self.size)? })
    }

    /// Returns where the disk ends according to its partition table, and the kind of table; `None` if there is no reliable one.
    fn end_of_partitions(&self) -> RecogniseResult<Option<(u64, &'static str)>> {
        for sector in [SECTOR, 4096] {
            if self.bytes(sector, 8)? == b"EFI PART" {
                // The headers at the beginning and the end of the disk point at each other.
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
            // Here the boot sector of a file system has code or names.
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
