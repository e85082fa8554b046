//! Publishing: turns captured files of a lab into a version of a module, all of it or nothing.

use super::{
    LabDir, Store, durable,
    lock::{FileLock, Mode},
    versions::{RECORD, REPLACED},
};
use rudder_core::{
    Error, ErrorKind, Result,
    backend::{ModuleDraft, ReapReport},
    module::{Module, TemplateMachine},
    units,
};
use std::{
    fs::{self, File},
    io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

impl Store {
    /// Turns captured disks into a module: all of it, or nothing. The `file` of each disk is a path in the lab (absolute, or
    /// relative to its directory); the file is moved into the module.
    ///
    /// # Errors
    /// `InvalidInput` for a bad name, for a disk that is not in the lab, or for one whose size differs from what was captured; file
    /// errors. An existing module of this name is left unchanged then.
    pub async fn publish(&self, lab: &LabDir, draft: ModuleDraft) -> Result<Module> {
        let (store, lab) = (self.clone(), lab.path().to_owned());
        super::blocking(move || publish(&store, &lab, draft)).await
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
    // Before anything is created: a refusal leaves nothing behind.
    let files = assign_file_names(lab, &mut draft.machines)?;
    durable::make_dir(&dir)?;
    let digest = Module::content_digest(&name, &draft.machines, &draft.network)?;
    let target = dir.join(digest.to_string());
    let mut module = draft.into_module(digest);
    // A publisher may be killed between any two steps: until `current` points at the new version, that version counts as unwanted,
    // and the old one counts as unwanted only when it is no longer pointed at.
    if fs::symlink_metadata(&target).is_ok() {
        durable::expect_dir(&target)?;
        // The very same disks and templates exist. The new files replace the existing ones, which may be damaged.
        for (from, file) in &files {
            move_file(from, &target.join(file))?;
        }
        durable::write_atomic(&target.join(RECORD), module.to_record()?.as_bytes())?;
    } else {
        let draft_dir = tempfile::Builder::new()
            .prefix(".new-")
            .permissions(fs::Permissions::from_mode(durable::DIRECTORY_MODE))
            .tempdir_in(&dir)
            .map_err(|error| durable::io_error("create a directory in", &dir, error))?;
        for (from, file) in &files {
            move_file(from, &draft_dir.path().join(file))?;
        }
        durable::write_atomic(&draft_dir.path().join(RECORD), module.to_record()?.as_bytes())?;
        durable::write_atomic(&draft_dir.path().join(REPLACED), b"not published yet\n")?;
        fs::rename(draft_dir.path(), &target)
            .map_err(|error| durable::io_error("publish", &target, error))?;
        // It was renamed: there is nothing left to remove.
        let _ = draft_dir.keep();
        durable::sync_dir(&dir)?;
    }
    // Their digests were computed when they were captured.
    for (file, content) in module.files() {
        if let Some(sha256) = content.sha256() {
            store.record_verified(&target.join(file), &sha256);
        }
    }
    // If it is unknown which version was current, none is known to be replaced.
    if let Ok(Some(earlier)) = store.current(&name)
        && earlier != digest
    {
        store.mark_replaced(&name, &earlier, &digest)?;
    }
    store.set_current(&name, &digest)?;
    let mut report = ReapReport::default();
    if let Err(error) = store.remove_old_versions(&name, &mut report) {
        tracing::warn!(module = name, %error, "cannot remove a replaced version; the next collection will");
    }
    module.path = Some(target.join(RECORD));
    Ok(module)
}

/// Assigns each file of the machines its name in the module, and returns the sources with those names.
fn assign_file_names(lab: &Path, machines: &mut [TemplateMachine]) -> Result<Vec<(PathBuf, String)>> {
    let lab = fs::canonicalize(lab).map_err(|error| durable::io_error("read", lab, error))?;
    let mut files: Vec<(PathBuf, String)> = Vec::new();
    for TemplateMachine { name, disks, state, .. } in machines {
        let disks =
            disks.iter_mut().map(|disk| (disk.name.clone(), &disk.format, disk.content.size, &mut disk.file));
        // Names cannot contain a dot: no disk and no state get the same file name.
        let state = state.iter_mut().map(|state| {
            (format!("state.{}", state.kind.name()), &state.format, state.content.size, &mut state.file)
        });
        for (what, format, size, file) in disks.chain(state) {
            let target = format!("{name}.{what}.{format}");
            let known = size.ok_or_else(|| {
                Error::new(ErrorKind::InvalidInput, format!("expected the size of {file}, but found none"))
            });
            let from = known
                .and_then(|size| captured_file(&lab, file, size))
                .and_then(|from| {
                    let plain =
                        units::is_name(name) && what.split('.').all(units::is_name) && units::is_name(format);
                    let message = match files.iter().any(|(_, file)| *file == target) {
                        _ if !plain => "expected plain names for the VM, the disk and the format",
                        true => "expected each disk once, but found a duplicate",
                        false => return Ok(from),
                    };
                    Err(Error::new(ErrorKind::InvalidInput, message))
                })
                .map_err(|error| error.with_context("disk", what).with_context("vm", &*name))?;
            file.clone_from(&target);
            files.push((from, target));
        }
    }
    Ok(files)
}

/// Returns the path of a captured file of the lab, after checking that its size is the captured one.
fn captured_file(lab: &Path, file: &str, size: u64) -> Result<PathBuf> {
    let path = lab.join(file);
    let from = fs::canonicalize(&path).map_err(|error| durable::io_error("read", &path, error))?;
    let meta = fs::metadata(&from).map_err(|error| durable::io_error("read", &from, error))?;
    let message = if !from.starts_with(lab) || !meta.is_file() {
        format!("expected a captured file of the lab, but found {}", from.display())
    } else if meta.len() != size {
        format!("expected the captured size of {size} bytes for {}, but found {}", from.display(), meta.len())
    } else {
        return Ok(from);
    };
    Err(Error::new(ErrorKind::InvalidInput, message))
}

/// Moves a captured disk into a module, and makes it durable.
fn move_file(from: &Path, to: &Path) -> Result<()> {
    let moved = match fs::rename(from, to) {
        // The lab is on the same file system as the store unless another one was mounted over it.
        Err(error) if error.kind() == io::ErrorKind::CrossesDevices => {
            fs::copy(from, to).and_then(|_| fs::remove_file(from))
        }
        other => other,
    };
    moved
        .and_then(|()| durable::finalise(&File::open(to)?))
        .map_err(|error| durable::io_error("publish", to, error))
}
