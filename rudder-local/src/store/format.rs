//! Detects the format of a disk image by its content, and whether an image from elsewhere is safe to open.
//!
//! An image may name other files (a backing file, an external data file, extents): QEMU would open them on this host,
//! and the guest could read them. Such images are refused.
//!
//! Sources of the formats: QEMU's `docs/interop/qcow2.rst`; VMware's "Virtual Disk Format 5.0"; Microsoft's "Virtual Hard
//! Disk Image Format Specification" 1.0 and [MS-VHDX]; VirtualBox's `VDICore.h`; UEFI 2.10, 5 (GPT); ECMA-119 (ISO 9660).

mod containers;
mod foreign;
mod raw;

use super::durable::{human, io_error};
use rudder_core::{Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};
use std::{fmt, fs::File, io, os::unix::fs::FileExt, path::Path};

/// The format of a disk image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum ImageFormat {
    /// QEMU's format, version 2 or 3.
    Qcow2,
    /// The bytes of the disk themselves; also used for ISO images.
    Raw,
    /// VMware's sparse format in one file (`monolithicSparse`, `streamOptimized`).
    Vmdk,
    /// VirtualBox's format.
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

/// A recognised image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Recognised {
    pub(super) format: ImageFormat,
    /// Size of the disk that a guest sees, in bytes.
    pub(super) virtual_size: u64,
    /// An oddity that does not prevent its use.
    pub(super) remark: Option<String>,
}

const SECTOR: u64 = 512;
/// Number of leading bytes that are checked for text and other kinds of files.
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

/// Guesses the format of an image from its first 512 bytes, and the size of its disk if they contain it.
pub(super) fn guess(head: &[u8]) -> (ImageFormat, Option<u64>) {
    let bytes = |at: usize| head.get(at..at + 8).and_then(|bytes| bytes.try_into().ok());
    let be = |at| bytes(at).map(u64::from_be_bytes);
    let le = |at| bytes(at).map(u64::from_le_bytes);
    match head {
        [b'Q', b'F', b'I', 0xfb, ..] => (ImageFormat::Qcow2, be(24)),
        [b'K', b'D', b'M', b'V', ..] => {
            (ImageFormat::Vmdk, le(12).map(|sectors| sectors.saturating_mul(SECTOR)))
        }
        _ if head.starts_with(b"vhdxfile") => (ImageFormat::Vhdx, None),
        _ if head.starts_with(b"conectix") => (ImageFormat::Vhd, be(48)),
        _ if head.get(0x40..0x44) == Some(&[0x7f, 0x10, 0xda, 0xbe]) => (ImageFormat::Vdi, le(0x170)),
        _ => (ImageFormat::Raw, None),
    }
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

type RecogniseResult<T = Recognised> = std::result::Result<T, Problem>;

struct Image {
    file: File,
    size: u64,
    head: Vec<u8>,
}

impl Image {
    fn recognise(&self) -> RecogniseResult {
        let head = &self.head[..];
        match head {
            [] => Err(not_an_image("an empty file").into()),
            [b'Q', b'F', b'I', 0xfb, ..] => self.qcow2(),
            [b'K', b'D', b'M', b'V', ..] => self.vmdk(),
            _ if head.get(0x40..0x44) == Some(&[0x7f, 0x10, 0xda, 0xbe]) => self.vdi(),
            _ if head.starts_with(b"vhdxfile") => self.vhdx(),
            _ if head.starts_with(b"conectix") => self.vhd(0),
            _ => {
                if let Some(other) = foreign::by_signature(self)? {
                    return Err(other.into());
                }
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

    fn recognised(&self, format: ImageFormat, virtual_size: u64) -> RecogniseResult {
        // QEMU's own limit is slightly below 2^63; no real disk comes near.
        if virtual_size == 0 || virtual_size > i64::MAX as u64 {
            return Err(invalid(
                format!(
                    "expected a disk of a supported size, but found a {format} image of {virtual_size} bytes"
                ),
                "check the image with qemu-img info",
            )
            .into());
        }
        Ok(Recognised { format, virtual_size, remark: None })
    }

    fn refuse_if(&self, condition: bool, name: &'static str, what: &str) -> RecogniseResult<()> {
        if condition { Err(unusable(name, what, &name.to_lowercase()).into()) } else { Ok(()) }
    }

    /// Returns these bytes, or fewer at the end of the file.
    fn bytes(&self, offset: u64, count: usize) -> io::Result<Vec<u8>> {
        let left = usize::try_from(self.size.saturating_sub(offset)).unwrap_or(usize::MAX);
        let mut bytes = vec![0; count.min(left)];
        self.file.read_exact_at(&mut bytes, offset)?;
        Ok(bytes)
    }

    fn array<const N: usize>(&self, offset: u64) -> RecogniseResult<[u8; N]> {
        let bytes = self.bytes(offset, N)?;
        bytes.try_into().map_err(|_| damaged("disk").into())
    }

    fn be32(&self, offset: u64) -> RecogniseResult<u32> {
        self.array(offset).map(u32::from_be_bytes)
    }

    fn be64(&self, offset: u64) -> RecogniseResult<u64> {
        self.array(offset).map(u64::from_be_bytes)
    }

    fn le32(&self, offset: u64) -> RecogniseResult<u32> {
        self.array(offset).map(u32::from_le_bytes)
    }

    fn le64(&self, offset: u64) -> RecogniseResult<u64> {
        self.array(offset).map(u64::from_le_bytes)
    }
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
        "check that the URL returns qcow2, raw, vmdk, vdi, vhd or vhdx, plain or packed with gz, xz, zst or bz2",
    )
}

fn damaged(format: &str) -> Error {
    invalid(
        format!("expected a complete {format} image, but found one that is truncated or damaged"),
        "copy the image again from its source; an image that is still open there is incomplete",
    )
}

fn unusable(format: &str, what: &str, driver: &str) -> Error {
    invalid(
        format!("expected a self-contained image, but found a {format} image that {what}"),
        format!("convert it to a single file: qemu-img convert -f {driver} -O qcow2 IN OUT.qcow2"),
    )
}

#[cfg(test)]
mod tests;
