//! Labs on disk: the directory of a build or clone, its ledger, and whether its owner is alive.
//!
//! ```text
//! labs/<id>/            0700, the backend's working directory: overlays, sockets, logs
//!          /lock        held by the owner for as long as it lives, however it dies
//!          /ledger.json owner, purpose, processes, and the blobs and modules it needs
//! ```
//! A lab is created, judged and reaped under the lock `locks/labs`, so that no process sees a half-created lab. A directory
//! without a readable ledger is never removed, and a process is killed only if it belongs to this very directory: a copy of a
//! store contains the ledgers of the original, whose machines may be running.

use super::{
    Lease, Store, Use, durable, entries,
    identity::DirectoryIdentity,
    ledger::{self, LEDGER, LabEntry, LabState, Ledger, RecordedProcess},
    lock::{Availability, FileLock, Mode},
    process::{self, Belonging, ProcessIdentity},
};
use rudder_core::{
    Error, ErrorKind, Result,
    backend::{LabId, ReapReport, Retention},
};
use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

/// The file that the owner of a lab keeps locked for as long as it lives.
const LOCK: &str = "lock";

/// The environment variable that marks a process as part of a lab; its value is the lab's id. A process that carries
/// it is found and killed with a dead lab even if its owner died before it could record the process.
pub const LAB_VARIABLE: &str = "RUDDER_LAB";

/// The directory of a lab, held by its owner.
///
/// Dropping it kills the recorded processes and removes the directory, unless the lab was kept; [`destroy`](Self::destroy)
/// does the same and reports errors.
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
        let path = store.labs_dir().join(id.as_str());
        let _judging = FileLock::wait(&store.lock_path("labs"), Mode::Exclusive)?;
        if fs::symlink_metadata(&path).is_ok() {
            return Err(Error::new(ErrorKind::Conflict, format!("there is already a lab {id}")));
        }
        durable::expect_dir(&store.labs_dir())?;
        // Appears together with its ledger: a directory without a ledger is not ours.
        let new = tempfile::Builder::new()
            .prefix(".new-")
            .permissions(fs::Permissions::from_mode(durable::DIRECTORY_MODE))
            .tempdir_in(store.labs_dir())
            .map_err(|error| durable::io_error("create a directory in", &store.labs_dir(), error))?;
        let lock = FileLock::wait(&new.path().join(LOCK), Mode::Exclusive)?;
        let ledger = Ledger {
            id: id.clone(),
            purpose: purpose.to_owned(),
            owner: ProcessIdentity::current()?,
            created: jiff::Timestamp::now(),
            kept: false,
            processes: Vec::new(),
            uses: Vec::new(),
            directory: Some(DirectoryIdentity::of(new.path())?),
        };
        durable::write_json(&new.path().join(LEDGER), &ledger)?;
        fs::rename(new.path(), &path).map_err(|error| durable::io_error("create", &path, error))?;
        // It was renamed: there is nothing left to remove.
        let _ = new.keep();
        Ok(Self {
            store: store.clone(),
            path,
            may_be_kept: retention == Retention::MayBeKept,
            state: Mutex::new(Held { ledger, lock: Some(lock), leases: Vec::new() }),
        })
    }

    /// Returns the directory. Files that the backend puts there are removed with the lab.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the lab's id.
    #[must_use]
    pub fn id(&self) -> LabId {
        self.held().ledger.id.clone()
    }

    /// Checks that the lab is usable, that is, was not destroyed.
    ///
    /// # Errors
    /// `Conflict` when it was destroyed.
    pub fn check_open(&self) -> Result<()> {
        self.held().check_open()
    }

    /// Records a process, so that it is killed when the lab is destroyed, also by other processes after the owner died.
    /// Its command line, working directory or environment ([`LAB_VARIABLE`]) must contain the lab's id: nothing else is killed.
    /// Cleaning up a copy of the store leaves it alone.
    ///
    /// # Errors
    /// `NotFound` when the process has already ended; file errors.
    pub fn record_process(&self, pid: u32, role: impl Into<String>) -> Result<()> {
        let process = RecordedProcess { role: role.into(), identity: ProcessIdentity::of(pid)? };
        self.update(|held| held.ledger.processes.push(process))
    }

    /// Removes a process that has ended from the ledger.
    ///
    /// # Errors
    /// File errors.
    pub fn forget_process(&self, pid: u32) -> Result<()> {
        self.update(|held| held.ledger.processes.retain(|process| process.identity.pid != pid))
    }

    /// Records that the lab needs a blob or module for as long as it lives, and holds the lease until then.
    ///
    /// # Errors
    /// File errors; the lease is released then.
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

    /// Kills the recorded processes and removes the directory. May be repeated.
    ///
    /// # Errors
    /// A process that cannot be killed; file errors. What is left is reaped later.
    pub fn destroy(&self) -> Result<()> {
        let mut held = self.held();
        let Some(lock) = held.lock.take() else { return Ok(()) };
        let mut report = ReapReport::default();
        let outcome = remove(&self.store, &self.path, &held.ledger, &mut report);
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
        durable::write_json(&self.path.join(LEDGER), &held.ledger)
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
    /// Creates the directory of a lab, held by this process.
    ///
    /// # Errors
    /// `Conflict` when a lab with this id exists; file errors.
    pub fn create_lab(&self, id: &LabId, purpose: &str, retention: Retention) -> Result<LabDir> {
        LabDir::create(self, id, purpose, retention)
    }

    /// Returns all labs, ordered by id.
    ///
    /// # Errors
    /// File errors.
    pub fn labs(&self) -> Result<Vec<LabEntry>> {
        let _judging = FileLock::wait(&self.lock_path("labs"), Mode::Exclusive)?;
        let mut labs = Vec::new();
        for (id, path) in self.lab_dirs()? {
            if let Some(Judged { state, ledger, .. }) = judge(&path, &id)? {
                labs.push(LabEntry { id, path, state, ledger: ledger.ok() });
            }
        }
        Ok(labs)
    }

    /// Removes a lab that was kept, or whose owner is dead, together with its processes.
    ///
    /// # Errors
    /// `NotFound`; `Conflict` when its owner lives and did not keep it; `InvalidInput` when its ledger cannot be read; a process
    /// that cannot be killed; file errors.
    pub async fn remove_lab(&self, id: &str) -> Result<()> {
        let (store, id) = (self.clone(), id.to_owned());
        super::blocking(move || {
            let missing = || Error::new(ErrorKind::NotFound, format!("there is no lab {id} in the store"));
            let judging = FileLock::wait(&store.lock_path("labs"), Mode::Exclusive)?;
            let found = store.lab_dirs()?.into_iter().find(|(name, _)| *name == id);
            let (_, path) = found.ok_or_else(missing)?;
            let Judged { state, ledger, lock } = judge(&path, &id)?.ok_or_else(missing)?;
            if state == LabState::Living {
                return Err(Error::new(
                    ErrorKind::Conflict,
                    format!("lab {id} is in use by a living process"),
                ));
            }
            let ledger = ledger?;
            drop(judging);
            let outcome = remove(&store, &path, &ledger, &mut ReapReport::default());
            drop(lock);
            outcome
        })
        .await
    }

    /// Removes the labs of dead owners: their processes, then their directories.
    pub(super) fn reap_labs(&self, report: &mut ReapReport) -> Result<()> {
        let judging = FileLock::wait(&self.lock_path("labs"), Mode::Exclusive)?;
        // Directories that are already renamed away, or not yet renamed into place, have no owner; another process may be removing
        // them right now.
        let leftovers = self.directories(&self.labs_dir(), entries::is_leftover)?;
        let mut dead = Vec::new();
        for (id, path) in self.lab_dirs()? {
            match judge(&path, &id)? {
                Some(Judged { state: LabState::Dead, ledger: Ok(ledger), lock }) => {
                    dead.push((id, path, ledger, lock));
                }
                Some(Judged { state: LabState::Unknown, ledger: Err(error), .. }) => {
                    report.warnings.push(error.report());
                }
                _ => {}
            }
        }
        // New directories are created under the lock, so any that exist now were left behind.
        for (_, path) in leftovers.iter().filter(|(name, _)| name.starts_with(".new-")) {
            discard(path, report);
        }
        drop(judging);
        for (_, path) in leftovers.iter().filter(|(name, _)| !name.starts_with(".new-")) {
            discard(path, report);
        }
        for (id, path, ledger, _lock) in dead {
            if let Err(error) = remove(self, &path, &ledger, report) {
                report.failed.push(format!("lab {id}: {}", error.report()));
            }
        }
        Ok(())
    }

    /// Returns what labs need. Dead labs that were not reaped yet count as well: their processes may still run.
    /// `None` stands for a lab whose ledger cannot be read, so that its needs are unknown.
    pub(super) fn used_by_labs(&self) -> Result<Vec<(String, Option<Use>)>> {
        let mut uses = Vec::new();
        for (id, path) in self.lab_dirs()? {
            match ledger::read(&path, &id) {
                Ok(Some(ledger)) => uses.extend(ledger.uses.into_iter().map(|what| (id.clone(), Some(what)))),
                Ok(None) => {}
                Err(_) => uses.push((id, None)),
            }
        }
        Ok(uses)
    }

    /// Returns the directories of labs: those with a lock or a ledger. Anything else in there is not ours.
    fn lab_dirs(&self) -> Result<Vec<(String, PathBuf)>> {
        let mut labs = self.directories(&self.labs_dir(), |name| LabId::parse(name).is_ok())?;
        labs.retain(|(_, path)| {
            [LEDGER, LOCK].iter().any(|file| fs::symlink_metadata(path.join(file)).is_ok())
        });
        Ok(labs)
    }
}

/// What is known about a lab.
struct Judged {
    state: LabState,
    /// Its ledger, or why that cannot be read.
    ledger: Result<Ledger>,
    /// Its lock, if no process held it.
    lock: Option<FileLock>,
}

/// Determines whether a lab is alive; `None` when it no longer exists. The caller holds `locks/labs`.
fn judge(path: &Path, id: &str) -> Result<Option<Judged>> {
    let ledger = match ledger::read(path, id) {
        Ok(None) => return Ok(None),
        Ok(Some(ledger)) => Ok(ledger),
        Err(error) => Err(error),
    };
    let availability = FileLock::look(&path.join(LOCK))?;
    let is_held = matches!(availability, Availability::Held);
    let is_missing = matches!(availability, Availability::Missing);
    let state = match &ledger {
        Ok(ledger) if ledger.kept => LabState::Kept,
        _ if is_held => LabState::Living,
        Err(_) => LabState::Unknown,
        // The lock of a living owner was removed.
        Ok(ledger) if is_missing && is_of(ledger, path) && ledger.owner.is_running() => LabState::Living,
        Ok(_) => LabState::Dead,
    };
    let lock = if let Availability::Free(lock) = availability { Some(lock) } else { None };
    Ok(Some(Judged { state, ledger, lock }))
}

/// Returns whether a ledger was written for the directory that contains it.
fn is_of(ledger: &Ledger, path: &Path) -> bool {
    ledger.directory.is_some() && DirectoryIdentity::of(path).ok() == ledger.directory
}

/// Removes the remains of a lab's directory.
fn discard(path: &Path, report: &mut ReapReport) {
    let size = durable::disk_usage(path);
    match durable::remove_tree(path) {
        Ok(()) => report.freed += size,
        Err(error) => report.failed.push(error.report()),
    }
}

/// Kills the processes of a lab and removes its directory. The caller holds its lock, or it was kept.
fn remove(store: &Store, path: &Path, ledger: &Ledger, report: &mut ReapReport) -> Result<()> {
    let id = ledger.id.as_str();
    let here = match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => Some(DirectoryIdentity::from_metadata(&meta)),
        Ok(_) => return durable::expect_dir(path),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(error) => return Err(durable::io_error("read", path, error)),
    };
    // Without a directory, the ledger that its owner has in memory is all there is.
    if let Some(directory) = here.or(ledger.directory) {
        let lab = Belonging { id, directory, recorded: ledger.directory == Some(directory) };
        for process in &ledger.processes {
            if process.identity.kill(&lab)? {
                report
                    .removed
                    .push(format!("process {} ({}) of lab {id}", process.identity.pid, process.role));
            }
        }
        for identity in process::carrying(LAB_VARIABLE, id) {
            if identity.kill(&lab)? {
                report.removed.push(format!("process {} of lab {id}", identity.pid));
            }
        }
    }
    // One rename makes it disappear for all processes; the rest only frees space.
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
