//! Captured disks: a self-contained, compressed copy of what a VM wrote, verified before anybody may use it.
//!
//! qemu-nbd reads the disk, threads of this process compress it, and qemu-nbd reads the copy again: a program that did
//! not write it finds in it, byte for byte, what the VM left. `qemu-img convert` does much of the same work in one thread, and
//! `qemu-img compare` all of it, and takes as long again (figures: `docs/performance.md`).

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
    digest::{Digest, Hasher},
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

/// What is read at once, in bytes: large enough that asking for it costs little beside it, small enough for a processor's cache.
const CHUNK: usize = 16 * CLUSTER;

/// A cluster that need not be written.
static ZEROES: [u8; CLUSTER] = [0; CLUSTER];

/// zstd's fastest ordinary level: its files are as small as zlib's, which QEMU compresses with by default. Those of level 3 are a
/// fortieth smaller, and take half as long again (figures: `docs/performance.md`).
const LEVEL: i32 = 1;

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
    let told = |done, total| progress.bytes(&format!("convert {disk}"), done, Some(total));
    // Of an empty disk there is nothing else to tell.
    told(0, (source.occupied.len() * CHUNK) as u64);
    let chunks = pack(&source, &part, told).await?;
    drop(source);
    let (sha256, (), ()) = tokio::try_join!(
        seal(part.0.clone()),
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

/// A file that is not whole yet: gone when this is dropped.
struct Part(PathBuf);

impl Drop for Part {
    fn drop(&mut self) {
        // Not there once it was renamed.
        let _ = fs::remove_file(&self.0);
    }
}

/// A part of a disk that may hold something, and what it holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Chunk {
    /// Where it begins, in chunks.
    number: u64,
    /// XXH3 of its bytes, of 128 bits: made to find what memory, disks and programs do wrong, and many times as fast as a digest
    /// that also withstands people, whom a digest of the file keeps out later.
    hash: u128,
}

/// An image of the lab, read a chunk at a time, by several threads.
struct Reader {
    export: Export,
    /// The size of the disk, in bytes.
    size: u64,
    /// The chunks that do not read as zeroes, as QEMU says, from the first to the last.
    occupied: Vec<u64>,
    /// Connections, each with its buffer.
    connections: Pool<(Client, Vec<u8>)>,
}

/// What is used again and again by threads that take turns: new memory for each turn costs more than what is done in it.
struct Pool<T>(Mutex<Vec<T>>);

impl<T> Default for Pool<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T> Pool<T> {
    /// One that nobody uses now, else a new one.
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

    /// Reads a chunk, and gives it to this; what is beyond the end of the disk is zero. Blocks.
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

/// One more than there are cores: while some wait for qemu-nbd, the others compress.
fn threads() -> usize {
    std::thread::available_parallelism().map_or(2, usize::from).min(16) + 1
}

/// The chunks of an image that do not read as zeroes, from the first to the last.
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

/// Writes the disk as a compressed qcow2 file. Gives what is on it.
async fn pack(source: &Arc<Reader>, part: &Part, meter: impl Fn(u64, u64)) -> Result<Vec<Chunk>> {
    let failed = |error| Error::io(format_args!("write {}", part.0.display()), error);
    let file = File::create_new(&part.0).map_err(failed)?;
    let mut writer = Writer::new(BufWriter::with_capacity(CHUNK, file), source.size).map_err(failed)?;
    let (give, mut take) = mpsc::channel::<(u64, Vec<(u64, Cluster)>)>(threads());
    let path = part.0.clone();
    let written = blocking(move || {
        let failed = |error| Error::io(format_args!("write {}", path.display()), error);
        while let Some((number, clusters)) = take.blocking_recv() {
            for (index, cluster) in clusters {
                writer.push(number * (CHUNK / CLUSTER) as u64 + index, &cluster).map_err(failed)?;
            }
        }
        writer.finish().map(drop).map_err(failed)
    });
    let compressors = Arc::new(Pool::default());
    // In order, so that the same disk always gives the same file.
    let mut packed = stream::iter(0..source.occupied.len())
        .map(|place| {
            let (source, compressors) = (Arc::clone(source), Arc::clone(&compressors));
            blocking(move || {
                let number = source.occupied[place];
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
        let give = give;
        let mut chunks = Vec::with_capacity(source.occupied.len());
        let total = (source.occupied.len() * CHUNK) as u64;
        while let Some((chunk, clusters)) = packed.try_next().await? {
            if give.send((chunk.number, clusters)).await.is_err() {
                // The writer says why it takes no more.
                break;
            }
            chunks.push(chunk);
            meter((chunks.len() * CHUNK) as u64, total);
        }
        Ok(chunks)
    };
    let (chunks, ()) = tokio::try_join!(packed, written)?;
    Ok(chunks)
}

/// The clusters of a chunk that are not all zeroes, with their places in it.
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

/// Reads a copy again, and finds in it what was on the disk, and nothing else.
async fn verify(
    storage: &LabStorage,
    file: &str,
    size: u64,
    chunks: &[Chunk],
    meter: impl Fn(u64, u64),
) -> Result<()> {
    let differs = || damaged("it does not read as the machine's disk does");
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
        meter(done, (chunks.len() * CHUNK) as u64);
    }
    Ok(())
}

/// Makes a file durable, and computes its digest.
async fn seal(path: PathBuf) -> Result<Digest> {
    blocking(move || {
        let failed = |error| Error::io(format_args!("read {}", path.display()), error);
        let mut file = File::open(&path).map_err(failed)?;
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
    })
    .await
}

/// Checks the structure of a captured disk.
async fn check(storage: &LabStorage, file: &str) -> Result<()> {
    let checked = image::check(storage, file).await;
    checked.map_err(|error| damaged("its structure is not sound").with_source(error))
}

/// The error of a copy that is not what it should be.
fn damaged(why: &str) -> Error {
    Error::new(ErrorKind::InvalidImage, format!("expected a captured disk as the machine left it, but {why}"))
        .with_help("look for faulty memory or disks of the host, and build again")
        .with_retryable(true)
}
