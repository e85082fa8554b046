//! ZRLE (RFC 6143, 7.7.6): tiles of up to 64×64 pixels, compressed with one zlib stream per connection.
//!
//! Memory is bounded by constants, whatever a server sends: compressed data is read in pieces, and unpacked into a
//! buffer that holds the largest valid tile.

pub(super) mod encode;
#[cfg(test)]
mod tests;
mod tile;

use super::{Framebuffer, broken, mistake};
use crate::Result;
use flate2::{Decompress, FlushDecompress};
use tokio::io::{AsyncRead, AsyncReadExt as _, Take};

/// The width and height of a tile, in pixels; tiles at the right and at the bottom may be smaller.
const TILE: usize = 64;
/// How many bytes of compressed data are read at once.
const PIECE: u64 = 16 << 10;
/// The size of the buffer for unpacked data, in bytes: more than the largest tile, which consists of a subencoding and
/// a run of three bytes and a length for each pixel.
const UNPACKED: usize = 2 * (1 + 4 * TILE * TILE);

/// The decoder of ZRLE, whose state lasts as long as the connection.
#[derive(Debug)]
pub struct Decoder {
    inflate: Decompress,
    /// Compressed data that was read, and how much of it was unpacked.
    packed: Vec<u8>,
    taken: usize,
    /// Unpacked data that was not decoded yet is in `start..end`.
    unpacked: Vec<u8>,
    start: usize,
    end: usize,
    pixels: Vec<[u8; 3]>,
}

impl Default for Decoder {
    fn default() -> Self {
        Self {
            inflate: Decompress::new(true),
            packed: Vec::new(),
            taken: 0,
            unpacked: vec![0; UNPACKED],
            start: 0,
            end: 0,
            pixels: vec![[0; 3]; TILE * TILE],
        }
    }
}

impl Decoder {
    /// Reads the data of a rectangle and draws it. The rectangle must be inside of the frame.
    ///
    /// # Errors
    /// `Protocol` when the data is invalid, too short or too long. The rectangle may then be partly drawn.
    pub(super) async fn draw<R: AsyncRead + Unpin>(
        &mut self,
        stream: &mut R,
        frame: &mut Framebuffer,
        (x, y): (usize, usize),
        (width, height): (usize, usize),
    ) -> Result<()> {
        let length = stream.read_u32().await.map_err(broken)?;
        let mut data = stream.take(u64::from(length));
        for top in (y..y + height).step_by(TILE) {
            let high = TILE.min(y + height - top);
            for left in (x..x + width).step_by(TILE) {
                let wide = TILE.min(x + width - left);
                self.tile(&mut data, wide, high).await?;
                for (row, pixels) in self.pixels[..wide * high].chunks_exact(wide).enumerate() {
                    frame.row_mut(top + row)[left..left + wide].copy_from_slice(pixels);
                }
            }
        }
        if self.start < self.end || self.unpack(&mut data).await? {
            return Err(mistake(format!(
                "expected the ZRLE data of {width}×{height} pixels, but found more than that"
            )));
        }
        Ok(())
    }

    /// Decodes the next tile into `pixels`.
    async fn tile<R: AsyncRead + Unpin>(
        &mut self,
        data: &mut Take<&mut R>,
        width: usize,
        height: usize,
    ) -> Result<()> {
        let pixels = width * height;
        loop {
            match tile::decode(&self.unpacked[self.start..self.end], width, &mut self.pixels[..pixels]) {
                Ok(used) => {
                    self.start += used;
                    return Ok(());
                }
                Err(tile::Undecoded::Invalid(error)) => return Err(error),
                Err(tile::Undecoded::Incomplete) if self.unpack(data).await? => {}
                Err(tile::Undecoded::Incomplete) => {
                    return Err(mistake(format!(
                        "expected a ZRLE tile of {width}×{height} pixels, but found the end of the rectangle's data"
                    )));
                }
            }
        }
    }

    /// Unpacks more data, as much as fits. Returns `false` if the rectangle has no more.
    async fn unpack<R: AsyncRead + Unpin>(&mut self, data: &mut Take<&mut R>) -> Result<bool> {
        self.unpacked.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        loop {
            let before = (self.inflate.total_in(), self.inflate.total_out());
            let (packed, room) = (&self.packed[self.taken..], &mut self.unpacked[self.end..]);
            self.inflate.decompress(packed, room, FlushDecompress::None).map_err(|error| {
                mistake("expected zlib data in a ZRLE rectangle, but found something else").with_source(error)
            })?;
            // Both are bounded by the lengths of the buffers.
            let consumed = (self.inflate.total_in() - before.0) as usize;
            let produced = (self.inflate.total_out() - before.1) as usize;
            self.taken += consumed;
            self.end += produced;
            if produced > 0 {
                return Ok(true);
            }
            if self.taken < self.packed.len() {
                if consumed == 0 {
                    return Err(mistake(
                        "expected one zlib stream per connection, but found data after its end",
                    ));
                }
                continue;
            }
            self.taken = 0;
            self.packed.clear();
            let piece = data.limit().min(PIECE);
            if piece == 0 {
                return Ok(false);
            }
            self.packed.resize(piece as usize, 0);
            data.read_exact(&mut self.packed).await.map_err(broken)?;
        }
    }
}
