//! Disks, CD-ROMs, floppies and the seed, each at its place on its bus.

use super::{Chipset, Files, Line, place};
use rudder_core::{Error, ErrorKind, Result, backend::MachineSpec, plan::Bus};
use serde_json::json;

/// Functions of a PCI device.
const FUNCTIONS: usize = 8;
/// Ports of an AHCI controller.
const AHCI_PORTS: usize = 6;
/// Ports of an xHCI controller that are used.
const XHCI_PORTS: usize = 8;
/// Disks on the SCSI controller.
const SCSI_TARGETS: usize = 64;

fn too_many(spec: &MachineSpec, bus: &str, limit: usize) -> Error {
    Error::new(ErrorKind::InvalidInput, format!("expected at most {limit} disks on {bus}, but found more"))
        .with_context("vm", &spec.name)
        .with_help("put the others on virtio or scsi")
}

/// Puts the disks in, the CD-ROMs, the floppy and the seed.
pub(super) fn attach(line: &mut Line, spec: &MachineSpec, files: &Files) -> Result<()> {
    let mut used = Used::default();
    if spec.disks.iter().any(|disk| disk.bus == Bus::Scsi) {
        let scsi = line.device("virtio-scsi-pci", place::SCSI, 0);
        line.option("-device", format!("{scsi},id=scsi"));
    }
    for (index, disk) in spec.disks.iter().enumerate() {
        let node = format!("disk{index}");
        line.blockdev(&json!({
            "node-name": node,
            "driver": "qcow2",
            "file": {"driver": "file", "filename": disk.volume.id},
            // A lab's disks are thrown away when the host crashes: no flush has to reach its platters.
            "cache": {"no-flush": true},
            "discard": "unmap",
            "detect-zeroes": "unmap",
        }));
        let place = used
            .take(line, disk.bus)
            .ok_or_else(|| too_many(spec, bus_name(disk.bus), limit(disk.bus, line.chipset)))?;
        let driver = match disk.bus {
            Bus::Virtio => "virtio-blk-pci",
            Bus::Scsi => "scsi-hd",
            Bus::Sata | Bus::Ide => "ide-hd",
            Bus::Usb => "usb-storage",
        };
        let boot = if index == 0 { ",bootindex=0" } else { "" };
        // Paused rather than told to the guest: the host's trouble would look like a broken disk there.
        line.option(
            "-device",
            format!("{driver},{place},id={node}-device,drive={node},werror=stop,rerror=stop{boot}"),
        );
    }
    for (index, image) in spec.cdroms.iter().enumerate() {
        let node = format!("cdrom{index}");
        line.blockdev(&json!({
            "node-name": node,
            "driver": "raw",
            "read-only": true,
            "file": {"driver": "file", "filename": image, "read-only": true},
        }));
        let bus = cdrom_bus(spec);
        let place =
            used.take(line, bus).ok_or_else(|| too_many(spec, bus_name(bus), limit(bus, line.chipset)))?;
        // Behind the boot disk, which has 0: a blank one falls through to here.
        let boot = index + 1;
        line.option("-device", format!("ide-cd,{place},id={node}-device,drive={node},bootindex={boot}"));
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
        // On the bus of the boot disk, because the guest has a driver for that one; last, so that no disk moves.
        let bus = spec.disks.first().map_or(Bus::Virtio, |disk| disk.bus);
        let place = match bus {
            Bus::Virtio => None,
            Bus::Scsi => used.take(line, bus).map(|place| ("scsi-cd", place)),
            Bus::Sata | Bus::Ide => used.take(line, bus).map(|place| ("ide-cd", place)),
            Bus::Usb => used.take(line, bus).map(|place| ("usb-storage", place)),
        };
        let place = place.map_or_else(
            || line.device("virtio-blk-pci", place::SEED, 0),
            |(driver, place)| format!("{driver},{place}"),
        );
        line.option("-device", format!("{place},id=seed-device,drive=seed"));
    }
    Ok(())
}

/// The bus of the CD-ROMs, IDE meaning the chipset's own controller: one for all, so that the guest finds them in order.
pub(super) fn cdrom_bus(spec: &MachineSpec) -> Bus {
    let disks = spec.disks.iter().filter(|disk| disk.bus == Bus::Ide).count();
    // The seed is there, too, when the boot disk is.
    let seed = spec.seed.is_some() && spec.disks.first().is_some_and(|disk| disk.bus == Bus::Ide);
    if disks + usize::from(seed) + spec.cdroms.len() <= Chipset::of(spec).units() {
        Bus::Ide
    } else {
        Bus::Sata
    }
}

pub(super) fn bus_name(bus: Bus) -> &'static str {
    match bus {
        Bus::Virtio => "virtio",
        Bus::Scsi => "scsi",
        Bus::Sata => "sata",
        Bus::Usb => "usb",
        Bus::Ide => "ide",
    }
}

pub(super) fn limit(bus: Bus, chipset: Chipset) -> usize {
    match bus {
        Bus::Virtio => FUNCTIONS * FUNCTIONS,
        Bus::Scsi => SCSI_TARGETS,
        Bus::Sata => FUNCTIONS * AHCI_PORTS,
        Bus::Usb => FUNCTIONS * XHCI_PORTS,
        Bus::Ide => chipset.units(),
    }
}

/// How many places of each bus are taken.
#[derive(Default)]
struct Used {
    virtio: usize,
    scsi: usize,
    sata: usize,
    usb: usize,
    ide: usize,
}

impl Used {
    /// The next place on a bus, as options of a device; brings the controller where it is the first on it.
    fn take(&mut self, line: &mut Line, bus: Bus) -> Option<String> {
        let counter = match bus {
            Bus::Virtio => &mut self.virtio,
            Bus::Scsi => &mut self.scsi,
            Bus::Sata => &mut self.sata,
            Bus::Usb => &mut self.usb,
            Bus::Ide => &mut self.ide,
        };
        let index = *counter;
        if index >= limit(bus, line.chipset) {
            return None;
        }
        *counter += 1;
        Some(match bus {
            Bus::Virtio => {
                let address = place::VIRTIO_DISKS + u8::try_from(index % FUNCTIONS).ok()?;
                format!(
                    "bus={},addr={address:02x}.{},multifunction=on",
                    line.chipset.bus(),
                    index / FUNCTIONS
                )
            }
            Bus::Scsi => format!("bus=scsi.0,scsi-id={index}"),
            Bus::Sata => {
                let (number, port) = (index / AHCI_PORTS, index % AHCI_PORTS);
                if port == 0 {
                    let device = line.controller("ich9-ahci", place::AHCI, number);
                    line.option("-device", format!("{device},id=sata{number}"));
                }
                format!("bus=sata{number}.{port}")
            }
            Bus::Usb => {
                let (number, port) = (index / XHCI_PORTS, index % XHCI_PORTS + 1);
                if port == 1 {
                    let device = line.controller("qemu-xhci", place::XHCI, number);
                    line.option(
                        "-device",
                        format!("{device},id=usb{number},p2={XHCI_PORTS},p3={XHCI_PORTS}"),
                    );
                }
                format!("bus=usb{number}.0,port={port}")
            }
            Bus::Ide => line.chipset.unit(index),
        })
    }
}
