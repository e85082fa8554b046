//! The hardware that a VM can have, in the terms of the manifest.

use serde::{Deserialize, Serialize};

/// The firmware of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Firmware {
    /// BIOS.
    Bios,
    /// UEFI.
    Uefi,
    /// UEFI with Secure Boot enforced.
    UefiSecureBoot,
}

/// The bus that a disk is attached to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Bus {
    /// virtio-blk.
    Virtio,
    /// virtio-scsi.
    Scsi,
    /// AHCI.
    Sata,
    /// USB mass storage. Cannot be booted from.
    Usb,
    /// The chipset's IDE controller.
    Ide,
}

/// The model of a NIC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum NicModel {
    /// Intel 82540EM.
    #[serde(rename = "e1000")]
    E1000,
    /// virtio-net.
    #[serde(rename = "virtio")]
    Virtio,
    /// Intel 82574L.
    #[serde(rename = "e1000e")]
    E1000e,
    /// Realtek RTL8139.
    #[serde(rename = "rtl8139")]
    Rtl8139,
    /// AMD PCnet.
    #[serde(rename = "pcnet")]
    Pcnet,
    /// NE2000 on PCI.
    #[serde(rename = "ne2k_pci")]
    Ne2kPci,
}

/// The shell of a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum GuestShell {
    /// A POSIX shell; Bash if available.
    Bash,
    /// Windows PowerShell.
    Powershell,
}
