//! What a lab on libvirt shares with its machines: storage, the connection, networks. Also finds and removes the
//! libvirt objects that carry Rudder's labels.

use crate::{
    connection::{Connection, Failure, Refusal, remove_domain},
    host_capabilities::HostCapabilities,
    label::{self, Label, Owner},
    network::{self, Bridge},
};
use rudder_core::{Error, ErrorKind, Result, backend::LabId};
use rudder_local::{lab_storage::LabStorage, lan::Lan, store::Store};
use std::sync::{Arc, OnceLock};
use tokio::sync::RwLock;
use virt::{connect::Connect, domain::Domain, error::ErrorNumber, sys};

/// The state shared by a lab and its machines.
#[derive(Debug)]
pub(crate) struct LabContext {
    pub(crate) storage: Arc<LabStorage>,
    pub(crate) lan: Arc<Lan>,
    pub(crate) connection: Arc<Connection>,
    pub(crate) host_capabilities: Arc<HostCapabilities>,
    /// The store that contains the lab, for labels.
    pub(crate) store: Owner,
    /// The lab's networks, if libvirt creates them.
    bridges: OnceLock<Vec<Bridge>>,
    /// Held for reading while libvirt creates something for the lab, whether or not the caller still waits. True once
    /// the lab is closing, after which nothing more is created.
    closed: Arc<RwLock<bool>>,
}

impl LabContext {
    /// Returns a context on this storage, without networks.
    pub(crate) fn new(
        storage: LabStorage,
        lan: Arc<Lan>,
        connection: &Arc<Connection>,
        host_capabilities: &Arc<HostCapabilities>,
        store: &Store,
    ) -> Self {
        Self {
            storage: Arc::new(storage),
            lan,
            connection: Arc::clone(connection),
            host_capabilities: Arc::clone(host_capabilities),
            store: Owner::new(store),
            bridges: OnceLock::new(),
            closed: Arc::default(),
        }
    }

    /// Records that libvirt created networks for the lab, which was attached to. What they are is not known any more.
    pub(crate) fn adopt_bridges(&self) {
        // Not set before.
        let _ = self.bridges.set(Vec::new());
    }

    /// Closes the lab to new work, once no work is in progress any more.
    pub(crate) async fn close(&self) {
        *self.closed.write().await = true;
    }

    /// A blocking [`close`](Self::close), for a thread without a runtime.
    pub(crate) fn close_blocking(&self) {
        *self.closed.blocking_write() = true;
    }

    /// Returns the lab's networks if libvirt creates them; `None` if its machines are on the lab's own switches.
    pub(crate) fn bridges(&self) -> Option<&[Bridge]> {
        self.bridges.get().map(Vec::as_slice)
    }

    /// Returns the label of one of the lab's machines or, with an empty name, of its networks.
    pub(crate) fn label(&self, vm: &str) -> Label {
        let (store, lab) = (self.store.of_labs(), self.storage.id().clone());
        Label::Lab { store, lab, vm: vm.to_owned(), owner: std::process::id() }
    }

    /// Creates the lab's networks.
    pub(crate) async fn create_bridges(self: Arc<Self>) -> Result<()> {
        let created = self.detached(|context| async move {
            let (label, id, network) =
                (context.label(""), context.storage.id().clone(), context.storage.network()?.clone());
            let create = move |connect: &Connect| network::create(connect, &id, &label, &network);
            let bridges = context.connection.command(create).await.map_err(|failure| {
                failure.into_error(ErrorKind::HostMissing, "create the networks of the lab").with_help(
                    "libvirt needs dnsmasq and iptables: apt-get install --no-install-recommends dnsmasq-base iptables; \
                     qemu:///session needs neither",
                )
            })?;
            // Set only here.
            let _ = context.bridges.set(bridges);
            Ok(())
        });
        created.await
    }

    /// Runs work that continues if the caller is dropped, and that closing the lab waits for.
    pub(crate) async fn detached<T, W>(self: Arc<Self>, work: impl FnOnce(Arc<Self>) -> W) -> Result<T>
    where
        T: Send + 'static,
        W: Future<Output = Result<T>> + Send + 'static,
    {
        let closed = Arc::clone(&self.closed).read_owned().await;
        if *closed {
            let message = format!("lab {} has already been destroyed", self.storage.id());
            return Err(Error::new(ErrorKind::Conflict, message));
        }
        let work = work(self);
        let done = tokio::spawn(async move {
            let outcome = work.await;
            drop(closed);
            outcome
        });
        done.await.unwrap_or_else(|error| {
            if error.is_cancelled() {
                return Err(
                    Error::new(ErrorKind::Cancelled, "the async runtime is shutting down").with_source(error)
                );
            }
            Err(Error::new(ErrorKind::Internal, "an operation of libvirt was interrupted").with_source(error))
        })
    }
}

/// Returns the domains that carry a label of Rudder, each with its label.
pub(crate) fn labelled(connect: &Connect) -> Result<Vec<(Domain, Label)>, Refusal> {
    let kind = i32::try_from(sys::VIR_DOMAIN_METADATA_ELEMENT).unwrap_or_default();
    let mut found = Vec::new();
    for domain in connect.list_all_domains(0)? {
        match domain.get_metadata(kind, Some(label::NAMESPACE), 0) {
            Ok(text) => found.extend(Label::read(&text).map(|label| (domain, label))),
            // Has no label of Rudder, or was just removed.
            Err(refusal)
                if matches!(refusal.code(), ErrorNumber::NoDomainMetadata | ErrorNumber::NoDomain) => {}
            Err(refusal) => return Err(refusal),
        }
    }
    Ok(found)
}

/// Ends and removes the domains and networks of a lab, which their labels identify; returns descriptions of what was
/// removed. May be repeated.
pub(crate) fn remove_all_of(connect: &Connect, store: &Owner, id: &LabId) -> Result<Vec<String>, Refusal> {
    let mut removed = Vec::new();
    for (domain, label) in labelled(connect)? {
        if store.owns_lab(&label, id) {
            let name = domain.get_name().unwrap_or_default();
            remove_domain(&domain)?;
            removed.push(format!("domain {name}"));
        }
    }
    for (network, label) in network::labelled(connect)? {
        if store.owns_lab(&label, id) {
            let name = network.get_name().unwrap_or_default();
            network::remove(&network)?;
            removed.push(format!("network {name}"));
        }
    }
    Ok(removed)
}

/// Converts a failure to reach or use libvirt during a clean-up.
pub(crate) fn cleanup_error(failure: Failure) -> Error {
    failure.into_error(ErrorKind::Io, "list the labelled domains")
}
