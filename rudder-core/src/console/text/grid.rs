//! Where on a screen the cells of a console are, and what is in one.

use super::font::{Bitmap, SHAPES, Shapes, Size, TALLEST};
use crate::console::Framebuffer;

/// The cells of a console: the size of one, and where the first is. What is left over at the edges of the screen belongs to none.
#[derive(Clone, Copy)]
pub(super) struct Grid {
    pub(super) shapes: &'static Shapes,
    pub(super) x: usize,
    pub(super) y: usize,
    pub(super) columns: usize,
    pub(super) rows: usize,
}

/// What is in a cell.
pub(super) enum Cell {
    /// One colour.
    Blank([u8; 3]),
    /// Two colours: those pixels are set that are not of the `corner`'s colour, which is that of the pixel at the top left.
    Shape { bitmap: Bitmap, corner: [u8; 3], other: [u8; 3] },
    /// More than two colours: no glyph.
    Picture,
}

/// How many places are looked at to compare all grids with each other, and then to compare the best ones.
const FEW: usize = 64;
const MANY: usize = 256;

/// The grid that makes most sense of a screen; none for a screen without any edge, or on which nothing is text in any grid.
pub(super) fn find(screen: &Framebuffer) -> Option<Grid> {
    let places = edges(screen, MANY);
    let enough = places.len() - places.len() / 20; // a cursor, a logo
    let usual = SHAPES.iter().flat_map(|shapes| {
        let Size { width, height } = shapes.size;
        // At the corner of the screen, or with equal borders.
        [(0, 0), (screen.width() % width / 2, screen.height() % height / 2)]
            .map(|(x, y)| Grid::new(screen, shapes, x, y))
    });
    let usual = best(screen, usual, &places);
    if let Some((grid, read)) = usual
        && read >= enough
    {
        return Some(grid);
    }
    let few: Vec<_> = places.iter().step_by(places.len().div_ceil(FEW).max(1)).copied().collect();
    let mut all: Vec<_> = SHAPES
        .iter()
        .flat_map(|shapes| {
            (0..shapes.size.height).flat_map(move |y| (0..shapes.size.width).map(move |x| (shapes, x, y)))
        })
        .map(|(shapes, x, y)| Grid::new(screen, shapes, x, y))
        .map(|grid| (grid.read_of(screen, &few), grid))
        .filter(|(read, _)| *read > 0)
        .collect();
    all.sort_by_key(|(read, _)| std::cmp::Reverse(*read)); // stable: the usual sizes stay in front
    let found = all.into_iter().take(16).map(|(_, grid)| grid);
    best(screen, usual.map(|(grid, _)| grid).into_iter().chain(found), &places).map(|(grid, _)| grid)
}

/// The first of the grids in which most of the places are text, and how many are.
fn best(
    screen: &Framebuffer,
    grids: impl Iterator<Item = Grid>,
    places: &[(usize, usize)],
) -> Option<(Grid, usize)> {
    let mut best = None;
    for grid in grids {
        let read = grid.read_of(screen, places);
        if read > best.map_or(0, |(_, most)| most) {
            best = Some((grid, read));
        }
    }
    best
}

/// Places where a pixel differs from the one at its left, spread over the screen.
fn edges(screen: &Framebuffer, count: usize) -> Vec<(usize, usize)> {
    let mut all = Vec::new();
    for y in (0..screen.height()).step_by(3) {
        let row = screen.row(y);
        all.extend((1..row.len()).filter(|&x| row[x] != row[x - 1]).map(|x| (x, y)));
    }
    let step = all.len().div_ceil(count).max(1);
    all.into_iter().step_by(step).collect()
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

    /// How many of the places are in cells with a known shape.
    fn read_of(&self, screen: &Framebuffer, places: &[(usize, usize)]) -> usize {
        let known = |&&(x, y): &&(usize, usize)| {
            let (Some(x), Some(y)) = (x.checked_sub(self.x), y.checked_sub(self.y)) else { return false };
            let (column, row) = (x / self.shapes.size.width, y / self.shapes.size.height);
            column < self.columns
                && row < self.rows
                && matches!(self.cell(screen, column, row), Cell::Shape { bitmap, .. } if !self.shapes.readings(&bitmap).is_empty())
        };
        places.iter().filter(known).count()
    }

    /// What is in a cell.
    pub(super) fn cell(&self, screen: &Framebuffer, column: usize, row: usize) -> Cell {
        let Size { width, height } = self.shapes.size;
        let (x, y) = (self.x + column * width, self.y + row * height);
        let corner = screen.row(y)[x];
        let mut other = None;
        let mut bitmap = [0; TALLEST];
        for (down, bits) in bitmap[..height].iter_mut().enumerate() {
            for &pixel in &screen.row(y + down)[x..x + width] {
                *bits <<= 1;
                if pixel != corner {
                    if *other.get_or_insert(pixel) != pixel {
                        return Cell::Picture;
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
