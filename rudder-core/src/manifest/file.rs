//! Reads the file of a manifest, up to the maximum size of a manifest.

use crate::{Error, ErrorKind, Result};
use std::{
    fs::File,
    io::{Read, Take},
    path::Path,
};

/// Maximum size of a manifest file in bytes: 16 MiB.
pub const MAX_BYTES: usize = 16 * 1024 * 1024;

/// Reads the file of a manifest. Pipes and devices are read like files: to their end, or to the limit.
///
/// # Errors
/// `NotFound` and `Io` when it cannot be read; `InvalidInput` for a directory, a block device, and anything longer than
/// [`MAX_BYTES`].
pub fn read_file(path: &Path) -> Result<Vec<u8>> {
    let shown = path.display();
    let failed = |error| Error::io(format!("read {shown}"), error);
    // Checked before opening, because opening some devices has side effects.
    let kind = std::fs::metadata(path).map_err(failed)?;
    if kind.is_dir() {
        let message = format!("expected a manifest file, but found a directory: {shown}");
        return Err(Error::new(ErrorKind::InvalidInput, message));
    }
    let size = if kind.is_file() { kind.len() } else { 0 };
    if size > MAX_BYTES as u64 {
        return Err(too_large(path));
    }
    read(File::open(path).map_err(failed)?).map_err(failed)?.ok_or_else(|| too_large(path))
}

/// Reads all bytes; `None` if there are more than `MAX_BYTES`.
fn read(file: impl Read) -> std::io::Result<Option<Vec<u8>>> {
    let mut bytes = Vec::new();
    let mut limited: Take<_> = file.take(MAX_BYTES as u64 + 1);
    limited.read_to_end(&mut bytes)?;
    Ok((bytes.len() <= MAX_BYTES).then_some(bytes))
}

fn too_large(path: &Path) -> Error {
    let message = format!(
        "expected a manifest of at most {} MiB, but found more in {}",
        MAX_BYTES >> 20,
        path.display()
    );
    Error::new(ErrorKind::InvalidInput, message).with_help("provide large files with `url` in `files`")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn files_that_cannot_be_manifests_are_refused_before_they_fill_the_memory() {
        let dir = tempfile::tempdir().unwrap();
        let error = |path: &Path| read_file(path).unwrap_err();
        assert_eq!(error(Path::new("/dev/zero")).kind(), ErrorKind::InvalidInput);
        assert!(error(Path::new("/dev/zero")).to_string().contains("at most 16 MiB"));
        assert!(error(dir.path()).to_string().contains("a directory"));
        assert_eq!(error(&dir.path().join("none")).kind(), ErrorKind::NotFound);
        // A sparse file takes no space on the disk, and is refused without reading it.
        let sparse = dir.path().join("sparse");
        File::create(&sparse).unwrap().set_len(1 << 40).unwrap();
        assert_eq!(error(&sparse).kind(), ErrorKind::InvalidInput);
        assert_eq!(read_file(Path::new("/dev/null")).unwrap(), b"");
    }

    #[test]
    fn a_pipe_is_read_to_its_end_or_to_the_limit() {
        assert_eq!(read(&b"vms: []"[..]).unwrap().unwrap(), b"vms: []");
        assert_eq!(read(std::io::repeat(b'x')).unwrap(), None);
        let whole = vec![b'x'; MAX_BYTES];
        assert_eq!(read(&*whole).unwrap().unwrap().len(), MAX_BYTES);
    }
}
