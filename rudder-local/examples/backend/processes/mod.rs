//! A backend of host processes: a machine is a process that sleeps, a disk is a sparse file. No guest ever boots on it, but
//! everything else is real: labs, owners, death, disks, modules.

mod adapter;
mod lab;
mod machine;

pub(crate) use adapter::ProcessesAdapter;

use async_trait::async_trait;
use lab::ProcessesLab;
use rudder_core::{
    Error, ErrorKind, Result,
    backend::{Backend, HostFinding, HostReport, Lab, LabId, LabInfo, LabSpec, ReapReport},
    capability::{Capabilities, Capability},
    fetch::Fetch,
    module::{DamagedModule, Module},
};
use rudder_local::store::{CollectPolicy, LabEntry, Store};
use std::{path::Path, sync::Arc};

/// A backend whose machines are sleeping processes.
#[derive(Debug)]
pub(crate) struct Processes {
    store: Store,
    capabilities: Capabilities,
}

impl Processes {
    /// Creates a backend on this store.
    #[must_use]
    pub(crate) fn new(store: Store) -> Self {
        // Only what is honoured, and nothing that a guest would have to see.
        let claims = [Capability::SourceBlank, Capability::SourceBuildRef];
        Self { store, capabilities: Capabilities::new(Self::NAME, claims) }
    }
}

/// Runs file operations where they do not block the runtime. They continue when their caller is dropped: what they create must
/// be in the directory of the lab, which is removed as a whole.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| {
        Err(Error::new(ErrorKind::Internal, "a file operation was interrupted").with_source(error))
    })
}

impl Processes {
    /// The name of this backend.
    const NAME: &str = "processes";
}

#[async_trait]
impl Backend for Processes {
    fn name(&self) -> &str {
        Self::NAME
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn fetcher(&self) -> Arc<dyn Fetch> {
        Arc::new(self.store.clone())
    }

    async fn diagnose(&self) -> Result<HostReport> {
        let mut report = HostReport::default();
        let detail = "who owns a process is read there";
        report.findings.push(match Path::new("/proc/self/cwd").exists() {
            true => HostFinding::present("/proc", detail),
            false => {
                HostFinding::missing("/proc", detail).help("mount it: mount -t proc proc /proc".to_owned())
            }
        });
        Ok(report)
    }

    async fn open_lab(&self, spec: &LabSpec) -> Result<Arc<dyn Lab>> {
        Ok(Arc::new(ProcessesLab::open(self.store.clone(), spec).await?))
    }

    async fn modules(&self) -> Result<Vec<Module>> {
        let store = self.store.clone();
        blocking(move || store.modules()).await
    }

    async fn damaged_modules(&self) -> Result<Vec<DamagedModule>> {
        let store = self.store.clone();
        blocking(move || store.damaged_modules()).await
    }

    async fn remove_module(&self, name: &str) -> Result<()> {
        self.store.remove_module(name).await
    }

    async fn labs(&self) -> Result<Vec<LabInfo>> {
        let store = self.store.clone();
        blocking(move || Ok(store.labs()?.iter().map(LabEntry::info).collect())).await
    }

    async fn attach(&self, id: &LabId) -> Result<Arc<dyn Lab>> {
        Ok(Arc::new(ProcessesLab::attach(self.store.clone(), id).await?))
    }

    async fn lab_file(&self, id: &LabId, name: &str) -> Result<Option<Vec<u8>>> {
        let (store, id, name) = (self.store.clone(), id.clone(), name.to_owned());
        blocking(move || store.lab_file(&id, &name)).await
    }

    async fn remove_lab(&self, id: &LabId) -> Result<()> {
        self.store.remove_lab(id).await
    }

    async fn reap(&self) -> Result<ReapReport> {
        self.store.reap().await
    }

    async fn collect(&self) -> Result<ReapReport> {
        self.store.collect(CollectPolicy::default()).await
    }
}
