//! Tests of each format with a header made here, and of each way in which an image can refer to other files.

#![allow(clippy::unwrap_used)]

use super::*;

fn recognise(bytes: &[u8]) -> Result<Recognised> {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), bytes).unwrap();
    recognise_file(file.path())
}

fn accepted(bytes: &[u8], format: ImageFormat, virtual_size: u64) {
    assert_eq!(recognise(bytes).unwrap(), Recognised { format, virtual_size, remark: None });
    // Truncated anywhere, it is refused or recognised, and never causes a panic or an I/O error.
    for length in (0..bytes.len()).step_by(97) {
        if let Err(error) = recognise(&bytes[..length]) {
            assert_eq!(error.kind(), ErrorKind::InvalidImage, "cut to {length}: {error:?}");
        }
    }
}

fn refused(bytes: &[u8], what: &str) {
    let error = recognise(bytes).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidImage);
    assert!(error.to_string().contains(what), "{error}");
    assert!(error.help().is_some());
}

/// Returns an image with these bytes at these offsets, and zeros between.
fn image(size: usize, parts: &[(usize, &[u8])]) -> Vec<u8> {
    let mut bytes = vec![0; size];
    for (offset, part) in parts {
        bytes[*offset..*offset + part.len()].copy_from_slice(part);
    }
    bytes
}

const GIB: u64 = 1 << 30;

fn qcow2(extra: &[(usize, &[u8])]) -> Vec<u8> {
    let mut bytes = image(
        4096,
        &[
            (0, b"QFI\xfb\0\0\0\x03"),
            (20, &16u32.to_be_bytes()),
            (24, &GIB.to_be_bytes()),
            (100, &104u32.to_be_bytes()),
        ],
    );
    for (offset, part) in extra {
        bytes[*offset..*offset + part.len()].copy_from_slice(part);
    }
    bytes
}

#[test]
fn a_qcow2_that_is_not_self_contained_is_refused() {
    accepted(&qcow2(&[]), ImageFormat::Qcow2, GIB);
    // Feature names and a dirty bit are accepted.
    let names: [u8; 12] = *b"\x68\x03\xf8\x57\0\0\0\x03abc\0";
    accepted(&qcow2(&[(79, &[1]), (104, &names)]), ImageFormat::Qcow2, GIB);
    accepted(&qcow2(&[(7, &[2])]), ImageFormat::Qcow2, GIB);
    refused(&qcow2(&[(8, &200u64.to_be_bytes())]), "a QCOW2 image that has a backing file");
    refused(&qcow2(&[(79, &[4])]), "stores its data in another file");
    refused(&qcow2(&[(104, &names), (120, b"DATA\0\0\0\x0b/etc/shadow")]), "stores its data in another file");
    // Version 2 also has extensions.
    refused(&qcow2(&[(7, &[2]), (72, b"DATA\0\0\0\x0b/etc/shadow")]), "stores its data in another file");
    refused(&qcow2(&[(32, &1u32.to_be_bytes())]), "is encrypted");
    refused(&qcow2(&[(79, &[2])]), "is marked as corrupt");
    refused(&qcow2(&[(7, &[1])]), "has version 1");
    refused(&qcow2(&[(24, &[0; 8])]), "a qcow2 image of 0 bytes");
    // Its first table is beyond the end of the file.
    refused(&qcow2(&[(36, &2_u32.to_be_bytes()), (40, &4088_u64.to_be_bytes())]), "truncated or damaged");
    refused(&qcow2(&[(100, &[0xff; 4])]), "truncated or damaged");
    refused(b"QFI\xfb\0\0\0\x03", "truncated or damaged");
}

fn vmdk(capacity: u64, descriptor: &str) -> Vec<u8> {
    image(
        16 * 1024,
        &[
            (0, b"KDMV\x01\0\0\0"),
            (12, &capacity.to_le_bytes()),
            (28, &1u64.to_le_bytes()),
            (36, &20u64.to_le_bytes()),
            (512, descriptor.as_bytes()),
        ],
    )
}

#[test]
fn a_vmdk_that_is_not_self_contained_is_refused() {
    let own = "# Disk DescriptorFile\nCID=1\nparentCID=ffffffff\nRW 2097152 SPARSE \"disk.vmdk\"\n";
    accepted(&vmdk(2_097_152, own), ImageFormat::Vmdk, GIB);
    refused(&vmdk(2_097_152, &format!("{own}parentFileNameHint=\"/etc/shadow\"\n")), "has a parent image");
    refused(&vmdk(2_097_152, &format!("{own}RW 8 FLAT \"/etc/shadow\" 0\n")), "in other files");
    refused(&vmdk(0, own), "in other files");
    refused(own.as_bytes(), "found a VMDK descriptor");
    refused(b"COWD\x01\0\0\0", "COWD");
    // The header of a stream-optimised image is at its end.
    let mut streamed = vmdk(2_097_152, own);
    streamed[56..64].copy_from_slice(&[0xff; 8]);
    let end = streamed.len();
    streamed.extend(vmdk(2_097_152, "")[..512].to_vec());
    streamed.extend([0; 512]);
    accepted(&streamed, ImageFormat::Vmdk, GIB);
    let mut fooled = streamed.clone();
    fooled[12..20].fill(0);
    refused(&fooled, "in other files");
    streamed[end] = 0;
    refused(&streamed, "truncated or damaged");
}

#[test]
fn vdi_vhd_and_vhdx_that_are_not_self_contained_are_refused() {
    let vdi = |kind: u8| {
        image(1024, &[(0x40, b"\x7f\x10\xda\xbe\x01\0\x01\0"), (0x4c, &[kind]), (0x170, &GIB.to_le_bytes())])
    };
    accepted(&vdi(1), ImageFormat::Vdi, GIB);
    refused(&vdi(4), "a snapshot of another image");
    // Two blocks of 1 MiB, neither of which exists.
    let mut cut = vdi(1);
    cut[0x178..0x17c].copy_from_slice(&(1_u32 << 20).to_le_bytes());
    cut[0x184..0x188].copy_from_slice(&2_u32.to_le_bytes());
    refused(&cut, "truncated or damaged");

    let footer = |kind: u8, size: u64| {
        let mut footer = image(512, &[(0, b"conectix"), (48, &size.to_be_bytes()), (63, &[kind])]);
        let sum = !footer.iter().map(|byte| u32::from(*byte)).sum::<u32>();
        footer[64..68].copy_from_slice(&sum.to_be_bytes());
        footer
    };
    let dynamic = |kind: u8| image(2560, &[(0, &footer(kind, GIB)), (2048, &footer(kind, GIB))]);
    accepted(&dynamic(3), ImageFormat::Vhd, GIB);
    refused(&dynamic(4), "has a parent image");
    refused(&dynamic(3)[..2048], "truncated or damaged");
    let fixed = image(2560, &[(2048, &footer(2, 2048))]);
    assert_eq!(recognise(&fixed).unwrap().virtual_size, 2048);
    refused(&image(2560, &[(2048, &footer(2, 4096))]), "truncated or damaged");
    let mut flipped = fixed.clone();
    flipped[2048 + 53] ^= 1;
    refused(&flipped, "truncated or damaged");

    let vhdx = |parameters: u8| {
        image(
            320 * 1024,
            &[
                (0, b"vhdxfile"),
                (196_608, b"regi"),
                (196_616, &1u32.to_le_bytes()),
                (196_624, b"\x06\xa2\x7c\x8b\x90\x47\x9a\x4b\xb8\xfe\x57\x5f\x05\x0f\x88\x6e"),
                (196_640, &262_144u64.to_le_bytes()),
                (262_144, b"metadata\0\0\x02\0"),
                (262_176, b"\x37\x67\xa1\xca\x36\xfa\x43\x4d\xb3\xb6\x33\xf0\xaa\x44\xe7\x6b"),
                (262_192, &0x1000u32.to_le_bytes()),
                (262_208, b"\x24\x42\xa5\x2f\x1b\xcd\x76\x48\xb2\x11\x5d\xbe\xd8\x3b\xf4\xb8"),
                (262_224, &0x1008u32.to_le_bytes()),
                (266_244, &[parameters]),
                (266_248, &GIB.to_le_bytes()),
            ],
        )
    };
    let whole = vhdx(0);
    assert_eq!(
        recognise(&whole).unwrap(),
        Recognised { format: ImageFormat::Vhdx, virtual_size: GIB, remark: None }
    );
    refused(&whole[..200_000], "truncated or damaged");
    refused(&vhdx(2), "has a parent image");
}

#[test]
fn raw_disks_are_recognised_by_their_content() {
    let disk = |size, parts: &[(usize, &[u8])]| accepted(&image(size, parts), ImageFormat::Raw, size as u64);
    disk(1024, &[(510, &[0x55, 0xaa])]);
    disk(2048, &[(512, b"EFI PART")]);
    disk(40_960, &[(0x8001, b"CD001")]);
    disk(4096, &[(0x438, &[0x53, 0xef])]);
    // A data disk without any signature, and an empty one.
    disk(4096, &[(0, &[0, 1, 2, 3, 0xff])]);
    disk(512, &[]);
}

fn gpt(sectors: u64) -> Vec<u8> {
    image(
        usize::try_from(sectors * 512).unwrap(),
        &[
            (510, &[0x55, 0xaa]),
            (512, b"EFI PART"),
            (536, &1_u64.to_le_bytes()),
            (544, &(sectors - 1).to_le_bytes()),
        ],
    )
}

#[test]
fn bytes_that_follow_a_disk_are_reported() {
    accepted(&gpt(64), ImageFormat::Raw, 64 * 512);
    let behind = |bytes: &[u8]| [gpt(64), bytes.to_vec()].concat();
    let error = recognise(&behind(&[7; 100])).unwrap_err();
    assert_eq!(
        error.report(),
        "expected a disk of whole sectors, but found a GPT disk that ends at byte 32768, followed by 100 bytes\n  help: \
         remove the bytes that follow the disk: truncate -s 32768 FILE"
    );
    let remark = recognise(&behind(&[7; 512])).unwrap().remark.unwrap();
    assert_eq!(remark, "512 bytes follow the end of a GPT disk; they become part of the disk");
    // A disk that was enlarged.
    assert_eq!(recognise(&behind(&[0; 512])).unwrap().remark, None);
    let remark = recognise(&gpt(64)[..16 * 1024]).unwrap().remark.unwrap();
    assert!(remark.contains("appears to be truncated"), "{remark}");
    refused(&gpt(64)[..16_000], "is truncated to 16000");
    let mbr = |size: usize| {
        image(
            size,
            &[(450, &[0x83]), (454, &1_u32.to_le_bytes()), (458, &3_u32.to_le_bytes()), (510, &[0x55, 0xaa])],
        )
    };
    accepted(&mbr(2048), ImageFormat::Raw, 2048);
    refused(&mbr(2148), "an MBR disk that ends at byte 2048, followed by 100 bytes");
}

#[test]
fn unsupported_formats_are_named_with_help() {
    let named = |bytes: &[u8], what: &str, help: &str| {
        let error = recognise(bytes).unwrap_err();
        assert_eq!(error.to_string(), format!("expected a disk image, but found {what}"));
        assert!(error.help().unwrap().contains(help), "{error:?}");
    };
    // The same with the signature of a boot sector.
    let begins = |with: &[u8]| image(4096, &[(0, with), (510, &[0x55, 0xaa])]);
    let convert = |driver: &str| format!("qemu-img convert -f {driver} -O qcow2 FILE disk.qcow2");
    named(&begins(b"QED\0"), "a QED image", &convert("qed"));
    named(&begins(b"WithoutFreeSpace"), "a Parallels image", &convert("parallels"));
    named(&begins(b"WithouFreSpacExt"), "a Parallels image", &convert("parallels"));
    named(&begins(b"Bochs Virtual HD Image"), "a Bochs image", &convert("bochs"));
    named(&begins(b"#!/bin/sh\n#V2.0 Format\n"), "a cloop image", &convert("cloop"));
    named(&begins(b"LUKS\xba\xbe\0\x02"), "a disk encrypted with LUKS", "cryptsetup open");
    named(&begins(b"\x3a\xff\x26\xed\x01\0"), "an Android sparse image", "simg2img");
    named(&begins(b"MSWIM\0\0\0"), "a Windows image (WIM), which contains files rather than a disk", "ISO");
    named(&begins(b"EVF\x09\x0d\x0a\xff\0"), "an EnCase image (EWF)", "ewfexport");
    named(&begins(b"AFF10\r\n\0"), "an AFF image", "affconvert");
    named(&begins(b"hsqs"), "a squashfs file system, which is not a bootable disk", "unsquashfs");
    named(&begins(b"7z\xbc\xaf\x27\x1c"), "a 7z archive", "extract the disk image");
    named(&begins(b"Rar!\x1a\x07"), "a rar archive", "extract the disk image");
    named(&begins(b"\x7fELF"), "a program or kernel (ELF)", "check that the URL");
    named(
        &image(1024, &[(0, b"MZ"), (510, &[0x55, 0xaa]), (514, b"HdrS")]),
        "a Linux kernel",
        "check that the URL",
    );
    named(&image(4096, &[(3584, b"koly\0\0\0\x04")]), "a macOS disk image (DMG)", &convert("dmg"));
    // Signatures too short to outweigh that of a boot sector.
    named(&image(4096, &[(0, b"MZ")]), "a Windows or UEFI program", "check that the URL");
    named(
        &image(4096, &[(0, b"\x5d\0\0\x80")]),
        "an lzma file, which is not supported (use xz)",
        "unpack it",
    );
    assert!(recognise(&begins(b"MZ")).is_ok() && recognise(&begins(b"\x1f\x9d")).is_ok());
}

#[test]
fn text_instead_of_an_image_is_named() {
    let named = |text: &str, what: &str| {
        let error = recognise(text.as_bytes()).unwrap_err();
        assert_eq!(error.to_string(), format!("expected a disk image, but found {what}"), "{text}");
    };
    named("\u{feff}\r\n<!-- x --><html>", "a web page");
    named("<script>location='/login'</script>", "a web page");
    named("<?xml version=\"1.0\"?><Error><Code>NoSuchKey</Code></Error>", "an XML document");
    named("{\"message\": \"Not Found\"}", "a JSON document");
    named(
        "version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
        "a Git LFS pointer instead of the file",
    );
    named("-----BEGIN PGP SIGNATURE-----\n", "a signature or key");
    named("d8:announce35:udp://tracker", "a torrent file");
    named("404: not found", "a text file");
}

#[test]
fn an_appliance_error_names_the_disk_to_extract() {
    let entry = |name: &str, size: usize, posix: bool| {
        let mut header = image(
            512,
            &[(0, name.as_bytes()), (100, b"0000644\0"), (124, format!("{size:011o}\0").as_bytes())],
        );
        if posix {
            header[257..265].copy_from_slice(b"ustar\x0000");
        }
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        header.resize(512 + size.next_multiple_of(512), 0);
        header
    };
    for posix in [true, false] {
        let ova = [entry("web.ovf", 700, posix), entry("web-disk1.vmdk", 100, posix), vec![0; 1024]].concat();
        let error = recognise(&ova).unwrap_err();
        assert_eq!(
            error.report(),
            "expected a disk image, but found an appliance (OVA, a tar archive)\n  help: extract the disk, and use that: \
             tar -xf FILE web-disk1.vmdk"
        );
    }
    let error = recognise(&[entry("$(reboot).img", 0, true), vec![0; 1024]].concat()).unwrap_err();
    assert_eq!(error.to_string(), "expected a disk image, but found a tar archive");
    assert!(!error.help().unwrap().contains("reboot"), "{error:?}");
}

#[test]
fn files_that_are_not_disks_are_named() {
    refused(b"", "an empty file");
    refused(b"\n <HTML><head>", "a web page");
    refused("Zu viele Anfragen für heute\n".repeat(64).as_bytes(), "a text file");
    refused(&[b'x'; 512], "a text file");
    refused(&image(1024, &[(257, b"ustar")]), "a tar archive");
    refused(&image(1024, &[(0, b"PK\x03\x04")]), "a zip archive");
    refused(&image(1000, &[(3, &[1, 2])]), "1000 bytes of unknown data, which is not a multiple of 512");
    // A boot signature does not make up for half a sector.
    refused(&image(1000, &[(510, &[0x55, 0xaa])]), "not a multiple of 512");
}
