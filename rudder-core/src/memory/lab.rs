//! An in-memory lab: its volumes, files and machines, and what happens to them when it ends or its owner drops it.

use super::{
    Shared,
    files::FileTree,
    hardware::CONTENT,
    machine::{MachineCore, MemoryMachine},
    persist::Kept,
    script::Operation,
};
use crate::{
    Error, ErrorKind, Result,
    backend::{
        Exit, ImportRequest, Imported, Lab, LabId, LabSpec, Machine, MachineSpec, ModuleDraft, Progress,
        Retention, Served, Site, Volume, VolumeKind, check_lab_file,
    },
    content::Content,
    files::replace_file,
    media::http::{self, Admission, Server},
    module::{CapturedDisk, InputRecord, InputRole, Module},
    plan::{PlannedBuildRef, PlannedSource, PlannedUrl},
    secret::public_url,
};
use async_trait::async_trait;
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::Ipv4Addr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};
use tokio_util::sync::CancellationToken;

/// A disk that machines write to.
#[derive(Debug, Default)]
pub(super) struct MemoryVolume {
    pub(super) files: FileTree,
}

/// The volumes of a lab, by id.
pub(super) type Volumes = Arc<Mutex<HashMap<String, MemoryVolume>>>;

/// State shared by the handles of a lab.
#[derive(Debug)]
pub(super) struct LabCore {
    pub(super) id: LabId,
    pub(super) name: String,
    shared: Arc<Shared>,
    /// The names of the subnets.
    subnets: Vec<String>,
    volumes: Volumes,
    retention: Retention,
    /// Cancelled when the lab is taken from its owner.
    lost: CancellationToken,
    state: Mutex<LabState>,
}

#[derive(Debug, Default)]
struct LabState {
    machines: Vec<Arc<MachineCore>>,
    captured: HashMap<String, (Content, Arc<FileTree>)>,
    /// Modules that the disks are based on.
    parents: BTreeSet<String>,
    /// Files stored with the lab.
    files: BTreeMap<String, Vec<u8>>,
    /// The directory with the same files, unless the backend shares nothing with this host.
    directory: Option<tempfile::TempDir>,
    over: bool,
    kept: bool,
    expires: Option<SystemTime>,
}

impl LabCore {
    pub(super) fn new(spec: &LabSpec, shared: Arc<Shared>) -> Self {
        let subnets = spec.network.subnets.iter().map(|subnet| subnet.name.clone()).collect();
        let state = match spec.retention {
            Retention::UntilRemoved { expires } => LabState { kept: true, expires, ..LabState::default() },
            _ => LabState::default(),
        };
        Self {
            id: spec.id.clone(),
            name: spec.name.clone(),
            shared,
            subnets,
            volumes: Volumes::default(),
            retention: spec.retention,
            lost: CancellationToken::new(),
            state: Mutex::new(state),
        }
    }

    fn state(&self) -> MutexGuard<'_, LabState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn machines(&self) -> Vec<Arc<MachineCore>> {
        self.state().machines.clone()
    }

    /// Returns handles of the lab's machines.
    pub(super) fn handles(self: &Arc<Self>) -> Vec<Arc<dyn Machine>> {
        let handle = |core| Arc::new(MemoryMachine { core, lab: self.clone() }) as Arc<dyn Machine>;
        self.machines().into_iter().map(handle).collect()
    }

    pub(super) fn builds_on(&self, module: &str) -> bool {
        self.state().parents.contains(module)
    }

    pub(super) fn captured(&self, disk: &CapturedDisk, files: Arc<FileTree>) {
        self.state().captured.insert(disk.file.clone(), (disk.content.clone(), files));
    }

    pub(super) fn check_alive(&self) -> Result<()> {
        if self.state().over { Err(self.destroyed()) } else { Ok(()) }
    }

    /// Ends everything. May be repeated.
    pub(super) fn end(&self, why: &str) {
        let state = std::mem::take(&mut *self.state());
        self.state().over = true;
        for machine in &state.machines {
            machine.end(Exit::Killed { why: why.to_owned() });
        }
        self.volumes.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    fn add_volume(&self, request: &ImportRequest, files: FileTree, virtual_size: u64) -> Volume {
        let mut volumes = self.volumes.lock().unwrap_or_else(PoisonError::into_inner);
        let id = format!("{}-{}-{}", request.machine, request.disk, volumes.len());
        volumes.insert(id.clone(), MemoryVolume { files });
        Volume { id, virtual_size }
    }

    /// Returns when the lab expires, if it was kept.
    pub(super) fn expires(&self) -> Option<SystemTime> {
        self.state().expires
    }

    /// Takes the lab from its owner, as on a backend whose lease has expired.
    pub(super) fn take_away(&self) {
        self.end("its owner has lost it");
        self.lost.cancel();
    }

    /// Returns a file that was stored with the lab.
    pub(super) fn file(&self, name: &str) -> Option<Vec<u8>> {
        self.state().files.get(name).cloned()
    }

    fn store(&self, name: &str, content: &[u8]) -> Result<Option<std::path::PathBuf>> {
        check_lab_file(name, content)?;
        let mut state = self.state();
        if state.over {
            return Err(self.destroyed());
        }
        state.files.insert(name.to_owned(), content.to_owned());
        if self.shared.is_remote() {
            return Ok(None);
        }
        let directory = match state.directory.take() {
            Some(directory) => directory,
            None => tempfile::Builder::new()
                .prefix("rudder-memory-")
                .tempdir()
                .map_err(|error| Error::io("make a directory for a lab's files", error))?,
        };
        let path = state.directory.insert(directory).path().join(name);
        replace_file(&path, content)?;
        Ok(Some(path))
    }

    fn destroyed(&self) -> Error {
        let message = format!("expected lab {} to be open, but it was destroyed", self.id);
        Error::new(ErrorKind::Conflict, message)
    }

    /// Imports a CD-ROM: its content is that of the source.
    async fn import_cdrom(&self, request: &ImportRequest, progress: &Progress) -> Result<Imported> {
        let PlannedSource::Url(url) = &request.source else {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "expected the URL of a CD-ROM, but found another source",
            ));
        };
        let (bytes, input) = self.shared.download(url, InputRole::Iso, progress).await?;
        let (mut files, size) = (FileTree::default(), bytes.len() as u64);
        files.put(CONTENT, bytes, 0o600);
        Ok(Imported { volume: self.add_volume(request, files, size), input: Some(input) })
    }

    fn import_module(&self, request: &ImportRequest, parent: &PlannedBuildRef) -> Result<Imported> {
        let PlannedBuildRef { module: name, digest, vm } = parent;
        let missing = |message: String| Error::new(ErrorKind::NotFound, message).with_context("module", name);
        let kept =
            self.shared.module(name).filter(|kept| kept.module.digest == *digest).ok_or_else(|| {
                missing(format!("expected module {name} ({}), but it does not exist", digest.short()))
            })?;
        let machine = kept.module.machines.iter().find(|machine| machine.name == *vm);
        let machine = machine
            .ok_or_else(|| missing(format!("expected module {name} to have a VM {vm}, but it has none")))?;
        let disk = match &request.parent_disk {
            Some(wanted) => machine.disks.iter().find(|disk| disk.name == *wanted),
            None => machine.disks.first(),
        };
        let disk =
            disk.ok_or_else(|| missing(format!("expected VM {vm} to have the disk, but it does not")))?;
        let files = kept.disks.get(&disk.file).map(|files| (**files).clone()).unwrap_or_default();
        self.state().parents.insert(name.clone());
        let virtual_size = large_enough(request, disk.virtual_size)?;
        let role = InputRole::source(&request.machine);
        let input = InputRecord::new(role, format!("module {name}/{vm}"), disk.content.clone());
        Ok(Imported { volume: self.add_volume(request, files, virtual_size), input: Some(input) })
    }

    async fn import_url(
        &self,
        request: &ImportRequest,
        url: &PlannedUrl,
        progress: &Progress,
    ) -> Result<Imported> {
        let source = self.shared.source(url.url.as_str());
        let sha256 = source.transfer(url, progress).await?;
        let virtual_size = large_enough(request, source.virtual_size)?;
        let mut files = FileTree::of_a_system();
        for (path, content) in &source.files {
            files.put(path, content.clone(), 0o644);
        }
        let role = InputRole::source(&request.machine);
        let content = match self.shared.is_remote() {
            true => Content::unknown(),
            false => Content::of_bytes(source.served, sha256),
        };
        let input = InputRecord::new(role, public_url(&url.url), content);
        Ok(Imported { volume: self.add_volume(request, files, virtual_size), input: Some(input) })
    }
}

/// Returns the size of the disk: the requested one, which must not be smaller than the source.
fn large_enough(request: &ImportRequest, source: u64) -> Result<u64> {
    match request.size {
        Some(size) if size < source => Err(Error::new(
            ErrorKind::InvalidInput,
            format!(
                "expected disk {} to be large enough for the image of {source} bytes, but its size is {size}",
                request.disk
            ),
        )
        .with_help(format!("give the disk a size of at least {source}"))),
        size => Ok(size.unwrap_or(source)),
    }
}

/// An owner's handle of a lab: when the last one is dropped, the owner is dead.
#[derive(Debug)]
pub(super) struct MemoryLab {
    pub(super) core: Arc<LabCore>,
}

impl Drop for MemoryLab {
    fn drop(&mut self) {
        let (over, kept) = {
            let state = self.core.state();
            (state.over, state.kept)
        };
        if !over && !kept {
            self.core.end("its owner has ended");
            self.core.shared.orphan(&self.core);
        }
    }
}

#[async_trait]
impl Lab for MemoryLab {
    fn id(&self) -> &LabId {
        &self.core.id
    }

    fn versions(&self) -> BTreeMap<String, String> {
        BTreeMap::from([("memory".to_owned(), env!("CARGO_PKG_VERSION").to_owned())])
    }

    async fn import(&self, request: &ImportRequest, progress: &Progress) -> Result<Imported> {
        self.core.shared.check(Operation::Import)?;
        self.core.check_alive()?;
        let progress = &self.core.shared.visible_progress(progress);
        let imported = match &request.source {
            _ if request.kind == VolumeKind::Cdrom => self.core.import_cdrom(request, progress).await,
            PlannedSource::Url(url) => self.core.import_url(request, url, progress).await,
            PlannedSource::BuildRef(parent) => self.core.import_module(request, parent),
            PlannedSource::Blank => {
                let size = request.size.ok_or_else(|| {
                    Error::new(ErrorKind::InvalidInput, "expected a size for a blank disk, but there is none")
                })?;
                let files = FileTree::of_a_system();
                Ok(Imported { volume: self.core.add_volume(request, files, size), input: None })
            }
            _ => Err(Error::new(ErrorKind::Unsupported, "the memory backend does not support this source")),
        };
        // It may have been destroyed during the transfer.
        self.core.check_alive()?;
        imported.map_err(|error| {
            error.with_context(request.kind.name(), &request.disk).with_context("vm", &request.machine)
        })
    }

    async fn serve(&self, site: Site) -> Result<Served> {
        self.core.check_alive()?;
        let lab = Arc::downgrade(&self.core);
        // The machines of this backend are part of this process.
        let admit = move |caller| {
            let is_open = lab.upgrade().is_some_and(|lab| lab.check_alive().is_ok());
            match is_open && http::is_of_process(caller, std::process::id()) {
                true => Admission::Welcome,
                false => Admission::Refused,
            }
        };
        let server = Server::on_loopback(site, admit).await?;
        let names = self.core.subnets.iter().cloned();
        let addresses = names.map(|subnet| (subnet, Ipv4Addr::LOCALHOST)).collect();
        let port = server.port();
        Ok(Served::new(addresses, port, server))
    }

    async fn create_machine(&self, spec: &MachineSpec) -> Result<Arc<dyn Machine>> {
        self.core.shared.check(Operation::CreateMachine)?;
        self.core.check_alive()?;
        {
            let volumes = self.core.volumes.lock().unwrap_or_else(PoisonError::into_inner);
            let wanted = spec.disks.iter().map(|disk| &disk.volume).chain(&spec.cdroms);
            if let Some(missing) = wanted.into_iter().find(|volume| !volumes.contains_key(&volume.id)) {
                let message =
                    format!("expected a volume of lab {}, but found {:?}", self.core.id, missing.id);
                return Err(Error::new(ErrorKind::InvalidInput, message).with_context("vm", &spec.name));
            }
        }
        let mut state = self.core.state();
        if state.machines.iter().any(|machine| machine.spec.name == spec.name) {
            let message = format!("expected no VM {} in lab {}, but there is one", spec.name, self.core.id);
            return Err(Error::new(ErrorKind::Conflict, message));
        }
        let machine = MachineCore::new(
            spec.clone(),
            self.core.shared.clone(),
            self.core.volumes.clone(),
            self.core.id.to_string(),
        )?;
        let machine = Arc::new(machine);
        state.machines.push(machine.clone());
        Ok(Arc::new(MemoryMachine { core: machine, lab: self.core.clone() }))
    }

    async fn publish(&self, draft: ModuleDraft) -> Result<Module> {
        self.core.shared.check(Operation::Publish)?;
        self.core.check_alive()?;
        let mut disks = HashMap::new();
        for (machine, disk) in draft.machines.iter().flat_map(|m| m.disks.iter().map(move |disk| (m, disk))) {
            let known = self.core.state().captured.get(&disk.file).cloned();
            let (_, files) = known.filter(|(content, _)| *content == disk.content).ok_or_else(|| {
                let message = format!(
                    "expected disk {} of VM {} to have been captured, but it was not",
                    disk.name, machine.name
                );
                Error::new(ErrorKind::InvalidInput, message)
            })?;
            disks.insert(disk.file.clone(), files);
        }
        let digest = Module::content_digest(&draft.name, &draft.machines, &draft.network)?;
        let module = draft.into_module(digest);
        self.core.shared.keep_module(Kept { module, disks }).await
    }

    async fn machines(&self) -> Result<Vec<Arc<dyn Machine>>> {
        Ok(self.core.handles())
    }

    async fn keep(&self, expires: Option<SystemTime>) -> Result<Vec<String>> {
        self.core.shared.check(Operation::Keep)?;
        self.core.check_alive()?;
        if self.core.retention == Retention::EndWithOwner {
            let message =
                format!("lab {} ends with its owner, since it was not opened to be kept", self.core.id);
            return Err(Error::new(ErrorKind::InvalidInput, message));
        }
        let mut state = self.core.state();
        (state.kept, state.expires) = (true, expires);
        drop(state);
        self.core.shared.hold(&self.core);
        Ok(Vec::new())
    }

    async fn store_file(&self, name: &str, content: &[u8]) -> Result<Option<std::path::PathBuf>> {
        self.core.store(name, content)
    }

    async fn ownership_lost(&self) -> Error {
        self.core.lost.cancelled().await;
        let message = format!("this process has lost lab {}: it was taken away", self.core.id);
        Error::new(ErrorKind::Conflict, message)
    }

    async fn destroy(&self) -> Result<()> {
        self.core.shared.check(Operation::Destroy)?;
        self.core.end("its lab was destroyed");
        self.core.shared.forget(&self.core.id);
        Ok(())
    }
}
