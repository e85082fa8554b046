//! Turns a complete download into a blob: compares its checksum, then recognises and unpacks its image.

use super::{
    Store,
    blob::{UrlRecord, Validator},
    download::{Received, Requested},
    durable,
    fetch::Obtained,
    format, masked,
    unpack::{self, Packing, Stop},
};
use rudder_core::{ErrorKind, Result, backend::Progress, plan::PlannedUrl};

impl Store {
    /// Turns a complete download into a blob, if it passes the checks.
    pub(super) fn ingest(
        &self,
        url: &PlannedUrl,
        received: Received,
        requested: Requested,
        progress: &Progress,
    ) -> Result<Obtained> {
        let Received { part, served, unpacked, .. } = received;
        let size = part.len();
        let origin = part.origin();
        let record = UrlRecord {
            url: masked(&url.url),
            served,
            size,
            fetched: jiff::Timestamp::now(),
            validator: Validator::Http {
                etag: origin.and_then(|origin| origin.etag.clone()),
                last_modified: origin.and_then(|origin| origin.last_modified.clone()),
            },
        };
        if let Err(mut mismatch) = Self::verify(url, &served) {
            if requested.is_image()
                && Packing::of_file(part.path())?.is_none()
                && let Err(error) = format::recognise_file(part.path())
            {
                mismatch =
                    mismatch.with_help(format!("check the URL: the received file is not an image: {error}"));
            }
            self.insert_blob(part.path(), &served)?;
            self.write_url_record(&url.url, &record)?;
            part.discard()?;
            return Err(mismatch);
        }
        let got = match (requested, Packing::of_file(part.path())?) {
            (Requested::File, _) => Obtained::file(served, size, self.insert_blob(part.path(), &served)?),
            (Requested::Image { disk }, None) => {
                // What is not an image is not worth keeping: the server may have the right one next time.
                if let Err(error) = format::recognise_file(part.path()) {
                    part.discard()?;
                    return Err(error);
                }
                let lease = self.insert_blob(part.path(), &served)?;
                let image = self.image_of_blob(&served, lease, disk, progress, &Stop::default())?;
                Obtained::image(served, image)
            }
            (Requested::Image { disk }, Some(packing)) => {
                let unpacked = match unpacked {
                    Some((restarts, Ok(Some(unpacked)))) if restarts == part.growth().restarts() => {
                        Ok(unpacked)
                    }
                    // Unpacking used bytes from before the download started over, or failed: unpack the complete file.
                    _ => std::fs::File::open(part.path())
                        .map_err(|error| durable::io_error("read", part.path(), error))
                        .and_then(|file| {
                            unpack::unpack(self, packing, file, disk, progress, &Stop::default())
                        }),
                };
                let ingested =
                    unpacked.and_then(|unpacked| self.ingest_unpacked(&served, size, unpacked, progress));
                match ingested {
                    Ok(ingested) => Obtained::image(served, ingested),
                    Err(error) => {
                        // What is not an image is not worth keeping; what could not be unpacked for lack of space is.
                        if error.kind() == ErrorKind::InvalidImage {
                            part.discard()?;
                        }
                        return Err(error);
                    }
                }
            }
        };
        self.write_url_record(&url.url, &record)?;
        part.discard()?;
        Ok(got)
    }
}
