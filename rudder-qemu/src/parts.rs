//! What another backend that drives QEMU by other means (libvirt) shares with this one: the host and its accelerator,
//! labs' directories and volumes, captured disks, user networking, serial consoles,
//! firmware and TPMs. Outside of semantic versioning.

pub use crate::{
    accelerator::Chosen,
    capture::Captured,
    command_line::card_arguments,
    ground::{Ground, blocking, kept_access},
    host::{Host, Programs, diagnose},
    machine_state::{Loader, MachineState, Tpm, board, loader},
    process::without_advice,
    qmp::read_forwards,
    serial::{SerialConsole, SerialPaths},
};
