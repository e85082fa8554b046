//! What another backend that drives QEMU by other means (libvirt) shares with this one: the host and its accelerator,
//! labs' directories and volumes, captured disks, the network, serial consoles,
//! firmware and TPMs. Outside of semantic versioning.

pub use crate::{
    accelerator::Chosen,
    capture::Captured,
    command_line::{nic_arguments, user_nic_arguments},
    ground::{Ground, blocking, kept_access},
    host::{Host, Programs, diagnose},
    lan::Lan,
    machine_state::{Loader, MachineState, Tpm, board, loader},
    process::without_advice,
    serial::{SerialConsole, SerialPaths},
};
