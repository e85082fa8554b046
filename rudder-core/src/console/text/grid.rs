//! Locates the cells of a console on a screen, and determines the content of a cell.

use super::font::{Bitmap, MAX_HEIGHT, SHAPES, Shapes, Size};
use super::window::Window;
use crate::console::Framebuffer;
use std::{cmp::Reverse, collections::HashMap};

/// The cells of a console: their size, and the position of the first. Pixels left over at the edges of the screen
/// belong to no cell.
#[derive(Clone, Copy)]
pub(super) struct Grid {
    pub(super) shapes: &'static Shapes,
    pub(super) x: usize,
    pub(super) y: usize,
    pub(super) columns: usize,
    pub(super) rows: usize,
}

/// The content of a cell.
pub(super) enum Cell {
    /// A single colour.
    Blank([u8; 3]),
    /// Two colours. The set pixels are those that do not have the `corner`'s colour, which is that of the pixel at the
    /// top left.
    Shape { bitmap: Bitmap, corner: [u8; 3], other: [u8; 3] },
    /// More than two colours: an image, perhaps with a character in front of it.
    Image,
}

/// Number of positions that are sampled to compare all grids with each other, and then to compare the best ones.
const COARSE_SAMPLE: usize = 64;
const FINE_SAMPLE: usize = 256;

/// Number of best grids.
const BEST_GRIDS: usize = 8;

/// Number of edges that are sampled for the colours of text, and number of such colours.
const EDGE_SAMPLE: usize = 8192;
const COLOURS: usize = 8;

/// With fewer pixels than this, a part of an image may match a known glyph by chance.
pub(super) const MIN_PIXELS: u32 = 8;

/// Finds the grid that explains most of a screen; `None` for a screen without any edge, or on which no grid finds text.
pub(super) fn find(screen: &Framebuffer) -> Option<Grid> {
    let positions = edges(screen);
    let enough = positions.len() - positions.len() / 20; // a cursor, a logo
    let usual = SHAPES.iter().flat_map(|shapes| {
        let Size { width, height } = shapes.size;
        // At the corner of the screen, or with equal borders.
        [(0, 0), (screen.width() % width / 2, screen.height() % height / 2)]
            .map(|(x, y)| Grid::new(screen, shapes, x, y))
    });
    let usual = best(screen, usual, &positions, enough);
    if let Some((grid, read)) = usual
        && read >= enough
    {
        return Some(grid);
    }
    let few = positions.iter().step_by(positions.len().div_ceil(COARSE_SAMPLE).max(1));
    let few: Vec<_> = few.map(|position| Window::around(screen, *position)).collect();
    let mut found = Vec::new();
    for shapes in SHAPES.iter() {
        let mut read = HashMap::new();
        for offset in few.iter().flat_map(|window| window.offsets(shapes)) {
            *read.entry(offset).or_insert(0) += 1;
        }
        let mut read: Vec<_> = read.into_iter().map(|(offset, count)| (Reverse(count), offset)).collect();
        read.sort_unstable();
        if let Some((Reverse(most), (x, y))) = read.first()
            && most * 20 >= few.len() * 19
        {
            return Some(Grid::new(screen, shapes, *x, *y)); // nothing better will come
        }
        found.extend(read.into_iter().take(BEST_GRIDS).map(|(count, offset)| (count, shapes, offset)));
    }
    found.sort_by_key(|(count, ..)| *count); // stable: the usual sizes stay in front
    let found = found.into_iter().take(BEST_GRIDS).map(|(_, shapes, (x, y))| Grid::new(screen, shapes, x, y));
    best(screen, usual.map(|(grid, _)| grid).into_iter().chain(found), &positions, enough)
        .map(|(grid, _)| grid)
}

/// Returns the grid with the most positions in text (the first of equals, or the first with enough), and their number.
fn best(
    screen: &Framebuffer,
    grids: impl Iterator<Item = Grid>,
    positions: &[(usize, usize)],
    enough: usize,
) -> Option<(Grid, usize)> {
    let mut best = None;
    for grid in grids {
        let read = grid.count_known(screen, positions);
        if read > best.map_or(0, |(_, most)| most) {
            best = Some((grid, read));
            if read >= enough {
                break;
            }
        }
    }
    best
}

/// Returns positions where a pixel differs from the one to its left, spread over the screen. At most of them, one of
/// both pixels has a colour that is common at such positions, as the colours of text are and those of an image are not.
fn edges(screen: &Framebuffer) -> Vec<(usize, usize)> {
    let mut all = Vec::new();
    for y in (0..screen.height()).step_by(3) {
        let row = screen.row(y);
        all.extend((1..row.len()).filter(|&x| row[x] != row[x - 1]).map(|x| (x, y)));
    }
    let colours = |&(x, y): &(usize, usize)| [screen.row(y)[x - 1], screen.row(y)[x]];
    let mut counts: HashMap<[u8; 3], usize> = HashMap::new();
    for position in all.iter().step_by(all.len().div_ceil(EDGE_SAMPLE).max(1)) {
        colours(position).into_iter().for_each(|colour| *counts.entry(colour).or_default() += 1);
    }
    let mut counts: Vec<_> = counts.into_iter().map(|(colour, count)| (Reverse(count), colour)).collect();
    counts.sort_unstable();
    counts.truncate(COLOURS);
    let is_usual = |position: &(usize, usize)| {
        colours(position).into_iter().any(|colour| counts.iter().any(|(_, usual)| *usual == colour))
    };
    let (usual, other): (Vec<_>, Vec<_>) = all.into_iter().partition(is_usual);
    let spread = |positions: Vec<(usize, usize)>, count: usize| {
        let step = positions.len().div_ceil(count).max(1);
        positions.into_iter().step_by(step)
    };
    spread(usual, FINE_SAMPLE * 3 / 4).chain(spread(other, FINE_SAMPLE / 4)).collect()
}

impl Grid {
    fn new(screen: &Framebuffer, shapes: &'static Shapes, x: usize, y: usize) -> Self {
        let Size { width, height } = shapes.size;
        Self {
            shapes,
            x,
            y,
            columns: screen.width().saturating_sub(x) / width,
            rows: screen.height().saturating_sub(y) / height,
        }
    }

    /// Returns how many of the positions are in cells with a known glyph.
    fn count_known(&self, screen: &Framebuffer, positions: &[(usize, usize)]) -> usize {
        let known = |&&(x, y): &&(usize, usize)| {
            let (Some(right), Some(down)) = (x.checked_sub(self.x), y.checked_sub(self.y)) else {
                return false;
            };
            let (column, row) = (right / self.shapes.size.width, down / self.shapes.size.height);
            if column >= self.columns || row >= self.rows {
                return false;
            }
            match self.cell(screen, column, row) {
                Cell::Blank(_) => false,
                Cell::Shape { bitmap, .. } => !self.shapes.readings(&bitmap).is_empty(),
                // A character in front of an image has one of the two colours that meet here.
                Cell::Image => [x, x - 1].iter().any(|&x| {
                    let (bitmap, pixels) = self.ink(screen, (column, row), screen.row(y)[x]);
                    pixels >= MIN_PIXELS && self.shapes.drawn(bitmap).next().is_some()
                }),
            }
        };
        positions.iter().filter(known).count()
    }

    /// Returns the colours of a cell's pixels, row by row.
    pub(super) fn pixels<'a>(
        &self,
        screen: &'a Framebuffer,
        (column, row): (usize, usize),
    ) -> impl Iterator<Item = &'a [[u8; 3]]> {
        let Size { width, height } = self.shapes.size;
        let (x, y) = (self.x + column * width, self.y + row * height);
        (y..y + height).map(move |y| &screen.row(y)[x..x + width])
    }

    /// Returns the pixels of a cell that have one colour, and their number.
    pub(super) fn ink(&self, screen: &Framebuffer, cell: (usize, usize), colour: [u8; 3]) -> (Bitmap, u32) {
        let mut bitmap = [0; MAX_HEIGHT];
        for (bits, row) in bitmap.iter_mut().zip(self.pixels(screen, cell)) {
            *bits = row.iter().fold(0, |bits, pixel| bits << 1 | u16::from(*pixel == colour));
        }
        (bitmap, bitmap.iter().map(|row| row.count_ones()).sum())
    }

    /// Returns the content of a cell.
    pub(super) fn cell(&self, screen: &Framebuffer, column: usize, row: usize) -> Cell {
        let Size { width, height } = self.shapes.size;
        let (x, y) = (self.x + column * width, self.y + row * height);
        let corner = screen.row(y)[x];
        let mut other = None;
        let mut bitmap = [0; MAX_HEIGHT];
        for (down, bits) in bitmap[..height].iter_mut().enumerate() {
            for &pixel in &screen.row(y + down)[x..x + width] {
                *bits <<= 1;
                if pixel != corner {
                    if *other.get_or_insert(pixel) != pixel {
                        return Cell::Image;
                    }
                    *bits |= 1;
                }
            }
        }
        match other {
            None => Cell::Blank(corner),
            Some(other) => Cell::Shape { bitmap, corner, other },
        }
    }
}
