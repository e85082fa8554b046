//! A partial download: the bytes received so far, what they are part of, and reading them while they grow.
//!
//! `downloads/<key>.part` holds the bytes as served, `downloads/<key>.json` describes their origin, and `downloads/<key>.sum`
//! records how many of them were written and their digest. The lock `locks/download-<key>` admits one writer; when it dies, the
//! next one continues where it stopped, unless the bytes have changed since.

use super::{
    Store, durable,
    durable::io_error,
    lock::{FileLock, Mode},
    process, record,
    unpack::{CHUNK, SparseWriter},
};
use bytes::Bytes;
use rudder_core::{
    Error, ErrorKind, Result,
    digest::{Digest, Digester},
};
use serde::{Deserialize, Serialize};
use std::{
    fs::{File, OpenOptions},
    io::{self, Read},
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
};
use tokio::sync::mpsc;

/// The resource that a partial download is part of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Origin {
    /// The URL, masked, for display.
    pub(super) url: String,
    /// `ETag`, as it was sent.
    pub(super) etag: Option<String>,
    /// `Last-Modified`, as it was sent.
    pub(super) last_modified: Option<String>,
    /// The value for `If-Range` (RFC 9110, 13.1.5): a strong validator. `None` if the download cannot be resumed.
    pub(super) if_range: Option<String>,
    /// Total number of bytes.
    pub(super) total: Option<u64>,
    /// The boot it was written in. After a crash of the host, the file may not contain what was received.
    pub(super) boot_id: String,
}

/// A partial download, held by its only writer.
#[derive(Debug)]
pub(super) struct PartialDownload {
    path: PathBuf,
    file: File,
    /// The file with the length in eight bytes, and the digest.
    sum: File,
    hasher: Digester,
    len: u64,
    /// Whether the existing bytes had changed since they were written.
    damaged: bool,
    origin: Option<Origin>,
    growth: Growth,
    /// The lock under which temporary files are created here.
    scan_lock: PathBuf,
    /// Held by the writer, including a thread that still writes after its caller stopped waiting.
    _lock: Arc<FileLock>,
}

impl PartialDownload {
    /// Opens the partial download of this key, and reads its existing bytes if it can be resumed. `trusted`: bytes
    /// written before a crash may be used, because the whole is compared with a checksum.
    pub(super) fn open(store: &Store, key: &str, trusted: bool, lock: Arc<FileLock>) -> Result<Self> {
        let path = store.part_path(key);
        let file = open_to_write(&path)?;
        let sum = open_to_write(&path.with_extension("sum"))?;
        let boot_id = process::boot_id()?;
        let origin = record::read::<Origin>(&path.with_extension("json"))?
            .filter(|origin| origin.if_range.is_some() && (trusted || origin.boot_id == boot_id));
        let mut part = Self {
            path,
            file,
            sum,
            hasher: Digester::default(),
            len: 0,
            damaged: false,
            origin,
            growth: Growth::default(),
            scan_lock: store.lock_path("temporary"),
            _lock: lock,
        };
        if part.origin.is_some() {
            part.read_back(trusted)?;
        }
        if part.len == 0 {
            part.restart(None)?;
        }
        part.growth.set_len(part.len);
        Ok(part)
    }

    /// Reads what was written before, and discards it if it has changed since. `trusted`: the sum may be missing.
    fn read_back(&mut self, trusted: bool) -> Result<()> {
        let failed = |path: &Path, error| io_error("read", path, error);
        let length = self.file.metadata().map_err(|error| failed(&self.path, error))?.len();
        let mut sum = [0; 40];
        let written = match self.sum.read_exact_at(&mut sum, 0) {
            Ok(()) => {
                let (length, digest) = sum.split_at(8);
                Some((u64::from_be_bytes(length.try_into().unwrap_or_default()), digest))
            }
            // Written before sums were introduced, or by a writer that died before its first.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => None,
            Err(error) => return Err(failed(&self.path.with_extension("sum"), error)),
        };
        let end = match written {
            Some((written, _)) => written,
            None if trusted => length,
            None => return Ok(()),
        };
        let mut chunk = vec![0; CHUNK];
        while self.len < end {
            let wanted = usize::try_from(end - self.len).map_or(CHUNK, |left| left.min(CHUNK));
            match self.file.read(&mut chunk[..wanted]).map_err(|error| failed(&self.path, error))? {
                0 => break,
                count => {
                    self.hasher.update(&chunk[..count]);
                    self.len += count as u64;
                }
            }
        }
        self.damaged = written.is_some_and(|(written, digest)| {
            written != self.len || digest != self.hasher.clone().finish().as_bytes()
        });
        if self.damaged {
            self.len = 0;
            return Ok(());
        }
        // Drops what a writer wrote that died before it wrote the sum.
        self.file.set_len(self.len).map_err(|error| io_error("write", &self.path, error))
    }

    /// Discards the existing bytes; bytes received from now on belong to this origin.
    pub(super) fn restart(&mut self, origin: Option<Origin>) -> Result<()> {
        // In this order, so that bytes are never described by a record of others.
        durable::remove_file(&self.path.with_extension("json"))?;
        self.growth.restarted();
        self.file
            .set_len(0)
            .and_then(|()| self.sum.set_len(0))
            .map_err(|error| io_error("write", &self.path, error))?;
        self.hasher = Digester::default();
        self.len = 0;
        if let Some(origin) = &origin {
            // What is written under another name first must not look abandoned to a process that reaps.
            let _scan_lock = FileLock::wait(&self.scan_lock, Mode::Shared)?;
            record::write(&self.path.with_extension("json"), origin)?;
        }
        self.origin = origin;
        Ok(())
    }

    /// Appends received bytes until the sender is dropped. Blocks.
    pub(super) fn append(mut self, mut incoming: mpsc::Receiver<Bytes>) -> (Self, Result<()>) {
        let mut write = || -> io::Result<()> {
            let mut out = SparseWriter::resume(&self.file, self.len);
            while let Some(bytes) = incoming.blocking_recv() {
                out.write(&bytes)?;
                self.hasher.update(&bytes);
                self.len = out.set_len()?;
                let mut sum = [0; 40];
                sum[..8].copy_from_slice(&self.len.to_be_bytes());
                sum[8..].copy_from_slice(self.hasher.clone().finish().as_bytes());
                self.sum.write_all_at(&sum, 0)?;
                self.growth.set_len(self.len);
            }
            Ok(())
        };
        let outcome = write().map_err(|error| io_error("write", &self.path, error));
        (self, outcome)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Returns whether existing bytes had changed since they were written; they have been discarded.
    pub(super) fn was_damaged(&self) -> bool {
        self.damaged
    }

    pub(super) fn origin(&self) -> Option<&Origin> {
        self.origin.as_ref()
    }

    /// Returns whether a server can be asked for the rest.
    pub(super) fn is_resumable(&self) -> bool {
        self.origin.as_ref().is_some_and(|origin| origin.if_range.is_some())
    }

    pub(super) fn growth(&self) -> Growth {
        self.growth.clone()
    }

    /// Returns the digest of the bytes so far.
    pub(super) fn digest(&self) -> Digest {
        self.hasher.clone().finish()
    }

    /// Removes the download, because it became something else or is useless.
    pub(super) fn discard(&self) -> Result<()> {
        durable::remove_file(&self.path.with_extension("json"))?;
        durable::remove_file(&self.path.with_extension("sum"))?;
        durable::remove_file(&self.path)
    }
}

/// Opens a file of the download, which must be a regular file.
fn open_to_write(path: &Path) -> Result<File> {
    use rustix::fs::OFlags;
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits();
    let open = || {
        let mut options = OpenOptions::new();
        let options = options.read(true).write(true).create(true).truncate(false).mode(0o600);
        options.custom_flags(flags.cast_signed()).open(path)
    };
    let plain = path.symlink_metadata().map_or(true, |meta| meta.is_file());
    if !plain {
        durable::remove_file(path)?;
    }
    open().map_err(|error| io_error("open", path, error))
}

impl Store {
    pub(super) fn part_path(&self, key: &str) -> PathBuf {
        self.downloads_dir().join(format!("{key}.part"))
    }
}

/// Progress of a partial download, for its concurrent readers.
#[derive(Debug, Clone, Default)]
pub(super) struct Growth(Arc<(Mutex<Reached>, Condvar)>);

#[derive(Debug, Default)]
struct Reached {
    /// Number of bytes that may be read.
    len: u64,
    /// Number of times the download started over.
    restarts: u32,
    /// `Some` once no more bytes will follow: `true` if the download is complete, `false` if it failed.
    end: Option<bool>,
}

impl Growth {
    fn change(&self, change: impl FnOnce(&mut Reached)) {
        change(&mut self.state());
        self.0.1.notify_all();
    }

    fn state(&self) -> MutexGuard<'_, Reached> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_len(&self, len: u64) {
        self.change(|state| state.len = len);
    }

    fn restarted(&self) {
        self.change(|state| {
            // Nothing can have been read from an empty one.
            if state.len > 0 {
                state.restarts += 1;
            }
            state.len = 0;
        });
    }

    /// Marks the end of the bytes; `whole` means that the download is complete.
    pub(super) fn end(&self, whole: bool) {
        self.change(|state| {
            state.end.get_or_insert(whole);
        });
    }

    /// Returns how many times the download started over.
    pub(super) fn restarts(&self) -> u32 {
        self.state().restarts
    }

    /// Returns a reader that follows the growing file from its beginning. Reading blocks until more bytes exist.
    pub(super) fn follow(&self, path: &Path) -> Result<Follower> {
        let file = File::open(path).map_err(|error| io_error("read", path, error))?;
        Ok(Follower { file, growth: self.clone(), restarts: self.restarts(), position: 0 })
    }
}

/// Signals the end to readers when dropped before the download was complete.
#[derive(Debug)]
pub(super) struct EndOnDrop(pub(super) Growth);

impl Drop for EndOnDrop {
    fn drop(&mut self) {
        self.0.end(false);
    }
}

/// A reader of a growing download, see [`Growth::follow`].
#[derive(Debug)]
pub(super) struct Follower {
    file: File,
    growth: Growth,
    restarts: u32,
    position: u64,
}

impl Follower {
    /// Returns how many times the download had started over when this began to read.
    pub(super) fn restarts(&self) -> u32 {
        self.restarts
    }
}

impl Read for Follower {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let interrupted = |what| Err(io::Error::other(Error::new(ErrorKind::Cancelled, what)));
        let available = {
            let mut state = self.growth.state();
            loop {
                if state.restarts != self.restarts {
                    return interrupted("the download started over");
                }
                if state.len > self.position {
                    break state.len - self.position;
                }
                match state.end {
                    Some(true) => return Ok(0),
                    Some(false) => return interrupted("the download ended early"),
                    None => state = self.growth.0.1.wait(state).unwrap_or_else(PoisonError::into_inner),
                }
            }
        };
        let count = usize::try_from(available).unwrap_or(usize::MAX).min(buf.len());
        let count = self.file.read(&mut buf[..count])?;
        if count == 0 {
            return interrupted("the download started over");
        }
        self.position += count as u64;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::{super::lock::Mode, *};

    fn open(store: &Store) -> PartialDownload {
        let lock = FileLock::wait(&store.download_lock("key"), Mode::Exclusive).unwrap();
        PartialDownload::open(store, "key", false, Arc::new(lock)).unwrap()
    }

    fn origin(if_range: Option<&str>, boot_id: &str) -> Origin {
        Origin {
            url: String::new(),
            etag: None,
            last_modified: None,
            if_range: if_range.map(str::to_owned),
            total: None,
            boot_id: boot_id.to_owned(),
        }
    }

    fn append(part: PartialDownload, bytes: &'static [u8]) -> (PartialDownload, Result<()>) {
        let (sender, receiver) = mpsc::channel(1);
        let writer = std::thread::spawn(move || part.append(receiver));
        sender.blocking_send(Bytes::from_static(bytes)).unwrap();
        drop(sender);
        writer.join().unwrap()
    }

    #[test]
    fn a_full_disk_is_reported_as_host_disk_full() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let mut part = open(&store);
        part.file = OpenOptions::new().write(true).open("/dev/full").unwrap();
        let (_, outcome) = append(part, b"no room");
        let error = outcome.unwrap_err();
        assert_eq!((error.kind(), error.is_retryable()), (ErrorKind::HostDiskFull, false));
        assert!(error.help().unwrap().contains("free some space there"), "{error:?}");
    }

    #[test]
    fn only_bytes_that_can_be_resumed_are_kept() {
        let boot = process::boot_id().unwrap();
        for (if_range, boot_id, kept) in
            [(Some("\"e\""), boot.as_str(), 5), (None, boot.as_str(), 0), (Some("\"e\""), "earlier", 0)]
        {
            let dir = tempfile::tempdir().unwrap();
            let store = Store::open(dir.path()).unwrap();
            let mut part = open(&store);
            part.restart(Some(origin(if_range, boot_id))).unwrap();
            let (part, outcome) = append(part, b"hello");
            outcome.unwrap();
            drop(part);
            let part = open(&store);
            assert_eq!(part.len(), kept);
            assert_eq!(part.digest(), Digest::of(&b"hello"[..usize::try_from(kept).unwrap()]));
        }
    }

    #[test]
    fn a_follower_reads_until_the_download_ends_or_starts_over() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let part = open(&store);
        let growth = part.growth();
        let mut follower = growth.follow(part.path()).unwrap();
        let reader = std::thread::spawn(move || {
            let mut text = String::new();
            follower.read_to_string(&mut text).map(|_| text)
        });
        let (part, _) = append(part, b"hel");
        let (mut part, _) = append(part, b"lo");
        growth.end(true);
        assert_eq!(reader.join().unwrap().unwrap(), "hello");
        let mut late = growth.follow(part.path()).unwrap();
        part.restart(None).unwrap();
        assert!(late.read(&mut [0; 8]).unwrap_err().to_string().contains("started over"));
    }
}
