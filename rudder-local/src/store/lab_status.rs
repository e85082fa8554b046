//! Whether a lab is in use, as its lock and its ledger tell.

use super::{
    identity::DirectoryIdentity,
    ledger::{self, Ledger},
    lock::{Availability, FileLock},
};
use rudder_core::{Result, backend::LabState};
use std::{path::Path, time::SystemTime};

/// The file that the owner of a lab keeps locked for as long as it lives.
pub(super) const LOCK: &str = "lock";

/// What is known about a lab.
pub(super) struct LabStatus {
    pub(super) state: LabState,
    /// Its ledger, or why that cannot be read.
    pub(super) ledger: Result<Ledger>,
    /// Its lock, if no process held it.
    pub(super) lock: Option<FileLock>,
}

/// Determines whether a lab is alive; `None` when it no longer exists. The caller holds `locks/labs`.
pub(super) fn lab_status(path: &Path, id: &str) -> Result<Option<LabStatus>> {
    let ledger = match ledger::read(path, id) {
        Ok(None) => return Ok(None),
        Ok(Some(ledger)) => Ok(ledger),
        Err(error) => Err(error),
    };
    let availability = FileLock::try_exclusive(&path.join(LOCK))?;
    let is_held = matches!(availability, Availability::Held);
    let is_missing = matches!(availability, Availability::Missing);
    let state = match &ledger {
        Ok(ledger) if ledger.kept => LabState::of_kept(ledger.expires.map(SystemTime::from)),
        _ if is_held => LabState::Owned,
        Err(_) => LabState::Damaged,
        // The lock of a living owner was removed.
        Ok(ledger) if is_missing && is_of(ledger, path) && ledger.owner.is_running() => LabState::Owned,
        Ok(_) => LabState::Abandoned,
    };
    let lock = if let Availability::Free(lock) = availability { Some(lock) } else { None };
    Ok(Some(LabStatus { state, ledger, lock }))
}

/// Returns whether a ledger was written for the directory that contains it.
fn is_of(ledger: &Ledger, path: &Path) -> bool {
    ledger.directory.is_some() && DirectoryIdentity::of(path).ok() == ledger.directory
}
