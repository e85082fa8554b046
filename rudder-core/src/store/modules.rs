//! Modules on disk.
//!
//! ```text
//! modules/<name>/<digest>/     module.json and the disks, put there by one rename
//!               /current       a symbolic link to the digest that the name means; switched by one rename
//! ```
//! Whoever looks sees the old module of a name or the new one. A version that a lab still builds on outlives its
//! replacement, and is collected later.

use super::{
    LabDir, Lease, Store, Use, durable,
    lock::{FileLock, Mode},
};
use crate::{
    Error, ErrorKind, Result,
    backend::{ModuleDraft, ReapReport},
    digest::Digest,
    module::{Module, TemplateMachine},
    units,
};
use std::{
    fs::{self, File},
    io,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
};

impl Store {
    /// Makes a module of captured disks: all of it, or nothing. `file` of each disk is a path in the lab (absolute, or
    /// relative to its directory); the file moves into the module.
    ///
    /// # Errors
    /// `InvalidInput` for a bad name or a disk that is not in the lab, or is not as large as was captured; file errors.
    /// The module that had this name before stays as it was then.
    pub async fn publish(&self, lab: &LabDir, draft: ModuleDraft) -> Result<Module> {
        let (store, lab) = (self.clone(), lab.path().to_owned());
        super::blocking(move || publish(&store, &lab, draft)).await
    }

    /// All modules, in the order of their names.
    ///
    /// # Errors
    /// File errors.
    pub fn modules(&self) -> Result<Vec<Module>> {
        let names = self.entries(&self.modules_dir(), units::is_name)?;
        let mut modules = Vec::new();
        for (name, _) in names {
            match self.module(&name) {
                Ok(module) => modules.push(module),
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(modules)
    }

    /// The module of this name.
    ///
    /// # Errors
    /// `NotFound`; file errors.
    pub fn module(&self, name: &str) -> Result<Module> {
        // It may be replaced between the two looks: then the second finds the next one.
        for _ in 0..100 {
            let Some(digest) = self.current(name)? else { break };
            if let Some(module) = self.version(name, &digest)? {
                return Ok(module);
            }
        }
        Err(Error::new(
            ErrorKind::NotFound,
            format!("there is no module {name} in {}", self.root().display()),
        )
        .with_help("build it first, or list the modules that are there"))
    }

    /// The module of this name and digest, and a lease that keeps it from being removed.
    ///
    /// # Errors
    /// `NotFound` when there is none of that name, or it has been replaced since; file errors.
    pub fn lease_module(&self, name: &str, digest: &Digest) -> Result<(Module, Lease)> {
        if units::is_name(name) && self.version(name, digest)?.is_some() {
            let lease = Lease::take(self, Use::Module { name: name.to_owned(), digest: *digest })?;
            if let Some(module) = self.version(name, digest)? {
                return Ok((module, lease));
            }
        }
        let now = self.module(name)?;
        Err(Error::new(
            ErrorKind::NotFound,
            format!("expected module {name} {}, but found {}", digest.short(), now.digest.short()),
        )
        .with_help("the module was built anew since the plan was made: plan again"))
    }

    /// Removes a module, all of it.
    ///
    /// # Errors
    /// `NotFound`; `Conflict` when a lab builds on it; file errors.
    pub async fn remove_module(&self, name: &str) -> Result<()> {
        let (store, name) = (self.clone(), name.to_owned());
        super::blocking(move || remove(&store, &name)).await
    }

    pub(super) fn module_dir(&self, name: &str) -> PathBuf {
        self.modules_dir().join(name)
    }

    /// Removes what publishing left half-way, and, of all modules, versions that were replaced and that nothing uses.
    pub(super) fn reap_modules(&self, report: &mut ReapReport) -> Result<()> {
        for (name, dir) in self.entries(&self.modules_dir(), units::is_name)? {
            let Some(_lock) = FileLock::attempt(&self.module_lock(&name), Mode::Exclusive)? else { continue };
            for (entry, path) in self.entries(&dir, |entry| entry.starts_with('.'))? {
                report.freed += durable::disk_usage(&path);
                remove_entry(&path)?;
                report.removed.push(format!("left-over {entry} of module {name}"));
            }
            self.remove_old_versions(&name, report)?;
            // Only an empty one goes: a name whose module was removed, or was never published.
            let _ = fs::remove_dir(&dir);
        }
        Ok(())
    }

    fn module_lock(&self, name: &str) -> PathBuf {
        self.lock_path(&format!("module-{name}"))
    }

    /// What `current` points at.
    fn current(&self, name: &str) -> Result<Option<Digest>> {
        if !units::is_name(name) {
            return Ok(None);
        }
        let link = self.module_dir(name).join("current");
        match fs::read_link(&link) {
            Ok(target) => Ok(target.to_str().and_then(|text| text.parse().ok())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(durable::io_error("read", &link, error)),
        }
    }

    fn version(&self, name: &str, digest: &Digest) -> Result<Option<Module>> {
        let path = self.module_dir(name).join(digest.to_string()).join("module.json");
        let module = durable::read_json::<Module>(&path)?;
        Ok(module.map(|mut module| {
            module.path = Some(path);
            module
        }))
    }

    /// The versions of a module, with whether each is the current one.
    fn versions(&self, name: &str) -> Result<Vec<(Digest, PathBuf)>> {
        let entries = self.entries(&self.module_dir(name), |entry| entry.parse::<Digest>().is_ok())?;
        Ok(entries.into_iter().filter_map(|(entry, path)| Some((entry.parse().ok()?, path))).collect())
    }

    /// Removes versions that are not current and not used. The caller holds the module's lock.
    fn remove_old_versions(&self, name: &str, report: &mut ReapReport) -> Result<()> {
        let current = self.current(name)?;
        for (digest, path) in self.versions(name)? {
            if Some(digest) == current {
                continue;
            }
            if let Ok(lock) = self.unused(&Use::Module { name: name.to_owned(), digest })? {
                report.freed += durable::disk_usage(&path);
                self.remove_version(name, &path)?;
                lock.remove()?;
                report.removed.push(format!("module {name} {}, which was replaced", digest.short()));
            }
        }
        Ok(())
    }

    fn remove_version(&self, name: &str, path: &Path) -> Result<()> {
        let gone = self.module_dir(name).join(format!(".removed-{:08x}", rand::random::<u32>()));
        fs::rename(path, &gone).map_err(|error| durable::io_error("remove", path, error))?;
        durable::remove_tree(&gone)
    }
}

fn publish(store: &Store, lab: &Path, mut draft: ModuleDraft) -> Result<Module> {
    let name = draft.name.clone();
    if !units::is_name(&name) {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            format!("expected a module name, but found {name:?}"),
        ));
    }
    let dir = store.module_dir(&name);
    let _lock = FileLock::wait(&store.module_lock(&name), Mode::Exclusive)?;
    // Before anything is made: what is refused leaves nothing.
    let files = place_files(lab, &mut draft.machines)?;
    durable::make_dir(&dir, 0o755)?;
    let digest = content_digest(&name, &draft.machines, &draft.network)?;
    let target = dir.join(digest.to_string());
    let mut module = Module {
        format: 1,
        name: name.clone(),
        digest,
        created: jiff::Timestamp::now(),
        machines: draft.machines,
        network: draft.network,
        provenance: draft.provenance,
        path: None,
    };
    if target.is_dir() {
        // The very same disks and templates are there: only the record of how they came about is new.
        durable::write_json(&target.join("module.json"), &module, 0o644)?;
    } else {
        let draft_dir = tempfile::Builder::new()
            .prefix(".new-")
            .permissions(fs::Permissions::from_mode(0o755))
            .tempdir_in(&dir)
            .map_err(|error| durable::io_error("make a directory in", &dir, error))?;
        for (from, file) in &files {
            move_file(from, &draft_dir.path().join(file))?;
        }
        durable::write_json(&draft_dir.path().join("module.json"), &module, 0o644)?;
        fs::rename(draft_dir.path(), &target)
            .map_err(|error| durable::io_error("publish", &target, error))?;
        // It has moved: there is nothing left to remove.
        let _ = draft_dir.keep();
        durable::sync_dir(&dir)?;
    }
    let link = dir.join(format!(".current-{:08x}", rand::random::<u32>()));
    symlink(digest.to_string(), &link)
        .and_then(|()| fs::rename(&link, dir.join("current")))
        .map_err(|error| durable::io_error("publish", &target, error))?;
    durable::sync_dir(&dir)?;
    let mut report = ReapReport::default();
    if let Err(error) = store.remove_old_versions(&name, &mut report) {
        tracing::warn!(module = name, %error, "cannot remove a version that was replaced; collecting will");
    }
    module.path = Some(target.join("module.json"));
    Ok(module)
}

/// Gives each file of the machines its name in the module, and says where it comes from.
fn place_files(lab: &Path, machines: &mut [TemplateMachine]) -> Result<Vec<(PathBuf, String)>> {
    let lab = fs::canonicalize(lab).map_err(|error| durable::io_error("read", lab, error))?;
    let mut files: Vec<(PathBuf, String)> = Vec::new();
    for TemplateMachine { name, disks, state, .. } in machines {
        let disks = disks.iter_mut().map(|disk| (disk.name.clone(), &disk.format, disk.size, &mut disk.file));
        // A dot cannot be part of a name: no disk and no state come to the same file.
        let state = state.iter_mut().map(|state| {
            (format!("state.{}", state.kind.name()), &state.format, state.size, &mut state.file)
        });
        for (what, format, size, file) in disks.chain(state) {
            let placed = format!("{name}.{what}.{format}");
            let from = captured_file(&lab, file, size)
                .and_then(|from| {
                    let plain =
                        units::is_name(name) && what.split('.').all(units::is_name) && units::is_name(format);
                    let message = match files.iter().any(|(_, file)| *file == placed) {
                        _ if !plain => "expected plain names of VM, disk and format",
                        true => "expected each disk once, but found it twice",
                        false => return Ok(from),
                    };
                    Err(Error::new(ErrorKind::InvalidInput, message))
                })
                .map_err(|error| error.with_context("disk", what).with_context("vm", &*name))?;
            file.clone_from(&placed);
            files.push((from, placed));
        }
    }
    Ok(files)
}

/// Where a captured file of the lab is, which is as large as was captured.
fn captured_file(lab: &Path, file: &str, size: u64) -> Result<PathBuf> {
    let path = lab.join(file);
    let from = fs::canonicalize(&path).map_err(|error| durable::io_error("read", &path, error))?;
    let meta = fs::metadata(&from).map_err(|error| durable::io_error("read", &from, error))?;
    let message = if !from.starts_with(lab) || !meta.is_file() {
        format!("expected a captured file of the lab, but found {}", from.display())
    } else if meta.len() != size {
        format!("expected {size} bytes in {}, as were captured, but found {}", from.display(), meta.len())
    } else {
        return Ok(from);
    };
    Err(Error::new(ErrorKind::InvalidInput, message))
}

fn content_digest(
    name: &str,
    machines: &[TemplateMachine],
    network: &crate::plan::PlannedNetwork,
) -> Result<Digest> {
    let text = serde_json::to_vec(&(name, machines, network)).map_err(|error| {
        Error::new(ErrorKind::Internal, format!("cannot encode module {name}")).with_source(error)
    })?;
    Ok(Digest::of(&text))
}

/// Moves a captured disk: durable and read-only from then on.
fn move_file(from: &Path, to: &Path) -> Result<()> {
    let seal = |path: &Path| -> io::Result<()> {
        let file = File::open(path)?;
        file.set_permissions(fs::Permissions::from_mode(0o444))?;
        file.sync_all()
    };
    let moved = match fs::rename(from, to) {
        // The lab is on the same file system as the store unless somebody mounted something over it.
        Err(error) if error.kind() == io::ErrorKind::CrossesDevices => {
            fs::copy(from, to).and_then(|_| fs::remove_file(from))
        }
        other => other,
    };
    moved.and_then(|()| seal(to)).map_err(|error| durable::io_error("publish", to, error))
}

fn remove(store: &Store, name: &str) -> Result<()> {
    let missing = || {
        Error::new(ErrorKind::NotFound, format!("there is no module {name} in {}", store.root().display()))
    };
    if !units::is_name(name) || !store.module_dir(name).is_dir() {
        return Err(missing());
    }
    let dir = store.module_dir(name);
    let _lock = FileLock::wait(&store.module_lock(name), Mode::Exclusive)?.transient();
    if store.current(name)?.is_none() {
        return Err(missing());
    }
    let versions = store.versions(name)?;
    let mut locks = Vec::new();
    for (digest, path) in &versions {
        match store.unused(&Use::Module { name: name.to_owned(), digest: *digest })? {
            Ok(lock) => locks.push((path, lock)),
            Err(who) => {
                return Err(Error::new(
                    ErrorKind::Conflict,
                    format!("module {name} cannot be removed: {who} builds on it"),
                )
                .with_help("wait until it has ended, or remove it if it was kept"));
            }
        }
    }
    durable::remove_file(&dir.join("current"))?;
    durable::sync_dir(&dir)?;
    for (path, lock) in locks {
        store.remove_version(name, path)?;
        lock.remove()?;
    }
    let _ = fs::remove_dir(&dir);
    Ok(())
}

fn remove_entry(path: &Path) -> Result<()> {
    let is_dir = fs::symlink_metadata(path).is_ok_and(|meta| meta.is_dir());
    if is_dir { durable::remove_tree(path) } else { durable::remove_file(path) }
}
