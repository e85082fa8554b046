//! Downloads for the engine, to a temporary directory: files of the manifest are needed here, not in the cluster.

use crate::http_client::http_client;
use async_trait::async_trait;
use futures::StreamExt as _;
use rudder_core::{
    Error, ErrorKind, Result,
    content::Content,
    digest::{Digest, Digester},
    fetch::{Fetch, FetchRequest, Fetched},
    module::{InputRecord, InputRole},
    progress::Progress,
    secret::public_url,
};
use std::{collections::HashMap, sync::Arc};
use tokio::{io::AsyncWriteExt as _, sync::Mutex};
use url::Url;

/// A fetcher that downloads each URL once, and removes the files when they are no longer used.
#[derive(Debug, Default)]
pub(crate) struct TemporaryFetcher {
    /// Downloads by URL and expected digest. Each has a lock of its own, so that requests for one URL share a download.
    downloads: Mutex<HashMap<String, Arc<Mutex<Option<Fetched>>>>>,
}

#[async_trait]
impl Fetch for TemporaryFetcher {
    async fn fetch(&self, request: &FetchRequest, progress: &Progress) -> Result<Fetched> {
        let url = &request.url;
        let key = format!("{} {:?}", url.url, url.sha256);
        let slot = Arc::clone(self.downloads.lock().await.entry(key).or_default());
        let mut slot = slot.lock().await;
        if let Some(fetched) = &*slot {
            return Ok(fetched.clone());
        }
        let fetched = download(&url.url, url.sha256, progress).await;
        let fetched = fetched.map_err(|error| error.with_context("url", public_url(&url.url)))?;
        Ok(slot.insert(fetched).clone())
    }
}

async fn download(url: &Url, expected: Option<Digest>, progress: &Progress) -> Result<Fetched> {
    let broken = |error: reqwest::Error| {
        Error::new(ErrorKind::Download, "the download failed").with_source(error.without_url())
    };
    let directory = tempfile::Builder::new().prefix("rudder-").tempdir();
    let directory = directory.map_err(|error| Error::io("make a temporary directory", error))?;
    let path = directory.path().join("file");
    let mut file =
        tokio::fs::File::create(&path).await.map_err(|error| Error::io("create a temporary file", error))?;
    let (mut digest, mut size) = (Digester::default(), 0_u64);
    let task = format!("download {}", public_url(url));
    if url.scheme() == "file" {
        let source = url
            .to_file_path()
            .map_err(|()| Error::new(ErrorKind::InvalidInput, "expected the path of a file on this host"))?;
        let bytes = tokio::fs::read(&source)
            .await
            .map_err(|error| Error::io(format!("read {}", source.display()), error))?;
        digest.update(&bytes);
        size = bytes.len() as u64;
        file.write_all(&bytes).await.map_err(|error| Error::io("write a temporary file", error))?;
    } else {
        let response = http_client()?.get(url.clone()).send().await.map_err(broken)?;
        if response.status() == reqwest::StatusCode::NOT_FOUND {
            return Err(Error::new(
                ErrorKind::NotFound,
                "the server answered 404: there is nothing at this URL",
            ));
        }
        let response = response.error_for_status().map_err(broken)?;
        let total = response.content_length();
        let mut body = response.bytes_stream();
        while let Some(bytes) = body.next().await {
            let bytes = bytes.map_err(broken)?;
            digest.update(&bytes);
            size += bytes.len() as u64;
            file.write_all(&bytes).await.map_err(|error| Error::io("write a temporary file", error))?;
            progress.bytes(&task, size, total);
        }
    }
    file.flush().await.map_err(|error| Error::io("write a temporary file", error))?;
    progress.bytes(&task, size, Some(size));
    let found = digest.finish();
    if let Some(expected) = expected.filter(|expected| *expected != found) {
        return Err(Error::new(
            ErrorKind::ChecksumMismatch,
            format!("expected sha256 {expected}, but found {found}"),
        ));
    }
    let input = InputRecord::new(InputRole::File, public_url(url), Content::of_bytes(size, found));
    Ok(Fetched::new(path, input, directory))
}
