//! Verifies that files of the store hold the expected content. Each is hashed once, and again when its metadata says that it
//! changed: `index/verified` remembers the identity that a file had when its content was verified.
//!
//! Hashing takes about a second per 1.5 GB (SHA-256 in hardware); comparing identities takes microseconds.

use super::{Store, durable, durable::io_error, record, unpack::CHUNK, unpack::Stop};
use rudder_core::{
    Error, ErrorKind, Result,
    backend::Progress,
    content::Content,
    digest::{Digest, Digester},
    module::Module,
};
use serde::{Deserialize, Serialize};
use std::{
    fs::{self, File, Metadata},
    io::{self, Read},
    os::unix::fs::MetadataExt,
    path::{Component, Path, PathBuf},
    time::{Duration, SystemTime},
};

/// The identity of a file according to the file system. Changed content implies a changed identity.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct FileIdentity {
    device: u64,
    inode: u64,
    pub(super) size: u64,
    /// Nanoseconds since 1970.
    modified: i64,
    /// Nanoseconds since 1970. No program can set this time, so it reveals a change whose author restored `modified`.
    changed: i64,
}

/// Margin for the file system's clock, which ticks every 10 ms at worst: a change within one tick may leave the time as it was.
const CLOCK_TICK_NANOS: i64 = 100_000_000;

impl FileIdentity {
    pub(super) fn of(meta: &Metadata) -> Self {
        let nanos = |seconds: i64, nanos: i64| seconds.saturating_mul(1_000_000_000).saturating_add(nanos);
        Self {
            device: meta.dev(),
            inode: meta.ino(),
            size: meta.len(),
            modified: nanos(meta.mtime(), meta.mtime_nsec()),
            changed: nanos(meta.ctime(), meta.ctime_nsec()),
        }
    }

    /// Returns whether any change after this moment is certain to alter the identity.
    pub(super) fn settled_by(&self, moment: jiff::Timestamp) -> bool {
        moment.as_nanosecond() - i128::from(self.modified.max(self.changed)) > i128::from(CLOCK_TICK_NANOS)
    }
}

/// A file whose content was verified.
#[derive(Debug, Serialize, Deserialize)]
struct VerifiedFile {
    /// Its path in the store.
    path: PathBuf,
    /// The digest of its content.
    sha256: Digest,
    /// Its identity at that time.
    identity: FileIdentity,
}

/// The state of the file at a path of the store.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Condition {
    /// The expected content.
    Sound,
    /// No file.
    Missing,
    /// Something else: "expected X, but found Y".
    Damaged(String),
}

impl Store {
    /// Examines the file at a path where bytes of this digest, and of this size if known, are expected.
    pub(super) fn examine(
        &self,
        path: &Path,
        digest: &Digest,
        size: Option<u64>,
        progress: &Progress,
        stop: &Stop,
    ) -> Result<Condition> {
        let mut file = match open(path) {
            Ok(file) => file,
            Err(OpenFailure::Missing) => return Ok(Condition::Missing),
            Err(OpenFailure::NotRegular(what)) => {
                return Ok(Condition::Damaged(format!("expected a file, but found {what}")));
            }
            Err(OpenFailure::Failed(error)) => return Err(io_error("read", path, error)),
        };
        let identity = |file: &File| file.metadata().map(|meta| FileIdentity::of(&meta));
        let before = identity(&file).map_err(|error| io_error("read", path, error))?;
        if let Some(size) = size.filter(|size| *size != before.size) {
            let found = before.size;
            return Ok(Condition::Damaged(format!("expected {size} bytes, but found {found}")));
        }
        let known = record::read::<VerifiedFile>(&self.verified_path(path))?;
        if known.is_some_and(|known| known.sha256 == *digest && known.identity == before) {
            return Ok(Condition::Sound);
        }
        let task = format!("verify {}", path.file_name().unwrap_or_default().to_string_lossy());
        let mut hasher = Digester::default();
        let mut chunk = vec![0; CHUNK];
        let mut done = 0;
        loop {
            stop.check()?;
            match file.read(&mut chunk) {
                Ok(0) => break,
                Ok(count) => {
                    hasher.update(&chunk[..count]);
                    done += count as u64;
                    progress.bytes(&task, done, Some(before.size));
                }
                // For example a disk of the host with unreadable sectors.
                Err(error) => return Ok(Condition::Damaged(format!("it cannot be read: {error}"))),
            }
        }
        let found = hasher.finish();
        if found != *digest {
            return Ok(Condition::Damaged(format!("expected sha256 {digest}, but found {found}")));
        }
        if identity(&file).map_err(|error| io_error("read", path, error))? != before {
            return Ok(Condition::Damaged("it changed while it was read".to_owned()));
        }
        self.write_verification(path, digest, &before);
        Ok(Condition::Sound)
    }

    /// Records that the content of a file, which was just written or moved, is known to have this digest.
    pub(super) fn record_verified(&self, path: &Path, digest: &Digest) {
        if let Ok(meta) = fs::symlink_metadata(path) {
            self.write_verification(path, digest, &FileIdentity::of(&meta));
        }
    }

    /// Returns the path of a file of a module after checking that it holds what was captured: its size always, and its content
    /// unless it is the very file that was verified before.
    ///
    /// # Errors
    /// `InvalidImage`, naming the file, when it is damaged or missing; file errors.
    pub fn captured_file(
        &self,
        module: &Module,
        file: &str,
        content: &Content,
        progress: &Progress,
    ) -> Result<PathBuf> {
        let directory = module.path.as_deref().and_then(Path::parent).unwrap_or(Path::new(""));
        let path = directory.join(file);
        let mut parts = Path::new(file).components();
        let plain = matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None));
        let condition = match content.verifiable() {
            _ if !plain => Condition::Damaged("expected a plain file name".to_owned()),
            None => Condition::Damaged("its size or sha256 is not recorded".to_owned()),
            Some((size, sha256)) => self.examine(&path, &sha256, Some(size), progress, &Stop::default())?,
        };
        let why = match condition {
            Condition::Sound => return Ok(path),
            Condition::Missing => "it is missing".to_owned(),
            Condition::Damaged(why) => why,
        };
        Err(Error::new(
            ErrorKind::InvalidImage,
            format!("{} of module {} is damaged: {why}", path.display(), module.name),
        )
        .with_help("build the module again, or restore the file from a copy of the store"))
    }

    /// Verifies every file of a module: before it is copied elsewhere, or after an incident that may have damaged the store.
    ///
    /// # Errors
    /// As [`captured_file`](Self::captured_file), for the first damaged file.
    pub async fn verify_module(&self, module: &Module, progress: &Progress) -> Result<()> {
        let (store, module, progress) = (self.clone(), module.clone(), progress.clone());
        super::blocking(move || {
            for (file, content) in module.files() {
                store.captured_file(&module, file, content, &progress)?;
            }
            Ok(())
        })
        .await
    }

    fn verified_path(&self, path: &Path) -> PathBuf {
        let path = path.strip_prefix(self.root()).unwrap_or(path);
        let key = Digest::of(path.as_os_str().as_encoded_bytes());
        self.root().join("index/verified").join(format!("{key}.json"))
    }

    /// Records a verification. Failing to write the record is not an error: the file is only hashed again.
    fn write_verification(&self, path: &Path, digest: &Digest, identity: &FileIdentity) {
        let target = self.verified_path(path);
        let write = || -> Result<()> {
            if !self.later_changes_are_detectable(identity)? {
                return Ok(());
            }
            durable::make_dir(durable::parent(&target))?;
            let path = path.strip_prefix(self.root()).unwrap_or(path).to_owned();
            record::write(&target, &VerifiedFile { path, sha256: *digest, identity: identity.clone() })
        };
        if let Err(error) = write() {
            tracing::warn!(path = %path.display(), %error, "cannot record that a file was verified");
        }
    }

    /// Waits until the clock of the store's file system is past the times of this file, so that any later modification
    /// changes them. Returns `false` if the clock is too coarse to wait for.
    fn later_changes_are_detectable(&self, identity: &FileIdentity) -> Result<bool> {
        const LONGEST: Duration = Duration::from_millis(100);
        let dir = self.downloads_dir();
        let wait = || -> io::Result<bool> {
            let probe = tempfile::tempfile_in(&dir)?;
            let begin = std::time::Instant::now();
            loop {
                probe.set_modified(SystemTime::now())?;
                if FileIdentity::of(&probe.metadata()?).changed > identity.changed {
                    return Ok(true);
                }
                if begin.elapsed() > LONGEST {
                    return Ok(false);
                }
                std::thread::sleep(Duration::from_millis(1));
            }
        };
        wait().map_err(|error| io_error("create a temporary file in", &dir, error))
    }

    /// Removes the records of files that no longer exist.
    pub(super) fn collect_verified(&self) -> Result<()> {
        for (_, path) in self.files(&self.root().join("index/verified"), |name| name.ends_with(".json"))? {
            let known = record::read::<VerifiedFile>(&path)?;
            let exists = known.is_some_and(|known| self.root().join(known.path).symlink_metadata().is_ok());
            if !exists {
                durable::remove_file(&path)?;
            }
        }
        Ok(())
    }
}

/// Why a file was not opened.
enum OpenFailure {
    Missing,
    NotRegular(&'static str),
    Failed(io::Error),
}

fn open(path: &Path) -> Result<File, OpenFailure> {
    let missing = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => OpenFailure::Missing,
        _ => OpenFailure::Failed(error),
    };
    let kind = fs::symlink_metadata(path).map_err(missing)?.file_type();
    if kind.is_file() {
        return durable::open_regular(path).map_err(missing);
    }
    Err(OpenFailure::NotRegular(match kind {
        _ if kind.is_symlink() => "a symbolic link",
        _ if kind.is_dir() => "a directory",
        _ => "a device, socket or FIFO",
    }))
}
