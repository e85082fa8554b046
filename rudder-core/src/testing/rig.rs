//! The test rig: the backend, labs and machines to test it with, and the checks for what is left behind.

use super::{
    Adapter, GuestImage, NotPassed, Options, TestResult,
    guest::{Booted, Prepared},
    hardware::equip,
    pairs::{self, Pair},
    test_result::{During as _, ensure, fail},
};
use crate::{
    backend::{
        Backend, ImportRequest, Lab, LabInfo, LabSpec, Machine, MachineDisk, MachineSpec, Progress,
        ProgressEvent,
    },
    capability::Capability,
    check::DEFAULT_SUBNET,
    digest::Digest,
    hardware::{Bus, NicModel},
    plan::{PlannedNetwork, PlannedNic, PlannedSource, PlannedSubnet, PlannedVpc},
    units::MacAddress,
};
use futures::{FutureExt as _, future::BoxFuture};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::{Ipv4Addr, TcpListener},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// The port of SSH.
pub(super) const SSH: u16 = 22;
/// Size of blank disks, in bytes: small enough to be captured at once.
pub(super) const BLANK: u64 = 16 << 20;
/// Interval between checks of a condition that comes about by itself.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Groups that share a guest; they run one after another.
const SHARING: [&str; 4] = ["streams", "consoles", "hardware", "served"];
/// The group that shares two guests.
const PAIRS: &str = "pairs";

/// Guests that several tests share.
#[derive(Debug)]
struct SharedGuest<T> {
    /// The guests, or why they could not be booted. The error is kept, since every other test would wait as long for
    /// it.
    value: tokio::sync::Mutex<Option<Result<Arc<T>, String>>>,
    /// The id of their lab.
    lab: Mutex<Option<String>>,
}

impl<T> Default for SharedGuest<T> {
    fn default() -> Self {
        Self { value: tokio::sync::Mutex::default(), lab: Mutex::default() }
    }
}

impl<T> SharedGuest<T> {
    async fn get(
        &self,
        rig: &Rig,
        name: &str,
        boot: for<'a> fn(&'a Rig, Arc<dyn Lab>) -> BoxFuture<'a, TestResult<T>>,
    ) -> TestResult<Arc<T>> {
        let mut value = self.value.lock().await;
        match &*value {
            Some(Ok(value)) => return Ok(Arc::clone(value)),
            Some(Err(why)) => fail!("the guest that tests of this group share: {why}"),
            None => {}
        }
        // Stays in place if booting is cut short.
        *value = Some(Err("it did not boot in time".to_owned()));
        let lab = rig.lab(name).await?;
        *lock(&self.lab) = Some(lab.id().to_string());
        match boot(rig, Arc::clone(&lab)).await {
            Ok(booted) => {
                let booted = Arc::new(booted);
                *value = Some(Ok(Arc::clone(&booted)));
                Ok(booted)
            }
            Err(problem) => {
                if let NotPassed::Failed(why) = &problem {
                    *value = Some(Err(why.clone()));
                } else {
                    *value = None;
                }
                // The boot failure itself is already reported.
                let _ = lab.destroy().await;
                *lock(&self.lab) = None;
                Err(problem)
            }
        }
    }

    /// Destroys the lab of the guests. Returns whether there was one.
    async fn close(&self, lab: impl Fn(&T) -> &Arc<dyn Lab>) -> TestResult<bool> {
        let value = self.value.lock().await.take();
        let result = match value {
            Some(Ok(value)) => lab(&value).destroy().await.during("destroy the lab of a shared guest"),
            Some(Err(_)) | None => return Ok(lock(&self.lab).take().is_some()),
        };
        *lock(&self.lab) = None;
        result.map(|()| true)
    }
}

/// A backend under test, with what the tests share.
#[derive(Debug)]
pub struct Rig {
    adapter: Arc<dyn Adapter>,
    backend: Arc<dyn Backend>,
    options: Options,
    /// What existed before the test.
    before: Mutex<BTreeSet<String>>,
    shared: SharedGuest<Booted>,
    pair: SharedGuest<Pair>,
    /// A listener on the host's loopback, whose port the shared guest is dialled at.
    host_port: Option<TcpListener>,
}

impl Rig {
    /// Returns a rig for tests on the backend of this adapter.
    #[must_use]
    pub fn new(adapter: Arc<dyn Adapter>, options: Options) -> Self {
        let backend = adapter.backend();
        Self {
            adapter,
            backend,
            options,
            before: Mutex::default(),
            shared: SharedGuest::default(),
            pair: SharedGuest::default(),
            host_port: TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
                .ok()
                .filter(|listener| listener.set_nonblocking(true).is_ok()),
        }
    }

    /// Returns the backend under test.
    #[must_use]
    pub fn backend(&self) -> &dyn Backend {
        &*self.backend
    }

    /// Returns a shared handle to the backend.
    #[must_use]
    pub fn shared_backend(&self) -> Arc<dyn Backend> {
        Arc::clone(&self.backend)
    }

    /// Returns the adapter.
    #[must_use]
    pub fn adapter(&self) -> &dyn Adapter {
        &*self.adapter
    }

    /// Returns the options of the run.
    #[must_use]
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// Returns the guest of the adapter; without one, the test is skipped.
    pub(super) fn image(&self) -> TestResult<GuestImage> {
        let none = || NotPassed::Skipped("the adapter has no guest that boots".to_owned());
        self.adapter.guest().ok_or_else(none)
    }

    /// Returns a running guest, shared by the tests of a group. They leave it as they found it.
    pub(super) async fn shared(&self) -> TestResult<Arc<Booted>> {
        self.shared.get(self, "shared", |rig, lab| rig.boot_shared(lab).boxed()).await
    }

    async fn boot_shared(&self, lab: Arc<dyn Lab>) -> TestResult<Booted> {
        let mut prepared = Prepared::new(self, &*lab, "web", None).await?;
        prepared.spec.ports.extend(self.host_port());
        equip(self, &*lab, &mut prepared.spec).await?;
        prepared.boot(self, lab).await
    }

    /// Returns two running guests, shared by the tests of a group.
    pub(super) async fn pair(&self) -> TestResult<Arc<Pair>> {
        self.pair.get(self, "pair", |rig, lab| pairs::boot(rig, lab).boxed()).await
    }

    /// Returns the port at which this process listens on the host's loopback.
    pub(super) fn host_port(&self) -> Option<u16> {
        Some(self.host_port.as_ref()?.local_addr().ok()?.port())
    }

    /// Whether anything connected to [`host_port`](Self::host_port).
    pub(super) fn was_reached(&self) -> bool {
        self.host_port.as_ref().is_some_and(|listener| listener.accept().is_ok())
    }

    /// Destroys the labs of guests that tests of other groups share. Returns whether there were any.
    pub(super) async fn close_shared(&self, group: &str) -> TestResult<bool> {
        let mut closed = false;
        if !SHARING.contains(&group) {
            closed |= self.shared.close(|booted| &booted.lab).await?;
        }
        if group != PAIRS {
            closed |= self.pair.close(|pair| &pair[0].lab).await?;
        }
        Ok(closed)
    }

    /// Opens a lab with the network of a manifest that declares none.
    pub(super) async fn lab(&self, name: &str) -> TestResult<Arc<dyn Lab>> {
        self.backend.open_lab(&LabSpec::new(name, network())).await.during("open a lab")
    }

    /// Returns the bus for machines that need not boot.
    fn bus(&self) -> Bus {
        use Capability as C;
        let known = [
            (C::DiskVirtio, Bus::Virtio),
            (C::DiskScsi, Bus::Scsi),
            (C::DiskSata, Bus::Sata),
            (C::DiskIde, Bus::Ide),
            (C::DiskUsb, Bus::Usb),
        ];
        let capabilities = self.backend.capabilities();
        // If the backend claims no bus, any will do, since no guest sees the disk.
        known
            .iter()
            .find(|(capability, _)| capabilities.has(*capability))
            .map_or(Bus::Virtio, |(_, bus)| *bus)
    }

    /// Imports a blank disk.
    pub(super) async fn blank(&self, lab: &dyn Lab, machine: &str, disk: &str) -> TestResult<MachineDisk> {
        if !self.backend.capabilities().has(Capability::SourceBlank) {
            let why = format!("the backend does not claim {}", Capability::SourceBlank);
            return Err(NotPassed::Skipped(why));
        }
        let bus = self.bus();
        let request = ImportRequest::new(machine, disk, PlannedSource::Blank, Some(BLANK));
        let imported = lab.import(&request, &Progress::none()).await.during("import a blank disk")?;
        Ok(MachineDisk { name: disk.to_owned(), bus, volume: imported.volume })
    }

    /// Describes a small machine with a blank disk, which need not boot.
    pub(super) async fn bare(&self, lab: &dyn Lab, name: &str) -> TestResult<MachineSpec> {
        let mut spec = MachineSpec::new(name, 1, 64 << 20);
        spec.disks.push(self.blank(lab, name, "root").await?);
        spec.nics.push(nic(lab, name, NicModel::E1000));
        spec.ports = vec![SSH];
        Ok(spec)
    }

    /// Defines such a machine.
    pub(super) async fn machine(&self, lab: &dyn Lab, name: &str) -> TestResult<Arc<dyn Machine>> {
        let spec = self.bare(lab, name).await?;
        lab.create_machine(&spec).await.during("create a machine")
    }

    /// Defines and starts such a machine.
    pub(super) async fn running(&self, lab: &dyn Lab, name: &str) -> TestResult<Arc<dyn Machine>> {
        let machine = self.machine(lab, name).await?;
        machine.start().await.during("start a machine")?;
        Ok(machine)
    }

    async fn traces(&self) -> TestResult<BTreeSet<String>> {
        let traces = self.adapter.traces().await.during("list the traces of labs")?;
        let shared: Vec<String> =
            [&self.shared.lab, &self.pair.lab].into_iter().filter_map(|lab| lock(lab).clone()).collect();
        let is_shared = |line: &String| shared.iter().any(|id| line.contains(id));
        Ok(traces.into_iter().filter(|line| !is_shared(line)).collect())
    }

    /// Records what exists before a test.
    pub(super) async fn begin(&self) -> TestResult {
        let traces = self.traces().await?;
        *lock(&self.before) = traces;
        Ok(())
    }

    /// Returns what exists that did not exist before the test.
    pub(super) async fn left(&self) -> TestResult<Vec<String>> {
        let now = self.traces().await?;
        let before = lock(&self.before);
        Ok(now.difference(&before).cloned().collect())
    }

    /// Fails when more exists than before the test, even after the time in which resources may still be released.
    pub(super) async fn expect_nothing_left(&self, when: &str) -> TestResult {
        let deadline = Instant::now() + self.options.settle;
        loop {
            let left = self.left().await?;
            if left.is_empty() {
                return Ok(());
            }
            if Instant::now() > deadline {
                fail!("{when}: expected nothing to remain, but found:\n{}", left.join("\n"));
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    /// Cleans up after a test that did not pass, so that the next one is not blamed.
    pub(super) async fn sweep(&self) {
        for lab in self.backend.labs().await.unwrap_or_default().into_iter().filter(LabInfo::is_kept) {
            let _ = self.backend.remove_lab(&lab.id).await;
        }
        let _ = self.backend.reap().await;
        if let Ok(modules) = self.backend.modules().await {
            for module in modules {
                let _ = self.backend.remove_module(&module.name).await;
            }
        }
    }
}

/// The reported progress of one call.
#[derive(Debug, Default)]
pub(super) struct ProgressLog(Arc<Mutex<Vec<ProgressEvent>>>);

impl ProgressLog {
    /// Returns a progress whose events are collected here.
    pub(super) fn progress(&self) -> Progress {
        let log = Arc::clone(&self.0);
        Progress::new(move |event| lock(&log).push(event))
    }

    /// Checks that the reported progress keeps the contract: for each task, the amount done never decreases or exceeds
    /// the total, the total never changes, and in the end everything is done. Returns whether anything was reported.
    pub(super) fn check(&self) -> TestResult<bool> {
        let mut tasks: BTreeMap<String, (u64, Option<u64>)> = BTreeMap::new();
        for event in lock(&self.0).iter() {
            let ProgressEvent::Bytes { task, done, total } = event else { continue };
            let (before, known) = tasks.entry(task.clone()).or_default();
            ensure!(done >= before, "{task}: expected at least {before} bytes done, but found {done}");
            ensure!(
                known.is_none() || known == total,
                "{task}: expected the total to stay {known:?}, but found {total:?}"
            );
            if let Some(total) = total {
                ensure!(done <= total, "{task}: expected at most {total} bytes, but found {done}");
            }
            (*before, *known) = (*done, *total);
        }
        for (task, (done, total)) in &tasks {
            ensure!(
                total.is_none_or(|total| total == *done),
                "{task}: expected all of {total:?} bytes at the end, but found {done}"
            );
        }
        Ok(!tasks.is_empty())
    }
}

/// Waits for a condition that comes about by itself. Returns whether it did within the time limit.
pub(super) async fn eventually<F>(limit: Duration, mut condition: impl FnMut() -> F) -> TestResult<bool>
where
    F: Future<Output = TestResult<bool>>,
{
    let deadline = Instant::now() + limit;
    loop {
        if condition().await? {
            return Ok(true);
        }
        if Instant::now() > deadline {
            return Ok(false);
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns the network of a manifest that declares none.
pub(super) fn network() -> PlannedNetwork {
    let (name, cidr) = DEFAULT_SUBNET;
    // A constant of this crate, which parses.
    let subnets = cidr.parse().ok().map(|cidr| PlannedSubnet {
        name: name.to_owned(),
        vpc: name.to_owned(),
        cidr,
        dhcp: true,
        dns: Vec::new(),
        unmanaged: false,
    });
    PlannedNetwork {
        declared: false,
        vpcs: vec![PlannedVpc { name: name.to_owned(), internet: true }],
        subnets: subnets.into_iter().collect(),
    }
}

/// Describes a NIC in that network, with an address of its own.
pub(super) fn nic(lab: &dyn Lab, machine: &str, model: NicModel) -> PlannedNic {
    let digest = Digest::of(format!("{} {machine}", lab.id()).as_bytes());
    let [a, b, c, ..] = *digest.as_bytes();
    PlannedNic {
        name: "nic1".to_owned(),
        subnet: DEFAULT_SUBNET.0.to_owned(),
        slot: 1,
        slot_pinned: false,
        ip: None,
        mac: MacAddress::new([0x52, 0x54, 0, a, b, c]),
        model,
    }
}
