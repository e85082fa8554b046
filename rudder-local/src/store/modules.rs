//! Modules on disk: finding, leasing and removing them. Versions are described in `versions`, publishing in `publish`.
//!
//! Readers see either the old module of a name or the new one. A version that a lab still builds on outlives its replacement, and
//! is collected later.

use super::{
    Lease, Store, Use, durable, entries,
    lock::{FileLock, Mode},
    versions::CURRENT,
};
use rudder_core::{
    Error, ErrorKind, Result,
    backend::ReapReport,
    digest::Digest,
    module::{DamagedModule, Module},
    units,
};
use std::{
    fs,
    path::{Path, PathBuf},
};

impl Store {
    /// Returns all usable modules, ordered by name. For the others, see [`damaged_modules`](Self::damaged_modules).
    ///
    /// # Errors
    /// File errors.
    pub fn modules(&self) -> Result<Vec<Module>> {
        Ok(self.load_all()?.0)
    }

    /// Returns the modules that exist but cannot be used, ordered by name: their record is damaged or of a later format, a file is
    /// missing, or none of their versions is known to be the current one.
    ///
    /// # Errors
    /// File errors.
    pub fn damaged_modules(&self) -> Result<Vec<DamagedModule>> {
        Ok(self.load_all()?.1)
    }

    fn load_all(&self) -> Result<(Vec<Module>, Vec<DamagedModule>)> {
        let (mut modules, mut damaged) = (Vec::new(), Vec::new());
        // Includes entries that are not directories, such as symbolic links: opening them reports the error.
        for (name, _) in self.entries(&self.modules_dir(), |name, _| units::is_name(name))? {
            match self.module(&name) {
                Ok(module) => modules.push(module),
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => damaged.push(DamagedModule::new(name, error.report())),
            }
        }
        Ok((modules, damaged))
    }

    /// Returns the module of this name.
    ///
    /// # Errors
    /// `NotFound`; `InvalidInput` or `Unsupported` when it exists but cannot be used (the message names the file); file errors.
    pub fn module(&self, name: &str) -> Result<Module> {
        // It may be replaced between the two reads; the next iteration finds the replacement.
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
        .with_help("build it first, or list the existing modules"))
    }

    /// Returns the module of this name and digest, and a lease that keeps it from being removed.
    ///
    /// # Errors
    /// `NotFound` when no module has that name, or it has been replaced since; otherwise as [`module`](Self::module).
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
        .with_help("plan again: the module was rebuilt after the plan was made"))
    }

    /// Removes a module: all of its versions, including damaged ones.
    ///
    /// # Errors
    /// `NotFound`; `Conflict` when a lab builds on it; file errors.
    pub async fn remove_module(&self, name: &str) -> Result<()> {
        let (store, name) = (self.clone(), name.to_owned());
        super::blocking(move || remove(&store, &name)).await
    }

    /// Removes what interrupted publications left, and the unused replaced versions of all modules.
    pub(super) fn reap_modules(&self, report: &mut ReapReport) -> Result<()> {
        for (name, dir) in self.directories(&self.modules_dir(), units::is_name)? {
            // Without a lock, no module was ever published into this directory here.
            let is_empty = entries::list(&dir)?.is_empty();
            if is_empty && fs::symlink_metadata(self.module_lock(&name)).is_err() {
                continue;
            }
            let Some(_lock) = FileLock::attempt(&self.module_lock(&name), Mode::Exclusive)? else { continue };
            for (entry, path) in self.entries(&dir, |entry, kind| {
                entries::is_leftover(entry) && (kind.is_symlink() == entry.starts_with(".current-"))
            })? {
                report.freed += durable::disk_usage(&path);
                remove_entry(&path)?;
                report.removed.push(format!("leftover {entry} of module {name}"));
            }
            self.remove_old_versions(&name, report)?;
            // Fails unless it is empty: a name whose module was removed, or was never published.
            let _ = fs::remove_dir(&dir);
        }
        Ok(())
    }

    pub(super) fn module_lock(&self, name: &str) -> PathBuf {
        self.lock_path(&format!("module-{name}"))
    }

    /// Removes unused versions that are marked as replaced. The caller holds the module's lock.
    pub(super) fn remove_old_versions(&self, name: &str, report: &mut ReapReport) -> Result<()> {
        let current = match self.current(name) {
            // The current one is unknown: all of them stay, and the module is reported as damaged.
            Err(error) if error.kind() == ErrorKind::InvalidInput => return Ok(()),
            other => other?,
        };
        // The process that removed the module was killed.
        let Some(current) = current else { return self.remove_pointer(name) };
        let pointer = self.module_dir(name).join(CURRENT);
        let is_copied = fs::symlink_metadata(&pointer).is_ok_and(|meta| !meta.is_symlink());
        let is_marked = |version: &super::versions::Version| version.digest == current && version.replaced;
        let versions = self.versions(name)?;
        // Restores a lost pointer, and finishes an interrupted publication.
        if !is_copied && (self.pointer_target(name)? != Some(current) || versions.iter().any(is_marked)) {
            self.set_current(name, &current)?;
        }
        for version in versions {
            let digest = version.digest;
            if digest == current {
                continue;
            }
            if !version.replaced {
                report.warnings.push(format!(
                    "{} is kept: it is not the current version of module {name}, and not known to be replaced; \
                     run `modules repair {name} {}` to choose the current version and release the others",
                    version.path.display(),
                    current.short()
                ));
                continue;
            }
            if let Ok(lock) = self.lock_unused(&Use::Module { name: name.to_owned(), digest })? {
                report.freed += durable::disk_usage(&version.path);
                durable::remove_tree(&self.set_aside(name, &version.path)?)?;
                lock.remove()?;
                report.removed.push(format!("module {name} {}, which was replaced", digest.short()));
            }
        }
        Ok(())
    }

    /// Removes the pointer to the current version, if it is a symbolic link.
    fn remove_pointer(&self, name: &str) -> Result<()> {
        let pointer = self.module_dir(name).join(CURRENT);
        match fs::symlink_metadata(&pointer) {
            Ok(meta) if meta.is_symlink() => durable::remove_file(&pointer),
            _ => Ok(()),
        }
    }

    /// Takes a version out of a module by one rename; removing the rest only frees space.
    fn set_aside(&self, name: &str, version: &Path) -> Result<PathBuf> {
        let removed = self.module_dir(name).join(format!(".removed-{:08x}", rand::random::<u32>()));
        fs::rename(version, &removed).map_err(|error| durable::io_error("remove", version, error))?;
        Ok(removed)
    }
}

fn remove(store: &Store, name: &str) -> Result<()> {
    let missing = || {
        Error::new(ErrorKind::NotFound, format!("there is no module {name} in {}", store.root().display()))
    };
    if !units::is_name(name) || store.versions(name)?.is_empty() {
        return Err(missing());
    }
    let dir = store.module_dir(name);
    let _lock = FileLock::wait(&store.module_lock(name), Mode::Exclusive)?.transient();
    let versions = store.versions(name)?;
    if versions.is_empty() {
        return Err(missing());
    }
    let current = store.current(name).ok().flatten();
    let mut locks = Vec::new();
    for version in &versions {
        match store.lock_unused(&Use::Module { name: name.to_owned(), digest: version.digest })? {
            Ok(lock) => locks.push((version, lock)),
            Err(user) => {
                return Err(Error::new(
                    ErrorKind::Conflict,
                    format!("module {name} cannot be removed: {user} uses it"),
                )
                .with_help("wait until it ends, or remove the lab if it was kept"));
            }
        }
    }
    // The current one goes last, so that the name never refers to another version.
    locks.sort_by_key(|(version, _)| Some(version.digest) == current);
    let mut removed = Vec::new();
    for (version, lock) in locks {
        removed.push(store.set_aside(name, &version.path)?);
        lock.remove()?;
    }
    store.remove_pointer(name)?;
    durable::sync_dir(&dir)?;
    removed.iter().try_for_each(|path| durable::remove_tree(path))?;
    let _ = fs::remove_dir(&dir);
    Ok(())
}

fn remove_entry(path: &Path) -> Result<()> {
    let is_dir = fs::symlink_metadata(path).is_ok_and(|meta| meta.is_dir());
    if is_dir { durable::remove_tree(path) } else { durable::remove_file(path) }
}
