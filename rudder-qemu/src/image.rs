//! Disk images, through qemu-img: overlays on what is in the store, and captured disks.

use crate::{lab::Ground, process::describe};
use rudder_core::{
    Error, ErrorKind, Result,
    backend::Progress,
    digest::{Digest, Hasher},
    units::human_bytes,
};
use std::{
    fs,
    io::Read,
    path::{Path, PathBuf},
};

/// Sizes of disks are whole sectors.
const SECTOR: u64 = 512;

/// What an overlay stands on.
#[derive(Debug)]
pub(crate) struct Backing<'a> {
    /// The file; absolute, so that it is nothing else to QEMU.
    pub(crate) path: &'a Path,
    /// Its format, as QEMU calls it: never guessed from the content, which a guest may have written.
    pub(crate) format: &'a str,
}

/// Makes a qcow2 file of the lab: on another image, which is never changed, or blank.
pub(crate) async fn create(
    ground: &Ground,
    file: &str,
    backing: Option<Backing<'_>>,
    size: u64,
) -> Result<()> {
    let mut command = ground.qemu_img().args(["create", "-q", "-f", "qcow2"]);
    if let Some(backing) = backing {
        command = command.args(["-F", backing.format, "-b"]).args([backing.path]);
    }
    let finished = command.args([file.to_owned(), size.to_string()]).run(None).await?;
    finished.success("create a disk").map(drop)
}

/// The size of a new disk: as large as wanted, and never smaller than what it stands on.
pub(crate) fn size_over(image: u64, wanted: Option<u64>) -> Result<u64> {
    match wanted {
        Some(wanted) if wanted < image => Err(Error::new(
            ErrorKind::InvalidInput,
            format!(
                "expected a disk at least as large as its image, {}, but found {}",
                human_bytes(image),
                human_bytes(wanted)
            ),
        )
        .with_help(format!("set the disk's size to {} or more", whole(image)))),
        wanted => Ok(wanted.unwrap_or(image).next_multiple_of(SECTOR)),
    }
}

/// The smallest size that is written with a whole number and holds this.
fn whole(size: u64) -> String {
    let unit = if size >= 10 << 30 { 1 << 30 } else { 1 << 20 };
    human_bytes(size.next_multiple_of(unit))
}

/// What a guest sees of an image, in bytes, as QEMU reads it.
pub(crate) async fn virtual_size(ground: &Ground, image: &Path, format: &str) -> Result<u64> {
    let command = ground.qemu_img().args(["info", "--output=json", "-f", format]).args([image]);
    let finished = command.run(None).await?;
    if !finished.status.success() {
        let error = finished.failure("read the image");
        return Err(Error::new(
            ErrorKind::InvalidImage,
            format!("expected a {format} image, but QEMU cannot read it"),
        )
        .with_source(error));
    }
    let info: serde_json::Value = serde_json::from_slice(&finished.stdout).unwrap_or_default();
    let extents = info["format-specific"]["data"]["extents"].as_array();
    let foreign = extents
        .into_iter()
        .flatten()
        .any(|extent| extent["filename"].as_str().is_none_or(|name| Path::new(name) != image));
    if foreign || info.get("backing-filename").is_some() {
        return Err(Error::new(
            ErrorKind::InvalidImage,
            "expected an image that is complete in itself, but found one that refers to other files",
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

/// A captured disk.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Captured {
    /// What a guest sees of it, in bytes.
    pub virtual_size: u64,
    /// The size of its file, in bytes.
    pub size: u64,
    /// sha256 of its file.
    pub sha256: Digest,
}

/// Makes a self-contained, compressed copy of a volume of the lab as the file `target`, and verifies it: its structure,
/// and that it reads as the volume does.
pub(crate) async fn capture(
    ground: &Ground,
    volume: &str,
    target: &str,
    disk: &str,
    progress: &Progress,
) -> Result<Captured> {
    let virtual_size = ground.volume_size(volume)?;
    let part = Part(ground.path(&format!("{target}.part")));
    let part_name = format!("{target}.part");
    convert(ground, volume, &part_name, virtual_size, &format!("convert {disk}"), progress).await?;
    let (sha256, (), ()) = tokio::try_join!(
        seal(part.0.clone()),
        check(ground, &part_name),
        compare(ground, volume, &part_name)
    )?;
    let path = ground.path(target);
    let failed = |error| Error::io(format_args!("write {}", path.display()), error);
    let size = fs::metadata(&part.0).map_err(failed)?.len();
    fs::rename(&part.0, &path).map_err(failed)?;
    Ok(Captured { virtual_size, size, sha256 })
}

/// A file that is not whole yet: gone when this is dropped.
struct Part(PathBuf);

impl Drop for Part {
    fn drop(&mut self) {
        // Not there once it was renamed.
        let _ = fs::remove_file(&self.0);
    }
}

async fn convert(
    ground: &Ground,
    volume: &str,
    target: &str,
    total: u64,
    task: &str,
    progress: &Progress,
) -> Result<()> {
    let jobs = std::thread::available_parallelism().map_or(2, usize::from).clamp(2, 16);
    let command = ground
        .qemu_img()
        .args(["convert", "-p", "-f", "qcow2", "-O", "qcow2", "-c", "-W", "-m"])
        .args([jobs.to_string()])
        .args(["-o", "compression_type=zstd", volume, target]);
    let mut reader = PercentReader::default();
    let finished = command
        .run_watched(None, |piece| {
            if let Some(percent) = reader.read(piece) {
                let done = (total as f64 * percent / 100.0) as u64;
                progress.bytes(task, done.min(total), Some(total));
            }
        })
        .await?;
    finished.success("capture the disk").map(drop)
}

/// Reads `qemu-img -p`: `    (12.34/100%)`, each followed by a carriage return.
#[derive(Default)]
struct PercentReader(Vec<u8>);

impl PercentReader {
    /// The last percentage in what was heard so far.
    fn read(&mut self, piece: &[u8]) -> Option<f64> {
        self.0.extend_from_slice(piece);
        let end = self.0.iter().rposition(|byte| matches!(byte, b'\r' | b'\n'))?;
        let rest = self.0.split_off(end + 1);
        let lines = std::mem::replace(&mut self.0, rest);
        let text = String::from_utf8_lossy(&lines);
        text.rsplit(['\r', '\n'])
            .find_map(|line| line.trim().strip_prefix('(')?.split('/').next()?.parse().ok())
    }
}

/// Makes a file durable, and computes its digest.
async fn seal(path: PathBuf) -> Result<Digest> {
    let work = move || {
        let failed = |error| Error::io(format_args!("read {}", path.display()), error);
        let mut file = fs::File::open(&path).map_err(failed)?;
        let mut hasher = Hasher::default();
        let mut buffer = vec![0; 1 << 20];
        loop {
            let count = file.read(&mut buffer).map_err(failed)?;
            if count == 0 {
                break;
            }
            hasher.update(&buffer[..count]);
        }
        file.sync_all().map_err(failed)?;
        Ok(hasher.finish())
    };
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| Error::new(ErrorKind::Internal, "cannot read a captured disk").with_source(error))?
}

async fn check(ground: &Ground, file: &str) -> Result<()> {
    let finished = ground.qemu_img().args(["check", "-q", "-f", "qcow2", file]).run(None).await?;
    if finished.status.success() {
        return Ok(());
    }
    Err(damaged("its structure is not sound").with_source(finished.failure("check the captured disk")))
}

/// Compares a copy with its volume, in one go: qemu-img (7.2) compares a part of a disk (its `raw` driver with an offset) by
/// the block status of the overlay alone, without what is below it, and finds differences where there are none.
async fn compare(ground: &Ground, volume: &str, file: &str) -> Result<()> {
    let finished = ground
        .qemu_img()
        .args(["compare", "-q", "-f", "qcow2", "-F", "qcow2", volume, file])
        .run(None)
        .await?;
    match finished.status.code() {
        Some(0) => Ok(()),
        // qemu-img(1), compare: 1 is "images differ", above are failures of its own.
        Some(1) => Err(damaged("it does not read as the machine's disk does")),
        Some(_) => Err(finished.failure("compare the captured disk with the machine's")),
        None => Err(Error::new(
            ErrorKind::Io,
            format!(
                "cannot compare the captured disk with the machine's: qemu-img {}",
                describe(finished.status)
            ),
        )),
    }
}

fn damaged(why: &str) -> Error {
    Error::new(ErrorKind::InvalidImage, format!("expected a captured disk as the machine left it, but {why}"))
        .with_help("look for faulty memory or disks of the host, and build again")
        .with_retryable(true)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_disk_is_never_smaller_than_its_image() {
        assert_eq!(size_over(1000, None).unwrap(), 1024);
        assert_eq!(size_over(1024, Some(2048)).unwrap(), 2048);
        assert_eq!(
            size_over(3 << 30, Some(1 << 30)).unwrap_err().report(),
            "expected a disk at least as large as its image, 3Gi, but found 1Gi\n  help: set the disk's size to 3Gi or more"
        );
    }

    #[test]
    fn percentages_are_read_across_pieces() {
        let mut reader = PercentReader::default();
        assert_eq!(reader.read(b"    (0.00/100%)\r    (12."), Some(0.0));
        assert_eq!(reader.read(b"50/100%)\r"), Some(12.5));
        assert_eq!(reader.read(b"    (99.0/1"), None);
        assert_eq!(reader.read(b"00%)\r    (100.00/100%)\n"), Some(100.0));
    }
}
