//! The base of a lab's disk: an image of the store as it is, if QEMU reads all of it as its author intended; else a
//! private copy. Images of the store are never changed, whatever QEMU would like to repair in them.

use super::map::{Extent, map};
use crate::{
    lab_storage::LabStorage,
    process::Finished,
    store::{ImageFormat, StoredImage},
};
use rudder_core::{Error, ErrorKind, Result, backend::Progress, units::human_bytes};
use serde::Deserialize;
use std::{
    fs,
    path::{Path, PathBuf},
};

/// An image that can be the backing file of an overlay.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Base {
    pub(crate) path: PathBuf,
    /// Its format, in QEMU's naming.
    pub(crate) format: &'static str,
    /// Size of the disk that a guest sees, in bytes.
    pub(crate) size: u64,
}

impl Base {
    /// Prepares an image of the store; `copy` is the name of the private copy in the lab, if one is needed.
    pub(crate) async fn of(
        storage: &LabStorage,
        image: &StoredImage,
        copy: &str,
        progress: &Progress,
    ) -> Result<Self> {
        let format = driver(image.format);
        let base = Self { path: image.path.clone(), format, size: image.virtual_size };
        let base = match image.format {
            // The whole file is the disk.
            ImageFormat::Raw => return Ok(base),
            ImageFormat::Vhd => base.with_declared_size(storage, copy, progress).await?,
            ImageFormat::Vhdx => base.with_replayed_log(storage, copy, progress).await?,
            ImageFormat::Qcow2 => base,
            _ => {
                let read = virtual_size(storage, &base.path, format).await?;
                // QEMU counts in sectors.
                if read != base.size.next_multiple_of(super::SECTOR) {
                    return Err(Error::new(
                        ErrorKind::InvalidImage,
                        format!(
                            "expected a {format} image of {} according to its header, but QEMU reads {}",
                            human_bytes(base.size),
                            human_bytes(read)
                        ),
                    )
                    .with_help("convert the original again: qemu-img convert -O qcow2 FILE disk.qcow2"));
                }
                base
            }
        };
        tokio::try_join!(base.check_complete(storage), base.check_consistent(storage))?;
        Ok(base)
    }

    /// Converts a VHD whose geometry holds less than the size in its header. For most programs that write VHDs, QEMU
    /// uses the geometry, and would cut off the end of the disk (`block/vpc.c`, `vpc_open`).
    async fn with_declared_size(self, storage: &LabStorage, copy: &str, progress: &Progress) -> Result<Self> {
        if virtual_size(storage, &self.path, self.format).await? == self.size {
            return Ok(self);
        }
        progress.notice(format!(
            "the geometry of the VHD does not match its size, {}: converting it",
            human_bytes(self.size)
        ));
        let path = self.path.to_str().ok_or_else(|| {
            let message = format!("expected a path in UTF-8, but found {}", self.path.display());
            Error::new(ErrorKind::InvalidInput, message)
        })?;
        let source = serde_json::json!({
            "driver": self.format,
            "force_size_calc": "current_size",
            "file": { "driver": "file", "filename": path },
        });
        let command = storage.qemu_img().args(["convert", "-q", "-O", "qcow2"]);
        command
            .args([format!("json:{source}"), copy.to_owned()])
            .run(None)
            .await?
            .success("convert the VHD")?;
        let copied = Self { path: storage.path(copy), format: "qcow2", size: self.size };
        let size = virtual_size(storage, &copied.path, copied.format).await?;
        if size == self.size {
            return Ok(copied);
        }
        Err(Error::new(
            ErrorKind::InvalidImage,
            format!("expected a VHD of {}, but QEMU reads {}", human_bytes(self.size), human_bytes(size)),
        )
        .with_help("convert the original to qcow2 with the program that made it"))
    }

    /// Copies a VHDX that was not closed and replays its log, whose changes belong to the disk. Only QEMU can replay it, which
    /// modifies the image.
    async fn with_replayed_log(self, storage: &LabStorage, copy: &str, progress: &Progress) -> Result<Self> {
        let Err(refusal) = virtual_size(storage, &self.path, self.format).await else { return Ok(self) };
        progress.notice("the VHDX was not closed by the program that wrote it: replaying its log on a copy");
        let command = storage.qemu_img().args(["convert", "-q", "-f", "raw", "-O", "raw"]);
        command.args([self.path.as_os_str(), copy.as_ref()]).run(None).await?.success("copy the VHDX")?;
        let repaired =
            storage.qemu_img().args(["check", "-q", "-r", "all", "-f", self.format, copy]).run(None).await?;
        let path = storage.path(copy);
        if repaired.status.success()
            && let Ok(size) = virtual_size(storage, &path, self.format).await
        {
            return Ok(Self { path, size, ..self });
        }
        let _ = fs::remove_file(&path);
        Err(refusal.with_help(
            "open the original with the program that wrote it, close it, and use it again; or convert it there",
        ))
    }

    /// Checks that everything that the image refers to is inside its file: for what is missing, QEMU reads zeros.
    async fn check_complete(&self, storage: &LabStorage) -> Result<()> {
        let failed = |error| Error::io(format_args!("read {}", self.path.display()), error);
        let length = fs::metadata(&self.path).map_err(failed)?.len();
        let mut end = 0;
        let take = |extent: Extent| match extent.offset {
            Some(offset) if !extent.zero => end = end.max(offset.saturating_add(extent.length)),
            _ => {}
        };
        let mapped = map(storage, &self.path, self.format, take).await;
        mapped.map_err(|error| self.damaged("its tables cannot be read").with_source(error))?;
        if end > length {
            return Err(self.damaged(&format!("it refers to {end} bytes, but the file has {length}")));
        }
        Ok(())
    }

    /// Checks that its tables are consistent, to the extent that QEMU supports this for the format.
    async fn check_consistent(&self, storage: &LabStorage) -> Result<()> {
        if !matches!(self.format, "qcow2" | "vmdk") {
            return Ok(());
        }
        /// The output of `qemu-img check --output=json`.
        #[derive(Default, Deserialize)]
        struct Check {
            #[serde(default)]
            corruptions: u64,
        }
        let command = storage.qemu_img().args(["check", "--output=json", "-f", self.format]);
        let finished = command.args([self.path.as_os_str()]).run(None).await?;
        let Ok(check) = serde_json::from_slice::<Check>(&finished.stdout) else {
            return Err(self
                .damaged("its tables cannot be read")
                .with_source(finished.failure("check the image")));
        };
        // Leaked clusters only waste space. The counters of an image that was not closed are wrong, but they are not
        // used in an image that is not written to.
        if check.corruptions == 0 || is_dirty(&info(storage, &self.path, self.format).await?) {
            return Ok(());
        }
        Err(self.damaged(&format!("qemu-img check finds {} errors in it", check.corruptions)))
    }

    fn damaged(&self, why: &str) -> Error {
        Error::new(
            ErrorKind::InvalidImage,
            format!(
                "expected a complete {} image, but found one that is truncated or damaged: {why}",
                self.format
            ),
        )
        .with_help("check the original at its source, and copy it again")
    }
}

/// Returns QEMU's name of a format.
fn driver(format: ImageFormat) -> &'static str {
    match format {
        ImageFormat::Qcow2 => "qcow2",
        ImageFormat::Vmdk => "vmdk",
        ImageFormat::Vdi => "vdi",
        ImageFormat::Vhd => "vpc",
        ImageFormat::Vhdx => "vhdx",
        _ => "raw",
    }
}

/// Returns the output of `qemu-img info` for an image.
async fn info(storage: &LabStorage, image: &Path, format: &str) -> Result<serde_json::Value> {
    let command = storage.qemu_img().args(["info", "--output=json", "-f", format]).args([image]);
    let finished: Finished = command.run(None).await?;
    if !finished.status.success() {
        let error = finished.failure("read the image");
        return Err(Error::new(
            ErrorKind::InvalidImage,
            format!("expected a {format} image, but QEMU cannot read it"),
        )
        .with_source(error));
    }
    Ok(serde_json::from_slice(&finished.stdout).unwrap_or_default())
}

fn is_dirty(info: &serde_json::Value) -> bool {
    info["dirty-flag"].as_bool() == Some(true)
}

/// Returns the size of the disk that a guest sees, in bytes, as QEMU reads it.
async fn virtual_size(storage: &LabStorage, image: &Path, format: &str) -> Result<u64> {
    let info = info(storage, image, format).await?;
    let extents = info["format-specific"]["data"]["extents"].as_array();
    let foreign = extents
        .into_iter()
        .flatten()
        .any(|extent| extent["filename"].as_str().is_none_or(|name| Path::new(name) != image));
    if foreign || info.get("backing-filename").is_some() {
        return Err(Error::new(
            ErrorKind::InvalidImage,
            "expected a self-contained image, but found one that refers to other files",
        )
        .with_help("convert it with qemu-img convert, and use the result"));
    }
    info["virtual-size"].as_u64().ok_or_else(|| {
        Error::new(
            ErrorKind::Protocol,
            "expected the virtual size of an image from qemu-img info, but found none",
        )
    })
}
