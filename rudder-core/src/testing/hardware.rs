//! The hardware that a guest sees: disks on every bus, NICs of every model in their slots, media.

use super::{
    NotPassed, Rig, TestResult,
    rig::{BLANK, nic},
    test_result::{During as _, ensure},
};
use crate::{
    Error,
    backend::{ImportRequest, Lab, MachineDisk, MachineSpec, Progress, Volume},
    capability::Capability,
    check::DEFAULT_SUBNET,
    hardware::{Bus, NicModel},
    plan::{PlannedSource, PlannedUrl},
};
use std::sync::Arc;

/// The buses, the capability of each, and the size of the disk that the shared guest has there, by which it is
/// recognised.
const BUSES: [(Capability, Bus, u64); 5] = [
    (Capability::DiskVirtio, Bus::Virtio, BLANK + (1 << 20)),
    (Capability::DiskScsi, Bus::Scsi, BLANK + (2 << 20)),
    (Capability::DiskSata, Bus::Sata, BLANK + (3 << 20)),
    (Capability::DiskUsb, Bus::Usb, BLANK + (4 << 20)),
    (Capability::DiskIde, Bus::Ide, BLANK + (5 << 20)),
];
/// The models beside the one that the guest uses for its connections, in the order of their slots.
const MODELS: [NicModel; 6] = [
    NicModel::E1000,
    NicModel::Virtio,
    NicModel::E1000e,
    NicModel::Rtl8139,
    NicModel::Pcnet,
    NicModel::Ne2kPci,
];
/// The beginning of a CD-ROM.
const CD_ROM_CONTENT: &str = "on the CD-ROM of the suite";
/// The beginning of a floppy.
const FLOPPY_CONTENT: &str = "on the floppy of the suite";

/// Adds to the shared guest all hardware that the backend claims to support.
pub(super) async fn equip(rig: &Rig, lab: &dyn Lab, spec: &mut MachineSpec) -> TestResult {
    let capabilities = rig.backend().capabilities();
    if capabilities.has(Capability::SourceBlank) {
        for (_, bus, size) in BUSES.into_iter().filter(|(capability, ..)| capabilities.has(*capability)) {
            let name = format!("on-{bus:?}").to_lowercase();
            let request = ImportRequest::new(&spec.name, &name, PlannedSource::Blank, Some(size));
            let imported = lab.import(&request, &Progress::none()).await.during("import a blank disk")?;
            spec.disks.push(MachineDisk { name, bus, volume: imported.volume });
        }
    }
    if capabilities.has(Capability::NicModels) {
        for (slot, model) in (2..).zip(MODELS) {
            let mut nic_spec = nic(lab, &format!("nic {slot}"), model);
            nic_spec.name = format!("nic{slot}");
            nic_spec.slot = slot;
            nic_spec.slot_pinned = capabilities.has(Capability::NicSlots);
            spec.nics.push(nic_spec);
        }
    }
    if capabilities.has(Capability::Isos) {
        spec.cdroms.push(cd_rom(rig, lab, &spec.name).await?);
    }
    if capabilities.has(Capability::Floppy) {
        spec.floppy = Some(Arc::from(medium(FLOPPY_CONTENT, 1440 << 10)));
    }
    Ok(())
}

/// Returns bytes of this size that begin with a line.
fn medium(line: &str, size: usize) -> Vec<u8> {
    let mut bytes = format!("{line}\n").into_bytes();
    bytes.resize(size, 0);
    bytes
}

async fn cd_rom(rig: &Rig, lab: &dyn Lab, machine: &str) -> TestResult<Volume> {
    let bytes = medium(CD_ROM_CONTENT, 1 << 20);
    let made = |error| Error::io("create a CD-ROM image", error);
    let file = tempfile::NamedTempFile::new().map_err(made)?;
    let url = match rig.adapter().published(&bytes) {
        Some(url) => url,
        None => {
            std::fs::write(file.path(), bytes).map_err(made)?;
            let url = url::Url::from_file_path(file.path());
            url.map_err(|()| NotPassed::Failed("expected a path that a URL can express".to_owned()))?
        }
    };
    let request = ImportRequest::cdrom(machine, "iso", PlannedUrl { url, sha256: None });
    Ok(lab.import(&request, &Progress::none()).await.during("import a CD-ROM")?.volume)
}

async fn detects_disk(rig: &Rig, bus: Bus) -> TestResult {
    let booted = rig.shared().await?;
    let size = BUSES.iter().find(|(_, of, _)| *of == bus).map_or(0, |(.., size)| size >> 10);
    // Lines of major, minor, KiB, name (proc(5)).
    let partitions = booted.run("cat /proc/partitions").await?;
    let sizes = partitions.lines().filter_map(|line| line.split_whitespace().nth(2)?.parse::<u64>().ok());
    ensure!(
        sizes.into_iter().any(|found| found == size),
        "expected the guest to see a disk of {size} KiB on {bus:?}, but found:\n{partitions}"
    );
    Ok(())
}

/// A guest sees its disk on virtio.
pub async fn a_disk_on_virtio_is_detected(rig: &Rig) -> TestResult {
    detects_disk(rig, Bus::Virtio).await
}

/// A guest sees its disk on SCSI.
pub async fn a_disk_on_scsi_is_detected(rig: &Rig) -> TestResult {
    detects_disk(rig, Bus::Scsi).await
}

/// A guest sees its disk on SATA.
pub async fn a_disk_on_sata_is_detected(rig: &Rig) -> TestResult {
    detects_disk(rig, Bus::Sata).await
}

/// A guest sees its disk on USB.
pub async fn a_disk_on_usb_is_detected(rig: &Rig) -> TestResult {
    detects_disk(rig, Bus::Usb).await
}

/// A guest sees its disk on IDE.
pub async fn a_disk_on_ide_is_detected(rig: &Rig) -> TestResult {
    detects_disk(rig, Bus::Ide).await
}

/// Returns the addresses of the guest's NICs, in the order of their locations.
async fn nics(rig: &Rig) -> TestResult<Vec<String>> {
    let booted = rig.shared().await?;
    let reported = booted.run(&rig.image()?.nics).await?;
    let mut nics: Vec<(&str, &str)> = reported
        .lines()
        .filter_map(|line| line.split_once(' '))
        .map(|(address, place)| (place.trim(), address))
        .collect();
    nics.sort_unstable();
    Ok(nics.into_iter().map(|(_, address)| address.to_owned()).collect())
}

/// Returns the addresses that the NICs were created with, in the order of their slots.
async fn wanted(rig: &Rig) -> TestResult<Vec<String>> {
    let booted = rig.shared().await?;
    let lab = &*booted.lab;
    let mut wanted = vec![nic(lab, booted.machine.name(), NicModel::Virtio).mac.to_string()];
    wanted.extend((2..8).map(|slot| nic(lab, &format!("nic {slot}"), NicModel::Virtio).mac.to_string()));
    Ok(wanted)
}

/// A guest sees a NIC of every model, with the hardware address it was created with.
pub async fn nics_of_every_model_are_detected(rig: &Rig) -> TestResult {
    let (found, wanted) = (nics(rig).await?, wanted(rig).await?);
    let missing: Vec<_> = wanted.iter().filter(|address| !found.contains(address)).collect();
    ensure!(missing.is_empty(), "expected the NICs {wanted:?} on {}, but found {found:?}", DEFAULT_SUBNET.0);
    Ok(())
}

/// The NICs of a guest are in the order of their slots.
pub async fn nics_are_in_the_order_of_their_slots(rig: &Rig) -> TestResult {
    let (found, wanted) = (nics(rig).await?, wanted(rig).await?);
    ensure!(found == wanted, "expected the NICs in the order {wanted:?}, but found {found:?}");
    Ok(())
}

/// A guest reads its CD-ROM.
pub async fn a_cd_rom_is_readable(rig: &Rig) -> TestResult {
    let booted = rig.shared().await?;
    let read = booted.run("head -n 1 /dev/sr0; head -n 1 /dev/sr1 2>/dev/null; true").await?;
    ensure!(
        read.contains(CD_ROM_CONTENT),
        "expected {CD_ROM_CONTENT:?} on a CD-ROM of the guest, but found {read:?}"
    );
    Ok(())
}

/// A guest reads its floppy.
pub async fn a_floppy_is_readable(rig: &Rig) -> TestResult {
    let booted = rig.shared().await?;
    let read = booted.run("head -n 1 /dev/fd0").await?;
    ensure!(read.contains(FLOPPY_CONTENT), "expected {FLOPPY_CONTENT:?} on the floppy, but found {read:?}");
    Ok(())
}
