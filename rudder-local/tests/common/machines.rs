//! Machines for tests with real QEMU processes, the same on every backend, and what is observed of their processes.
//! Included by the tests of several crates.
#![allow(clippy::unwrap_used, dead_code, missing_docs, unreachable_pub)]

use rudder_core::{
    backend::{ImportRequest, Lab, MachineDisk, MachineSpec, Progress},
    hardware::{Bus, NicModel},
    plan::{PlannedNetwork, PlannedNic, PlannedSource, PlannedSubnet, PlannedUrl, PlannedVpc},
};
use std::{fs, path::Path, time::Duration};

/// Waits until a condition holds, for at most 30 s.
pub async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(tokio::time::Instant::now() < deadline, "not within 30 s: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Returns the IDs of all processes.
pub fn processes() -> impl Iterator<Item = i32> {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// Returns the processes, except zombies, whose working directory is below `directory` or was before it was removed.
pub fn processes_below(directory: &Path) -> Vec<i32> {
    let directory = directory.canonicalize().unwrap();
    processes()
        .filter(|pid| fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd.starts_with(&directory)))
        .collect()
}

/// Returns the command line of a process, with its arguments separated by spaces.
pub fn command_line(pid: i32) -> String {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&line).replace('\0', " ")
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
