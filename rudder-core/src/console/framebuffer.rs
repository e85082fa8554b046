//! What a screen shows, as pixels.

/// The pixels of a screen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Framebuffer {
    width: usize,
    height: usize,
    pixels: Vec<[u8; 3]>,
}

impl Framebuffer {
    /// Returns a black screen of this size, in pixels.
    #[must_use]
    pub fn new(width: usize, height: usize) -> Self {
        Self { width, height, pixels: vec![[0; 3]; width * height] }
    }

    /// Returns the number of pixels in a row.
    #[must_use]
    pub fn width(&self) -> usize {
        self.width
    }

    /// Returns the number of rows.
    #[must_use]
    pub fn height(&self) -> usize {
        self.height
    }

    /// Returns a row, counted from the top: red, green and blue of each pixel from the left.
    ///
    /// # Panics
    /// When there is no such row.
    #[must_use]
    pub fn row(&self, y: usize) -> &[[u8; 3]] {
        &self.pixels[y * self.width..][..self.width]
    }

    /// Whether a row is the same in both; `false` if one of them does not have the row.
    pub(crate) fn same_row(&self, other: &Self, y: usize) -> bool {
        // Bytes are compared at once, pixels would be compared one by one.
        y < self.height.min(other.height) && self.row(y).as_flattened() == other.row(y).as_flattened()
    }

    /// Returns a row, counted from the top, for writing.
    ///
    /// # Panics
    /// When there is no such row.
    pub fn row_mut(&mut self, y: usize) -> &mut [[u8; 3]] {
        &mut self.pixels[y * self.width..][..self.width]
    }
}
