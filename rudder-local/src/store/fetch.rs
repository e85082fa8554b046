//! From a URL to a blob: the cache first, then a file or a server.

use super::{
    Lease, Store, blob::ImageRecord, blocking, download::Requested, durable::io_error, unpack::Stop,
    verified::Condition,
};
use rudder_core::{Error, ErrorKind, Result, backend::Progress, digest::Digest, plan::PlannedUrl};
use std::{fs, path::PathBuf};

/// A requested resource, in the store.
#[derive(Debug, Clone)]
pub(super) struct Obtained {
    /// sha256 of the bytes as served.
    pub(super) served: Digest,
    /// Number of bytes served.
    pub(super) size: u64,
    /// The blob that the image became, if an image was requested.
    pub(super) image: Option<ImageRecord>,
    /// Keeps the blob from being collected.
    pub(super) lease: Lease,
}

impl Obtained {
    pub(super) fn image(served: Digest, (image, lease): (ImageRecord, Lease)) -> Self {
        Self { served, size: image.served_size, image: Some(image), lease }
    }

    pub(super) fn file(served: Digest, size: u64, lease: Lease) -> Self {
        Self { served, size, image: None, lease }
    }
}

impl Store {
    /// Brings the content of a URL into the store, unless it is already there.
    pub(super) async fn obtain(
        &self,
        url: &PlannedUrl,
        requested: Requested,
        progress: &Progress,
    ) -> Result<Obtained> {
        rudder_core::runtime::check()?;
        // If the bytes with this checksum are in the store, no server is contacted.
        if let Some(promised) = url.sha256
            && let Some(got) = self.cached(&promised, requested, progress).await?
        {
            return Ok(got);
        }
        let obtained = match url.url.scheme() {
            "http" | "https" => self.download(url, requested, progress).await,
            "file" => {
                let stop = Stop::default();
                let _guard = stop.on_drop();
                let (store, url, progress) = (self.clone(), url.clone(), progress.clone());
                blocking(move || store.copy_in(&url, requested, &progress, &stop)).await
            }
            other => Err(Error::new(
                ErrorKind::InvalidInput,
                format!("expected a URL with http, https or file, but found {other}"),
            )),
        };
        let Err(error) = obtained else { return obtained };
        let (store, url) = (self.clone(), url.clone());
        // If a damaged copy is the reason why the cache could not be used, the error says so.
        Err(match blocking(move || store.damaged_copy(&url)).await? {
            Some(path) => error.with_context("damaged cached file", path.display()),
            None => error,
        })
    }

    /// Returns the path of the cached bytes of a URL, if they are damaged.
    fn damaged_copy(&self, url: &PlannedUrl) -> Result<Option<PathBuf>> {
        let served = url.sha256.or(self.url_record(&url.url)?.map(|record| record.served));
        let Some(served) = served else { return Ok(None) };
        let stored = self.image_record(&served)?.map(|record| record.stored);
        for digest in [Some(served), stored].into_iter().flatten() {
            let path = self.blob_path(&digest);
            let condition = self.examine(&path, &digest, None, &Progress::none(), &Stop::default())?;
            if matches!(condition, Condition::Damaged(_)) {
                return Ok(Some(path));
            }
        }
        Ok(None)
    }

    /// Returns what these served bytes are, if they are in the store.
    pub(super) async fn cached(
        &self,
        served: &Digest,
        requested: Requested,
        progress: &Progress,
    ) -> Result<Option<Obtained>> {
        let stop = Stop::default();
        let _guard = stop.on_drop();
        let (store, served, progress) = (self.clone(), *served, progress.clone());
        blocking(move || {
            if requested.is_image()
                && let Some(known) = store.known_image(&served, &progress, &stop)?
            {
                return Ok(Some(Obtained::image(served, known)));
            }
            let Some(lease) = store.lease_blob(&served, None, &progress, &stop)? else { return Ok(None) };
            Ok(Some(match requested {
                // They were stored as a file, or under a wrong checksum: now they become an image.
                Requested::Image { disk } => {
                    Obtained::image(served, store.image_of_blob(&served, lease, disk, &progress, &stop)?)
                }
                Requested::File => {
                    let path = store.blob_path(&served);
                    let size = fs::metadata(&path).map_err(|error| io_error("read", &path, error))?.len();
                    Obtained::file(served, size, lease)
                }
            }))
        })
        .await
    }

    pub(super) fn download_lock(&self, key: &str) -> PathBuf {
        self.lock_path(&format!("download-{key}"))
    }
}
