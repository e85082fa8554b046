//! Each format from a header made here, and each way in which an image may reach for other files.

#![allow(clippy::unwrap_used)]

use super::*;

fn recognise(bytes: &[u8]) -> Result<Recognised> {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), bytes).unwrap();
    recognise_file(file.path())
}

fn accepted(bytes: &[u8], format: ImageFormat, virtual_size: u64) {
    assert_eq!(recognise(bytes).unwrap(), Recognised { format, virtual_size });
    // Cut anywhere, it is refused or recognised, and never a panic or an I/O error.
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

/// These bytes at these offsets, zeros between.
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
fn qcow2_stands_alone_or_is_refused() {
    accepted(&qcow2(&[]), ImageFormat::Qcow2, GIB);
    // Feature names and a dirty bit are fine.
    let names: [u8; 12] = *b"\x68\x03\xf8\x57\0\0\0\x03abc\0";
    accepted(&qcow2(&[(79, &[1]), (104, &names)]), ImageFormat::Qcow2, GIB);
    accepted(&qcow2(&[(7, &[2])]), ImageFormat::Qcow2, GIB);
    refused(&qcow2(&[(8, &200u64.to_be_bytes())]), "a QCOW2 image that has a backing file");
    refused(&qcow2(&[(79, &[4])]), "keeps its data in another file");
    refused(&qcow2(&[(104, &names), (120, b"DATA\0\0\0\x0b/etc/shadow")]), "keeps its data in another file");
    // Version 2 has extensions too.
    refused(&qcow2(&[(7, &[2]), (72, b"DATA\0\0\0\x0b/etc/shadow")]), "keeps its data in another file");
    refused(&qcow2(&[(32, &1u32.to_be_bytes())]), "is encrypted");
    refused(&qcow2(&[(79, &[2])]), "is marked as corrupt");
    refused(&qcow2(&[(7, &[1])]), "has version 1");
    refused(&qcow2(&[(24, &[0; 8])]), "a qcow2 image of 0 bytes");
    refused(&qcow2(&[(100, &[0xff; 4])]), "cut short or damaged");
    refused(b"QFI\xfb\0\0\0\x03", "cut short or damaged");
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
fn vmdk_stands_alone_or_is_refused() {
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
    refused(&streamed, "cut short or damaged");
}

#[test]
fn vdi_vhd_and_vhdx_stand_alone_or_are_refused() {
    let vdi = |kind: u8| {
        image(1024, &[(0x40, b"\x7f\x10\xda\xbe\x01\0\x01\0"), (0x4c, &[kind]), (0x170, &GIB.to_le_bytes())])
    };
    accepted(&vdi(1), ImageFormat::Vdi, GIB);
    refused(&vdi(4), "a snapshot of another image");

    let vhd = |at: usize, size: usize, kind: u8| {
        image(size, &[(at, b"conectix"), (at + 48, &GIB.to_be_bytes()), (at + 63, &[kind])])
    };
    accepted(&vhd(0, 2048, 3), ImageFormat::Vhd, GIB);
    assert_eq!(recognise(&vhd(2048, 2560, 2)).unwrap().format, ImageFormat::Vhd);
    refused(&vhd(0, 2048, 4), "has a parent image");

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
    assert_eq!(recognise(&whole).unwrap(), Recognised { format: ImageFormat::Vhdx, virtual_size: GIB });
    refused(&whole[..200_000], "cut short or damaged");
    refused(&vhdx(2), "has a parent image");
}

#[test]
fn raw_is_what_looks_like_a_disk() {
    let disk = |size, parts: &[(usize, &[u8])]| accepted(&image(size, parts), ImageFormat::Raw, size as u64);
    disk(1024, &[(510, &[0x55, 0xaa])]);
    disk(2048, &[(512, b"EFI PART")]);
    disk(40_960, &[(0x8001, b"CD001")]);
    disk(4096, &[(0x438, &[0x53, 0xef])]);
    // A data disk without any sign of one, and an empty one.
    disk(4096, &[(0, &[0, 1, 2, 3, 0xff])]);
    disk(512, &[]);
}

#[test]
fn what_is_no_disk_is_named() {
    refused(b"", "an empty file");
    refused(b"\n <HTML><head>", "a web page");
    refused("Zu viele Anfragen für heute\n".repeat(64).as_bytes(), "a text file");
    refused(&[b'x'; 512], "a text file");
    refused(&image(1024, &[(257, b"ustar")]), "a tar archive");
    refused(&image(1024, &[(0, b"PK\x03\x04")]), "a zip archive");
    refused(&image(1000, &[(3, &[1, 2])]), "1000 bytes of unknown data, which is not a multiple of 512");
    // A signature does not make up for half a sector.
    refused(&image(1000, &[(510, &[0x55, 0xaa])]), "not a multiple of 512");
}
