//! The lab of one build or clone: a directory in the store, its volumes and its machines.

use crate::machine::{self, QemuMachine};
use async_trait::async_trait;
use rudder_core::{
    Error, ErrorKind, Result,
    backend::{
        ImportRequest, Imported, Lab, LabId, LabSpec, Machine, MachineSpec, ModuleDraft, Progress, Served,
        Site,
    },
    module::Module,
};
use rudder_local::{
    host::Host,
    lab_storage::{LabStorage, blocking},
    lan::Lan,
    machine::MachineRecord,
    store::Store,
};
use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::SystemTime,
};

/// The machines of a lab, in the order of their definition.
type Machines = Mutex<Vec<Arc<QemuMachine>>>;

/// A lab on QEMU.
#[derive(Debug)]
pub(crate) struct QemuLab {
    storage: Arc<LabStorage>,
    lan: Arc<Lan>,
    store: Store,
    machines: Machines,
    /// The number of the next machine, which names its files. Locked while a machine is defined, so that concurrent
    /// requests are served one by one.
    next_number: tokio::sync::Mutex<usize>,
    kept: AtomicBool,
}

impl QemuLab {
    pub(crate) async fn open(store: &Store, host: Arc<Host>, spec: &LabSpec) -> Result<Self> {
        let storage = LabStorage::open(store, host, spec).await?;
        let lan = Lan::new(spec);
        lan.check(&storage)?;
        storage.complete().await?;
        let kept = AtomicBool::new(storage.dir().is_kept());
        Ok(Self {
            storage: Arc::new(storage),
            lan: Arc::new(lan),
            store: store.clone(),
            machines: Machines::default(),
            next_number: tokio::sync::Mutex::default(),
            kept,
        })
    }

    /// Attaches to a kept lab.
    pub(crate) async fn attach(store: &Store, host: Arc<Host>, id: &LabId) -> Result<Self> {
        let storage = Arc::new(LabStorage::attach(store, host, id).await?);
        let lan = Arc::new(Lan::attached());
        let mut machines = Vec::new();
        for (number, record) in MachineRecord::read_all(storage.dir(), crate::NAME)? {
            machines.push(Arc::new(machine::attach(&storage, &lan, record, number).await?));
        }
        let next_number = tokio::sync::Mutex::new(machines.len());
        let (machines, kept) = (Mutex::new(machines), AtomicBool::new(true));
        Ok(Self { storage, lan, store: store.clone(), machines, next_number, kept })
    }

    fn machines(&self) -> MutexGuard<'_, Vec<Arc<QemuMachine>>> {
        locked(&self.machines)
    }
}

fn locked(machines: &Machines) -> MutexGuard<'_, Vec<Arc<QemuMachine>>> {
    machines.lock().unwrap_or_else(PoisonError::into_inner)
}

#[async_trait]
impl Lab for QemuLab {
    fn id(&self) -> &LabId {
        self.storage.id()
    }

    fn versions(&self) -> BTreeMap<String, String> {
        self.storage.versions()
    }

    async fn import(&self, request: &ImportRequest, progress: &Progress) -> Result<Imported> {
        self.storage.import(request, progress).await
    }

    async fn serve(&self, site: Site) -> Result<Served> {
        self.lan.serve(site)
    }

    async fn create_machine(&self, spec: &MachineSpec) -> Result<Arc<dyn Machine>> {
        let refuse = |error: Error| error.with_context("vm", &spec.name);
        self.storage.dir().check_open().map_err(refuse)?;
        self.storage.check_volumes(spec).map_err(refuse)?;
        let mut next_number = self.next_number.lock().await;
        if self.machines().iter().any(|machine| machine.name() == spec.name) {
            let message =
                format!("expected a new name in lab {}, but found {:?} again", self.storage.id(), spec.name);
            return Err(refuse(Error::new(ErrorKind::Conflict, message)));
        }
        let number = *next_number;
        *next_number += 1;
        let machine = machine::define(&self.storage, &self.lan, spec, number).await;
        let machine = Arc::new(machine.map_err(refuse)?);
        self.machines().push(Arc::clone(&machine));
        Ok(machine)
    }

    async fn publish(&self, draft: ModuleDraft) -> Result<Module> {
        self.store.publish(self.storage.dir(), draft).await
    }

    async fn machines(&self) -> Result<Vec<Arc<dyn Machine>>> {
        Ok(self.machines().iter().map(|machine| Arc::clone(machine) as Arc<dyn Machine>).collect())
    }

    async fn keep(&self, expires: Option<SystemTime>) -> Result<Vec<String>> {
        self.storage.keep(expires).await?;
        let notices = self.lan.hand_over(&self.storage).await?;
        self.kept.store(true, Ordering::Relaxed);
        self.machines().iter().for_each(|machine| machine.release());
        Ok(notices)
    }

    async fn store_file(&self, name: &str, content: &[u8]) -> Result<Option<PathBuf>> {
        self.storage.store_file(name, content).await.map(Some)
    }

    async fn destroy(&self) -> Result<()> {
        let machines = self.machines().clone();
        futures::future::join_all(machines.iter().map(|machine| machine.end())).await;
        let storage = Arc::clone(&self.storage);
        blocking(move || storage.dir().destroy()).await
    }
}

impl Drop for QemuLab {
    fn drop(&mut self) {
        if self.kept.load(Ordering::Relaxed) {
            return;
        }
        for machine in self.machines().iter() {
            machine.abandon();
        }
    }
}
