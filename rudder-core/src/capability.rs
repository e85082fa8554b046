//! Capabilities of a backend or of this version of the engine. A plan that needs others is refused before anything starts.

use serde::{Deserialize, Serialize};
use std::{collections::BTreeSet, fmt};

/// A single feature that a manifest may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Capability {
    /// `source.url`.
    SourceUrl,
    /// `source.blank`.
    SourceBlank,
    /// `source.buildRef`.
    SourceBuildRef,
    /// `source.containerDisk`.
    SourceContainerDisk,
    /// `source.sourcePvc`.
    SourcePvc,
    /// Disks on virtio.
    DiskVirtio,
    /// Disks on SCSI.
    DiskScsi,
    /// Disks on SATA.
    DiskSata,
    /// Disks on USB.
    DiskUsb,
    /// Disks on IDE.
    DiskIde,
    /// All NIC models of the manifest.
    NicModels,
    /// NICs pinned to PCI slots.
    NicSlots,
    /// A NoCloud seed (`cloudInit`).
    CloudInit,
    /// Declared VPCs and subnets, static addresses.
    Networks,
    /// `network.subnets[].unmanaged`.
    UnmanagedSubnets,
    /// `isos`.
    Isos,
    /// `floppy`.
    Floppy,
    /// `httpDirectory`.
    HttpDirectory,
    /// Keys typed on the display (`bootCommand`).
    BootCommand,
    /// UEFI (`efiFirmware`).
    Uefi,
    /// `efiFirmware.secureBoot`.
    SecureBoot,
    /// `tpm`.
    Tpm,
    /// `shell` steps.
    ShellStep,
    /// `file` steps.
    FileStep,
    /// `reboot` steps.
    RebootStep,
    /// `windows-update` steps.
    WindowsUpdateStep,
    /// `handbuild` steps.
    HandbuildStep,
    /// `communicator.shell: powershell`.
    PowerShell,
    /// The machine's display as an RFB stream ([`Machine::display`](crate::backend::Machine::display)).
    Display,
    /// The machine's serial console as a stream ([`Machine::serial`](crate::backend::Machine::serial)).
    Serial,
    /// Screenshots ([`Machine::screenshot`](crate::backend::Machine::screenshot)).
    Screenshot,
    /// Streams to ports of a guest that can be closed one half at a time
    /// ([`Machine::dial`](crate::backend::Machine::dial)).
    HalfClose,
    /// Running clones of modules.
    Clone,
}

impl fmt::Display for Capability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

/// A set of capabilities, and what has them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Capabilities {
    /// What has the capabilities: the name of a backend, or the engine.
    pub of: String,
    set: BTreeSet<Capability>,
}

impl Capabilities {
    /// Creates a set of exactly these capabilities.
    pub fn new(of: impl Into<String>, set: impl IntoIterator<Item = Capability>) -> Self {
        Self { of: of.into(), set: set.into_iter().collect() }
    }

    /// Returns the capabilities that this version of the engine provides itself, on every backend. A feature of the engine missing
    /// here is refused, whatever the backend declares.
    #[must_use]
    pub fn engine() -> Self {
        use Capability as C;
        Self::new(
            "this version of rudder",
            [
                C::ShellStep,
                C::FileStep,
                C::RebootStep,
                C::HandbuildStep,
                C::CloudInit,
                C::Isos,
                C::Floppy,
                C::HttpDirectory,
                C::BootCommand,
            ],
        )
    }

    /// Returns whether the set contains this capability.
    #[must_use]
    pub fn has(&self, capability: Capability) -> bool {
        self.set.contains(&capability)
    }

    /// Returns all capabilities of the set, in order.
    pub fn iter(&self) -> impl Iterator<Item = Capability> {
        self.set.iter().copied()
    }
}
