//! The lab of one build or clone: a directory in the store, its volumes, and the domains that carry its label.

use crate::{
    connection::Connection,
    host_capabilities::HostCapabilities,
    lab_context::{LabContext, remove_all_of},
    machine::{self, LibvirtMachine},
    modules,
    network::Bridge,
};
use async_trait::async_trait;
use rudder_core::{
    Error, ErrorKind, Result,
    backend::{
        ImportRequest, Imported, Lab, LabId, LabSpec, Machine, MachineSpec, ModuleDraft, Progress, Served,
        Site,
    },
    media::http::{Admission, Caller, Server},
    module::Module,
};
use rudder_local::{
    lab_storage::{LabStorage, blocking},
    lan::Lan,
    machine::MachineRecord,
    store::Store,
};
use std::{
    collections::BTreeMap,
    net::IpAddr,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::SystemTime,
};

/// The machines of a lab, in the order of their definition.
type Machines = Arc<Mutex<Vec<Arc<LibvirtMachine>>>>;

/// A lab on libvirt.
#[derive(Debug)]
pub(crate) struct LibvirtLab {
    context: Arc<LabContext>,
    store: Store,
    machines: Machines,
    /// The number of the next machine, which names its files. Locked while a machine is defined, so that concurrent
    /// requests are served one by one.
    next_number: tokio::sync::Mutex<usize>,
    /// Whether the lab was kept or destroyed, so that nothing is left to do when it is dropped.
    settled: AtomicBool,
}

impl LibvirtLab {
    pub(crate) async fn open(
        store: &Store,
        connection: &Arc<Connection>,
        host_capabilities: &Arc<HostCapabilities>,
        spec: &LabSpec,
    ) -> Result<Self> {
        let storage = LabStorage::open(store, Arc::clone(&host_capabilities.host), spec).await?;
        let lan = Arc::new(Lan::new(spec));
        if !host_capabilities.bridges {
            lan.check(&storage)?;
        }
        let context = LabContext::new(storage, lan, connection, host_capabilities, store);
        let lab = Self {
            context: Arc::new(context),
            store: store.clone(),
            machines: Machines::default(),
            next_number: tokio::sync::Mutex::default(),
            settled: AtomicBool::new(false),
        };
        if host_capabilities.bridges {
            Arc::clone(&lab.context).create_bridges().await?;
        }
        lab.context.storage.complete().await?;
        lab.settled.store(lab.context.storage.dir().is_kept(), Ordering::Relaxed);
        Ok(lab)
    }

    /// Attaches to a kept lab.
    pub(crate) async fn attach(
        store: &Store,
        connection: &Arc<Connection>,
        host_capabilities: &Arc<HostCapabilities>,
        id: &LabId,
    ) -> Result<Self> {
        let storage = LabStorage::attach(store, Arc::clone(&host_capabilities.host), id).await?;
        let records = MachineRecord::read_all(storage.dir(), crate::NAME)?;
        let lan = Arc::new(Lan::attached());
        let context = Arc::new(LabContext::new(storage, lan, connection, host_capabilities, store));
        if host_capabilities.bridges {
            context.adopt_bridges();
        }
        let mut machines = Vec::new();
        for (number, record) in &records {
            machines.push(Arc::new(machine::attach(&context, record, *number).await?));
        }
        Ok(Self {
            context,
            store: store.clone(),
            next_number: tokio::sync::Mutex::new(machines.len()),
            machines: Arc::new(Mutex::new(machines)),
            settled: AtomicBool::new(true),
        })
    }

    fn machines(&self) -> MutexGuard<'_, Vec<Arc<LibvirtMachine>>> {
        locked(&self.machines)
    }

    /// Serves files to the guests of these networks, on the host's address in each.
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
                let machine = machines
                    .into_iter()
                    .flatten()
                    .find(|machine| machine::has_address(machine, &subnet, guest));
                // Only guests have an address there; a guest may have taken a different one than it was given.
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
        let (store, id) = (self.context.store.clone(), self.context.storage.id().clone());
        let removed =
            self.context.connection.command(move |connect| remove_all_of(connect, &store, &id)).await;
        removed.map(drop).map_err(|failure| {
            failure
                .into_error(ErrorKind::Io, "remove the domains and networks of the lab")
                .with_context("lab", self.context.storage.id().as_str())
                .with_help(
                    "start a build or reap to remove what libvirt still lists; its processes have ended",
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
        self.context.storage.id()
    }

    fn versions(&self) -> BTreeMap<String, String> {
        let mut versions = self.context.storage.versions();
        versions.extend(self.context.host_capabilities.versions.clone());
        versions
    }

    async fn import(&self, request: &ImportRequest, progress: &Progress) -> Result<Imported> {
        self.context.storage.import(request, progress).await
    }

    async fn serve(&self, site: Site) -> Result<Served> {
        if let Some(bridges) = self.context.bridges() {
            return self.serve_on(bridges, &site).await;
        }
        self.context.lan.serve(site)
    }

    async fn create_machine(&self, spec: &MachineSpec) -> Result<Arc<dyn Machine>> {
        let refuse = |error: Error| error.with_context("vm", &spec.name);
        self.context.storage.dir().check_open().map_err(refuse)?;
        self.context.storage.check_volumes(spec).map_err(refuse)?;
        let mut next_number = self.next_number.lock().await;
        if self.machines().iter().any(|machine| machine.name() == spec.name) {
            let lab = self.context.storage.id();
            let message = format!("expected a new name in lab {lab}, but found {:?} again", spec.name);
            return Err(refuse(Error::new(ErrorKind::Conflict, message)));
        }
        let number = *next_number;
        *next_number += 1;
        let machine = Arc::new(machine::define(&self.context, spec, number).await.map_err(refuse)?);
        self.machines().push(Arc::clone(&machine));
        Ok(machine)
    }

    async fn publish(&self, draft: ModuleDraft) -> Result<Module> {
        let module = self.store.publish(self.context.storage.dir(), draft).await?;
        // The module is published and complete. Missing domains are defined by the next start or reap.
        if let Err(error) = modules::define_published(&self.context, &module).await {
            tracing::warn!(
                module = module.name,
                error = error.report(),
                "cannot define the domains of a module"
            );
        }
        Ok(module)
    }

    async fn machines(&self) -> Result<Vec<Arc<dyn Machine>>> {
        Ok(self.machines().iter().map(|machine| Arc::clone(machine) as Arc<dyn Machine>).collect())
    }

    async fn keep(&self, expires: Option<SystemTime>) -> Result<Vec<String>> {
        self.context.storage.keep(expires).await?;
        let notices = match self.context.bridges() {
            None => self.context.lan.hand_over(&self.context.storage).await?,
            Some(_) => Vec::new(),
        };
        self.machines().iter().for_each(|machine| machine.release());
        self.settled.store(true, Ordering::Relaxed);
        Ok(notices)
    }

    async fn store_file(&self, name: &str, content: &[u8]) -> Result<Option<PathBuf>> {
        self.context.storage.store_file(name, content).await.map(Some)
    }

    async fn destroy(&self) -> Result<()> {
        self.context.close().await;
        let machines = self.machines().clone();
        futures::future::join_all(machines.iter().map(|machine| machine.end())).await;
        let removed = self.remove_all().await;
        let context = Arc::clone(&self.context);
        blocking(move || context.storage.dir().destroy()).await?;
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
        let context = Arc::clone(&self.context);
        let clean_up = move || {
            context.close_blocking();
            let id = context.storage.id();
            let removed =
                context.connection.query_blocking(|connect| remove_all_of(connect, &context.store, id));
            if let Err(failure) = removed {
                let error = failure.into_error(ErrorKind::Io, "remove the domains and networks of the lab");
                tracing::warn!(lab = %id, error = error.report(), "cannot end a lab; the next reap will");
            }
        };
        if let Err(error) = std::thread::Builder::new().name("rudder-libvirt-drop".to_owned()).spawn(clean_up)
        {
            tracing::warn!(%error, "cannot end a lab; the next reap will");
        }
    }
}
