//! The raw QEMU backend of Rudder: one process per machine, controlled over QMP; a network in user space; disks through
//! qemu-img. Nothing here needs root, a daemon or a bridge.
//!
//! # Modules
//! `backend` opens labs · `lab` holds machines · `machine` starts, dials and captures one · `watch` tells how a machine ended ·
//! `command_line` and `qmp` are QEMU's own. Everything that does not depend on how a machine is started is in [`rudder_local`].
//!
//! # Who ends what
//! Every process is started so that the kernel kills it when its owner dies ([`PR_SET_PDEATHSIG`][prctl], through
//! setpriv), is written into the ledger of its lab, and carries the lab's id in its environment and its name; so what
//! a killed owner leaves is found and removed by the next start. Dropping a machine, a lab or a future kills what it
//! started.
//!
//! [prctl]: https://man7.org/linux/man-pages/man2/PR_SET_PDEATHSIG.2const.html

mod backend;
mod command_line;
mod lab;
mod machine;
mod qmp;
mod watch;

pub use self::backend::{QemuBackend, QemuBackendBuilder};
pub use rudder_local::accelerator::Accelerator;
