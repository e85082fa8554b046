//! The surroundings of a position on the screen, as bits: all cells that may contain the position, of every size and at
//! every offset, are extracted from it without reading the screen again.

use super::font::{Bitmap, MAX_HEIGHT, MAX_WIDTH, Shapes, Size};
use super::grid::MIN_PIXELS;
use crate::console::Framebuffer;

/// Number of columns to the left of the position, and as many to its right; the same for rows.
const ASIDE: usize = MAX_WIDTH - 1;
const ABOVE: usize = MAX_HEIGHT - 1;

/// The pixels around a position that have its colour, and those that have the colour to its left.
pub(super) struct Window {
    x: usize,
    y: usize,
    width: usize,
    height: usize,
    /// One number for each row, with the leftmost pixel in the highest of `2 * ASIDE + 1` bits.
    colours: [[u32; 2 * ABOVE + 1]; 2],
}

impl Window {
    /// Returns the surroundings of a position that is not in the first column.
    pub(super) fn around(screen: &Framebuffer, (x, y): (usize, usize)) -> Self {
        let mut colours = [[0; 2 * ABOVE + 1]; 2];
        let inks = [screen.row(y)[x], screen.row(y)[x - 1]];
        let left = x.saturating_sub(ASIDE);
        let right = (x + ASIDE).min(screen.width() - 1);
        for line in y.saturating_sub(ABOVE)..=(y + ABOVE).min(screen.height() - 1) {
            for (column, pixel) in (left..).zip(&screen.row(line)[left..=right]) {
                for (ink, rows) in inks.iter().zip(&mut colours) {
                    rows[line + ABOVE - y] |= u32::from(pixel == ink) << (x + ASIDE - column);
                }
            }
        }
        Self { x, y, width: screen.width(), height: screen.height(), colours }
    }

    /// Returns the offsets of the grids, of one cell size, in which the position belongs to a character.
    pub(super) fn offsets(&self, shapes: &Shapes) -> Vec<(usize, usize)> {
        let Size { width, height } = shapes.size;
        let mut offsets = Vec::new();
        // The distance in pixels of the position from the left and the top of its cell.
        for right in (0..width.min(self.x + 1)).filter(|right| self.x - right + width <= self.width) {
            let shift = ASIDE + 1 + right - width;
            let cut = |bits: u32| (bits >> shift) as u16 & shapes.size.full_row();
            let columns = self.colours.each_ref().map(|rows| rows.map(cut));
            for down in (0..height.min(self.y + 1)).filter(|down| self.y - down + height <= self.height) {
                let top = ABOVE - down;
                let cells = columns.each_ref().map(|rows| &rows[top..top + height]);
                if cells.iter().any(|rows| shapes.may_be_known(rows)) && is_character(shapes, cells) {
                    offsets.push(((self.x - right) % width, (self.y - down) % height));
                }
            }
        }
        offsets
    }
}

/// Whether one of the colours of a cell is that of a character.
fn is_character(shapes: &Shapes, cells: [&[u16]; 2]) -> bool {
    let cells = cells.map(|rows| {
        let mut bitmap: Bitmap = [0; MAX_HEIGHT];
        bitmap[..rows.len()].copy_from_slice(rows);
        (bitmap, rows.iter().map(|row| row.count_ones()).sum::<u32>())
    });
    let all = cells[0].1 + cells[1].1 == (shapes.size.width * shapes.size.height) as u32;
    let mut cells = cells.into_iter();
    cells.any(|(bitmap, pixels)| (pixels >= MIN_PIXELS || all) && shapes.drawn(bitmap).next().is_some())
}
