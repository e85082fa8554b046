//! The store: content-addressed local storage shared by local backends. It holds inputs, modules, and the labs of running builds.
//!
//! ```text
//! <store>/rudder-store.json            the marker that makes it a store: see `layout`
//!        /blobs/sha256/ab/abcd…       immutable inputs, named by the sha256 of what is stored; verified when they are added
//!        /index/urls/…                what a URL returned, and how to ask whether it still does
//!        /index/images/…              which blob an image became, named by the sha256 of the bytes as served
//!        /index/verified/…            which files hold the expected content, see `verified`
//!        /downloads/…                 partial downloads, resumable; one writer each
//!        /modules/<name>/<digest>/    see `modules`
//!        /labs/<id>/                  see `lab`
//!        /locks/…                     see `lock`
//! ```
//!
//! # Promises
//! - A half-written file is never mistaken for a complete one: files are written to a temporary name, made durable, and renamed.
//! - Any number of processes may use a store concurrently; a download requested by several of them is performed once.
//! - Nothing named by a [`Lease`] or by the ledger of a lab is removed. A lease passes to a ledger without a gap
//!   ([`LabDir::hold`]), so that nothing is collected between finding a blob and building on it.
//! - Only what the store itself recorded is ever removed. Symbolic links are not followed. Unknown entries stay, and are
//!   named in the report ([`warnings`](rudder_core::backend::ReapReport::warnings)) of the cleanup.
//! - Only its owner can read it: directories have mode 0700, files 0600.

mod blob;
mod collect;
mod download;
pub(crate) mod durable;
mod entries;
mod fetch;
mod format;
mod http;
mod identity;
mod ingest;
mod lab;
mod lab_status;
mod layout;
mod ledger;
mod local;
mod lock;
mod modules;
mod partial_download;
mod process;
mod publish;
mod record;
mod resolve;
mod unpack;
mod verified;
mod versions;

pub use self::{
    collect::CollectPolicy,
    format::ImageFormat,
    identity::DirectoryIdentity,
    lab::{LAB_VARIABLE, LabDir},
    ledger::{LabEntry, Ledger, RecordedProcess},
    process::ProcessIdentity,
};

use self::{
    download::Requested,
    layout::Opened,
    lock::{FileLock, Mode},
};
use async_trait::async_trait;
use rudder_core::{
    Error, ErrorKind, Result,
    backend::Progress,
    content::Content,
    digest::Digest,
    fetch::{Fetch, FetchRequest, Fetched},
    module::{InputRecord, InputRole},
    plan::PlannedUrl,
};
use serde::{Deserialize, Serialize};
use std::{
    env,
    fs::FileType,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
    time::Duration,
};

/// Local storage, shared by processes. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Store(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    opened: Opened,
    options: StoreOptions,
    client: OnceLock<reqwest::Client>,
}

/// Timeouts and limits of a store.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct StoreOptions {
    /// Time limit for a server to accept a connection. Defaults to 30 s.
    pub connect_timeout: Duration,
    /// Time without a byte after which a transfer counts as broken. Defaults to 60 s.
    pub stall_timeout: Duration,
    /// Number of attempts per download, including the first. An attempt that received at least 1 MiB of new bytes restarts the
    /// count. Defaults to 5.
    pub attempts: u32,
    /// Pause before the second attempt, which doubles with each further attempt, up to 30 s. Defaults to 500 ms.
    pub backoff: Duration,
    /// Largest size of an unpacked image, in bytes. Defaults to 1 TiB.
    pub unpacked_limit: u64,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(30),
            stall_timeout: Duration::from_secs(60),
            attempts: 5,
            backoff: Duration::from_millis(500),
            unpacked_limit: 1 << 40,
        }
    }
}

impl StoreOptions {
    /// Returns the default limits.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the time limit for a server to accept a connection.
    #[must_use]
    pub fn connect_timeout(mut self, limit: Duration) -> Self {
        self.connect_timeout = limit;
        self
    }

    /// Sets the time without a byte after which a transfer counts as broken.
    #[must_use]
    pub fn stall_timeout(mut self, limit: Duration) -> Self {
        self.stall_timeout = limit;
        self
    }

    /// Sets the number of attempts per download, including the first.
    #[must_use]
    pub fn attempts(mut self, attempts: u32) -> Self {
        self.attempts = attempts;
        self
    }

    /// Sets the pause before the second attempt; it doubles with each further attempt, up to 30 s.
    #[must_use]
    pub fn backoff(mut self, pause: Duration) -> Self {
        self.backoff = pause;
        self
    }

    /// Sets the largest size of an unpacked image, in bytes.
    #[must_use]
    pub fn unpacked_limit(mut self, bytes: u64) -> Self {
        self.unpacked_limit = bytes;
        self
    }
}

/// A disk image in the store that may serve as a backing file. Never write to it.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct StoredImage {
    /// Path of the file.
    pub path: PathBuf,
    /// Format, detected from the content.
    pub format: ImageFormat,
    /// Size of the disk that a guest sees, in bytes, according to the image's own header.
    pub virtual_size: u64,
    /// sha256 of the file: of the unpacked image, if it was served packed.
    pub digest: Digest,
    /// What was requested and what was received, for the provenance. The role is that of a file; the caller knows the actual one.
    pub input: InputRecord,
    /// Keeps the image from being collected until it is dropped; pass it to [`LabDir::hold`].
    pub lease: Lease,
}

/// A file in the store, as it was served. Never write to it.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct StoredFile {
    /// Path of the file.
    pub path: PathBuf,
    /// Size in bytes.
    pub size: u64,
    /// What was requested and what was received, for the provenance. The role is that of a file; the caller knows the actual one.
    pub input: InputRecord,
    /// Keeps the file from being collected until it is dropped; pass it to [`LabDir::hold`].
    pub lease: Lease,
}

/// Something in the store that a lab can use.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Use {
    /// A blob.
    Blob(Digest),
    /// A version of a module.
    Module {
        /// Name of the module.
        name: String,
        /// Digest of the version.
        digest: Digest,
    },
}

/// Keeps something in the store from being removed, for as long as this or a clone of it lives.
#[derive(Debug, Clone)]
pub struct Lease {
    what: Use,
    _lock: Arc<UsedLock>,
}

/// The lock of something in use. Dropping it sets the time of last use to now, from which the unused time counts.
#[derive(Debug)]
struct UsedLock(FileLock);

impl Drop for UsedLock {
    fn drop(&mut self) {
        self.0.touch();
    }
}

impl Lease {
    /// Returns what the lease keeps.
    #[must_use]
    pub fn what(&self) -> &Use {
        &self.what
    }

    fn take(store: &Store, what: Use) -> Result<Self> {
        let lock = FileLock::wait(&store.use_lock(&what), Mode::Shared)?;
        lock.touch();
        Ok(Self { what, _lock: Arc::new(UsedLock(lock)) })
    }
}

impl Store {
    /// Opens the store in this directory. Creates a store if the directory is empty or does not exist.
    ///
    /// # Errors
    /// `InvalidInput` for a directory that is neither empty nor a store, and for one that belongs to another user; `Unsupported`
    /// for the store of a later version; `Conflict` if something else, such as a symbolic link, is where a directory of the store
    /// belongs; file errors. A directory that is refused is left unchanged.
    pub fn open(root: impl Into<PathBuf>) -> Result<Self> {
        Self::open_with(root, StoreOptions::default())
    }

    /// Opens the store in this directory with other timeouts and limits, like [`open`](Self::open).
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_with(root: impl Into<PathBuf>, options: StoreOptions) -> Result<Self> {
        let opened = layout::open(&root.into())?;
        Ok(Self(Arc::new(Inner { opened, options, client: OnceLock::new() })))
    }

    /// Returns the location of this user's store: `$RUDDER_STORE`, else `rudder` in `$XDG_DATA_HOME`, else
    /// `~/.local/share/rudder` (XDG Base Directory Specification).
    #[must_use]
    pub fn default_root() -> PathBuf {
        let set = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        set("RUDDER_STORE").unwrap_or_else(|| {
            set("XDG_DATA_HOME")
                .filter(|path| path.is_absolute())
                .or_else(|| env::home_dir().map(|home| home.join(".local/share")))
                .unwrap_or_else(env::temp_dir)
                .join("rudder")
        })
    }

    /// Returns the store's directory, without symbolic links.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.0.opened.root
    }

    /// Returns a disk image, unpacked and ready to be a backing file: from the cache, else downloaded or copied from the URL.
    ///
    /// The format is detected from the content, never from the name: qcow2, raw, vmdk, vdi, vhd, vhdx, and any of them packed in
    /// gz, xz, zst or bz2. Dropping the future leaves a partial download, which the next call resumes.
    ///
    /// # Errors
    /// `NotFound`, `Download`, `ChecksumMismatch` (the bytes stay in the store, for a manifest with a corrected
    /// checksum), `InvalidImage`, `HostDiskFull`, `InvalidInput` for any other URL scheme.
    pub async fn image(&self, url: &PlannedUrl, progress: &Progress) -> Result<StoredImage> {
        self.image_for(url, None, progress).await
    }

    /// Returns the [`image`](Self::image) for a disk of this size in bytes: unpacking stops as soon as the output exceeds what
    /// such a disk can hold.
    ///
    /// # Errors
    /// As `image`; `InvalidInput` when a packed image is larger than the disk.
    pub async fn image_for(
        &self,
        url: &PlannedUrl,
        disk: Option<u64>,
        progress: &Progress,
    ) -> Result<StoredImage> {
        let requested = Requested::Image { disk };
        let got = self.obtain(url, requested, progress).await.map_err(|error| with_url(url, error))?;
        let Some(image) = got.image else {
            return Err(with_url(
                url,
                Error::new(ErrorKind::Internal, "expected an image, but found a file"),
            ));
        };
        Ok(StoredImage {
            path: self.blob_path(&image.stored),
            format: image.format,
            virtual_size: image.virtual_size,
            digest: image.stored,
            input: input_record(url, got.size, got.served),
            lease: got.lease,
        })
    }

    /// Returns the bytes behind a URL, as they are served: from the cache, else downloaded or copied from the URL.
    ///
    /// # Errors
    /// As [`image`](Self::image), without `InvalidImage`.
    pub async fn file(&self, url: &PlannedUrl, progress: &Progress) -> Result<StoredFile> {
        let got = self.obtain(url, Requested::File, progress).await.map_err(|error| with_url(url, error))?;
        Ok(StoredFile {
            path: self.blob_path(&got.served),
            size: got.size,
            input: input_record(url, got.size, got.served),
            lease: got.lease,
        })
    }

    /// Returns a [`file`](Self::file) that stays cached for at least this long after its last use, even if the store is
    /// [collected](Self::collect) and a module was made from it. A longer time requested earlier still applies.
    ///
    /// # Errors
    /// As `file`.
    pub async fn file_kept_for(
        &self,
        url: &PlannedUrl,
        keep_for: Duration,
        progress: &Progress,
    ) -> Result<StoredFile> {
        let file = self.file(url, progress).await?;
        if !keep_for.is_zero() {
            let (store, lease) = (self.clone(), file.lease.clone());
            blocking(move || store.keep_cached(&lease, keep_for)).await?;
        }
        Ok(file)
    }

    /// Keeps a blob cached for this long after its last use, even if the store is [collected](Self::collect) and a module was
    /// made from it. A longer time requested earlier still applies.
    ///
    /// # Errors
    /// File errors.
    pub fn keep_cached(&self, lease: &Lease, keep_for: Duration) -> Result<()> {
        match lease.what() {
            Use::Blob(digest) => self.promise(digest, keep_for),
            Use::Module { .. } => Ok(()),
        }
    }

    /// Returns the HTTP client for all downloads of this store.
    fn client(&self) -> Result<&reqwest::Client> {
        if let Some(client) = self.0.client.get() {
            return Ok(client);
        }
        let client = http::client(self.options())?;
        Ok(self.0.client.get_or_init(|| client))
    }

    fn options(&self) -> &StoreOptions {
        &self.0.options
    }

    fn modules_dir(&self) -> PathBuf {
        self.root().join("modules")
    }

    fn labs_dir(&self) -> PathBuf {
        self.root().join("labs")
    }

    fn downloads_dir(&self) -> PathBuf {
        self.root().join("downloads")
    }

    fn lock_path(&self, name: &str) -> PathBuf {
        self.root().join("locks").join(name)
    }

    fn use_lock(&self, what: &Use) -> PathBuf {
        self.lock_path(&match what {
            Use::Blob(digest) => format!("blob-{digest}"),
            Use::Module { name, digest } => format!("module-{name}-{digest}"),
        })
    }

    /// Returns the lock that keeps this from being used, if nothing uses it; else what does.
    fn lock_unused(&self, what: &Use) -> Result<Result<FileLock, String>> {
        let Some(lock) = FileLock::attempt(&self.use_lock(what), Mode::Exclusive)? else {
            return Ok(Err("a running process".into()));
        };
        // Checked under the lock: the holder of a lease records it in the ledger before releasing the lease.
        let user =
            self.used_by_labs()?.into_iter().find(|(_, used)| used.as_ref().is_none_or(|used| used == what));
        Ok(match user {
            Some((lab, Some(_))) => Err(format!("lab {lab}")),
            Some((lab, None)) => Err(format!("perhaps lab {lab}, whose ledger cannot be read,")),
            None => Ok(lock),
        })
    }

    /// Returns the subdirectories of a directory of the store whose names pass the filter, in order; none if the directory does
    /// not exist. A symbolic link is not a directory.
    fn directories(&self, dir: &Path, wanted: impl Fn(&str) -> bool) -> Result<Vec<(String, PathBuf)>> {
        self.entries(dir, |name, kind| kind.is_dir() && wanted(name))
    }

    /// Returns the regular files in a directory of the store whose names pass the filter, in order.
    fn files(&self, dir: &Path, wanted: impl Fn(&str) -> bool) -> Result<Vec<(String, PathBuf)>> {
        self.entries(dir, |name, kind| kind.is_file() && wanted(name))
    }

    /// Returns the entries of a directory of the store that pass the filter, in order; none if the directory does not exist.
    fn entries(&self, dir: &Path, wanted: impl Fn(&str, FileType) -> bool) -> Result<Vec<(String, PathBuf)>> {
        let entries = entries::list(dir)?.into_iter().filter(|(name, kind)| wanted(name, *kind));
        Ok(entries.map(|(name, _)| (name.clone(), dir.join(name))).collect())
    }
}

#[async_trait]
impl Fetch for Store {
    async fn fetch(&self, request: &FetchRequest, progress: &Progress) -> Result<Fetched> {
        let StoredFile { path, input, lease, .. } =
            self.file_kept_for(&request.url, request.keep_for, progress).await?;
        Ok(Fetched::new(path, input, lease))
    }
}

/// Runs file operations that may take long where they do not block the async runtime.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    rudder_core::runtime::check()?;
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(error) => Err(Error::new(
            ErrorKind::Cancelled,
            "the async runtime is shutting down: the file operation was not started",
        )
        .with_source(error)),
    }
}

fn input_record(url: &PlannedUrl, size: u64, sha256: Digest) -> InputRecord {
    InputRecord::new(InputRole::File, masked(&url.url), Content::of_bytes(size, sha256))
}

fn with_url(url: &PlannedUrl, error: Error) -> Error {
    error.with_context("url", masked(&url.url))
}

/// Returns a URL without the parts that must not be shown.
fn masked(url: &url::Url) -> String {
    rudder_core::secret::public_url(url)
}

#[cfg(test)]
mod tests;
