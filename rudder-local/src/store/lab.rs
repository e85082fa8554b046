//! Labs on disk: the directory of a build or clone, its ledger, and whether its owner is alive.
//!
//! ```text
//! labs/<id>/            0700, the backend's working directory: overlays, sockets, logs
//!          /lock        held by the owner for as long as it lives, however it dies
//!          /ledger.json owner, purpose, processes, and the blobs and modules it needs
//!          /files/      what the core stores with the lab, such as the logins of a kept one
//! ```
//! A lab is created, judged and reaped under the lock `locks/labs`, so that no process sees a half-created lab. A directory
//! without a readable ledger is never removed, and a process is killed only if it belongs to this very directory: a copy of a
//! store contains the ledgers of the original, whose machines may be running.

use super::{
    Lease, Store, Use, durable, entries,
    identity::DirectoryIdentity,
    lab_status::{LOCK, LabStatus, lab_status},
    ledger::{self, LEDGER, LabEntry, Ledger, RecordedProcess},
    lock::{FileLock, Mode},
    process::{self, ExpectedLab, ProcessIdentity},
};
use rudder_core::{
    Error, ErrorKind, Result,
    backend::{KeptLab, LabId, LabState, ReapReport, Retention, check_lab_file},
    files::replace_file,
    timestamp::Timestamp,
};
use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

/// The directory with the files that the core stores with the lab, in the directory of the lab.
const FILES: &str = "files";

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
    retention: Retention,
    state: Mutex<Held>,
}

#[derive(Debug)]
struct Held {
    ledger: Ledger,
    /// `None` once the lab was destroyed.
    lock: Option<FileLock>,
    leases: Vec<Lease>,
}

impl Held {
    fn check_open(&self) -> Result<()> {
        if self.lock.is_none() {
            let message = format!("lab {} has already been destroyed", self.ledger.id);
            return Err(Error::new(ErrorKind::Conflict, message));
        }
        Ok(())
    }
}

impl LabDir {
    pub(super) fn create(store: &Store, id: &LabId, purpose: &str, retention: Retention) -> Result<Self> {
        let path = store.labs_dir().join(id.as_str());
        let _labs_lock = FileLock::wait(&store.lock_path("labs"), Mode::Exclusive)?;
        if fs::symlink_metadata(&path).is_ok() {
            return Err(Error::new(ErrorKind::Conflict, format!("lab {id} already exists")));
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
            created: Timestamp::now(),
            kept: false,
            expires: None,
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
            retention,
            state: Mutex::new(Held { ledger, lock: Some(lock), leases: Vec::new() }),
        })
    }

    /// Attaches to a kept lab: no other process can attach to it until the result is dropped.
    fn attach(store: &Store, id: &LabId) -> Result<Self> {
        let _labs_lock = FileLock::wait(&store.lock_path("labs"), Mode::Exclusive)?;
        let path = store.lab_path(id)?;
        let LabStatus { state, ledger, lock } =
            lab_status(&path, id.as_str())?.ok_or_else(|| missing(id.as_str()))?;
        let ledger = ledger?;
        let refuse = |found: &str| {
            Err(Error::new(
                ErrorKind::Conflict,
                format!("expected lab {id} to be kept and unused, but {found}"),
            ))
        };
        match (state, lock) {
            (LabState::Kept { .. }, Some(lock)) => {
                let state = Mutex::new(Held { ledger, lock: Some(lock), leases: Vec::new() });
                Ok(Self { store: store.clone(), path, retention: Retention::MayBeKept, state })
            }
            (LabState::Kept { .. }, None) => refuse("another process uses it"),
            (LabState::Owned, _) => refuse("it belongs to a running process"),
            _ => refuse("its owner has ended or it has expired"),
        }
    }

    /// Stores a file with the lab, as [`Lab::store_file`](rudder_core::backend::Lab::store_file) promises; returns its path.
    ///
    /// # Errors
    /// As `Lab::store_file`; file errors.
    pub fn store_file(&self, name: &str, content: &[u8]) -> Result<PathBuf> {
        check_lab_file(name, content)?;
        self.check_open()?;
        let directory = self.path.join(FILES);
        durable::make_dir(&directory)?;
        let path = directory.join(name);
        replace_file(&path, content)?;
        Ok(path)
    }

    /// Returns the processes that were recorded with this role.
    #[must_use]
    pub fn processes(&self, role: &str) -> Vec<ProcessIdentity> {
        let held = self.held();
        let recorded = held.ledger.processes.iter().filter(|process| process.role == role);
        recorded.map(|process| process.identity.clone()).collect()
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

    /// Returns whether the lab may outlive this process.
    #[must_use]
    pub fn may_be_kept(&self) -> bool {
        self.retention != Retention::EndWithOwner
    }

    /// Completes the opening of the lab: from now on, a lab that was opened to stay is kept. Until then it is removed when this is
    /// dropped, so that a lab that could not be opened leaves nothing behind.
    ///
    /// # Errors
    /// File errors.
    pub fn complete(&self) -> Result<()> {
        match self.retention {
            Retention::UntilRemoved { expires } => self.mark_kept(expires),
            _ => Ok(()),
        }
    }

    /// Returns whether the lab is kept.
    #[must_use]
    pub fn is_kept(&self) -> bool {
        self.held().ledger.kept
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

    /// Lets the lab outlive its owner. It stays, with its processes, until [`Store::remove_lab`] or [`destroy`](Self::destroy), or
    /// until it has expired.
    ///
    /// # Errors
    /// `InvalidInput` when it was opened with [`Retention::EndWithOwner`]; file errors.
    pub fn mark_kept(&self, expires: Option<SystemTime>) -> Result<()> {
        if !self.may_be_kept() {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("lab {} ends with its owner, since it was not opened to be kept", self.id()),
            ));
        }
        let expires = expires.map(Timestamp::try_from).transpose()?;
        self.update(|held| (held.ledger.kept, held.ledger.expires) = (true, expires))
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
    /// Creates the directory of a lab, held by this process. A lab that is opened to stay is kept only once it is
    /// [complete](LabDir::complete).
    ///
    /// # Errors
    /// `Conflict` when a lab with this id exists; file errors.
    pub fn create_lab(&self, id: &LabId, purpose: &str, retention: Retention) -> Result<LabDir> {
        LabDir::create(self, id, purpose, retention)
    }

    /// Attaches to a kept lab of any process. It stays when the result is dropped.
    ///
    /// # Errors
    /// `NotFound`; `Conflict` when it is not kept, has expired, or another process has attached to it or opened it and still lives;
    /// `InvalidInput` when its ledger cannot be read; file errors.
    pub fn attach_lab(&self, id: &LabId) -> Result<LabDir> {
        LabDir::attach(self, id)
    }

    /// Returns a file that was [stored](LabDir::store_file) with a lab; `None` when there is none of this name.
    ///
    /// # Errors
    /// `NotFound` when there is no such lab; file errors.
    pub fn lab_file(&self, id: &LabId, name: &str) -> Result<Option<Vec<u8>>> {
        check_lab_file(name, b"")?;
        let path = self.lab_path(id)?;
        let mut places = vec![path.join(FILES).join(name)];
        // Earlier versions wrote this record beside the ledger.
        if name == KeptLab::FILE {
            places.push(path.join(name));
        }
        for place in places {
            match durable::read_regular(&place) {
                Ok(content) => return Ok(Some(content)),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(durable::io_error("read", &place, error)),
            }
        }
        Ok(None)
    }

    /// Returns the directory of a lab.
    fn lab_path(&self, id: &LabId) -> Result<PathBuf> {
        let found = self.lab_dirs()?.into_iter().find(|(name, _)| name == id);
        found.map(|(_, path)| path).ok_or_else(|| missing(id.as_str()))
    }

    /// Returns all labs, ordered by id.
    ///
    /// # Errors
    /// File errors.
    pub fn labs(&self) -> Result<Vec<LabEntry>> {
        let _labs_lock = FileLock::wait(&self.lock_path("labs"), Mode::Exclusive)?;
        let mut labs = Vec::new();
        for (id, path) in self.lab_dirs()? {
            if let Some(LabStatus { state, ledger, .. }) = lab_status(&path, id.as_str())? {
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
    pub async fn remove_lab(&self, id: &LabId) -> Result<()> {
        let (store, id) = (self.clone(), id.clone());
        super::blocking(move || {
            let labs_lock = FileLock::wait(&store.lock_path("labs"), Mode::Exclusive)?;
            let path = store.lab_path(&id)?;
            let status = lab_status(&path, id.as_str())?;
            let LabStatus { state, ledger, lock } = status.ok_or_else(|| missing(id.as_str()))?;
            if state == LabState::Owned {
                return Err(Error::new(
                    ErrorKind::Conflict,
                    format!("lab {id} is in use by a running process"),
                ));
            }
            let ledger = ledger?;
            drop(labs_lock);
            let outcome = remove(&store, &path, &ledger, &mut ReapReport::default());
            drop(lock);
            outcome
        })
        .await
    }

    /// Removes the labs of dead owners: their processes, then their directories.
    pub(super) fn reap_labs(&self, report: &mut ReapReport) -> Result<()> {
        let labs_lock = FileLock::wait(&self.lock_path("labs"), Mode::Exclusive)?;
        // Directories that are already renamed away, or not yet renamed into place, have no owner; another process may be removing
        // them right now.
        let leftovers = self.directories(&self.labs_dir(), entries::is_leftover)?;
        let mut dead = Vec::new();
        for (id, path) in self.lab_dirs()? {
            match lab_status(&path, id.as_str())? {
                Some(LabStatus { state: LabState::Abandoned, ledger: Ok(ledger), lock }) => {
                    dead.push((id, path, ledger, lock));
                }
                Some(LabStatus { state: LabState::Damaged, ledger: Err(error), .. }) => {
                    report.warnings.push(error.report());
                }
                _ => {}
            }
        }
        // New directories are created under the lock, so any that exist now were left behind.
        for (_, path) in leftovers.iter().filter(|(name, _)| name.starts_with(".new-")) {
            discard(path, report);
        }
        drop(labs_lock);
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
            match ledger::read(&path, id.as_str()) {
                Ok(Some(ledger)) => {
                    uses.extend(ledger.uses.into_iter().map(|what| (id.to_string(), Some(what))));
                }
                Ok(None) => {}
                Err(_) => uses.push((id.to_string(), None)),
            }
        }
        Ok(uses)
    }

    /// Returns the directories of labs: those with a lock or a ledger. Anything else in there is not ours.
    fn lab_dirs(&self) -> Result<Vec<(LabId, PathBuf)>> {
        let directories = self.directories(&self.labs_dir(), |name| LabId::parse(name).is_ok())?;
        let is_lab =
            |path: &Path| [LEDGER, LOCK].iter().any(|file| fs::symlink_metadata(path.join(file)).is_ok());
        let labs = directories.into_iter().filter(|(_, path)| is_lab(path));
        labs.map(|(name, path)| Ok((LabId::parse(&name)?, path))).collect()
    }
}

/// Returns the error for a lab that does not exist.
fn missing(id: &str) -> Error {
    Error::new(ErrorKind::NotFound, format!("there is no lab {id} in the store"))
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
        let lab = ExpectedLab { id, directory, recorded: ledger.directory == Some(directory) };
        for process in &ledger.processes {
            if process.identity.kill(&lab)? {
                report
                    .removed
                    .push(format!("process {} ({}) of lab {id}", process.identity.pid, process.role));
            }
        }
        for identity in process::with_variable(LAB_VARIABLE, id) {
            if identity.kill(&lab)? {
                report.removed.push(format!("process {} of lab {id}", identity.pid));
            }
        }
    }
    // One rename makes it disappear for all processes; the rest only frees space.
    let set_aside = store.labs_dir().join(format!(".removed-{id}-{:08x}", rand::random::<u32>()));
    match fs::rename(path, &set_aside) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(durable::io_error("remove", path, error)),
        Ok(()) => {}
    }
    report.freed += durable::disk_usage(&set_aside);
    durable::remove_tree(&set_aside)?;
    report.removed.push(format!("lab {id}"));
    Ok(())
}
