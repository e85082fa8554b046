//! A lab with one fault.

use super::{Defect, Shared, cut, error, lock, machine::BrokenMachine};
use async_trait::async_trait;
use rudder_core::{
    ErrorKind, Result,
    backend::{
        ImportRequest, Imported, Lab, LabId, Machine, MachineSpec, ModuleDraft, Progress, Served, Site,
    },
    digest::Digest,
    hardware::Firmware,
    module::Module,
    plan::{PlannedBuildRef, PlannedSource},
};
use std::{
    collections::BTreeMap,
    net::Ipv4Addr,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};
use tokio::{io::AsyncReadExt as _, io::AsyncWriteExt as _, net::TcpListener};
use tokio_util::task::AbortOnDropHandle;

#[derive(Debug)]
pub(super) struct BrokenLab {
    inner: Arc<dyn Lab>,
    shared: Arc<Shared>,
    destroyed: Arc<AtomicBool>,
    is_attached: bool,
}

impl BrokenLab {
    pub(super) fn new(inner: Arc<dyn Lab>, shared: Arc<Shared>) -> Self {
        Self { inner, shared, destroyed: Arc::default(), is_attached: false }
    }

    /// Wraps a lab that was attached to.
    pub(super) fn attached(inner: Arc<dyn Lab>, shared: Arc<Shared>) -> Self {
        Self { inner, shared, destroyed: Arc::default(), is_attached: true }
    }

    /// Returns the digest of the firmware variables that a machine starts with.
    async fn variables(&self, spec: &MachineSpec) -> Result<Option<Digest>> {
        if spec.firmware == Firmware::Bios {
            return Ok(None);
        }
        let fresh = Digest::of(format!("{} {}", self.inner.id(), spec.name).as_bytes());
        let parent = spec.state_of.as_ref().filter(|_| !self.shared.is(Defect::ForgetsInheritedState));
        let Some(PlannedBuildRef { module, vm, .. }) = parent else { return Ok(Some(fresh)) };
        let modules = self.shared.inner.modules().await?;
        let machines = modules.iter().filter(|found| found.name == *module).flat_map(|found| &found.machines);
        let machine = machines.into_iter().find(|machine| machine.name == *vm);
        Ok(machine
            .and_then(|machine| machine.state.first())
            .and_then(|state| state.content.sha256())
            .or(Some(fresh)))
    }

    /// Serves files to every caller.
    async fn serve_every_process(&self, site: Site) -> Result<Served> {
        let failed = |source| rudder_core::Error::io("listen", source);
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.map_err(failed)?;
        let port = listener.local_addr().map_err(failed)?.port();
        let (destroyed, forever) = (Arc::clone(&self.destroyed), self.shared.is(Defect::ServesWithoutItsLab));
        let server = tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                if destroyed.load(Ordering::SeqCst) && !forever {
                    continue;
                }
                let mut request = [0; 1024];
                let read = stream.read(&mut request).await.unwrap_or_default();
                let request = String::from_utf8_lossy(&request[..read]);
                let path = request.split(' ').nth(1).unwrap_or_default().trim_start_matches('/');
                let answer = match site.files.get(path) {
                    Some(file) => {
                        let bytes = file.read().await.unwrap_or_default();
                        [b"HTTP/1.0 200 OK\r\n\r\n".as_slice(), &bytes].concat()
                    }
                    None => b"HTTP/1.0 404 Not Found\r\n\r\n".to_vec(),
                };
                let _ = stream.write_all(&answer).await;
            }
        });
        let addresses = BTreeMap::from([("default".to_owned(), Ipv4Addr::LOCALHOST)]);
        Ok(Served::new(addresses, port, AbortOnDropHandle::new(server)))
    }
}

#[async_trait]
impl Lab for BrokenLab {
    fn id(&self) -> &LabId {
        self.inner.id()
    }

    fn versions(&self) -> BTreeMap<String, String> {
        if self.shared.is(Defect::HidesVersions) { BTreeMap::new() } else { self.inner.versions() }
    }

    async fn import(&self, request: &ImportRequest, progress: &Progress) -> Result<Imported> {
        let mut request = request.clone();
        if let PlannedSource::Url(url) = &mut request.source {
            if self.shared.is(Defect::SkipsDigestCheck) {
                url.sha256 = None;
            }
            if self.shared.is(Defect::IgnoresSizes) {
                request.size = None;
            }
        }
        if self.shared.is(Defect::ImportsTheFirstDisk) {
            request.parent_disk = None;
        }
        let mut imported = self.inner.import(&request, &self.shared.progress(progress)).await?;
        if let (PlannedSource::Url(url), true) = (&request.source, self.shared.is(Defect::SharesVolumes)) {
            let key = format!("{} {} {:?}", self.inner.id(), url.url, request.size);
            imported.volume = lock(&self.shared.volumes).entry(key).or_insert(imported.volume).clone();
        }
        Ok(imported)
    }

    async fn serve(&self, site: Site) -> Result<Served> {
        match self.shared.defect {
            Defect::ServesEveryProcess | Defect::ServesWithoutItsLab => self.serve_every_process(site).await,
            _ => self.inner.serve(site).await,
        }
    }

    async fn create_machine(&self, spec: &MachineSpec) -> Result<Arc<dyn Machine>> {
        let variables = self.variables(spec).await?;
        let mut spec = spec.clone();
        spec.firmware = Firmware::Bios;
        match self.shared.defect {
            Defect::CleansNames => spec.name.retain(|character| character.is_ascii_alphanumeric()),
            Defect::CutsNames => spec.name = cut(&spec.name),
            Defect::IgnoresHardware => (spec.cpus, spec.memory) = (1, 64 << 20),
            Defect::CopiesHardware => {
                let own = (spec.cpus, spec.memory);
                let mut hardware = lock(&self.shared.hardware);
                (spec.cpus, spec.memory) = *hardware.entry(self.inner.id().clone()).or_insert(own);
            }
            Defect::ReordersNics => {
                let slots: Vec<u8> = spec.nics.iter().rev().map(|nic| nic.slot).collect();
                spec.nics.iter_mut().zip(slots).for_each(|(nic, slot)| nic.slot = slot);
            }
            Defect::InventsAddresses => {
                for nic in &mut spec.nics {
                    let digest = Digest::of(nic.mac.to_string().as_bytes());
                    let [a, b, c, ..] = *digest.as_bytes();
                    nic.mac = rudder_core::units::MacAddress::new([0x52, 0x54, 0, a, b, c]);
                }
            }
            Defect::MixesSeeds => {
                lock(&self.shared.seed).clone_from(&spec.seed);
                tokio::time::sleep(Duration::from_millis(20)).await;
                spec.seed.clone_from(&lock(&self.shared.seed));
            }
            _ => {}
        }
        let inner = self.inner.create_machine(&spec).await?;
        lock(&self.shared.machines).push(Arc::downgrade(&inner));
        let key = format!("{}/{}", self.inner.id(), spec.name);
        let disk = spec.disks.first().map(|disk| disk.name.clone()).unwrap_or_default();
        Ok(Arc::new(BrokenMachine::new(inner, Arc::clone(&self.shared), key, disk, variables)))
    }

    async fn publish(&self, mut draft: ModuleDraft) -> Result<Module> {
        match self.shared.defect {
            Defect::PublishesParts => {
                draft.machines.iter_mut().for_each(|machine| machine.disks.truncate(1));
            }
            Defect::CutsNamesOfModules => draft.name = cut(&draft.name),
            Defect::ReplacesTooEarly => {
                // The module may not exist.
                let _ = self.shared.inner.remove_module(&draft.name).await;
            }
            _ => {}
        }
        self.inner.publish(draft).await
    }

    async fn machines(&self) -> Result<Vec<Arc<dyn Machine>>> {
        match self.is_attached && self.shared.is(Defect::HidesMachinesOfAttachedLabs) {
            true => Ok(Vec::new()),
            false => self.inner.machines().await,
        }
    }

    async fn keep(&self, expires: Option<SystemTime>) -> Result<Vec<String>> {
        match self.inner.keep(expires).await {
            Err(error) if error.kind() == ErrorKind::InvalidInput && self.shared.is(Defect::KeepsAnyLab) => {
                Ok(Vec::new())
            }
            kept => kept,
        }
    }

    async fn store_file(&self, name: &str, content: &[u8]) -> Result<Option<PathBuf>> {
        self.inner.store_file(name, content).await
    }

    async fn destroy(&self) -> Result<()> {
        let again = self.destroyed.swap(true, Ordering::SeqCst);
        if again && self.shared.is(Defect::DestroysOnce) {
            return Err(error(ErrorKind::NotFound, "there is no such lab"));
        }
        if !again && self.shared.is(Defect::ForgetsAVolume) {
            lock(&self.shared.leaked).push(format!("a volume of lab {}", self.inner.id()));
        }
        self.inner.destroy().await
    }
}

impl Drop for BrokenLab {
    fn drop(&mut self) {
        if self.is_attached && self.shared.is(Defect::EndsWhatItDetachesFrom) {
            let id = self.inner.id().clone();
            self.shared.memory.kill_machine(&id, "web", rudder_core::backend::Death::Hypervisor);
        }
    }
}
