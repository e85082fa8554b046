//! The output of a guest on its serial console, in files of bounded size: the current one, and the one before it.

use std::{
    io,
    path::{Path, PathBuf},
};
use tokio::{
    fs::{self, File},
    io::AsyncWriteExt,
};

/// A record that keeps at least the last `kept` bytes and occupies at most twice as many.
#[derive(Debug)]
pub(super) struct Record {
    path: PathBuf,
    older: PathBuf,
    kept: u64,
    size: u64,
    /// `None` after a write error: the console continues without a record.
    file: Option<File>,
}

impl Record {
    /// Creates a new record; existing ones are removed.
    pub(super) async fn create(path: PathBuf, kept: u64) -> io::Result<Self> {
        let older = older_of(&path);
        remove(&older).await?;
        let file = Some(new_file(&path).await?);
        Ok(Self { path, older, kept, size: 0, file })
    }

    /// Reads what an earlier record at this path has kept.
    pub(super) async fn read(path: &Path) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        for file in [&older_of(path), path] {
            match fs::read(file).await {
                Ok(read) => bytes.extend(read),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(bytes)
    }

    /// Appends output of the guest.
    pub(super) async fn append(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let room = usize::try_from(self.kept - self.size).unwrap_or(usize::MAX);
            let (now, rest) = bytes.split_at(bytes.len().min(room));
            if let Err(error) = self.try_append(now).await {
                let path = self.path.display();
                tracing::warn!(%error, %path, "a serial console is no longer recorded");
                self.file = None;
            }
            if self.file.is_none() {
                return;
            }
            bytes = rest;
        }
    }

    async fn try_append(&mut self, bytes: &[u8]) -> io::Result<()> {
        if let Some(file) = &mut self.file {
            file.write_all(bytes).await?;
            // Until then the bytes are in a buffer of this process.
            file.flush().await?;
            self.size += bytes.len() as u64;
        }
        if self.size >= self.kept {
            fs::rename(&self.path, &self.older).await?;
            self.file = Some(new_file(&self.path).await?);
            self.size = 0;
        }
        Ok(())
    }
}

fn older_of(path: &Path) -> PathBuf {
    let mut older = path.as_os_str().to_owned();
    older.push(".0");
    older.into()
}

async fn new_file(path: &Path) -> io::Result<File> {
    remove(path).await?;
    fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).await
}

pub(super) async fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path).await {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
