//! The entries that belong in a store: used to recognise stores from before there were markers, and to make a store private
//! that was open to others.

use super::{
    durable::{self, io_error},
    layout::{self, MARKER, MARKER_TEMPORARY},
};
use rudder_core::{Result, backend::LabId, digest::Digest, units};
use std::{
    fs::{self, FileType},
    io,
    path::{Path, PathBuf},
};

/// The directories that every store had before there were markers.
const ORIGINAL_DIRECTORIES: [&str; 7] =
    ["blobs/sha256", "modules", "index/urls", "index/images", "downloads", "labs", "locks"];

/// The directory of modules written by the memory backend.
const MEMORY_MODULES: &str = "memory";

/// A kind of directory in a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum DirectoryKind {
    Root,
    Blobs,
    BlobPrefixes,
    BlobPrefix,
    Index,
    Records,
    Downloads,
    Locks,
    Modules,
    Module,
    /// A version of a module, a lab, or a leftover of either: its whole content belongs to the store.
    Owned,
    Labs,
    Memory,
    MemoryModule,
}

/// The kind of an entry of a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Entry {
    /// An entry that does not belong to the store.
    Foreign,
    /// A file of the store, or a symbolic link that it made.
    File,
    /// A directory of the store.
    Directory(DirectoryKind),
}

/// Returns the first entry of an unmarked directory that no store has, or that every store has and this one lacks; relative to
/// the directory.
pub(super) fn foreign(root: &Path) -> Result<Option<PathBuf>> {
    let is_dir = |name: &str| fs::symlink_metadata(root.join(name)).is_ok_and(|meta| meta.is_dir());
    let mut foreign = None;
    walk(root, DirectoryKind::Root, &mut |path, entry| {
        if entry == Entry::Foreign && foreign.is_none() {
            foreign = Some(path.strip_prefix(root).unwrap_or(path).to_owned());
        }
        Ok(true)
    })?;
    if foreign.is_some() || ORIGINAL_DIRECTORIES.iter().all(|name| is_dir(name)) {
        return Ok(foreign);
    }
    // A store of only the memory backend has none of the others.
    let other = list(root)?.into_iter().map(|(name, _)| name).find(|name| name != MEMORY_MODULES);
    Ok(other.map(PathBuf::from))
}

/// Removes the permissions of everyone but the owner from everything that belongs to the store.
pub(super) fn make_private(root: &Path) -> Result<()> {
    walk(root, DirectoryKind::Root, &mut |path, entry| {
        let is_file = || fs::symlink_metadata(path).is_ok_and(|meta| meta.is_file());
        match entry {
            Entry::Directory(_) => layout::make_private(path)?,
            Entry::File if is_file() => layout::make_private(path)?,
            _ => {}
        }
        Ok(true)
    })
}

/// Returns whether this is the name of something that a store was creating or removing when its process was killed.
pub(super) fn is_leftover(name: &str) -> bool {
    if let Some(rest) = name.strip_prefix(".new-") {
        return is_random(rest, 6);
    }
    let rest = name.strip_prefix(".removed-").or_else(|| name.strip_prefix(".current-"));
    rest.is_some_and(|rest| match rest.rsplit_once('-') {
        None => is_random(rest, 8),
        Some((lab, rest)) => LabId::parse(lab).is_ok() && is_random(rest, 8),
    })
}

/// Returns whether this is the name of a file that is being written.
pub(super) fn is_temporary(name: &str) -> bool {
    name.strip_prefix(".tmp-").is_some_and(|rest| is_random(rest, 6))
}

/// Returns whether this could be the random part of a name.
fn is_random(text: &str, length: usize) -> bool {
    text.len() == length && text.bytes().all(|byte| byte.is_ascii_alphanumeric())
}

/// Returns the entries that do not belong to the store in the directories that it cleans up: those of labs and modules.
pub(super) fn foreign_entries(root: &Path) -> Result<Vec<PathBuf>> {
    let mut foreign_entries = Vec::new();
    for (directory, parent) in [("labs", DirectoryKind::Labs), ("modules", DirectoryKind::Modules)] {
        let mut visit = |path: &Path, entry: Entry| {
            if entry == Entry::Foreign {
                foreign_entries.push(path.to_owned());
            }
            // Directories that belong to the store as a whole are not searched.
            Ok(entry == Entry::Directory(DirectoryKind::Module))
        };
        walk(&root.join(directory), parent, &mut visit)?;
    }
    Ok(foreign_entries)
}

/// Visits the entries of a directory, and descends where the visitor returns `true`.
fn walk(
    directory: &Path,
    parent: DirectoryKind,
    visit: &mut dyn FnMut(&Path, Entry) -> Result<bool>,
) -> Result<()> {
    for (name, kind) in list(directory)? {
        let path = directory.join(&name);
        let entry = classify(parent, &name, kind, &path);
        if visit(&path, entry)?
            && let Entry::Directory(parent) = entry
        {
            walk(&path, parent, visit)?;
        }
    }
    Ok(())
}

/// Returns the entries of a directory with their kinds, in order; none if it does not exist. Fails for a symbolic link to one.
pub(super) fn list(directory: &Path) -> Result<Vec<(String, FileType)>> {
    let failed = |error| io_error("list", directory, error);
    if fs::symlink_metadata(directory).is_ok_and(|meta| !meta.is_dir()) {
        durable::expect_dir(directory)?;
    }
    let listing = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(failed)?,
    };
    let mut entries = Vec::new();
    for entry in listing {
        let entry = entry.map_err(failed)?;
        match entry.file_type() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            kind => entries.push((entry.file_name().to_string_lossy().into_owned(), kind.map_err(failed)?)),
        }
    }
    entries.sort_by(|one, other| one.0.cmp(&other.0));
    Ok(entries)
}

fn classify(parent: DirectoryKind, name: &str, kind: FileType, path: &Path) -> Entry {
    let is_digest = |name: &str| name.parse::<Digest>().is_ok();
    let stem = |ending: &str| name.strip_suffix(ending).is_some_and(is_digest);
    let directory_if =
        |is: bool, parent: DirectoryKind| if is { Entry::Directory(parent) } else { Entry::Foreign };
    let file_if = |is: bool| if is { Entry::File } else { Entry::Foreign };
    if kind.is_dir() {
        return match parent {
            DirectoryKind::Root => match name {
                "blobs" => Entry::Directory(DirectoryKind::Blobs),
                "index" => Entry::Directory(DirectoryKind::Index),
                "downloads" => Entry::Directory(DirectoryKind::Downloads),
                "modules" => Entry::Directory(DirectoryKind::Modules),
                "labs" => Entry::Directory(DirectoryKind::Labs),
                "locks" => Entry::Directory(DirectoryKind::Locks),
                MEMORY_MODULES => Entry::Directory(DirectoryKind::Memory),
                _ => Entry::Foreign,
            },
            DirectoryKind::Blobs => directory_if(name == "sha256", DirectoryKind::BlobPrefixes),
            DirectoryKind::BlobPrefixes => directory_if(
                name.len() == 2 && name.bytes().all(|b| b.is_ascii_hexdigit()),
                DirectoryKind::BlobPrefix,
            ),
            DirectoryKind::Index => {
                directory_if(name.bytes().all(|b| b.is_ascii_lowercase()), DirectoryKind::Records)
            }
            DirectoryKind::Modules => directory_if(units::is_name(name), DirectoryKind::Module),
            // A copy that followed symbolic links has a directory named `current`.
            DirectoryKind::Module => {
                directory_if(is_digest(name) || name == "current" || is_leftover(name), DirectoryKind::Owned)
            }
            DirectoryKind::Labs => {
                directory_if(is_leftover(name) || is_lab(name, path), DirectoryKind::Owned)
            }
            DirectoryKind::Memory => directory_if(units::is_name(name), DirectoryKind::MemoryModule),
            DirectoryKind::Owned => Entry::Directory(DirectoryKind::Owned),
            DirectoryKind::BlobPrefix
            | DirectoryKind::Records
            | DirectoryKind::Downloads
            | DirectoryKind::Locks
            | DirectoryKind::MemoryModule => Entry::Foreign,
        };
    }
    // A lab also contains the sockets of its machines.
    if parent == DirectoryKind::Owned {
        return Entry::File;
    }
    if kind.is_symlink() {
        return file_if(parent == DirectoryKind::Module && (name == "current" || is_leftover(name)));
    }
    file_if(
        kind.is_file()
            && match parent {
                DirectoryKind::Root => name == MARKER || name.starts_with(MARKER_TEMPORARY),
                DirectoryKind::BlobPrefix => is_digest(name),
                DirectoryKind::Records => stem(".json") || is_temporary(name),
                DirectoryKind::Downloads => {
                    [".json", ".part", ".sum"].into_iter().any(stem) || is_temporary(name)
                }
                DirectoryKind::Locks => {
                    ["labs", "temporary", "kept"].contains(&name)
                        || ["blob-", "module-", "download-"].iter().any(|prefix| name.starts_with(prefix))
                }
                DirectoryKind::MemoryModule => name == "module.json" || stem(".json") || is_temporary(name),
                _ => false,
            },
    )
}

/// Returns whether this is a lab: it has a ledger, or its owner was killed before it wrote one.
fn is_lab(name: &str, path: &Path) -> bool {
    let Ok(entries) = list(path) else { return false };
    LabId::parse(name).is_ok()
        && (entries.iter().any(|(name, kind)| name == "ledger.json" && kind.is_file())
            || entries.iter().all(|(name, kind)| name == "lock" && kind.is_file()))
}
