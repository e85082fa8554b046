//! The storage of a lab, for backends that run QEMU: a directory in the store, and the volumes in it. Imports sources,
//! and captures disks. It makes no difference here whether the machines on these volumes are started by this crate or by
//! another program (libvirt).

use crate::{
    host::Host,
    parent::Parent,
    process::{Invocation, Lifetime, OwnedChild},
    store::{LAB_VARIABLE, LabDir, Lease, Store},
};
use rudder_core::{
    Error, ErrorKind, Result,
    backend::{LabId, LabSpec, MachineSpec, Progress, Retention},
    plan::{PlannedBuildRef, PlannedNetwork},
};
use std::{
    collections::BTreeMap,
    fs::File,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::SystemTime,
};

/// The directory, volumes and host of a lab.
#[derive(Debug)]
pub struct LabStorage {
    id: LabId,
    dir: Arc<LabDir>,
    host: Arc<Host>,
    /// Its networks; `None` in a lab that was attached to.
    network: Option<PlannedNetwork>,
    retention: Retention,
    store: Store,
    /// The open directory: gives its sockets a short path, whatever the directory's own path is.
    handle: File,
    /// Virtual sizes of the volumes, by file name.
    volumes: Mutex<BTreeMap<String, u64>>,
    /// Versions for the provenance, in addition to the host's.
    versions: Mutex<BTreeMap<String, String>>,
    next_volume: AtomicUsize,
    notice_told: AtomicBool,
}

impl LabStorage {
    /// Creates the directory of a lab in the store, owned by this process.
    ///
    /// # Errors
    /// `Conflict` when a lab with this id exists; file errors.
    pub async fn open(store: &Store, host: Arc<Host>, spec: &LabSpec) -> Result<Self> {
        let (owned, id, name, retention) =
            (store.clone(), spec.id.clone(), spec.name.clone(), spec.retention);
        let dir = blocking(move || owned.create_lab(&id, &name, retention)).await?;
        Self::new(store, host, dir, Some(spec.network.clone()), retention)
    }

    /// Completes the opening of the lab, as [`LabDir::complete`] does.
    ///
    /// # Errors
    /// File errors.
    pub async fn complete(&self) -> Result<()> {
        let dir = Arc::clone(&self.dir);
        blocking(move || dir.complete()).await
    }

    /// Attaches to a kept lab, as [`Store::attach_lab`] does.
    ///
    /// # Errors
    /// As `attach_lab`.
    pub async fn attach(store: &Store, host: Arc<Host>, id: &LabId) -> Result<Self> {
        let (owned, id) = (store.clone(), id.clone());
        let dir = blocking(move || owned.attach_lab(&id)).await?;
        Self::new(store, host, dir, None, Retention::MayBeKept)
    }

    fn new(
        store: &Store,
        host: Arc<Host>,
        dir: LabDir,
        network: Option<PlannedNetwork>,
        retention: Retention,
    ) -> Result<Self> {
        let handle = File::open(dir.path())
            .map_err(|error| Error::io(format_args!("open {}", dir.path().display()), error))?;
        Ok(Self {
            id: dir.id(),
            dir: Arc::new(dir),
            host,
            network,
            retention,
            store: store.clone(),
            handle,
            volumes: Mutex::default(),
            versions: Mutex::default(),
            next_volume: AtomicUsize::new(0),
            notice_told: AtomicBool::new(false),
        })
    }

    /// Returns the lab's id.
    #[must_use]
    pub fn id(&self) -> &LabId {
        &self.id
    }

    /// Returns the lab's directory.
    #[must_use]
    pub fn dir(&self) -> &LabDir {
        &self.dir
    }

    /// Returns the host that its machines run on.
    #[must_use]
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// Returns its networks.
    ///
    /// # Errors
    /// `Unsupported` in a lab that was attached to: no machine can be added to it.
    pub fn network(&self) -> Result<&PlannedNetwork> {
        self.network.as_ref().ok_or_else(|| {
            let message = "cannot add machines, volumes or sites to a lab that was attached to";
            Error::new(ErrorKind::Unsupported, message).with_context("lab", self.id.as_str())
        })
    }

    /// Returns the path of a file of the lab.
    #[must_use]
    pub fn path(&self, file: &str) -> PathBuf {
        self.dir.path().join(file)
    }

    /// Returns a path of a socket of the lab that is short enough for an address (unix(7): at most 107 bytes).
    #[must_use]
    pub fn socket(&self, file: &str) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}/{file}", self.handle.as_raw_fd()))
    }

    /// Returns the versions for the provenance: the host's, and those of what the lab's machines were made with.
    #[must_use]
    pub fn versions(&self) -> BTreeMap<String, String> {
        let mut versions = self.host.versions().clone();
        versions.extend(self.versions.lock().unwrap_or_else(PoisonError::into_inner).clone());
        versions
    }

    /// Records the version of something that a machine of the lab is made with.
    pub fn note_version(&self, what: &str, version: String) {
        self.versions.lock().unwrap_or_else(PoisonError::into_inner).insert(what.to_owned(), version);
    }

    /// Returns an invocation of qemu-img in the lab's directory.
    pub fn qemu_img(&self) -> Invocation {
        self.tool(&self.host.qemu_img)
    }

    /// Returns an invocation of qemu-nbd in the lab's directory.
    pub fn qemu_nbd(&self) -> Invocation {
        self.tool(&self.host.qemu_nbd)
    }

    /// Returns an invocation of a program in the lab's directory; it ends with its owner.
    pub fn tool(&self, program: &Path) -> Invocation {
        Invocation::new(program, self.host.with_owner())
            .directory(self.dir.path())
            .variable(LAB_VARIABLE, self.id.as_str())
    }

    /// Returns the lifetime of the processes of the lab's machines.
    #[must_use]
    pub fn lifetime(&self) -> Lifetime {
        match self.retention {
            Retention::EndWithOwner => self.host.with_owner(),
            _ => Lifetime::Kept,
        }
    }

    /// Records a process of a machine in the ledger of the lab, so that it can be found after this process is gone. A process that
    /// has already ended is not recorded: the caller notices when it communicates with it.
    ///
    /// # Errors
    /// File errors.
    pub async fn record_process(&self, pid: Option<u32>, program: &str, machine: &str) -> Result<()> {
        let Some(pid) = pid else { return Ok(()) };
        let (dir, role) = (Arc::clone(&self.dir), role(program, machine));
        match blocking(move || dir.record_process(pid, role)).await {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }

    /// Adopts the process of a machine, recorded as by [`record_process`](Self::record_process); `None` when it has ended.
    ///
    /// # Errors
    /// As [`adopt`].
    pub fn adopt(&self, program: &str, machine: &str) -> Result<Option<OwnedChild>> {
        adopt(&self.dir, &role(program, machine))
    }

    /// Returns whether a process of a machine was ever [recorded](Self::record_process).
    #[must_use]
    pub fn was_started(&self, program: &str, machine: &str) -> bool {
        !self.dir.processes(&role(program, machine)).is_empty()
    }

    /// Returns the store that contains the lab.
    pub(crate) fn store(&self) -> &Store {
        &self.store
    }

    /// Returns a number that no other volume of the lab has.
    pub(crate) fn number_of_volume(&self) -> usize {
        self.next_volume.fetch_add(1, Ordering::Relaxed)
    }

    /// Adds a volume of this virtual size to the lab.
    pub(crate) fn add_volume(&self, id: &str, size: u64) {
        self.volumes().insert(id.to_owned(), size);
    }

    fn volumes(&self) -> MutexGuard<'_, BTreeMap<String, u64>> {
        self.volumes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the virtual size of a volume of the lab.
    ///
    /// # Errors
    /// `InvalidInput` when the lab has no such volume.
    pub fn volume_size(&self, volume: &str) -> Result<u64> {
        self.volumes().get(volume).copied().ok_or_else(|| {
            Error::new(
                ErrorKind::InvalidInput,
                format!("expected a volume of lab {}, but found {volume:?}", self.id),
            )
        })
    }

    /// Checks that the lab takes new machines, and that the disks and CD-ROMs of this one are volumes of the lab.
    ///
    /// # Errors
    /// `Unsupported` in a lab that was attached to; `InvalidInput` when one is not a volume.
    pub fn check_volumes(&self, spec: &MachineSpec) -> Result<()> {
        self.network()?;
        let mut volumes = spec.disks.iter().map(|disk| &disk.volume).chain(&spec.cdroms);
        volumes.try_for_each(|volume| self.volume_size(&volume.id).map(drop))
    }

    /// Lets the lab outlive this process, until it is removed or has expired.
    ///
    /// # Errors
    /// `InvalidInput` when it ends with its owner; file errors.
    pub async fn keep(&self, expires: Option<SystemTime>) -> Result<()> {
        let dir = Arc::clone(&self.dir);
        blocking(move || dir.mark_kept(expires)).await
    }

    /// Stores a file with the lab, as [`Lab::store_file`](rudder_core::backend::Lab::store_file) promises.
    ///
    /// # Errors
    /// As `Lab::store_file`; file errors.
    pub async fn store_file(&self, name: &str, content: &[u8]) -> Result<PathBuf> {
        let (dir, name, content) = (Arc::clone(&self.dir), name.to_owned(), content.to_owned());
        blocking(move || dir.store_file(&name, &content)).await
    }

    /// Holds the lease of something that the lab needs until the lab is gone.
    pub(crate) async fn hold(&self, lease: Lease) -> Result<()> {
        let dir = Arc::clone(&self.dir);
        blocking(move || dir.hold(lease)).await
    }

    /// Reports the notice about the host, once.
    pub(crate) fn report_notice(&self, progress: &Progress) {
        if let Some(notice) = &self.host.notice
            && !self.notice_told.swap(true, Ordering::Relaxed)
        {
            progress.notice(notice.clone());
        }
    }

    /// Returns a VM of a module, and keeps the module for as long as the lab lives.
    pub async fn parent(&self, parent: &PlannedBuildRef) -> Result<Parent> {
        let (store, name, digest) = (self.store.clone(), parent.module.clone(), parent.digest);
        let (module, lease) = blocking(move || store.lease_module(&name, &digest)).await?;
        self.hold(lease).await?;
        let missing =
            |what: String| Error::new(ErrorKind::NotFound, what).with_context("module", &parent.module);
        let machine = module.machines.iter().find(|machine| machine.name == parent.vm).cloned();
        let machine = machine
            .ok_or_else(|| missing(format!("expected a VM {:?} in the module, but found none", parent.vm)))?;
        Ok(Parent { machine, module, store: self.store.clone() })
    }
}

/// Returns the role of a machine's process in the ledger.
fn role(program: &str, machine: &str) -> String {
    format!("{program} of {machine}")
}

/// Adopts the process that was recorded last with this role in the ledger of a lab; `None` when it has ended. The process is left
/// alone when the result is dropped. Must be called on a Tokio runtime.
///
/// # Errors
/// The process cannot be observed.
pub fn adopt(lab: &LabDir, role: &str) -> Result<Option<OwnedChild>> {
    let Some(identity) = lab.processes(role).pop() else { return Ok(None) };
    OwnedChild::adopt(identity.pid, || identity.is_running())
        .map_err(|error| Error::io(format_args!("observe process {} ({role})", identity.pid), error))
}

/// Runs file operations where they do not block the async runtime.
///
/// # Errors
/// Those of the work.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    rudder_core::runtime::check()?;
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => {
            Err(Error::new(ErrorKind::Internal, "a file operation was interrupted").with_source(error))
        }
    }
}
