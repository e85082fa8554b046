//! A network as it is written down for the process that runs it after its lab was kept.

use rudder_core::plan::{PlannedNetwork, PlannedNic};
use serde::{Deserialize, Serialize};

/// The version of the record; one that is newer is not read.
pub const FORMAT: u32 = 1;

/// A network, written down.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct NetworkRecord {
    /// The version of the record.
    pub format: u32,
    /// The name of the lab.
    pub name: String,
    /// Its plan.
    pub network: PlannedNetwork,
    /// Its machines.
    pub machines: Vec<MachineRecord>,
}

impl NetworkRecord {
    pub(crate) fn new(name: String, network: PlannedNetwork, machines: Vec<MachineRecord>) -> Self {
        Self { format: FORMAT, name, network, machines }
    }
}

/// A machine on a network, written down.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct MachineRecord {
    /// Its name.
    pub name: String,
    /// Its NICs, with their addresses.
    pub nics: Vec<PlannedNic>,
    /// The files, in the lab's directory, of the sockets on which QEMU listens for its NICs.
    pub sockets: Vec<String>,
    /// Ports of the guest, and the files of the sockets that lead to them.
    pub doors: Vec<(u16, String)>,
}

impl MachineRecord {
    pub(crate) fn new(nics: Vec<PlannedNic>, name: String) -> Self {
        Self { name, nics, sockets: Vec::new(), doors: Vec::new() }
    }
}
