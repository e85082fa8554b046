//! The two boards that machines are built around, and what differs between them.

use rudder_core::{
    backend::MachineSpec,
    plan::{Bus, Firmware},
};

/// What a machine is built around.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Chipset {
    /// QEMU's `pc`.
    I440Fx,
    /// QEMU's `q35`.
    Q35,
}

impl Chipset {
    /// That of a machine.
    pub(crate) fn of(spec: &MachineSpec) -> Self {
        let ide = spec.disks.iter().any(|disk| disk.bus == Bus::Ide);
        match spec.firmware {
            Firmware::Bios => Self::I440Fx,
            Firmware::Uefi if ide => Self::I440Fx,
            Firmware::Uefi | Firmware::UefiSecureBoot => Self::Q35,
        }
    }

    /// QEMU's short name for its machine.
    pub(crate) fn machine(self) -> &'static str {
        match self {
            Self::I440Fx => "pc",
            Self::Q35 => "q35",
        }
    }

    /// Its PCI bus.
    pub(super) fn bus(self) -> &'static str {
        match self {
            Self::I440Fx => "pci.0",
            Self::Q35 => "pcie.0",
        }
    }

    /// The device that does power management.
    pub(super) fn power(self) -> &'static str {
        match self {
            Self::I440Fx => "PIIX4_PM",
            Self::Q35 => "ICH9-LPC",
        }
    }

    /// The controller of floppies that it lacks.
    pub(super) fn floppies(self) -> Option<&'static str> {
        match self {
            Self::I440Fx => None,
            Self::Q35 => Some("isa-fdc"),
        }
    }

    /// Units on its own disk controller: IDE's two channels of two, or six ports of SATA.
    pub(super) fn units(self) -> usize {
        match self {
            Self::I440Fx => 4,
            Self::Q35 => 6,
        }
    }

    /// A unit on its own disk controller.
    pub(super) fn unit(self, index: usize) -> String {
        match self {
            Self::I440Fx => format!("bus=ide.{},unit={}", index / 2, index % 2),
            Self::Q35 => format!("bus=ide.{index}"),
        }
    }
}
