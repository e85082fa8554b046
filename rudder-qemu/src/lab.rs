//! The place of one build or clone: a directory in the store, its volumes, its machines.

use crate::{
    host::Host,
    image::{self, Backing},
    machine::QemuMachine,
    process::Invocation,
};
use async_trait::async_trait;
use rudder_core::{
    Error, ErrorKind, Result,
    backend::{
        Fetched, ImportRequest, Imported, KeptLab, Lab, LabId, LabSpec, Machine, MachineSpec, ModuleDraft,
        Progress, Retention, Served, Site, Volume,
    },
    module::{InputRecord, Module},
    plan::{Firmware, PlannedBuildRef, PlannedNetwork, PlannedSource, PlannedUrl},
    store::{ImageFormat, LabDir, Store},
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
pub(crate) struct Ground {
    pub(crate) id: LabId,
    pub(crate) dir: LabDir,
    pub(crate) host: Arc<Host>,
    pub(crate) network: PlannedNetwork,
    pub(crate) retention: Retention,
    /// The directory itself: a way to its sockets that is short whatever its path is.
    handle: File,
    /// Virtual sizes of the volumes, by their file names.
    volumes: Mutex<BTreeMap<String, u64>>,
}

impl Ground {
    /// A file of the lab.
    pub(crate) fn path(&self, file: &str) -> PathBuf {
        self.dir.path().join(file)
    }

    /// A socket of the lab, by a path that fits into an address (unix(7): at most 107 bytes).
    pub(crate) fn socket(&self, file: &str) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}/{file}", self.handle.as_raw_fd()))
    }

    /// qemu-img, in the lab's directory.
    pub(crate) fn qemu_img(&self) -> Invocation {
        let command = self.host.qemu_img(self.dir.path());
        command.variable(rudder_core::store::LAB_VARIABLE, self.id.as_str())
    }

    fn volumes(&self) -> MutexGuard<'_, BTreeMap<String, u64>> {
        self.volumes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The virtual size of a volume of the lab.
    pub(crate) fn volume_size(&self, volume: &str) -> Result<u64> {
        self.volumes().get(volume).copied().ok_or_else(|| {
            Error::new(
                ErrorKind::InvalidInput,
                format!("expected a volume of lab {}, but found {volume:?}", self.id),
            )
        })
    }
}

/// A lab on raw QEMU.
#[derive(Debug)]
pub(crate) struct QemuLab {
    ground: Arc<Ground>,
    store: Store,
    machines: Mutex<Vec<Arc<QemuMachine>>>,
    next_volume: AtomicUsize,
    notice_told: AtomicBool,
    kept: AtomicBool,
}

impl QemuLab {
    pub(crate) async fn open(store: &Store, host: Arc<Host>, spec: &LabSpec) -> Result<Self> {
        let (owned, id, name, retention) =
            (store.clone(), spec.id.clone(), spec.name.clone(), spec.retention);
        let dir = blocking(move || owned.create_lab(&id, &name, retention)).await?;
        let handle = File::open(dir.path())
            .map_err(|error| Error::io(format_args!("open {}", dir.path().display()), error))?;
        let ground = Ground {
            id: spec.id.clone(),
            dir,
            host,
            network: spec.network.clone(),
            retention: spec.retention,
            handle,
            volumes: Mutex::default(),
        };
        Ok(Self {
            ground: Arc::new(ground),
            store: store.clone(),
            machines: Mutex::default(),
            next_volume: AtomicUsize::new(0),
            notice_told: AtomicBool::new(false),
            kept: AtomicBool::new(false),
        })
    }

    fn machines(&self) -> MutexGuard<'_, Vec<Arc<QemuMachine>>> {
        self.machines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells once what the user should know about the host.
    fn tell_notice(&self, progress: &Progress) {
        if let Some(notice) = &self.ground.host.notice
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
        image::create(&self.ground, &id, backing, size).await?;
        self.ground.volumes().insert(id.clone(), size);
        Ok(Volume { id, virtual_size: size })
    }

    async fn import_url(
        &self,
        url: &PlannedUrl,
        request: &ImportRequest,
        progress: &Progress,
    ) -> Result<Imported> {
        let image = self.store.image(url, progress).await?;
        let (ground, lease) = (Arc::clone(&self.ground), image.lease.clone());
        blocking(move || ground.dir.hold(lease)).await?;
        let format = driver(image.format);
        let size = match image.format {
            // Headers that the store reads as QEMU does.
            ImageFormat::Raw | ImageFormat::Qcow2 => image.virtual_size,
            _ => image::virtual_size(&self.ground, &image.path, format).await?,
        };
        let backing = Backing { path: &image.path, format };
        let volume = self.volume(Some((backing, size)), request.size).await?;
        let input = InputRecord { role: format!("source of VM {}", request.machine), ..image.input };
        Ok(Imported { volume, input: Some(input) })
    }

    async fn import_module(&self, parent: &PlannedBuildRef, request: &ImportRequest) -> Result<Imported> {
        let (store, name, digest) = (self.store.clone(), parent.module.clone(), parent.digest);
        let (module, lease) = blocking(move || store.lease_module(&name, &digest)).await?;
        let ground = Arc::clone(&self.ground);
        blocking(move || ground.dir.hold(lease)).await?;
        let missing =
            |what: String| Error::new(ErrorKind::NotFound, what).with_context("module", &parent.module);
        let machine = module.machines.iter().find(|machine| machine.name == parent.vm);
        let machine = machine
            .ok_or_else(|| missing(format!("expected a VM {:?} in the module, but found none", parent.vm)))?;
        let disk = match &request.parent_disk {
            None => machine.disks.first(),
            Some(name) => machine.disks.iter().find(|disk| disk.name == *name),
        };
        let disk = disk.ok_or_else(|| {
            let wanted = request.parent_disk.as_deref().unwrap_or("its boot disk");
            missing(format!("expected disk {wanted} of VM {} in the module, but found none", parent.vm))
        })?;
        let directory = module.path.as_deref().and_then(Path::parent);
        let path = directory
            .ok_or_else(|| missing("expected the files of the module, but found none".to_owned()))?
            .join(&disk.file);
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

/// A format, as QEMU calls it.
fn driver(format: ImageFormat) -> &'static str {
    match format {
        ImageFormat::Qcow2 => "qcow2",
        ImageFormat::Vmdk => "vmdk",
        ImageFormat::Vdi => "vdi",
        ImageFormat::Vhd => "vpc",
        ImageFormat::Vhdx => "vhdx",
        _ => "raw",
    }
}

/// Runs file work where it does not hold up the runtime.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(Error::new(ErrorKind::Internal, "file work was cut short").with_source(error)),
    }
}

fn unsupported(what: &str) -> Error {
    Error::new(ErrorKind::Unsupported, format!("the qemu backend cannot do this yet: {what}"))
}

#[async_trait]
impl Lab for QemuLab {
    fn id(&self) -> &LabId {
        &self.ground.id
    }

    fn versions(&self) -> BTreeMap<String, String> {
        self.ground.host.versions().clone()
    }

    async fn import(&self, request: &ImportRequest, progress: &Progress) -> Result<Imported> {
        self.tell_notice(progress);
        let imported = match &request.source {
            PlannedSource::Url(url) => self.import_url(url, request, progress).await,
            PlannedSource::Blank => {
                self.volume(None, request.size).await.map(|volume| Imported { volume, input: None })
            }
            PlannedSource::BuildRef(parent) => self.import_module(parent, request).await,
            other => Err(unsupported(&format!("a source such as {other:?}"))),
        };
        imported
            .map_err(|error| error.with_context("disk", &request.disk).with_context("vm", &request.machine))
    }

    async fn fetch(&self, url: &PlannedUrl, progress: &Progress) -> Result<Fetched> {
        let file = self.store.file(url, progress).await?;
        let (ground, lease) = (Arc::clone(&self.ground), file.lease);
        blocking(move || ground.dir.hold(lease)).await?;
        Ok(Fetched { path: file.path, input: file.input })
    }

    async fn serve(&self, _site: Site) -> Result<Served> {
        Err(unsupported("serving files"))
    }

    async fn create_machine(&self, spec: &MachineSpec) -> Result<Arc<dyn Machine>> {
        let refuse = |error: Error| error.with_context("vm", &spec.name);
        if spec.firmware != Firmware::Bios {
            return Err(refuse(unsupported("UEFI")));
        }
        if spec.tpm {
            return Err(refuse(unsupported("a TPM")));
        }
        for disk in &spec.disks {
            self.ground.volume_size(&disk.volume.id).map_err(refuse)?;
        }
        let taken = || {
            let message =
                format!("expected a new name in lab {}, but found {:?} again", self.ground.id, spec.name);
            refuse(Error::new(ErrorKind::Conflict, message))
        };
        let number = {
            let machines = self.machines();
            if machines.iter().any(|machine| machine.name() == spec.name) {
                return Err(taken());
            }
            machines.len()
        };
        let machine =
            Arc::new(QemuMachine::define(Arc::clone(&self.ground), spec, number).await.map_err(refuse)?);
        let mut machines = self.machines();
        if machines.iter().any(|machine| machine.name() == spec.name) {
            return Err(taken());
        }
        machines.push(Arc::clone(&machine));
        Ok(machine)
    }

    async fn publish(&self, draft: ModuleDraft) -> Result<Module> {
        self.store.publish(&self.ground.dir, draft).await
    }

    async fn keep(&self) -> Result<KeptLab> {
        let machines = self.machines().clone();
        let access: Vec<String> = machines.iter().flat_map(|machine| machine.access()).collect();
        let (ground, record) = (Arc::clone(&self.ground), serde_json::json!(access).to_string());
        blocking(move || {
            let path = ground.path(ACCESS_FILE);
            std::fs::write(&path, record)
                .map_err(|error| Error::io(format_args!("write {}", path.display()), error))?;
            ground.dir.mark_kept()
        })
        .await?;
        self.kept.store(true, Ordering::Relaxed);
        for machine in &machines {
            machine.release();
        }
        Ok(KeptLab { id: self.ground.id.clone(), access })
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

/// How to get into the machines of a lab that was kept.
pub(crate) fn kept_access(directory: &Path) -> Vec<String> {
    let record = std::fs::read(directory.join(ACCESS_FILE)).unwrap_or_default();
    serde_json::from_slice(&record).unwrap_or_default()
}
