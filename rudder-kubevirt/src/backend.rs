//! The backend: its builder, its capabilities, how it opens labs and manages modules, and how it cleans up.

use crate::{
    cluster::{Access, Cluster},
    diagnose,
    fetcher::TemporaryFetcher,
    import,
    lab::{self, KubevirtLab, files_name},
    lab_context::LabOptions,
    lease::{self, remove_unrenewed},
    modules,
};
use async_trait::async_trait;
use k8s_openapi::api::core::v1::Secret;
use rudder_core::{
    Error, ErrorKind, Result,
    backend::{Backend, HostReport, Lab, LabId, LabInfo, LabSpec, LabState, ReapReport},
    capability::{Capabilities, Capability},
    fetch::Fetch,
    module::{DamagedModule, Module},
};
use std::{collections::BTreeMap, path::PathBuf, sync::Arc, time::Duration};
use tokio::sync::OnceCell;

/// A backend that runs machines on a Kubernetes cluster with KubeVirt, on volumes that CDI fills, in one namespace.
///
/// ```no_run
/// # fn main() {
/// use rudder_kubevirt::KubevirtBackend;
///
/// let backend = KubevirtBackend::builder().context("lab").namespace("images").build();
/// # drop(backend);
/// # }
/// ```
#[derive(Debug)]
pub struct KubevirtBackend {
    access: Access,
    options: LabOptions,
    fetcher: Arc<dyn Fetch>,
    capabilities: Capabilities,
    /// The connection, made when it is first needed.
    cluster: OnceCell<Cluster>,
}

/// Builder of a [`KubevirtBackend`].
#[derive(Debug, Clone)]
pub struct KubevirtBackendBuilder {
    access: Access,
    options: LabOptions,
    fetcher: Option<Arc<dyn Fetch>>,
}

impl KubevirtBackendBuilder {
    /// Sets the kubeconfig to read. Defaults to what kubectl would use: `$KUBECONFIG`, `~/.kube/config`, the service account of the
    /// pod.
    #[must_use]
    pub fn kubeconfig(mut self, path: impl Into<PathBuf>) -> Self {
        self.access.kubeconfig = Some(path.into());
        self
    }

    /// Sets the context of the kubeconfig. Defaults to its current context.
    #[must_use]
    pub fn context(mut self, context: impl Into<String>) -> Self {
        self.access.context = Some(context.into());
        self
    }

    /// Sets the namespace in which everything is created. It must exist. Defaults to that of the context.
    #[must_use]
    pub fn namespace(mut self, namespace: impl Into<String>) -> Self {
        self.access.namespace = Some(namespace.into());
        self
    }

    /// Sets the storage class of volumes. Defaults to the cluster's default class.
    #[must_use]
    pub fn storage_class(mut self, class: impl Into<String>) -> Self {
        self.options.storage_class = Some(class.into());
        self
    }

    /// Sets how long a lab stays after its owner has died or was cut off from the cluster; one minute by default. The owner renews
    /// its lease four times in this time.
    #[must_use]
    pub fn lease_duration(mut self, duration: Duration) -> Self {
        self.options.lease_duration = duration;
        self
    }

    /// Sets how long a machine may take from power-on until it runs: until a node has room for it, and has its image; five minutes
    /// by default.
    #[must_use]
    pub fn start_limit(mut self, limit: Duration) -> Self {
        self.options.start_limit = limit;
        self
    }

    /// Sets the fetcher of files that the engine reads. Defaults to one that downloads to a temporary directory.
    #[must_use]
    pub fn fetcher(mut self, fetcher: Arc<dyn Fetch>) -> Self {
        self.fetcher = Some(fetcher);
        self
    }

    /// Builds the backend. Does not connect yet: [`Backend::diagnose`] does, and so does opening a lab.
    #[must_use]
    pub fn build(self) -> KubevirtBackend {
        let Self { access, options, fetcher } = self;
        KubevirtBackend {
            access,
            options,
            fetcher: fetcher.unwrap_or_else(|| Arc::new(TemporaryFetcher::default())),
            capabilities: capabilities(),
            cluster: OnceCell::new(),
        }
    }
}

impl KubevirtBackend {
    /// The name of this backend.
    pub const NAME: &'static str = "kubevirt";

    /// Returns a builder of a backend.
    #[must_use]
    pub fn builder() -> KubevirtBackendBuilder {
        let options = LabOptions {
            storage_class: None,
            lease_duration: Duration::from_secs(60),
            start_limit: Duration::from_secs(300),
        };
        KubevirtBackendBuilder { access: Access::default(), options, fetcher: None }
    }

    /// Returns the name of the VirtualMachine, and of its VirtualMachineInstance, of a machine in a lab: for kubectl and virtctl.
    #[must_use]
    pub fn virtual_machine_name(lab: &LabId, machine: &str) -> String {
        crate::specification::machine_name(lab, machine)
    }

    async fn cluster(&self) -> Result<&Cluster> {
        rudder_core::runtime::check()?;
        self.cluster.get_or_try_init(|| Cluster::connect(&self.access)).await
    }

    /// Removes abandoned labs.
    async fn reap_labs(cluster: &Cluster) -> Result<(ReapReport, Vec<LabInfo>)> {
        let mut report = ReapReport::default();
        let mut left = Vec::new();
        for found in lease::labs(cluster).await? {
            let id = &found.info.id;
            match found.info.state {
                LabState::Abandoned => {}
                LabState::Damaged => {
                    report.warnings.push(format!(
                        "the lease of lab {id} cannot be read: delete it if nobody needs the lab"
                    ));
                    left.push(found.info);
                    continue;
                }
                _ => {
                    left.push(found.info);
                    continue;
                }
            }
            // The lease goes first, and only if it is as it was read: an owner that has renewed it meanwhile keeps its lab.
            let removed = match remove_unrenewed(cluster, &found.lease).await {
                Ok(true) => lab::remove(cluster, id).await.map(|()| true),
                other => other,
            };
            match removed {
                Ok(true) => report.removed.push(format!("lab {id}")),
                Ok(false) => left.push(found.info),
                Err(error) => report.failed.push(error.with_context("lab", id).report()),
            }
        }
        Ok((report, left))
    }
}

fn capabilities() -> Capabilities {
    use Capability as C;
    Capabilities::new(
        KubevirtBackend::NAME,
        [
            C::SourceUrl,
            C::SourceBlank,
            C::SourceBuildRef,
            C::DiskVirtio,
            C::DiskScsi,
            C::DiskSata,
            C::DiskUsb,
            C::CloudInit,
            C::Isos,
            C::Display,
            C::Serial,
            C::Screenshot,
        ],
    )
}

#[async_trait]
impl Backend for KubevirtBackend {
    fn name(&self) -> &str {
        Self::NAME
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    async fn diagnose(&self) -> Result<HostReport> {
        rudder_core::runtime::check()?;
        Ok(diagnose::diagnose(self.cluster().await).await)
    }

    fn fetcher(&self) -> Arc<dyn Fetch> {
        Arc::clone(&self.fetcher)
    }

    async fn open_lab(&self, spec: &LabSpec) -> Result<Arc<dyn Lab>> {
        let cluster = self.cluster().await?;
        let versions = diagnose::versions(cluster).await?;
        Ok(Arc::new(KubevirtLab::open(cluster, spec, &self.options, versions).await?))
    }

    async fn labs(&self) -> Result<Vec<LabInfo>> {
        let labs = lease::labs(self.cluster().await?).await?;
        Ok(labs.into_iter().map(|lab| lab.info).collect())
    }

    async fn attach(&self, id: &LabId) -> Result<Arc<dyn Lab>> {
        let cluster = self.cluster().await?;
        let found = lease::lab(cluster, id).await?;
        if !found.info.is_kept() {
            let message =
                format!("expected lab {id} to be kept, but it belongs to the process that opened it");
            return Err(Error::new(ErrorKind::Conflict, message));
        }
        let lab = KubevirtLab::attach(cluster, found, &self.options, BTreeMap::new()).await?;
        Ok(Arc::new(lab))
    }

    async fn lab_file(&self, id: &LabId, name: &str) -> Result<Option<Vec<u8>>> {
        let cluster = self.cluster().await?;
        lease::lab(cluster, id).await?;
        let secret = cluster.find::<Secret>(&files_name(id), "the files of a lab").await?;
        Ok(secret.and_then(|secret| secret.data?.remove(name)).map(|bytes| bytes.0))
    }

    async fn modules(&self) -> Result<Vec<Module>> {
        Ok(modules::modules(self.cluster().await?).await?.0)
    }

    async fn damaged_modules(&self) -> Result<Vec<DamagedModule>> {
        Ok(modules::modules(self.cluster().await?).await?.1)
    }

    async fn remove_module(&self, name: &str) -> Result<()> {
        modules::remove(self.cluster().await?, name).await
    }

    async fn remove_lab(&self, id: &LabId) -> Result<()> {
        let cluster = self.cluster().await?;
        let found = lease::lab(cluster, id).await?;
        if found.info.state == LabState::Owned {
            let message = format!("expected lab {id} not to be in use, but its owner lives");
            return Err(Error::new(ErrorKind::Conflict, message));
        }
        lab::remove_with_lease(cluster, id).await
    }

    async fn reap(&self) -> Result<ReapReport> {
        let cluster = self.cluster().await?;
        let (mut report, left) = Self::reap_labs(cluster).await?;
        let is_alive =
            |lab: &str| left.iter().any(|info| info.id.as_str() == lab && info.state != LabState::Abandoned);
        report.merge(modules::reap(cluster, is_alive).await?);
        Ok(report)
    }

    async fn collect(&self) -> Result<ReapReport> {
        import::collect(self.cluster().await?).await
    }
}
