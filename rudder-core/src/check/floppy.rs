//! Checks of what fits on a floppy, from names and sizes: before files are downloaded, and again afterwards.

use super::{
    codes,
    files::{Names, references},
    findings::Findings,
};
use crate::{
    manifest::{FileNames, ValuePath},
    visible::Quoted,
};
use std::collections::HashMap;

/// Capacity of a 1.44 MB floppy (FAT12 as `mkfs.fat` formats it): 2880 sectors of 512 bytes, less the boot sector, two
/// tables of 9 sectors and a root directory of 14; and 224 directory entries, one of which is left free.
const SECTORS: u64 = 2880 - 1 - 2 * 9 - 14;
const SECTOR: u64 = 512;
const ENTRIES: u64 = 224 - 1;

/// Help for files that do not fit.
pub(crate) const TOO_LARGE_HELP: &str = "serve large files with `httpDirectory`";

/// Space that files take on a floppy.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct FloppyUse {
    sectors: u64,
    entries: u64,
}

impl FloppyUse {
    /// Computes the space taken by files with these names and sizes in bytes.
    pub(crate) fn of<'n>(files: impl IntoIterator<Item = (&'n str, u64)>) -> Self {
        let mut all = Self::default();
        for (name, size) in files {
            all.sectors = all.sectors.saturating_add(size.div_ceil(SECTOR));
            // One entry for the short name, and one for each 13 UTF-16 units of the long name.
            all.entries += 1 + (name.encode_utf16().count() as u64).div_ceil(13);
        }
        all
    }

    /// Returns a sentence for each limit that is exceeded, with the excess.
    pub(crate) fn excess(self) -> Vec<String> {
        let mut excess = Vec::new();
        if self.sectors > SECTORS {
            let (size, limit) = (self.sectors.saturating_mul(SECTOR), SECTORS * SECTOR);
            excess.push(format!(
                "expected at most {limit} bytes on a 1.44 MB floppy, but found {size} bytes, {} too many",
                size - limit
            ));
        }
        if self.entries > ENTRIES {
            excess.push(format!(
                "expected at most {ENTRIES} directory entries on a floppy, but found {}, {} too many",
                self.entries,
                self.entries - ENTRIES
            ));
        }
        excess
    }
}

/// Whether a FAT directory can hold this name unchanged (fatgen103, "Long Directory Entries").
fn is_fat_name(name: &str) -> bool {
    !name.contains(['"', '*', ':', '<', '>', '?', '\\', '|'])
        && !name.starts_with(' ')
        && !name.ends_with(['.', ' '])
        && name.chars().all(|c| u32::from(c) <= 0xffff)
}

/// Checks the files of a floppy. A file that has yet to be downloaded counts as empty.
pub(super) fn floppy(findings: &mut Findings<'_>, list: &FileNames, at: &ValuePath<'_>, names: &Names<'_>) {
    let list_at = at.key("files");
    let mut seen = HashMap::new();
    for (index, reference) in list.files.iter().enumerate() {
        let Some(name) = reference.name.as_deref() else { continue };
        let at = list_at.index(index);
        if !is_fat_name(name) {
            findings.report(
                &codes::INVALID_FILE_NAME,
                &at.key("name"),
                format!(
                    "expected a name that a FAT floppy can hold, but found {name:?}",
                    name = Quoted(name)
                ),
            );
        }
        if let Some(first) = seen.insert(name.to_lowercase(), name) {
            findings
                .report(
                    &codes::DUPLICATE_NAME,
                    &at.key("name"),
                    format!(
                        "expected unique file names on the floppy, but found {:?} and {:?}",
                        Quoted(name),
                        Quoted(first)
                    ),
                )
                .help = Some("FAT does not distinguish upper and lower case".to_owned());
        }
    }
    let files = references(findings, list, at, names);
    let used = FloppyUse::of(files.iter().map(|file| {
        let size = file.inline.as_ref().map_or(0, |text| text.len() as u64);
        (file.name.as_deref().unwrap_or_default(), size)
    }));
    for excess in used.excess() {
        findings.report(&codes::FLOPPY_TOO_LARGE, &list_at, excess).help = Some(TOO_LARGE_HELP.to_owned());
    }
}
