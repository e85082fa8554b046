//! Disks, CD-ROMs, floppies and the seed, each at its location on its bus.

use super::{Files, Line};
use rudder_core::{Result, backend::MachineSpec, hardware::Bus};
use rudder_local::pci_layout::{Location, Locations, XHCI_PORTS, cdrom_bus, slot};
use serde_json::json;

/// Adds the disks, the CD-ROMs, the floppy and the seed.
pub(super) fn attach(line: &mut Line, spec: &MachineSpec, files: &Files) -> Result<()> {
    let mut locations = Locations::new(line.chipset);
    let mut take = |line: &mut Line, bus| {
        let location = locations.take(bus).map_err(|error| error.with_context("vm", &spec.name))?;
        Ok::<_, rudder_core::Error>(at(line, location))
    };
    if spec.disks.iter().any(|disk| disk.bus == Bus::Scsi) {
        let scsi = line.device("virtio-scsi-pci", slot::SCSI, 0);
        line.option("-device", format!("{scsi},id=scsi"));
    }
    for (index, disk) in spec.disks.iter().enumerate() {
        let node = format!("disk{index}");
        line.blockdev(&json!({
            "node-name": node,
            "driver": "qcow2",
            "file": {"driver": "file", "filename": disk.volume.id},
            // The disks of a lab are discarded when the host crashes, so no flush has to reach the physical disk.
            "cache": {"no-flush": true},
            "discard": "unmap",
            "detect-zeroes": "unmap",
        }));
        let location = take(line, disk.bus)?;
        let driver = match disk.bus {
            Bus::Virtio => "virtio-blk-pci",
            Bus::Scsi => "scsi-hd",
            Bus::Sata | Bus::Ide => "ide-hd",
            Bus::Usb => "usb-storage",
        };
        let boot = if index == 0 { ",bootindex=0" } else { "" };
        // An I/O error pauses the machine instead of being reported to the guest, where a problem of the host would
        // look like a broken disk.
        line.option(
            "-device",
            format!("{driver},{location},id={node}-device,drive={node},werror=stop,rerror=stop{boot}"),
        );
    }
    for (index, cdrom) in spec.cdroms.iter().enumerate() {
        let node = format!("cdrom{index}");
        line.blockdev(&json!({
            "node-name": node,
            "driver": "raw",
            "read-only": true,
            "file": {"driver": "file", "filename": cdrom.id, "read-only": true},
        }));
        let location = take(line, cdrom_bus(spec))?;
        // After the boot disk, which has index 0: firmware falls through to the CD-ROM if that disk is blank.
        let boot = index + 1;
        line.option("-device", format!("ide-cd,{location},id={node}-device,drive={node},bootindex={boot}"));
    }
    if spec.floppy.is_some() {
        line.blockdev(&json!({
            "node-name": "floppy",
            "driver": "raw",
            "file": {"driver": "file", "filename": files.floppy},
        }));
        if let Some(controller) = line.chipset.floppies() {
            line.option("-device", controller);
        }
        line.option("-device", "floppy,id=floppy-device,drive=floppy,drive-type=144");
    }
    if spec.seed.is_some() {
        line.blockdev(&json!({
            "node-name": "seed",
            "driver": "raw",
            "read-only": true,
            "file": {"driver": "file", "filename": files.seed, "read-only": true},
        }));
        // On the bus of the boot disk, for which the guest has a driver; last, so that no disk moves.
        let bus = spec.disks.first().map_or(Bus::Virtio, |disk| disk.bus);
        let driver = match bus {
            Bus::Virtio => None,
            Bus::Scsi => Some("scsi-cd"),
            Bus::Sata | Bus::Ide => Some("ide-cd"),
            Bus::Usb => Some("usb-storage"),
        };
        // If the bus is full, the seed gets a slot reserved for it.
        let location = match driver.and_then(|driver| Some((driver, take(line, bus).ok()?))) {
            None => line.device("virtio-blk-pci", slot::SEED, 0),
            Some((driver, location)) => format!("{driver},{location}"),
        };
        line.option("-device", format!("{location},id=seed-device,drive=seed"));
    }
    Ok(())
}

/// Returns the options of a device at a location, and adds its controller if the device is the first one on it.
fn at(line: &mut Line, location: Location) -> String {
    match location {
        Location::Virtio { slot, function } => {
            format!("bus={},addr={slot:02x}.{function},multifunction=on", line.chipset.bus())
        }
        Location::Scsi { target } => format!("bus=scsi.0,scsi-id={target}"),
        Location::Sata { controller, port } => {
            if port == 0 {
                let device = line.controller("ich9-ahci", slot::AHCI, controller);
                line.option("-device", format!("{device},id=sata{controller}"));
            }
            format!("bus=sata{controller}.{port}")
        }
        Location::Usb { controller, port } => {
            if port == 1 {
                let device = line.controller("qemu-xhci", slot::XHCI, controller);
                line.option(
                    "-device",
                    format!("{device},id=usb{controller},p2={XHCI_PORTS},p3={XHCI_PORTS}"),
                );
            }
            format!("bus=usb{controller}.0,port={port}")
        }
        Location::Chipset { unit } => line.chipset.unit(unit),
    }
}
