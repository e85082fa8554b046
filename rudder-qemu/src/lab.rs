//! The place of one build or clone: a directory in the store, its volumes, its machines.

pub(crate) use crate::ground::{Ground, blocking, kept_access};
use crate::{host::Host, machine::QemuMachine};
use async_trait::async_trait;
use rudder_core::{
    Error, ErrorKind, Result,
    backend::{
        FetchRequest, Fetched, ImportRequest, Imported, KeptLab, Lab, LabId, LabSpec, Machine, MachineSpec,
        ModuleDraft, Progress, Retention, Served, Site,
    },
    module::Module,
    store::Store,
};
use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

/// The machines of a lab, in the order in which they were defined.
type Machines = Mutex<Vec<Arc<QemuMachine>>>;

/// A lab on raw QEMU.
#[derive(Debug)]
pub(crate) struct QemuLab {
    ground: Arc<Ground>,
    store: Store,
    machines: Machines,
    /// How many machines were begun. Several may be asked for at once: they are defined one by one, each with files of its own.
    begun: tokio::sync::Mutex<usize>,
    kept: AtomicBool,
}

impl QemuLab {
    pub(crate) async fn open(store: &Store, host: Arc<Host>, spec: &LabSpec) -> Result<Self> {
        let ground = Ground::open(store, host, spec).await?;
        Ok(Self {
            ground: Arc::new(ground),
            store: store.clone(),
            machines: Machines::default(),
            begun: tokio::sync::Mutex::default(),
            kept: AtomicBool::new(false),
        })
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
        &self.ground.id
    }

    fn versions(&self) -> BTreeMap<String, String> {
        self.ground.versions()
    }

    async fn import(&self, request: &ImportRequest, progress: &Progress) -> Result<Imported> {
        self.ground.import(request, progress).await
    }

    async fn fetch(&self, request: &FetchRequest, progress: &Progress) -> Result<Fetched> {
        self.ground.fetch(request, progress).await
    }

    async fn serve(&self, site: Site) -> Result<Served> {
        self.ground.lan().serve(site)
    }

    async fn create_machine(&self, spec: &MachineSpec) -> Result<Arc<dyn Machine>> {
        let refuse = |error: Error| error.with_context("vm", &spec.name);
        self.ground.dir.check_open().map_err(refuse)?;
        for disk in &spec.disks {
            self.ground.volume_size(&disk.volume.id).map_err(refuse)?;
        }
        let mut begun = self.begun.lock().await;
        if self.machines().iter().any(|machine| machine.name() == spec.name) {
            let message =
                format!("expected a new name in lab {}, but found {:?} again", self.ground.id, spec.name);
            return Err(refuse(Error::new(ErrorKind::Conflict, message)));
        }
        let number = *begun;
        *begun += 1;
        let parent = match &spec.state_of {
            Some(parent) => Some(self.ground.parent(parent).await.map_err(refuse)?),
            None => None,
        };
        let machine = QemuMachine::define(Arc::clone(&self.ground), spec, number, parent).await;
        let machine = Arc::new(machine.map_err(refuse)?);
        self.machines().push(Arc::clone(&machine));
        Ok(machine)
    }

    async fn publish(&self, draft: ModuleDraft) -> Result<Module> {
        self.store.publish(&self.ground.dir, draft).await
    }

    async fn keep(&self) -> Result<KeptLab> {
        let machines = self.machines().clone();
        let mut access: Vec<String> = machines.iter().flat_map(|machine| machine.kept_access()).collect();
        if self.ground.retention == Retention::MayBeKept {
            access.extend(self.ground.lan().hand_over(&self.ground).await?);
        }
        self.ground.keep(&access).await?;
        self.kept.store(true, Ordering::Relaxed);
        for machine in &machines {
            machine.release();
        }
        Ok(KeptLab::new(self.ground.id.clone(), access))
    }

    fn directory(&self) -> Option<PathBuf> {
        Some(self.ground.dir.path().to_owned())
    }

    async fn destroy(&self) -> Result<()> {
        let machines = self.machines().clone();
        futures::future::join_all(machines.iter().map(|machine| machine.end())).await;
        let ground = Arc::clone(&self.ground);
        blocking(move || ground.dir.destroy()).await
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
