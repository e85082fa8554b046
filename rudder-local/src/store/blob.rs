//! Blobs and records about them: which URL returned which bytes, and which image those bytes contain.

use super::{
    ImageFormat, Lease, Store, Use, durable,
    durable::io_error,
    format::{self, Recognised},
    record,
    unpack::{self, Packing, Stop},
    verified::Condition,
};
use rudder_core::{Error, ErrorKind, Result, backend::Progress, digest::Digest, plan::PlannedUrl};
use serde::{Deserialize, Serialize};
use std::{
    fs::{self, File},
    path::{Path, PathBuf},
};

/// The blob that an image became.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ImageRecord {
    /// Digest of the blob.
    pub(super) stored: Digest,
    /// Size of the blob.
    pub(super) stored_size: u64,
    /// Format of the image.
    pub(super) format: ImageFormat,
    /// Size of the disk that a guest sees.
    pub(super) virtual_size: u64,
    /// Number of bytes served.
    pub(super) served_size: u64,
}

/// What a URL returned.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct UrlRecord {
    /// The URL, masked, for display.
    pub(super) url: String,
    /// sha256 of the bytes as served.
    pub(super) served: Digest,
    /// Number of bytes served.
    pub(super) size: u64,
    /// Time of the download; tells this record apart from later ones.
    pub(super) fetched: jiff::Timestamp,
    /// How to ask whether the URL still returns the same.
    pub(super) validator: Validator,
}

/// How to ask whether a URL still returns the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Validator {
    /// There is no way to ask.
    None,
    /// The headers of a server.
    Http {
        /// `ETag` (RFC 9110, 8.8.3), as it was sent.
        etag: Option<String>,
        /// `Last-Modified`, as it was sent.
        last_modified: Option<String>,
    },
    /// The file's metadata.
    File(super::local::SourceIdentity),
}

impl Store {
    /// Returns the path of a blob, whether or not it exists.
    pub(super) fn blob_path(&self, digest: &Digest) -> PathBuf {
        let hex = digest.to_string();
        self.root().join("blobs/sha256").join(&hex[..2]).join(hex)
    }

    pub(super) fn image_record_path(&self, served: &Digest) -> PathBuf {
        self.root().join("index/images").join(format!("{served}.json"))
    }

    /// Returns the name of all files about a URL. The fragment after `#` is ignored, because it never reaches a server.
    pub(super) fn url_key(url: &url::Url) -> String {
        let mut url = url.clone();
        url.set_fragment(None);
        Digest::of(url.as_str().as_bytes()).to_string()
    }

    fn url_record_path(&self, url: &url::Url) -> PathBuf {
        self.root().join("index/urls").join(format!("{}.json", Self::url_key(url)))
    }

    pub(super) fn url_record(&self, url: &url::Url) -> Result<Option<UrlRecord>> {
        record::read(&self.url_record_path(url))
    }

    pub(super) fn write_url_record(&self, url: &url::Url, record: &UrlRecord) -> Result<()> {
        record::write(&self.url_record_path(url), record)
    }

    pub(super) fn image_record(&self, served: &Digest) -> Result<Option<ImageRecord>> {
        record::read(&self.image_record_path(served))
    }

    /// Leases a blob of this size (`None`: any size), if it exists and its content matches its digest. A damaged one counts as
    /// absent, and is reported.
    pub(super) fn lease_blob(
        &self,
        digest: &Digest,
        size: Option<u64>,
        progress: &Progress,
        stop: &Stop,
    ) -> Result<Option<Lease>> {
        let path = self.blob_path(digest);
        if path.symlink_metadata().is_err() {
            return Ok(None);
        }
        // Examined under the lease: it may have been collected while we waited for the lease.
        let lease = Lease::take(self, Use::Blob(*digest))?;
        match self.examine(&path, digest, size, progress, stop)? {
            Condition::Sound => Ok(Some(lease)),
            Condition::Missing => Ok(None),
            Condition::Damaged(why) => {
                progress.notice(format!(
                    "the cached file {} is damaged: {why}; fetching it again",
                    path.display()
                ));
                Ok(None)
            }
        }
    }

    /// Returns the image that these served bytes became, if it is in the store.
    pub(super) fn known_image(
        &self,
        served: &Digest,
        progress: &Progress,
        stop: &Stop,
    ) -> Result<Option<(ImageRecord, Lease)>> {
        let Some(record) = self.image_record(served)? else {
            return Ok(None);
        };
        let lease = self.lease_blob(&record.stored, Some(record.stored_size), progress, stop)?;
        let Some(lease) = lease else { return Ok(None) };
        // Only the image itself is authoritative: records may be older than the rules.
        let Recognised { format, virtual_size, .. } =
            format::recognise_file(&self.blob_path(&record.stored))?;
        Ok(Some((ImageRecord { format, virtual_size, ..record }, lease)))
    }

    /// Turns a finished file of the store's file system into a blob. Its digest was computed from what was written.
    pub(super) fn insert_blob(&self, file: &Path, digest: &Digest) -> Result<Lease> {
        let path = self.blob_path(digest);
        let lease = Lease::take(self, Use::Blob(*digest))?;
        let size = fs::metadata(file).map_err(|error| io_error("read", file, error))?.len();
        let existing = self.examine(&path, digest, Some(size), &Progress::none(), &Stop::default())?;
        if existing == Condition::Sound {
            durable::remove_file(file)?;
            return Ok(lease);
        }
        let dir = durable::parent(&path);
        durable::make_dir(dir)?;
        let store_file = || -> std::io::Result<()> {
            let handle = File::open(file)?;
            durable::finalise(&handle)?;
            if path.symlink_metadata().is_ok_and(|meta| meta.is_dir()) {
                // The directory may be a user's: it is moved aside, not removed.
                fs::rename(&path, dir.join(format!("{digest}.aside-{:08x}", rand::random::<u32>())))?;
            }
            // Replaces what was damaged; processes that have it open keep it.
            fs::rename(file, &path)
        };
        store_file().map_err(|error| io_error("store", &path, error))?;
        durable::sync_dir(dir)?;
        self.record_verified(&path, digest);
        Ok(lease)
    }

    /// Recognises the image in a blob, unpacks it if it is packed, and records which blob it became.
    pub(super) fn image_of_blob(
        &self,
        served: &Digest,
        lease: Lease,
        disk: Option<u64>,
        progress: &Progress,
        stop: &Stop,
    ) -> Result<(ImageRecord, Lease)> {
        let path = self.blob_path(served);
        let size = fs::metadata(&path).map_err(|error| io_error("read", &path, error))?.len();
        match Packing::of_file(&path)? {
            None => {
                let image = format::recognise_file(&path)?;
                Ok((self.record_image(served, size, *served, size, &image, progress)?, lease))
            }
            Some(packing) => {
                let file = File::open(&path).map_err(|error| io_error("read", &path, error))?;
                let unpacked = unpack::unpack(self, packing, file, disk, progress, stop)?;
                self.ingest_unpacked(served, size, unpacked, progress)
            }
        }
    }

    /// Turns an unpacked image into a blob, and records which bytes it came from.
    pub(super) fn ingest_unpacked(
        &self,
        served: &Digest,
        served_size: u64,
        unpacked: unpack::Unpacked,
        progress: &Progress,
    ) -> Result<(ImageRecord, Lease)> {
        if let Some(inner) = Packing::of_file(unpacked.path())? {
            return Err(Error::new(
                ErrorKind::InvalidImage,
                format!("expected a disk image, but found {inner} data inside {} data", unpacked.packing()),
            )
            .with_help("pack the image only once"));
        }
        let image = format::recognise_file(unpacked.path())?;
        let (digest, size) = (unpacked.digest(), unpacked.size());
        let lease = self.insert_blob(unpacked.path(), &digest)?;
        Ok((self.record_image(served, served_size, digest, size, &image, progress)?, lease))
    }

    fn record_image(
        &self,
        served: &Digest,
        served_size: u64,
        stored: Digest,
        stored_size: u64,
        image: &Recognised,
        progress: &Progress,
    ) -> Result<ImageRecord> {
        if let Some(remark) = &image.remark {
            progress.notice(remark.clone());
        }
        let record = ImageRecord {
            stored,
            stored_size,
            format: image.format,
            virtual_size: image.virtual_size,
            served_size,
        };
        record::write(&self.image_record_path(served), &record)?;
        Ok(record)
    }

    /// Compares the digest of the served bytes with the checksum in the manifest.
    pub(super) fn verify(url: &PlannedUrl, served: &Digest) -> Result<()> {
        match url.sha256 {
            Some(expected) if expected != *served => Err(Error::new(
                ErrorKind::ChecksumMismatch,
                format!("expected sha256 {expected}, but found {served}"),
            )
            .with_help(
                "if the server is right, correct `checksum` in the manifest: the bytes are kept in the store and are not \
                 downloaded again",
            )),
            _ => Ok(()),
        }
    }
}
