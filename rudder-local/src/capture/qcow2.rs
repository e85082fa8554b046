//! Writes compressed qcow2 files sequentially (QEMU, docs/interop/qcow2.txt; version 3, zstd).
//!
//! The same disk always gives the same file, byte for byte, however many cores compress.

use std::io::{self, Seek, SeekFrom, Write};

/// The size of a cluster, the allocation unit, in bytes: QEMU's default.
pub(super) const CLUSTER: usize = 1 << CLUSTER_BITS;
const CLUSTER_BITS: u32 = 16;
const CLUSTER_BYTES: u64 = CLUSTER as u64;

/// Number of entries of a table that fills a cluster.
const TABLE: u64 = CLUSTER_BYTES / 8;
/// Number of 16-bit reference counts that fill a cluster.
const COUNTS: u64 = CLUSTER_BYTES / 2;

/// Flag of an entry: the cluster has exactly one reference.
const COPIED: u64 = 1 << 63;
/// Flag of an L2 table entry: the cluster is compressed.
const COMPRESSED: u64 = 1 << 62;
/// Position of the number of additional sectors in the entry of a compressed cluster.
const SECTORS_SHIFT: u32 = 62 - (CLUSTER_BITS - 8);

/// Length of a header that includes the compression type and its padding.
const HEADER_LENGTH: u32 = 112;
/// Incompatible feature: the compression type is not zlib.
const COMPRESSION_TYPE: u64 = 1 << 3;
const ZSTD: u8 = 1;

/// A cluster of the disk that is not all zeroes.
pub(super) enum Cluster {
    /// A zstd frame.
    Compressed(Vec<u8>),
    /// The bytes of a cluster that compression would not make smaller.
    Plain(Vec<u8>),
}

/// A qcow2 file that is being written.
pub(super) struct Writer<W> {
    file: W,
    /// The size of the disk, in bytes.
    size: u64,
    /// Offset of the next byte to write.
    end: u64,
    l1: Vec<u64>,
    /// The L2 table that is being filled, and its index in the L1 table.
    l2: Option<(usize, Vec<u64>)>,
    /// Reference counts of the file's clusters, in order.
    references: Vec<u16>,
}

impl<W: Write + Seek> Writer<W> {
    /// Creates a disk of this size, in bytes, which reads as zeroes wherever nothing is pushed.
    pub(super) fn new(mut file: W, size: u64) -> io::Result<Self> {
        let tables = size.div_ceil(CLUSTER_BYTES * TABLE);
        let l1 = vec![0; usize::try_from(tables).map_err(io::Error::other)?];
        // The header is written last, because it contains the locations of everything else.
        file.write_all(&[0; CLUSTER])?;
        Ok(Self { file, size, end: CLUSTER_BYTES, l1, l2: None, references: vec![1] })
    }

    /// Appends a cluster of the disk with this number; numbers must ascend.
    pub(super) fn push(&mut self, number: u64, cluster: &Cluster) -> io::Result<()> {
        let table = usize::try_from(number / TABLE).map_err(io::Error::other)?;
        let index = usize::try_from(number % TABLE).map_err(io::Error::other)?;
        if self.l2.as_ref().is_some_and(|(open, _)| *open != table) {
            self.close_table()?;
        }
        let entry = match cluster {
            Cluster::Compressed(frame) => self.compressed(frame)?,
            Cluster::Plain(bytes) => self.aligned(bytes)? | COPIED,
        };
        let (_, entries) = self.l2.get_or_insert_with(|| (table, vec![0; CLUSTER / 8]));
        entries[index] = entry;
        Ok(())
    }

    /// Completes the file: writes the remaining tables, the reference counts, and the header.
    pub(super) fn finish(mut self) -> io::Result<W> {
        self.close_table()?;
        let l1 = std::mem::take(&mut self.l1);
        let l1_offset = self.aligned(&big_endian(&l1))?;
        // Reference counts also cover their own clusters.
        let others = self.end.div_ceil(CLUSTER_BYTES);
        let (mut blocks, mut tables) = (0, 0);
        while (others + blocks + tables) > blocks * COUNTS || blocks > tables * TABLE {
            blocks = (others + blocks + tables).div_ceil(COUNTS);
            tables = blocks.div_ceil(TABLE);
        }
        let table_offset = others * CLUSTER_BYTES;
        let block_offset = |block| table_offset + (tables + block) * CLUSTER_BYTES;
        self.aligned(&big_endian(&(0..blocks).map(block_offset).collect::<Vec<_>>()))?;
        let mut counts = std::mem::take(&mut self.references);
        counts.resize(usize::try_from(others + tables + blocks).map_err(io::Error::other)?, 1);
        self.aligned(&counts.iter().flat_map(|count| count.to_be_bytes()).collect::<Vec<_>>())?;
        self.pad()?;
        debug_assert_eq!(self.end, (others + tables + blocks) * CLUSTER_BYTES);
        self.file.seek(SeekFrom::Start(0))?;
        let header = self.header(l1.len(), l1_offset, table_offset, tables)?;
        self.file.write_all(&header)?;
        self.file.flush()?;
        Ok(self.file)
    }

    fn header(&self, l1_size: usize, l1_offset: u64, table_offset: u64, tables: u64) -> io::Result<Vec<u8>> {
        let mut header = Vec::with_capacity(HEADER_LENGTH as usize);
        header.extend(b"QFI\xfb");
        header.extend(3_u32.to_be_bytes());
        // No backing file: offset and length of its name.
        header.extend([0; 12]);
        header.extend(CLUSTER_BITS.to_be_bytes());
        header.extend(self.size.to_be_bytes());
        // No encryption.
        header.extend([0; 4]);
        header.extend(u32::try_from(l1_size).map_err(io::Error::other)?.to_be_bytes());
        header.extend(l1_offset.to_be_bytes());
        header.extend(table_offset.to_be_bytes());
        header.extend(u32::try_from(tables).map_err(io::Error::other)?.to_be_bytes());
        // No snapshots: their number and offset.
        header.extend([0; 12]);
        header.extend(COMPRESSION_TYPE.to_be_bytes());
        // Compatible features, and autoclear features.
        header.extend([0; 16]);
        // Reference counts of 1 << 4 bits.
        header.extend(4_u32.to_be_bytes());
        header.extend(HEADER_LENGTH.to_be_bytes());
        header.extend([ZSTD, 0, 0, 0, 0, 0, 0, 0]);
        // No extensions: the rest of the cluster is zero, which also ends their list.
        Ok(header)
    }

    fn close_table(&mut self) -> io::Result<()> {
        if let Some((table, entries)) = self.l2.take() {
            self.l1[table] = self.aligned(&big_endian(&entries))? | COPIED;
        }
        Ok(())
    }

    /// Appends a compressed cluster right after the previous one. Returns its entry.
    fn compressed(&mut self, frame: &[u8]) -> io::Result<u64> {
        let start = self.end;
        self.append(frame)?;
        let last = self.end - 1;
        for cluster in start / CLUSTER_BYTES..=last / CLUSTER_BYTES {
            self.add_reference(cluster)?;
        }
        let further_sectors = last / 512 - start / 512;
        Ok(COMPRESSED | further_sectors << SECTORS_SHIFT | start)
    }

    /// Appends bytes at the beginning of a new cluster. Returns their offset.
    fn aligned(&mut self, bytes: &[u8]) -> io::Result<u64> {
        self.pad()?;
        let start = self.end;
        self.append(bytes)?;
        self.pad()?;
        for cluster in start / CLUSTER_BYTES..self.end / CLUSTER_BYTES {
            self.add_reference(cluster)?;
        }
        Ok(start)
    }

    fn add_reference(&mut self, cluster: u64) -> io::Result<()> {
        let cluster = usize::try_from(cluster).map_err(io::Error::other)?;
        if self.references.len() <= cluster {
            self.references.resize(cluster + 1, 0);
        }
        self.references[cluster] += 1;
        Ok(())
    }

    fn pad(&mut self) -> io::Result<()> {
        let missing = self.end.next_multiple_of(CLUSTER_BYTES) - self.end;
        self.append(&[0; CLUSTER][..usize::try_from(missing).map_err(io::Error::other)?])
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)?;
        self.end += bytes.len() as u64;
        Ok(())
    }
}

fn big_endian(entries: &[u64]) -> Vec<u8> {
    entries.iter().flat_map(|entry| entry.to_be_bytes()).collect()
}
