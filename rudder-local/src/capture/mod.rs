//! Captured disks: self-contained, compressed copies of what a VM wrote, verified before they can be used.
//!
//! qemu-nbd reads the disk, threads of this process compress it, and qemu-nbd reads the copy back: a program that did
//! not write the copy confirms that it holds, byte for byte, what the VM left. `qemu-img convert` does much of the same work in
//! one thread, and `qemu-img compare` repeats all of it and takes as long again (figures: `docs/performance.md`).

mod nbd;
mod qcow2;
#[cfg(test)]
mod tests;

use crate::{
    image::{self, Extent},
    lab_storage::{LabStorage, blocking},
};
use futures::{StreamExt, TryStreamExt, stream};
use nbd::{Client, Export};
use qcow2::{CLUSTER, Cluster, Writer};
use rudder_core::{
    Error, ErrorKind, Result,
    backend::Progress,
    digest::{Digest, Digester},
};
use std::{
    fs::{self, File},
    io::{self, BufWriter, Read},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};
use tokio::sync::mpsc;
use twox_hash::XxHash3_128;
use zstd::bulk::Compressor;

/// Number of bytes per read: large enough to make the cost of a request negligible, small enough for a processor's cache.
const CHUNK: usize = 16 * CLUSTER;

/// A cluster of zeroes, which need not be written.
static ZEROES: [u8; CLUSTER] = [0; CLUSTER];

/// zstd's fastest regular level: its files are as small as those of zlib, which QEMU compresses with by default. Level 3 makes
/// files a fortieth smaller, and takes half as long again (figures: `docs/performance.md`).
const LEVEL: i32 = 1;

/// A captured disk.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Captured {
    /// Size of the disk that a guest sees, in bytes.
    pub virtual_size: u64,
    /// The size of its file, in bytes.
    pub size: u64,
    /// sha256 of its file.
    pub sha256: Digest,
}

/// Captures a volume of the lab as a self-contained, compressed copy in the file `target`, and verifies the structure of the
/// copy and that it reads as the volume does.
pub async fn capture(
    storage: &LabStorage,
    volume: &str,
    target: &str,
    disk: &str,
    progress: &Progress,
) -> Result<Captured> {
    let virtual_size = storage.volume_size(volume)?;
    let part_name = format!("{target}.part");
    let part = Part(storage.path(&part_name));
    let source = Reader::open(storage, volume, virtual_size).await?;
    let report = |done, total| progress.bytes(&format!("convert {disk}"), done, Some(total));
    // An empty disk has no other progress to report.
    report(0, (source.occupied.len() * CHUNK) as u64);
    let chunks = pack(&source, &part, report).await?;
    drop(source);
    let (sha256, (), ()) = tokio::try_join!(
        finalise(part.0.clone()),
        check(storage, &part_name),
        verify(storage, &part_name, virtual_size, &chunks, |done, total| {
            progress.bytes(&format!("verify {disk}"), done, Some(total));
        })
    )?;
    let path = storage.path(target);
    let failed = |error| Error::io(format_args!("write {}", path.display()), error);
    let size = fs::metadata(&part.0).map_err(failed)?.len();
    fs::rename(&part.0, &path).map_err(failed)?;
    Ok(Captured { virtual_size, size, sha256 })
}

/// The path of an incomplete file, which is removed on drop.
struct Part(PathBuf);

impl Drop for Part {
    fn drop(&mut self) {
        // Does not exist any more if it was renamed.
        let _ = fs::remove_file(&self.0);
    }
}

/// A part of a disk that may contain data, and the hash of its content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Chunk {
    /// Its position, in chunks.
    number: u64,
    /// 128-bit XXH3 of its bytes: designed to detect errors of memory, disks and programs, and many times as fast as a
    /// cryptographic digest. Deliberate changes are detected by the digest of the file, which is computed later.
    hash: u128,
}

/// Reads an image of the lab in chunks, from several threads.
struct Reader {
    export: Export,
    /// The size of the disk, in bytes.
    size: u64,
    /// The chunks that do not read as zeroes according to QEMU, in order.
    occupied: Vec<u64>,
    /// Connections with their buffers.
    connections: Pool<(Client, Vec<u8>)>,
}

/// Objects that threads reuse in turn: allocating new ones each time would cost more than the work done with them.
struct Pool<T>(Mutex<Vec<T>>);

impl<T> Default for Pool<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T> Pool<T> {
    /// Takes an unused object, or creates one.
    fn take<E>(&self, new: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
        let idle = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        idle.map_or_else(new, Ok)
    }

    fn give_back(&self, one: T) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(one);
    }
}

impl Reader {
    async fn open(storage: &LabStorage, image: &str, size: u64) -> Result<Arc<Self>> {
        let (export, occupied) =
            tokio::try_join!(Export::open(storage, image, threads()), occupied(storage, image))?;
        Ok(Arc::new(Self { export, size, occupied, connections: Pool::default() }))
    }

    /// Reads a chunk, and passes it to a function; what is beyond the end of the disk is zero. Blocks.
    fn read<T>(&self, number: u64, then: impl FnOnce(&[u8]) -> T) -> Result<T> {
        let new = || self.export.connect().map(|client| (client, vec![0; CHUNK]));
        let (mut client, mut bytes) = self.connections.take(new)?;
        let start = number * CHUNK as u64;
        let length = usize::try_from(self.size.saturating_sub(start)).map_or(CHUNK, |rest| rest.min(CHUNK));
        let (inside, beyond) = bytes.split_at_mut(length);
        client.read(start, inside).map_err(|error| self.export.unreadable(error))?;
        beyond.fill(0);
        let result = then(&bytes);
        self.connections.give_back((client, bytes));
        Ok(result)
    }
}

/// Returns the number of threads: one more than there are cores, at most 17. While some wait for qemu-nbd, the others compress.
fn threads() -> usize {
    std::thread::available_parallelism().map_or(2, usize::from).min(16) + 1
}

/// Returns the chunks of an image that do not read as zeroes, in order.
async fn occupied(storage: &LabStorage, image: &str) -> Result<Vec<u64>> {
    let mut chunks = Vec::new();
    let take = |Extent { start, length, zero, .. }| {
        if !zero && length > 0 {
            let first = chunks.last().map_or(0, |last| last + 1).max(start / CHUNK as u64);
            chunks.extend(first..=(start + length - 1) / CHUNK as u64);
        }
    };
    image::map(storage, Path::new(image), "qcow2", take).await?;
    Ok(chunks)
}

/// Writes the disk as a compressed qcow2 file. Returns its chunks.
async fn pack(source: &Arc<Reader>, part: &Part, report: impl Fn(u64, u64)) -> Result<Vec<Chunk>> {
    let failed = |error| Error::io(format_args!("write {}", part.0.display()), error);
    let file = File::create_new(&part.0).map_err(failed)?;
    let mut writer = Writer::new(BufWriter::with_capacity(CHUNK, file), source.size).map_err(failed)?;
    let (sender, mut receiver) = mpsc::channel::<(u64, Vec<(u64, Cluster)>)>(threads());
    let path = part.0.clone();
    let written = blocking(move || {
        let failed = |error| Error::io(format_args!("write {}", path.display()), error);
        while let Some((number, clusters)) = receiver.blocking_recv() {
            for (index, cluster) in clusters {
                writer.push(number * (CHUNK / CLUSTER) as u64 + index, &cluster).map_err(failed)?;
            }
        }
        writer.finish().map(drop).map_err(failed)
    });
    let compressors = Arc::new(Pool::default());
    // In order, so that the same disk always gives the same file.
    let mut packed = stream::iter(0..source.occupied.len())
        .map(|index| {
            let (source, compressors) = (Arc::clone(source), Arc::clone(&compressors));
            blocking(move || {
                let number = source.occupied[index];
                let failed = |error| Error::io("compress the disk", error);
                let mut compressor = compressors.take(|| Compressor::new(LEVEL)).map_err(failed)?;
                let (hash, clusters) = source
                    .read(number, |bytes| (XxHash3_128::oneshot(bytes), compress(&mut compressor, bytes)))?;
                compressors.give_back(compressor);
                Ok((Chunk { number, hash }, clusters.map_err(failed)?))
            })
        })
        .buffered(threads());
    let packed = async {
        let sender = sender;
        let mut chunks = Vec::with_capacity(source.occupied.len());
        let total = (source.occupied.len() * CHUNK) as u64;
        while let Some((chunk, clusters)) = packed.try_next().await? {
            if sender.send((chunk.number, clusters)).await.is_err() {
                // The writer reports why it accepts no more.
                break;
            }
            chunks.push(chunk);
            report((chunks.len() * CHUNK) as u64, total);
        }
        Ok(chunks)
    };
    let (chunks, ()) = tokio::try_join!(packed, written)?;
    Ok(chunks)
}

/// Compresses the clusters of a chunk that are not all zeroes, and returns them with their indices in it.
fn compress(compressor: &mut Compressor<'_>, bytes: &[u8]) -> io::Result<Vec<(u64, Cluster)>> {
    let mut frame = vec![0; zstd::zstd_safe::compress_bound(CLUSTER)];
    let mut clusters = Vec::new();
    for (index, cluster) in (0..).zip(bytes.chunks_exact(CLUSTER)) {
        if cluster == ZEROES {
            continue;
        }
        let length = compressor.compress_to_buffer(cluster, &mut frame[..])?;
        clusters.push((
            index,
            match length < CLUSTER {
                true => Cluster::Compressed(frame[..length].to_vec()),
                false => Cluster::Plain(cluster.to_vec()),
            },
        ));
    }
    Ok(clusters)
}

/// Reads a copy back, and checks that it contains what was on the disk and nothing else.
async fn verify(
    storage: &LabStorage,
    file: &str,
    size: u64,
    chunks: &[Chunk],
    report: impl Fn(u64, u64),
) -> Result<()> {
    let differs = || damaged("its content differs from that of the disk");
    let copy = Reader::open(storage, file, size).await?;
    let known = |number: &u64| chunks.binary_search_by_key(number, |chunk| chunk.number).is_ok();
    if !copy.occupied.iter().all(known) {
        return Err(differs());
    }
    let mut read = stream::iter(chunks.to_vec())
        .map(|chunk| {
            let copy = Arc::clone(&copy);
            blocking(move || Ok(copy.read(chunk.number, XxHash3_128::oneshot)? == chunk.hash))
        })
        .buffer_unordered(threads());
    let mut done = 0;
    while let Some(same) = read.try_next().await? {
        if !same {
            return Err(differs());
        }
        done += CHUNK as u64;
        report(done, (chunks.len() * CHUNK) as u64);
    }
    Ok(())
}

/// Makes a file durable, and returns its digest.
async fn finalise(path: PathBuf) -> Result<Digest> {
    blocking(move || {
        let failed = |error| Error::io(format_args!("read {}", path.display()), error);
        let mut file = File::open(&path).map_err(failed)?;
        let mut hasher = Digester::default();
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
    })
    .await
}

/// Checks the structure of a captured disk.
async fn check(storage: &LabStorage, file: &str) -> Result<()> {
    let checked = image::check(storage, file).await;
    checked.map_err(|error| damaged("its structure is damaged").with_source(error))
}

/// Returns the error for a copy that differs from the original.
fn damaged(why: &str) -> Error {
    Error::new(ErrorKind::InvalidImage, format!("expected an intact copy of the machine's disk, but {why}"))
        .with_help("check the host for faulty memory or disks, and build again")
        .with_retryable(true)
}
