//! Shared by tests with a real libvirt: a daemon and a store per test, and checks that nothing is left behind.
#![allow(clippy::unwrap_used, dead_code, missing_docs, unreachable_pub)]

pub mod daemon;

pub use daemon::Daemon;
use rudder_core::{
    backend::{Backend, ImportRequest, Lab, LabSpec, MachineDisk, MachineSpec, Progress},
    hardware::{Bus, NicModel},
    plan::{PlannedNetwork, PlannedNic, PlannedSource, PlannedSubnet, PlannedUrl, PlannedVpc},
};
use rudder_libvirt::{Accelerator, LibvirtBackend};
use rudder_local::store::Store;
use std::{fs, path::Path, sync::Arc, time::Duration};
use tokio::sync::{Semaphore, SemaphorePermit};

/// Limits the number of tests that run at once to the cores of a small host.
static FIXTURES: Semaphore = Semaphore::const_new(2);

/// A daemon, a store in a temporary directory, and a backend on both.
pub struct Fixture {
    pub backend: LibvirtBackend,
    pub daemon: Daemon,
    pub dir: tempfile::TempDir,
    pub permit: SemaphorePermit<'static>,
}

impl Fixture {
    pub async fn new() -> Self {
        let permit = FIXTURES.acquire().await.unwrap();
        let dir = tempfile::Builder::new().prefix("rudder-virt-").tempdir().unwrap();
        let daemon = Daemon::start(&dir.path().join("libvirt"));
        let backend = backend(dir.path(), &daemon);
        let report = backend.diagnose().await.unwrap();
        assert!(report.is_ready(), "this test needs libvirt and QEMU: {:#?}", report.findings);
        Self { backend, daemon, dir, permit }
    }

    pub async fn lab(&self) -> Arc<dyn Lab> {
        self.backend.open_lab(&LabSpec::new("test", network())).await.unwrap()
    }

    /// Asserts that no domain, no process and no file of a lab exists any more.
    pub async fn assert_clean(self) {
        let labs = self.dir.path().join("store/labs");
        eventually("the domains are gone", || {
            self.daemon.domains().iter().all(|name| !name.starts_with("rudder."))
        })
        .await;
        eventually("the labs are gone", || fs::read_dir(&labs).unwrap().count() == 0).await;
        eventually("the processes are gone", || qemus_of(self.dir.path()).is_empty()).await;
    }
}

/// Returns another backend on the same store and daemon.
pub fn backend(dir: &Path, daemon: &Daemon) -> LibvirtBackend {
    let store = Store::open(dir.join("store")).unwrap();
    LibvirtBackend::builder(store).uri(daemon.uri()).accelerator(Accelerator::Tcg).build()
}

/// Waits until a condition holds, for at most 30 s.
pub async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(tokio::time::Instant::now() < deadline, "not within 30 s: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Returns the QEMU processes whose command line names this directory.
pub fn qemus_of(directory: &Path) -> Vec<i32> {
    let mark = directory.to_str().unwrap();
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|pid| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line);
        line.split('\0').next().is_some_and(|program| program.contains("qemu-system")) && line.contains(mark)
    })
    .collect()
}

/// Returns the planned network of a manifest that declares none.
pub fn network() -> PlannedNetwork {
    PlannedNetwork {
        declared: false,
        vpcs: vec![PlannedVpc { name: "default".to_owned(), internet: true }],
        subnets: vec![PlannedSubnet {
            name: "default".to_owned(),
            vpc: "default".to_owned(),
            cidr: "10.0.2.0/24".parse().unwrap(),
            dhcp: true,
            dns: Vec::new(),
            unmanaged: false,
        }],
    }
}

/// Returns a NIC in that network.
pub fn nic(slot: u8, model: NicModel) -> PlannedNic {
    PlannedNic {
        name: format!("nic{slot}"),
        subnet: "default".to_owned(),
        slot,
        slot_pinned: false,
        ip: None,
        mac: format!("52:54:00:12:34:{slot:02x}").parse().unwrap(),
        model,
    }
}

/// Returns a small machine with blank disks: it stays at the firmware's "No bootable device".
pub async fn blank_machine(lab: &dyn Lab, name: &str, buses: &[Bus]) -> MachineSpec {
    let mut spec = MachineSpec::new(name, 1, 64 << 20);
    for (index, bus) in buses.iter().enumerate() {
        let disk = format!("disk{index}");
        let request = ImportRequest::new(name, &disk, PlannedSource::Blank, Some(64 << 20));
        let volume = lab.import(&request, &Progress::none()).await.unwrap().volume;
        spec.disks.push(MachineDisk::new(disk, *bus, volume));
    }
    spec.nics.push(nic(1, NicModel::E1000));
    spec.ports = vec![22];
    spec
}

/// Returns a machine that boots this disk, of this size, on this bus.
pub async fn sector_machine(lab: &dyn Lab, disk: &[u8], bus: Bus, size: u64) -> MachineSpec {
    let file = tempfile::Builder::new().suffix(".img").tempfile().unwrap();
    fs::write(file.path(), disk).unwrap();
    let url = url::Url::from_file_path(file.path()).unwrap();
    let source = PlannedSource::Url(PlannedUrl::new(url));
    let request = ImportRequest::new("guest", "root", source, Some(size));
    let volume = lab.import(&request, &Progress::none()).await.unwrap().volume;
    let mut spec = MachineSpec::new("guest", 1, 64 << 20);
    spec.disks.push(MachineDisk::new("root", bus, volume));
    spec
}
