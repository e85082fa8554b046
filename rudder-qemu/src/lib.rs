//! The raw QEMU backend of Rudder: one process per machine, controlled over QMP; a network in user space; disks through
//! qemu-img. Nothing here needs root, a daemon or a bridge.
//!
//! # Its rooms
//! `backend` what is here, open a lab · `lab` its machines · `lan` its network · `ground` its directory and volumes · `machine` start, dial,
//! capture · `watch` how a machine fares and how it ended · `capture` copies of disks · `state` and `machine_state`
//! what it keeps outside its disks · and QEMU's own trade: `command_line`, `firmware`, `tpm`, `qmp`, `image`, `host`, `accelerator`, `process` ·
//! [`parts`] what another backend that drives QEMU shares with this one.
//!
//! # Who ends what
//! Every process is started so that the kernel kills it when its owner dies ([`PR_SET_PDEATHSIG`][prctl], through
//! setpriv), is written into the ledger of its lab, and carries the lab's id in its environment and its name; so what
//! a killed owner leaves is found and removed by the next start. Dropping a machine, a lab or a future kills what it
//! started.
//!
//! [prctl]: https://man7.org/linux/man-pages/man2/PR_SET_PDEATHSIG.2const.html

mod accelerator;
mod backend;
mod capture;
mod command_line;
mod firmware;
mod ground;
mod host;
mod image;
mod lab;
mod lan;
mod machine;
mod machine_state;
pub mod parts;
mod process;
mod qmp;
mod serial;
mod state;
mod tpm;
mod watch;

pub use self::{
    accelerator::Accelerator,
    backend::{QemuBackend, QemuBackendBuilder},
};
