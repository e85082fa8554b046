//! What nothing needs any more: what dead owners left, and cached inputs.

use super::{
    Store, Use, durable,
    durable::io_error,
    lock::{FileLock, Mode},
    part::Origin,
};
use crate::{Result, backend::ReapReport, digest::Digest};
use std::{
    collections::HashSet,
    fs::{self, File, TryLockError},
    os::unix::fs::MetadataExt,
    path::Path,
    time::{Duration, SystemTime},
};

/// Which of the inputs that nothing needs are removed.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct CollectPolicy {
    /// Only those that were not used for this long. 0 s: all of them.
    pub unused_for: Duration,
}

impl CollectPolicy {
    /// Those that were not used for this long.
    #[must_use]
    pub fn unused_for(unused_for: Duration) -> Self {
        Self { unused_for }
    }
}

impl Store {
    /// Removes what dead owners left: processes and directories of labs, temporary files, half-published modules.
    /// Partial downloads that the next download can go on with stay. Never touches what a living owner has;
    /// may run in several processes at once.
    ///
    /// # Errors
    /// File errors. What could not be removed is in the report.
    pub async fn reap(&self) -> Result<ReapReport> {
        let store = self.clone();
        super::blocking(move || {
            let mut report = ReapReport::default();
            store.reap_labs(&mut report)?;
            store.reap_temporary_files(&mut report)?;
            store.sweep_downloads(None, &mut report)?;
            store.reap_modules(&mut report)?;
            Ok(report)
        })
        .await
    }

    /// Removes cached inputs that no module was made of, no lab needs, and nobody has a lease of; partial downloads
    /// that nobody works on; and records about what is gone. [`reap`](Self::reap)s first.
    ///
    /// # Errors
    /// File errors.
    pub async fn collect(&self, policy: CollectPolicy) -> Result<ReapReport> {
        let mut report = self.reap().await?;
        let store = self.clone();
        let collected = super::blocking(move || {
            let mut report = ReapReport::default();
            store.collect_blobs(&policy, &mut report)?;
            store.sweep_downloads(Some(&policy), &mut report)?;
            store.collect_records()?;
            Ok(report)
        })
        .await?;
        report.merge(collected);
        Ok(report)
    }

    /// A temporary file on the store's file system, locked for as long as its writer lives.
    pub(super) fn temp_file(&self) -> Result<tempfile::NamedTempFile> {
        // Between making and locking it, it must not look abandoned.
        let _judging = FileLock::wait(&self.lock_path("temporary"), Mode::Shared)?;
        let dir = self.downloads_dir();
        let make = || {
            let temp = tempfile::Builder::new().prefix(".tmp-").tempfile_in(&dir)?;
            temp.as_file().lock()?;
            Ok(temp)
        };
        make().map_err(|error| io_error("make a temporary file in", &dir, error))
    }

    fn reap_temporary_files(&self, report: &mut ReapReport) -> Result<()> {
        let _judging = FileLock::wait(&self.lock_path("temporary"), Mode::Exclusive)?;
        for (name, path) in self.entries(&self.downloads_dir(), |name| name.starts_with(".tmp-"))? {
            let Ok(file) = File::open(&path) else { continue };
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => continue,
                Err(TryLockError::Error(error)) => return Err(io_error("lock", &path, error)),
            }
            report.freed += durable::disk_usage(&path);
            durable::remove_file(&path)?;
            report.removed.push(format!("temporary file {name}"));
        }
        Ok(())
    }

    fn collect_blobs(&self, policy: &CollectPolicy, report: &mut ReapReport) -> Result<()> {
        let needed = self.blobs_of_modules()?;
        for (_, shelf) in self.entries(&self.root().join("blobs/sha256"), |_| true)? {
            for (name, path) in self.entries(&shelf, |_| true)? {
                let Ok(digest) = name.parse::<Digest>() else { continue };
                if needed.contains(&digest) {
                    continue;
                }
                let Ok(lock) = self.unused(&Use::Blob(digest))? else { continue };
                if !old_enough(lock.last_used(), &path, policy.unused_for) {
                    continue;
                }
                report.freed += durable::disk_usage(&path);
                durable::remove_file(&path)?;
                lock.remove()?;
                report.removed.push(format!("blob {}", digest.short()));
            }
        }
        Ok(())
    }

    /// The blobs that published modules were made of: to make them again without a download.
    fn blobs_of_modules(&self) -> Result<HashSet<Digest>> {
        let mut needed = HashSet::new();
        for module in self.modules()? {
            for input in module.provenance.inputs {
                needed.insert(input.sha256);
                if let Some(image) = self.image_record(&input.sha256)? {
                    needed.insert(image.stored);
                }
            }
        }
        Ok(needed)
    }

    /// Removes partial downloads that nobody works on: those that cannot be gone on with, and, with a policy, the others.
    fn sweep_downloads(&self, policy: Option<&CollectPolicy>, report: &mut ReapReport) -> Result<()> {
        for (name, path) in self.entries(&self.downloads_dir(), |name| name.ends_with(".part"))? {
            let key = name.trim_end_matches(".part");
            let Some(lock) = FileLock::attempt(&self.download_lock(key), Mode::Exclusive)? else { continue };
            let _lock = lock.transient();
            let record = path.with_extension("json");
            let resumable =
                durable::read_json::<Origin>(&record)?.is_some_and(|origin| origin.if_range.is_some());
            let unwanted = policy.is_some_and(|policy| old_enough(None, &path, policy.unused_for));
            if resumable && !unwanted {
                continue;
            }
            report.freed += durable::disk_usage(&path);
            durable::remove_file(&record)?;
            durable::remove_file(&path)?;
            report.removed.push(format!("partial download {}", &key[..key.len().min(12)]));
        }
        Ok(())
    }

    /// Removes records of images and URLs whose blobs are gone. A record that is missing is only made again.
    fn collect_records(&self) -> Result<()> {
        let mut served = HashSet::new();
        for (name, path) in self.entries(&self.root().join("index/images"), |name| name.ends_with(".json"))? {
            let Ok(digest) = name.trim_end_matches(".json").parse::<Digest>() else { continue };
            match self.image_record(&digest)? {
                Some(image) if self.blob_path(&image.stored).exists() => {
                    served.insert(digest);
                }
                _ => durable::remove_file(&path)?,
            }
        }
        for (_, path) in self.entries(&self.root().join("index/urls"), |name| name.ends_with(".json"))? {
            let record = durable::read_json::<super::blob::UrlRecord>(&path)?;
            let useful = record.is_some_and(|record| {
                served.contains(&record.served) || self.blob_path(&record.served).exists()
            });
            if !useful {
                durable::remove_file(&path)?;
            }
        }
        Ok(())
    }
}

/// Whether something was not used for this long.
fn old_enough(last_used: Option<SystemTime>, path: &Path, unused_for: Duration) -> bool {
    if unused_for.is_zero() {
        return true;
    }
    let modified = || {
        let seconds = fs::metadata(path).ok()?.mtime();
        Some(SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).ok()?))
    };
    // A clock that went back makes it young: kept, to be safe.
    last_used
        .or_else(modified)
        .and_then(|then| SystemTime::now().duration_since(then).ok())
        .is_some_and(|age| age >= unused_for)
}
