//! Files that the engine itself reads: files of the manifest behind URLs, what goes onto a floppy, what is served over HTTP.
//!
//! A [`Fetch`] brings them to this host, verified and cached. It has nothing to do with where machines run; the sources of
//! machines and their CD-ROMs go through [`Lab::import`](crate::backend::Lab::import).

use crate::{Result, module::InputRecord, plan::PlannedUrl, progress::Progress};
use async_trait::async_trait;
use std::{any::Any, fmt, path::PathBuf, sync::Arc, time::Duration};

/// Brings what is behind URLs to this host.
#[async_trait]
pub trait Fetch: fmt::Debug + Send + Sync + 'static {
    /// Brings the bytes of a URL to this host: verified against the promised digest, cached. Requests of the same URL, in this or
    /// another process, share one download. Progress is reported in bytes as served. Dropping the future leaves nothing but
    /// what the next request of the same URL continues or replaces.
    ///
    /// # Errors
    /// `Download`, `NotFound`, `ChecksumMismatch`, `HostDiskFull`.
    async fn fetch(&self, request: &FetchRequest, progress: &Progress) -> Result<Fetched>;
}

/// What [`Fetch::fetch`] is asked for.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct FetchRequest {
    /// Where it is.
    pub url: PlannedUrl,
    /// How long it stays cached after its last use, at least, whatever is collected meanwhile.
    pub keep_for: Duration,
}

impl FetchRequest {
    /// What is behind this URL. Once nothing needs it, it may be collected.
    #[must_use]
    pub fn new(url: PlannedUrl) -> Self {
        Self { url, keep_for: Duration::ZERO }
    }

    /// Keeps it cached for this long after its last use.
    #[must_use]
    pub fn keep_for(mut self, keep_for: Duration) -> Self {
        self.keep_for = keep_for;
        self
    }
}

/// A fetched file. It stays where it is, unchanged, as long as this or a clone of it lives.
#[derive(Clone)]
#[non_exhaustive]
pub struct Fetched {
    /// Where it is. Read it, and do not change it.
    pub path: PathBuf,
    /// What it is, for the provenance.
    pub input: InputRecord,
    _lease: Arc<dyn Any + Send + Sync>,
}

impl Fetched {
    /// A file that stays as long as `lease` lives.
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
