//! One tile, decoded from unpacked bytes.

use super::mistake;
use crate::Error;

/// Why a tile was not decoded.
#[derive(Debug)]
pub(super) enum Undecoded {
    /// It is longer than the bytes.
    Incomplete,
    /// No tile begins with these bytes.
    Invalid(Error),
}

type Result<T> = std::result::Result<T, Undecoded>;

fn invalid(message: String) -> Undecoded {
    Undecoded::Invalid(mistake(message))
}

/// Decodes the tile that the bytes begin with. Returns how many bytes it has.
pub(super) fn decode(bytes: &[u8], width: usize, pixels: &mut [[u8; 3]]) -> Result<usize> {
    let mut rest = Rest(bytes);
    match rest.byte()? {
        0 => {
            let colours = rest.take(3 * pixels.len())?.chunks_exact(3);
            pixels.iter_mut().zip(colours).for_each(|(pixel, bytes)| *pixel = colour(bytes));
        }
        1 => pixels.fill(rest.colour()?),
        size @ 2..=16 => packed(&mut rest, usize::from(size), width, pixels)?,
        128 => runs(pixels, || {
            let colour = rest.colour()?;
            Ok((colour, rest.length()?))
        })?,
        size @ 130.. => {
            let palette = rest.palette(usize::from(size) - 128)?;
            runs(pixels, || {
                let byte = rest.byte()?;
                let length = if byte < 128 { 1 } else { rest.length()? };
                Ok((entry(&palette, byte & 127)?, length))
            })?;
        }
        other @ (17..=127 | 129) => {
            return Err(invalid(format!("expected a ZRLE tile, but found the unused subencoding {other}")));
        }
    }
    Ok(bytes.len() - rest.0.len())
}

/// Decodes a tile whose pixels are indices of 1, 2 or 4 bits, each row padded to whole bytes.
fn packed(rest: &mut Rest<'_>, size: usize, width: usize, pixels: &mut [[u8; 3]]) -> Result<()> {
    let palette = rest.palette(size)?;
    let bits = match size {
        ..=2 => 1,
        3..=4 => 2,
        _ => 4,
    };
    let per_byte = 8 / bits;
    for row in pixels.chunks_exact_mut(width) {
        let bytes = rest.take(width.div_ceil(per_byte))?;
        for (x, pixel) in row.iter_mut().enumerate() {
            let shift = 8 - bits * (x % per_byte + 1);
            *pixel = entry(&palette, bytes[x / per_byte] >> shift & ((1 << bits) - 1))?;
        }
    }
    Ok(())
}

/// Decodes runs until all pixels are drawn.
fn runs(pixels: &mut [[u8; 3]], mut next: impl FnMut() -> Result<([u8; 3], usize)>) -> Result<()> {
    let mut drawn = 0;
    while drawn < pixels.len() {
        let (colour, length) = next()?;
        let left = pixels.len() - drawn;
        let run = pixels[drawn..].get_mut(..length).ok_or_else(|| {
            invalid(format!(
                "expected a run of at most {left} pixels in a ZRLE tile, but found one of {length}"
            ))
        })?;
        run.fill(colour);
        drawn += length;
    }
    Ok(())
}

fn entry(palette: &[[u8; 3]], index: u8) -> Result<[u8; 3]> {
    palette.get(usize::from(index)).copied().ok_or_else(|| {
        let size = palette.len();
        invalid(format!("expected a colour of a ZRLE palette of {size}, but found the index {index}"))
    })
}

/// Returns a pixel from its `CPIXEL`: the requested format without the unused byte, hence blue, green and red.
fn colour(bytes: &[u8]) -> [u8; 3] {
    [bytes[2], bytes[1], bytes[0]]
}

/// The bytes that were not decoded yet.
struct Rest<'a>(&'a [u8]);

impl<'a> Rest<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count).ok_or(Undecoded::Incomplete)?;
        self.0 = rest;
        Ok(taken)
    }

    fn byte(&mut self) -> Result<u8> {
        Ok(self.take(1)?[0])
    }

    fn colour(&mut self) -> Result<[u8; 3]> {
        Ok(colour(self.take(3)?))
    }

    fn palette(&mut self, size: usize) -> Result<Vec<[u8; 3]>> {
        Ok(self.take(3 * size)?.chunks_exact(3).map(colour).collect())
    }

    /// The length of a run: one more than the sum of bytes up to the first that is not 255.
    ///
    /// A run that is too long is not read to its end: it may have none.
    fn length(&mut self) -> Result<usize> {
        let mut length = 1;
        loop {
            let byte = self.byte()?;
            length += usize::from(byte);
            if byte != 255 || length > super::TILE * super::TILE {
                return Ok(length);
            }
        }
    }
}
