//! A backend in memory: machines that a test scripts, with a real SSH server on the other end of
//! [`Machine::dial`], so that whole builds run in milliseconds.
//!
//! A machine has a file system on its boot disk. It survives reboots, is captured, and is inherited by what is built on the
//! module. Scripts are interpreted by a small shell that knows the language and the commands that builds need most (`echo`,
//! `exit`, `cat`, `mkdir`, `test`, `sudo`, `reboot`…); every other command succeeds, unless a rule says otherwise. All waiting is tokio's, so a test
//! with a paused clock does not wait.
//!
//! Nothing here boots, nothing is downloaded, and a captured disk is a list of files: the backend proves what a program
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
//! vms:
//!   - name: web
//!     source: {url: https://images.example/debian.qcow2}
//!     resources: {cpu: 1, memory: 512Mi}
//!     cloudInit: {}
//!     provisioners:
//!       - {type: shell, shell: {inline: 'apt-get install nginx'}}
//!       - {type: shell, shell: {inline: 'echo hello > /srv/index.html'}}
//! ";
//!
//! #[tokio::main(flavor = "current_thread")]
//! async fn main() -> Result<(), Box<dyn Error>> {
//!     let nginx = Response::ok("Setting up nginx\n");
//!     let backend = Arc::new(MemoryBackend::new().machine("web", |guest| guest.on("apt-get", nginx)));
//!
//!     let context = PlanContext::new(backend.capabilities());
//!     for plan in prepare("site.yaml", MANIFEST, &context).into_plans()? {
//!         Build::new(plan, backend.clone()).start().outcome().await?;
//!     }
//!     assert_eq!(backend.read_file("site", "web", "/srv/index.html").as_deref(), Some(&b"hello\n"[..]));
//!     assert_eq!(backend.leftovers().await, Vec::<String>::new());
//!     Ok(())
//! }
//! ```

mod display;
mod download;
mod files;
mod hardware;
mod lab;
mod machine;
mod persist;
mod script;
mod sftp;
mod shell;
mod ssh;
mod streams;
#[cfg(test)]
mod tests;

pub use display::Typed;
pub use script::{Fault, Guest, Operation, Response, Silence, Source};

use crate::{
    Error, ErrorKind, Result,
    backend::{Backend, Death, HostFinding, HostReport, KeptLab, Lab, LabId, LabSpec, Machine, ReapReport},
    capability::{Capabilities, Capability},
    fetch::Fetch,
    module::{DamagedModule, Module},
};
use async_trait::async_trait;
use display::Terminal;
use download::MemoryFetcher;
use lab::{LabCore, MemoryLab};
use persist::Kept;
use std::{
    collections::{BTreeMap, HashMap},
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicUsize, Ordering},
    },
};

/// A backend in memory. Clones are handles of the same.
#[derive(Debug, Clone)]
pub struct MemoryBackend {
    capabilities: Capabilities,
    shared: Arc<Shared>,
}

/// What the handles of a backend, its labs and machines share.
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
    root: Option<PathBuf>,
}

#[derive(Debug, Default)]
struct Registry {
    labs: BTreeMap<LabId, LabRecord>,
    modules: BTreeMap<String, Kept>,
    damaged: Vec<DamagedModule>,
}

#[derive(Debug)]
enum LabRecord {
    /// Its owner holds it.
    Owned(Weak<LabCore>),
    /// It was kept for inspection.
    Kept(Arc<LabCore>),
    /// Its owner dropped it without destroying it.
    Orphaned,
}

impl LabRecord {
    fn core(&self) -> Option<Arc<LabCore>> {
        match self {
            Self::Owned(core) => core.upgrade(),
            Self::Kept(core) => Some(core.clone()),
            Self::Orphaned => None,
        }
    }
}

/// Counts something for as long as it lives.
#[derive(Debug)]
struct Counted(Arc<AtomicUsize>);

impl Counted {
    fn new(counter: &Arc<AtomicUsize>) -> Self {
        counter.fetch_add(1, Ordering::SeqCst);
        Self(counter.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// What there is in a [`MemoryBackend`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Inventory {
    /// Labs that were not destroyed; one whose owner is gone says so.
    pub labs: Vec<String>,
    /// Machines that run, as `LAB/VM`.
    pub running: Vec<String>,
    /// Connections to guests that are open.
    pub connections: usize,
    /// Commands that run, and things that guests are about to do.
    pub tasks: usize,
    /// Modules.
    pub modules: Vec<String>,
}

impl Inventory {
    /// Everything but modules, a line each; empty when nothing was left behind.
    #[must_use]
    pub fn leftovers(&self) -> Vec<String> {
        let mut all: Vec<String> = self.labs.iter().map(|lab| format!("lab {lab}")).collect();
        all.extend(self.running.iter().map(|machine| format!("machine {machine}")));
        for (count, what) in [(self.connections, "connections"), (self.tasks, "tasks")] {
            if count > 0 {
                all.push(format!("{count} {what}"));
            }
        }
        all
    }
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
                C::Display,
            ],
        );
        Self { capabilities, shared: Arc::default() }
    }
}

impl MemoryBackend {
    /// A backend without modules, whose guests all behave.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Scripts the machines of this name, in every lab.
    #[must_use]
    pub fn machine(self, name: impl Into<String>, script: impl FnOnce(Guest) -> Guest) -> Self {
        let mut scripts = self.shared.script();
        let name = name.into();
        let guest = scripts.machines.get(&name).unwrap_or(&scripts.every).clone();
        scripts.machines.insert(name, script(guest));
        drop(scripts);
        self
    }

    /// Scripts every machine that has no script of its own by name.
    #[must_use]
    pub fn every_machine(self, script: impl FnOnce(Guest) -> Guest) -> Self {
        let mut scripts = self.shared.script();
        scripts.every = script(scripts.every.clone());
        drop(scripts);
        self
    }

    /// Scripts what stands behind a URL.
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

    /// Claims these capabilities instead of what it has: to test what a program does when a plan is refused.
    #[must_use]
    pub fn with_capabilities(mut self, capabilities: impl IntoIterator<Item = Capability>) -> Self {
        self.capabilities = Capabilities::new("memory", capabilities);
        self
    }

    /// Also writes modules as files, at `DIR/memory/NAME/module.json` in this directory, and reads those that exist. Nothing
    /// else in the directory is touched.
    ///
    /// # Errors
    /// File errors. Modules that cannot be used are [told](Backend::damaged_modules).
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

    /// What there is.
    #[must_use]
    pub fn inventory(&self) -> Inventory {
        let registry = self.shared.registry();
        let mut inventory = Inventory {
            connections: self.shared.connections.load(Ordering::SeqCst),
            tasks: self.shared.tasks.load(Ordering::SeqCst),
            modules: registry.modules.keys().cloned().collect(),
            ..Inventory::default()
        };
        for (id, record) in &registry.labs {
            inventory.labs.push(match record {
                LabRecord::Owned(_) => id.to_string(),
                LabRecord::Kept(_) => format!("{id} (kept)"),
                LabRecord::Orphaned => format!("{id} (its owner is gone)"),
            });
            for machine in record.core().iter().flat_map(|core| core.machines()) {
                if machine.is_running() {
                    inventory.running.push(format!("{}/{}", machine.lab, machine.spec.name));
                }
            }
        }
        inventory
    }

    /// Everything that still exists and is not a module, a line each. Connections end a moment after their machine: this
    /// gives their tasks the chance to, and returns at once when nothing is left.
    pub async fn leftovers(&self) -> Vec<String> {
        for _ in 0..1000 {
            if self.inventory().leftovers().is_empty() {
                break;
            }
            tokio::task::yield_now().await;
        }
        self.inventory().leftovers()
    }

    /// Kills a running machine of a lab from outside, as somebody might who ends the hypervisor's process. Whether there
    /// was one.
    pub fn kill_machine(&self, lab: &LabId, name: &str, cause: Death) -> bool {
        let core = self.shared.registry().labs.get(lab).and_then(LabRecord::core);
        let machines = core.map(|core| core.machines()).unwrap_or_default();
        let running = machines.iter().find(|machine| machine.spec.name == name && machine.is_running());
        running.inspect(|machine| machine.die(cause)).is_some()
    }

    /// What came from the keyboard of the machine of this name that was powered on last; `None` when there was none.
    #[must_use]
    pub fn typed(&self, machine: &str) -> Option<Typed> {
        self.shared.script().terminals.get(machine).map(|terminal| terminal.typed())
    }

    /// The content of a file of a module's VM; `None` when there is no such module, VM or file.
    #[must_use]
    pub fn read_file(&self, module: &str, vm: &str, path: &str) -> Option<Vec<u8>> {
        let kept = self.shared.module(module)?;
        let machine = kept.module.machines.iter().find(|machine| machine.name == vm)?;
        let files = kept.disks.get(&machine.disks.first()?.sha256)?;
        files.read(path).map(<[u8]>::to_vec)
    }
}

impl Shared {
    fn script(&self) -> MutexGuard<'_, Script> {
        self.script.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn registry(&self) -> MutexGuard<'_, Registry> {
        self.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fails when a test wants this operation to fail now.
    fn check(&self, operation: Operation) -> Result<()> {
        let script = self.script();
        let due = |(of, fault): &&(Operation, Fault)| *of == operation && fault.budget.take();
        script.faults.iter().find(due).map_or(Ok(()), |(_, fault)| Err(fault.error()))
    }

    fn source(&self, url: &str) -> Source {
        self.script().sources.get(url).cloned().unwrap_or_default()
    }

    /// What a machine of this name does from this power-on on.
    fn guest_for_power_on(&self, name: &str) -> Guest {
        let mut script = self.script();
        let power_ons = script.power_ons.entry(name.to_owned()).or_default();
        *power_ons += 1;
        let count = *power_ons;
        let guest = script.machines.get(name).unwrap_or(&script.every);
        if count > guest.faulty_boots { guest.healthy() } else { guest.clone() }
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

    fn orphan(&self, id: &LabId) {
        if let Some(record) = self.registry().labs.get_mut(id) {
            *record = LabRecord::Orphaned;
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
        "memory"
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
            detail: "machines are scripted in this process; nothing boots".into(),
            help: None,
        };
        Ok(HostReport { findings: vec![finding] })
    }

    async fn open_lab(&self, spec: &LabSpec) -> Result<Arc<dyn Lab>> {
        crate::runtime::check()?;
        self.shared.check(Operation::OpenLab)?;
        let core = Arc::new(LabCore::new(spec, self.shared.clone()));
        let mut registry = self.shared.registry();
        registry.labs.retain(|_, record| !matches!(record, LabRecord::Orphaned));
        if registry.labs.contains_key(&spec.id) {
            let message = format!("expected no lab {}, but there is one", spec.id);
            return Err(Error::new(ErrorKind::Conflict, message));
        }
        registry.labs.insert(spec.id.clone(), LabRecord::Owned(Arc::downgrade(&core)));
        Ok(Arc::new(MemoryLab { core }))
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
            let message = format!("expected nobody to use module {name}, but lab {id} builds on it");
            return Err(Error::new(ErrorKind::Conflict, message));
        }
        if let Some(root) = root {
            persist::remove(&root, name)?;
        }
        registry.damaged.retain(|module| module.name != name);
        registry.modules.remove(name);
        Ok(())
    }

    async fn kept_labs(&self) -> Result<Vec<KeptLab>> {
        let registry = self.shared.registry();
        let kept = registry.labs.values().filter_map(|record| match record {
            LabRecord::Kept(core) => Some(core.as_kept()),
            _ => None,
        });
        Ok(kept.collect())
    }

    async fn kept_machines(&self, id: &LabId) -> Result<Vec<Arc<dyn Machine>>> {
        match self.shared.registry().labs.get(id) {
            Some(LabRecord::Kept(core)) => Ok(core.handles()),
            _ => {
                let message = format!("expected a lab {id} that was kept, but there is none");
                Err(Error::new(ErrorKind::NotFound, message))
            }
        }
    }

    async fn remove_lab(&self, id: &LabId) -> Result<()> {
        let mut registry = self.shared.registry();
        let core = match registry.labs.get(id) {
            Some(LabRecord::Kept(core)) => core.clone(),
            Some(LabRecord::Owned(_)) => {
                let message = format!("expected nobody to work in lab {id}, but its owner lives");
                return Err(Error::new(ErrorKind::Conflict, message));
            }
            Some(LabRecord::Orphaned) | None => {
                let message = format!("expected a lab {id} that was kept, but there is none");
                return Err(Error::new(ErrorKind::NotFound, message));
            }
        };
        registry.labs.remove(id);
        drop(registry);
        core.end("its lab was removed");
        Ok(())
    }

    async fn reap(&self) -> Result<ReapReport> {
        let mut report = ReapReport::default();
        self.shared.registry().labs.retain(|id, record| {
            let orphaned = matches!(record, LabRecord::Orphaned);
            if orphaned {
                report.removed.push(format!("lab {id}"));
            }
            !orphaned
        });
        Ok(report)
    }

    async fn collect(&self) -> Result<ReapReport> {
        Ok(ReapReport::default())
    }
}
