//! Floppies: the image of a 1.44 MB disk with a FAT12 file system (ECMA-107) and long names, which every firmware, boot
//! loader and installer reads.
//!
//! The same files always result in the same image, byte for byte: it contains no timestamps.

use crate::{
    Error, ErrorKind, Result,
    check::{FLOPPY_HELP, FloppyUse},
};
use std::{
    collections::HashSet,
    io::{Cursor, Write as _},
    sync::Arc,
};

/// The size of the image in bytes: 80 tracks on 2 sides, 18 sectors each.
pub const SIZE: usize = 80 * 2 * 18 * 512;

/// Checks whether files with these names and sizes (in bytes) fit.
///
/// # Errors
/// `InvalidInput` if they do not; the message says by how much.
pub fn check_size<'n>(files: impl IntoIterator<Item = (&'n str, u64)>) -> Result<()> {
    match FloppyUse::of(files).excess().into_iter().next() {
        None => Ok(()),
        Some(excess) => Err(Error::new(ErrorKind::InvalidInput, excess).with_help(FLOPPY_HELP)),
    }
}

/// Returns the image of a floppy with these files in its root directory.
///
/// # Errors
/// `InvalidInput` when they do not fit, when FAT cannot store a name, or when two names differ in case only.
pub fn image(files: &[(&str, &[u8])]) -> Result<Arc<[u8]>> {
    check_size(files.iter().map(|(name, bytes)| (*name, bytes.len() as u64)))?;
    let mut names = HashSet::new();
    for (name, _) in files {
        if !names.insert(name.to_uppercase()) {
            let message =
                format!("expected names that differ in more than their case, but found {name:?} again");
            return Err(Error::new(ErrorKind::InvalidInput, message).with_context("file", *name));
        }
    }
    let mut disk = Cursor::new(vec![0u8; SIZE]);
    let failed =
        |error| Error::new(ErrorKind::Internal, "cannot create the image of a floppy").with_source(error);
    fatfs::format_volume(&mut disk, geometry()).map_err(failed)?;
    {
        let system = fatfs::FileSystem::new(&mut disk, fatfs::FsOptions::new()).map_err(failed)?;
        for (name, bytes) in files {
            write(&system, name, bytes).map_err(|error| {
                let message = "expected a file that a FAT floppy can hold, but it cannot be written";
                Error::new(ErrorKind::InvalidInput, message).with_context("file", *name).with_source(error)
            })?;
        }
        system.unmount().map_err(failed)?;
    }
    Ok(disk.into_inner().into())
}

/// Returns the geometry that every DOS used for a 3.5-inch high-density disk.
fn geometry() -> fatfs::FormatVolumeOptions {
    fatfs::FormatVolumeOptions::new()
        .fat_type(fatfs::FatType::Fat12)
        .bytes_per_sector(512)
        .bytes_per_cluster(512)
        .total_sectors(2880)
        .max_root_dir_entries(224)
        .fats(2)
        .media(0xf0)
        .sectors_per_track(18)
        .heads(2)
        .drive_num(0)
        .volume_id(0x5275_6464)
}

fn write(system: &fatfs::FileSystem<&mut Cursor<Vec<u8>>>, name: &str, bytes: &[u8]) -> std::io::Result<()> {
    let mut file = system.root_dir().create_file(name)?;
    file.truncate()?;
    file.write_all(bytes)?;
    file.flush()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::io::Read as _;

    /// Returns the files of an image, as read in order by an independent reader: name, content.
    fn files(image: &[u8]) -> Vec<(String, Vec<u8>)> {
        let system = fatfs::FileSystem::new(Cursor::new(image.to_vec()), fatfs::FsOptions::new()).unwrap();
        let entries: Vec<_> = system.root_dir().iter().map(|entry| entry.unwrap()).collect();
        entries
            .into_iter()
            .map(|entry| {
                let mut bytes = Vec::new();
                entry.to_file().read_to_end(&mut bytes).unwrap();
                (entry.file_name(), bytes)
            })
            .collect()
    }

    #[test]
    fn files_keep_their_long_names() {
        let noise: Vec<u8> =
            (0..20_000u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
        let given: [(&str, &[u8]); 5] = [
            ("Autounattend.xml", b"<unattend/>\r\n"),
            ("preseed.cfg", b""),
            ("a long name with blanks, dots.and.ümläuts 1234567890.txt", &noise),
            ("UPPER.TXT", b"x"),
            ("#!@{}~", b"\0\xff"),
        ];
        let made = image(&given).unwrap();
        assert_eq!(made.len(), 1_474_560);
        let read = files(&made);
        let given: Vec<(String, Vec<u8>)> =
            given.iter().map(|(n, b)| ((*n).to_owned(), b.to_vec())).collect();
        assert_eq!(read, given);
    }

    #[test]
    fn the_image_has_the_layout_of_a_high_density_disk() {
        let made = image(&[]).unwrap();
        let word = |at: usize| u16::from_le_bytes([made[at], made[at + 1]]);
        // BIOS parameter block (ECMA-107, 9.2): sector, cluster, reserved, tables, entries, sectors, medium, table,
        // track, sides.
        let block = (
            word(11),
            made[13],
            word(14),
            made[16],
            word(17),
            word(19),
            made[21],
            word(22),
            word(24),
            word(26),
        );
        assert_eq!(block, (512, 1, 1, 2, 224, 2880, 0xf0, 9, 18, 2));
        assert_eq!((word(510), &made[54..62]), (0xaa55, b"FAT12   ".as_slice()));
    }

    #[test]
    fn the_image_can_be_filled_to_the_last_sector() {
        let most = vec![7u8; 2847 * 512];
        assert_eq!(files(&image(&[("full", &most)]).unwrap()), [("full".to_owned(), most.clone())]);
        let error = image(&[("full", &most), ("one", b"x")]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        assert_eq!(
            error.to_string(),
            "expected at most 1457664 bytes on a 1.44 MB floppy, but found 1458176 bytes, 512 too many"
        );
    }

    #[test]
    fn the_directory_can_be_filled_to_the_last_entry() {
        let names: Vec<String> = (0..112).map(|n| format!("{n:03}")).collect();
        let all: Vec<(&str, &[u8])> = names.iter().map(|name| (name.as_str(), b"".as_slice())).collect();
        assert_eq!(files(&image(&all[..111]).unwrap()).len(), 111);
        let error = image(&all).unwrap_err().to_string();
        assert_eq!(error, "expected at most 223 directory entries on a floppy, but found 224, 1 too many");
    }

    #[test]
    fn names_that_fat_cannot_store_are_refused() {
        for name in ["a:b", "a\\b", "smile \u{1f600}", "what?"] {
            assert_eq!(image(&[(name, b"")]).unwrap_err().kind(), ErrorKind::InvalidInput, "{name}");
        }
        assert_eq!(image(&[("A", b""), ("a", b"")]).unwrap_err().kind(), ErrorKind::InvalidInput);
    }
}
