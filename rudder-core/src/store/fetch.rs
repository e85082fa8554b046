//! From a URL to a blob: the cache first, then a file or a server.

use super::{Lease, Store, blob::ImageRecord, blocking, download::Wanted, durable::io_error, unpack::Stop};
use crate::{Error, ErrorKind, Result, backend::Progress, digest::Digest, plan::PlannedUrl};
use std::{fs, path::PathBuf};

/// What was wanted, in the store.
#[derive(Debug, Clone)]
pub(super) struct Got {
    /// sha256 of the bytes as served.
    pub(super) served: Digest,
    /// How many there were.
    pub(super) size: u64,
    /// Which blob the image became, if an image was wanted.
    pub(super) image: Option<ImageRecord>,
    /// Keeps the blob.
    pub(super) lease: Lease,
}

impl Got {
    pub(super) fn image(served: Digest, (image, lease): (ImageRecord, Lease)) -> Self {
        Self { served, size: image.served_size, image: Some(image), lease }
    }

    pub(super) fn file(served: Digest, size: u64, lease: Lease) -> Self {
        Self { served, size, image: None, lease }
    }
}

impl Store {
    /// Brings what a URL gives into the store, unless it is there.
    pub(super) async fn obtain(&self, url: &PlannedUrl, wanted: Wanted, progress: &Progress) -> Result<Got> {
        crate::runtime::check()?;
        // The promised bytes are here: then nobody is asked.
        if let Some(promised) = url.sha256
            && let Some(got) = self.held(&promised, wanted).await?
        {
            return Ok(got);
        }
        match url.url.scheme() {
            "http" | "https" => self.download(url, wanted, progress).await,
            "file" => {
                let stop = Stop::default();
                let _guard = stop.on_drop();
                let (store, url, progress) = (self.clone(), url.clone(), progress.clone());
                blocking(move || store.copy_in(&url, wanted, &progress, &stop)).await
            }
            other => Err(Error::new(
                ErrorKind::InvalidInput,
                format!("expected a URL with http, https or file, but found {other}"),
            )),
        }
    }

    /// What these served bytes are, if they are here.
    pub(super) async fn held(&self, served: &Digest, wanted: Wanted) -> Result<Option<Got>> {
        let (store, served) = (self.clone(), *served);
        blocking(move || {
            if wanted == Wanted::Image
                && let Some(known) = store.known_image(&served)?
            {
                return Ok(Some(Got::image(served, known)));
            }
            let Some(lease) = store.lease_blob(&served, None)? else { return Ok(None) };
            Ok(Some(match wanted {
                // They came as a file, or with a checksum that was wrong then: now they become an image.
                Wanted::Image => Got::image(served, store.image_of_blob(&served, lease)?),
                Wanted::File => {
                    let path = store.blob_path(&served);
                    let size = fs::metadata(&path).map_err(|error| io_error("read", &path, error))?.len();
                    Got::file(served, size, lease)
                }
            }))
        })
        .await
    }

    pub(super) fn download_lock(&self, key: &str) -> PathBuf {
        self.lock_path(&format!("download-{key}"))
    }
}
