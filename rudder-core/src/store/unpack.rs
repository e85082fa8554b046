//! Unpacking of gz, xz, zst and bz2 in a stream, with holes where there is nothing but zeros.

use super::{Store, durable, durable::io_error};
use crate::{
    Error, ErrorKind, Result,
    digest::{Digest, Hasher},
};
use async_compression::tokio::bufread::{BzDecoder, GzipDecoder, XzDecoder, ZstdDecoder};
use std::{
    fmt,
    fs::File,
    io::{self, Read, Seek, SeekFrom, Write},
    path::Path,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
};
use tokio::io::{AsyncRead, AsyncReadExt, BufReader, ReadBuf};

/// How much is read, hashed and written at a time.
pub(super) const CHUNK: usize = 256 * 1024;
/// What unpacking xz may take: `xz -9` needs 65 MiB; the file says how much, and may ask for gigabytes.
const XZ_MEMORY: u64 = 128 << 20;
/// Runs of zeros of this many bytes, at such an offset, are left out of the file.
const HOLE: usize = 4096;

/// How an image is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Packing {
    Gzip,
    Xz,
    Zstd,
    Bzip2,
}

impl Packing {
    /// How many bytes tell.
    pub(super) const MAGIC_LENGTH: usize = 6;

    /// By the first bytes (RFC 1952; the .xz file format 1.1; RFC 8878; bzip2's documentation).
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

/// Tells blocking work that nobody waits for it any more.
#[derive(Debug, Clone, Default)]
pub(super) struct Stop(Arc<AtomicBool>);

impl Stop {
    /// Stops the work when the guard is dropped.
    pub(super) fn on_drop(&self) -> StopGuard {
        StopGuard(self.clone())
    }

    /// An error once it is time to stop.
    pub(super) fn check(&self) -> Result<()> {
        if self.0.load(Ordering::Relaxed) {
            return Err(Error::new(ErrorKind::Cancelled, "nobody waits for this file any more"));
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

/// A file that is being written beside its place; removed when it is dropped before it was put there.
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

/// Unpacks a stream into a temporary file of the store. Blocks.
pub(super) fn unpack(
    store: &Store,
    packing: Packing,
    source: impl Read + Unpin,
    stop: &Stop,
) -> Result<Unpacked> {
    let source = BufReader::with_capacity(CHUNK, Blocking(source));
    // The decoders are asynchronous, their source is not: polling them needs no runtime, only this thread.
    futures::executor::block_on(async {
        match packing {
            Packing::Gzip => {
                let mut decoder = GzipDecoder::new(source);
                decoder.multiple_members(true);
                drain(store, packing, decoder, stop).await
            }
            Packing::Xz => {
                let mut decoder = XzDecoder::with_mem_limit(source, XZ_MEMORY);
                decoder.multiple_members(true);
                drain(store, packing, decoder, stop).await
            }
            Packing::Zstd => {
                let mut decoder = ZstdDecoder::new(source);
                decoder.multiple_members(true);
                drain(store, packing, decoder, stop).await
            }
            Packing::Bzip2 => {
                let mut decoder = BzDecoder::new(source);
                decoder.multiple_members(true);
                drain(store, packing, decoder, stop).await
            }
        }
    })
}

async fn drain(
    store: &Store,
    packing: Packing,
    mut decoder: impl AsyncRead + Unpin,
    stop: &Stop,
) -> Result<Unpacked> {
    let limit = store.options().unpacked_limit;
    let temp = store.temp_file()?;
    let mut out = SparseWriter::new(temp.as_file());
    let mut hasher = Hasher::default();
    let mut chunk = vec![0; CHUNK];
    loop {
        stop.check()?;
        let count = decoder.read(&mut chunk).await.map_err(|error| broken(packing, error))?;
        if count == 0 {
            break;
        }
        hasher.update(&chunk[..count]);
        out.write(&chunk[..count]).map_err(|error| io_error("write", temp.path(), error))?;
        if out.len() > limit {
            return Err(Error::new(
                ErrorKind::InvalidImage,
                format!("expected at most {} in the {packing} file, but found more", durable::human(limit)),
            )
            .with_help("raise StoreOptions::unpacked_limit if the image is really this large"));
        }
    }
    let size = out.finish().map_err(|error| io_error("write", temp.path(), error))?;
    Ok(Unpacked { file: temp, packing, digest: hasher.finish(), size })
}

fn broken(packing: Packing, error: io::Error) -> Error {
    // The source says what is wrong with itself; everything else comes from the decoder.
    match error.downcast::<Error>() {
        Ok(own) => own,
        Err(error) => Error::new(
            ErrorKind::InvalidImage,
            format!("expected a whole {packing} file, but found one that is broken"),
        )
        .with_source(error),
    }
}

/// What a failed read of the packed file itself means.
pub(super) fn read_error(error: io::Error) -> Error {
    match error.downcast::<Error>() {
        Ok(own) => own,
        Err(error) => Error::io("read the packed file", error),
    }
}

/// A blocking reader as an asynchronous one, for use on a thread that may block.
struct Blocking<R>(R);

impl<R: Read + Unpin> AsyncRead for Blocking<R> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let count = self.0.read(buf.initialize_unfilled())?;
        buf.advance(count);
        Poll::Ready(Ok(()))
    }
}

/// Writes a file from its begin, and leaves holes where there are only zeros.
#[derive(Debug)]
pub(super) struct SparseWriter<'a> {
    file: &'a File,
    len: u64,
}

impl<'a> SparseWriter<'a> {
    /// Writes to an empty file.
    pub(super) fn new(file: &'a File) -> Self {
        Self::resume(file, 0)
    }

    /// Goes on behind the first `len` bytes.
    pub(super) fn resume(file: &'a File, len: u64) -> Self {
        Self { file, len }
    }

    /// Makes the file as long as what was written so far.
    pub(super) fn set_len(&self) -> io::Result<u64> {
        self.file.set_len(self.len)?;
        Ok(self.len)
    }

    /// How much was written, holes included.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    pub(super) fn write(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            // Up to the next multiple of the hole size.
            let to_edge = HOLE - usize::try_from(self.len % HOLE as u64).unwrap_or(0);
            let (piece, _) = bytes.split_at(to_edge.min(bytes.len()));
            if is_zero(piece) {
                self.len += piece.len() as u64;
                bytes = &bytes[piece.len()..];
                continue;
            }
            // All blocks up to the next that is nothing but zeros, in one call.
            let mut end = piece.len();
            while end < bytes.len() {
                let next = &bytes[end..bytes.len().min(end + HOLE)];
                if is_zero(next) {
                    break;
                }
                end += next.len();
            }
            let mut file = self.file;
            file.seek(SeekFrom::Start(self.len))?;
            file.write_all(&bytes[..end])?;
            self.len += end as u64;
            bytes = &bytes[end..];
        }
        Ok(())
    }

    /// Makes the file as long as what was written, and says how long that is.
    pub(super) fn finish(self) -> io::Result<u64> {
        self.set_len()
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    let chunks = bytes.chunks_exact(16);
    chunks.remainder().iter().all(|byte| *byte == 0) && chunks.into_iter().all(|chunk| chunk == [0; 16])
}
