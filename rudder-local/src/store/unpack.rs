//! Streaming decompression of gz, xz, zst and bz2 into sparse files.

mod output_limit;
mod source;
mod sparse;

pub(in crate::store) use self::sparse::SparseWriter;

use self::{output_limit::OutputLimit, source::Source};
use super::{Store, durable, durable::io_error};
use async_compression::{
    tokio::bufread::{BzDecoder, GzipDecoder, XzDecoder, ZstdDecoder},
    zstd::DParameter,
};
use rudder_core::{
    Error, ErrorKind, Result,
    backend::Progress,
    digest::{Digest, Digester},
};
use std::{
    fmt,
    fs::File,
    io::{self, Read},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};
use tokio::io::{AsyncRead, AsyncReadExt};

/// Number of bytes that are read, hashed and written at a time.
pub(super) const CHUNK: usize = 256 * 1024;
/// Memory limit for unpacking xz, in bytes: `xz -9` needs 65 MiB; the file says how much, and may ask for gigabytes.
const XZ_MEMORY: u64 = 128 << 20;
/// The largest window of a zstd file, as a power of two in bytes: what `zstd` itself accepts by default.
const ZSTD_WINDOW_LOG: u32 = 27;

/// The compression format of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Packing {
    Gzip,
    Xz,
    Zstd,
    Bzip2,
}

impl Packing {
    /// Number of leading bytes needed to recognise the format.
    pub(super) const MAGIC_LENGTH: usize = 6;

    /// Recognises the format by the first bytes (RFC 1952; the .xz file format 1.1; RFC 8878; bzip2's documentation).
    pub(super) fn recognise(head: &[u8]) -> Option<Self> {
        match head {
            [0x1f, 0x8b, 8, ..] => Some(Self::Gzip),
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Some(Self::Xz),
            // A frame, or a skippable frame before it.
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Some(Self::Zstd),
            [b'B', b'Z', b'h', b'1'..=b'9', 0x31 | 0x17, ..] => Some(Self::Bzip2),
            _ => None,
        }
    }

    pub(super) fn of_file(path: &Path) -> Result<Option<Self>> {
        let mut head = Vec::with_capacity(Self::MAGIC_LENGTH);
        File::open(path)
            .and_then(|file| file.take(Self::MAGIC_LENGTH as u64).read_to_end(&mut head))
            .map_err(|error| io_error("read", path, error))?;
        Ok(Self::recognise(&head))
    }
}

impl fmt::Display for Packing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Gzip => "gzip",
            Self::Xz => "xz",
            Self::Zstd => "zstd",
            Self::Bzip2 => "bzip2",
        })
    }
}

/// Signals blocking work that its result is no longer needed.
#[derive(Debug, Clone, Default)]
pub(super) struct Stop(Arc<AtomicBool>);

impl Stop {
    /// Stops the work when the guard is dropped.
    pub(super) fn on_drop(&self) -> StopGuard {
        StopGuard(self.clone())
    }

    /// Returns an error once the work should stop.
    pub(super) fn check(&self) -> Result<()> {
        if self.0.load(Ordering::Relaxed) {
            return Err(Error::new(ErrorKind::Cancelled, "this file is no longer needed"));
        }
        Ok(())
    }
}

/// See [`Stop::on_drop`].
#[derive(Debug)]
pub(super) struct StopGuard(Stop);

impl Drop for StopGuard {
    fn drop(&mut self) {
        self.0.0.store(true, Ordering::Relaxed);
    }
}

/// A temporary file that is being written; removed when dropped before it was moved into place.
#[derive(Debug)]
pub(super) struct Unpacked {
    file: tempfile::NamedTempFile,
    packing: Packing,
    digest: Digest,
    size: u64,
}

impl Unpacked {
    pub(super) fn path(&self) -> &Path {
        self.file.path()
    }
    pub(super) fn packing(&self) -> Packing {
        self.packing
    }
    pub(super) fn digest(&self) -> Digest {
        self.digest
    }
    pub(super) fn size(&self) -> u64 {
        self.size
    }
}

/// Unpacks a stream into a temporary file of the store. Blocks. `disk`: the size of the disk to be made from the image, if
/// known; nothing is written that exceeds it.
pub(super) fn unpack(
    store: &Store,
    packing: Packing,
    source: impl Read + Unpin,
    disk: Option<u64>,
    progress: &Progress,
    stop: &Stop,
) -> Result<Unpacked> {
    let temp = store.temp_file()?;
    let mut source = Source::new(source);
    let mut target = Target {
        packing,
        limit: OutputLimit::new(store.options().unpacked_limit, disk),
        path: temp.path(),
        out: SparseWriter::new(temp.as_file()),
        hasher: Digester::default(),
        chunk: vec![0; CHUNK],
    };
    let broken = |error| broken(packing, error);
    // The decoders are asynchronous, but their source is not: polling them needs no runtime, only this thread.
    futures::executor::block_on(async {
        loop {
            match packing {
                Packing::Gzip => target.fill(GzipDecoder::new(&mut source), stop).await?,
                Packing::Xz => target.fill(XzDecoder::with_mem_limit(&mut source, XZ_MEMORY), stop).await?,
                Packing::Zstd => {
                    let limit = [DParameter::window_log_max(ZSTD_WINDOW_LOG)];
                    target.fill(ZstdDecoder::with_params(&mut source, &limit), stop).await?;
                }
                Packing::Bzip2 => target.fill(BzDecoder::new(&mut source), stop).await?,
            }
            if packing == Packing::Xz {
                // The format allows zeros between and after its streams (1.1, 2.2).
                source.skip_zeros().map_err(broken)?;
            }
            // Another member follows, as in `cat a.gz b.gz`.
            if Packing::recognise(source.peek(Packing::MAGIC_LENGTH).map_err(broken)?) != Some(packing) {
                break Ok(());
            }
        }
    })?;
    match (source.count_rest(stop)?, packing) {
        (0, _) => {}
        // Ignored, as gunzip and bunzip2 do; router images carry their metadata there.
        (rest, Packing::Gzip | Packing::Bzip2) => {
            progress.notice(format!("ignored {} after the end of the {packing} data", durable::human(rest)));
        }
        (rest, Packing::Xz | Packing::Zstd) => {
            let rest = durable::human(rest);
            let found = format!("expected only {packing} data, but found {rest} of other data after its end");
            return Err(Error::new(ErrorKind::InvalidImage, found)
                .with_help("check that the file is unmodified, or pack it again"));
        }
    }
    let Target { out, hasher, .. } = target;
    let size = out.finish().map_err(|error| io_error("write", temp.path(), error))?;
    Ok(Unpacked { file: temp, packing, digest: hasher.finish(), size })
}

/// The destination of unpacked bytes.
struct Target<'a> {
    packing: Packing,
    limit: OutputLimit,
    path: &'a Path,
    out: SparseWriter<'a>,
    hasher: Digester,
    chunk: Vec<u8>,
}

impl Target<'_> {
    /// Writes all output of a decoder.
    async fn fill(&mut self, mut decoder: impl AsyncRead + Unpin, stop: &Stop) -> Result<()> {
        loop {
            stop.check()?;
            let count = decoder.read(&mut self.chunk).await.map_err(|error| broken(self.packing, error))?;
            if count == 0 {
                return Ok(());
            }
            let bytes = &self.chunk[..count];
            self.limit.count(bytes, self.packing)?;
            self.hasher.update(bytes);
            self.out.write(bytes).map_err(|error| io_error("write", self.path, error))?;
        }
    }
}

fn broken(packing: Packing, error: io::Error) -> Error {
    // Errors of the source describe themselves; everything else comes from the decoder.
    let error = match error.downcast::<Error>() {
        Ok(own) => return own,
        Err(error) => error,
    };
    // Neither library passes on a typed error for this.
    let message = error.to_string();
    match packing {
        Packing::Xz if message.contains("memory limit") => Error::new(
            ErrorKind::InvalidImage,
            format!(
                "expected xz data that can be unpacked with {} of memory, but found data that needs more",
                durable::human(XZ_MEMORY)
            ),
        )
        .with_help("pack it again with `xz -9` or a lower level, whose dictionary is at most 64 MiB"),
        Packing::Zstd if message.contains("too much memory") => Error::new(
            ErrorKind::InvalidImage,
            format!(
                "expected zstd data with a window of at most {}, but found a larger one",
                durable::human(1 << ZSTD_WINDOW_LOG)
            ),
        )
        .with_help(format!(
            "pack it again with `zstd --long={ZSTD_WINDOW_LOG}`, or without --long and --ultra"
        )),
        _ => Error::new(
            ErrorKind::InvalidImage,
            format!("expected a complete {packing} file, but found a damaged one"),
        )
        .with_source(error),
    }
}

/// Returns the error for a failed read of the packed file itself.
pub(super) fn read_error(error: io::Error) -> Error {
    match error.downcast::<Error>() {
        Ok(own) => own,
        Err(error) => Error::io("read the packed file", error),
    }
}
