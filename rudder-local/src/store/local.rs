//! `file` URLs: copied into the store, because a file outside it may change, and the inputs of a module must not.

use super::{
    Lease, Store,
    blob::{UrlRecord, Validator},
    download::Requested,
    durable::io_error,
    fetch::Obtained,
    masked,
    unpack::{self, CHUNK, Packing, SparseWriter, Stop},
    verified::FileIdentity,
};
use rudder_core::{Error, ErrorKind, Result, backend::Progress, digest::Digester, plan::PlannedUrl};
use serde::{Deserialize, Serialize};
use std::{
    fs::{self, File},
    io::Read,
    path::{Path, PathBuf},
};

/// The identity of a source file at the time it was read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SourceIdentity {
    path: PathBuf,
    #[serde(flatten)]
    file: FileIdentity,
}

impl SourceIdentity {
    fn of(path: &Path) -> Result<Self> {
        let read = |error| io_error("read", path, error);
        let path = fs::canonicalize(path).map_err(read)?;
        let meta = fs::metadata(&path).map_err(read)?;
        if !meta.is_file() {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("expected a file, but found something else at {}", path.display()),
            ));
        }
        Ok(Self { path, file: FileIdentity::of(&meta) })
    }
}

/// The result of reading a local file.
enum Copied {
    /// Its bytes are a blob.
    Blob(Lease),
    /// Its bytes are packed, and were not copied.
    Packed(Packing),
}

impl Store {
    /// Copies a local file into the store, unless the store has it and it has not changed.
    pub(super) fn copy_in(
        &self,
        url: &PlannedUrl,
        requested: Requested,
        progress: &Progress,
        stop: &Stop,
    ) -> Result<Obtained> {
        let path = local_path(url)?;
        if let Some(record) = self.unchanged(url, &path)? {
            Self::verify(url, &record.served)?;
            let known = match requested {
                Requested::Image { .. } => self
                    .known_image(&record.served, progress, stop)?
                    .map(|known| Obtained::image(record.served, known)),
                Requested::File => self
                    .lease_blob(&record.served, Some(record.size), progress, stop)?
                    .map(|lease| Obtained::file(record.served, record.size, lease)),
            };
            if let Some(known) = known {
                return Ok(known);
            }
        }
        let (record, copied) = self.read_source(url, &path, requested, progress, stop)?;
        let served = record.served;
        Self::verify(url, &served)?;
        match (requested, copied) {
            (Requested::File, Copied::Blob(lease)) => Ok(Obtained::file(served, record.size, lease)),
            (Requested::Image { disk }, Copied::Blob(lease)) => {
                Ok(Obtained::image(served, self.image_of_blob(&served, lease, disk, progress, stop)?))
            }
            (_, Copied::Packed(packing)) => {
                if let Some(known) = self.known_image(&served, progress, stop)? {
                    return Ok(Obtained::image(served, known));
                }
                let file = File::open(&path).map_err(|error| io_error("read", &path, error))?;
                let unpacked = unpack::unpack(self, packing, file, requested.disk(), progress, stop)?;
                self.check_unchanged(&record, &path)?;
                Ok(Obtained::image(served, self.ingest_unpacked(&served, record.size, unpacked, progress)?))
            }
        }
    }

    /// Returns the record of this file, if it has not changed.
    fn unchanged(&self, url: &PlannedUrl, path: &Path) -> Result<Option<UrlRecord>> {
        let now = SourceIdentity::of(path)?;
        Ok(self.url_record(&url.url)?.filter(|record| {
            matches!(&record.validator, Validator::File(then) if *then == now && then.file.settled_by(record.fetched))
        }))
    }

    /// Reads a file once: into a blob, or, if it is packed and only its image is requested, just to compute its digest.
    fn read_source(
        &self,
        url: &PlannedUrl,
        path: &Path,
        requested: Requested,
        progress: &Progress,
        stop: &Stop,
    ) -> Result<(UrlRecord, Copied)> {
        let fetched = jiff::Timestamp::now();
        let identity = SourceIdentity::of(path)?;
        let task = format!("copy {}", masked(&url.url));
        let read = |error| io_error("read", path, error);
        let packing = if requested.is_image() { Packing::of_file(path)? } else { None };
        let mut source = File::open(path).map_err(read)?;
        let temp = if packing.is_none() { Some(self.temp_file()?) } else { None };
        let mut out = temp.as_ref().map(|temp| SparseWriter::new(temp.as_file()));
        let mut hasher = Digester::default();
        let mut chunk = vec![0; CHUNK];
        let mut done = 0;
        loop {
            stop.check()?;
            let count = source.read(&mut chunk).map_err(read)?;
            if count == 0 {
                break;
            }
            hasher.update(&chunk[..count]);
            if let (Some(out), Some(temp)) = (&mut out, &temp) {
                out.write(&chunk[..count]).map_err(|error| io_error("write", temp.path(), error))?;
            }
            done += count as u64;
            progress.bytes(&task, done, Some(identity.file.size));
        }
        let served = hasher.finish();
        let record = UrlRecord {
            url: masked(&url.url),
            served,
            size: done,
            fetched,
            validator: Validator::File(identity),
        };
        self.check_unchanged(&record, path)?;
        let copied = match (packing, &temp, out) {
            (None, Some(temp), Some(out)) => {
                out.finish().map_err(|error| io_error("write", temp.path(), error))?;
                Copied::Blob(self.insert_blob(temp.path(), &served)?)
            }
            (Some(packing), ..) => Copied::Packed(packing),
            _ => return Err(Error::new(ErrorKind::Internal, "a file was neither copied nor unpacked")),
        };
        self.write_url_record(&url.url, &record)?;
        Ok((record, copied))
    }

    fn check_unchanged(&self, record: &UrlRecord, path: &Path) -> Result<()> {
        let now = Validator::File(SourceIdentity::of(path)?);
        if now == record.validator {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Conflict, format!("{} changed while it was read", path.display()))
            .with_retryable(true)
            .with_help("wait until the program that writes it has finished"))
    }
}

fn local_path(url: &PlannedUrl) -> Result<PathBuf> {
    url.url.to_file_path().map_err(|()| {
        Error::new(
            ErrorKind::InvalidInput,
            format!(
                "expected a URL of a local file such as file:///srv/disk.qcow2, but found {}",
                masked(&url.url)
            ),
        )
    })
}
