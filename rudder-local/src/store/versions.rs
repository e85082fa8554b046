//! The versions of a module, and which of them its name refers to.
//!
//! ```text
//! modules/<name>/<digest>/module.json   the record of a version
//!                        /replaced      marks a version that has been replaced
//!               /current                a symbolic link to the version that the name refers to; switched by one rename
//! ```
//! A version is removed only if it is marked as replaced. A version that is neither marked nor current stays: `current` may have
//! been lost, for example in a copy without symbolic links. If exactly one version is not marked, the name refers to that one.

use super::{
    Store, durable,
    durable::io_error,
    lock::{FileLock, Mode},
};
use rudder_core::{Error, ErrorKind, Result, digest::Digest, module::Module, units};
use std::{
    fs, io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

/// The record of a version.
pub(super) const RECORD: &str = "module.json";

/// The file that marks a version as replaced.
pub(super) const REPLACED: &str = "replaced";

/// The name of the symbolic link to the version that a name refers to.
pub(super) const CURRENT: &str = "current";

/// A version of a module.
#[derive(Debug)]
pub(super) struct Version {
    pub(super) digest: Digest,
    pub(super) path: PathBuf,
    /// Whether it is marked as replaced.
    pub(super) replaced: bool,
}

impl Store {
    /// Chooses the version of a module whose current one is no longer known, by a prefix of its digest. The others are marked as
    /// replaced, and are collected when nothing uses them.
    ///
    /// # Errors
    /// `NotFound` when there is no such version; `InvalidInput` when there are several, or it is unusable itself; file errors.
    pub async fn repair_module(&self, name: &str, digest: &str) -> Result<Module> {
        let (store, name, digest) = (self.clone(), name.to_owned(), digest.to_owned());
        super::blocking(move || repair(&store, &name, &digest)).await
    }

    pub(super) fn module_dir(&self, name: &str) -> PathBuf {
        self.modules_dir().join(name)
    }

    /// Returns the versions of a module, ordered by digest.
    pub(super) fn versions(&self, name: &str) -> Result<Vec<Version>> {
        let directories =
            self.directories(&self.module_dir(name), |entry| entry.parse::<Digest>().is_ok())?;
        let versions = directories.into_iter().filter_map(|(entry, path)| {
            let replaced = fs::symlink_metadata(path.join(REPLACED)).is_ok_and(|meta| meta.is_file());
            Some(Version { digest: entry.parse().ok()?, path, replaced })
        });
        Ok(versions.collect())
    }

    /// Returns what `current` points at. A copy may have turned it into a directory, or into a file that holds the target.
    pub(super) fn pointer_target(&self, name: &str) -> Result<Option<Digest>> {
        let path = self.module_dir(name).join(CURRENT);
        let failed = |error| io_error("read", &path, error);
        let kind = match fs::symlink_metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.map_err(failed)?.file_type(),
        };
        let digest = if kind.is_symlink() {
            match fs::read_link(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                other => other.map_err(failed)?.to_str().and_then(|target| target.parse().ok()),
            }
        } else if kind.is_dir() {
            let record = path.join(RECORD);
            let bytes = durable::read_regular(&record).ok();
            bytes.and_then(|bytes| Module::from_record(&record, &bytes).ok()).map(|module| module.digest)
        } else {
            let bytes = durable::read_regular(&path).ok();
            bytes.and_then(|bytes| String::from_utf8(bytes).ok()?.trim().parse().ok())
        };
        Ok(digest)
    }

    /// Returns the version that a name refers to; `None` when it has none.
    ///
    /// # Errors
    /// `InvalidInput` when that cannot be determined; file errors.
    pub(super) fn current(&self, name: &str) -> Result<Option<Digest>> {
        if !units::is_name(name) {
            return Ok(None);
        }
        let mut target = self.pointer_target(name)?;
        loop {
            let versions = self.versions(name)?;
            if let Some(digest) = target
                && versions.iter().any(|version| version.digest == digest)
            {
                return Ok(Some(digest));
            }
            // It may have been replaced between the two reads.
            let now = self.pointer_target(name)?;
            if now != target {
                target = now;
                continue;
            }
            let mut candidates = versions.iter().filter(|version| !version.replaced);
            return match (candidates.next(), candidates.next()) {
                (Some(only), None) => Ok(Some(only.digest)),
                (None, _) if versions.is_empty() => Ok(None),
                _ => Err(self.ambiguous(name, &versions)),
            };
        }
    }

    fn ambiguous(&self, name: &str, versions: &[Version]) -> Error {
        let path = self.module_dir(name).join(CURRENT);
        let digests: Vec<_> = versions.iter().map(|version| version.digest.short()).collect();
        let message = format!(
            "expected {} to point to a version of module {name}, but it does not; existing versions: {}",
            path.display(),
            digests.join(", ")
        );
        Error::new(ErrorKind::InvalidInput, message).with_help(format!(
            "build the module again, or choose a version: `modules repair {name} {}` or `Store::repair_module`; \
             until then all of them are kept",
            digests.first().map_or("DIGEST", String::as_str)
        ))
    }

    /// Returns a version of a module; `None` when it does not exist.
    ///
    /// # Errors
    /// `InvalidInput` or `Unsupported` when it exists but cannot be used; the message names the file.
    pub(super) fn version(&self, name: &str, digest: &Digest) -> Result<Option<Module>> {
        let dir = self.module_dir(name).join(digest.to_string());
        let path = dir.join(RECORD);
        let exists = || fs::symlink_metadata(&dir).is_ok_and(|meta| meta.is_dir());
        if !exists() {
            return Ok(None);
        }
        let mut module = match durable::read_regular(&path) {
            Ok(bytes) => Module::from_record(&path, &bytes)?,
            Err(_) if !exists() => return Ok(None),
            Err(error) => return Err(Module::damaged(&path, "it cannot be read").with_source(error)),
        };
        if module.name != name || module.digest != *digest {
            let found = format!("it belongs to module {} {}", module.name, module.digest.short());
            return Err(Module::damaged(&path, &found));
        }
        if let Err(error) = expect_files(&dir, &module) {
            return if exists() { Err(error) } else { Ok(None) };
        }
        module.path = Some(path);
        Ok(Some(module))
    }

    /// Marks a version of a module as replaced by another one.
    pub(super) fn mark_replaced(&self, name: &str, digest: &Digest, by: &Digest) -> Result<()> {
        let mark = self.module_dir(name).join(digest.to_string()).join(REPLACED);
        durable::write_atomic(&mark, format!("by {by}\n").as_bytes())
    }

    /// Makes a name refer to this version. The caller holds the module's lock.
    pub(super) fn set_current(&self, name: &str, digest: &Digest) -> Result<()> {
        let dir = self.module_dir(name);
        let current = dir.join(CURRENT);
        let failed = |error| io_error("publish", &current, error);
        if fs::symlink_metadata(&current).is_ok_and(|meta| !meta.is_symlink()) {
            // Created by a copy: it may hold data that exists nowhere else.
            let aside = dir.join(format!("copy-of-current-{:08x}", rand::random::<u32>()));
            fs::rename(&current, aside).map_err(failed)?;
        }
        let link = dir.join(format!(".current-{:08x}", rand::random::<u32>()));
        symlink(digest.to_string(), &link).and_then(|()| fs::rename(&link, &current)).map_err(failed)?;
        durable::sync_dir(&dir)?;
        durable::remove_file(&dir.join(digest.to_string()).join(REPLACED))
    }
}

/// Checks that every file named by the record of a version exists and has the recorded size.
fn expect_files(dir: &Path, module: &Module) -> Result<()> {
    for (file, content) in module.files() {
        let path = dir.join(file);
        let Some((size, _)) = content.verifiable() else {
            let found = format!("it does not record the size and sha256 of {file}");
            return Err(Module::damaged(&dir.join(RECORD), &found));
        };
        let found = match fs::symlink_metadata(&path) {
            Ok(meta) if meta.is_file() && meta.len() == size => continue,
            Ok(meta) if meta.is_file() => format!("{} bytes", meta.len()),
            Ok(meta) => durable::kind_of(meta.file_type()).to_owned(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => "none".to_owned(),
            Err(error) => return Err(io_error("read", &path, error)),
        };
        let message = format!(
            "expected a file of {size} bytes at {} for module {}, but found {found}",
            path.display(),
            module.name
        );
        return Err(Error::new(ErrorKind::InvalidInput, message).with_help(Module::REPAIR));
    }
    Ok(())
}

fn repair(store: &Store, name: &str, digest: &str) -> Result<Module> {
    let versions = if units::is_name(name) { store.versions(name)? } else { Vec::new() };
    let mut matching = versions.iter().filter(|version| version.digest.to_string().starts_with(digest));
    let version = match (matching.next(), matching.next()) {
        (Some(only), None) => only,
        (found, _) => {
            let digests: Vec<_> = versions.iter().map(|version| version.digest.short()).collect();
            let (kind, found) = match found {
                None => (ErrorKind::NotFound, "none"),
                Some(_) => (ErrorKind::InvalidInput, "several"),
            };
            let message =
                format!("expected a version of module {name} that begins with {digest:?}, but found {found}");
            return Err(Error::new(kind, message).with_help(format!("use one of: {}", digests.join(", "))));
        }
    };
    let _lock = FileLock::wait(&store.module_lock(name), Mode::Exclusive)?;
    let module = store.version(name, &version.digest)?.ok_or_else(|| {
        Error::new(
            ErrorKind::NotFound,
            format!("version {} of module {name} was removed in the meantime", version.digest),
        )
    })?;
    for other in versions.iter().filter(|other| other.digest != version.digest) {
        store.mark_replaced(name, &other.digest, &version.digest)?;
    }
    store.set_current(name, &version.digest)?;
    Ok(module)
}
