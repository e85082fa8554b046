//! What tests with real QEMU processes share: a store of their own, and the proof that nothing is left behind.
#![allow(clippy::unwrap_used, dead_code, missing_docs, unreachable_pub)]

use rudder_core::{
    backend::{Backend, ImportRequest, Lab, LabSpec, MachineDisk, MachineSpec, Progress},
    plan::{Bus, NicModel, PlannedNetwork, PlannedNic, PlannedSource, PlannedSubnet, PlannedUrl, PlannedVpc},
    store::Store,
};
use rudder_qemu::{Accelerator, QemuBackend};
use std::{fs, path::Path, sync::Arc, time::Duration};
use tokio::sync::{Semaphore, SemaphorePermit};

/// As many machines at a time as a small host has cores.
static MACHINES: Semaphore = Semaphore::const_new(2);

/// A store in a temporary directory, and a backend on it.
pub struct Place {
    pub backend: QemuBackend,
    pub dir: tempfile::TempDir,
    _permit: SemaphorePermit<'static>,
}

impl Place {
    pub async fn new() -> Self {
        Self::of(1, |builder| builder).await
    }

    pub async fn of(
        machines: u32,
        change: impl FnOnce(rudder_qemu::QemuBackendBuilder) -> rudder_qemu::QemuBackendBuilder,
    ) -> Self {
        let permit = MACHINES.acquire_many(machines).await.unwrap();
        let dir = tempfile::Builder::new().prefix("rudder-test-").tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let backend = change(QemuBackend::builder(store).accelerator(Accelerator::Tcg)).build();
        let report = backend.diagnose().await.unwrap();
        assert!(report.is_ready(), "this test needs QEMU: {:#?}", report.findings);
        Self { backend, dir, _permit: permit }
    }

    pub async fn lab(&self) -> Arc<dyn Lab> {
        self.backend.open_lab(&LabSpec::new("test", network())).await.unwrap()
    }

    /// Proves that no process and no file of a lab is there any more.
    pub async fn assert_clean(self) {
        let labs = self.dir.path().join("labs");
        eventually("the labs are gone", || fs::read_dir(&labs).unwrap().count() == 0).await;
        eventually("the processes are gone", || processes_below(self.dir.path()).is_empty()).await;
    }
}

/// Waits for something that comes about by itself.
pub async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(tokio::time::Instant::now() < deadline, "not within 30 s: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// The processes, but for zombies, whose working directory is below this one, or was before it was removed.
pub fn processes_below(directory: &Path) -> Vec<i32> {
    let directory = directory.canonicalize().unwrap();
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|pid| fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd.starts_with(&directory)))
        .collect()
}

/// The QEMU of a lab.
pub fn qemu_of(directory: &Path) -> i32 {
    let pids = processes_below(directory);
    assert_eq!(pids.len(), 1, "expected one QEMU");
    pids[0]
}

/// The network of a manifest that declares none.
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

/// A card in that network.
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

/// A small machine with a blank disk: it stays at the firmware's "No bootable device".
pub async fn blank_machine(lab: &dyn Lab, name: &str, buses: &[Bus]) -> MachineSpec {
    let mut spec = MachineSpec::new(name, 1, 64 << 20);
    for (index, bus) in buses.iter().enumerate() {
        let disk = format!("disk{index}");
        let request = ImportRequest::new(name, &disk, PlannedSource::Blank, Some(64 << 20));
        let volume = lab.import(&request, &Progress::none()).await.unwrap().volume;
        spec.disks.push(MachineDisk { name: disk, bus: *bus, volume });
    }
    spec.nics.push(nic(1, NicModel::E1000));
    spec.ports = vec![22];
    spec
}

/// Guests of one sector: real-mode programs that the firmware loads at 0x7c00.
pub mod sector {
    /// `hlt`, for ever.
    const REST: &[u8] = &[0xf4, 0xeb, 0xfd];

    fn disk(code: &[&[u8]]) -> Vec<u8> {
        let mut disk = code.concat();
        assert!(disk.len() <= 510);
        disk.resize(510, 0);
        disk.extend([0x55, 0xaa]);
        disk.resize(1 << 20, 0);
        disk
    }

    /// Writes this on the serial console.
    fn say(text: &str) -> Vec<u8> {
        let loop_end = 16 + 2;
        let mut code = vec![
            0xfa, 0x31, 0xc0, 0x8e, 0xd8, // cli; xor ax, ax; mov ds, ax
            0xbe, 0, 0x7c, // mov si, text
            0xba, 0xf8, 0x03, // mov dx, 0x3f8
            0xac, 0x84, 0xc0, 0x74, 0x03, 0xee, 0xeb,
            0xf8, // next: lodsb; test al, al; jz end; out dx, al; jmp next
            0xeb, 0, // end: jmp over the text
        ];
        assert_eq!(code.len(), loop_end + 3);
        code[6] = u8::try_from(code.len()).unwrap();
        code[20] = u8::try_from(text.len() + 1).unwrap();
        code.extend(text.as_bytes());
        code.push(0);
        code
    }

    /// PM1a_CNT of the chipset, where the firmware puts it: SLP_EN with the type of S5.
    const POWER_OFF: &[u8] = &[0xba, 0x04, 0x06, 0xb8, 0x00, 0x20, 0xef];

    /// Says this, and powers off.
    pub fn power_off(text: &str) -> Vec<u8> {
        disk(&[&say(text), POWER_OFF, REST])
    }

    /// Powers off when the power button is pressed: PM1a_EN, then PM1a_STS, bit 8.
    pub fn power_off_on_button() -> Vec<u8> {
        let wait = [
            0xba, 0x02, 0x06, 0xb8, 0x00, 0x01, 0xef, // mov dx, 0x602; mov ax, 0x100; out dx, ax
            0xba, 0x00, 0x06, 0xed, 0xf6, 0xc4, 0x01, 0x74,
            0xfa, // mov dx, 0x600; wait: in ax, dx; test ah, 1; jz wait
        ];
        disk(&[&say("ready"), &wait, POWER_OFF, REST])
    }

    /// Tells the pvpanic device that it panics.
    pub fn panic() -> Vec<u8> {
        disk(&[&say("Kernel panic"), &[0xba, 0x05, 0x05, 0xb0, 0x01, 0xee], REST])
    }

    /// Writes a part of the firmware over the whole disk, a cluster at a time, by INT 13h, function 43h.
    pub fn fill_disk() -> Vec<u8> {
        disk(&[
            &[
                0x31, 0xc0, 0x8e, 0xd8, // xor ax, ax; mov ds, ax
                0xb4, 0x43, 0xb0, 0x00, 0xbe, 0x18, 0x7c, 0xcd,
                0x13, // next: mov ax, 0x4300; mov si, packet; int 0x13
                0x66, 0x81, 0x06, 0x20, 0x7c, 128, 0, 0, 0, // add dword [packet.sector], 128
                0xeb, 0xec, // jmp next
            ],
            // 64 sectors from f000:0000 to sector 128.
            &[0x10, 0, 64, 0, 0, 0, 0x00, 0xf0, 128, 0, 0, 0, 0, 0, 0, 0],
        ])
    }
}

/// A machine that boots this disk, of this size, on this bus.
pub async fn sector_machine(lab: &dyn Lab, disk: &[u8], bus: Bus, size: u64) -> MachineSpec {
    let file = tempfile::Builder::new().suffix(".img").tempfile().unwrap();
    fs::write(file.path(), disk).unwrap();
    let url = url::Url::from_file_path(file.path()).unwrap();
    let source = PlannedSource::Url(PlannedUrl { url, sha256: None });
    let request = ImportRequest::new("guest", "root", source, Some(size));
    let volume = lab.import(&request, &Progress::none()).await.unwrap().volume;
    let mut spec = MachineSpec::new("guest", 1, 64 << 20);
    spec.disks.push(MachineDisk { name: "root".to_owned(), bus, volume });
    spec
}
