//! The store: content-addressed local storage that local backends share. Inputs, modules, and the labs of running builds.
//!
//! ```text
//! <store>/rudder-store.json            the marker that makes it a store: see `layout`
//!        /blobs/sha256/ab/abcd…       immutable inputs, named by the sha256 of what is stored; verified when they enter
//!        /index/urls/…                what a URL gave, and how to ask whether it still does
//!        /index/images/…              which blob an image became, named by the sha256 of the bytes as served
//!        /index/verified/…            which files hold what they should, see `verified`
//!        /downloads/…                 partial downloads, resumable; one writer each
//!        /modules/<name>/<digest>/    see `modules`
//!        /labs/<id>/                  see `lab`
//!        /locks/…                     see `lock`
//! ```
//!
//! # Promises
//! - Nothing half-written is ever taken for good: files are written beside their place, made durable, and renamed into it.
//! - Any number of processes may use a store at once; a download that several want is made once.
//! - What a [`Lease`] or the ledger of a lab names is not removed. A lease passes to a ledger without a gap
//!   ([`LabDir::hold`]), so that nothing is collected between finding a blob and building on it.
//! - Only what the store itself recorded is ever removed. Symbolic links are not followed. What it does not know stays, and is
//!   named in the report ([`warnings`](rudder_core::backend::ReapReport::warnings)) of whoever cleans up.
//! - Nobody but its owner reads it: directories have mode 0700, files 0600.

mod blob;
mod collect;
mod download;
pub(crate) mod durable;
mod enter;
mod entries;
mod fetch;
mod format;
mod http;
mod identity;
mod lab;
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
    ledger::{LabEntry, LabState, Ledger, RecordedProcess},
    process::ProcessIdentity,
};

use self::{
    download::Wanted,
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

/// How a store reads from elsewhere.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct StoreOptions {
    /// How long a server may take to accept a connection. 30 s.
    pub connect_timeout: Duration,
    /// How long a transfer may go without a byte before it counts as broken. 60 s.
    pub stall_timeout: Duration,
    /// How often a download is tried, the first included; an attempt that brought bytes does not count. 5.
    pub attempts: u32,
    /// How long to wait before the second attempt; doubles with each one, up to 30 s. 500 ms.
    pub backoff: Duration,
    /// How large an image may become when it is unpacked, in bytes. 1 TiB.
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
    /// The usual limits.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Gives a server this long to accept a connection.
    #[must_use]
    pub fn with_connect_timeout(mut self, limit: Duration) -> Self {
        self.connect_timeout = limit;
        self
    }

    /// Takes a transfer as broken after this long without a byte.
    #[must_use]
    pub fn with_stall_timeout(mut self, limit: Duration) -> Self {
        self.stall_timeout = limit;
        self
    }

    /// Tries a download this often, the first attempt included.
    #[must_use]
    pub fn with_attempts(mut self, attempts: u32) -> Self {
        self.attempts = attempts;
        self
    }

    /// Waits this long before the second attempt, and twice as long before each further one, up to 30 s.
    #[must_use]
    pub fn with_backoff(mut self, pause: Duration) -> Self {
        self.backoff = pause;
        self
    }

    /// Unpacks images of at most this size, in bytes.
    #[must_use]
    pub fn with_unpacked_limit(mut self, bytes: u64) -> Self {
        self.unpacked_limit = bytes;
        self
    }
}

/// A disk image in the store that may serve as a backing file. Never write to it.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct StoredImage {
    /// The file.
    pub path: PathBuf,
    /// What it is, by its content.
    pub format: ImageFormat,
    /// What a guest sees, in bytes, as the image's own header says.
    pub virtual_size: u64,
    /// sha256 of the file: of the unpacked image, where it came packed.
    pub digest: Digest,
    /// What was asked for and what came, for the provenance. Its role is that of a file: the caller knows better.
    pub input: InputRecord,
    /// Keeps it from being collected until it is dropped; give it to [`LabDir::hold`].
    pub lease: Lease,
}

/// A file in the store, as it was served. Never write to it.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct StoredFile {
    /// The file.
    pub path: PathBuf,
    /// How many bytes it has.
    pub size: u64,
    /// What was asked for and what came, for the provenance. Its role is that of a file: the caller knows better.
    pub input: InputRecord,
    /// Keeps it from being collected until it is dropped; give it to [`LabDir::hold`].
    pub lease: Lease,
}

/// Something in the store that can be needed.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Use {
    /// A blob.
    Blob(Digest),
    /// A version of a module.
    Module {
        /// Its name.
        name: String,
        /// Its digest.
        digest: Digest,
    },
}

/// Keeps something in the store from being removed, for as long as this or a clone of it lives.
#[derive(Debug, Clone)]
pub struct Lease {
    what: Use,
    _lock: Arc<UsedLock>,
}

/// The lock of something in use. What was used until now was used now: how long it is unused counts from here.
#[derive(Debug)]
struct UsedLock(FileLock);

impl Drop for UsedLock {
    fn drop(&mut self) {
        self.0.touch();
    }
}

impl Lease {
    /// What is kept.
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
    /// Opens the store in this directory. Where there is no directory, or an empty one, it makes a store.
    ///
    /// # Errors
    /// `InvalidInput` for a directory that is not empty and no store, and for one of another user; `Unsupported` for the store of
    /// a later version; `Conflict` where a directory of the store is something else, such as a symbolic link; file errors. A
    /// directory that is refused is left unchanged.
    pub fn open(root: impl Into<PathBuf>) -> Result<Self> {
        Self::open_with(root, StoreOptions::default())
    }

    /// [`open`](Self::open) with other timeouts and limits.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_with(root: impl Into<PathBuf>, options: StoreOptions) -> Result<Self> {
        let opened = layout::open(&root.into())?;
        Ok(Self(Arc::new(Inner { opened, options, client: OnceLock::new() })))
    }

    /// Where the store of this user is: `$RUDDER_STORE`, else `rudder` in `$XDG_DATA_HOME`, else `~/.local/share/rudder`
    /// (XDG Base Directory Specification).
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

    /// Its directory, without symbolic links.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.0.opened.root
    }

    /// A disk image, unpacked and ready to be a backing file: from the cache, else from where the URL says.
    ///
    /// Recognised by its content, never by its name: qcow2, raw, vmdk, vdi, vhd, vhdx, and any of them in gz, xz, zst or
    /// bz2. Dropping the future leaves a partial download that the next call resumes.
    ///
    /// # Errors
    /// `NotFound`, `Download`, `ChecksumMismatch` (the bytes stay in the store, for a manifest with a corrected
    /// checksum), `InvalidImage`, `HostDiskFull`, `InvalidInput` for another scheme.
    pub async fn image(&self, url: &PlannedUrl, progress: &Progress) -> Result<StoredImage> {
        self.image_for(url, None, progress).await
    }

    /// [`image`](Self::image) for a disk of this size in bytes: unpacking stops as soon as more has come out than such a
    /// disk can hold.
    ///
    /// # Errors
    /// As `image`; `InvalidInput` when a packed image is larger than the disk.
    pub async fn image_for(
        &self,
        url: &PlannedUrl,
        disk: Option<u64>,
        progress: &Progress,
    ) -> Result<StoredImage> {
        let wanted = Wanted::Image { disk };
        let got = self.obtain(url, wanted, progress).await.map_err(|error| about(url, error))?;
        let Some(image) = got.image else {
            return Err(about(url, Error::new(ErrorKind::Internal, "an image was wanted, and a file came")));
        };
        Ok(StoredImage {
            path: self.blob_path(&image.stored),
            format: image.format,
            virtual_size: image.virtual_size,
            digest: image.stored,
            input: input(url, got.size, got.served),
            lease: got.lease,
        })
    }

    /// The bytes behind a URL, as they are served: from the cache, else from where the URL says.
    ///
    /// # Errors
    /// As [`image`](Self::image), without `InvalidImage`.
    pub async fn file(&self, url: &PlannedUrl, progress: &Progress) -> Result<StoredFile> {
        let got = self.obtain(url, Wanted::File, progress).await.map_err(|error| about(url, error))?;
        Ok(StoredFile {
            path: self.blob_path(&got.served),
            size: got.size,
            input: input(url, got.size, got.served),
            lease: got.lease,
        })
    }

    /// [`file`](Self::file), kept cached for at least this long after its last use, whatever is [collected](Self::collect)
    /// meanwhile and whichever module was made of it. A longer time that it was kept for earlier holds, too.
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

    /// Keeps a blob cached for so long after its last use, whatever is [collected](Self::collect) meanwhile and whichever
    /// module was made of it. What was promised for it earlier holds, too.
    ///
    /// # Errors
    /// File errors.
    pub fn keep_cached(&self, lease: &Lease, keep_for: Duration) -> Result<()> {
        match lease.what() {
            Use::Blob(digest) => self.promise(digest, keep_for),
            Use::Module { .. } => Ok(()),
        }
    }

    /// The client for all downloads of this store.
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

    /// The lock that keeps everybody else from using this, if nobody does; else who does.
    fn unused(&self, what: &Use) -> Result<Result<FileLock, String>> {
        let Some(lock) = FileLock::attempt(&self.use_lock(what), Mode::Exclusive)? else {
            return Ok(Err("a running process".into()));
        };
        // Looked at under the lock: whoever had a lease has written it into the ledger before giving the lease back.
        let user =
            self.used_by_labs()?.into_iter().find(|(_, used)| used.as_ref().is_none_or(|used| used == what));
        Ok(match user {
            Some((lab, Some(_))) => Err(format!("lab {lab}")),
            Some((lab, None)) => Err(format!("perhaps lab {lab}, whose ledger cannot be read,")),
            None => Ok(lock),
        })
    }

    /// The directories in a directory of the store whose names are wanted, in order; of one that is not there, none.
    /// A symbolic link is no directory.
    fn directories(&self, dir: &Path, wanted: impl Fn(&str) -> bool) -> Result<Vec<(String, PathBuf)>> {
        self.entries(dir, |name, kind| kind.is_dir() && wanted(name))
    }

    /// The regular files in a directory of the store whose names are wanted, in order.
    fn files(&self, dir: &Path, wanted: impl Fn(&str) -> bool) -> Result<Vec<(String, PathBuf)>> {
        self.entries(dir, |name, kind| kind.is_file() && wanted(name))
    }

    /// The entries of a directory of the store that are wanted, in order; of one that is not there, none.
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

/// Runs file work that may take long where it does not hold up the async runtime.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    rudder_core::runtime::check()?;
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(error) => Err(Error::new(ErrorKind::Cancelled, "the program is ending: file work was not begun")
            .with_source(error)),
    }
}

fn input(url: &PlannedUrl, size: u64, sha256: Digest) -> InputRecord {
    InputRecord::new(InputRole::File, masked(&url.url), Content::of_bytes(size, sha256))
}

fn about(url: &PlannedUrl, error: Error) -> Error {
    error.with_context("url", masked(&url.url))
}

/// A URL without what must not be shown.
fn masked(url: &url::Url) -> String {
    rudder_core::secret::public_url(url)
}

#[cfg(test)]
mod tests;
