//! From a URL to a blob: the cache first, then a file or a server.

use super::{Lease, Store, blob::ImageRecord, blocking, unpack::Stop};
use crate::{Error, ErrorKind, Result, backend::Progress, digest::Digest, plan::PlannedUrl};
use std::path::PathBuf;

impl Store {
    pub(super) async fn obtain_image(
        &self,
        url: &PlannedUrl,
        progress: &Progress,
    ) -> Result<(ImageRecord, Digest, Lease)> {
        if let Some(known) = self.promised_image(url).await? {
            return Ok(known);
        }
        if is_local(url)? {
            let stop = Stop::default();
            let _guard = stop.on_drop();
            let (store, url, progress) = (self.clone(), url.clone(), progress.clone());
            return blocking(move || store.local_image(&url, &progress, &stop)).await;
        }
        Err(Error::new(ErrorKind::Unsupported, "not yet"))
    }

    pub(super) async fn obtain_file(
        &self,
        url: &PlannedUrl,
        progress: &Progress,
    ) -> Result<(Digest, u64, Lease)> {
        if let Some(known) = self.promised_file(url)? {
            return Ok(known);
        }
        if is_local(url)? {
            let stop = Stop::default();
            let _guard = stop.on_drop();
            let (store, url, progress) = (self.clone(), url.clone(), progress.clone());
            return blocking(move || store.local_file(&url, &progress, &stop)).await;
        }
        Err(Error::new(ErrorKind::Unsupported, "not yet"))
    }

    /// The image with the promised checksum, if its bytes are here: then nobody is asked.
    async fn promised_image(&self, url: &PlannedUrl) -> Result<Option<(ImageRecord, Digest, Lease)>> {
        let Some(served) = url.sha256 else { return Ok(None) };
        if let Some((image, lease)) = self.known_image(&served)? {
            return Ok(Some((image, served, lease)));
        }
        let Some(lease) = self.lease_blob(&served, None)? else { return Ok(None) };
        let store = self.clone();
        let (image, lease) = blocking(move || store.image_of_blob(&served, lease)).await?;
        Ok(Some((image, served, lease)))
    }

    /// The same for a file.
    fn promised_file(&self, url: &PlannedUrl) -> Result<Option<(Digest, u64, Lease)>> {
        let Some(served) = url.sha256 else { return Ok(None) };
        let Some(lease) = self.lease_blob(&served, None)? else { return Ok(None) };
        let path = self.blob_path(&served);
        let size =
            std::fs::metadata(&path).map_err(|error| super::durable::io_error("read", &path, error))?.len();
        Ok(Some((served, size, lease)))
    }

    pub(super) fn download_lock(&self, key: &str) -> PathBuf {
        self.lock_path(&format!("download-{key}"))
    }
}

fn is_local(url: &PlannedUrl) -> Result<bool> {
    match url.url.scheme() {
        "file" => Ok(true),
        "http" | "https" => Ok(false),
        other => Err(Error::new(
            ErrorKind::InvalidInput,
            format!("expected a URL with http, https or file, but found {other}"),
        )),
    }
}
