//! Sparse files, with holes in place of zeros.

use std::{
    fs::File,
    io::{self, Seek, SeekFrom, Write},
};

/// Runs of zeros of this length, at multiples of it, become holes.
const HOLE: usize = 4096;

/// Writes a file from its beginning, leaving holes in place of zeros.
#[derive(Debug)]
pub(in crate::store) struct SparseWriter<'a> {
    file: &'a File,
    len: u64,
}

impl<'a> SparseWriter<'a> {
    /// Creates a writer for an empty file.
    pub(in crate::store) fn new(file: &'a File) -> Self {
        Self::resume(file, 0)
    }

    /// Creates a writer that continues after the first `len` bytes.
    pub(in crate::store) fn resume(file: &'a File, len: u64) -> Self {
        Self { file, len }
    }

    /// Makes the file as long as what was written so far.
    pub(in crate::store) fn set_len(&self) -> io::Result<u64> {
        self.file.set_len(self.len)?;
        Ok(self.len)
    }

    pub(in crate::store) fn write(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            // Up to the next multiple of the hole size.
            let to_edge = HOLE - usize::try_from(self.len % HOLE as u64).unwrap_or(0);
            let (piece, _) = bytes.split_at(to_edge.min(bytes.len()));
            if is_zero(piece) {
                self.len += piece.len() as u64;
                bytes = &bytes[piece.len()..];
                continue;
            }
            // Writes all blocks up to the next all-zero one in one call.
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

    /// Makes the file as long as what was written, and returns that length.
    pub(in crate::store) fn finish(self) -> io::Result<u64> {
        self.set_len()
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    let chunks = bytes.chunks_exact(16);
    chunks.remainder().iter().all(|byte| *byte == 0) && chunks.into_iter().all(|chunk| chunk == [0; 16])
}
