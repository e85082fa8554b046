//! Files that are either complete or absent: atomic writes, durable directories, and errors about full disks.

use rudder_core::{Error, ErrorKind, Result};
use serde::Serialize;
use std::{
    fs::{self, DirBuilder, File},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    path::Path,
};

/// The mode of every directory of a store: its source may have been readable by its owner alone.
pub(super) const DIRECTORY_MODE: u32 = 0o700;

/// The mode of every file of a store.
pub(super) const FILE_MODE: u32 = 0o600;

/// The size of the largest record that is read, in bytes.
const MAX_RECORD_SIZE: u64 = 64 << 20;

/// Creates a directory and its missing parents, accessible by their owner alone.
///
/// # Errors
/// File errors; `Conflict` when something else exists there, such as a symbolic link.
pub(crate) fn make_dir(path: &Path) -> Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(DIRECTORY_MODE)
        .create(path)
        .map_err(|error| io_error("create directory", path, error))?;
    expect_dir(path)
}

/// Fails unless there is a directory at this path. Symbolic links are refused, because they could lead out of the store.
pub(crate) fn expect_dir(path: &Path) -> Result<()> {
    let meta = fs::symlink_metadata(path).map_err(|error| io_error("read", path, error))?;
    if meta.is_dir() {
        return Ok(());
    }
    let message =
        format!("expected a directory at {}, but found {}", path.display(), kind_of(meta.file_type()));
    Err(Error::new(ErrorKind::Conflict, message)
        .with_help("move it out of the store; nothing was changed, and symbolic links are not followed"))
}

/// Returns the kind of a directory entry, for messages.
pub(super) fn kind_of(kind: fs::FileType) -> &'static str {
    if kind.is_symlink() {
        "a symbolic link"
    } else if kind.is_dir() {
        "a directory"
    } else if kind.is_file() {
        "a file"
    } else {
        "something that is neither a file nor a directory"
    }
}

/// Opens a regular file for reading: follows no symbolic link, and never blocks as opening a FIFO would.
pub(crate) fn open_regular(path: &Path) -> io::Result<File> {
    let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
    let flags = i32::try_from(flags.bits()).map_err(io::Error::other)?;
    let file = match fs::OpenOptions::new().read(true).custom_flags(flags).open(path) {
        Err(error) if error.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error()) => {
            return Err(not_regular("a symbolic link"));
        }
        other => other?,
    };
    let kind = file.metadata()?.file_type();
    if !kind.is_file() {
        return Err(not_regular(kind_of(kind)));
    }
    Ok(file)
}

fn not_regular(found: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("expected a regular file, but found {found}"))
}

/// Reads a regular file of moderate size.
pub(super) fn read_regular(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open_regular(path)?.take(MAX_RECORD_SIZE + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_RECORD_SIZE {
        let message = format!("expected at most {}", human(MAX_RECORD_SIZE));
        return Err(io::Error::new(io::ErrorKind::InvalidData, message));
    }
    Ok(bytes)
}

/// Makes a finished file durable, and readable by its owner alone.
pub(super) fn finalise(file: &File) -> io::Result<()> {
    file.set_permissions(fs::Permissions::from_mode(FILE_MODE))?;
    file.sync_all()
}

/// Makes renames and unlinks inside this directory survive a power failure.
pub(super) fn sync_dir(path: &Path) -> Result<()> {
    File::open(path)
        .and_then(|dir| dir.sync_all())
        .map_err(|error| io_error("synchronise directory", path, error))
}

/// Writes a file so that a reader sees either the old content or the new, whatever happens.
pub(super) fn write_atomic(path: &Path, content: &[u8]) -> Result<()> {
    let dir = parent(path);
    let write = || -> io::Result<()> {
        let mut file = tempfile::Builder::new()
            .prefix(".tmp-")
            .permissions(fs::Permissions::from_mode(FILE_MODE))
            .tempfile_in(dir)?;
        file.write_all(content)?;
        // The umask may have cleared bits.
        finalise(file.as_file())?;
        file.persist(path).map_err(|error| error.error)?;
        Ok(())
    };
    write().map_err(|error| io_error("write", path, error))?;
    sync_dir(dir)
}

/// Writes a value as JSON with [`write_atomic`].
pub(super) fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<()> {
    let mut text = serde_json::to_vec_pretty(value).map_err(|error| {
        Error::new(ErrorKind::Internal, format!("cannot encode {}", path.display())).with_source(error)
    })?;
    text.push(b'\n');
    write_atomic(path, &text)
}

/// Removes a file, if it exists.
pub(super) fn remove_file(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error("remove", path, error)),
        _ => Ok(()),
    }
}

/// Removes a directory with all its content, if it exists.
pub(super) fn remove_tree(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error("remove", path, error)),
        _ => Ok(()),
    }
}

/// Returns the disk space used by the files below a directory, in bytes; what cannot be read counts as zero.
pub(super) fn disk_usage(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let Ok(meta) = fs::symlink_metadata(path) else { return 0 };
    let own = meta.blocks() * 512;
    if !meta.is_dir() {
        return own;
    }
    let children = fs::read_dir(path).into_iter().flatten().flatten();
    own + children.map(|entry| disk_usage(&entry.path())).sum::<u64>()
}

/// Help for errors about a full disk.
pub(super) const FREE_SPACE_HELP: &str = "free some space there, remove modules that are not needed, collect cached inputs, \
                                     or set RUDDER_STORE to a directory on a larger disk";

/// Returns the directory that contains a file of the store.
pub(super) fn parent(path: &Path) -> &Path {
    path.parent().unwrap_or(Path::new("."))
}

/// Returns an error of the operating system about this path. For a full disk it says how much is free, and how to free space.
pub(super) fn io_error(what: &str, path: &Path, source: io::Error) -> Error {
    let error = Error::io(format_args!("{what} {}", path.display()), source);
    if error.kind() != ErrorKind::HostDiskFull {
        return error;
    }
    let free = rustix::fs::statvfs(parent(path)).map(|stat| stat.f_bavail * stat.f_frsize);
    let free = free.map_or_else(|_| String::new(), |bytes| format!(" ({} free)", human(bytes)));
    error.with_help(format!("the file system of {} is full{free}: {FREE_SPACE_HELP}", parent(path).display()))
}

/// Formats a number of bytes for people.
pub(super) fn human(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if bytes < 1024 {
        return format!("{bytes} bytes");
    }
    let mut unit = 0;
    let mut tenths = bytes.saturating_mul(10) / 1024;
    while tenths >= 10240 && unit + 1 < UNITS.len() {
        tenths /= 1024;
        unit += 1;
    }
    format!("{}.{} {}", tenths / 10, tenths % 10, UNITS[unit])
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn an_atomic_write_replaces_the_file_and_leaves_no_temporary_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("record.json");
        write_json(&path, &1).unwrap();
        write_json(&path, &2).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "2\n");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, FILE_MODE);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_full_disk_error_names_the_file_system() {
        let error = io_error("write", Path::new("/tmp/x"), io::ErrorKind::StorageFull.into());
        assert_eq!(error.kind(), ErrorKind::HostDiskFull);
        assert!(error.report().contains("the file system of /tmp is full ("), "{}", error.report());
    }

    #[test]
    fn sizes_are_human_readable() {
        assert_eq!(human(1023), "1023 bytes");
        assert_eq!(human(1536), "1.5 KiB");
        assert_eq!(human(1 << 40), "1.0 TiB");
    }
}
