//! The locations of a machine's devices: the two boards that machines are built around, and the PCI addresses on them.
//!
//! # Layout
//! With BIOS, the machine is QEMU's `pc` (i440FX, 1996): every NIC and disk of the manifest has a location on it that guests
//! of all ages support. With UEFI it is `q35` (ICH9, 2007), for which UEFI and its system management mode are made, unless
//! there are IDE disks, which only the older chipset has. On both, everything is on one PCI bus with fixed addresses, so that
//! a guest finds its devices in a clone at the same locations as in the build:
//!
//! | address | what |
//! |---|---|
//! | 00, 01 (`pc`) or 00, 1f (`q35`) | the chipset: host bridge, ISA bridge with the floppy controller, IDE or SATA, ACPI |
//! | 02 | VGA |
//! | 03 | the SCSI controller (virtio-scsi), if there are scsi disks |
//! | 04 | SATA controllers (AHCI), six disks each, one per function |
//! | 05 | the USB controllers (xHCI), eight disks each, one per function |
//! | 06 | the random number generator |
//! | 08–0f | virtio disks: the first eight on function 0, the next on function 1 … |
//! | 11–19 | the NICs: slot 1–9 of the manifest |
//! | 1a | the seed |
//!
//! CD-ROMs are on the chipset's own controller, after the disks there, or all of them on SATA if they would not fit.
//! The machine boots from the first disk, and then from the CD-ROMs in order if the disk is not bootable.
//!

use rudder_core::{
    Error, ErrorKind, Result,
    backend::MachineSpec,
    hardware::{Bus, Firmware},
};

/// Functions of a PCI device.
const FUNCTIONS: usize = 8;
/// Ports of an AHCI controller.
pub const AHCI_PORTS: usize = 6;
/// Ports of an xHCI controller that are used.
pub const XHCI_PORTS: usize = 8;
/// Disks on the SCSI controller.
const SCSI_TARGETS: usize = 64;

/// PCI slots, see the table in the documentation of `pci_layout`.
pub mod slot {
    /// The graphics adapter.
    pub const VGA: u8 = 0x02;
    /// The virtio-scsi controller.
    pub const SCSI: u8 = 0x03;
    /// The SATA controllers.
    pub const AHCI: u8 = 0x04;
    /// The USB controllers.
    pub const XHCI: u8 = 0x05;
    /// The random number generator.
    pub const RNG: u8 = 0x06;
    /// The first of the virtio disks.
    pub const VIRTIO_DISKS: u8 = 0x08;
    /// The slot before the first NIC.
    pub const NICS: u8 = 0x10;
    /// The cloud-init seed.
    pub const SEED: u8 = 0x1a;
}

/// The board that a machine is built around.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Chipset {
    /// QEMU's `pc`.
    I440Fx,
    /// QEMU's `q35`.
    Q35,
}

impl Chipset {
    /// Returns the chipset of a machine.
    pub fn of(spec: &MachineSpec) -> Self {
        let ide = spec.disks.iter().any(|disk| disk.bus == Bus::Ide);
        match spec.firmware {
            Firmware::Bios => Self::I440Fx,
            Firmware::Uefi if ide => Self::I440Fx,
            Firmware::Uefi | Firmware::UefiSecureBoot => Self::Q35,
        }
    }

    /// Returns QEMU's short name for its machine type.
    pub fn machine(self) -> &'static str {
        match self {
            Self::I440Fx => "pc",
            Self::Q35 => "q35",
        }
    }

    /// Returns the name of its PCI bus.
    pub fn bus(self) -> &'static str {
        match self {
            Self::I440Fx => "pci.0",
            Self::Q35 => "pcie.0",
        }
    }

    /// Returns the device that does power management.
    pub fn power(self) -> &'static str {
        match self {
            Self::I440Fx => "PIIX4_PM",
            Self::Q35 => "ICH9-LPC",
        }
    }

    /// Returns the floppy controller that has to be added, if the chipset lacks one.
    pub fn floppies(self) -> Option<&'static str> {
        match self {
            Self::I440Fx => None,
            Self::Q35 => Some("isa-fdc"),
        }
    }

    /// Returns the number of units on its own disk controller: IDE's two channels of two, or six SATA ports.
    pub fn units(self) -> usize {
        match self {
            Self::I440Fx => 4,
            Self::Q35 => 6,
        }
    }

    /// Returns the properties that address a unit on its own disk controller.
    pub fn unit(self, index: usize) -> String {
        match self {
            Self::I440Fx => format!("bus=ide.{},unit={}", index / 2, index % 2),
            Self::Q35 => format!("bus=ide.{index}"),
        }
    }

    /// Returns the properties of a device at a PCI slot, for QEMU's option `-device`.
    #[must_use]
    pub fn device(self, driver: &str, slot: u8, function: usize) -> String {
        format!("{driver},bus={},addr={slot:02x}.{function}", self.bus())
    }
}

/// Returns the name of a bus in manifests and messages.
#[must_use]
pub fn bus_name(bus: Bus) -> &'static str {
    match bus {
        Bus::Virtio => "virtio",
        Bus::Scsi => "scsi",
        Bus::Sata => "sata",
        Bus::Usb => "usb",
        Bus::Ide => "ide",
    }
}

/// The location of a disk or CD-ROM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Location {
    /// A virtio disk: a PCI device of its own, with others on its other functions.
    Virtio {
        /// Its PCI slot.
        slot: u8,
        /// Its PCI function, 0 to 7.
        function: usize,
    },
    /// On the virtio-scsi controller.
    Scsi {
        /// Its target id.
        target: usize,
    },
    /// On a SATA controller at [`slot::AHCI`].
    Sata {
        /// The controller's PCI function.
        controller: usize,
        /// Its port, from 0.
        port: usize,
    },
    /// On a USB controller at [`slot::XHCI`].
    Usb {
        /// The controller's PCI function.
        controller: usize,
        /// Its port, from 1.
        port: usize,
    },
    /// On the chipset's own controller.
    Chipset {
        /// Its unit, from 0.
        unit: usize,
    },
}

/// Assigns each disk the next free location on its bus.
#[derive(Debug)]
pub struct Locations {
    chipset: Chipset,
    used: [usize; 5],
}

impl Locations {
    /// Returns an allocator with all locations free.
    #[must_use]
    pub fn new(chipset: Chipset) -> Self {
        Self { chipset, used: [0; 5] }
    }

    /// Takes the next location on a bus.
    ///
    /// # Errors
    /// `InvalidInput` when the bus is full.
    pub fn take(&mut self, bus: Bus) -> Result<Location> {
        let limit = self.limit(bus);
        let index = self.used(bus);
        if index >= limit {
            let message = format!("expected at most {limit} disks on {}, but found more", bus_name(bus));
            return Err(Error::new(ErrorKind::InvalidInput, message)
                .with_help("put the other disks on virtio or scsi"));
        }
        self.used[bus as usize] += 1;
        Ok(match bus {
            Bus::Virtio => Location::Virtio {
                // Less than eight, so the cast is lossless.
                slot: slot::VIRTIO_DISKS + (index % FUNCTIONS) as u8,
                function: index / FUNCTIONS,
            },
            Bus::Scsi => Location::Scsi { target: index },
            Bus::Sata => Location::Sata { controller: index / AHCI_PORTS, port: index % AHCI_PORTS },
            Bus::Usb => Location::Usb { controller: index / XHCI_PORTS, port: index % XHCI_PORTS + 1 },
            Bus::Ide => Location::Chipset { unit: index },
        })
    }

    /// Returns the number of used locations on a bus.
    #[must_use]
    pub fn used(&self, bus: Bus) -> usize {
        self.used[bus as usize]
    }

    /// Returns the number of locations on a bus.
    #[must_use]
    pub fn limit(&self, bus: Bus) -> usize {
        match bus {
            Bus::Virtio => FUNCTIONS * FUNCTIONS,
            Bus::Scsi => SCSI_TARGETS,
            Bus::Sata => FUNCTIONS * AHCI_PORTS,
            Bus::Usb => FUNCTIONS * XHCI_PORTS,
            Bus::Ide => self.chipset.units(),
        }
    }
}

/// Returns the bus of all CD-ROMs, where `Ide` means the chipset's own controller: one bus, so that guests find them in order.
#[must_use]
pub fn cdrom_bus(spec: &MachineSpec) -> Bus {
    let disks = spec.disks.iter().filter(|disk| disk.bus == Bus::Ide).count();
    // The seed is on the same controller as the boot disk.
    let seed = spec.seed.is_some() && spec.disks.first().is_some_and(|disk| disk.bus == Bus::Ide);
    if disks + usize::from(seed) + spec.cdroms.len() <= Chipset::of(spec).units() {
        Bus::Ide
    } else {
        Bus::Sata
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn no_two_disks_share_a_location_and_a_full_bus_is_refused() {
        for chipset in [Chipset::I440Fx, Chipset::Q35] {
            for bus in [Bus::Virtio, Bus::Scsi, Bus::Sata, Bus::Usb, Bus::Ide] {
                let mut locations = Locations::new(chipset);
                let limit = locations.limit(bus);
                let taken: Vec<Location> = (0..limit).map(|_| locations.take(bus).unwrap()).collect();
                for (index, one) in taken.iter().enumerate() {
                    assert!(!taken[index + 1..].contains(one), "{one:?} twice on {bus:?}");
                }
                let error = locations.take(bus).unwrap_err().report();
                assert!(error.contains(&format!("at most {limit} disks on {}", bus_name(bus))), "{error}");
            }
        }
    }
}
