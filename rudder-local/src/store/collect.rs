//! Removal of what nothing needs any more: remains of dead owners, and cached inputs.

use super::{
    Store, Use,
    blob::{ImageRecord, UrlRecord},
    durable,
    durable::io_error,
    entries,
    lock::{FileLock, Mode},
    partial_download::Origin,
    record,
};
use rudder_core::{Result, backend::ReapReport, digest::Digest, module::InputRole};
use serde::{Deserialize, Serialize};
use std::{
    collections::HashSet,
    fs::{self, TryLockError},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

/// Which unneeded inputs `Store::collect` removes.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct CollectPolicy {
    /// Minimum time since the last use. 0 s removes all inputs except those that were
    /// [promised](Store::keep_cached) to stay longer.
    pub unused_for: Duration,
}

/// A promise that a blob stays cached.
#[derive(Debug, Serialize, Deserialize)]
struct Promise {
    /// Time after its last use, in milliseconds.
    keep_for_millis: u64,
    /// Time of the promise.
    given: jiff::Timestamp,
}

impl CollectPolicy {
    /// Returns a policy that removes inputs not used for this long.
    #[must_use]
    pub fn unused_for(unused_for: Duration) -> Self {
        Self { unused_for }
    }
}

impl Store {
    /// Removes what dead owners left: processes and directories of labs, temporary files, half-published modules.
    /// Partial downloads that can be resumed stay. Never touches anything of a living owner;
    /// may run in several processes at once.
    ///
    /// What has no ledger, is not known to be replaced, or does not belong to the store stays, and is listed in the report.
    ///
    /// # Errors
    /// File errors. What could not be removed is listed in the report.
    pub async fn reap(&self) -> Result<ReapReport> {
        let store = self.clone();
        super::blocking(move || {
            let mut report = ReapReport::default();
            store.reap_labs(&mut report)?;
            store.reap_temporary_files(&mut report)?;
            store.sweep_downloads(None, &mut report)?;
            store.reap_modules(&mut report)?;
            for module in store.damaged_modules()? {
                report.warnings.push(format!("module {} cannot be used: {}", module.name, module.reason));
            }
            for path in entries::foreign_entries(store.root())? {
                report
                    .warnings
                    .push(format!("{} does not belong to the store, and is left unchanged", path.display()));
            }
            Ok(report)
        })
        .await
    }

    /// Removes cached inputs that no module was made from, no lab needs, and no lease covers; abandoned partial downloads;
    /// and records about what is gone. Calls [`reap`](Self::reap) first.
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

    /// Creates a temporary file on the store's file system, locked for as long as its writer lives.
    pub(super) fn temp_file(&self) -> Result<tempfile::NamedTempFile> {
        // Between its creation and its locking, it must not look abandoned.
        let _scan_lock = FileLock::wait(&self.lock_path("temporary"), Mode::Shared)?;
        let dir = self.downloads_dir();
        let create = || {
            let temp = tempfile::Builder::new().prefix(".tmp-").tempfile_in(&dir)?;
            temp.as_file().lock()?;
            Ok(temp)
        };
        create().map_err(|error| io_error("create a temporary file in", &dir, error))
    }

    fn reap_temporary_files(&self, report: &mut ReapReport) -> Result<()> {
        let _scan_lock = FileLock::wait(&self.lock_path("temporary"), Mode::Exclusive)?;
        for (name, path) in self.files(&self.downloads_dir(), entries::is_temporary)? {
            let Ok(file) = durable::open_regular(&path) else { continue };
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
        let damaged = self.damaged_modules()?;
        if !damaged.is_empty() {
            let names: Vec<_> = damaged.iter().map(|module| module.name.as_str()).collect();
            report.warnings.push(format!(
                "cached inputs are kept, because it is unknown which of them these modules were made from: {}",
                names.join(", ")
            ));
            return Ok(());
        }
        let (needed, damaged) = self.blobs_of_modules()?;
        if !damaged.is_empty() {
            // The blobs that they name are unknown: none is removed that might be one of them.
            report.warnings.extend(damaged);
            return Ok(());
        }
        for (prefix, directory) in self.directories(&self.root().join("blobs/sha256"), |_| true)? {
            for (name, path) in self.files(&directory, |name| name.starts_with(&prefix))? {
                let Ok(digest) = name.parse::<Digest>() else { continue };
                if needed.contains(&digest) {
                    continue;
                }
                let Ok(lock) = self.lock_unused(&Use::Blob(digest))? else { continue };
                let unused_for = policy.unused_for.max(self.promised(&digest)?);
                if !old_enough(lock.last_used(), &path, unused_for) {
                    continue;
                }
                report.freed += durable::disk_usage(&path);
                durable::remove_file(&path)?;
                durable::remove_file(&self.promise_path(&digest))?;
                lock.remove()?;
                report.removed.push(format!("blob {}", digest.short()));
            }
        }
        Ok(())
    }

    /// Returns the blobs that published modules were made from, which are kept so that the modules can be rebuilt without a
    /// download; ISOs are excluded, because they are large and have a retention time of their own. Also returns the reasons why
    /// the list is incomplete.
    fn blobs_of_modules(&self) -> Result<(HashSet<Digest>, Vec<String>)> {
        let (mut needed, mut damaged) = (HashSet::new(), Vec::new());
        for module in self.modules()? {
            let inputs = module.provenance.inputs.iter().filter(|input| input.role != InputRole::Iso);
            for sha256 in inputs.filter_map(|input| input.content.sha256()) {
                needed.insert(sha256);
                if let Some(image) = self.image_record(&sha256)? {
                    needed.insert(image.stored);
                } else if record::is_damaged::<ImageRecord>(&self.image_record_path(&sha256))? {
                    damaged.push(format!(
                        "cached inputs are kept, because {} is damaged; build module {} again to recreate it",
                        self.image_record_path(&sha256).display(),
                        module.name
                    ));
                }
            }
        }
        Ok((needed, damaged))
    }

    fn promise_path(&self, digest: &Digest) -> PathBuf {
        self.root().join("index/kept").join(format!("{digest}.json"))
    }

    /// Returns how long a blob was promised to stay after its last use.
    fn promised(&self, digest: &Digest) -> Result<Duration> {
        let path = self.promise_path(digest);
        if record::is_damaged::<Promise>(&path)? {
            return Ok(Duration::MAX);
        }
        let promise = record::read::<Promise>(&path)?;
        Ok(promise.map_or(Duration::ZERO, |promise| Duration::from_millis(promise.keep_for_millis)))
    }

    /// Promises that a blob stays for this long after its last use, which is now: the caller has a lease.
    pub(super) fn promise(&self, digest: &Digest, keep_for: Duration) -> Result<()> {
        let path = self.promise_path(digest);
        let _one_at_a_time = FileLock::wait(&self.lock_path("kept"), Mode::Exclusive)?;
        let now = jiff::Timestamp::now();
        // The remaining time of an earlier promise.
        let left = record::read::<Promise>(&path)?.map_or(0, |earlier| {
            let age = now.as_millisecond().saturating_sub(earlier.given.as_millisecond());
            earlier.keep_for_millis.saturating_sub(u64::try_from(age).unwrap_or(0))
        });
        let keep_for_millis = u64::try_from(keep_for.as_millis()).unwrap_or(u64::MAX).max(left);
        record::write(&path, &Promise { keep_for_millis, given: now })
    }

    /// Removes abandoned partial downloads: those that cannot be resumed, and, with a policy, the others.
    fn sweep_downloads(&self, policy: Option<&CollectPolicy>, report: &mut ReapReport) -> Result<()> {
        for (name, path) in self.files(&self.downloads_dir(), |name| is_record(name, ".part"))? {
            let key = name.trim_end_matches(".part");
            let Some(lock) = FileLock::attempt(&self.download_lock(key), Mode::Exclusive)? else { continue };
            let _lock = lock.transient();
            let origin = path.with_extension("json");
            let resumable = record::read::<Origin>(&origin)?.is_some_and(|origin| origin.if_range.is_some());
            let unwanted = policy.is_some_and(|policy| old_enough(None, &path, policy.unused_for));
            if resumable && !unwanted {
                continue;
            }
            report.freed += durable::disk_usage(&path);
            durable::remove_file(&origin)?;
            durable::remove_file(&path.with_extension("sum"))?;
            durable::remove_file(&path)?;
            report.removed.push(format!("partial download {}", &key[..key.len().min(12)]));
        }
        Ok(())
    }

    /// Removes records of images and URLs whose blobs are gone. A missing record is simply recreated.
    fn collect_records(&self) -> Result<()> {
        let mut served = HashSet::new();
        for (name, path) in self.files(&self.root().join("index/images"), |name| is_record(name, ".json"))? {
            let Ok(digest) = name.trim_end_matches(".json").parse::<Digest>() else { continue };
            match self.image_record(&digest)? {
                Some(image) if self.blob_path(&image.stored).exists() => {
                    served.insert(digest);
                }
                // What a damaged record names is unknown: it is rewritten when it is needed.
                None if record::is_damaged::<ImageRecord>(&path)? => {
                    served.insert(digest);
                }
                _ => durable::remove_file(&path)?,
            }
        }
        for (_, path) in self.files(&self.root().join("index/urls"), |name| is_record(name, ".json"))? {
            let record = record::read::<UrlRecord>(&path)?;
            let useful = record.is_some_and(|record| {
                served.contains(&record.served) || self.blob_path(&record.served).exists()
            });
            if !useful {
                durable::remove_file(&path)?;
            }
        }
        for (name, path) in self.files(&self.root().join("index/kept"), |name| is_record(name, ".json"))? {
            let digest = name.trim_end_matches(".json").parse::<Digest>();
            if !digest.is_ok_and(|digest| self.blob_path(&digest).exists()) {
                durable::remove_file(&path)?;
            }
        }
        self.collect_verified()
    }
}

/// Returns whether this is the name of a file of the store that is about a digest.
fn is_record(name: &str, ending: &str) -> bool {
    name.strip_suffix(ending).is_some_and(|stem| stem.parse::<Digest>().is_ok())
}

/// Returns whether something was not used for this long.
fn old_enough(last_used: Option<SystemTime>, path: &Path, unused_for: Duration) -> bool {
    if unused_for.is_zero() {
        return true;
    }
    let modified = || {
        let seconds = fs::metadata(path).ok()?.mtime();
        Some(SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).ok()?))
    };
    // A clock that was set back makes it look young, so it is kept.
    last_used
        .or_else(modified)
        .and_then(|then| SystemTime::now().duration_since(then).ok())
        .is_some_and(|age| age >= unused_for)
}
