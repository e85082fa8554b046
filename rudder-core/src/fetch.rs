//! Files that the engine itself reads: files of the manifest behind URLs, contents of floppies, and files served over HTTP.
//!
//! A [`Fetch`] downloads them to this host, verified and cached. It is independent of where machines run; the sources of machines
//! and their CD-ROMs are imported with [`Lab::import`](crate::backend::Lab::import).

use crate::{Result, module::InputRecord, plan::PlannedUrl, progress::Progress};
use async_trait::async_trait;
use std::{any::Any, fmt, path::PathBuf, sync::Arc, time::Duration};

/// Downloads files from URLs to this host.
#[async_trait]
pub trait Fetch: fmt::Debug + Send + Sync + 'static {
    /// Downloads the bytes of a URL to this host, verifies them against the expected digest, and caches them. Requests for the same
    /// URL, in this or another process, share one download. Progress is reported in bytes as served. Dropping the future leaves
    /// nothing behind except what the next request for the same URL continues or replaces.
    ///
    /// # Errors
    /// `Download`, `NotFound`, `ChecksumMismatch`, `HostDiskFull`.
    async fn fetch(&self, request: &FetchRequest, progress: &Progress) -> Result<Fetched>;
}

/// Request to [`Fetch::fetch`].
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct FetchRequest {
    /// The URL to download.
    pub url: PlannedUrl,
    /// Minimum time that the file stays cached after its last use, even if the cache is collected meanwhile.
    pub keep_for: Duration,
}

impl FetchRequest {
    /// Creates a request for this URL. The file may be collected as soon as it is no longer needed.
    #[must_use]
    pub fn new(url: PlannedUrl) -> Self {
        Self { url, keep_for: Duration::ZERO }
    }

    /// Sets how long the file stays cached after its last use.
    #[must_use]
    pub fn keep_for(mut self, keep_for: Duration) -> Self {
        self.keep_for = keep_for;
        self
    }
}

/// A fetched file. It stays in place, unchanged, as long as this value or a clone of it exists.
#[derive(Clone)]
#[non_exhaustive]
pub struct Fetched {
    /// The path of the file. It must only be read, never changed.
    pub path: PathBuf,
    /// The record of the input, for the provenance.
    pub input: InputRecord,
    _lease: Arc<dyn Any + Send + Sync>,
}

impl Fetched {
    /// Creates a fetched file that stays in place as long as `lease` exists.
    pub fn new(path: impl Into<PathBuf>, input: InputRecord, lease: impl Any + Send + Sync) -> Self {
        Self { path: path.into(), input, _lease: Arc::new(lease) }
    }
}

impl fmt::Debug for Fetched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fetched")
            .field("path", &self.path)
            .field("input", &self.input)
            .finish_non_exhaustive()
    }
}
