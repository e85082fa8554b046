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
const ALWAYS_THERE: [&str; 7] =
    ["blobs/sha256", "modules", "index/urls", "index/images", "downloads", "labs", "locks"];

/// The directory of modules written by the memory backend.
const MEMORY: &str = "memory";

/// A kind of directory in a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Room {
    Root,
    Blobs,
    Shelves,
    Shelf,
    Index,
    Records,
    Downloads,
    Locks,
    Modules,
    Module,
    /// A version of a module, a lab, or a leftover of either: its whole content belongs to the store.
    Whole,
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
    Leaf,
    /// A directory of the store.
    Room(Room),
}

/// Returns the first entry of an unmarked directory that no store has, or that every store has and this one lacks; relative to
/// the directory.
pub(super) fn foreign(root: &Path) -> Result<Option<PathBuf>> {
    let is_dir = |name: &str| fs::symlink_metadata(root.join(name)).is_ok_and(|meta| meta.is_dir());
    let mut foreign = None;
    walk(root, Room::Root, &mut |path, entry| {
        if entry == Entry::Foreign && foreign.is_none() {
            foreign = Some(path.strip_prefix(root).unwrap_or(path).to_owned());
        }
        Ok(true)
    })?;
    if foreign.is_some() || ALWAYS_THERE.iter().all(|name| is_dir(name)) {
        return Ok(foreign);
    }
    // A store of only the memory backend has none of the others.
    let other = list(root)?.into_iter().map(|(name, _)| name).find(|name| name != MEMORY);
    Ok(other.map(PathBuf::from))
}

/// Removes the permissions of everyone but the owner from everything that belongs to the store.
pub(super) fn make_private(root: &Path) -> Result<()> {
    walk(root, Room::Root, &mut |path, entry| {
        let is_file = || fs::symlink_metadata(path).is_ok_and(|meta| meta.is_file());
        match entry {
            Entry::Room(_) => layout::make_private(path)?,
            Entry::Leaf if is_file() => layout::make_private(path)?,
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
pub(super) fn strangers(root: &Path) -> Result<Vec<PathBuf>> {
    let mut strangers = Vec::new();
    for (directory, room) in [("labs", Room::Labs), ("modules", Room::Modules)] {
        let mut visit = |path: &Path, entry: Entry| {
            if entry == Entry::Foreign {
                strangers.push(path.to_owned());
            }
            // Directories that belong to the store as a whole are not searched.
            Ok(entry == Entry::Room(Room::Module))
        };
        walk(&root.join(directory), room, &mut visit)?;
    }
    Ok(strangers)
}

/// Visits the entries of a directory, and descends where the visitor returns `true`.
fn walk(directory: &Path, room: Room, visit: &mut dyn FnMut(&Path, Entry) -> Result<bool>) -> Result<()> {
    for (name, kind) in list(directory)? {
        let path = directory.join(&name);
        let entry = classify(room, &name, kind, &path);
        if visit(&path, entry)?
            && let Entry::Room(room) = entry
        {
            walk(&path, room, visit)?;
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

fn classify(room: Room, name: &str, kind: FileType, path: &Path) -> Entry {
    let is_digest = |name: &str| name.parse::<Digest>().is_ok();
    let stem = |ending: &str| name.strip_suffix(ending).is_some_and(is_digest);
    let room_if = |is: bool, room: Room| if is { Entry::Room(room) } else { Entry::Foreign };
    let leaf_if = |is: bool| if is { Entry::Leaf } else { Entry::Foreign };
    if kind.is_dir() {
        return match room {
            Room::Root => match name {
                "blobs" => Entry::Room(Room::Blobs),
                "index" => Entry::Room(Room::Index),
                "downloads" => Entry::Room(Room::Downloads),
                "modules" => Entry::Room(Room::Modules),
                "labs" => Entry::Room(Room::Labs),
                "locks" => Entry::Room(Room::Locks),
                MEMORY => Entry::Room(Room::Memory),
                _ => Entry::Foreign,
            },
            Room::Blobs => room_if(name == "sha256", Room::Shelves),
            Room::Shelves => {
                room_if(name.len() == 2 && name.bytes().all(|b| b.is_ascii_hexdigit()), Room::Shelf)
            }
            Room::Index => room_if(name.bytes().all(|b| b.is_ascii_lowercase()), Room::Records),
            Room::Modules => room_if(units::is_name(name), Room::Module),
            // A copy that followed symbolic links has a directory named `current`.
            Room::Module => room_if(is_digest(name) || name == "current" || is_leftover(name), Room::Whole),
            Room::Labs => room_if(is_leftover(name) || is_lab(name, path), Room::Whole),
            Room::Memory => room_if(units::is_name(name), Room::MemoryModule),
            Room::Whole => Entry::Room(Room::Whole),
            Room::Shelf | Room::Records | Room::Downloads | Room::Locks | Room::MemoryModule => {
                Entry::Foreign
            }
        };
    }
    // A lab also contains the sockets of its machines.
    if room == Room::Whole {
        return Entry::Leaf;
    }
    if kind.is_symlink() {
        return leaf_if(room == Room::Module && (name == "current" || is_leftover(name)));
    }
    leaf_if(
        kind.is_file()
            && match room {
                Room::Root => name == MARKER || name.starts_with(MARKER_TEMPORARY),
                Room::Shelf => is_digest(name),
                Room::Records => stem(".json") || is_temporary(name),
                Room::Downloads => [".json", ".part", ".sum"].into_iter().any(stem) || is_temporary(name),
                Room::Locks => {
                    ["labs", "temporary", "kept"].contains(&name)
                        || ["blob-", "module-", "download-"].iter().any(|prefix| name.starts_with(prefix))
                }
                Room::MemoryModule => name == "module.json" || stem(".json") || is_temporary(name),
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
