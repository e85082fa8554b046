//! The screen that viewers share, and when each part of it last changed.
//!
//! It is divided into tiles. Each has the number of the change that touched it last, so that a viewer finds what it has not been
//! sent by comparing numbers, and a viewer that is slow is sent the latest pixels once, whatever happened in between.

use rudder_core::console::Framebuffer;
use std::ops::Range;

/// The width and height of a tile, in pixels. Those at the right and at the bottom may be smaller.
pub(super) const TILE: usize = 64;

/// A rectangle of a screen, in pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Area {
    pub(super) x: usize,
    pub(super) y: usize,
    pub(super) width: usize,
    pub(super) height: usize,
}

impl Area {
    /// Returns the area of this size at the upper left.
    pub(super) fn of_size((width, height): (usize, usize)) -> Self {
        Self { x: 0, y: 0, width, height }
    }

    pub(super) fn is_empty(self) -> bool {
        self.width == 0 || self.height == 0
    }

    /// Returns what both cover.
    pub(super) fn intersection(self, other: Self) -> Self {
        let along = |one: usize, length: usize, two: usize, extent: usize| {
            let start = one.max(two);
            (start, (one + length).min(two + extent).saturating_sub(start))
        };
        let (x, width) = along(self.x, self.width, other.x, other.width);
        let (y, height) = along(self.y, self.height, other.y, other.height);
        Self { x, y, width, height }
    }

    /// Returns the smallest area that covers both.
    pub(super) fn union(self, other: Self) -> Self {
        if self.is_empty() || other.is_empty() {
            return if self.is_empty() { other } else { self };
        }
        let (x, y) = (self.x.min(other.x), self.y.min(other.y));
        let right = (self.x + self.width).max(other.x + other.width);
        let bottom = (self.y + self.height).max(other.y + other.height);
        Self { x, y, width: right - x, height: bottom - y }
    }
}

/// The columns and rows of the tiles that cover a screen of this size.
pub(super) fn grid((width, height): (usize, usize)) -> (usize, usize) {
    (width.div_ceil(TILE), height.div_ceil(TILE))
}

/// The area of a tile on a screen of this size.
pub(super) fn tile_area((column, row): (usize, usize), size: (usize, usize)) -> Area {
    let tile = Area { x: column * TILE, y: row * TILE, width: TILE, height: TILE };
    tile.intersection(Area::of_size(size))
}

/// The pixels of a screen with the numbers of their changes.
#[derive(Debug)]
pub(super) struct Screen {
    frame: Framebuffer,
    /// The number of the last change.
    change: u64,
    /// The number of the change that touched each tile, row by row.
    tiles: Vec<u64>,
    /// The number of the change that set the size.
    resized: u64,
}

impl Screen {
    /// Returns a black screen. Its first change, number one, is that it exists.
    pub(super) fn new(size: (usize, usize)) -> Self {
        let mut screen = Self { frame: Framebuffer::new(0, 0), change: 0, tiles: Vec::new(), resized: 0 };
        screen.replace(Framebuffer::new(size.0, size.1));
        screen
    }

    pub(super) fn frame(&self) -> &Framebuffer {
        &self.frame
    }

    pub(super) fn size(&self) -> (usize, usize) {
        (self.frame.width(), self.frame.height())
    }

    /// Returns the number of the last change.
    pub(super) fn change(&self) -> u64 {
        self.change
    }

    /// Returns the number of the last change of a tile. What is beyond the screen changes with its size.
    pub(super) fn tile_change(&self, (column, row): (usize, usize)) -> u64 {
        let (columns, rows) = grid(self.size());
        if column < columns && row < rows { self.tiles[row * columns + column] } else { self.resized }
    }

    /// Shows a screen that may have another size. Everything counts as changed.
    pub(super) fn replace(&mut self, frame: Framebuffer) {
        let (columns, rows) = grid((frame.width(), frame.height()));
        self.frame = frame;
        self.change += 1;
        self.resized = self.change;
        self.tiles = vec![self.change; columns * rows];
    }

    /// Shows what was drawn to rows of a copy of the screen. Returns whether anything changed.
    pub(super) fn draw(&mut self, drawn: &Framebuffer, rows: Range<usize>) -> bool {
        let change = self.change + 1;
        let (columns, _) = grid(self.size());
        for y in rows {
            // Bytes are compared at once, pixels would be compared one by one.
            let (old, new) = (self.frame.row_mut(y), drawn.row(y));
            if old.as_flattened() == new.as_flattened() {
                continue;
            }
            let tiles = &mut self.tiles[y / TILE * columns..][..columns];
            for ((old, new), tile) in old.chunks_mut(TILE).zip(new.chunks(TILE)).zip(tiles) {
                if old.as_flattened() != new.as_flattened() {
                    old.copy_from_slice(new);
                    *tile = change;
                    self.change = change;
                }
            }
        }
        self.change == change
    }

    /// Returns a copy of an area. What is beyond the screen is black.
    pub(super) fn copy(&self, area: Area) -> Framebuffer {
        let mut copy = Framebuffer::new(area.width, area.height);
        let shown = area.intersection(Area::of_size(self.size()));
        for y in shown.y..shown.y + shown.height {
            let pixels = &self.frame.row(y)[shown.x..][..shown.width];
            copy.row_mut(y - area.y)[shown.x - area.x..][..shown.width].copy_from_slice(pixels);
        }
        copy
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn area() -> impl Strategy<Value = Area> {
        (0..200usize, 0..200usize, 0..200usize, 0..200usize).prop_map(|(x, y, width, height)| Area {
            x,
            y,
            width,
            height,
        })
    }

    fn covers(area: Area, (x, y): (usize, usize)) -> bool {
        (area.x..area.x + area.width).contains(&x) && (area.y..area.y + area.height).contains(&y)
    }

    proptest! {
        #[test]
        fn areas_intersect_and_unite(one in area(), two in area(), at in (0..400usize, 0..400usize)) {
            let both = covers(one, at) && covers(two, at);
            prop_assert_eq!(covers(one.intersection(two), at), both);
            if covers(one, at) || covers(two, at) {
                prop_assert!(covers(one.union(two), at));
            }
        }

        /// A tile has a new number exactly if one of its pixels changed.
        #[test]
        fn tiles_that_changed_are_known(
            size in (1..300usize, 1..300usize),
            pixels in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), any::<bool>()), 0..10),
        ) {
            let mut screen = Screen::new(size);
            let mut drawn = screen.frame().clone();
            let mut changed = Vec::new();
            for (x, y, differs) in pixels {
                let (x, y) = (x.index(size.0), y.index(size.1));
                if differs {
                    drawn.row_mut(y)[x] = [9; 3];
                    changed.push((x / TILE, y / TILE));
                }
            }
            let before = screen.change();
            prop_assert_eq!(screen.draw(&drawn, 0..size.1), !changed.is_empty());
            prop_assert_eq!(screen.frame(), &drawn);
            let (columns, rows) = grid(size);
            for tile in (0..rows).flat_map(|row| (0..columns).map(move |column| (column, row))) {
                prop_assert_eq!(screen.tile_change(tile) > before, changed.contains(&tile), "{:?}", tile);
            }
        }
    }

    #[test]
    fn what_is_beyond_the_screen_is_black_and_changes_with_its_size() {
        let mut screen = Screen::new((2, 1));
        let mut frame = Framebuffer::new(2, 1);
        frame.row_mut(0)[1] = [1, 2, 3];
        screen.draw(&frame, 0..1);
        let copy = screen.copy(Area { x: 1, y: 0, width: 2, height: 2 });
        assert_eq!(copy.row(0), [[1, 2, 3], [0; 3]]);
        assert_eq!(copy.row(1), [[0; 3]; 2]);
        assert_eq!(screen.tile_change((5, 5)), 1);
        screen.replace(Framebuffer::new(70, 1));
        assert_eq!((screen.change(), screen.tile_change((5, 5)), screen.tile_change((1, 0))), (3, 3, 3));
        assert_eq!(screen.copy(Area { x: 100, y: 100, width: 1, height: 1 }), Framebuffer::new(1, 1));
    }
}
