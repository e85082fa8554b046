//! The memory backend, broken in one way: the wrapper of its parts, and the list of faults.
//!
//! The wrapper also pretends that machines have UEFI, so that faults in what they keep outside their disks can be planted.

mod fetcher;
mod lab;
mod machine;
mod stream;

use self::{fetcher::BrokenFetcher, lab::BrokenLab};
use async_trait::async_trait;
use rudder_core::{
    Error, ErrorKind, Result,
    backend::{
        Backend, HostReport, KeptLab, Lab, LabId, LabSpec, Machine, Progress, ProgressEvent, ReapReport,
        Seed, Volume,
    },
    capability::{Capabilities, Capability},
    fetch::{Fetch, Fetched},
    module::{CapturedDisk, Module},
    testing::{Adapter, BadImages, GuestImage, MemoryAdapter, Owners},
};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

/// A way of being wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wrong {
    /// In no way: that the wrapper itself keeps the contract.
    Nothing,
    /// The death of a machine is told long after.
    SeesDeathLate,
    /// The guest's power-off is told long after.
    TellsPowerOffLate,
    /// Only one of those who wait is told.
    TellsOneWaiter,
    /// A power-off is told as a kill, and a kill as a power-off.
    SwapsExits,
    /// The death of the hypervisor is told as a panic of the guest.
    SwapsDeaths,
    /// The power button is the plug.
    KillsAtOnce,
    /// A guest that does not power off is waited for without end.
    NeverKills,
    /// A machine that was never started is stopped without an error.
    StopsWhatNeverRan,
    /// A running machine may be started.
    StartsTwice,
    /// Processors and memory are always the same.
    IgnoresHardware,
    /// Processors and memory are those of the first machine of the lab.
    CopiesHardware,
    /// NICs are in the opposite order of their slots.
    ReordersCards,
    /// NICs have other hardware addresses.
    InventsAddresses,
    /// Machines that are created at once get the same seed.
    MixesSeeds,
    /// Machines of the same name are stopped together, whatever their lab.
    MixesLabsUp,
    /// The serial console is that of the machine that was created last.
    MixesSerials,
    /// The display is that of the machine that was created last.
    MixesDisplays,
    /// What was written on the serial console is gone with the end of the machine.
    ForgetsLastWords,
    /// What was written before the machine was started again is still there.
    KeepsOldWords,
    /// Of the serial console, a kilobyte is kept.
    KeepsFewWords,
    /// The serial console is for one.
    HasOneReader,
    /// Ending one half of a connection ends the other.
    ClosesBothHalves,
    /// Ending one half of a connection is not told to the guest.
    LosesHalfClose,
    /// A bit of the second mebibyte of a connection is wrong.
    FlipsABit,
    /// A port of the guest is one of the host where somebody listens there.
    DialsTheHost,
    /// A closed port is an error of an unknown kind.
    CannotSayRefused,
    /// Dialling a machine that is off is an error that asks to try again.
    CannotSayOff,
    /// What is served is for everybody on the host.
    ServesAnybody,
    /// What is served is served on when the lab is gone.
    ServesWithoutItsLab,
    /// Images are not compared with what was promised of them.
    BelievesAnyDigest,
    /// Whoever imports the same image gets the same volume.
    SharesVolumes,
    /// Disks are as large as their images.
    IgnoresSizes,
    /// Of a VM of a module, always the first disk is imported.
    ImportsTheFirstDisk,
    /// A file that is fetched again is written again in place.
    RewritesWhatOthersRead,
    /// Collecting removes fetched files that are held.
    CollectsWhatIsRead,
    /// What is done decreases.
    ProgressGoesBack,
    /// That all is done is not told.
    ForgetsLastProgress,
    /// More is done than there is.
    ProgressExceedsItsTotal,
    /// A disk is captured once; later captures return the first.
    CapturesOnce,
    /// Whatever disk is captured, it is the first.
    CapturesTheFirstDisk,
    /// Of each VM, one disk is published.
    PublishesParts,
    /// The old module is removed before the new one is complete.
    ReplacesTooEarly,
    /// A module is removed, and files of it stay.
    LeavesFilesOfModules,
    /// Modules are in no order.
    ShufflesModules,
    /// Firmware variables are not captured.
    DropsState,
    /// A machine does not start with the firmware variables of its parent.
    ForgetsInheritedState,
    /// A lab cannot be destroyed again.
    DestroysOnce,
    /// Destroying a lab forgets a volume.
    ForgetsAVolume,
    /// Opening a lab leaves it for good when it is dropped in the middle.
    LeaksWhenDropped,
    /// A lab of an id that is taken gets another.
    ReusesIds,
    /// A lab has no versions for the provenance.
    HidesVersions,
    /// Any lab can be kept.
    KeepsAnyLab,
    /// `reap` takes what living owners have.
    ReapsTheLiving,
    /// `reap` takes labs that were kept.
    ReapsTheKept,
    /// What it does not like in a name is left out.
    CleansNames,
    /// Names are cut to 15 characters.
    CutsNames,
    /// Names of modules are cut to 15 characters.
    CutsNamesOfModules,
    /// It claims what it cannot do.
    ClaimsTooMuch,
    /// The host lacks something.
    IsNotReady,
}

/// The beginning of a name, as much as a network interface has room for (IFNAMSIZ).
fn cut(name: &str) -> String {
    name.chars().take(15).collect()
}

#[derive(Debug)]
pub(crate) struct BrokenAdapter {
    good: MemoryAdapter,
    broken: Arc<Broken>,
}

impl BrokenAdapter {
    pub(crate) fn new(wrong: Wrong) -> Self {
        let good = MemoryAdapter::new();
        let inner = good.backend();
        let claims = inner.capabilities().iter().chain([Capability::Uefi]);
        let extra = (wrong == Wrong::ClaimsTooMuch).then_some(Capability::SourcePvc);
        let capabilities = Capabilities::new("memory", claims.chain(extra));
        let shared = Arc::new(Shared::new(wrong, Arc::clone(&inner)));
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
        // One that cannot be logged in to is not waited for as long as a real one.
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

/// What the parts of a broken backend share.
#[derive(Debug)]
struct Shared {
    wrong: Wrong,
    inner: Arc<dyn Backend>,
    /// Labs that are being opened.
    opening: Mutex<Vec<Arc<dyn Lab>>>,
    labs: Mutex<Vec<Weak<dyn Lab>>>,
    machines: Mutex<Vec<Weak<dyn Machine>>>,
    /// The volume of each image.
    volumes: Mutex<BTreeMap<String, Volume>>,
    /// The seed of the machine that was asked for last.
    seed: Mutex<Option<Seed>>,
    /// Processors and memory of the first machine of each lab.
    hardware: Mutex<BTreeMap<LabId, (u32, u64)>>,
    /// The first capture of each disk.
    captured: Mutex<BTreeMap<String, CapturedDisk>>,
    /// The first file that was fetched of each URL.
    fetched: Mutex<BTreeMap<String, Fetched>>,
    /// What was left behind for good.
    leaked: Mutex<Vec<String>>,
}

impl Shared {
    fn new(wrong: Wrong, inner: Arc<dyn Backend>) -> Self {
        Self {
            wrong,
            inner,
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

    fn is(&self, wrong: Wrong) -> bool {
        self.wrong == wrong
    }

    /// Progress that is told wrong.
    fn progress(&self, progress: &Progress) -> Progress {
        let (wrong, progress) = (self.wrong, progress.clone());
        Progress::new(move |event| match event {
            ProgressEvent::Bytes { task, done, total } => match wrong {
                Wrong::ForgetsLastProgress if total == Some(done) => {}
                Wrong::ProgressGoesBack => {
                    progress.bytes(&task, done, total);
                    progress.bytes(&task, done / 2, total);
                    progress.bytes(&task, done, total);
                }
                Wrong::ProgressExceedsItsTotal => {
                    progress.bytes(&task, done + 1, total);
                    progress.bytes(&task, done, total);
                }
                _ => progress.bytes(&task, done, total),
            },
            ProgressEvent::Notice(notice) => progress.notice(notice),
            _ => {}
        })
    }

    /// The machine of a lab that was created last.
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
        if self.shared.is(Wrong::IsNotReady) {
            for finding in &mut report.findings {
                finding.present = false;
                finding.detail = "it is broken".to_owned();
            }
        }
        Ok(report)
    }

    async fn open_lab(&self, spec: &LabSpec) -> Result<Arc<dyn Lab>> {
        let inner = match self.inner.open_lab(spec).await {
            Err(error) if error.kind() == ErrorKind::Conflict && self.shared.is(Wrong::ReusesIds) => {
                let mut other = spec.clone();
                other.id = LabId::new(&spec.name);
                self.inner.open_lab(&other).await?
            }
            opened => opened?,
        };
        if self.shared.is(Wrong::LeaksWhenDropped) {
            lock(&self.shared.opening).push(Arc::clone(&inner));
            tokio::task::yield_now().await;
            lock(&self.shared.opening).pop();
        }
        lock(&self.shared.labs).push(Arc::downgrade(&inner));
        Ok(Arc::new(BrokenLab::new(inner, Arc::clone(&self.shared))))
    }

    async fn modules(&self) -> Result<Vec<Module>> {
        let mut modules = self.inner.modules().await?;
        if self.shared.is(Wrong::ShufflesModules) {
            modules.reverse();
        }
        Ok(modules)
    }

    async fn remove_module(&self, name: &str) -> Result<()> {
        self.inner.remove_module(name).await?;
        if self.shared.is(Wrong::LeavesFilesOfModules) {
            lock(&self.shared.leaked).push(format!("files of module {name}"));
        }
        Ok(())
    }

    async fn kept_labs(&self) -> Result<Vec<KeptLab>> {
        self.inner.kept_labs().await
    }

    async fn remove_lab(&self, id: &LabId) -> Result<()> {
        self.inner.remove_lab(id).await
    }

    async fn reap(&self) -> Result<ReapReport> {
        let mut report = self.inner.reap().await?;
        if self.shared.is(Wrong::ReapsTheLiving) {
            let living: Vec<_> = lock(&self.shared.labs).iter().filter_map(Weak::upgrade).collect();
            for lab in living {
                lab.destroy().await?;
                report.removed.push(format!("lab {}", lab.id()));
            }
        }
        if self.shared.is(Wrong::ReapsTheKept) {
            for kept in self.inner.kept_labs().await? {
                self.inner.remove_lab(&kept.id).await?;
                report.removed.push(format!("lab {}", kept.id));
            }
        }
        Ok(report)
    }

    async fn collect(&self) -> Result<ReapReport> {
        if self.shared.is(Wrong::CollectsWhatIsRead) {
            for fetched in std::mem::take(&mut *lock(&self.shared.fetched)).into_values() {
                // It may be gone already.
                let _ = std::fs::remove_file(fetched.path);
            }
        }
        self.inner.collect().await
    }
}

/// Takes the place of an error of a kind.
fn error(kind: ErrorKind, message: &'static str) -> Error {
    Error::new(kind, message)
}
