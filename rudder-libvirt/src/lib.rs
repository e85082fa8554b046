//! The libvirt backend of Rudder: each machine is a domain of a libvirt daemon on this host.
//!
//! # Its rooms
//! `backend` what is here, open a lab, reap · `lab` machines and their end · `machine` start, dial, capture · `watch` how a
//! machine fares and how it ended · `modules` the halted domains of a published module · and libvirt's own trade:
//! `connection`, `host_capabilities`, `domain`, `network`, `label`, `process`, `xml`.
//!
//! # Who ends what
//! A domain is started so that libvirt ends it when the connection of its owner closes (`VIR_DOMAIN_START_AUTODESTROY`), and
//! carries a label in its metadata (store, lab, VM, owner): `reap` finds by it what a killed owner left. Its process carries
//! the lab's id in its environment, so that a lab can be removed even while libvirt cannot be reached.
//!
//! # What is polled
//! The `virt` crate has no domain events (0.4). The end of a machine's process is told by the kernel; whether a machine was
//! paused, by a panic or a disk that failed, is asked for four times a second.

mod backend;
mod connection;
mod devices;
mod domain;
mod exit_reason;
mod host_capabilities;
mod lab;
mod lab_context;
mod label;
mod machine;
mod modules;
mod network;
mod pci_addresses;
mod picture;
mod process;
mod watch;
mod xml;

pub use self::backend::{LibvirtBackend, LibvirtBackendBuilder};
pub use rudder_local::accelerator::Accelerator;
