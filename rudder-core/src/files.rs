//! Files that may be read while they are written.

use crate::{Error, Result};
use std::{
    io::{self, Write as _},
    path::Path,
};

/// Replaces or creates a file, readable by its owner only. Readers, including those that have the file open, see either
/// all of the old content or all of the new. The change may be lost in a power failure.
///
/// # Errors
/// `HostDiskFull`; file errors.
pub fn replace_file(path: &Path, content: &[u8]) -> Result<()> {
    let replace = || -> io::Result<()> {
        let mut file =
            tempfile::Builder::new().prefix(".tmp-").tempfile_in(path.parent().unwrap_or(Path::new(".")))?;
        file.write_all(content)?;
        file.persist(path).map_err(|error| error.error)?;
        Ok(())
    };
    replace().map_err(|error| Error::io(format!("write {}", path.display()), error))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::fs::{self, File};

    #[test]
    fn a_reader_of_a_replaced_file_sees_consistent_content() {
        use std::io::Read as _;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        replace_file(&path, b"the old content").unwrap();
        let mut open = File::open(&path).unwrap();
        let mut begun = [0; 4];
        open.read_exact(&mut begun).unwrap();
        replace_file(&path, b"new").unwrap();
        let mut rest = String::new();
        open.read_to_string(&mut rest).unwrap();
        assert_eq!((&begun, rest.as_str()), (b"the ", "old content"));
        assert_eq!(fs::read(&path).unwrap(), b"new");
        #[cfg(unix)]
        assert_eq!(
            std::os::unix::fs::PermissionsExt::mode(&fs::metadata(&path).unwrap().permissions()) & 0o777,
            0o600
        );
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
