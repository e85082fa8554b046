//! A double of KubeVirt and CDI: it stands where virt-api, virt-controller, virt-handler and CDI's controllers stand in a cluster.
//!
//! Its "node" is any [backend](Backend) of Rudder: with `QemuBackend`, VirtualMachines are real machines and DataVolumes real disks;
//! with `MemoryBackend`, they are light enough for hundreds of labs. The double opens one lab on the node, and
//!
//! - creates the PersistentVolumeClaim of each DataVolume and fills it (`datavolumes`): `http`, `blank` and `pvc` sources; the
//!   content is a volume of the node's lab;
//! - runs VirtualMachines (`machines`) and VirtualMachineInstances (`instances`), each with a virt-launcher Pod that only has a
//!   status (`launchers`), so that quotas, events and pod conditions are those of a cluster;
//! - serves `subresources.kubevirt.io/v1` behind the API server's aggregation layer (`subresources`, `streams`): console, VNC,
//!   port forwarding, start, stop, restart, pause;
//! - fails on request ([`Fault`]).
//!
//! # What it does not do
//! - Run strategies other than `Manual`, `Halted` and `Always`: such a machine gets a Warning event `UnsupportedRunStrategy`, and
//!   nothing else happens. There is no admission webhook; the API server checks the CRDs' schemas.
//! - Migration, snapshots, exports, hotplug, instance types, probes, guest agents; `upload` and `registry` sources of DataVolumes are
//!   refused with a condition.
//! - Pause: a paused instance has the condition and refuses port forwarding, but its machine continues to run.
//! - `softreboot`: refused, as KubeVirt does for a guest without agent and ACPI.
//! - Storage that a PersistentVolumeClaim has without a DataVolume, and everything about the instances of an earlier double: a
//!   cluster has one double in its life.
//!
//! Texts and states follow KubeVirt's and CDI's documentation and API, as far as clients depend on them. That a client works with
//! the double says that it uses the API as written down here; only a real cluster proves that it works with KubeVirt.

mod answers;
mod claims;
mod conditions;
mod control;
mod datavolumes;
mod events;
mod faults;
mod importing;
mod instances;
mod launchers;
mod launching;
mod machines;
mod node;
mod objects;
mod requests;
mod runs;
mod seed;
mod shared;
mod status;
mod streams;
mod subresources;
mod texts;
mod tls;
mod translate;
mod volumes;

pub use faults::Fault;
pub use tls::ServingTls;

use k8s_openapi::api::{
    rbac::v1::{ClusterRole, ClusterRoleBinding},
    storage::v1::StorageClass,
};
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
};
use rudder_core::{
    Error, ErrorKind, Result,
    backend::{Backend, Stop},
};
use serde_json::json;
use shared::{Shared, failed};
use std::sync::Arc;

/// How a [`Double`] behaves, apart from faults.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Options {
    /// The name of the default StorageClass that the double creates; `None` for none, so that claims without a class stay pending.
    pub storage_class: Option<String>,
    /// The TCP ports that can be forwarded to instances whose interfaces list none.
    pub ports: Vec<u16>,
}

impl Default for Options {
    fn default() -> Self {
        Self { storage_class: Some("double".to_owned()), ports: vec![22] }
    }
}

impl Options {
    /// Sets [`storage_class`](Self::storage_class).
    #[must_use]
    pub fn with_storage_class(mut self, name: Option<&str>) -> Self {
        self.storage_class = name.map(str::to_owned);
        self
    }

    /// Sets [`ports`](Self::ports).
    #[must_use]
    pub fn with_ports(mut self, ports: impl IntoIterator<Item = u16>) -> Self {
        self.ports = ports.into_iter().collect();
        self
    }
}

/// A running double of KubeVirt and CDI. [`stop`](Self::stop) it at the end: a double that is dropped stops working, but leaves the
/// removal of its lab to the node's backend.
#[derive(Debug)]
pub struct Double {
    shared: Arc<Shared>,
    port: u16,
}

impl Double {
    /// Starts a double that works with these rights, whose machines run on this node. The CRDs must be installed. It serves the
    /// subresource API on a port of loopback, which the caller [registers](Self::port) with the aggregation layer.
    ///
    /// # Errors
    /// Errors of the node's backend and of the API server; `InvalidInput` for unusable certificates.
    pub async fn start(
        client: Client,
        tls: ServingTls,
        node: Arc<dyn Backend>,
        options: Options,
    ) -> Result<Self> {
        let acceptor = tls.acceptor()?;
        if let Some(name) = &options.storage_class {
            create_storage_class(&client, name).await?;
        }
        grant_to_everyone(&client).await?;
        let node = node::Node::open(node).await?;
        let (shared, queues) = Shared::new(client, node, options);
        let listener = tokio::net::TcpListener::bind((std::net::Ipv4Addr::LOCALHOST, 0))
            .await
            .map_err(|error| Error::io("listen on loopback", error))?;
        let port = listener.local_addr().map_err(|error| Error::io("read the address of a socket", error))?;
        shared.spawn(subresources::serve(shared.clone(), listener, acceptor));
        control::start(&shared, queues);
        Ok(Self { shared, port: port.port() })
    }

    /// Returns the port of 127.0.0.1 at which the group `subresources.kubevirt.io`, version `v1`, is served over TLS.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Orders a fault in every namespace.
    pub fn order(&self, fault: Fault) {
        faults::order(&self.shared, None, fault);
    }

    /// Orders a fault in one namespace.
    pub fn order_in(&self, namespace: impl Into<String>, fault: Fault) {
        faults::order(&self.shared, Some(namespace.into()), fault);
    }

    /// Ends all faults that last until then, and forgets those that have not happened yet.
    pub fn relieve(&self) {
        self.shared.faults.relieve(|_| true);
        self.shared.retry_all();
    }

    /// Does the same with the faults that were ordered [in one namespace](Self::order_in).
    pub fn relieve_in(&self, namespace: &str) {
        self.shared.faults.relieve(|scope| scope == Some(namespace));
        self.shared.retry_all();
    }

    /// Kills what runs an instance, as the death of its QEMU process would.
    ///
    /// # Errors
    /// `NotFound` when the instance does not run.
    pub async fn kill(&self, namespace: &str, instance: &str) -> Result<()> {
        let run = self.running(namespace, instance).ok_or_else(|| {
            let message = format!("expected instance {namespace}/{instance} to run, but it does not");
            Error::new(ErrorKind::NotFound, message)
        })?;
        run.machine.stop(Stop::Kill).await.map(drop)
    }

    /// Returns whether the machine of an instance runs on the node.
    #[must_use]
    pub fn is_running(&self, namespace: &str, instance: &str) -> bool {
        self.running(namespace, instance).is_some()
    }

    fn running(&self, namespace: &str, instance: &str) -> Option<Arc<runs::Run>> {
        let is_it = |run: &Arc<runs::Run>| {
            run.key.namespace == namespace && run.key.name == instance && run.exit.get().is_none()
        };
        self.shared.runs.all().into_iter().find(is_it)
    }

    /// Returns the number of open web sockets.
    #[must_use]
    pub fn open_streams(&self) -> usize {
        self.shared.sessions.open()
    }

    /// Stops all controllers and streams, and removes the lab on the node with everything in it.
    ///
    /// # Errors
    /// Errors of the node's backend.
    pub async fn stop(self) -> Result<()> {
        self.shared.stop().await;
        self.shared.node.close().await
    }
}

impl Drop for Double {
    fn drop(&mut self) {
        self.shared.cancel();
    }
}

/// Creates the default StorageClass. Its provisioner does not exist: the double binds the claims.
async fn create_storage_class(client: &Client, name: &str) -> Result<()> {
    let class = json!({
        "apiVersion": "storage.k8s.io/v1",
        "kind": "StorageClass",
        "metadata": {
            "name": name,
            "annotations": {"storageclass.kubernetes.io/is-default-class": "true"},
        },
        "provisioner": "double.rudder.invalid",
        "reclaimPolicy": "Delete",
        "volumeBindingMode": "Immediate",
    });
    let api: Api<StorageClass> = Api::all(client.clone());
    let parameters = PatchParams::apply("rudder-kubevirt-double").force();
    api.patch(name, &parameters, &Patch::Apply(&class))
        .await
        .map(drop)
        .map_err(failed("create the default storage class"))
}

/// Grants every user what KubeVirt's operator grants: to ask for its version.
async fn grant_to_everyone(client: &Client) -> Result<()> {
    const NAME: &str = "kubevirt.io:default";
    let role = json!({
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRole",
        "metadata": {"name": NAME},
        "rules": [{"apiGroups": [objects::SUBRESOURCES], "resources": ["version"], "verbs": ["get", "list"]}],
    });
    let binding = json!({
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": NAME},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": NAME},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "Group", "name": "system:authenticated"}],
    });
    let apply = PatchParams::apply("kubevirt-double").force();
    let roles: Api<ClusterRole> = Api::all(client.clone());
    roles.patch(NAME, &apply, &Patch::Apply(role)).await.map_err(failed("create a role"))?;
    let bindings: Api<ClusterRoleBinding> = Api::all(client.clone());
    bindings.patch(NAME, &apply, &Patch::Apply(binding)).await.map_err(failed("bind a role"))?;
    Ok(())
}
