//! Identifies files that are not disk images, or are in an unsupported format, and suggests what to do with each.
//!
//! Sources of the signatures: file(1)'s database; QEMU's `block/`; Android's `sparse_format.h`; Linux' `boot.rst`, "The
//! real-mode kernel header"; [MS-WIM]; PKWARE's APPNOTE; POSIX pax; libewf's and AFFLIB's documentation.

use super::{Image, invalid};
use rudder_core::Error;
use std::{borrow::Cow, io};

/// What to do with a file.
#[derive(Clone, Copy)]
enum Advice {
    /// It is an image: QEMU can convert it, with this as the name of the format.
    Convert(&'static str),
    /// A command turns it into an image.
    Run(&'static str),
    /// It may hold an image.
    TakeOut,
    /// It is packed in an unsupported way.
    Repack,
    /// It is something else entirely.
    CheckUrl,
}

use Advice::{CheckUrl, Convert, Repack, Run, TakeOut};

impl Advice {
    fn text(self) -> Cow<'static, str> {
        match self {
            Convert(driver) => format!("convert it: qemu-img convert -f {driver} -O qcow2 FILE disk.qcow2").into(),
            Run(what) => what.into(),
            TakeOut => "extract the disk image, and use that".into(),
            Repack => "unpack it, and use the disk image unpacked or packed with gz, xz, zst or bz2".into(),
            CheckUrl => "check that the URL returns qcow2, raw, vmdk, vdi, vhd or vhdx, plain or packed with gz, xz, zst or bz2"
                .into(),
        }
    }
}

/// Bytes that no disk begins with: offset, bytes, what they identify, and what to do.
const SIGNATURES: &[(usize, &[u8], &str, Advice)] = &[
    // Disk images in other formats.
    (0, b"QED\0", "a QED image", Convert("qed")),
    (0, b"WithoutFreeSpace", "a Parallels image", Convert("parallels")),
    (0, b"WithouFreSpacExt", "a Parallels image", Convert("parallels")),
    (0, b"Bochs Virtual HD Image", "a Bochs image", Convert("bochs")),
    (0, b"#!/bin/sh\n#V2.0 Format\n", "a cloop image", Convert("cloop")),
    (0, b"COWD", "a VMDK image in ESX's old COWD format", Convert("vmdk")),
    (0, b"\xbe\xba\xfe\xca\0\0\0\0", "a VMDK image in VMware's SESparse format", Convert("vmdk")),
    (0, b"OOOM", "a User Mode Linux COW image", Run("convert it: uml_moo -b BACKING FILE disk.img")),
    (
        0,
        b"LUKS\xba\xbe",
        "a disk encrypted with LUKS",
        Run("decrypt it: cryptsetup open FILE NAME, and copy /dev/mapper/NAME"),
    ),
    (
        0,
        b"-FVE-FS-",
        "a disk encrypted with BitLocker",
        Run("decrypt it on Windows, and use an image of the result"),
    ),
    (
        3,
        b"-FVE-FS-",
        "a disk encrypted with BitLocker",
        Run("decrypt it on Windows, and use an image of the result"),
    ),
    (0, b"\x3a\xff\x26\xed", "an Android sparse image", Run("convert it: simg2img FILE disk.img")),
    (0, b"ANDROID!", "an Android boot image", CheckUrl),
    (
        0,
        b"MSWIM\0\0\0",
        "a Windows image (WIM), which contains files rather than a disk",
        Run("install from the ISO that contains it"),
    ),
    (
        0,
        b"WLPWM\0\0\0",
        "a Windows image (WIM), which contains files rather than a disk",
        Run("install from the ISO that contains it"),
    ),
    (0, b"EVF\x09\x0d\x0a\xff\0", "an EnCase image (EWF)", Run("convert it: ewfexport -t disk -f raw FILE")),
    (0, b"EVF2\r\n\x81\0", "an EnCase image (EWF)", Run("convert it: ewfexport -t disk -f raw FILE")),
    (0, b"LVF\x09\x0d\x0a\xff\0", "an EnCase image (EWF)", Run("convert it: ewfexport -t disk -f raw FILE")),
    (0, b"AFF10\r\n\0", "an AFF image", Run("convert it: affconvert -r FILE")),
    (0, b"AFF\0", "an AFF image", Run("convert it: affconvert -r FILE")),
    (
        0,
        b"encrcdsa",
        "an encrypted macOS image",
        Run("decrypt it on macOS: hdiutil convert -format UDRW FILE"),
    ),
    (
        0,
        b"sprs",
        "a macOS sparse image",
        Run("convert it on macOS: hdiutil convert -format UDTO -o disk FILE"),
    ),
    (0, b"VMA\0", "a Proxmox backup (VMA)", Run("extract the disk: vma extract FILE DIRECTORY")),
    (
        0,
        b"PaRtImAgE-VoLuMe",
        "a Partimage backup",
        Run("restore it to a disk, and use an image of that disk"),
    ),
    (
        0,
        b"partclone-image",
        "a Partclone backup",
        Run("restore it to a disk: partclone.restore -s FILE -o disk.img"),
    ),
    (
        0,
        b"\0ntfsclone-image",
        "an ntfsclone backup",
        Run("restore it to a disk: ntfsclone --restore-image -o disk.img FILE"),
    ),
    (0, b"FsArCh_", "an FSArchiver backup", Run("restore it to a disk, and use an image of that disk")),
    (0, b"QEVM", "the saved memory of a virtual machine", CheckUrl),
    (0, b"LinuxGuestRecord", "the saved memory of a virtual machine", CheckUrl),
    (0, b"\xd2\xbe\xd2\xbe", "the saved memory of a virtual machine", CheckUrl),
    // File systems that no firmware boots from, and that cannot be written to.
    (
        0,
        b"hsqs",
        "a squashfs file system, which is not a bootable disk",
        Run("make a disk from its files: unsquashfs -d DIRECTORY FILE"),
    ),
    (
        0,
        b"sqsh",
        "a squashfs file system, which is not a bootable disk",
        Run("make a disk from its files: unsquashfs -d DIRECTORY FILE"),
    ),
    (0, b"\x45\x3d\xcd\x28", "a cramfs file system, which is not a bootable disk", CheckUrl),
    (0, b"-rom1fs-", "a romfs file system, which is not a bootable disk", CheckUrl),
    (1024, b"\xe2\xe1\xf5\xe0", "an EROFS file system, which is not a bootable disk", CheckUrl),
    // Archives.
    (0, b"PK\x03\x04", "a zip archive", TakeOut),
    (0, b"PK\x05\x06", "an empty zip archive", CheckUrl),
    (0, b"PK\x07\x08", "a zip archive", TakeOut),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", TakeOut),
    (0, b"Rar!", "a rar archive", TakeOut),
    (0, b"MSCF", "a Windows cabinet archive", TakeOut),
    (0, b"xar!", "a macOS package", TakeOut),
    (0, b"!<arch>", "a Debian package or ar archive", TakeOut),
    (0, b"\xed\xab\xee\xdb", "an RPM package", TakeOut),
    (0, b"070701", "a cpio archive", TakeOut),
    (0, b"070702", "a cpio archive", TakeOut),
    (0, b"070707", "a cpio archive", TakeOut),
    (0, b"\x04\x22\x4d\x18", "an lz4 file, which is not supported (use zstd)", Repack),
    (0, b"\x02\x21\x4c\x18", "an lz4 file, which is not supported (use zstd)", Repack),
    (0, b"LZIP", "an lzip file, which is not supported", Repack),
    (0, b"\x89LZO\0\r\n\x1a\n", "an lzop file, which is not supported", Repack),
    (0, b"\xff\x06\0\0sNaPpY", "a snappy file, which is not supported", Repack),
    // Programs, kernels and firmware.
    (0, b"\x7fELF", "a program or kernel (ELF)", CheckUrl),
    (0, b"\xcf\xfa\xed\xfe", "a macOS program", CheckUrl),
    (0, b"\xca\xfe\xba\xbe", "a program (Java or macOS)", CheckUrl),
    (514, b"HdrS", "a Linux kernel", CheckUrl),
    (0x38, b"ARM\x64", "a Linux kernel", CheckUrl),
    (0x30, b"RISCV\0\0\0", "a Linux kernel", CheckUrl),
    (0, b"\x27\x05\x19\x56", "a U-Boot image", CheckUrl),
    (0, b"\xd0\x0d\xfe\xed", "a device tree or FIT image", CheckUrl),
    (0x28, b"_FVH", "firmware (UEFI)", CheckUrl),
    // Documents.
    (0, b"%PDF", "a PDF document", CheckUrl),
    (0, b"\x89PNG", "a PNG image", CheckUrl),
    (0, b"\xff\xd8\xff", "a JPEG image", CheckUrl),
    (0, b"GIF8", "a GIF image", CheckUrl),
    (0, b"SQLite format 3\0", "a database", CheckUrl),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "a Windows installer or document", CheckUrl),
];

/// Signatures so short that boot code may begin with them: they count only if there is no sign of a disk.
const SHORT_SIGNATURES: &[(usize, &[u8], &str, Advice)] = &[
    (0, b"\xc7\x71", "a cpio archive", TakeOut),
    (0, b"\x5d\0\0", "an lzma file, which is not supported (use xz)", Repack),
    (0, b"\x1f\x9d", "a file packed with compress, which is not supported", Repack),
    (0, b"MZ", "a Windows or UEFI program", CheckUrl),
];

/// Returns the error for a format that the beginning or end of the file identifies with certainty.
pub(super) fn by_signature(image: &Image) -> io::Result<Option<Error>> {
    if image.head.starts_with(b"# Disk DescriptorFile") {
        return Ok(Some(invalid(
            "expected a disk image, but found a VMDK descriptor, which only names the files that contain the disk",
            "convert the disk to a single file: qemu-img convert -O qcow2 disk.vmdk disk.qcow2",
        )));
    }
    if let Some(found) = signature(SIGNATURES, &image.head) {
        return Ok(Some(found));
    }
    if is_tar(&image.head) {
        return tar(image).map(Some);
    }
    // A macOS disk image has its signature at the end.
    if let Some(trailer) = image.size.checked_sub(512)
        && image.bytes(trailer, 8)? == b"koly\0\0\0\x04"
    {
        return Ok(Some(error("a macOS disk image (DMG)", Convert("dmg").text())));
    }
    Ok(None)
}

/// Returns the error for a file without any sign of a disk, if it looks like something else.
pub(super) fn by_shape(head: &[u8]) -> Option<Error> {
    let text = || text(head).map(|(what, advice)| error(what, advice.text()));
    signature(SHORT_SIGNATURES, head).or_else(text)
}

fn signature(signatures: &[(usize, &[u8], &str, Advice)], head: &[u8]) -> Option<Error> {
    let found = signatures.iter().find(|(at, magic, ..)| head.get(*at..at + magic.len()) == Some(*magic));
    found.map(|(_, _, what, advice)| error(what, advice.text()))
}

/// Returns the kind of text, if it is text.
fn text(head: &[u8]) -> Option<(&'static str, Advice)> {
    if head.starts_with(b"\xff\xfe") || head.starts_with(b"\xfe\xff") {
        return Some(("a text file", CheckUrl));
    }
    // Text has no zero bytes and hardly any control characters; the head may end in the middle of a character.
    let whole = match std::str::from_utf8(head) {
        Ok(_) => true,
        Err(error) => error.error_len().is_none() && error.valid_up_to() > 0,
    };
    let control = |byte: &u8| *byte < 0x20 && !matches!(byte, b'\n' | b'\r' | b'\t' | 0x0c | 0x1b);
    let plain = whole && !head.iter().any(control);
    let begin = String::from_utf8_lossy(&head[..head.len().min(512)]).to_ascii_lowercase();
    let begin = begin.trim_start_matches('\u{feff}').trim_start();
    let starts = |with: &[&str]| with.iter().any(|with| begin.starts_with(with));
    // HTML pages in other encodings are not plain text here.
    if starts(&["<!doctype html", "<html", "<head", "<body", "<script", "<meta", "<title", "<!--"]) {
        return Some((
            "a web page",
            Run("open the URL in a browser: it may require a login, or be a page about the image"),
        ));
    }
    if starts(&["<?xml", "<error>", "<metalink"]) {
        return Some(("an XML document", Run("read it: it may say why the server did not return the image")));
    }
    if starts(&["d8:announce", "d10:created by", "d13:announce-list", "d4:info"]) {
        return Some(("a torrent file", Run("download the file that it names, and use that")));
    }
    if !plain {
        return None;
    }
    Some(if starts(&["version https://git-lfs.github.com/"]) {
        ("a Git LFS pointer instead of the file", Run("use the URL of the file itself, or run: git lfs pull"))
    } else if starts(&["{", "["]) {
        ("a JSON document", Run("read it: it may say why the server did not return the image"))
    } else if starts(&["-----begin "]) {
        ("a signature or key", Run("use the URL of the image that it belongs to"))
    } else {
        ("a text file", CheckUrl)
    })
}

/// Returns whether this is the header of an archive (POSIX pax, "ustar Interchange Format"), including old archives: it
/// contains the sum of its bytes, computed with spaces in place of the sum.
fn is_tar(head: &[u8]) -> bool {
    let Some(header) = head.get(..512) else { return false };
    if &header[257..262] == b"ustar" {
        return true;
    }
    let sum = octal(&header[148..156]);
    let bytes = header[..148].iter().chain(b"        ").chain(&header[156..]);
    sum.is_some_and(|sum| sum > 8 * 32 && sum == bytes.map(|byte| u64::from(*byte)).sum::<u64>())
}

fn octal(field: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(field).ok()?;
    u64::from_str_radix(text.trim_matches([' ', '\0']), 8).ok()
}

/// Returns the error for an archive, naming the disk in it if it is among the first files.
fn tar(image: &Image) -> io::Result<Error> {
    const DISKS: [&str; 7] = [".vmdk", ".qcow2", ".vhdx", ".vhd", ".vdi", ".raw", ".img"];
    let (mut at, mut disk, mut appliance) = (0, None, false);
    for _ in 0..64 {
        let header = image.bytes(at, 512)?;
        if !is_tar(&header) {
            break;
        }
        let name: Vec<u8> = header[..100].iter().copied().take_while(|byte| *byte != 0).collect();
        let name = String::from_utf8_lossy(&name).into_owned();
        let lower = name.to_ascii_lowercase();
        appliance |= lower.ends_with(".ovf");
        if disk.is_none() && DISKS.iter().any(|end| lower.ends_with(end)) {
            disk = Some(name);
        }
        let Some(size) = octal(&header[124..136]) else { break };
        at += 512 + size.next_multiple_of(512);
    }
    let what = if appliance { "an appliance (OVA, a tar archive)" } else { "a tar archive" };
    let help = match disk {
        // A name with characters that are special to a shell is not made part of a command.
        Some(disk) if disk.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-/".contains(&byte)) => {
            format!("extract the disk, and use that: tar -xf FILE {disk}").into()
        }
        _ => TakeOut.text(),
    };
    Ok(error(what, help))
}

fn error(what: &str, help: Cow<'static, str>) -> Error {
    invalid(format!("expected a disk image, but found {what}"), help)
}
