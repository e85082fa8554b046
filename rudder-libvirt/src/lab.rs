//! The place of one build or clone: a directory in the store, its volumes, and domains that carry its label.

use crate::{
    connection::{Connection, Failure, Refusal, remove_domain},
    label::{self, Label, Owner},
    machine::LibvirtMachine,
    modules,
    network::{self, Bridge},
    offer::Offer,
};
use async_trait::async_trait;
use rudder_core::{
    Error, ErrorKind, Result,
    backend::{
        FetchRequest, Fetched, ImportRequest, Imported, KeptLab, Lab, LabId, LabSpec, Machine, MachineSpec,
        ModuleDraft, Progress, Retention, Served, Site,
    },
    media::http::{Admission, Caller, Server},
    module::Module,
    store::Store,
};
use rudder_qemu::parts::{Ground, blocking};
use std::{
    collections::BTreeMap,
    net::IpAddr,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};
use tokio::sync::RwLock;
use virt::{connect::Connect, domain::Domain, error::ErrorNumber, sys};

/// What a lab and its machines stand on.
#[derive(Debug)]
pub(crate) struct Footing {
    pub(crate) ground: Arc<Ground>,
    pub(crate) connection: Arc<Connection>,
    pub(crate) offer: Arc<Offer>,
    /// The store that the lab is in, for labels.
    pub(crate) store: Owner,
    /// Its networks, where libvirt makes them.
    bridges: OnceLock<Vec<Bridge>>,
    /// Held for reading while libvirt makes something for the lab, whether or not its caller still waits; true: the lab is
    /// at its end, and nothing more is made.
    closed: Arc<RwLock<bool>>,
}

impl Footing {
    /// Its networks, where libvirt makes them; `None`: its machines are on the lab's own switches.
    pub(crate) fn bridges(&self) -> Option<&[Bridge]> {
        self.bridges.get().map(Vec::as_slice)
    }

    /// The label of one of its machines, or, without a name, of its networks.
    pub(crate) fn label(&self, vm: &str) -> Label {
        let (store, lab) = (self.store.of_labs(), self.ground.id().clone());
        Label::Lab { store, lab, vm: vm.to_owned(), owner: std::process::id() }
    }

    /// Makes its networks.
    async fn make_bridges(self: Arc<Self>) -> Result<()> {
        let made = self.detached(|footing| async move {
            let (label, id, network) =
                (footing.label(""), footing.ground.id().clone(), footing.ground.network().clone());
            let order = move |connect: &Connect| network::create(connect, &id, &label, &network);
            let made = footing.connection.order(order).await.map_err(|failure| {
                failure.into_error(ErrorKind::HostMissing, "make the networks of the lab").with_help(
                    "libvirt needs dnsmasq and iptables: apt-get install --no-install-recommends dnsmasq-base iptables; \
                     qemu:///session needs neither",
                )
            })?;
            // Nobody else sets it.
            let _ = footing.bridges.set(made);
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
            let message = format!("lab {} was destroyed already", self.ground.id());
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

/// The machines of a lab, in the order in which they were defined.
type Machines = Arc<Mutex<Vec<Arc<LibvirtMachine>>>>;

/// A lab on libvirt.
#[derive(Debug)]
pub(crate) struct LibvirtLab {
    footing: Arc<Footing>,
    store: Store,
    machines: Machines,
    /// How many machines were begun. Several may be asked for at once: they are defined one by one, each with files of its own.
    begun: tokio::sync::Mutex<usize>,
    /// Kept or destroyed: nothing is left to do when it is dropped.
    settled: AtomicBool,
}

impl LibvirtLab {
    pub(crate) async fn open(
        store: &Store,
        connection: &Arc<Connection>,
        offer: &Arc<Offer>,
        spec: &LabSpec,
    ) -> Result<Self> {
        let ground = Ground::open(store, Arc::clone(&offer.host), spec).await?;
        let footing = Footing {
            ground: Arc::new(ground),
            connection: Arc::clone(connection),
            offer: Arc::clone(offer),
            store: Owner::new(store),
            bridges: OnceLock::new(),
            closed: Arc::default(),
        };
        let lab = Self {
            footing: Arc::new(footing),
            store: store.clone(),
            machines: Machines::default(),
            begun: tokio::sync::Mutex::default(),
            settled: AtomicBool::new(false),
        };
        if offer.bridges {
            Arc::clone(&lab.footing).make_bridges().await?;
        }
        Ok(lab)
    }

    fn machines(&self) -> MutexGuard<'_, Vec<Arc<LibvirtMachine>>> {
        locked(&self.machines)
    }

    /// Serves files on the host's addresses of these networks, to their guests.
    async fn serve_on(&self, bridges: &[Bridge], site: &Site) -> Result<Served> {
        let (mut addresses, mut servers, mut port) = (BTreeMap::new(), Vec::new(), 0);
        for bridge in bridges {
            let (host, range, subnet) = (bridge.addresses.gateway(), bridge.addresses, bridge.subnet.clone());
            let machines = Arc::downgrade(&self.machines);
            let admit = move |caller: Caller| {
                let guest = match caller.peer.ip() {
                    IpAddr::V4(peer) if range.contains(peer) && peer != host => peer,
                    _ => return Admission::Refused,
                };
                let machines = machines.upgrade().map(|machines| locked(&machines).clone());
                let machine =
                    machines.into_iter().flatten().find(|machine| machine.has_address(&subnet, guest));
                // Nobody but a guest has an address there; one may have taken another than it was given.
                machine.map_or(Admission::Welcome, |machine| Admission::Machine(machine.name().to_owned()))
            };
            let server = Server::on((host, port).into(), site.clone(), admit).await?;
            port = server.port();
            addresses.insert(bridge.subnet.clone(), host);
            servers.push(server);
        }
        Ok(Served::new(addresses, port, servers))
    }

    async fn remove_all(&self) -> Result<()> {
        let (store, id) = (self.footing.store.clone(), self.footing.ground.id().clone());
        let removed = self.footing.connection.order(move |connect| remove_all_of(connect, &store, &id)).await;
        removed.map(drop).map_err(|failure| {
            failure
                .into_error(ErrorKind::Io, "remove the domains and networks of the lab")
                .with_context("lab", self.footing.ground.id().as_str())
                .with_help(
                    "processes were ended; what libvirt still knows is removed by the next start or by reap",
                )
        })
    }
}

fn locked(machines: &Machines) -> MutexGuard<'_, Vec<Arc<LibvirtMachine>>> {
    machines.lock().unwrap_or_else(PoisonError::into_inner)
}

#[async_trait]
impl Lab for LibvirtLab {
    fn id(&self) -> &LabId {
        self.footing.ground.id()
    }

    fn versions(&self) -> BTreeMap<String, String> {
        let mut versions = self.footing.ground.versions();
        versions.extend(self.footing.offer.versions.clone());
        versions
    }

    async fn import(&self, request: &ImportRequest, progress: &Progress) -> Result<Imported> {
        self.footing.ground.import(request, progress).await
    }

    async fn fetch(&self, request: &FetchRequest, progress: &Progress) -> Result<Fetched> {
        self.footing.ground.fetch(request, progress).await
    }

    async fn serve(&self, site: Site) -> Result<Served> {
        if let Some(bridges) = self.footing.bridges() {
            return self.serve_on(bridges, &site).await;
        }
        self.footing.ground.lan().serve(site)
    }

    async fn create_machine(&self, spec: &MachineSpec) -> Result<Arc<dyn Machine>> {
        let refuse = |error: Error| error.with_context("vm", &spec.name);
        self.footing.ground.dir().check_open().map_err(refuse)?;
        for disk in &spec.disks {
            self.footing.ground.volume_size(&disk.volume.id).map_err(refuse)?;
        }
        let mut begun = self.begun.lock().await;
        if self.machines().iter().any(|machine| machine.name() == spec.name) {
            let lab = self.footing.ground.id();
            let message = format!("expected a new name in lab {lab}, but found {:?} again", spec.name);
            return Err(refuse(Error::new(ErrorKind::Conflict, message)));
        }
        let number = *begun;
        *begun += 1;
        let machine = Arc::new(LibvirtMachine::define(&self.footing, spec, number).await.map_err(refuse)?);
        self.machines().push(Arc::clone(&machine));
        Ok(machine)
    }

    async fn publish(&self, draft: ModuleDraft) -> Result<Module> {
        let module = self.store.publish(self.footing.ground.dir(), draft).await?;
        // The module is there, whole. Its domains follow it: what is missing is made up for by the next start or reap.
        if let Err(error) = modules::show(&self.footing, &module).await {
            tracing::warn!(
                module = module.name,
                error = error.report(),
                "cannot define the domains of a module"
            );
        }
        Ok(module)
    }

    async fn keep(&self) -> Result<KeptLab> {
        let machines = self.machines().clone();
        let mut access: Vec<String> = machines.iter().flat_map(|machine| machine.kept_access()).collect();
        if self.footing.bridges().is_none() && self.footing.ground.retention() == Retention::MayBeKept {
            access.extend(self.footing.ground.lan().hand_over(&self.footing.ground).await?);
        }
        self.footing.ground.keep(&access).await?;
        for machine in &machines {
            machine.release();
        }
        self.settled.store(true, Ordering::Relaxed);
        Ok(KeptLab::new(self.footing.ground.id().clone(), access))
    }

    fn directory(&self) -> Option<std::path::PathBuf> {
        Some(self.footing.ground.dir().path().to_owned())
    }

    async fn destroy(&self) -> Result<()> {
        *self.footing.closed.write().await = true;
        let machines = self.machines().clone();
        futures::future::join_all(machines.iter().map(|machine| machine.end())).await;
        let removed = self.remove_all().await;
        let footing = Arc::clone(&self.footing);
        blocking(move || footing.ground.dir().destroy()).await?;
        removed?;
        self.settled.store(true, Ordering::Relaxed);
        Ok(())
    }
}

impl Drop for LibvirtLab {
    fn drop(&mut self) {
        if self.settled.load(Ordering::Relaxed) {
            return;
        }
        for machine in self.machines().iter() {
            machine.abandon();
        }
        let footing = Arc::clone(&self.footing);
        let tidy = move || {
            *footing.closed.blocking_write() = true;
            let id = footing.ground.id();
            let removed =
                footing.connection.ask_blocking(|connect| remove_all_of(connect, &footing.store, id));
            if let Err(failure) = removed {
                let error = failure.into_error(ErrorKind::Io, "remove the domains and networks of the lab");
                tracing::warn!(lab = %id, error = error.report(), "cannot end a lab; the next reap will");
            }
        };
        if let Err(error) = std::thread::Builder::new().name("rudder-libvirt-drop".to_owned()).spawn(tidy) {
            tracing::warn!(%error, "cannot end a lab; the next reap will");
        }
    }
}

/// What a failure to reach or use libvirt is to somebody who only tidies up.
pub(crate) fn tidying(failure: Failure) -> Error {
    failure.into_error(ErrorKind::Io, "look for domains that carry a label")
}
