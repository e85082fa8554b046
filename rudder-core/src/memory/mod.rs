//! An in-memory backend: machines scripted by a test, with a real SSH server on the other end of
//! [`Machine::dial`](crate::backend::Machine::dial), so that whole builds run in milliseconds.
//!
//! A machine has a file system on its boot disk. It survives reboots, is captured, and is inherited by what is built on
//! the module. Files are uploaded to it over SFTP. There is no shell: [rules](Guest::on) answer scripts, `reboot` and
//! `poweroff` do what they say, and all other scripts succeed. [`MemoryBackend::executions`] returns what machines were
//! asked to run. All waiting uses tokio's time, so a test with a paused clock does not wait.
//!
//! Nothing here boots, nothing is downloaded, and a captured disk is a list of files: the backend tests what a program
//! does with builds, not what a guest does.
//!
//! # Example
//! A manifest becomes a module, and nothing is left behind:
//!
//! ```
//! use rudder_core::{
//!     backend::Backend,
//!     build::Build,
//!     memory::{MemoryBackend, Response},
//!     plan::{PlanContext, prepare},
//! };
//! use std::{error::Error, sync::Arc};
//!
//! const MANIFEST: &[u8] = b"
//! name: site
//! files: [{name: index.html, inline: hello}]
//! vms:
//!   - name: web
//!     source: {url: https://images.example/debian.qcow2}
//!     resources: {cpu: 1, memory: 512Mi}
//!     cloudInit: {}
//!     provisioners:
//!       - {type: shell, shell: {inline: 'apt-get install nginx'}}
//!       - {type: file, file: {fileRef: index.html, destination: /srv/index.html}}
//! ";
//!
//! #[tokio::main(flavor = "current_thread")]
//! async fn main() -> Result<(), Box<dyn Error>> {
//!     let nginx = Response::ok("Setting up nginx\n").writes("/etc/nginx/nginx.conf", "worker_processes 1;\n");
//!     let backend = Arc::new(MemoryBackend::new().machine("web", |guest| guest.on("apt-get", nginx)));
//!
//!     let context = PlanContext::new(backend.capabilities());
//!     for plan in prepare("site.yaml", MANIFEST, &context).into_plans()? {
//!         Build::new(plan, backend.clone()).start().outcome().await?;
//!     }
//!     assert_eq!(backend.read_file("site", "web", "/srv/index.html").as_deref(), Some(&b"hello"[..]));
//!     assert!(backend.read_file("site", "web", "/etc/nginx/nginx.conf").is_some());
//!     assert_eq!(backend.leftovers().await, Vec::<String>::new());
//!     Ok(())
//! }
//! ```

mod answer;
mod display;
mod download;
mod files;
mod hardware;
mod inventory;
mod lab;
mod machine;
mod persist;
mod registry;
mod rules;
mod script;
mod sftp;
mod ssh;
mod streams;
#[cfg(test)]
mod tests;

pub use display::Typed;
pub use inventory::Inventory;
pub use rules::{Execution, Response};
pub use script::{Fault, Guest, Operation, Silence, Source};

use crate::{
    Error, ErrorKind, Result,
    backend::{
        Backend, HostFinding, HostReport, Lab, LabId, LabInfo, LabSpec, LabState, Progress, ProgressEvent,
        ReapReport, Retention,
    },
    capability::{Capabilities, Capability},
    fetch::Fetch,
    module::{DamagedModule, Module},
};
use async_trait::async_trait;
use display::Terminal;
use download::MemoryFetcher;
use inventory::Counted;
use lab::{LabCore, MemoryLab};
use persist::Kept;
use registry::{LabRecord, Registry};
use std::{
    collections::{BTreeMap, HashMap},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::AtomicUsize},
};

/// An in-memory backend. Clones share their state.
#[derive(Debug, Clone)]
pub struct MemoryBackend {
    capabilities: Capabilities,
    shared: Arc<Shared>,
}

/// State shared by the handles of a backend and by its labs and machines.
#[derive(Debug, Default)]
struct Shared {
    script: Mutex<Script>,
    registry: Mutex<Registry>,
    connections: Arc<AtomicUsize>,
    tasks: Arc<AtomicUsize>,
}

#[derive(Debug, Default)]
struct Script {
    every: Guest,
    machines: BTreeMap<String, Guest>,
    sources: BTreeMap<String, Source>,
    faults: Vec<(Operation, Fault)>,
    power_ons: HashMap<String, u32>,
    /// Screens and keyboards of the last power-ons, by machine.
    terminals: HashMap<String, Arc<Terminal>>,
    /// What machines were asked to run, by machine.
    executions: HashMap<String, Vec<Execution>>,
    root: Option<PathBuf>,
    /// Whether to behave like a backend that shares nothing with this host.
    remote: bool,
}

impl Default for MemoryBackend {
    fn default() -> Self {
        use Capability as C;
        let capabilities = Capabilities::new(
            "memory",
            [
                C::SourceUrl,
                C::SourceBlank,
                C::SourceBuildRef,
                C::DiskVirtio,
                C::DiskScsi,
                C::DiskSata,
                C::DiskUsb,
                C::DiskIde,
                C::NicModels,
                C::NicSlots,
                C::CloudInit,
                C::Isos,
                C::Floppy,
                C::HttpDirectory,
                C::Serial,
                C::HalfClose,
                C::Display,
            ],
        );
        Self { capabilities, shared: Arc::default() }
    }
}

impl MemoryBackend {
    /// Returns a backend without modules, whose guests all behave.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Scripts the machines with this name, in every lab.
    #[must_use]
    pub fn machine(self, name: impl Into<String>, script: impl FnOnce(Guest) -> Guest) -> Self {
        let mut scripts = self.shared.script();
        let name = name.into();
        let guest = scripts.machines.get(&name).unwrap_or(&scripts.every).clone();
        scripts.machines.insert(name, script(guest));
        drop(scripts);
        self
    }

    /// Scripts every machine that has no script under its own name.
    #[must_use]
    pub fn every_machine(self, script: impl FnOnce(Guest) -> Guest) -> Self {
        let mut scripts = self.shared.script();
        scripts.every = script(scripts.every.clone());
        drop(scripts);
        self
    }

    /// Behaves like a backend that shares nothing with this host, such as a cluster: labs have no directory, imports
    /// report neither the size nor the digest of what they imported, and captured disks are identified by names that
    /// mean something to this backend alone, and displays are read compressed. The backend is called `memory-remote`.
    #[must_use]
    pub fn remote(mut self) -> Self {
        self.shared.script().remote = true;
        self.capabilities = Capabilities::new("memory-remote", self.capabilities.iter());
        self
    }

    /// Scripts the content behind a URL.
    #[must_use]
    pub fn source(self, url: impl Into<String>, script: impl FnOnce(Source) -> Source) -> Self {
        let mut scripts = self.shared.script();
        let url = url.into();
        let source = scripts.sources.get(&url).cloned().unwrap_or_default();
        scripts.sources.insert(url, script(source));
        drop(scripts);
        self
    }

    /// Makes an operation fail.
    #[must_use]
    pub fn fails(self, operation: Operation, fault: Fault) -> Self {
        self.shared.script().faults.push((operation, fault));
        self
    }

    /// Claims these capabilities instead of the real ones, to test how a program handles a refused plan.
    #[must_use]
    pub fn with_capabilities(mut self, capabilities: impl IntoIterator<Item = Capability>) -> Self {
        self.capabilities = Capabilities::new("memory", capabilities);
        self
    }

    /// Also writes modules as files, at `DIR/memory/NAME/module.json` in this directory, and reads those that exist.
    /// Nothing else in the directory is touched.
    ///
    /// # Errors
    /// File errors. Modules that cannot be used are [reported](Backend::damaged_modules).
    pub fn store(self, directory: impl Into<PathBuf>) -> Result<Self> {
        let given = directory.into();
        let directory = std::fs::create_dir_all(&given)
            .and_then(|()| std::path::absolute(&given))
            .map_err(|error| Error::io(format!("open {}", given.display()), error))?;
        let persist::Found { usable, damaged } = persist::load(&directory)?;
        let mut registry = self.shared.registry();
        registry.modules.extend(usable.into_iter().map(|kept| (kept.module.name.clone(), kept)));
        registry.damaged = damaged;
        drop(registry);
        self.shared.script().root = Some(directory);
        Ok(self)
    }
}

impl Shared {
    fn script(&self) -> MutexGuard<'_, Script> {
        self.script.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn registry(&self) -> MutexGuard<'_, Registry> {
        self.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether this backend behaves like one that shares nothing with this host.
    fn is_remote(&self) -> bool {
        self.script().remote
    }

    /// Progress as this backend reports it: a remote backend does not know the total.
    fn visible_progress(&self, progress: &Progress) -> Progress {
        let progress = progress.clone();
        match self.is_remote() {
            false => progress,
            true => Progress::new(move |event| match event {
                ProgressEvent::Bytes { task, done, .. } => progress.bytes(&task, done, None),
                ProgressEvent::Notice(message) => progress.notice(message),
            }),
        }
    }

    /// Fails when the test scripted this operation to fail now.
    fn check(&self, operation: Operation) -> Result<()> {
        let script = self.script();
        let due = |(of, fault): &&(Operation, Fault)| *of == operation && fault.budget.take();
        script.faults.iter().find(due).map_or(Ok(()), |(_, fault)| Err(fault.error()))
    }

    fn source(&self, url: &str) -> Source {
        self.script().sources.get(url).cloned().unwrap_or_default()
    }

    /// Returns how a machine with this name behaves from this power-on until the next.
    fn guest_for_power_on(&self, name: &str) -> Guest {
        let mut script = self.script();
        let power_ons = script.power_ons.entry(name.to_owned()).or_default();
        *power_ons += 1;
        let count = *power_ons;
        let guest = script.machines.get(name).unwrap_or(&script.every);
        let mut guest = guest.clone();
        if guest.faulty_boots.is_some_and(|faulty| count > faulty) {
            guest.faults = Default::default();
        }
        guest
    }

    fn executed(&self, machine: &str, execution: Execution) {
        self.script().executions.entry(machine.to_owned()).or_default().push(execution);
    }

    fn connection(&self) -> Counted {
        Counted::new(&self.connections)
    }

    fn task(&self) -> Counted {
        Counted::new(&self.tasks)
    }

    fn module(&self, name: &str) -> Option<Kept> {
        self.registry().modules.get(name).cloned()
    }

    async fn keep_module(&self, mut kept: Kept) -> Result<Module> {
        let root = self.script().root.clone();
        if let Some(root) = root {
            let saved =
                tokio::task::spawn_blocking(move || persist::save(&root, &mut kept).map(|()| kept)).await;
            kept = saved
                .map_err(|error| Error::new(ErrorKind::Internal, "a task panicked").with_source(error))??;
        }
        let module = kept.module.clone();
        let mut registry = self.registry();
        registry.damaged.retain(|damaged| damaged.name != module.name);
        registry.modules.insert(module.name.clone(), kept);
        drop(registry);
        Ok(module)
    }

    fn orphan(&self, core: &LabCore) {
        if let Some(record) = self.registry().labs.get_mut(&core.id) {
            *record = LabRecord::Orphaned(core.name.clone());
        }
    }

    fn hold(&self, core: &Arc<LabCore>) {
        self.registry().labs.insert(core.id.clone(), LabRecord::Kept(core.clone()));
    }

    fn forget(&self, id: &LabId) {
        self.registry().labs.remove(id);
    }
}

#[async_trait]
impl Backend for MemoryBackend {
    fn name(&self) -> &str {
        &self.capabilities.of
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn fetcher(&self) -> Arc<dyn Fetch> {
        Arc::new(MemoryFetcher(Arc::clone(&self.shared)))
    }

    async fn diagnose(&self) -> Result<HostReport> {
        let finding = HostFinding {
            what: "memory".into(),
            present: true,
            required: true,
            detail: "machines are simulated in this process; nothing boots".into(),
            help: None,
        };
        Ok(HostReport { findings: vec![finding] })
    }

    async fn open_lab(&self, spec: &LabSpec) -> Result<Arc<dyn Lab>> {
        crate::runtime::check()?;
        self.shared.check(Operation::OpenLab)?;
        let core = Arc::new(LabCore::new(spec, self.shared.clone()));
        let mut registry = self.shared.registry();
        registry.labs.retain(|_, record| !matches!(record, LabRecord::Orphaned(_)));
        if registry.labs.contains_key(&spec.id) {
            let message = format!("expected no lab {}, but there is one", spec.id);
            return Err(Error::new(ErrorKind::Conflict, message));
        }
        let record = match spec.retention {
            Retention::UntilRemoved { .. } => LabRecord::Kept(Arc::clone(&core)),
            _ => LabRecord::Owned(Arc::downgrade(&core)),
        };
        registry.labs.insert(spec.id.clone(), record);
        Ok(Arc::new(MemoryLab { core }))
    }

    async fn labs(&self) -> Result<Vec<LabInfo>> {
        Ok(self.shared.registry().labs.iter().map(|(id, record)| record.info(id)).collect())
    }

    async fn attach(&self, id: &LabId) -> Result<Arc<dyn Lab>> {
        let registry = self.shared.registry();
        let record = registry.labs.get(id).ok_or_else(|| no_lab(id))?;
        match record {
            LabRecord::Kept(core) if record.info(id).is_kept() => {
                Ok(Arc::new(MemoryLab { core: core.clone() }))
            }
            _ => {
                let message = format!("expected lab {id} to be kept, but it is not");
                Err(Error::new(ErrorKind::Conflict, message))
            }
        }
    }

    async fn lab_file(&self, id: &LabId, name: &str) -> Result<Option<Vec<u8>>> {
        let registry = self.shared.registry();
        let record = registry.labs.get(id).ok_or_else(|| no_lab(id))?;
        Ok(record.core().and_then(|core| core.file(name)))
    }

    async fn modules(&self) -> Result<Vec<Module>> {
        Ok(self.shared.registry().modules.values().map(|kept| kept.module.clone()).collect())
    }

    async fn damaged_modules(&self) -> Result<Vec<DamagedModule>> {
        Ok(self.shared.registry().damaged.clone())
    }

    async fn remove_module(&self, name: &str) -> Result<()> {
        let root = self.shared.script().root.clone();
        let mut registry = self.shared.registry();
        let is_damaged = registry.damaged.iter().any(|module| module.name == name);
        if !is_damaged && !registry.modules.contains_key(name) {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!("expected a module {name}, but there is none"),
            ));
        }
        let user = registry.labs.iter().find(|(_, lab)| lab.core().is_some_and(|core| core.builds_on(name)));
        if let Some((id, _)) = user {
            let message = format!("expected module {name} to be unused, but lab {id} uses it");
            return Err(Error::new(ErrorKind::Conflict, message));
        }
        if let Some(root) = root {
            persist::remove(&root, name)?;
        }
        registry.damaged.retain(|module| module.name != name);
        registry.modules.remove(name);
        Ok(())
    }

    async fn remove_lab(&self, id: &LabId) -> Result<()> {
        let mut registry = self.shared.registry();
        let core = match registry.labs.get(id) {
            Some(LabRecord::Kept(core)) => core.clone(),
            Some(LabRecord::Owned(_)) => {
                let message = format!("expected lab {id} to have no owner, but its owner is running");
                return Err(Error::new(ErrorKind::Conflict, message));
            }
            Some(LabRecord::Orphaned(_)) | None => return Err(no_lab(id)),
        };
        registry.labs.remove(id);
        drop(registry);
        core.end("its lab was removed");
        Ok(())
    }

    async fn reap(&self) -> Result<ReapReport> {
        let mut report = ReapReport::default();
        let mut expired = Vec::new();
        self.shared.registry().labs.retain(|id, record| {
            let is_abandoned = record.info(id).state == LabState::Abandoned;
            if is_abandoned {
                report.removed.push(format!("lab {id}"));
                expired.extend(record.core());
            }
            !is_abandoned
        });
        expired.iter().for_each(|core| core.end("its lab has expired"));
        Ok(report)
    }

    async fn collect(&self) -> Result<ReapReport> {
        Ok(ReapReport::default())
    }
}

fn no_lab(id: &LabId) -> Error {
    Error::new(ErrorKind::NotFound, format!("expected a lab {id}, but there is none"))
}
