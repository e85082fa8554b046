//! Small files that are stored with a lab.

use crate::{Error, ErrorKind, Result};

/// Maximum size of a file [stored](super::Lab::store_file) with a lab, in bytes.
const LAB_FILE_LIMIT: usize = 64 << 10;

/// Checks a file for [`Lab::store_file`](super::Lab::store_file).
///
/// # Errors
/// `InvalidInput` when its name or its size is not allowed.
pub fn check_lab_file(name: &str, content: &[u8]) -> Result<()> {
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || ".-".contains(c);
    let is_named = name.starts_with(|c: char| c.is_ascii_lowercase()) && name.chars().all(allowed);
    if !is_named || name.len() > 63 {
        let message = format!(
            "expected the name of a lab's file (at most 63 of a-z, 0-9, '.', '-'), but found {name:?}"
        );
        return Err(Error::new(ErrorKind::InvalidInput, message));
    }
    if content.len() > LAB_FILE_LIMIT {
        let message = format!(
            "expected at most {LAB_FILE_LIMIT} bytes for the lab's file {name}, but found {}",
            content.len()
        );
        return Err(Error::new(ErrorKind::InvalidInput, message));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rejects_names_that_are_no_key_of_a_secret_and_no_file() {
        for name in ["", ".", "../x", "a/b", "A", "a_b", "1a", &"a".repeat(64)] {
            assert!(check_lab_file(name, b"").is_err(), "{name:?}");
        }
        assert!(check_lab_file("login.key", &[0; LAB_FILE_LIMIT]).is_ok());
        assert!(check_lab_file("login.key", &[0; LAB_FILE_LIMIT + 1]).is_err());
    }
}
