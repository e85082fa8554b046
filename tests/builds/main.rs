//! Whole builds on QEMU by the programs in `examples/`: what a user sees and does, from typing a boot command to a terminal that is
//! closed. One program for all of them, so that both cores have work to the end.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod boot_command;
mod console;
mod damaged_store;
mod firmware;
mod handbuild;
mod inputs;
mod install;
mod interrupt;
mod machines;
mod media;
mod modules;
mod printing;
mod steps;
#[path = "../support/mod.rs"]
mod support;
