//! Formats with a header: reads it, and checks that the image is complete and self-contained.

use super::{HEAD, Image, ImageFormat, RecogniseResult, SECTOR, damaged, unusable};

impl Image {
    pub(super) fn qcow2(&self) -> RecogniseResult {
        let version = self.be32(4)?;
        if !matches!(version, 2 | 3) {
            return Err(unusable("qcow", &format!("has version {version} instead of 2 or 3"), "qcow").into());
        }
        self.refuse_if(self.be64(8)? != 0, "QCOW2", "has a backing file")?;
        self.refuse_if(self.be32(32)? != 0, "QCOW2", "is encrypted")?;
        let mut header_length = 72;
        if version == 3 {
            let incompatible = self.be64(72)?;
            self.refuse_if(incompatible & 4 != 0, "QCOW2", "stores its data in another file")?;
            // Bit 0: dirty (repaired when opened); 1: corrupt; 3: compression type; 4: extended L2 entries.
            self.refuse_if(incompatible & 2 != 0, "QCOW2", "is marked as corrupt")?;
            header_length = u64::from(self.be32(100)?);
        }
        let cluster_bits = self.be32(20)?;
        if !(9..=21).contains(&cluster_bits) || header_length < 72 || header_length >= 1 << cluster_bits {
            return Err(damaged("QCOW2").into());
        }
        // For a table missing at the end, QEMU would read zeros: an empty disk.
        let table = u64::from(self.be32(36)?) * 8;
        self.expect_length("QCOW2", self.be64(40)?.saturating_add(table))?;
        let mut offset = header_length;
        while offset + 8 <= 1 << cluster_bits {
            let (kind, length) = (self.be32(offset)?, u64::from(self.be32(offset + 4)?));
            match kind {
                0 => break,
                // "DATA": the name of an external data file.
                0x4441_5441 => self.refuse_if(true, "QCOW2", "stores its data in another file")?,
                _ => offset += 8 + length.next_multiple_of(8),
            }
        }
        self.recognised(ImageFormat::Qcow2, self.be64(24)?)
    }

    pub(super) fn vmdk(&self) -> RecogniseResult {
        let mut headers = vec![0];
        // A stream-optimised image has a second header at its end, which takes precedence (VMDK 5.0, "footer").
        if self.le64(56)? == u64::MAX {
            let footer = self.size.checked_sub(2 * SECTOR).ok_or_else(|| damaged("VMDK"))?;
            if self.bytes(footer, 4)? != b"KDMV" {
                return Err(damaged("VMDK").into());
            }
            headers.push(footer);
        }
        let mut capacity = 0;
        for header in headers {
            capacity = self.le64(header + 12)?;
            // 0: QEMU would treat the file as a descriptor and open what it names.
            self.refuse_if(capacity == 0, "VMDK", "stores its data in other files")?;
            let descriptor = self.le64(header + 28)?.saturating_mul(SECTOR);
            // QEMU reads 20 sectors whatever the size field contains.
            let length = self.le64(header + 36)?.saturating_mul(SECTOR).clamp(20 * SECTOR, 1 << 20);
            let text = self.bytes(descriptor, usize::try_from(length).unwrap_or(HEAD))?;
            let text = String::from_utf8_lossy(&text).to_ascii_lowercase();
            self.refuse_if(text.contains("parentfilenamehint"), "VMDK", "has a parent image")?;
            let extents = text.lines().filter(|line| {
                let mut words = line.split_ascii_whitespace();
                matches!(words.next(), Some("rw" | "rdonly" | "noaccess"))
                    && words.next().is_some_and(|word| word.parse::<u64>().is_ok())
            });
            self.refuse_if(extents.count() > 1, "VMDK", "stores its data in other files")?;
        }
        self.recognised(ImageFormat::Vmdk, capacity.saturating_mul(SECTOR))
    }

    pub(super) fn vdi(&self) -> RecogniseResult {
        if self.le32(0x44)? >> 16 != 1 {
            return Err(unusable("VDI", "has an unknown version", "vdi").into());
        }
        if !matches!(self.le32(0x4c)?, 1 | 2) {
            return Err(unusable("VDI", "is a snapshot of another image", "vdi").into());
        }
        // For what is missing at the end, QEMU would read zeros.
        let (data, block) = (u64::from(self.le32(0x158)?), u64::from(self.le32(0x178)?));
        let end = u64::from(self.le32(0x184)?).saturating_mul(block).saturating_add(data);
        self.expect_length("VDI", end)?;
        self.recognised(ImageFormat::Vdi, self.le64(0x170)?)
    }

    pub(super) fn vhd(&self, footer: u64) -> RecogniseResult {
        // QEMU only warns, and uses a damaged size.
        let mut bytes = self.bytes(footer, 512)?;
        let sum = self.be32(footer + 64)?;
        bytes.get_mut(64..68).ok_or_else(|| damaged("VHD"))?.fill(0);
        if !bytes.iter().map(|byte| u32::from(*byte)).sum::<u32>() != sum {
            return Err(damaged("VHD").into());
        }
        let size = self.be64(footer + 48)?;
        if size % SECTOR != 0 {
            return Err(damaged("VHD").into());
        }
        // 2: fixed, 3: dynamic, 4: differencing.
        match (self.be32(footer + 60)?, footer) {
            (3, 0) => {
                // The file ends with a copy of the footer; some old ones have 511 bytes.
                let end = self.bytes(self.size.saturating_sub(SECTOR), 9)?;
                if !end.starts_with(b"conectix") && !end.ends_with(b"conectix") {
                    return Err(damaged("VHD").into());
                }
            }
            (2, 1..) => self.expect_length("VHD", size.saturating_add(SECTOR))?,
            (4, _) => return Err(unusable("VHD", "has a parent image", "vpc").into()),
            _ => return Err(damaged("VHD").into()),
        }
        self.recognised(ImageFormat::Vhd, size)
    }

    pub(super) fn vhdx(&self) -> RecogniseResult {
        const METADATA_REGION: [u8; 16] =
            guid(0x8b7c_a206, 0x4790, 0x4b9a, *b"\xb8\xfe\x57\x5f\x05\x0f\x88\x6e");
        const FILE_PARAMETERS: [u8; 16] =
            guid(0xcaa1_6737, 0xfa36, 0x4d43, *b"\xb3\xb6\x33\xf0\xaa\x44\xe7\x6b");
        const VIRTUAL_DISK_SIZE: [u8; 16] =
            guid(0x2fa5_4224, 0xcd1b, 0x4876, *b"\xb2\x11\x5d\xbe\xd8\x3b\xf4\xb8");
        const REGION_TABLE: u64 = 192 * 1024;
        if self.bytes(REGION_TABLE, 4)? != b"regi" {
            return Err(damaged("VHDX").into());
        }
        let entry = |table: u64, count: u64, wanted: &[u8; 16]| -> RecogniseResult<u64> {
            for index in 0..count.min(2047) {
                let at = table + index * 32;
                if self.bytes(at, 16)? == wanted {
                    return Ok(at + 16);
                }
            }
            Err(damaged("VHDX").into())
        };
        let region = entry(REGION_TABLE + 16, u64::from(self.le32(REGION_TABLE + 8)?), &METADATA_REGION)?;
        let metadata = self.le64(region)?;
        if self.bytes(metadata, 8)? != b"metadata" {
            return Err(damaged("VHDX").into());
        }
        let count = u64::from(self.le32(metadata + 8)? >> 16);
        let item = |wanted| -> RecogniseResult<u64> {
            let at = entry(metadata.saturating_add(32), count, wanted)?;
            Ok(metadata.saturating_add(u64::from(self.le32(at)?)))
        };
        let parameters = item(&FILE_PARAMETERS)?;
        self.refuse_if(self.le32(parameters + 4)? & 2 != 0, "VHDX", "has a parent image")?;
        let size = item(&VIRTUAL_DISK_SIZE)?;
        self.recognised(ImageFormat::Vhdx, self.le64(size)?)
    }

    /// Checks that the file is as long as its own tables require.
    fn expect_length(&self, format: &'static str, end: u64) -> RecogniseResult<()> {
        if self.size >= end { Ok(()) } else { Err(damaged(format).into()) }
    }
}

/// Encodes a GUID as it is stored: the first three fields little-endian.
const fn guid(a: u32, b: u16, c: u16, d: [u8; 8]) -> [u8; 16] {
    let (a, b, c) = (a.to_le_bytes(), b.to_le_bytes(), c.to_le_bytes());
    [a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], d[0], d[1], d[2], d[3], d[4], d[5], d[6], d[7]]
}
