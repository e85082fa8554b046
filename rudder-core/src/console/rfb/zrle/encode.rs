//! The encoder, for servers: backends that serve a screen to viewers, the displays of the memory backend, and tests.

use super::{Framebuffer, TILE};
use flate2::{Compress, Compression, FlushCompress};

/// How a tile is encoded (RFC 6143, 7.7.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// All pixels.
    Raw,
    /// One colour.
    Solid,
    /// A palette of up to 16 colours, and an index of a few bits for each pixel.
    Packed,
    /// Runs of a colour.
    Runs,
    /// A palette of up to 127 colours, and runs of an index.
    PaletteRuns,
}

impl Form {
    pub(super) const ALL: [Self; 5] = [Self::Raw, Self::Solid, Self::Packed, Self::Runs, Self::PaletteRuns];
}

/// The encoder of ZRLE (RFC 6143, 7.7.6), whose state lasts as long as the connection.
#[derive(Debug)]
pub struct Encoder {
    deflate: Compress,
}

impl Default for Encoder {
    fn default() -> Self {
        Self { deflate: Compress::new(Compression::fast(), true) }
    }
}

impl Encoder {
    /// Returns the data of a rectangle of the frame, with its length before it. Each pixel is three bytes: blue, green and red,
    /// as of the format that [`client_setup`](super::super::client_setup) requests.
    ///
    /// # Panics
    /// When the rectangle, of this position and size in pixels, is not inside of the frame.
    #[must_use]
    pub fn encode(&mut self, frame: &Framebuffer, position: (usize, usize), size: (usize, usize)) -> Vec<u8> {
        self.encode_as(frame, position, size, |pixels, width| {
            let forms = Form::ALL.into_iter().filter_map(|form| tile(pixels, width, form));
            forms.min_by_key(Vec::len).unwrap_or_default()
        })
    }

    /// As [`encode`](Self::encode), each tile as the function encodes it, given its pixels and its width.
    pub(super) fn encode_as(
        &mut self,
        frame: &Framebuffer,
        (x, y): (usize, usize),
        (width, height): (usize, usize),
        mut encode: impl FnMut(&[[u8; 3]], usize) -> Vec<u8>,
    ) -> Vec<u8> {
        let mut plain = Vec::new();
        for top in (y..y + height).step_by(TILE) {
            for left in (x..x + width).step_by(TILE) {
                let right = (left + TILE).min(x + width);
                let rows = top..(top + TILE).min(y + height);
                let pixels: Vec<_> = rows.flat_map(|y| &frame.row(y)[left..right]).copied().collect();
                plain.extend(encode(&pixels, right - left));
            }
        }
        self.pack(&plain)
    }

    /// Returns data, compressed and with its length before it.
    pub(super) fn pack(&mut self, plain: &[u8]) -> Vec<u8> {
        let mut packed = Vec::with_capacity(64 + plain.len() / 4);
        let start = self.deflate.total_in();
        loop {
            let taken = (self.deflate.total_in() - start) as usize;
            packed.reserve(4096);
            // Compressing into memory fails only if a stream was ended, and this one never is.
            let _ = self.deflate.compress_vec(&plain[taken..], &mut packed, FlushCompress::Sync);
            // Space that is left means that nothing is pending.
            if packed.len() < packed.capacity() {
                break;
            }
        }
        let length = u32::try_from(packed.len()).unwrap_or(u32::MAX);
        [length.to_be_bytes().as_slice(), &packed].concat()
    }
}

/// Encodes a tile in this form; `None` if it has too many colours.
pub(super) fn tile(pixels: &[[u8; 3]], width: usize, form: Form) -> Option<Vec<u8>> {
    let most = match form {
        Form::Raw | Form::Runs => 0,
        Form::Solid => 1,
        Form::Packed => 16,
        Form::PaletteRuns => 127,
    };
    let mut palette: Vec<[u8; 3]> = Vec::new();
    for pixel in pixels.iter().filter(|_| most > 0) {
        if !palette.contains(pixel) {
            palette.push(*pixel);
        }
        if palette.len() > most {
            return None;
        }
    }
    // A palette has at least two entries.
    if form != Form::Solid && palette.len() == 1 {
        palette.push([0; 3]);
    }
    let index = |pixel| palette.iter().position(|entry| entry == pixel).unwrap_or_default() as u8;
    let runs = || pixels.chunk_by(|one, other| one == other);
    let mut bytes = Vec::new();
    match form {
        Form::Raw => {
            bytes.push(0);
            bytes.extend(pixels.iter().flat_map(colour));
        }
        Form::Solid => {
            bytes.push(1);
            bytes.extend(colour(&pixels[0]));
        }
        Form::Packed => {
            bytes.push(palette.len() as u8);
            bytes.extend(palette.iter().flat_map(colour));
            let bits = match palette.len() {
                ..=2 => 1,
                3..=4 => 2,
                _ => 4,
            };
            for row in pixels.chunks(width) {
                for part in row.chunks(8 / bits) {
                    let byte = part.iter().fold(0, |byte, pixel| byte << bits | index(pixel));
                    bytes.push(byte << (8 - bits * part.len()));
                }
            }
        }
        Form::Runs => {
            bytes.push(128);
            for run in runs() {
                bytes.extend(colour(&run[0]));
                push_length(&mut bytes, run.len());
            }
        }
        Form::PaletteRuns => {
            bytes.push(128 + palette.len() as u8);
            bytes.extend(palette.iter().flat_map(colour));
            for run in runs() {
                match run.len() {
                    1 => bytes.push(index(&run[0])),
                    length => {
                        bytes.push(128 | index(&run[0]));
                        push_length(&mut bytes, length);
                    }
                }
            }
        }
    }
    Some(bytes)
}

fn colour([red, green, blue]: &[u8; 3]) -> [u8; 3] {
    [*blue, *green, *red]
}

fn push_length(bytes: &mut Vec<u8>, length: usize) {
    bytes.extend(std::iter::repeat_n(255, (length - 1) / 255));
    bytes.push(((length - 1) % 255) as u8);
}
