//! Screenshots as PNG files.

use super::Framebuffer;
use crate::{Error, ErrorKind, Result};

impl Framebuffer {
    /// Encodes the screen as a PNG file: 8 bits each of red, green and blue.
    ///
    /// # Errors
    /// `InvalidInput` when there is nothing to show: a width or a height of zero.
    pub fn to_png(&self) -> Result<Vec<u8>> {
        let failed = |error: png::EncodingError| {
            let message = format!("cannot encode a screenshot of {}×{} pixels", self.width(), self.height());
            Error::new(ErrorKind::InvalidInput, message).with_source(error.to_string())
        };
        let [width, height] =
            [self.width(), self.height()].map(|size| u32::try_from(size).unwrap_or(u32::MAX));
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, width, height);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        encoder.set_compression(png::Compression::Fast);
        let mut writer = encoder.write_header().map_err(failed)?;
        let data: Vec<u8> = (0..self.height()).flat_map(|y| self.row(y).as_flattened()).copied().collect();
        writer.write_image_data(&data).map_err(failed)?;
        writer.finish().map_err(failed)?;
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_screenshot_contains_every_pixel() {
        let mut frame = Framebuffer::new(3, 2);
        frame.row_mut(1)[2] = [1, 2, 3];
        let bytes = frame.to_png().unwrap();
        let mut reader = png::Decoder::new(std::io::Cursor::new(bytes)).read_info().unwrap();
        let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
        let info = reader.next_frame(&mut pixels).unwrap();
        assert_eq!((info.width, info.height, info.color_type), (3, 2, png::ColorType::Rgb));
        assert_eq!(pixels, [vec![0; 15], vec![1, 2, 3]].concat());
        assert_eq!(Framebuffer::new(0, 0).to_png().unwrap_err().kind(), ErrorKind::InvalidInput);
    }
}
