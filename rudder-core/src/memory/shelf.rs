//! Modules as files, for those who want to see them: `DIR/memory/NAME/module.json`, and its disks beside it.

use super::files::FileTree;
use crate::{Error, ErrorKind, Result, digest::Digest, module::Module};
use std::{
    collections::HashMap,
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    sync::Arc,
};

/// The record of a module.
const RECORD: &str = "module.json";

/// A module and its disks.
#[derive(Debug, Clone)]
pub(super) struct Kept {
    pub(super) module: Module,
    pub(super) disks: HashMap<Digest, Arc<FileTree>>,
}

fn directory(shelf: &Path, name: &str) -> PathBuf {
    shelf.join("memory").join(name)
}

/// Writes a module: first its disks, named by their content, then its record by one rename.
pub(super) fn save(shelf: &Path, kept: &mut Kept) -> Result<()> {
    let directory = directory(shelf, &kept.module.name);
    fs::create_dir_all(&directory)
        .map_err(|error| Error::io(format!("make {}", directory.display()), error))?;
    for (digest, files) in &kept.disks {
        write(&directory.join(format!("{digest}.json")), &json(files)?)?;
    }
    let record = directory.join(RECORD);
    let mut text = serde_json::to_vec_pretty(&kept.module).map_err(internal)?;
    text.push(b'\n');
    write(&record, &text)?;
    kept.module.path = Some(record);
    // What the module of this name had before is of no use to anyone now.
    for path in entries(&directory)? {
        let digest = path.file_stem().and_then(|stem| stem.to_str()).and_then(|stem| stem.parse().ok());
        if digest.is_some_and(|digest: Digest| !kept.disks.contains_key(&digest)) {
            remove_file(&path)?;
        }
    }
    Ok(())
}

/// Reads all modules.
pub(super) fn load(shelf: &Path) -> Result<Vec<Kept>> {
    let top = shelf.join("memory");
    if !top.exists() {
        return Ok(Vec::new());
    }
    let mut all = Vec::new();
    for directory in entries(&top)? {
        let record = directory.join(RECORD);
        if !record.exists() {
            continue;
        }
        let mut module: Module =
            serde_json::from_slice(&read(&record)?).map_err(|error| broken(&record, error))?;
        let mut disks = HashMap::new();
        for disk in module.machines.iter().flat_map(|machine| &machine.disks) {
            let path = directory.join(&disk.file);
            let bytes = read(&path)?;
            if Digest::of(&bytes) != disk.sha256 {
                let message =
                    format!("expected {} to have sha256 {}, but it has not", path.display(), disk.sha256);
                return Err(Error::new(ErrorKind::ChecksumMismatch, message));
            }
            let files: FileTree = serde_json::from_slice(&bytes).map_err(|error| broken(&path, error))?;
            disks.insert(disk.sha256, Arc::new(files));
        }
        module.path = Some(record);
        all.push(Kept { module, disks });
    }
    Ok(all)
}

/// Removes a module.
pub(super) fn remove(shelf: &Path, name: &str) -> Result<()> {
    let directory = directory(shelf, name);
    // The record first: without it there is no module, whatever else is left.
    remove_file(&directory.join(RECORD))?;
    fs::remove_dir_all(&directory)
        .map_err(|error| Error::io(format!("remove {}", directory.display()), error))
}

fn json(files: &FileTree) -> Result<Vec<u8>> {
    serde_json::to_vec(files).map_err(internal)
}

fn internal(error: serde_json::Error) -> Error {
    Error::new(ErrorKind::Internal, "cannot write a module down").with_source(error)
}

fn broken(path: &Path, error: serde_json::Error) -> Error {
    Error::new(
        ErrorKind::InvalidInput,
        format!("expected a module in {}, but cannot read it", path.display()),
    )
    .with_source(error)
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
    fs::read(path).map_err(|error| Error::io(format!("read {}", path.display()), error))
}

fn remove_file(path: &Path) -> Result<()> {
    fs::remove_file(path).map_err(|error| Error::io(format!("remove {}", path.display()), error))
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let failed = |error| Error::io(format!("write {}", path.display()), error);
    let directory = path.parent().unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(directory).map_err(failed)?;
    file.write_all(bytes).map_err(failed)?;
    file.as_file().sync_all().map_err(failed)?;
    file.persist(path).map_err(|error| failed(error.error))?;
    Ok(())
}
