//! What the backends for hypervisors on one host share: the [`store`] and its records on disk, the storage of a lab, the
//! [`network`] of a lab, the [life](lifecycle) of a [`machine`], capture, firmware, TPMs, the PCI layout of machines,
//! processes, and the ledger that records them.
//!
//! Only [`store`] is meant for programs that embed Rudder, which use it as `rudder::store`. Everything else is for
//! backends, and not covered by semantic versioning.

pub mod accelerator;
pub mod capture;
pub mod firmware;
pub mod helper;
pub mod host;
pub mod image;
pub mod import;
mod lab_record;
pub mod lab_storage;
pub mod lan;
pub mod lifecycle;
pub mod log_tail;
pub mod machine;
pub mod machine_state;
pub mod network;
pub mod nic_arguments;
pub mod parent;
pub mod pci_layout;
pub mod process;
pub mod serial;
pub mod store;
pub mod tpm;
