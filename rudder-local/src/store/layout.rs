//! The directory of a store: its marker, its subdirectories, and who may use it.
//!
//! A store is a directory with a marker, or an empty one that becomes a store when it is opened. Anything else is refused
//! unchanged: a store removes what it does not need, and must never do that in a directory of a user's own files.

use super::{
    durable::{self, io_error},
    entries,
    identity::DirectoryIdentity,
};
use rudder_core::{Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};
use std::{
    fs, io,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
};

/// The marker of a store.
pub(super) const MARKER: &str = "rudder-store.json";

/// The prefix of the temporary file of a marker that is being written.
pub(super) const MARKER_TEMPORARY: &str = ".rudder-store-";

/// The version of the layout.
const FORMAT: u32 = 1;

/// The subdirectories of a store, parents first.
const DIRECTORIES: [&str; 11] = [
    "blobs",
    "blobs/sha256",
    "modules",
    "index",
    "index/urls",
    "index/images",
    "index/kept",
    "index/verified",
    "downloads",
    "labs",
    "locks",
];

/// The content of the marker.
#[derive(Debug, Serialize, Deserialize)]
struct Marker {
    /// The version of the layout.
    format: u32,
    /// A random name that tells apart stores at the same path in different containers. A copy has the name of its original.
    #[serde(default)]
    id: String,
    /// An explanation for people who find the file.
    #[serde(default)]
    note: String,
}

/// A store whose directory was checked.
#[derive(Debug)]
pub(super) struct Opened {
    /// Its directory, without symbolic links.
    pub(super) root: PathBuf,
    /// Its random name; empty when the marker has none.
    pub(super) id: String,
    /// The identity of the directory.
    pub(super) directory: DirectoryIdentity,
}

/// Opens the store in a directory, or creates one if the directory is empty or does not exist.
pub(super) fn open(path: &Path) -> Result<Opened> {
    let root = find_or_create(path)?;
    expect_own(&root)?;
    let (marker, adopted) = match read_marker(&root)? {
        Some(marker) => (marker, false),
        None => adopt(&root)?,
    };
    // All of them are checked before the first is created: a store that is refused is left unchanged.
    let mut missing = Vec::new();
    for directory in DIRECTORIES {
        let path = root.join(directory);
        match fs::symlink_metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => missing.push(path),
            Err(error) => return Err(io_error("read", &path, error)),
            Ok(_) => {
                durable::expect_dir(&path)?;
                expect_own(&path)?;
            }
        }
    }
    // A copy, or a store of an earlier version: its files are as accessible as its directory.
    if adopted || is_open_to_others(&root)? {
        entries::make_private(&root)?;
    }
    for directory in DIRECTORIES.map(|directory| root.join(directory)) {
        if !missing.contains(&directory) && is_open_to_others(&directory)? {
            make_private(&directory)?;
        }
    }
    for directory in missing {
        ignore_read_only(durable::make_dir(&directory))?;
    }
    if is_open_to_others(&root)? {
        make_private(&root)?;
    }
    let directory = DirectoryIdentity::of(&root)?;
    Ok(Opened { root, id: marker.id, directory })
}

/// Returns the directory itself, without symbolic links; creates it if it does not exist.
fn find_or_create(path: &Path) -> Result<PathBuf> {
    let path = std::path::absolute(path).map_err(|error| io_error("open", path, error))?;
    match fs::canonicalize(&path) {
        Ok(root) => {
            durable::expect_dir(&root)?;
            Ok(root)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            // A dangling symbolic link is not replaced.
            if fs::symlink_metadata(&path).is_ok_and(|meta| meta.is_symlink()) {
                return Err(io_error("open", &path, error));
            }
            // Another process may create it at the same time.
            durable::make_dir(&path)?;
            fs::canonicalize(&path).map_err(|error| io_error("open", &path, error))
        }
        Err(error) => Err(io_error("open", &path, error)),
    }
}

/// Turns an empty directory into a store, or recognises a store from before there were markers. The flag says whether it was the
/// latter.
fn adopt(root: &Path) -> Result<(Marker, bool)> {
    let names = names(root)?;
    let is_new = names.iter().all(|name| name.starts_with(MARKER_TEMPORARY));
    if is_new {
        expect_unshared(root)?;
    } else {
        // Another process may have created the store between the two checks.
        let foreign = entries::foreign(root)?;
        if let Some(marker) = read_marker(root)? {
            return Ok((marker, false));
        }
        if let Some(entry) = foreign {
            return Err(refusal(root, &entry));
        }
    }
    let marker = Marker {
        format: FORMAT,
        id: format!("{:032x}", rand::random::<u128>()),
        note: "Rudder keeps inputs, modules and labs in this directory, and removes what it no longer needs."
            .to_owned(),
    };
    match write_marker(root, &marker) {
        Ok(()) => Ok((marker, !is_new)),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            let existing = read_marker(root)?;
            existing.map(|marker| (marker, !is_new)).ok_or_else(|| io_error("mark", root, error))
        }
        // An unmarked store can still be read.
        Err(error) if !is_new && error.kind() == io::ErrorKind::ReadOnlyFilesystem => Ok((marker, false)),
        Err(error) => Err(io_error("mark the store in", root, error)),
    }
}

fn refusal(root: &Path, entry: &Path) -> Error {
    let message = format!(
        "expected a store or an empty directory at {}, but found {} in it and no {MARKER}",
        root.display(),
        entry.display(),
    );
    Error::new(ErrorKind::InvalidInput, message).with_help(
        "name a new or empty directory; if this is a store of an earlier version, move everything that is not Rudder's out of it",
    )
}

/// Reads the marker; `None` if it does not exist.
fn read_marker(root: &Path) -> Result<Option<Marker>> {
    let path = root.join(MARKER);
    let bytes = match durable::read_regular(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io_error("read the store marker", &path, error)),
    };
    let damaged = |detail: &str| {
        let message = format!("expected the marker of a store in {}, but found {detail}", path.display());
        Error::new(ErrorKind::InvalidInput, message).with_help(format!(
            "if the directory is a store of Rudder, write {{\"format\": {FORMAT}}} into the file; otherwise name another directory"
        ))
    };
    let value: serde_json::Value = serde_json::from_slice(&bytes).map_err(|error| {
        damaged(if bytes.is_empty() { "an empty file" } else { "invalid JSON" }).with_source(error)
    })?;
    // The number first: this version cannot judge what else a later version writes.
    match value.get("format").and_then(serde_json::Value::as_u64) {
        None | Some(0) => Err(damaged("no format number")),
        Some(format) if format > u64::from(FORMAT) => Err(Error::new(
            ErrorKind::Unsupported,
            format!("expected a store of format {FORMAT} at {}, but found format {format}", root.display()),
        )
        .with_help("use the later version of Rudder that wrote this store, or name another directory")),
        Some(_) => {
            let marker = serde_json::from_value(value);
            Ok(Some(marker.map_err(|error| damaged("unexpected fields").with_source(error))?))
        }
    }
}

/// Writes the marker unless it exists: the first of several processes wins.
fn write_marker(root: &Path, marker: &Marker) -> io::Result<()> {
    let mut file = tempfile::Builder::new().prefix(MARKER_TEMPORARY).tempfile_in(root)?;
    serde_json::to_writer_pretty(&mut file, marker)?;
    io::Write::write_all(&mut file, b"\n")?;
    durable::finalise(file.as_file())?;
    file.persist_noclobber(root.join(MARKER)).map_err(|error| error.error)?;
    fs::File::open(root)?.sync_all()
}

fn names(directory: &Path) -> Result<Vec<String>> {
    let failed = |error| io_error("list", directory, error);
    let listing = fs::read_dir(directory).map_err(failed)?;
    listing.map(|entry| Ok(entry.map_err(failed)?.file_name().to_string_lossy().into_owned())).collect()
}

/// Fails for a directory of another user, even when run as root: root would leave files there that the owner could not use.
fn expect_own(path: &Path) -> Result<()> {
    let owner = fs::symlink_metadata(path).map_err(|error| io_error("read", path, error))?.uid();
    let own = rustix::process::geteuid().as_raw();
    if owner == own {
        return Ok(());
    }
    let message = format!(
        "expected a store of user {own}, who runs this program, but found that {} belongs to user {owner}",
        path.display()
    );
    Err(Error::new(ErrorKind::InvalidInput, message)
        .with_help("run as the owner of the store, or name another directory, with RUDDER_STORE for example"))
}

/// Fails for a directory that others are meant to put files into, such as an empty `/tmp`.
fn expect_unshared(root: &Path) -> Result<()> {
    let mode = fs::metadata(root).map_err(|error| io_error("read", root, error))?.mode();
    if mode & 0o1000 == 0 {
        return Ok(());
    }
    let message = format!(
        "expected a directory of one user, but found {}, which is shared between users (it has the sticky bit)",
        root.display()
    );
    Err(Error::new(ErrorKind::InvalidInput, message).with_help("name a new directory in it"))
}

fn is_open_to_others(path: &Path) -> Result<bool> {
    let meta = fs::symlink_metadata(path).map_err(|error| io_error("read", path, error))?;
    Ok(meta.mode() & 0o077 != 0)
}

/// Removes the permissions of everyone but the owner from a directory or regular file of the store.
pub(super) fn make_private(path: &Path) -> Result<()> {
    let change = || -> io::Result<()> {
        let meta = fs::symlink_metadata(path)?;
        // Opened, so that nothing else is changed that may have replaced it at this path.
        let (file, mode) = if meta.is_dir() {
            (fs::File::open(path)?, meta.mode() & 0o7700)
        } else {
            (durable::open_regular(path)?, durable::FILE_MODE)
        };
        file.set_permissions(fs::Permissions::from_mode(mode))
    };
    match change() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => ignore_read_only(other.map_err(|error| io_error("change the permissions of", path, error))),
    }
}

/// Ignores the error of a read-only file system: a store on one can still be read.
fn ignore_read_only(outcome: Result<()>) -> Result<()> {
    let is_read_only = |error: &Error| {
        std::error::Error::source(error)
            .and_then(|source| source.downcast_ref::<io::Error>())
            .is_some_and(|error| error.kind() == io::ErrorKind::ReadOnlyFilesystem)
    };
    match outcome {
        Err(error) if is_read_only(&error) => Ok(()),
        other => other,
    }
}
