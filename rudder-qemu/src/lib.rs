//! The QEMU backend of Rudder: one process per machine, controlled over QMP; a network in user space; disk images
//! through qemu-img. Needs no root, no daemon and no bridge.
//!
//! # Modules
//! `backend` opens labs · `lab` holds machines · `machine` starts a machine · `run` controls and observes a running
//! machine · `command_line` and `qmp` are the interfaces to QEMU. Everything that does not depend on how a
//! machine is started is in [`rudder_local`].
//!
//! # Cleaning up
//! Every process is started in such a way that the kernel kills it when its owner dies ([`PR_SET_PDEATHSIG`][prctl],
//! through setpriv). It is recorded in the ledger of its lab, and carries the lab's id in its environment and its name,
//! so that the next start finds and removes whatever a killed owner left behind. Dropping a machine, a lab or a future
//! kills the processes that it started.
//!
//! [prctl]: https://man7.org/linux/man-pages/man2/PR_SET_PDEATHSIG.2const.html

mod backend;
mod command_line;
mod lab;
mod machine;
mod qmp;
mod run;

pub use self::backend::{QemuBackend, QemuBackendBuilder};
pub use rudder_local::accelerator::Accelerator;

/// The name of the backend, which records in the store contain.
pub(crate) const NAME: &str = "qemu";
