//! The backend: its builder, its capabilities, and how it opens labs and manages modules.

use crate::lab::QemuLab;
use async_trait::async_trait;
use rudder_core::{
    Result,
    backend::{Backend, HostReport, Lab, LabId, LabInfo, LabSpec, ReapReport},
    capability::{Capabilities, Capability},
    fetch::Fetch,
    module::{DamagedModule, Module},
};
use rudder_local::helper::HelperProgram;
use rudder_local::{
    accelerator::Accelerator,
    host::{self, Host, Programs},
    lab_storage::blocking,
    store::{CollectPolicy, LabEntry, Store},
};
use std::{path::PathBuf, sync::Arc};
use tokio::sync::OnceCell;

/// A backend that runs machines on plain QEMU: one process per machine, a network in user space, and a local [`Store`].
/// Needs no root.
///
/// ```no_run
/// # fn main() -> rudder_core::Result<()> {
/// use rudder_local::store::Store;
/// use rudder_qemu::{Accelerator, QemuBackend};
///
/// let store = Store::open(Store::default_root())?;
/// let backend = QemuBackend::builder(store).accelerator(Accelerator::Tcg).build();
/// # drop(backend);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct QemuBackend {
    store: Store,
    programs: Programs,
    accelerator: Accelerator,
    capabilities: Capabilities,
    /// The capabilities of the host, found when the first lab was opened.
    host: OnceCell<Arc<Host>>,
}

/// Builder of a [`QemuBackend`].
#[derive(Debug, Clone)]
pub struct QemuBackendBuilder {
    store: Store,
    programs: Programs,
    accelerator: Accelerator,
}

impl QemuBackendBuilder {
    /// Sets the accelerator that machines run on. Defaults to [`Accelerator::Auto`].
    #[must_use]
    pub fn accelerator(mut self, accelerator: Accelerator) -> Self {
        self.accelerator = accelerator;
        self
    }

    /// Sets the QEMU binary, version 7.2 or later. Defaults to `qemu-system-x86_64` in `PATH`.
    #[must_use]
    pub fn qemu(mut self, path: impl Into<PathBuf>) -> Self {
        self.programs.qemu = Some(path.into());
        self
    }

    /// Sets the qemu-img binary, of the same version as QEMU. Defaults to `qemu-img` in `PATH`.
    #[must_use]
    pub fn qemu_img(mut self, path: impl Into<PathBuf>) -> Self {
        self.programs.qemu_img = Some(path.into());
        self
    }

    /// Sets the setpriv binary (util-linux), with which processes end with their owner. Defaults to `setpriv` in
    /// `PATH`. Optional: without it, machines of a killed process run until the next start removes them.
    #[must_use]
    pub fn setpriv(mut self, path: impl Into<PathBuf>) -> Self {
        self.programs.setpriv = Some(path.into());
        self
    }

    /// Sets the swtpm binary, for machines with a TPM. Defaults to `swtpm` in `PATH`. `swtpm_setup` is searched for
    /// beside it, then in `PATH`.
    #[must_use]
    pub fn swtpm(mut self, path: impl Into<PathBuf>) -> Self {
        self.programs.swtpm = Some(path.into());
        self
    }

    /// Sets the program that runs the network of a kept lab, so that its guests stay reachable after this process has
    /// ended. Defaults to this program if it calls [`rudder_local::helper::run`], otherwise to `rudder-helper` beside
    /// it or in `PATH`.
    #[must_use]
    pub fn helper(mut self, helper: HelperProgram) -> Self {
        self.programs.helper = Some(helper);
        self
    }

    /// Sets the directories that contain the [descriptors] of the firmware for machines with UEFI, the most specific
    /// first. Defaults to QEMU's own: `$XDG_CONFIG_HOME/qemu/firmware`, `/etc/qemu/firmware`,
    /// `/usr/share/qemu/firmware`, and `share/qemu/firmware` where QEMU is installed.
    ///
    /// [descriptors]: https://gitlab.com/qemu-project/qemu/-/blob/master/docs/interop/firmware.json
    #[must_use]
    pub fn firmware_directories(mut self, directories: impl IntoIterator<Item = PathBuf>) -> Self {
        self.programs.firmware = Some(directories.into_iter().collect());
        self
    }

    /// Builds the backend. Inspects nothing on the host: [`Backend::diagnose`] does, and so does opening a lab.
    #[must_use]
    pub fn build(self) -> QemuBackend {
        let Self { store, programs, accelerator } = self;
        let programs = programs.rooted();
        QemuBackend { store, programs, accelerator, capabilities: capabilities(), host: OnceCell::new() }
    }
}

impl QemuBackend {
    /// The name of this backend.
    pub const NAME: &'static str = crate::NAME;

    /// Returns a builder of a backend on this store.
    #[must_use]
    pub fn builder(store: Store) -> QemuBackendBuilder {
        QemuBackendBuilder { store, programs: Programs::default(), accelerator: Accelerator::default() }
    }

    /// Returns the store that the backend works in.
    #[must_use]
    pub fn store(&self) -> &Store {
        &self.store
    }

    async fn host(&self) -> Result<Arc<Host>> {
        rudder_core::runtime::check()?;
        let examine = async { Host::examine(&self.programs, self.accelerator).await.map(Arc::new) };
        self.host.get_or_try_init(|| examine).await.cloned()
    }
}

fn capabilities() -> Capabilities {
    use Capability as C;
    Capabilities::new(
        QemuBackend::NAME,
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
impl Backend for QemuBackend {
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
        Ok(host::diagnose(&self.programs, self.accelerator, self.store.root()).await)
    }

    async fn open_lab(&self, spec: &LabSpec) -> Result<Arc<dyn Lab>> {
        let host = self.host().await?;
        host.require(&spec.needs)?;
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
        Ok(Arc::new(QemuLab::open(&self.store, host, spec).await?))
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
        let host = self.host().await?;
        Ok(Arc::new(QemuLab::attach(&self.store, host, id).await?))
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
