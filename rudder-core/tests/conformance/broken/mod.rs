//! The memory backend with one fault: wrappers of its parts, and the list of faults.
//!
//! The wrappers also pretend that machines have UEFI, so that faults in the state outside their disks can be planted.

mod fetcher;
mod lab;
mod machine;
mod stream;

use self::{fetcher::BrokenFetcher, lab::BrokenLab};
use async_trait::async_trait;
use rudder_core::{
    Error, ErrorKind, Result,
    backend::{
        Backend, HostReport, Lab, LabId, LabInfo, LabSpec, LabState, Machine, Progress, ProgressEvent,
        ReapReport, Seed, Stop, Volume,
    },
    capability::{Capabilities, Capability},
    fetch::{Fetch, Fetched},
    memory::MemoryBackend,
    module::{CapturedDisk, Module},
    testing::{Adapter, BadImages, GuestImage, MemoryAdapter, Owners},
};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

/// A fault of a backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Defect {
    /// No fault: shows that the wrappers themselves keep the contract.
    Nothing,
    /// The death of a machine is reported late.
    ReportsDeathLate,
    /// A power-off by the guest is reported late.
    ReportsPowerOffLate,
    /// Only one of several waiting callers is notified.
    NotifiesOneWaiter,
    /// A power-off is reported as a kill, and a kill as a power-off.
    SwapsExits,
    /// The death of the hypervisor is reported as a panic of the guest.
    SwapsDeaths,
    /// A graceful stop kills the machine.
    KillsAtOnce,
    /// A guest that does not power off is waited for indefinitely.
    NeverKills,
    /// Stopping a machine that was never started succeeds.
    StopsUnstartedMachines,
    /// A running machine can be started again.
    StartsTwice,
    /// Processors and memory are always the same.
    IgnoresHardware,
    /// Processors and memory are those of the first machine of the lab.
    CopiesHardware,
    /// NICs are in the reverse order of their slots.
    ReordersNics,
    /// NICs have other hardware addresses.
    InventsAddresses,
    /// Machines that are created concurrently get the same seed.
    MixesSeeds,
    /// Machines of the same name are stopped together, even in different labs.
    MixesLabs,
    /// The serial console is that of the machine that was created last.
    MixesSerials,
    /// The display is that of the machine that was created last.
    MixesDisplays,
    /// The display should be read compressed, and its server does not compress.
    PromisesCompression,
    /// The serial output is lost when the machine ends.
    LosesSerialOutputAtTheEnd,
    /// The serial output from before a restart is still returned.
    KeepsOldSerialOutput,
    /// Only a kilobyte of the serial output is kept.
    KeepsLittleSerialOutput,
    /// The serial console allows a single reader.
    HasOneReader,
    /// Closing one half of a connection closes the other.
    ClosesBothHalves,
    /// Closing one half of a connection is not passed on to the guest.
    LosesHalfClose,
    /// A bit in the second mebibyte of a connection is flipped.
    FlipsABit,
    /// Dialling a port of the guest connects to the host if something listens on that port there.
    DialsTheHost,
    /// A closed port is an error of an unknown kind.
    ReportsRefusedAsUnknown,
    /// Dialling a machine that is off is a retryable error.
    ReportsOffAsRetryable,
    /// Served files are available to every process on the host.
    ServesEveryProcess,
    /// Files are still served after the lab was destroyed.
    ServesWithoutItsLab,
    /// Images are not checked against the expected digest.
    SkipsDigestCheck,
    /// Imports of the same image share a volume.
    SharesVolumes,
    /// Disks have the size of their images.
    IgnoresSizes,
    /// Importing from a VM of a module always imports the first disk.
    ImportsTheFirstDisk,
    /// Fetching a file again rewrites it in place.
    RewritesWhatOthersRead,
    /// Collecting removes fetched files that are in use.
    CollectsWhatIsRead,
    /// Progress goes backwards.
    ProgressGoesBack,
    /// Completion is not reported as progress.
    ForgetsLastProgress,
    /// Progress exceeds the total.
    ProgressExceedsItsTotal,
    /// A disk is captured once; later captures return the first.
    CapturesOnce,
    /// Capturing any disk captures the first.
    CapturesTheFirstDisk,
    /// Only one disk of each VM is published.
    PublishesParts,
    /// The old module is removed before the new one is complete.
    ReplacesTooEarly,
    /// Removing a module leaves some of its files behind.
    LeavesFilesOfModules,
    /// Modules are not sorted.
    ShufflesModules,
    /// Firmware variables are not captured.
    DropsState,
    /// A machine does not start with the firmware variables of its parent.
    ForgetsInheritedState,
    /// A lab cannot be destroyed twice.
    DestroysOnce,
    /// Destroying a lab leaves a volume behind.
    ForgetsAVolume,
    /// A lab is leaked permanently if the future that opens it is dropped.
    LeaksWhenDropped,
    /// A lab whose id is already in use gets another one.
    ReusesIds,
    /// A lab reports no versions for the provenance.
    HidesVersions,
    /// Any lab can be kept.
    KeepsAnyLab,
    /// `reap` removes labs of living owners.
    ReapsTheLiving,
    /// `reap` removes labs that were kept.
    ReapsTheKept,
    /// `reap` removes labs that will expire, before they have.
    ReapsBeforeExpiry,
    /// `reap` leaves labs that have expired alone.
    NeverReapsExpiredLabs,
    /// Labs with a living owner are not listed.
    ListsNoOwnedLabs,
    /// Kept labs are not listed.
    ListsNoKeptLabs,
    /// Kept labs are listed without their time of expiry.
    ForgetsExpiry,
    /// Any process may attach to the lab of a living owner.
    AttachesToOwnedLabs,
    /// Attaching to a lab ends its machines.
    EndsWhatItAttachesTo,
    /// Detaching from a lab ends its machines.
    EndsWhatItDetachesFrom,
    /// An attached lab has no machines.
    HidesMachinesOfAttachedLabs,
    /// Files stored with a lab are lost.
    LosesFilesOfLabs,
    /// Files stored with a lab are truncated.
    CutsFilesOfLabs,
    /// Characters that the backend does not accept are dropped from names.
    CleansNames,
    /// Names are truncated to 15 characters.
    CutsNames,
    /// Names of modules are truncated to 15 characters.
    CutsNamesOfModules,
    /// The backend declares a capability that it does not have.
    ClaimsTooMuch,
    /// The host lacks a requirement.
    IsNotReady,
}

/// Truncates a name to the length of a network interface name (IFNAMSIZ).
fn cut(name: &str) -> String {
    name.chars().take(15).collect()
}

#[derive(Debug)]
pub(crate) struct BrokenAdapter {
    good: MemoryAdapter,
    broken: Arc<Broken>,
}

impl BrokenAdapter {
    pub(crate) fn new(defect: Defect) -> Self {
        let good = MemoryAdapter::new();
        let inner = good.backend();
        let claims = inner.capabilities().iter().chain([Capability::Uefi]);
        let extra = (defect == Defect::ClaimsTooMuch).then_some(Capability::SourcePvc);
        let capabilities = Capabilities::new("memory", claims.chain(extra));
        let shared = Arc::new(Shared::new(defect, Arc::clone(&inner), good.memory().clone()));
        Self { good, broken: Arc::new(Broken { inner, capabilities, shared }) }
    }
}

#[async_trait]
impl Adapter for BrokenAdapter {
    fn backend(&self) -> Arc<dyn Backend> {
        Arc::clone(&self.broken) as Arc<dyn Backend>
    }

    async fn another(&self) -> Result<Arc<dyn Backend>> {
        Ok(self.backend())
    }

    async fn traces(&self) -> Result<Vec<String>> {
        let mut traces = self.good.traces().await?;
        traces.extend(lock(&self.broken.shared.leaked).clone());
        Ok(traces)
    }

    async fn is_running(&self, lab: &LabId, machine: &str) -> Result<bool> {
        self.good.is_running(lab, machine).await
    }

    async fn kill(&self, lab: &LabId, machine: &str) -> Result<()> {
        self.good.kill(lab, machine).await
    }

    fn guest(&self) -> Option<GuestImage> {
        let mut guest = self.good.guest()?;
        // The suite need not wait as long as for a real guest before it finds that it cannot log in.
        guest.boots_within = Duration::from_secs(10);
        Some(guest)
    }

    fn bad_images(&self) -> Option<BadImages> {
        self.good.bad_images()
    }

    fn owners(&self) -> Owners {
        self.good.owners()
    }
}

/// State shared by the parts of a broken backend.
#[derive(Debug)]
struct Shared {
    defect: Defect,
    inner: Arc<dyn Backend>,
    memory: MemoryBackend,
    /// Labs that are being opened.
    opening: Mutex<Vec<Arc<dyn Lab>>>,
    labs: Mutex<Vec<Weak<dyn Lab>>>,
    machines: Mutex<Vec<Weak<dyn Machine>>>,
    /// The volume of each image.
    volumes: Mutex<BTreeMap<String, Volume>>,
    /// The seed of the machine that was requested last.
    seed: Mutex<Option<Seed>>,
    /// Processors and memory of the first machine of each lab.
    hardware: Mutex<BTreeMap<LabId, (u32, u64)>>,
    /// The first capture of each disk.
    captured: Mutex<BTreeMap<String, CapturedDisk>>,
    /// The file that was first fetched for each URL.
    fetched: Mutex<BTreeMap<String, Fetched>>,
    /// What was left behind permanently.
    leaked: Mutex<Vec<String>>,
}

impl Shared {
    fn new(defect: Defect, inner: Arc<dyn Backend>, memory: MemoryBackend) -> Self {
        Self {
            defect,
            inner,
            memory,
            opening: Mutex::default(),
            labs: Mutex::default(),
            machines: Mutex::default(),
            volumes: Mutex::default(),
            seed: Mutex::default(),
            hardware: Mutex::default(),
            captured: Mutex::default(),
            fetched: Mutex::default(),
            leaked: Mutex::default(),
        }
    }

    fn is(&self, defect: Defect) -> bool {
        self.defect == defect
    }

    /// Returns progress that is reported incorrectly.
    fn progress(&self, progress: &Progress) -> Progress {
        let (defect, progress) = (self.defect, progress.clone());
        Progress::new(move |event| match event {
            ProgressEvent::Bytes { task, done, total } => match defect {
                Defect::ForgetsLastProgress if total == Some(done) => {}
                Defect::ProgressGoesBack => {
                    progress.bytes(&task, done, total);
                    progress.bytes(&task, done / 2, total);
                    progress.bytes(&task, done, total);
                }
                Defect::ProgressExceedsItsTotal => {
                    progress.bytes(&task, done + 1, total);
                    progress.bytes(&task, done, total);
                }
                _ => progress.bytes(&task, done, total),
            },
            ProgressEvent::Notice(notice) => progress.notice(notice),
            _ => {}
        })
    }

    /// Returns the machine that was created last, in any lab.
    fn last_machine(&self) -> Option<Arc<dyn Machine>> {
        lock(&self.machines).last().and_then(Weak::upgrade)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug)]
struct Broken {
    inner: Arc<dyn Backend>,
    capabilities: Capabilities,
    shared: Arc<Shared>,
}

#[async_trait]
impl Backend for Broken {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn fetcher(&self) -> Arc<dyn Fetch> {
        Arc::new(BrokenFetcher(Arc::clone(&self.shared)))
    }

    async fn diagnose(&self) -> Result<HostReport> {
        let mut report = self.inner.diagnose().await?;
        if self.shared.is(Defect::IsNotReady) {
            for finding in &mut report.findings {
                finding.present = false;
                finding.detail = "it is broken".to_owned();
            }
        }
        Ok(report)
    }

    async fn open_lab(&self, spec: &LabSpec) -> Result<Arc<dyn Lab>> {
        let inner = match self.inner.open_lab(spec).await {
            Err(error) if error.kind() == ErrorKind::Conflict && self.shared.is(Defect::ReusesIds) => {
                let mut other = spec.clone();
                other.id = LabId::new(&spec.name);
                self.inner.open_lab(&other).await?
            }
            opened => opened?,
        };
        if self.shared.is(Defect::LeaksWhenDropped) {
            lock(&self.shared.opening).push(Arc::clone(&inner));
            tokio::task::yield_now().await;
            lock(&self.shared.opening).pop();
        }
        lock(&self.shared.labs).push(Arc::downgrade(&inner));
        Ok(Arc::new(BrokenLab::new(inner, Arc::clone(&self.shared))))
    }

    async fn modules(&self) -> Result<Vec<Module>> {
        let mut modules = self.inner.modules().await?;
        if self.shared.is(Defect::ShufflesModules) {
            modules.reverse();
        }
        Ok(modules)
    }

    async fn remove_module(&self, name: &str) -> Result<()> {
        self.inner.remove_module(name).await?;
        if self.shared.is(Defect::LeavesFilesOfModules) {
            lock(&self.shared.leaked).push(format!("files of module {name}"));
        }
        Ok(())
    }

    async fn labs(&self) -> Result<Vec<LabInfo>> {
        let mut labs = self.inner.labs().await?;
        match self.shared.defect {
            Defect::ListsNoOwnedLabs => labs.retain(|lab| lab.state != LabState::Owned),
            Defect::ListsNoKeptLabs => labs.retain(|lab| !lab.is_kept()),
            Defect::ForgetsExpiry => {
                for lab in &mut labs {
                    if lab.is_kept() {
                        lab.state = LabState::Kept { expires: None };
                    }
                }
            }
            _ => {}
        }
        Ok(labs)
    }

    async fn attach(&self, id: &LabId) -> Result<Arc<dyn Lab>> {
        let inner = match self.inner.attach(id).await {
            Err(error)
                if error.kind() == ErrorKind::Conflict && self.shared.is(Defect::AttachesToOwnedLabs) =>
            {
                let labs = lock(&self.shared.labs).iter().filter_map(Weak::upgrade).collect::<Vec<_>>();
                labs.into_iter().find(|lab| lab.id() == id).ok_or(error)?
            }
            attached => attached?,
        };
        if self.shared.is(Defect::EndsWhatItAttachesTo) {
            for machine in inner.machines().await? {
                machine.stop(Stop::Kill).await?;
            }
        }
        Ok(Arc::new(BrokenLab::attached(inner, Arc::clone(&self.shared))))
    }

    async fn lab_file(&self, id: &LabId, name: &str) -> Result<Option<Vec<u8>>> {
        let file = self.inner.lab_file(id, name).await;
        match self.shared.defect {
            Defect::LosesFilesOfLabs => Ok(None),
            Defect::CutsFilesOfLabs => Ok(file?.map(|file| file.into_iter().take(16 << 10).collect())),
            _ => file,
        }
    }

    async fn remove_lab(&self, id: &LabId) -> Result<()> {
        self.inner.remove_lab(id).await
    }

    async fn reap(&self) -> Result<ReapReport> {
        if self.shared.is(Defect::NeverReapsExpiredLabs) {
            let labs = self.inner.labs().await?;
            if labs.iter().any(|lab| lab.state == LabState::Abandoned) {
                return Ok(ReapReport::default());
            }
        }
        let mut report = self.inner.reap().await?;
        if self.shared.is(Defect::ReapsBeforeExpiry) {
            for lab in self.inner.labs().await? {
                if matches!(lab.state, LabState::Kept { expires: Some(_) }) {
                    self.inner.remove_lab(&lab.id).await?;
                }
            }
        }
        if self.shared.is(Defect::ReapsTheLiving) {
            let living: Vec<_> = lock(&self.shared.labs).iter().filter_map(Weak::upgrade).collect();
            for lab in living {
                lab.destroy().await?;
                report.removed.push(format!("lab {}", lab.id()));
            }
        }
        if self.shared.is(Defect::ReapsTheKept) {
            for kept in self.inner.labs().await?.into_iter().filter(LabInfo::is_kept) {
                self.inner.remove_lab(&kept.id).await?;
                report.removed.push(format!("lab {}", kept.id));
            }
        }
        Ok(report)
    }

    async fn collect(&self) -> Result<ReapReport> {
        if self.shared.is(Defect::CollectsWhatIsRead) {
            for fetched in std::mem::take(&mut *lock(&self.shared.fetched)).into_values() {
                // The file may already be gone.
                let _ = std::fs::remove_file(fetched.path);
            }
        }
        self.inner.collect().await
    }
}

/// Creates an error that replaces one of another kind.
fn error(kind: ErrorKind, message: &'static str) -> Error {
    Error::new(kind, message)
}
