//! Locks between processes (and between tasks of one process): `flock(2)` on empty files.
//!
//! A lock is released when its holder dies, however it dies. Files are opened close-on-exec, so that children of the
//! holder do not inherit it, and are unlocked explicitly, so that a child between fork and exec does not prolong it.

use super::durable::{self, io_error};
use rudder_core::Result;
use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::SystemTime,
};

/// A lock that is held until it is dropped.
#[derive(Debug)]
pub(super) struct FileLock {
    file: File,
    path: PathBuf,
    transient: bool,
}

/// The mode of a lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    /// Shared with other holders.
    Shared,
    /// Exclusive.
    Exclusive,
}

/// The availability of a lock.
#[derive(Debug)]
pub(super) enum Availability {
    /// It was free, and is now held exclusively.
    Free(FileLock),
    /// It is held elsewhere.
    Held,
    /// There is no file to lock.
    Missing,
}

impl FileLock {
    /// Acquires the lock, blocking without a time limit: for locks that are held only for moments.
    pub(super) fn wait(path: &Path, mode: Mode) -> Result<Self> {
        loop {
            let file = open(path)?;
            match mode {
                Mode::Shared => file.lock_shared(),
                Mode::Exclusive => file.lock(),
            }
            .map_err(|error| io_error("lock", path, error))?;
            if is_current(&file, path)? {
                return Ok(Self { file, path: path.to_owned(), transient: false });
            }
        }
    }

    /// Acquires the lock if it is available.
    pub(super) fn attempt(path: &Path, mode: Mode) -> Result<Option<Self>> {
        loop {
            let file = open(path)?;
            let outcome = match mode {
                Mode::Shared => file.try_lock_shared(),
                Mode::Exclusive => file.try_lock(),
            };
            match outcome {
                Ok(()) if is_current(&file, path)? => {
                    return Ok(Some(Self { file, path: path.to_owned(), transient: false }));
                }
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Ok(None),
                Err(TryLockError::Error(error)) => return Err(io_error("lock", path, error)),
            }
        }
    }

    /// Acquires the lock exclusively if it is free. Creates nothing.
    pub(super) fn try_exclusive(path: &Path) -> Result<Availability> {
        if !fs::symlink_metadata(path).is_ok_and(|meta| meta.is_file()) {
            return Ok(Availability::Missing);
        }
        let failed = |error| io_error("lock", path, error);
        let file = match options().open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Availability::Missing),
            other => other.map_err(failed)?,
        };
        match file.try_lock() {
            Ok(()) => Ok(Availability::Free(Self { file, path: path.to_owned(), transient: false })),
            Err(TryLockError::WouldBlock) => Ok(Availability::Held),
            Err(TryLockError::Error(error)) => Err(failed(error)),
        }
    }

    /// Returns the lock, set to remove its file when dropped. It must be held exclusively.
    pub(super) fn transient(mut self) -> Self {
        self.transient = true;
        self
    }

    /// Records that what the lock stands for is being used now.
    pub(super) fn touch(&self) {
        let _ = self.file.set_modified(SystemTime::now());
    }

    /// Returns the time of its last use.
    pub(super) fn last_used(&self) -> Option<SystemTime> {
        self.file.metadata().and_then(|meta| meta.modified()).ok()
    }

    /// Removes the file of an exclusively held lock; waiting processes start over with a new file.
    pub(super) fn remove(self) -> Result<()> {
        durable::remove_file(&self.path)
    }
}

impl Drop for FileLock {
    fn drop(&mut self) {
        if self.transient {
            let _ = fs::remove_file(&self.path);
        }
        let _ = self.file.unlock();
    }
}

/// Returns the options to open lock files with. Symbolic links are refused, because they could lead to a user's file.
fn options() -> OpenOptions {
    let flags = i32::try_from(rustix::fs::OFlags::NOFOLLOW.bits()).unwrap_or_default();
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(flags);
    options
}

fn open(path: &Path) -> Result<File> {
    let open = || options().create(true).truncate(false).mode(durable::FILE_MODE).open(path);
    match open() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            durable::make_dir(durable::parent(path))?;
            open()
        }
        other => other,
    }
    .map_err(|error| io_error("open", path, error))
}

/// Returns whether the locked file is still the one at this path.
fn is_current(file: &File, path: &Path) -> Result<bool> {
    let own = file.metadata().map_err(|error| io_error("read", path, error))?;
    match fs::symlink_metadata(path) {
        Ok(current) => Ok(current.ino() == own.ino() && current.dev() == own.dev()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(io_error("read", path, error)),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_shared_lock_excludes_an_exclusive_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new/lock");
        let one = FileLock::wait(&path, Mode::Shared).unwrap();
        let two = FileLock::attempt(&path, Mode::Shared).unwrap().unwrap();
        assert!(FileLock::attempt(&path, Mode::Exclusive).unwrap().is_none());
        drop((one, two));
        let alone = FileLock::attempt(&path, Mode::Exclusive).unwrap().unwrap();
        assert!(FileLock::attempt(&path, Mode::Shared).unwrap().is_none());
        alone.remove().unwrap();
        assert!(!path.exists());
        FileLock::wait(&path, Mode::Exclusive).unwrap();
    }

    #[test]
    fn a_waiter_for_a_removed_lock_gets_the_new_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let held = FileLock::wait(&path, Mode::Exclusive).unwrap();
        let waiter = std::thread::spawn({
            let path = path.clone();
            move || FileLock::wait(&path, Mode::Exclusive).unwrap()
        });
        held.remove().unwrap();
        let got = waiter.join().unwrap();
        assert!(is_current(&got.file, &path).unwrap());
    }
}
