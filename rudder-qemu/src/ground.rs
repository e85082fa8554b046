//! What a lab of a backend that runs QEMU stands on: a directory in the store, and the volumes in it. Brings sources in,
//! and takes captured disks out. Whether the machines on these volumes are started by this crate or by somebody else
//! (libvirt) makes no difference here.

use crate::{
    capture::{self, Captured},
    host::Host,
    image::{self, Backing, Base},
    lan::Lan,
    process::{Invocation, Lifetime},
    state::Parent,
};
use rudder_core::{
    Error, ErrorKind, Result,
    backend::{FetchRequest, Fetched, ImportRequest, Imported, LabId, LabSpec, Progress, Retention, Volume},
    module::InputRecord,
    plan::{PlannedBuildRef, PlannedNetwork, PlannedSource, PlannedUrl},
    store::{LAB_VARIABLE, LabDir, Lease, Store, replace_file},
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
};

/// The file in a lab's directory that says how to get into its machines, once it was kept.
const ACCESS_FILE: &str = "access.json";

/// What a lab and its machines stand on.
#[derive(Debug)]
pub struct Ground {
    pub(crate) id: LabId,
    pub(crate) dir: Arc<LabDir>,
    pub(crate) host: Arc<Host>,
    pub(crate) network: PlannedNetwork,
    lan: Lan,
    pub(crate) retention: Retention,
    store: Store,
    /// The directory itself: a way to its sockets that is short whatever its path is.
    handle: File,
    /// Virtual sizes of the volumes, by their file names.
    volumes: Mutex<BTreeMap<String, u64>>,
    /// Versions that belong into the provenance, besides the host's.
    versions: Mutex<BTreeMap<String, String>>,
    next_volume: AtomicUsize,
    notice_told: AtomicBool,
}

impl Ground {
    /// Makes the directory of a lab in the store; this process owns it.
    ///
    /// # Errors
    /// `Conflict` when there is a lab with this id; file errors.
    pub async fn open(store: &Store, host: Arc<Host>, spec: &LabSpec) -> Result<Self> {
        let (owned, id, name, retention) =
            (store.clone(), spec.id.clone(), spec.name.clone(), spec.retention);
        let dir = blocking(move || owned.create_lab(&id, &name, retention)).await?;
        let handle = File::open(dir.path())
            .map_err(|error| Error::io(format_args!("open {}", dir.path().display()), error))?;
        Ok(Self {
            id: spec.id.clone(),
            dir: Arc::new(dir),
            host,
            network: spec.network.clone(),
            lan: Lan::new(&spec.network, &spec.name),
            retention: spec.retention,
            store: store.clone(),
            handle,
            volumes: Mutex::default(),
            versions: Mutex::default(),
            next_volume: AtomicUsize::new(0),
            notice_told: AtomicBool::new(false),
        })
    }

    /// The lab's id.
    #[must_use]
    pub fn id(&self) -> &LabId {
        &self.id
    }

    /// The lab's directory.
    #[must_use]
    pub fn dir(&self) -> &LabDir {
        &self.dir
    }

    /// The host that its machines run on.
    #[must_use]
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// Its networks.
    #[must_use]
    pub fn network(&self) -> &PlannedNetwork {
        &self.network
    }

    /// The switches and routers of its networks.
    #[must_use]
    pub fn lan(&self) -> &Lan {
        &self.lan
    }

    /// Whether its machines may have to outlive their owner.
    #[must_use]
    pub fn retention(&self) -> Retention {
        self.retention
    }

    /// A file of the lab.
    #[must_use]
    pub fn path(&self, file: &str) -> PathBuf {
        self.dir.path().join(file)
    }

    /// A socket of the lab, by a path that fits into an address (unix(7): at most 107 bytes).
    #[must_use]
    pub fn socket(&self, file: &str) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}/{file}", self.handle.as_raw_fd()))
    }

    /// The same for another process, for as long as this one lives.
    #[must_use]
    pub fn socket_for_others(&self, file: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/fd/{}/{file}", std::process::id(), self.handle.as_raw_fd()))
    }

    /// Versions that belong into the provenance: the host's, and of what the lab's machines were made with.
    #[must_use]
    pub fn versions(&self) -> BTreeMap<String, String> {
        let mut versions = self.host.versions().clone();
        versions.extend(self.versions.lock().unwrap_or_else(PoisonError::into_inner).clone());
        versions
    }

    /// Takes note of something that a machine of the lab is made with.
    pub(crate) fn note_version(&self, what: &str, version: String) {
        self.versions.lock().unwrap_or_else(PoisonError::into_inner).insert(what.to_owned(), version);
    }

    /// qemu-img, in the lab's directory.
    pub(crate) fn qemu_img(&self) -> Invocation {
        self.tool(&self.host.qemu_img)
    }

    /// qemu-nbd, in the lab's directory.
    pub(crate) fn qemu_nbd(&self) -> Invocation {
        self.tool(&self.host.qemu_nbd)
    }

    /// A program in the lab's directory; it ends with its owner.
    fn tool(&self, program: &Path) -> Invocation {
        Invocation::new(program, Lifetime::WithOwner(self.host.setpriv.clone()))
            .directory(self.dir.path())
            .variable(LAB_VARIABLE, self.id.as_str())
    }

    fn volumes(&self) -> MutexGuard<'_, BTreeMap<String, u64>> {
        self.volumes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The virtual size of a volume of the lab.
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

    /// Brings a source into the lab, as [`Lab::import`](rudder_core::backend::Lab::import) promises. A volume's id is the
    /// name of its file, in qcow2.
    ///
    /// # Errors
    /// As `Lab::import`.
    pub async fn import(&self, request: &ImportRequest, progress: &Progress) -> Result<Imported> {
        self.tell_notice(progress);
        let imported = match &request.source {
            PlannedSource::Url(url) => self.import_url(url, request, progress).await,
            PlannedSource::Blank => {
                self.volume(None, request.size).await.map(|volume| Imported { volume, input: None })
            }
            PlannedSource::BuildRef(parent) => self.import_module(parent, request, progress).await,
            other => Err(Error::new(
                ErrorKind::Unsupported,
                format!("machines on QEMU cannot have this yet: a source such as {other:?}"),
            )),
        };
        imported
            .map_err(|error| error.with_context("disk", &request.disk).with_context("vm", &request.machine))
    }

    /// Brings a file to the host, as [`Lab::fetch`](rudder_core::backend::Lab::fetch) promises.
    ///
    /// # Errors
    /// As `Lab::fetch`.
    pub async fn fetch(&self, request: &FetchRequest, progress: &Progress) -> Result<Fetched> {
        let file = self.store.file(&request.url, progress).await?;
        if !request.keep_for.is_zero() {
            let (store, lease, keep_for) = (self.store.clone(), file.lease.clone(), request.keep_for);
            blocking(move || store.keep_cached(&lease, keep_for)).await?;
        }
        self.hold(file.lease).await?;
        Ok(Fetched { path: file.path, input: file.input })
    }

    /// Makes the captured disk `target`, a file of the lab, of a volume whose machine has ended.
    ///
    /// # Errors
    /// `HostDiskFull`, `InvalidImage` when the copy does not read as the volume does, file errors.
    pub async fn capture(
        &self,
        volume: &str,
        target: &str,
        disk: &str,
        progress: &Progress,
    ) -> Result<Captured> {
        capture::capture(self, volume, target, disk, progress).await
    }

    /// Lets the lab outlive this process, with a note how to get into its machines.
    ///
    /// # Errors
    /// `InvalidInput` when it was not opened to be kept; file errors.
    pub async fn keep(&self, access: &[String]) -> Result<()> {
        let (dir, record) = (Arc::clone(&self.dir), serde_json::json!(access).to_string());
        blocking(move || {
            let path = dir.path().join(ACCESS_FILE);
            replace_file(&path, record.as_bytes())?;
            dir.mark_kept()
        })
        .await
    }

    /// Keeps what the lab needs, until the lab is gone.
    async fn hold(&self, lease: Lease) -> Result<()> {
        let dir = Arc::clone(&self.dir);
        blocking(move || dir.hold(lease)).await
    }

    /// Tells once what the user should know about the host.
    fn tell_notice(&self, progress: &Progress) {
        if let Some(notice) = &self.host.notice
            && !self.notice_told.swap(true, Ordering::Relaxed)
        {
            progress.notice(notice.clone());
        }
    }

    /// Makes the volume of a request on this image.
    async fn volume(&self, backing: Option<(Backing<'_>, u64)>, wanted: Option<u64>) -> Result<Volume> {
        let (backing, size) = match backing {
            Some((backing, image_size)) => (Some(backing), image::size_over(image_size, wanted)?),
            None => {
                let size = wanted.ok_or_else(|| {
                    Error::new(ErrorKind::InvalidInput, "expected the size of a blank disk, but found none")
                })?;
                (None, image::size_over(0, Some(size))?)
            }
        };
        let id = format!("v{}.qcow2", self.next_volume.fetch_add(1, Ordering::Relaxed));
        image::create(self, &id, backing, size).await?;
        self.volumes().insert(id.clone(), size);
        Ok(Volume { id, virtual_size: size })
    }

    async fn import_url(
        &self,
        url: &PlannedUrl,
        request: &ImportRequest,
        progress: &Progress,
    ) -> Result<Imported> {
        let image = self.store.image_for(url, request.size, progress).await?;
        self.hold(image.lease.clone()).await?;
        let copy = format!("v{}.base", self.next_volume.fetch_add(1, Ordering::Relaxed));
        let base = Base::of(self, &image, &copy, progress).await?;
        let backing = Backing { path: &base.path, format: base.format };
        let volume = self.volume(Some((backing, base.size)), request.size).await?;
        let input = InputRecord { role: format!("source of VM {}", request.machine), ..image.input };
        Ok(Imported { volume, input: Some(input) })
    }

    /// A VM of a module, which stays for as long as the lab does.
    pub(crate) async fn parent(&self, parent: &PlannedBuildRef) -> Result<Parent> {
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

    async fn import_module(
        &self,
        parent: &PlannedBuildRef,
        request: &ImportRequest,
        progress: &Progress,
    ) -> Result<Imported> {
        let missing =
            |what: String| Error::new(ErrorKind::NotFound, what).with_context("module", &parent.module);
        let Parent { machine, module, store } = self.parent(parent).await?;
        let disk = match &request.parent_disk {
            None => machine.disks.first(),
            Some(name) => machine.disks.iter().find(|disk| disk.name == *name),
        };
        let disk = disk.ok_or_else(|| {
            let wanted = request.parent_disk.as_deref().unwrap_or("its boot disk");
            missing(format!("expected disk {wanted} of VM {} in the module, but found none", parent.vm))
        })?;
        let (wanted, progress) = (disk.clone(), progress.clone());
        let path = blocking(move || {
            store.captured_file(&module, &wanted.file, wanted.size, &wanted.sha256, &progress)
        })
        .await?;
        let backing = Backing { path: &path, format: &disk.format };
        let volume = self.volume(Some((backing, disk.virtual_size)), request.size).await?;
        let input = InputRecord {
            role: format!("source of VM {}", request.machine),
            url: format!("module {}/{}", parent.module, parent.vm),
            size: disk.size,
            sha256: disk.sha256,
        };
        Ok(Imported { volume, input: Some(input) })
    }
}

/// Runs file work where it does not hold up the runtime.
///
/// # Errors
/// Those of the work.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    rudder_core::runtime::check()?;
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(Error::new(ErrorKind::Internal, "file work was cut short").with_source(error)),
    }
}

/// How to get into the machines of a lab that was kept, in this directory.
#[must_use]
pub fn kept_access(directory: &Path) -> Vec<String> {
    let record = std::fs::read(directory.join(ACCESS_FILE)).unwrap_or_default();
    serde_json::from_slice(&record).unwrap_or_default()
}
