//! A backend that wraps another one and intercepts chosen operations, to hang or to run code of the test.

use super::display::Display;
use async_trait::async_trait;
use rudder_core::{
    Error, ErrorKind, Result,
    backend::{
        Backend, BoxedStream, Exit, HostReport, ImportRequest, Imported, Lab, LabId, LabInfo, LabSpec,
        Machine, MachineSpec, ModuleDraft, Progress, ReapReport, SerialLog, Served, Site, Stop,
    },
    capability::{Capabilities, Capability},
    fetch::{Fetch, FetchRequest, Fetched},
    memory::{MemoryBackend, Operation},
    module::{CapturedDisk, CapturedState, Module},
};
use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::SystemTime,
};

/// What happens when an operation is called, before it is carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hook {
    /// The call never returns.
    Hangs,
    /// The call panics, like a bug in the backend.
    Panics,
}

/// The hooks of a test.
pub type Hooks = Arc<Vec<(Operation, Hook)>>;

#[derive(Debug)]
pub struct Hooked {
    inner: MemoryBackend,
    hooks: Hooks,
    capabilities: Capabilities,
    display: Option<Display>,
    faults: Arc<Faults>,
    specs: Specs,
}

/// What machines fail to do.
#[derive(Debug, Default)]
pub struct Faults {
    /// Whether requests for evidence never return.
    mute: AtomicBool,
    /// Whether new connections are refused.
    pub deaf: AtomicBool,
}

impl Hooked {
    pub fn new(inner: &MemoryBackend, hooks: &[(Operation, Hook)]) -> Self {
        let capabilities = inner.capabilities().clone();
        Self {
            inner: inner.clone(),
            hooks: Arc::new(hooks.to_vec()),
            capabilities,
            display: None,
            faults: Arc::default(),
            specs: Specs::default(),
        }
    }

    /// Returns the specs of its machines.
    pub fn specs(&self) -> Specs {
        Arc::clone(&self.specs)
    }

    /// Returns the faults of its machines.
    pub fn faults(&self) -> Arc<Faults> {
        Arc::clone(&self.faults)
    }

    /// Makes all requests for evidence hang.
    pub fn mute(mut self) -> Self {
        let more = self.capabilities.iter().chain([Capability::Display, Capability::Screenshot]);
        self.capabilities = Capabilities::new("memory", more);
        self.faults.mute.store(true, SeqCst);
        self
    }

    /// Gives its machines this display.
    pub fn with_display(mut self, display: Display) -> Self {
        let more = self.capabilities.iter().chain([Capability::Display]);
        self.capabilities = Capabilities::new("memory", more);
        self.display = Some(display);
        self
    }
}

/// The specs of the machines of a build.
pub type Specs = Arc<Mutex<Vec<MachineSpec>>>;

#[derive(Debug)]
struct HookedLab(Arc<dyn Lab>, Hooks, Option<Display>, Specs, Arc<Faults>);

#[derive(Debug)]
struct HookedMachine(Arc<dyn Machine>, Hooks, Option<Display>, Arc<Faults>);

impl HookedMachine {
    async fn evidence(&self) {
        if self.3.mute.load(SeqCst) {
            std::future::pending::<()>().await;
        }
    }
}

async fn reach(hooks: &Hooks, operation: Operation) {
    match hooks.iter().find(|(of, _)| *of == operation) {
        Some((_, Hook::Hangs)) => std::future::pending().await,
        Some((_, Hook::Panics)) => panic!("a bug in {operation:?}"),
        None => {}
    }
}

#[derive(Debug)]
struct HookedFetcher(Arc<dyn Fetch>, Hooks);

#[async_trait]
impl Fetch for HookedFetcher {
    async fn fetch(&self, request: &FetchRequest, progress: &Progress) -> Result<Fetched> {
        reach(&self.1, Operation::Fetch).await;
        self.0.fetch(request, progress).await
    }
}

#[async_trait]
impl Backend for Hooked {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn fetcher(&self) -> Arc<dyn Fetch> {
        Arc::new(HookedFetcher(self.inner.fetcher(), Arc::clone(&self.hooks)))
    }

    async fn diagnose(&self) -> Result<HostReport> {
        self.inner.diagnose().await
    }

    async fn open_lab(&self, spec: &LabSpec) -> Result<Arc<dyn Lab>> {
        reach(&self.hooks, Operation::OpenLab).await;
        let lab = self.inner.open_lab(spec).await?;
        let (hooks, specs) = (Arc::clone(&self.hooks), Arc::clone(&self.specs));
        Ok(Arc::new(HookedLab(lab, hooks, self.display.clone(), specs, self.faults())))
    }

    async fn modules(&self) -> Result<Vec<Module>> {
        self.inner.modules().await
    }

    async fn remove_module(&self, name: &str) -> Result<()> {
        self.inner.remove_module(name).await
    }

    async fn labs(&self) -> Result<Vec<LabInfo>> {
        self.inner.labs().await
    }

    async fn attach(&self, id: &LabId) -> Result<Arc<dyn Lab>> {
        self.inner.attach(id).await
    }

    async fn lab_file(&self, id: &LabId, name: &str) -> Result<Option<Vec<u8>>> {
        self.inner.lab_file(id, name).await
    }

    async fn remove_lab(&self, id: &LabId) -> Result<()> {
        Backend::remove_lab(&self.inner, id).await
    }

    async fn reap(&self) -> Result<ReapReport> {
        self.inner.reap().await
    }

    async fn collect(&self) -> Result<ReapReport> {
        self.inner.collect().await
    }
}

#[async_trait]
impl Lab for HookedLab {
    fn id(&self) -> &LabId {
        self.0.id()
    }

    fn versions(&self) -> BTreeMap<String, String> {
        self.0.versions()
    }

    async fn import(&self, request: &ImportRequest, progress: &Progress) -> Result<Imported> {
        reach(&self.1, Operation::Import).await;
        self.0.import(request, progress).await
    }

    async fn serve(&self, site: Site) -> Result<Served> {
        self.0.serve(site).await
    }

    async fn create_machine(&self, spec: &MachineSpec) -> Result<Arc<dyn Machine>> {
        reach(&self.1, Operation::CreateMachine).await;
        self.3.lock().unwrap().push(spec.clone());
        let machine = self.0.create_machine(spec).await?;
        Ok(Arc::new(HookedMachine(machine, Arc::clone(&self.1), self.2.clone(), Arc::clone(&self.4))))
    }

    async fn publish(&self, draft: ModuleDraft) -> Result<Module> {
        reach(&self.1, Operation::Publish).await;
        self.0.publish(draft).await
    }

    async fn machines(&self) -> Result<Vec<Arc<dyn Machine>>> {
        self.0.machines().await
    }

    async fn keep(&self, expires: Option<SystemTime>) -> Result<Vec<String>> {
        reach(&self.1, Operation::Keep).await;
        self.0.keep(expires).await
    }

    /// Stores the file where programs on this host do not find it.
    async fn store_file(&self, name: &str, content: &[u8]) -> Result<Option<PathBuf>> {
        self.0.store_file(name, content).await.map(|_| None)
    }

    async fn ownership_lost(&self) -> Error {
        self.0.ownership_lost().await
    }

    async fn destroy(&self) -> Result<()> {
        reach(&self.1, Operation::Destroy).await;
        self.0.destroy().await
    }
}

#[async_trait]
impl Machine for HookedMachine {
    fn name(&self) -> &str {
        self.0.name()
    }

    async fn start(&self) -> Result<()> {
        reach(&self.1, Operation::Start).await;
        self.0.start().await
    }

    async fn wait(&self) -> Result<Exit> {
        self.0.wait().await
    }

    async fn stop(&self, how: Stop) -> Result<Exit> {
        self.0.stop(how).await
    }

    async fn dial(&self, port: u16) -> Result<BoxedStream> {
        if self.3.deaf.load(SeqCst) {
            return Err(Error::new(ErrorKind::GuestUnreachable, "connection refused"));
        }
        self.0.dial(port).await
    }

    async fn display(&self) -> Result<BoxedStream> {
        self.evidence().await;
        match &self.2 {
            Some(display) => display.connect(),
            None => self.0.display().await,
        }
    }

    async fn serial(&self) -> Result<BoxedStream> {
        self.0.serial().await
    }

    async fn serial_log(&self, from: u64) -> Result<SerialLog> {
        self.evidence().await;
        self.0.serial_log(from).await
    }

    async fn screenshot(&self) -> Result<Vec<u8>> {
        self.evidence().await;
        self.0.screenshot().await
    }

    fn reachable_at(&self, port: u16) -> Option<SocketAddr> {
        // As if the machine were behind a forwarded port, so that command lines can be tested.
        self.0.reachable_at(port).or(Some(SocketAddr::from(([127, 0, 0, 1], 40_000 + port))))
    }

    fn access(&self) -> Vec<String> {
        self.0.access()
    }

    async fn capture(&self, disk: &str, progress: &Progress) -> Result<CapturedDisk> {
        reach(&self.1, Operation::Capture).await;
        self.0.capture(disk, progress).await
    }

    async fn capture_state(&self) -> Result<Vec<CapturedState>> {
        self.0.capture_state().await
    }
}
