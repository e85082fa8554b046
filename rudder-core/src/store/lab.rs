//! Labs on disk: the directory of one build or clone, its ledger, and whether its owner lives.
//!
//! ```text
//! labs/<id>/            0700, the backend's scratch: overlays, sockets, logs
//!          /lock        held by the owner for as long as it lives, however it dies
//!          /ledger.json owner, purpose, processes, and the blobs and modules it needs
//! ```
//! A lab is made, judged and reaped under the lock `locks/labs`, so that nobody meets one that is half made.

use super::{
    Lease, Store, Use, durable,
    lock::{FileLock, Mode},
    process::{self, ProcessIdentity},
};
use crate::{
    Error, ErrorKind, Result,
    backend::{LabId, ReapReport, Retention},
};
use serde::{Deserialize, Serialize};
use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

/// The environment variable that marks a process as part of a lab; its value is the lab's id. A process that carries
/// it is found and ended with a dead lab even when its owner died before it could record it.
pub const LAB_VARIABLE: &str = "RUDDER_LAB";

/// What is written down about a lab, so that others can clean up behind a dead owner.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Ledger {
    /// The lab.
    pub id: LabId,
    /// What it is for: the name of a build or clone.
    pub purpose: String,
    /// Who opened it.
    pub owner: ProcessIdentity,
    /// When.
    pub created: jiff::Timestamp,
    /// Whether it may be kept, and was.
    pub kept: bool,
    /// Processes that belong to it.
    pub processes: Vec<RecordedProcess>,
    /// Blobs and modules that it needs.
    pub uses: Vec<Use>,
}

/// A process of a lab.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordedProcess {
    /// What it is: `qemu of web`.
    pub role: String,
    /// Who it is.
    #[serde(flatten)]
    pub identity: ProcessIdentity,
}

/// Whether a lab is in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LabState {
    /// Its owner lives.
    Living,
    /// Its owner is gone; it is reaped.
    Dead,
    /// It was kept for inspection; it stays until it is removed.
    Kept,
}

/// A lab that was found in the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LabEntry {
    /// Its id: the name of its directory.
    pub id: String,
    /// Its directory.
    pub path: PathBuf,
    /// Whether it is in use.
    pub state: LabState,
    /// What is written down about it; `None` when its owner died before it wrote it.
    pub ledger: Option<Ledger>,
}

/// The directory of a lab, held by its owner.
///
/// Dropping it ends the recorded processes and removes the directory, unless the lab was kept; [`destroy`](Self::destroy)
/// does the same and says whether it worked.
#[derive(Debug)]
pub struct LabDir {
    store: Store,
    path: PathBuf,
    may_be_kept: bool,
    state: Mutex<Held>,
}

#[derive(Debug)]
struct Held {
    ledger: Ledger,
    /// `None` once the lab was kept or destroyed.
    lock: Option<FileLock>,
    leases: Vec<Lease>,
}

impl Held {
    fn check_open(&self) -> Result<()> {
        if self.lock.is_none() {
            let message = format!("lab {} was destroyed already", self.ledger.id);
            return Err(Error::new(ErrorKind::Conflict, message));
        }
        Ok(())
    }
}

impl LabDir {
    pub(super) fn create(store: &Store, id: &LabId, purpose: &str, retention: Retention) -> Result<Self> {
        let ledger = Ledger {
            id: id.clone(),
            purpose: purpose.to_owned(),
            owner: ProcessIdentity::current()?,
            created: jiff::Timestamp::now(),
            kept: false,
            processes: Vec::new(),
            uses: Vec::new(),
        };
        let path = store.labs_dir().join(id.as_str());
        let _judging = FileLock::wait(&store.lock_path("labs"), Mode::Exclusive)?;
        if path.exists() {
            return Err(Error::new(ErrorKind::Conflict, format!("there is already a lab {id}")));
        }
        durable::make_dir(&path, 0o700)?;
        let lock = FileLock::wait(&path.join("lock"), Mode::Exclusive)?;
        durable::write_json(&path.join("ledger.json"), &ledger, 0o600)?;
        Ok(Self {
            store: store.clone(),
            path,
            may_be_kept: retention == Retention::MayBeKept,
            state: Mutex::new(Held { ledger, lock: Some(lock), leases: Vec::new() }),
        })
    }

    /// The directory. Files that the backend puts there go with the lab.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The lab's id.
    #[must_use]
    pub fn id(&self) -> LabId {
        self.held().ledger.id.clone()
    }

    /// Whether the lab may be worked in: it was not destroyed.
    ///
    /// # Errors
    /// `Conflict` when it was.
    pub fn check_open(&self) -> Result<()> {
        self.held().check_open()
    }

    /// Writes down a process, so that it is ended when the lab is destroyed, also by others after the owner died.
    /// Its command line, working directory or environment ([`LAB_VARIABLE`]) must name the lab's id: nothing else is killed.
    ///
    /// # Errors
    /// `NotFound` when the process has ended already; file errors.
    pub fn record_process(&self, pid: u32, role: impl Into<String>) -> Result<()> {
        let process = RecordedProcess { role: role.into(), identity: ProcessIdentity::of(pid)? };
        self.update(|held| held.ledger.processes.push(process))
    }

    /// Strikes a process that has ended.
    ///
    /// # Errors
    /// File errors.
    pub fn forget_process(&self, pid: u32) -> Result<()> {
        self.update(|held| held.ledger.processes.retain(|process| process.identity.pid != pid))
    }

    /// Writes down that the lab needs a blob or module for as long as it lives, and holds the lease until then.
    ///
    /// # Errors
    /// File errors; the lease is given back then.
    pub fn hold(&self, lease: Lease) -> Result<()> {
        self.update(|held| {
            if !held.ledger.uses.contains(lease.what()) {
                held.ledger.uses.push(lease.what().clone());
            }
            held.leases.push(lease);
        })
    }

    /// Lets the lab outlive its owner. It stays, with its processes, until [`Store::remove_lab`] or [`destroy`](Self::destroy).
    ///
    /// # Errors
    /// `InvalidInput` when it was not opened with [`Retention::MayBeKept`]; file errors.
    pub fn mark_kept(&self) -> Result<()> {
        if !self.may_be_kept {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("lab {} ends with its owner: it was not opened to be kept", self.id()),
            ));
        }
        self.update(|held| held.ledger.kept = true)
    }

    /// Ends the recorded processes and removes the directory. May be repeated.
    ///
    /// # Errors
    /// A process that cannot be ended; file errors. What is left is reaped later.
    pub fn destroy(&self) -> Result<()> {
        let mut held = self.held();
        let Some(lock) = held.lock.take() else { return Ok(()) };
        let mut report = ReapReport::default();
        let outcome = remove(&self.store, &self.path, Some(&held.ledger), &mut report);
        match outcome {
            Ok(()) => {
                held.leases.clear();
                drop(lock);
                Ok(())
            }
            Err(error) => {
                held.lock = Some(lock);
                Err(error)
            }
        }
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn update(&self, change: impl FnOnce(&mut Held)) -> Result<()> {
        let mut held = self.held();
        held.check_open()?;
        change(&mut held);
        durable::write_json(&self.path.join("ledger.json"), &held.ledger, 0o600)
    }
}

impl Drop for LabDir {
    fn drop(&mut self) {
        if self.held().ledger.kept {
            return;
        }
        if let Err(error) = self.destroy() {
            tracing::warn!(lab = %self.path.display(), %error, "cannot remove a lab; the next reap will");
        }
    }
}

impl Store {
    /// Makes the directory of a lab, held by this process.
    ///
    /// # Errors
    /// `Conflict` when there is one with this id; file errors.
    pub fn create_lab(&self, id: &LabId, purpose: &str, retention: Retention) -> Result<LabDir> {
        LabDir::create(self, id, purpose, retention)
    }

    /// All labs, in the order of their ids.
    ///
    /// # Errors
    /// File errors.
    pub fn labs(&self) -> Result<Vec<LabEntry>> {
        let _judging = FileLock::wait(&self.lock_path("labs"), Mode::Exclusive)?;
        let mut labs = Vec::new();
        for (id, path) in self.lab_dirs()? {
            let (state, ledger, _) = judge(&path)?;
            labs.push(LabEntry { id, path, state, ledger });
        }
        Ok(labs)
    }

    /// Removes a lab that was kept, or whose owner is dead, with its processes.
    ///
    /// # Errors
    /// `NotFound`; `Conflict` when its owner lives and did not keep it; a process that cannot be ended; file errors.
    pub async fn remove_lab(&self, id: &str) -> Result<()> {
        let (store, id) = (self.clone(), id.to_owned());
        super::blocking(move || {
            let judging = FileLock::wait(&store.lock_path("labs"), Mode::Exclusive)?;
            let found = store.lab_dirs()?.into_iter().find(|(name, _)| *name == id);
            let (_, path) = found.ok_or_else(|| {
                Error::new(ErrorKind::NotFound, format!("there is no lab {id} in the store"))
            })?;
            let (state, ledger, lock) = judge(&path)?;
            if state == LabState::Living {
                return Err(Error::new(
                    ErrorKind::Conflict,
                    format!("lab {id} is in use by a living process"),
                ));
            }
            drop(judging);
            let outcome = remove(&store, &path, ledger.as_ref(), &mut ReapReport::default());
            drop(lock);
            outcome
        })
        .await
    }

    /// Removes the labs of dead owners: their processes, then their directories.
    pub(super) fn reap_labs(&self, report: &mut ReapReport) -> Result<()> {
        for (_, path) in self.removed_lab_dirs()? {
            // Nobody lives in what was taken out already; another may be removing it at this moment.
            let size = durable::disk_usage(&path);
            match durable::remove_tree(&path) {
                Ok(()) => report.freed += size,
                Err(error) => report.failed.push(error.report()),
            }
        }
        let mut dead = Vec::new();
        let judging = FileLock::wait(&self.lock_path("labs"), Mode::Exclusive)?;
        for (id, path) in self.lab_dirs()? {
            let (state, ledger, lock) = judge(&path)?;
            if state == LabState::Dead {
                dead.push((id, path, ledger, lock));
            }
        }
        drop(judging);
        for (id, path, ledger, _lock) in dead {
            if let Err(error) = remove(self, &path, ledger.as_ref(), report) {
                report.failed.push(format!("lab {id}: {}", error.report()));
            }
        }
        Ok(())
    }

    /// What labs that are not dead need. Dead ones that were not reaped yet count too: their processes may still run.
    pub(super) fn used_by_labs(&self) -> Result<Vec<(String, Use)>> {
        let mut uses = Vec::new();
        for (id, path) in self.lab_dirs()? {
            if let Some(ledger) = durable::read_json::<Ledger>(&path.join("ledger.json"))? {
                uses.extend(ledger.uses.into_iter().map(|what| (id.clone(), what)));
            }
        }
        Ok(uses)
    }

    fn lab_dirs(&self) -> Result<Vec<(String, PathBuf)>> {
        self.entries(&self.labs_dir(), |name| !name.starts_with('.'))
    }

    fn removed_lab_dirs(&self) -> Result<Vec<(String, PathBuf)>> {
        self.entries(&self.labs_dir(), |name| name.starts_with(".removed-"))
    }
}

/// Whether a lab lives; its lock, if nobody had it. The caller holds `locks/labs`.
fn judge(path: &Path) -> Result<(LabState, Option<Ledger>, Option<FileLock>)> {
    let ledger = durable::read_json::<Ledger>(&path.join("ledger.json"))?;
    let lock = FileLock::attempt(&path.join("lock"), Mode::Exclusive)?;
    let state = match (&ledger, &lock) {
        (Some(ledger), _) if ledger.kept => LabState::Kept,
        (_, Some(_)) => LabState::Dead,
        (_, None) => LabState::Living,
    };
    Ok((state, ledger, lock))
}

/// Ends the processes of a lab and removes its directory. The caller holds its lock, or it was kept.
fn remove(store: &Store, path: &Path, ledger: Option<&Ledger>, report: &mut ReapReport) -> Result<()> {
    let id = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    for process in ledger.into_iter().flat_map(|ledger| &ledger.processes) {
        if process.identity.kill(&id)? {
            report.removed.push(format!("process {} ({}) of lab {id}", process.identity.pid, process.role));
        }
    }
    for identity in process::carrying(LAB_VARIABLE, &id) {
        if identity.kill(&id)? {
            report.removed.push(format!("process {} of lab {id}", identity.pid));
        }
    }
    // Gone for everybody by one rename; the rest is only space.
    let gone = store.labs_dir().join(format!(".removed-{id}-{:08x}", rand::random::<u32>()));
    match fs::rename(path, &gone) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(durable::io_error("remove", path, error)),
        Ok(()) => {}
    }
    report.freed += durable::disk_usage(&gone);
    durable::remove_tree(&gone)?;
    report.removed.push(format!("lab {id}"));
    Ok(())
}
