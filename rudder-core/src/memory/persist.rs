//! Modules as files, which can be inspected: `DIR/memory/NAME/module.json`, with its disks beside it.

use super::files::FileTree;
use crate::{
    Error, ErrorKind, Result,
    digest::Digest,
    files::replace_file,
    module::{DamagedModule, Module},
    platform::create_private_directory,
    units,
};
use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

/// The directory of all modules.
const TOP: &str = "memory";

/// The record of a module.
const RECORD: &str = "module.json";

/// A module and its disks.
#[derive(Debug, Clone)]
pub(super) struct Kept {
    pub(super) module: Module,
    /// The disks, by the names of their files.
    pub(super) disks: HashMap<String, Arc<FileTree>>,
}

/// The modules in a directory.
#[derive(Debug, Default)]
pub(super) struct Found {
    pub(super) usable: Vec<Kept>,
    pub(super) damaged: Vec<DamagedModule>,
}

fn directory(root: &Path, name: &str) -> PathBuf {
    root.join(TOP).join(name)
}

/// Writes a module: first its disks, named by their content, then its record by one rename.
pub(super) fn save(root: &Path, kept: &mut Kept) -> Result<()> {
    let directory = directory(root, &kept.module.name);
    make_directory(&root.join(TOP))?;
    make_directory(&directory)?;
    for (file, files) in &kept.disks {
        replace_file(&directory.join(file), &json(files)?)?;
    }
    let record = directory.join(RECORD);
    replace_file(&record, kept.module.to_record()?.as_bytes())?;
    kept.module.path = Some(record);
    // The disks of the previous module with this name are no longer needed.
    remove_disks(&directory, |file| !kept.disks.contains_key(file))
}

/// Reads all modules.
pub(super) fn load(root: &Path) -> Result<Found> {
    let mut found = Found::default();
    let top = root.join(TOP);
    if fs::symlink_metadata(&top).is_err() {
        return Ok(found);
    }
    expect_directory(&top)?;
    for directory in entries(&top)? {
        let name = directory.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
        let is_directory = fs::symlink_metadata(&directory).is_ok_and(|meta| meta.is_dir());
        let record = directory.join(RECORD);
        if !is_directory || !units::is_name(&name) || fs::symlink_metadata(&record).is_err() {
            continue;
        }
        match load_one(&directory, &record, &name) {
            Ok(kept) => found.usable.push(kept),
            Err(error) => found.damaged.push(DamagedModule::new(name, error.report())),
        }
    }
    Ok(found)
}

fn load_one(directory: &Path, record: &Path, name: &str) -> Result<Kept> {
    let mut module = Module::from_record(record, &read(record)?)?;
    if module.name != name {
        return Err(Module::damaged(record, &format!("it is the record of module {}", module.name)));
    }
    let mut disks = HashMap::new();
    for disk in module.machines.iter().flat_map(|machine| &machine.disks) {
        let path = directory.join(&disk.file);
        let bytes = read(&path)?;
        if disk.content.sha256().is_some_and(|promised| promised != Digest::of(&bytes)) {
            let message = format!("expected {} to be {}, but it is not", path.display(), disk.content);
            return Err(Error::new(ErrorKind::ChecksumMismatch, message).with_help(Module::REPAIR));
        }
        let files: FileTree = serde_json::from_slice(&bytes)
            .map_err(|error| Module::damaged(&path, "it is not a disk").with_source(error))?;
        disks.insert(disk.file.clone(), Arc::new(files));
    }
    module.path = Some(record.to_owned());
    Ok(Kept { module, disks })
}

/// Removes a module: its files, and its directory if nothing else is in it.
pub(super) fn remove(root: &Path, name: &str) -> Result<()> {
    let directory = directory(root, name);
    expect_directory(&directory)?;
    // The record first: without it there is no module, whatever else is left.
    remove_file(&directory.join(RECORD))?;
    remove_disks(&directory, |_| true)?;
    let _ = fs::remove_dir(&directory);
    Ok(())
}

/// Removes the disks in a directory for which the predicate is true.
fn remove_disks(directory: &Path, unwanted: impl Fn(&str) -> bool) -> Result<()> {
    for path in entries(directory)? {
        let is_file = fs::symlink_metadata(&path).is_ok_and(|meta| meta.is_file());
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let is_disk = name.strip_suffix(".json").is_some_and(|stem| stem.parse::<Digest>().is_ok());
        if is_file && is_disk && unwanted(name) {
            remove_file(&path)?;
        }
    }
    Ok(())
}

fn json(files: &FileTree) -> Result<Vec<u8>> {
    serde_json::to_vec(files).map_err(internal)
}

fn internal(error: serde_json::Error) -> Error {
    Error::new(ErrorKind::Internal, "cannot encode a module").with_source(error)
}

fn entries(directory: &Path) -> Result<Vec<PathBuf>> {
    let failed = |error| Error::io(format!("list {}", directory.display()), error);
    let mut paths = fs::read_dir(directory)
        .map_err(failed)?
        .map(|entry| Ok(entry.map_err(failed)?.path()))
        .collect::<Result<Vec<_>>>()?;
    paths.sort();
    Ok(paths)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    // A FIFO would block its reader.
    let read = match fs::symlink_metadata(path) {
        Ok(meta) if !meta.is_file() => Err(io::Error::other("it is not a regular file")),
        Ok(_) => fs::read(path),
        Err(error) => Err(error),
    };
    read.map_err(|error| Error::io(format!("read {}", path.display()), error))
}

/// Makes a directory that only its owner can read, if it does not exist.
fn make_directory(path: &Path) -> Result<()> {
    match create_private_directory(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => expect_directory(path),
        other => other.map_err(|error| Error::io(format!("create {}", path.display()), error)),
    }
}

/// Refuses what is not a directory itself, such as a symbolic link to one.
fn expect_directory(path: &Path) -> Result<()> {
    let meta = fs::symlink_metadata(path);
    match meta.map_err(|error| Error::io(format!("read {}", path.display()), error))? {
        meta if meta.is_dir() => Ok(()),
        _ => {
            let message = format!("expected a directory at {}, but found something else", path.display());
            Err(Error::new(ErrorKind::InvalidInput, message))
        }
    }
}

fn remove_file(path: &Path) -> Result<()> {
    fs::remove_file(path).map_err(|error| Error::io(format!("remove {}", path.display()), error))
}
