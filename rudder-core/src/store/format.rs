//! What a disk image is, by its content; and whether it is safe to open one that came from elsewhere.
//!
//! An image may name other files (a backing file, an external data file, extents): QEMU would open them on this host,
//! and the guest could read them. Such images are refused.
//!
//! Sources of the formats: QEMU's `docs/interop/qcow2.rst`; VMware's "Virtual Disk Format 5.0"; Microsoft's "Virtual Hard
//! Disk Image Format Specification" 1.0 and [MS-VHDX]; VirtualBox's `VDICore.h`; UEFI 2.10, 5 (GPT); ECMA-119 (ISO 9660).

use super::durable::io_error;
use crate::{Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};
use std::{fmt, fs::File, io, os::unix::fs::FileExt, path::Path};

/// The format of a disk image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum ImageFormat {
    /// QEMU's, version 2 or 3.
    Qcow2,
    /// The bytes of the disk themselves; an ISO image too.
    Raw,
    /// VMware's sparse format, one file (`monolithicSparse`, `streamOptimized`).
    Vmdk,
    /// VirtualBox's.
    Vdi,
    /// Microsoft's older format, fixed or dynamic. QEMU calls it `vpc`.
    Vhd,
    /// Microsoft's newer format.
    Vhdx,
}

impl fmt::Display for ImageFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Qcow2 => "qcow2",
            Self::Raw => "raw",
            Self::Vmdk => "vmdk",
            Self::Vdi => "vdi",
            Self::Vhd => "vhd",
            Self::Vhdx => "vhdx",
        })
    }
}

/// What was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Recognised {
    pub(super) format: ImageFormat,
    /// What a guest sees, in bytes.
    pub(super) virtual_size: u64,
}

const SECTOR: u64 = 512;
/// How many bytes of the begin are looked at to tell text and other kinds of files.
const HEAD: usize = 4096;

pub(super) fn recognise_file(path: &Path) -> Result<Recognised> {
    let open = || -> io::Result<Image> {
        let file = File::open(path)?;
        let size = file.metadata()?.len();
        let mut image = Image { file, size, head: Vec::new() };
        image.head = image.bytes(0, HEAD)?;
        Ok(image)
    };
    let image = open().map_err(|error| io_error("read", path, error))?;
    image.recognise().map_err(|problem| match problem {
        Problem::Invalid(error) => error,
        Problem::Io(error) => io_error("read", path, error),
    })
}

enum Problem {
    Invalid(Error),
    Io(io::Error),
}

impl From<io::Error> for Problem {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<Error> for Problem {
    fn from(error: Error) -> Self {
        Self::Invalid(error)
    }
}

type Found<T = Recognised> = std::result::Result<T, Problem>;

struct Image {
    file: File,
    size: u64,
    head: Vec<u8>,
}

impl Image {
    fn recognise(&self) -> Found {
        let head = &self.head[..];
        match head {
            [] => Err(not_an_image("an empty file").into()),
            [b'Q', b'F', b'I', 0xfb, ..] => self.qcow2(),
            [b'K', b'D', b'M', b'V', ..] => self.vmdk(),
            [b'C', b'O', b'W', b'D', ..] => {
                Err(unusable("VMDK", "is in ESX's old COWD format", "vmdk").into())
            }
            _ if head.starts_with(b"# Disk DescriptorFile") => Err(invalid(
                "expected a disk image, but found a VMDK descriptor, which only names the files that hold the disk",
                "give one file that holds the disk: qemu-img convert -O qcow2 disk.vmdk disk.qcow2",
            )
            .into()),
            _ if head.get(0x40..0x44) == Some(&[0x7f, 0x10, 0xda, 0xbe]) => self.vdi(),
            _ if head.starts_with(b"vhdxfile") => self.vhdx(),
            _ if head.starts_with(b"conectix") => self.vhd(0),
            _ if head.starts_with(b"QED\0") => Err(unusable("QED", "is not supported", "qed").into()),
            _ => {
                // A fixed VHD is a raw image with a footer of 512 bytes (511 in some old ones, which are refused as raw).
                if let Some(footer) = self.size.checked_sub(SECTOR)
                    && self.bytes(footer, 8)? == b"conectix"
                {
                    return self.vhd(footer);
                }
                self.raw()
            }
        }
    }

    fn qcow2(&self) -> Found {
        let version = self.be32(4)?;
        if !matches!(version, 2 | 3) {
            return Err(unusable("qcow", &format!("has version {version}, expected 2 or 3"), "qcow").into());
        }
        self.refuse(self.be64(8)? != 0, "QCOW2", "has a backing file")?;
        self.refuse(self.be32(32)? != 0, "QCOW2", "is encrypted")?;
        let mut header_length = 72;
        if version == 3 {
            let incompatible = self.be64(72)?;
            self.refuse(incompatible & 4 != 0, "QCOW2", "keeps its data in another file")?;
            // Bit 0: dirty (repaired when opened); 1: corrupt; 3: compression type; 4: extended L2 entries.
            self.refuse(incompatible & 2 != 0, "QCOW2", "is marked as corrupt")?;
            header_length = u64::from(self.be32(100)?);
        }
        let cluster_bits = self.be32(20)?;
        if !(9..=21).contains(&cluster_bits) || header_length < 72 || header_length >= 1 << cluster_bits {
            return Err(damaged("QCOW2").into());
        }
        let mut offset = header_length;
        while offset + 8 <= 1 << cluster_bits {
            let (kind, length) = (self.be32(offset)?, u64::from(self.be32(offset + 4)?));
            match kind {
                0 => break,
                // "DATA": the name of an external data file.
                0x4441_5441 => self.refuse(true, "QCOW2", "keeps its data in another file")?,
                _ => offset += 8 + length.next_multiple_of(8),
            }
        }
        self.done(ImageFormat::Qcow2, self.be64(24)?)
    }

    fn vmdk(&self) -> Found {
        let mut headers = vec![0];
        // A stream-optimised image has a second header at its end, which counts (VMDK 5.0, "footer").
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
            // 0: QEMU would take the file for a descriptor and open what it names.
            self.refuse(capacity == 0, "VMDK", "keeps its data in other files")?;
            let descriptor = self.le64(header + 28)?.saturating_mul(SECTOR);
            // QEMU reads 20 sectors whatever the size says.
            let length = self.le64(header + 36)?.saturating_mul(SECTOR).clamp(20 * SECTOR, 1 << 20);
            let text = self.bytes(descriptor, usize::try_from(length).unwrap_or(HEAD))?;
            let text = String::from_utf8_lossy(&text).to_ascii_lowercase();
            self.refuse(text.contains("parentfilenamehint"), "VMDK", "has a parent image")?;
            let extents = text.lines().filter(|line| {
                let mut words = line.split_ascii_whitespace();
                matches!(words.next(), Some("rw" | "rdonly" | "noaccess"))
                    && words.next().is_some_and(|word| word.parse::<u64>().is_ok())
            });
            self.refuse(extents.count() > 1, "VMDK", "keeps its data in other files")?;
        }
        self.done(ImageFormat::Vmdk, capacity.saturating_mul(SECTOR))
    }

    fn vdi(&self) -> Found {
        if self.le32(0x44)? >> 16 != 1 {
            return Err(unusable("VDI", "has an unknown version", "vdi").into());
        }
        match self.le32(0x4c)? {
            1 | 2 => self.done(ImageFormat::Vdi, self.le64(0x170)?),
            _ => Err(unusable("VDI", "is a snapshot of another image", "vdi").into()),
        }
    }

    fn vhd(&self, footer: u64) -> Found {
        // 2: fixed, 3: dynamic, 4: differencing.
        match (self.be32(footer + 60)?, footer) {
            (3, _) | (2, 1..) => self.done(ImageFormat::Vhd, self.be64(footer + 48)?),
            (4, _) => Err(unusable("VHD", "has a parent image", "vpc").into()),
            _ => Err(damaged("VHD").into()),
        }
    }

    fn vhdx(&self) -> Found {
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
        let entry = |table: u64, count: u64, wanted: &[u8; 16]| -> Found<u64> {
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
        let item = |wanted| -> Found<u64> {
            let at = entry(metadata.saturating_add(32), count, wanted)?;
            Ok(metadata.saturating_add(u64::from(self.le32(at)?)))
        };
        let parameters = item(&FILE_PARAMETERS)?;
        self.refuse(self.le32(parameters + 4)? & 2 != 0, "VHDX", "has a parent image")?;
        let size = item(&VIRTUAL_DISK_SIZE)?;
        self.done(ImageFormat::Vhdx, self.le64(size)?)
    }

    /// Anything may be a disk. Taken as one is what begins like a disk; and what is nothing else that we know, is not
    /// text, and is made of whole sectors.
    fn raw(&self) -> Found {
        let at = |offset: u64, magic: &[u8]| -> Found<bool> { Ok(self.bytes(offset, magic.len())? == magic) };
        let whole = self.size.is_multiple_of(SECTOR);
        let disk = at(510, &[0x55, 0xaa])?
            || at(512, b"EFI PART")?
            || at(4096, b"EFI PART")?
            || at(0x8001, b"CD001")?
            || at(0x438, &[0x53, 0xef])? // ext2, 3, 4
            || at(0, b"XFSB")?
            || at(0x1_0040, b"_BHRfS_M")?
            || at(0, b"hsqs")?;
        if disk && whole {
            return self.done(ImageFormat::Raw, self.size);
        }
        if let Some(other) = other_kind(&self.head) {
            return Err(not_an_image(other).into());
        }
        if !whole {
            return Err(not_an_image(&format!(
                "{} bytes of unknown data, which is not a multiple of {SECTOR}",
                self.size
            ))
            .into());
        }
        self.done(ImageFormat::Raw, self.size)
    }

    fn done(&self, format: ImageFormat, virtual_size: u64) -> Found {
        // QEMU's own limit is 2^63 minus a little; nothing real comes near.
        if virtual_size == 0 || virtual_size > i64::MAX as u64 {
            return Err(invalid(
                format!(
                    "expected a disk of a usable size, but found a {format} image of {virtual_size} bytes"
                ),
                "check the image with qemu-img info",
            )
            .into());
        }
        Ok(Recognised { format, virtual_size })
    }

    fn refuse(&self, condition: bool, name: &'static str, what: &str) -> Found<()> {
        if condition { Err(unusable(name, what, &name.to_lowercase()).into()) } else { Ok(()) }
    }

    /// These bytes, fewer at the end of the file.
    fn bytes(&self, offset: u64, count: usize) -> io::Result<Vec<u8>> {
        let left = usize::try_from(self.size.saturating_sub(offset)).unwrap_or(usize::MAX);
        let mut bytes = vec![0; count.min(left)];
        self.file.read_exact_at(&mut bytes, offset)?;
        Ok(bytes)
    }

    fn array<const N: usize>(&self, offset: u64) -> Found<[u8; N]> {
        let bytes = self.bytes(offset, N)?;
        bytes.try_into().map_err(|_| damaged("disk").into())
    }

    fn be32(&self, offset: u64) -> Found<u32> {
        self.array(offset).map(u32::from_be_bytes)
    }

    fn be64(&self, offset: u64) -> Found<u64> {
        self.array(offset).map(u64::from_be_bytes)
    }

    fn le32(&self, offset: u64) -> Found<u32> {
        self.array(offset).map(u32::from_le_bytes)
    }

    fn le64(&self, offset: u64) -> Found<u64> {
        self.array(offset).map(u64::from_le_bytes)
    }
}

/// A GUID as it is stored: the first three fields little-endian.
const fn guid(a: u32, b: u16, c: u16, d: [u8; 8]) -> [u8; 16] {
    let (a, b, c) = (a.to_le_bytes(), b.to_le_bytes(), c.to_le_bytes());
    [a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], d[0], d[1], d[2], d[3], d[4], d[5], d[6], d[7]]
}

/// What else a file may be, by its begin.
fn other_kind(head: &[u8]) -> Option<&'static str> {
    let lower = String::from_utf8_lossy(&head[..head.len().min(512)]).trim_start().to_ascii_lowercase();
    if lower.starts_with("<!doctype html") || lower.starts_with("<html") {
        return Some("a web page");
    }
    if lower.starts_with("<?xml") {
        return Some("an XML document");
    }
    let known: [(&[u8], &str); 9] = [
        (b"PK\x03\x04", "a zip archive"),
        (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
        (b"Rar!", "a rar archive"),
        (b"\x7fELF", "a program"),
        (b"%PDF", "a PDF document"),
        (b"\x89PNG", "a picture"),
        (b"!<arch>", "a Debian package or ar archive"),
        (b"\xed\xab\xee\xdb", "an RPM package"),
        (b"\x04\x22\x4d\x18", "an lz4 file, which is not supported (use zstd)"),
    ];
    if let Some((_, name)) = known.iter().find(|(magic, _)| head.starts_with(magic)) {
        return Some(name);
    }
    if head.get(257..262) == Some(b"ustar") {
        return Some("a tar archive");
    }
    // Text has no zero bytes and hardly any control characters; the end of the head may cut a character in two.
    let text = match std::str::from_utf8(head) {
        Ok(_) => true,
        Err(error) => error.error_len().is_none() && error.valid_up_to() > 0,
    };
    let control = |byte: &u8| *byte < 0x20 && !matches!(byte, b'\n' | b'\r' | b'\t' | 0x0c | 0x1b);
    (text && !head.iter().any(control)).then_some("a text file")
}

fn invalid(
    message: impl Into<std::borrow::Cow<'static, str>>,
    help: impl Into<std::borrow::Cow<'static, str>>,
) -> Error {
    Error::new(ErrorKind::InvalidImage, message).with_help(help)
}

fn not_an_image(found: &str) -> Error {
    invalid(
        format!("expected a disk image, but found {found}"),
        "check that the URL gives qcow2, raw, vmdk, vdi, vhd or vhdx, plain or packed with gz, xz, zst or bz2",
    )
}

fn damaged(format: &str) -> Error {
    invalid(
        format!("expected a whole {format} image, but found one that is cut short or damaged"),
        "check the image with qemu-img check, and download it anew",
    )
}

fn unusable(format: &str, what: &str, driver: &str) -> Error {
    invalid(
        format!("expected an image that stands alone, but found a {format} image that {what}"),
        format!("make one file of it: qemu-img convert -f {driver} -O qcow2 IN OUT.qcow2"),
    )
}

#[cfg(test)]
mod tests;
