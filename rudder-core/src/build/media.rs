//! What the machines of an attempt boot from and fetch while they boot: files behind URLs, each downloaded once, and the files
//! served over HTTP from before the first machine is powered on until the last is provisioned.

use super::{attempt::Attempt, log::lock};
use crate::{
    Error, ErrorKind, Result,
    backend::{ImportRequest, Served, Site, SiteFile, SiteRequest, Volume},
    event::{EventKind, ServedFile},
    fetch::{FetchRequest, Fetched},
    media::{floppy, http::decoded},
    plan::{PlannedContent, PlannedMachine, PlannedUrl},
};
use futures::future::try_join_all;
use std::{
    collections::{BTreeMap, HashMap},
    net::Ipv4Addr,
    path::PathBuf,
    sync::{Arc, Mutex},
};
use tokio::sync::OnceCell;

/// Number of requests by machine and file name.
type Requests = HashMap<(Option<String>, Vec<u8>), u64>;

/// Fetched files, and the server of the build's files while it runs.
#[derive(Debug, Default)]
pub(super) struct Media {
    fetched: Mutex<HashMap<String, Arc<OnceCell<Fetched>>>>,
    served: Mutex<Option<Served>>,
    /// How often a machine received a served file, by machine (where it is known) and name.
    requests: Arc<Mutex<Requests>>,
}

impl Media {
    /// Returns the path of the file that was fetched from a URL.
    pub(super) fn get(&self, url: &PlannedUrl) -> Option<PathBuf> {
        self.cell(url).get().map(|fetched| fetched.path.clone())
    }

    fn cell(&self, url: &PlannedUrl) -> Arc<OnceCell<Fetched>> {
        // The same URL with another expected digest is another file.
        let key = format!("{:?} {}", url.sha256, url.url);
        Arc::clone(lock(&self.fetched).entry(key).or_default())
    }
}

impl Attempt {
    /// Downloads the file behind a URL. Concurrent calls for the same file wait for the first one.
    pub(super) async fn fetch(&self, url: &PlannedUrl) -> Result<Fetched> {
        let cell = self.media.cell(url);
        let fetch = async || {
            let (request, progress) = (FetchRequest::new(url.clone()), self.sink.progress(None));
            let fetched = self.guard.wait(self.fetcher.fetch(&request, &progress)).await?;
            self.input(None, fetched.input.clone())?;
            Ok(fetched)
        };
        cell.get_or_try_init(fetch).await.cloned()
    }

    /// Returns the content of the entry of `files` with this name.
    async fn content(&self, name: &str) -> Result<SiteFile> {
        let file = self.plan.files.iter().find(|file| file.name == name).ok_or_else(|| {
            let message = format!("expected {name:?} in the files of the plan, but found none");
            Error::new(ErrorKind::InvalidInput, message)
        })?;
        match &file.content {
            PlannedContent::Inline(bytes) => Ok(SiteFile::bytes(Arc::clone(bytes))),
            PlannedContent::Url(url) => {
                let fetched = self.fetch(url).await.map_err(|error| error.with_context("file", name))?;
                Ok(SiteFile::fetched(fetched))
            }
        }
    }

    /// Imports the CD-ROMs of a VM, in order.
    pub(super) async fn cdroms(&self, planned: &PlannedMachine) -> Result<Vec<Volume>> {
        let vm = planned.name.as_str();
        let import = |(index, url): (usize, &PlannedUrl)| {
            let mut request = ImportRequest::cdrom(vm, format!("iso{}", index + 1), url.clone());
            request.keep_for = self.plan.iso_cache_ttl;
            async move {
                let imported =
                    self.guard.wait(self.lab.import(&request, &self.sink.progress(Some(vm)))).await?;
                imported.input.map_or(Ok(()), |input| self.input(Some(vm), input))?;
                Ok(imported.volume)
            }
        };
        try_join_all(planned.isos.iter().enumerate().map(import)).await
    }

    /// Creates the floppy of a VM, if it has one.
    pub(super) async fn floppy(&self, planned: &PlannedMachine) -> Result<Option<Arc<[u8]>>> {
        if planned.floppy.is_empty() {
            return Ok(None);
        }
        let mut files = Vec::with_capacity(planned.floppy.len());
        for name in &planned.floppy {
            files.push((name.clone(), self.content(name).await?));
        }
        let made = floppy_of(&files).await;
        made.map(Some).map_err(|error| error.with_context("medium", "floppy"))
    }

    /// Serves the files of `httpDirectory` to the machines, until [`stop_serving`](Self::stop_serving).
    pub(super) async fn start_serving(&self) -> Result<()> {
        if self.plan.http_files.is_empty() {
            return Ok(());
        }
        let mut files = BTreeMap::new();
        for name in &self.plan.http_files {
            files.insert(name.clone(), self.content(name).await?);
        }
        let sink = self.sink.clone();
        let requests = Arc::clone(&self.media.requests);
        let tell = move |request| {
            let SiteRequest { machine, method, path, status, bytes } = request;
            if method == "GET" && (200..300).contains(&status) {
                let name = decoded(path.trim_start_matches('/')).unwrap_or_default();
                *lock(&requests).entry((machine.clone(), name)).or_default() += 1;
            }
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

    /// Returns how often a machine received each served file, in the order of the plan. Requests whose machine is unknown count
    /// for all machines.
    pub(super) fn served_to(&self, vm: &str) -> Vec<ServedFile> {
        let requests = lock(&self.media.requests);
        let of = |machine: Option<&str>, name: &String| {
            let key = (machine.map(str::to_owned), name.clone().into_bytes());
            requests.get(&key).copied().unwrap_or_default()
        };
        let names = self.plan.http_files.iter();
        names.map(|name| ServedFile::new(name, of(Some(vm), name) + of(None, name))).collect()
    }

    /// Stops the server that [`start_serving`](Self::start_serving) started.
    pub(super) fn stop_serving(&self) {
        drop(lock(&self.media.served).take());
    }

    /// Returns the address and port of the served files as a VM reaches them on the first of its networks that has them; `None` if
    /// it reaches none.
    pub(super) fn site_of(&self, planned: &PlannedMachine) -> Option<(Ipv4Addr, u16)> {
        let served = lock(&self.media.served);
        let served = served.as_ref()?;
        let address = planned.hardware.nics.iter().find_map(|nic| served.addresses.get(&nic.subnet))?;
        Some((*address, served.port))
    }
}

/// Creates the image of a floppy. If a file would not fit, no file is read.
async fn floppy_of(files: &[(String, SiteFile)]) -> Result<Arc<[u8]>> {
    let mut sizes = Vec::with_capacity(files.len());
    for (name, file) in files {
        sizes.push((name.as_str(), file.size().await.map_err(|error| unreadable(name, error))?));
    }
    floppy::check_size(sizes)?;
    let mut contents = Vec::with_capacity(files.len());
    for (name, file) in files {
        contents.push((name.as_str(), file.read().await.map_err(|error| unreadable(name, error))?));
    }
    let contents: Vec<(&str, &[u8])> =
        contents.iter().map(|(name, bytes)| (*name, bytes.as_slice())).collect();
    floppy::image(&contents)
}

fn unreadable(name: &str, error: std::io::Error) -> Error {
    Error::io("read a file for the floppy", error).with_context("file", name)
}
