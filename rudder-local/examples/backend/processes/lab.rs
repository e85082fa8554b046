//! The lab of one build: a directory of the store, which knows its owner, and its content.

use super::{Processes, blocking, machine::ProcessMachine};
use async_trait::async_trait;
use rudder_core::{
    Error, ErrorKind, Result,
    backend::{
        ImportRequest, Imported, Lab, LabId, LabSpec, Machine, MachineSpec, ModuleDraft, Progress, Retention,
        Served, Site, Volume,
    },
    module::{InputRecord, InputRole, Module},
    plan::{PlannedBuildRef, PlannedSource},
};
use rudder_local::{
    machine::MachineRecord,
    store::{LabDir, Store},
};
use std::{
    collections::BTreeMap,
    fs::File,
    io,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::SystemTime,
};

#[derive(Debug)]
pub(super) struct ProcessesLab {
    id: LabId,
    store: Store,
    /// Removed, with the processes that are recorded in it, when this is dropped or its owner is found dead.
    dir: Arc<LabDir>,
    machines: Mutex<Vec<Arc<ProcessMachine>>>,
    kept: AtomicBool,
}

impl ProcessesLab {
    pub(super) async fn open(store: Store, spec: &LabSpec) -> Result<Self> {
        let (id, name, retention) = (spec.id.clone(), spec.name.clone(), spec.retention);
        let owned = store.clone();
        let dir = blocking(move || {
            let dir = owned.create_lab(&id, &name, retention)?;
            dir.complete()?;
            Ok(dir)
        })
        .await?;
        let kept = AtomicBool::new(matches!(spec.retention, Retention::UntilRemoved { .. }));
        Ok(Self { id: spec.id.clone(), store, dir: Arc::new(dir), machines: Mutex::default(), kept })
    }

    pub(super) async fn attach(store: Store, id: &LabId) -> Result<Self> {
        let (owned, wanted) = (store.clone(), id.clone());
        let dir = Arc::new(blocking(move || owned.attach_lab(&wanted)).await?);
        let mut machines = Vec::new();
        for (_, record) in MachineRecord::read_all(&dir, Processes::NAME)? {
            machines.push(Arc::new(ProcessMachine::attach(record.spec(), Arc::clone(&dir))?));
        }
        let (machines, kept) = (Mutex::new(machines), AtomicBool::new(true));
        Ok(Self { id: id.clone(), store, dir, machines, kept })
    }

    fn machines(&self) -> MutexGuard<'_, Vec<Arc<ProcessMachine>>> {
        self.machines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Creates a volume: a sparse file of this size, which begins with the content of another file, if one is given.
    async fn volume(&self, parent: Option<PathBuf>, size: u64) -> Result<Volume> {
        // A name of ours: those of the manifest are no file names.
        let path = self.dir.path().join(format!("volume-{:016x}.raw", rand::random::<u64>()));
        let id = path.to_string_lossy().into_owned();
        blocking(move || {
            let make = || {
                let mut file = File::create_new(&path)?;
                if let Some(parent) = parent {
                    io::copy(&mut File::open(parent)?, &mut file)?;
                }
                file.set_len(size)
            };
            make().map_err(|error| Error::io("make a volume", error))
        })
        .await?;
        Ok(Volume::new(id, size))
    }

    async fn import_module(&self, parent: &PlannedBuildRef, request: &ImportRequest) -> Result<Imported> {
        let missing = |what: &str| {
            let message = format!("expected {what} in module {}, but found none", parent.module);
            Error::new(ErrorKind::NotFound, message)
        };
        let (store, name, digest) = (self.store.clone(), parent.module.clone(), parent.digest);
        let (module, lease) = blocking(move || store.lease_module(&name, &digest)).await?;
        // From here on the module cannot be removed before this lab.
        let dir = Arc::clone(&self.dir);
        blocking(move || dir.hold(lease)).await?;
        let machine = module.machines.iter().find(|machine| machine.name == parent.vm);
        let machine = machine.ok_or_else(|| missing("the VM"))?;
        let disk = match &request.parent_disk {
            Some(name) => machine.disks.iter().find(|disk| disk.name == *name),
            None => machine.disks.first(),
        };
        let disk = disk.ok_or_else(|| missing("the disk"))?;
        // A disk that was damaged since is never used as a parent.
        let (store, found, wanted) = (self.store.clone(), module.clone(), disk.clone());
        let check = move || store.captured_file(&found, &wanted.file, &wanted.content, &Progress::none());
        let path = blocking(check).await?;
        let size = request.size.unwrap_or(disk.virtual_size);
        if size < disk.virtual_size {
            let message = format!("expected at least {} bytes, but found {size}", disk.virtual_size);
            return Err(Error::new(ErrorKind::InvalidInput, message));
        }
        let url = format!("module {}/{}", parent.module, parent.vm);
        let input = InputRecord::new(InputRole::source(&request.machine), url, disk.content.clone());
        let volume = self.volume(Some(path), size).await?;
        Ok(Imported::new(volume, input))
    }
}

#[async_trait]
impl Lab for ProcessesLab {
    fn id(&self) -> &LabId {
        &self.id
    }

    fn versions(&self) -> BTreeMap<String, String> {
        BTreeMap::from([("processes".to_owned(), env!("CARGO_PKG_VERSION").to_owned())])
    }

    async fn import(&self, request: &ImportRequest, _progress: &Progress) -> Result<Imported> {
        let imported = match &request.source {
            PlannedSource::Blank => match request.size {
                Some(size) => self.volume(None, size).await.map(|volume| Imported::new(volume, None)),
                None => {
                    let message = "expected the size of a blank disk, but found none";
                    Err(Error::new(ErrorKind::InvalidInput, message))
                }
            },
            PlannedSource::BuildRef(parent) => self.import_module(parent, request).await,
            other => {
                let message = format!("expected a source that this backend claims, but found {other:?}");
                Err(Error::new(ErrorKind::Unsupported, message))
            }
        };
        imported.map_err(|error| {
            error.with_context(request.kind.name(), &request.disk).with_context("vm", &request.machine)
        })
    }

    async fn serve(&self, _site: Site) -> Result<Served> {
        Err(Error::new(ErrorKind::Unsupported, "processes that sleep fetch nothing"))
    }

    async fn create_machine(&self, spec: &MachineSpec) -> Result<Arc<dyn Machine>> {
        self.dir.check_open()?;
        let mut machines = self.machines();
        if machines.iter().any(|machine| machine.name() == spec.name) {
            let message = format!("expected a new name in lab {}, but found {:?} again", self.id, spec.name);
            return Err(Error::new(ErrorKind::Conflict, message));
        }
        MachineRecord::new(Processes::NAME, spec, None).write(&self.dir, machines.len())?;
        let machine =
            ProcessMachine::new(spec.clone(), Arc::clone(&self.dir), self.kept.load(Ordering::SeqCst));
        let machine = Arc::new(machine);
        machines.push(Arc::clone(&machine));
        Ok(machine)
    }

    async fn publish(&self, draft: ModuleDraft) -> Result<Module> {
        self.store.publish(&self.dir, draft).await
    }

    async fn machines(&self) -> Result<Vec<Arc<dyn Machine>>> {
        Ok(self.machines().iter().map(|machine| Arc::clone(machine) as Arc<dyn Machine>).collect())
    }

    async fn keep(&self, expires: Option<SystemTime>) -> Result<Vec<String>> {
        let dir = Arc::clone(&self.dir);
        blocking(move || dir.mark_kept(expires)).await?;
        self.kept.store(true, Ordering::SeqCst);
        self.machines().iter().for_each(|machine| machine.release());
        Ok(Vec::new())
    }

    async fn store_file(&self, name: &str, content: &[u8]) -> Result<Option<PathBuf>> {
        let (dir, name, content) = (Arc::clone(&self.dir), name.to_owned(), content.to_owned());
        blocking(move || dir.store_file(&name, &content)).await.map(Some)
    }

    async fn destroy(&self) -> Result<()> {
        let machines = self.machines().clone();
        for machine in machines {
            machine.end("its lab was destroyed").await;
        }
        let dir = Arc::clone(&self.dir);
        blocking(move || dir.destroy()).await
    }
}

/// Dropping a lab without keeping it abandons its machines.
impl Drop for ProcessesLab {
    fn drop(&mut self) {
        if !self.kept.load(Ordering::SeqCst) {
            self.machines().iter().for_each(|machine| machine.abandon());
        }
    }
}
