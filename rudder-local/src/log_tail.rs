//! The end of a log file, for messages and reports.

use crate::process::without_advice;
use std::path::Path;

/// Number of bytes of a log that are quoted in a message.
const QUOTED_BYTES: u64 = 4096;

/// Returns the last lines of a log joined into one line for a message; empty if there are none.
pub async fn last_lines(log: &Path) -> String {
    let bytes = tail(log, QUOTED_BYTES).await.unwrap_or_default();
    let text = without_advice(&String::from_utf8_lossy(&bytes));
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    lines[lines.len().saturating_sub(10)..].join(" | ")
}

/// Returns the last bytes of a file; none if it does not exist.
///
/// # Errors
/// File errors.
pub async fn tail(path: &Path, limit: u64) -> std::io::Result<Vec<u8>> {
    use tokio::io::{AsyncReadExt, AsyncSeekExt};
    let mut file = match tokio::fs::File::open(path).await {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    let length = file.metadata().await?.len();
    file.seek(std::io::SeekFrom::Start(length.saturating_sub(limit))).await?;
    let mut bytes = Vec::new();
    file.take(limit).read_to_end(&mut bytes).await?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[tokio::test]
    async fn tail_returns_the_end_of_a_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "one\n\ntwo\nthree\n").unwrap();
        assert_eq!(tail(file.path(), 6).await.unwrap(), b"three\n");
        assert_eq!(tail(Path::new("/nonexistent"), 6).await.unwrap(), b"");
        assert_eq!(last_lines(file.path()).await, "one | two | three");
    }
}
