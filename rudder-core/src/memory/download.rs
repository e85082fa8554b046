//! Downloads that are scripted or simulated: nothing is transferred over a network.

use super::{
    Shared,
    script::{Operation, Source},
};
use crate::{
    Error, ErrorKind, Result,
    content::Content,
    digest::Digest,
    fetch::{Fetch, FetchRequest, Fetched},
    module::{InputRecord, InputRole},
    plan::PlannedUrl,
    progress::Progress,
    secret::public_url,
};
use async_trait::async_trait;
use std::{io::Write as _, sync::Arc};

impl Source {
    /// Simulates a transfer. Returns the digest of the content.
    pub(super) async fn transfer(&self, url: &PlannedUrl, progress: &Progress) -> Result<Digest> {
        const PIECES: u32 = 10;
        if let Some(fault) = self.fault.as_ref().filter(|fault| fault.budget.take()) {
            return Err(fault.error().with_context("url", public_url(&url.url)));
        }
        let task = format!("download {}", public_url(&url.url));
        for piece in 0..PIECES {
            progress.bytes(&task, self.served * u64::from(piece) / u64::from(PIECES), Some(self.served));
            if !self.takes.is_zero() {
                tokio::time::sleep(self.takes / PIECES).await;
            }
        }
        progress.bytes(&task, self.served, Some(self.served));
        let found = match &self.contents {
            Some(bytes) => Digest::of(bytes),
            None => Digest::of(format!("{} {}", url.url, self.revision).as_bytes()),
        };
        match url.sha256 {
            Some(promised) if self.contents.is_some() || self.verified => {
                if promised == found {
                    return Ok(found);
                }
                let message = format!("expected sha256 {promised}, but found {found}");
                Err(Error::new(ErrorKind::ChecksumMismatch, message)
                    .with_context("url", public_url(&url.url)))
            }
            // Derived bytes have whatever checksum the manifest expects.
            Some(promised) => Ok(promised),
            None => Ok(found),
        }
    }
}

impl Shared {
    /// Returns the content of a URL: the bytes that a test provided, else those of a local file, else derived ones.
    pub(super) async fn download(
        &self,
        url: &PlannedUrl,
        role: InputRole,
        progress: &Progress,
    ) -> Result<(Vec<u8>, InputRecord)> {
        let mut source = self.source(url.url.as_str());
        if source.contents.is_none() && url.url.scheme() == "file" {
            let path = url.url.to_file_path().map_err(|()| {
                let message = format!("expected a path of this host, but found {}", url.url);
                Error::new(ErrorKind::InvalidInput, message)
            })?;
            let bytes = tokio::fs::read(&path).await;
            source =
                source.contents(bytes.map_err(|error| Error::io(format!("read {}", path.display()), error))?);
        }
        let sha256 = source.transfer(url, progress).await?;
        let bytes = source
            .contents
            .unwrap_or_else(|| format!("invented for {}\n", public_url(&url.url)).into_bytes());
        let size = bytes.len() as u64;
        Ok((bytes, InputRecord::new(role, public_url(&url.url), Content::of_bytes(size, sha256))))
    }
}

/// Downloads files for the engine, each to a temporary file of its own.
#[derive(Debug)]
pub(super) struct MemoryFetcher(pub(super) Arc<Shared>);

#[async_trait]
impl Fetch for MemoryFetcher {
    async fn fetch(&self, request: &FetchRequest, progress: &Progress) -> Result<Fetched> {
        self.0.check(Operation::Fetch)?;
        let (bytes, input) = self.0.download(&request.url, InputRole::File, progress).await?;
        let write = move || {
            let mut file = tempfile::Builder::new().prefix("rudder-memory-").tempfile()?;
            file.write_all(&bytes)?;
            Ok(file.into_temp_path())
        };
        let written = tokio::task::spawn_blocking(write).await;
        let written =
            written.map_err(|error| Error::new(ErrorKind::Internal, "a task panicked").with_source(error))?;
        let file = written.map_err(|error| Error::io("write a fetched file", error))?;
        Ok(Fetched::new(file.to_path_buf(), input, file))
    }
}
