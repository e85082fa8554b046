//! The backend: its builder, its capabilities, how it opens labs and manages modules, and how it cleans up.

use crate::{
    connection::Connection,
    host_capabilities::HostCapabilities,
    lab::LibvirtLab,
    lab_context::{cleanup_error, labelled, remove_all_of},
    label::{Label, Owner},
    modules, network,
};
use async_trait::async_trait;
use rudder_core::{
    ErrorKind, Result,
    backend::{Backend, HostFinding, HostReport, Lab, LabId, LabInfo, LabSpec, LabState, ReapReport},
    capability::{Capabilities, Capability},
    fetch::Fetch,
    module::{DamagedModule, Module},
};
use rudder_local::{
    accelerator::Accelerator,
    helper::HelperProgram,
    host::{self, Programs},
    lab_storage::blocking,
    store::{CollectPolicy, LabEntry, Store},
};
use std::{env, path::PathBuf, sync::Arc};
use tokio::sync::OnceCell;

/// A backend that runs machines on libvirt: one domain per machine, on a local [`Store`].
///
/// ```no_run
/// # fn main() -> rudder_core::Result<()> {
/// use rudder_local::store::Store;
/// use rudder_libvirt::LibvirtBackend;
///
/// let store = Store::open(Store::default_root())?;
/// let backend = LibvirtBackend::builder(store).uri("qemu:///session").build();
/// # drop(backend);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct LibvirtBackend {
    store: Store,
    connection: Arc<Connection>,
    programs: Programs,
    accelerator: Accelerator,
    capabilities: Capabilities,
    /// The capabilities of the host, found when the first lab was opened.
    host_capabilities: OnceCell<Arc<HostCapabilities>>,
}

/// Builder of a [`LibvirtBackend`].
#[derive(Debug, Clone)]
pub struct LibvirtBackendBuilder {
    store: Store,
    uri: Option<String>,
    programs: Programs,
    accelerator: Accelerator,
}

impl LibvirtBackendBuilder {
    /// Sets the URI of the libvirt to use (<https://libvirt.org/uri.html>): `qemu:///system`, `qemu:///session`,
    /// `qemu+unix:///session?socket=PATH`, or a URI with ssh or TLS that ends on this host.
    ///
    /// Defaults to `$LIBVIRT_DEFAULT_URI`; without it, to `qemu:///system` for root and `qemu:///session` for other
    /// users.
    #[must_use]
    pub fn uri(mut self, uri: impl Into<String>) -> Self {
        self.uri = Some(uri.into());
        self
    }

    /// Sets the accelerator that machines run on. Defaults to [`Accelerator::Auto`].
    #[must_use]
    pub fn accelerator(mut self, accelerator: Accelerator) -> Self {
        self.accelerator = accelerator;
        self
    }

    /// Sets the qemu-img binary, of the same version as libvirt's QEMU. Defaults to `qemu-img` in `PATH`.
    #[must_use]
    pub fn qemu_img(mut self, path: impl Into<PathBuf>) -> Self {
        self.programs.qemu_img = Some(path.into());
        self
    }

    /// Sets the program that runs the network of a kept lab in a session, so that its guests stay reachable after this process
    /// has ended. Defaults to this program if it calls [`rudder_local::helper::run`], otherwise to `rudder-helper` beside it or in
    /// `PATH`.
    #[must_use]
    pub fn helper(mut self, helper: HelperProgram) -> Self {
        self.programs.helper = Some(helper);
        self
    }

    /// Builds the backend. Does not connect yet: [`Backend::diagnose`] does, and so does opening a lab.
    #[must_use]
    pub fn build(self) -> LibvirtBackend {
        let Self { store, uri, programs, accelerator } = self;
        LibvirtBackend {
            store,
            connection: Arc::new(Connection::new(uri.unwrap_or_else(default_uri))),
            programs: programs.rooted(),
            accelerator,
            capabilities: capabilities(),
            host_capabilities: OnceCell::new(),
        }
    }
}

fn default_uri() -> String {
    env::var("LIBVIRT_DEFAULT_URI").ok().filter(|uri| !uri.is_empty()).unwrap_or_else(|| {
        let scope = if rustix::process::geteuid().is_root() { "system" } else { "session" };
        format!("qemu:///{scope}")
    })
}

impl LibvirtBackend {
    /// The name of this backend.
    pub const NAME: &'static str = crate::NAME;

    /// Returns a builder of a backend on this store.
    #[must_use]
    pub fn builder(store: Store) -> LibvirtBackendBuilder {
        LibvirtBackendBuilder {
            store,
            uri: None,
            programs: Programs::default(),
            accelerator: Accelerator::default(),
        }
    }

    /// Returns the store that the backend works in.
    #[must_use]
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Returns the URI of the libvirt that the backend uses.
    #[must_use]
    pub fn uri(&self) -> &str {
        self.connection.uri()
    }

    async fn host_capabilities(&self) -> Result<Arc<HostCapabilities>> {
        rudder_core::runtime::check()?;
        let query = async {
            HostCapabilities::query(&self.connection, &self.programs, self.accelerator).await.map(Arc::new)
        };
        self.host_capabilities.get_or_try_init(|| query).await.cloned()
    }

    /// Ends and removes the domains and networks of labs whose owner is dead. This precedes the removal of their files,
    /// because whatever runs on the files must end first.
    async fn reap_labelled(&self) -> Result<ReapReport> {
        let own = Owner::new(&self.store);
        // Labels are listed before labs: a lab exists before its first domain, so no new domain is mistaken for that of
        // a dead lab.
        let owner = own.clone();
        let labelled = self.connection.query(move |connect| {
            let domains = labelled(connect)?.into_iter().map(|(_, label)| label);
            let networks = network::labelled(connect)?.into_iter().map(|(_, label)| label);
            Ok(domains.chain(networks).filter(|label| owner.owns(label)).collect::<Vec<_>>())
        });
        let labelled = labelled.await.map_err(cleanup_error)?;
        let store = self.store.clone();
        let labs = blocking(move || store.labs()).await?;
        let lives = |id: &LabId| labs.iter().any(|lab| lab.id == *id && lab.state != LabState::Abandoned);
        let mut dead: Vec<LabId> = Vec::new();
        for label in labelled {
            match label {
                Label::Lab { lab, .. } if !lives(&lab) && !dead.contains(&lab) => dead.push(lab),
                _ => {}
            }
        }
        let mut report = ReapReport::default();
        for lab in dead {
            let (own, id) = (own.clone(), lab.clone());
            match self.connection.command(move |connect| remove_all_of(connect, &own, &id)).await {
                Ok(removed) => {
                    report.removed.extend(removed.into_iter().map(|what| format!("{what} of lab {lab}")));
                }
                Err(failure) => {
                    report.failed.push(cleanup_error(failure).with_context("lab", lab.as_str()).report());
                }
            }
        }
        Ok(report)
    }
}

fn capabilities() -> Capabilities {
    use Capability as C;
    Capabilities::new(
        LibvirtBackend::NAME,
        [
            C::SourceUrl,
            C::SourceBlank,
            C::SourceBuildRef,
            C::DiskVirtio,
            C::DiskScsi,
            C::DiskSata,
            C::DiskUsb,
            C::DiskIde,
            C::NicModels,
            C::NicSlots,
            C::CloudInit,
            C::Isos,
            C::Floppy,
            C::HttpDirectory,
            C::Uefi,
            C::SecureBoot,
            C::Tpm,
            C::Display,
            C::Serial,
            C::Screenshot,
            C::HalfClose,
        ],
    )
}

#[async_trait]
impl Backend for LibvirtBackend {
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
        rudder_core::runtime::check()?;
        let mut report = HostReport::default();
        let host_capabilities =
            HostCapabilities::query(&self.connection, &self.programs, self.accelerator).await;
        let finding = match &host_capabilities {
            Ok(host_capabilities) => HostFinding::present(
                "libvirt",
                format!(
                    "{} at {}: {} on {}",
                    host_capabilities.versions.get("libvirt").map_or("", String::as_str),
                    self.connection.uri(),
                    host_capabilities.machine,
                    host_capabilities.kind
                ),
            ),
            Err(error) => {
                HostFinding::missing("libvirt", error.report()).help(error.help().map(str::to_owned))
            }
        };
        report.findings.push(finding);
        let programs = match &host_capabilities {
            Ok(host_capabilities) => {
                Programs { qemu: Some(PathBuf::from(&host_capabilities.emulator)), ..self.programs.clone() }
            }
            Err(_) => self.programs.clone(),
        };
        let host = host::diagnose(&programs, self.accelerator, self.store.root()).await;
        report.findings.extend(host.findings);
        Ok(report)
    }

    async fn open_lab(&self, spec: &LabSpec) -> Result<Arc<dyn Lab>> {
        let host_capabilities = self.host_capabilities().await?;
        host_capabilities.host.require(&spec.needs)?;
        // Reaping is cheap; whatever cannot be removed now is retried when the next lab is opened.
        match self.reap().await {
            Ok(report) => {
                for what in report.failed {
                    tracing::warn!(what, "cannot remove what a dead owner left");
                }
                for what in report.warnings {
                    tracing::warn!(what, "left unchanged in the store");
                }
            }
            Err(error) => tracing::warn!(%error, "cannot check for what dead owners left"),
        }
        Ok(Arc::new(LibvirtLab::open(&self.store, &self.connection, &host_capabilities, spec).await?))
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
        self.store.remove_module(name).await?;
        let (store, module) = (Owner::new(&self.store), name.to_owned());
        let removed = self
            .connection
            .command(move |connect| modules::remove(connect, &store, |its, _| its == module))
            .await;
        removed.map(drop).map_err(|failure| {
            failure
                .into_error(ErrorKind::Io, "remove the domains of a module that was removed")
                .with_context("module", name)
                .with_help("start a build or reap to remove its domains; its files have been removed")
        })
    }

    async fn labs(&self) -> Result<Vec<LabInfo>> {
        let store = self.store.clone();
        blocking(move || Ok(store.labs()?.iter().map(LabEntry::info).collect())).await
    }

    async fn attach(&self, id: &LabId) -> Result<Arc<dyn Lab>> {
        let host_capabilities = self.host_capabilities().await?;
        Ok(Arc::new(LibvirtLab::attach(&self.store, &self.connection, &host_capabilities, id).await?))
    }

    async fn lab_file(&self, id: &LabId, name: &str) -> Result<Option<Vec<u8>>> {
        let (store, id, name) = (self.store.clone(), id.clone(), name.to_owned());
        blocking(move || store.lab_file(&id, &name)).await
    }

    async fn remove_lab(&self, id: &LabId) -> Result<()> {
        let (store, wanted) = (self.store.clone(), id.clone());
        let state =
            blocking(move || Ok(store.labs()?.into_iter().find(|lab| lab.id == wanted).map(|lab| lab.state)));
        if !matches!(state.await?, Some(LabState::Abandoned | LabState::Kept { .. })) {
            // The store's error explains why it cannot be removed.
            return self.store.remove_lab(id).await;
        }
        let (own, lab) = (Owner::new(&self.store), id.clone());
        let removed = self.connection.command(move |connect| remove_all_of(connect, &own, &lab)).await;
        removed.map_err(cleanup_error)?;
        self.store.remove_lab(id).await
    }

    async fn reap(&self) -> Result<ReapReport> {
        let mut report = ReapReport::default();
        match self.reap_labelled().await {
            Ok(found) => report = found,
            // The files and processes of dead owners are removed nevertheless.
            Err(error) => report.failed.push(error.report()),
        }
        report.merge(self.store.reap().await?);
        if report.failed.is_empty() {
            let host_capabilities = self.host_capabilities().await?;
            match modules::reconcile(&self.connection, &host_capabilities, &self.store).await {
                Ok(removed) => report.removed.extend(removed),
                Err(error) => report.failed.push(error.report()),
            }
        }
        Ok(report)
    }

    async fn collect(&self) -> Result<ReapReport> {
        self.store.collect(CollectPolicy::default()).await
    }
}
