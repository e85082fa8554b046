//! The VM of a module that a machine of a lab starts from, and its files.

use crate::store::Store;
use rudder_core::{
    Error, Result,
    backend::Progress,
    hardware::Firmware,
    module::{CapturedState, Module, StateKind, TemplateMachine},
};
use std::fs;

/// A VM of a module.
#[derive(Debug)]
pub struct Parent {
    /// The VM's entry in the module.
    pub machine: TemplateMachine,
    /// The module.
    pub module: Module,
    /// The store that contains the module's files.
    pub store: Store,
}

impl Parent {
    /// Returns the captured state of this kind, if it exists.
    #[must_use]
    pub fn state(&self, kind: StateKind) -> Option<&CapturedState> {
        self.machine.state.iter().find(|state| state.kind == kind)
    }

    /// Returns its variables, for a machine with this firmware. Those of another firmware would lack the keys of Secure Boot, or
    /// contain keys that were not requested.
    #[must_use]
    pub fn variables(&self, firmware: Firmware) -> Option<&CapturedState> {
        let same = self.machine.firmware == firmware;
        self.state(StateKind::FirmwareVariables).filter(|_| same)
    }

    /// Returns the bytes of a state, checked to be those that were captured.
    ///
    /// # Errors
    /// `InvalidImage` when the file was changed since; file errors.
    pub fn read(&self, state: &CapturedState) -> Result<Vec<u8>> {
        let progress = Progress::none();
        let path = self.store.captured_file(&self.module, &state.file, &state.content, &progress)?;
        fs::read(&path).map_err(|error| Error::io(format_args!("read {}", path.display()), error))
    }
}
