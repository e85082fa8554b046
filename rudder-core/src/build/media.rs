//! What the machines of an attempt boot with and fetch while they do: files behind URLs, each brought to the host once, and
//! the files that are served over HTTP from before the first machine is powered on until the last is provisioned.

use super::{attempt::Attempt, log::lock};
use crate::{
    Error, ErrorKind, Result,
    backend::{FetchRequest, Served, Site, SiteFile, SiteRequest},
    event::EventKind,
    plan::{PlannedContent, PlannedFile, PlannedMachine, PlannedUrl},
};
use std::{
    collections::{BTreeMap, HashMap},
    net::Ipv4Addr,
    path::PathBuf,
    sync::{Arc, Mutex},
};
use tokio::sync::OnceCell;

/// What was behind URLs, where it is now; and the server of the build's files while it runs.
#[derive(Debug, Default)]
pub(super) struct Media {
    fetched: Mutex<HashMap<String, Arc<OnceCell<PathBuf>>>>,
    served: Mutex<Option<Served>>,
}

impl Media {
    /// Where what is behind a URL is now, once it was fetched.
    pub(super) fn get(&self, url: &PlannedUrl) -> Option<PathBuf> {
        self.cell(url).get().cloned()
    }

    fn cell(&self, url: &PlannedUrl) -> Arc<OnceCell<PathBuf>> {
        // The same URL with another promised digest is another file.
        let key = format!("{:?} {}", url.sha256, url.url);
        Arc::clone(lock(&self.fetched).entry(key).or_default())
    }
}

impl Attempt {
    /// Brings what is behind a URL to the host. Whoever asks for the same meanwhile waits for it.
    pub(super) async fn fetch(&self, url: &PlannedUrl) -> Result<PathBuf> {
        let cell = self.media.cell(url);
        let fetch = async || {
            let request = FetchRequest::new(url.clone());
            let fetched = self.guard.wait(self.lab.fetch(&request, &self.sink.progress(None))).await?;
            self.input(None, fetched.input)?;
            Ok(fetched.path)
        };
        cell.get_or_try_init(fetch).await.cloned()
    }

    /// The entry of `files` of this name.
    fn file(&self, name: &str) -> Result<&PlannedFile> {
        let file = self.plan.files.iter().find(|file| file.name == name);
        file.ok_or_else(|| {
            Error::new(
                ErrorKind::InvalidInput,
                format!("expected {name:?} in the files of the plan, but found none"),
            )
        })
    }

    /// Serves the files of `httpDirectory` to the machines, until [`stop_serving`](Self::stop_serving).
    pub(super) async fn start_serving(&self) -> Result<()> {
        if self.plan.http_files.is_empty() {
            return Ok(());
        }
        let mut files = BTreeMap::new();
        for name in &self.plan.http_files {
            let file = match &self.file(name)?.content {
                PlannedContent::Inline(bytes) => SiteFile::Bytes(Arc::clone(bytes)),
                PlannedContent::Url(url) => SiteFile::Path(self.fetch(url).await?),
            };
            files.insert(name.clone(), file);
        }
        let sink = self.sink.clone();
        let tell = move |request| {
            let SiteRequest { machine, method, path, status, bytes } = request;
            sink.emit(machine.as_deref(), EventKind::HttpRequest { method, path, status, bytes });
        };
        let served = self.guard.wait(self.lab.serve(Site::new(files, tell))).await?;
        *lock(&self.media.served) = Some(served);
        for planned in &self.plan.machines {
            let Some((address, port)) = self.site_of(planned) else { continue };
            let message = format!("files are served at http://{address}:{port}/");
            self.sink.emit(Some(&planned.name), EventKind::Notice { message });
        }
        Ok(())
    }

    /// Ends what [`start_serving`](Self::start_serving) began.
    pub(super) fn stop_serving(&self) {
        drop(lock(&self.media.served).take());
    }

    /// Address and port of the served files, as a VM reaches them on the first of its networks where they are; `None` where
    /// it reaches none.
    pub(super) fn site_of(&self, planned: &PlannedMachine) -> Option<(Ipv4Addr, u16)> {
        let served = lock(&self.media.served);
        let served = served.as_ref()?;
        let address = planned.hardware.nics.iter().find_map(|nic| served.addresses.get(&nic.subnet))?;
        Some((*address, served.port))
    }
}
