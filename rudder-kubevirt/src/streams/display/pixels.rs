//! Formats of pixels (RFC 6143, 7.4), and rectangles encoded in them (7.7).

use rudder_core::console::{Framebuffer, rfb::ZrleEncoder};
use std::io;

/// A true-colour format of pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PixelFormat {
    /// 1, 2 or 4.
    bytes: usize,
    depth: u8,
    big_endian: bool,
    /// The largest values of red, green and blue.
    max: [u16; 3],
    /// How far red, green and blue are shifted to the left.
    shift: [u8; 3],
}

impl PixelFormat {
    /// 32 bits, blue in the lowest byte: the format that a viewer gets if it does not set another.
    pub(super) const DEFAULT: Self =
        Self { bytes: 4, depth: 24, big_endian: false, max: [255; 3], shift: [16, 8, 0] };

    /// Reads a `PIXEL_FORMAT`.
    ///
    /// # Errors
    /// `InvalidData` when it is invalid or has a colour map.
    pub(super) fn parse(bytes: [u8; 16]) -> io::Result<Self> {
        let invalid =
            || io::Error::new(io::ErrorKind::InvalidData, "expected true colours of 8, 16 or 32 bits");
        let [bits, depth, big_endian, true_colour, ..] = bytes;
        let max = [4, 6, 8].map(|at| u16::from_be_bytes([bytes[at], bytes[at + 1]]));
        let shift = [bytes[10], bytes[11], bytes[12]];
        if ![8, 16, 32].contains(&bits) || true_colour == 0 {
            return Err(invalid());
        }
        let fits = |(max, shift): (u16, u8)| shift < bits && (u64::from(max) << shift) < (1_u64 << bits);
        if !max.into_iter().zip(shift).all(fits) {
            return Err(invalid());
        }
        Ok(Self { bytes: usize::from(bits / 8), depth, big_endian: big_endian != 0, max, shift })
    }

    /// Returns the `PIXEL_FORMAT` of this format.
    pub(super) fn to_bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&[self.bytes as u8 * 8, self.depth, u8::from(self.big_endian), 1]);
        for (at, max) in [4, 6, 8].into_iter().zip(self.max) {
            bytes[at..at + 2].copy_from_slice(&max.to_be_bytes());
        }
        bytes[10..13].copy_from_slice(&self.shift);
        bytes
    }

    /// Appends pixels in this format.
    fn write(self, pixels: &[[u8; 3]], out: &mut Vec<u8>) {
        if self == Self::DEFAULT {
            out.extend(pixels.iter().flat_map(|[red, green, blue]| [*blue, *green, *red, 0]));
            return;
        }
        for pixel in pixels {
            let value = (0..3).fold(0, |value, channel| {
                let max = u32::from(self.max[channel]);
                let scaled = (u32::from(pixel[channel]) * max + 127) / 255;
                value | scaled << self.shift[channel]
            });
            match (self.bytes, self.big_endian) {
                (1, _) => out.push(value as u8),
                (2, false) => out.extend((value as u16).to_le_bytes()),
                (2, true) => out.extend((value as u16).to_be_bytes()),
                (_, false) => out.extend(value.to_le_bytes()),
                (_, true) => out.extend(value.to_be_bytes()),
            }
        }
    }

    /// Returns which colour each of the three bytes of a `CPIXEL` (7.7.5) holds: 0 for red, 1 for green, 2 for blue. `None` when
    /// the pixels have other colours than those of 8 bits.
    fn compressed_order(self) -> Option<[usize; 3]> {
        if self.bytes != 4 || self.depth > 24 || self.max != [255; 3] {
            return None;
        }
        // Either the lowest or the highest byte of a pixel is unused, and left out.
        let lowest = *self.shift.iter().min()?;
        let mut order = [0; 3];
        for (place, entry) in order.iter_mut().enumerate() {
            let place = if self.big_endian { 2 - place } else { place };
            *entry =
                self.shift.iter().position(|shift| usize::from(*shift) == usize::from(lowest) + 8 * place)?;
        }
        [0, 8].contains(&lowest).then_some(order)
    }
}

/// Encodings of rectangles, and extensions of the protocol that a viewer may ask for (RFC 6143, 7.7 and 7.8; the registry of
/// rfbproto).
pub(super) mod encoding {
    pub(in super::super) const RAW: i32 = 0;
    pub(in super::super) const ZRLE: i32 = 16;
    pub(in super::super) const DESKTOP_SIZE: i32 = -223;
    pub(in super::super) const QEMU_EXTENDED_KEY: i32 = -258;
}

/// Encodes rectangles for one viewer.
#[derive(Debug, Default)]
pub(super) struct Encoder {
    zrle: ZrleEncoder,
}

impl Encoder {
    /// Returns pixels as the encoding and the data of a rectangle, compressed if the viewer wants that and its format allows it.
    pub(super) fn encode(
        &mut self,
        pixels: &Framebuffer,
        format: PixelFormat,
        compress: bool,
    ) -> (i32, Vec<u8>) {
        let size = (pixels.width(), pixels.height());
        match format.compressed_order().filter(|_| compress) {
            Some(order) => (encoding::ZRLE, self.zrle.encode(&ordered(pixels, order), (0, 0), size)),
            None => {
                let mut data = Vec::with_capacity(size.0 * size.1 * format.bytes);
                (0..size.1).for_each(|y| format.write(pixels.row(y), &mut data));
                (encoding::RAW, data)
            }
        }
    }
}

/// Returns the pixels with their colours exchanged so that the encoder, which writes blue, green and red, writes this order.
fn ordered(pixels: &Framebuffer, order: [usize; 3]) -> std::borrow::Cow<'_, Framebuffer> {
    if order == [2, 1, 0] {
        return std::borrow::Cow::Borrowed(pixels);
    }
    let mut exchanged = pixels.clone();
    for y in 0..exchanged.height() {
        for pixel in exchanged.row_mut(y) {
            *pixel = [pixel[order[2]], pixel[order[1]], pixel[order[0]]];
        }
    }
    std::borrow::Cow::Owned(exchanged)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const PIXEL: [u8; 3] = [255, 128, 1];

    fn raw(format: PixelFormat) -> Vec<u8> {
        let mut out = Vec::new();
        format.write(&[PIXEL], &mut out);
        out
    }

    #[test]
    fn formats_are_read_and_written() {
        let default = PixelFormat::DEFAULT.to_bytes();
        assert_eq!(default, [32, 24, 0, 1, 0, 255, 0, 255, 0, 255, 16, 8, 0, 0, 0, 0]);
        assert_eq!(PixelFormat::parse(default).unwrap(), PixelFormat::DEFAULT);
        assert_eq!(raw(PixelFormat::DEFAULT), [1, 128, 255, 0]);
        // Formats of usual viewers: red in the lowest byte; 16 bits; 8 bits; big-endian.
        let cases: [([u8; 13], &[u8]); 4] = [
            ([32, 24, 0, 1, 0, 255, 0, 255, 0, 255, 0, 8, 16], &[255, 128, 1, 0]),
            ([16, 16, 0, 1, 0, 31, 0, 63, 0, 31, 11, 5, 0], &[0x00, 0xfc]),
            ([8, 8, 0, 1, 0, 7, 0, 7, 0, 3, 0, 3, 6], &[0b0010_0111]),
            ([32, 24, 1, 1, 0, 255, 0, 255, 0, 255, 16, 8, 0], &[0, 255, 128, 1]),
        ];
        for (format, expected) in cases {
            let mut bytes = [0; 16];
            bytes[..13].copy_from_slice(&format);
            let format = PixelFormat::parse(bytes).unwrap();
            assert_eq!(format.to_bytes(), bytes);
            assert_eq!(raw(format), expected, "{format:?}");
        }
    }

    #[test]
    fn invalid_formats_are_refused() {
        let cases: [[u8; 13]; 5] = [
            [24, 24, 0, 1, 0, 255, 0, 255, 0, 255, 16, 8, 0],
            [8, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            [32, 24, 0, 1, 0, 255, 0, 255, 0, 255, 255, 8, 0],
            [16, 16, 0, 1, 0, 255, 0, 255, 0, 255, 16, 8, 0],
            [0; 13],
        ];
        for format in cases {
            let mut bytes = [0; 16];
            bytes[..13].copy_from_slice(&format);
            assert_eq!(PixelFormat::parse(bytes).unwrap_err().kind(), io::ErrorKind::InvalidData);
        }
    }

    #[test]
    fn compressed_pixels_have_the_order_of_the_format() {
        let with = |shift, big_endian| PixelFormat { shift, big_endian, ..PixelFormat::DEFAULT };
        let cases = [
            (with([16, 8, 0], false), Some([2, 1, 0])),
            (with([0, 8, 16], false), Some([0, 1, 2])),
            (with([24, 16, 8], false), Some([2, 1, 0])),
            (with([16, 8, 0], true), Some([0, 1, 2])),
            (with([16, 0, 8], false), Some([1, 2, 0])),
            (with([17, 8, 0], false), None),
            (PixelFormat { depth: 32, ..PixelFormat::DEFAULT }, None),
            (PixelFormat { bytes: 2, ..PixelFormat::DEFAULT }, None),
        ];
        for (format, order) in cases {
            assert_eq!(format.compressed_order(), order, "{format:?}");
        }
        let mut pixels = Framebuffer::new(1, 1);
        pixels.row_mut(0)[0] = PIXEL;
        // The encoder writes the last colour first.
        assert_eq!(ordered(&pixels, [0, 1, 2]).row(0), [[1, 128, 255]]);
        assert_eq!(ordered(&pixels, [2, 1, 0]).row(0), [PIXEL]);
        let (encoding, _) = Encoder::default().encode(&pixels, with([17, 8, 0], false), true);
        assert_eq!(encoding, encoding::RAW);
    }
}
