//! What a lab on libvirt and its machines share: storage, the connection, networks; and the objects of libvirt that carry a label
//! of ours.

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

/// What a lab and its machines share.
#[derive(Debug)]
pub(crate) struct LabContext {
    pub(crate) storage: Arc<LabStorage>,
    pub(crate) lan: Lan,
    pub(crate) connection: Arc<Connection>,
    pub(crate) host_capabilities: Arc<HostCapabilities>,
    /// The store that the lab is in, for labels.
    pub(crate) store: Owner,
    /// Its networks, where libvirt makes them.
    bridges: OnceLock<Vec<Bridge>>,
    /// Held for reading while libvirt makes something for the lab, whether or not its caller still waits; true: the lab is
    /// at its end, and nothing more is made.
    closed: Arc<RwLock<bool>>,
}

impl LabContext {
    /// On this storage; without networks yet.
    pub(crate) fn new(
        storage: LabStorage,
        lan: Lan,
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

    /// Says that the lab is at its end, once nothing is being made for it any more.
    pub(crate) async fn close(&self) {
        *self.closed.write().await = true;
    }

    /// [`close`](Self::close) for a thread without a runtime.
    pub(crate) fn close_blocking(&self) {
        *self.closed.blocking_write() = true;
    }

    /// Its networks, where libvirt makes them; `None`: its machines are on the lab's own switches.
    pub(crate) fn bridges(&self) -> Option<&[Bridge]> {
        self.bridges.get().map(Vec::as_slice)
    }

    /// The label of one of its machines, or, without a name, of its networks.
    pub(crate) fn label(&self, vm: &str) -> Label {
        let (store, lab) = (self.store.of_labs(), self.storage.id().clone());
        Label::Lab { store, lab, vm: vm.to_owned(), owner: std::process::id() }
    }

    /// Makes its networks.
    pub(crate) async fn make_bridges(self: Arc<Self>) -> Result<()> {
        let made = self.detached(|context| async move {
            let (label, id, network) =
                (context.label(""), context.storage.id().clone(), context.storage.network().clone());
            let order = move |connect: &Connect| network::create(connect, &id, &label, &network);
            let made = context.connection.order(order).await.map_err(|failure| {
                failure.into_error(ErrorKind::HostMissing, "make the networks of the lab").with_help(
                    "libvirt needs dnsmasq and iptables: apt-get install --no-install-recommends dnsmasq-base iptables; \
                     qemu:///session needs neither",
                )
            })?;
            // Nobody else sets it.
            let _ = context.bridges.set(made);
            Ok(())
        });
        made.await
    }

    /// Does something that goes on when the caller is dropped, and that the end of the lab waits for.
    pub(crate) async fn detached<T, W>(self: Arc<Self>, work: impl FnOnce(Arc<Self>) -> W) -> Result<T>
    where
        T: Send + 'static,
        W: Future<Output = Result<T>> + Send + 'static,
    {
        let closed = Arc::clone(&self.closed).read_owned().await;
        if *closed {
            let message = format!("lab {} was destroyed already", self.storage.id());
            return Err(Error::new(ErrorKind::Conflict, message));
        }
        let work = work(self);
        let done = tokio::spawn(async move {
            let outcome = work.await;
            drop(closed);
            outcome
        });
        done.await.unwrap_or_else(|error| {
            Err(Error::new(ErrorKind::Internal, "work of libvirt's was cut short").with_source(error))
        })
    }
}

/// The domains that carry a label of ours, with it.
pub(crate) fn labelled(connect: &Connect) -> Result<Vec<(Domain, Label)>, Refusal> {
    let kind = i32::try_from(sys::VIR_DOMAIN_METADATA_ELEMENT).unwrap_or_default();
    let mut found = Vec::new();
    for domain in connect.list_all_domains(0)? {
        match domain.get_metadata(kind, Some(label::NAMESPACE), 0) {
            Ok(text) => found.extend(Label::read(&text).map(|label| (domain, label))),
            // Not ours, or just gone.
            Err(refusal)
                if matches!(refusal.code(), ErrorNumber::NoDomainMetadata | ErrorNumber::NoDomain) => {}
            Err(refusal) => return Err(refusal),
        }
    }
    Ok(found)
}

/// Ends and removes the domains and networks of a lab, by their labels; what they are. May be repeated.
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

/// What a failure to reach or use libvirt is to somebody who only tidies up.
pub(crate) fn tidying(failure: Failure) -> Error {
    failure.into_error(ErrorKind::Io, "look for domains that carry a label")
}
