//! Downloads with one fault.

use super::{Defect, Shared, lock};
use async_trait::async_trait;
use rudder_core::{
    Error, Result,
    backend::Progress,
    fetch::{Fetch, FetchRequest, Fetched},
};
use std::{fs, sync::Arc, time::Duration};

#[derive(Debug)]
pub(super) struct BrokenFetcher(pub(super) Arc<Shared>);

#[async_trait]
impl Fetch for BrokenFetcher {
    async fn fetch(&self, request: &FetchRequest, progress: &Progress) -> Result<Fetched> {
        let key = request.url.url.to_string();
        let known = lock(&self.0.fetched).get(&key).cloned();
        if let (Some(known), None, true) =
            (known, request.url.sha256, self.0.is(Defect::RewritesWhatOthersRead))
        {
            let failed = |source| Error::io("write", source);
            let bytes = fs::read(&known.path).map_err(failed)?;
            // Longer than the resolution of file system timestamps.
            tokio::time::sleep(Duration::from_millis(20)).await;
            fs::write(&known.path, &bytes).map_err(failed)?;
            return Ok(known);
        }
        let fetched = self.0.inner.fetcher().fetch(request, &self.0.progress(progress)).await?;
        lock(&self.0.fetched).entry(key).or_insert_with(|| fetched.clone());
        Ok(fetched)
    }
}
