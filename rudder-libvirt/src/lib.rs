//! The libvirt backend of Rudder: each machine is a domain of a libvirt daemon on this host.
//!
//! # Modules
//! `backend` checks the host, opens labs and reaps · `lab` manages machines and their end · `machine` starts and
//! dials a machine · `run` controls and observes a running machine · `modules` manages the halted domains of
//! published modules. `connection`, `host_capabilities`, `domain`, `network`, `label`, `process` and `xml` are the
//! interface to libvirt.
//!
//! # Cleaning up
//! A domain is started in such a way that libvirt ends it when the connection of its owner closes
//! (`VIR_DOMAIN_START_AUTODESTROY`). It carries a label in its metadata (store, lab, VM, owner), by which `reap` finds
//! what a killed owner left behind. Its process carries the lab's id in its environment, so that a lab can be removed
//! even while libvirt is unreachable.
//!
//! # What is polled
//! The `virt` crate (0.4) does not support domain events. The kernel reports the end of a machine's process; whether a
//! machine was paused, by a panic or a disk error, is polled four times a second.

mod backend;
mod connection;
mod devices;
mod domain;
mod domain_state;
mod host_capabilities;
mod lab;
mod lab_context;
mod label;
mod machine;
mod modules;
mod network;
mod pci_addresses;
mod process;
mod run;
mod screenshot;
mod xml;

pub use self::backend::{LibvirtBackend, LibvirtBackendBuilder};
pub use rudder_local::accelerator::Accelerator;

/// The name of the backend, which records in the store contain.
pub(crate) const NAME: &str = "libvirt";
