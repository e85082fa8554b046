//! Characters in front of pictures: boot menus have a background, firmware draws a logo and writes over it.
//!
//! A character has one exact colour, whatever is behind it or casts a shadow around it. The colours of a screen's text are those in
//! which letters and digits stand on it.

use super::font::Reading;
use super::grid::{Cell, Grid, TELLING};
use crate::console::Framebuffer;
use std::{cmp::Reverse, collections::HashMap};

/// As many letters and digits of a colour as this make it a colour of text.
const WORD: usize = 3;

/// As many colours of text are looked for.
const COLOURS: usize = 16;

/// The colours of text, the most usual first; none for a screen that has no text in front of a picture.
pub(super) fn inks(screen: &Framebuffer, grid: &Grid, cells: &[Cell]) -> Vec<[u8; 3]> {
    let telling = |reading: &&Reading| reading.char.is_alphanumeric();
    let mut inks: HashMap<[u8; 3], usize> = HashMap::new();
    let mut in_front = 0;
    for (index, cell) in cells.iter().enumerate() {
        match cell {
            Cell::Blank(_) => {}
            Cell::Shape { bitmap, corner, other } => {
                if let Some(reading) = grid.shapes.readings(bitmap).iter().find(telling) {
                    *inks.entry(if reading.corner { *corner } else { *other }).or_default() += 1;
                }
            }
            Cell::Picture => {
                let place = (index % grid.columns, index / grid.columns);
                let mut pixels: Vec<_> = grid.pixels(screen, place).flatten().copied().collect();
                pixels.sort_unstable();
                for same in pixels.chunk_by(|a, b| a == b).filter(|same| same.len() >= TELLING as usize) {
                    let (bitmap, _) = grid.ink(screen, place, same[0]);
                    if grid.shapes.drawn(bitmap).any(|reading| telling(&reading)) {
                        *inks.entry(same[0]).or_default() += 1;
                        in_front += 1;
                    }
                }
            }
        }
    }
    if in_front < WORD {
        return Vec::new();
    }
    let mut inks: Vec<_> = inks.into_iter().filter(|(_, count)| *count >= WORD).collect();
    inks.sort_by_key(|(ink, count)| (Reverse(*count), *ink));
    inks.into_iter().map(|(ink, _)| ink).take(COLOURS).collect()
}

/// Whether a character of two-coloured pixels is text, not a stroke of a picture, where text stands in front of pictures.
pub(super) fn is_text(char: char, ink: [u8; 3], inks: &[[u8; 3]]) -> bool {
    inks.is_empty() || inks.contains(&ink) || char.is_alphanumeric()
}

/// What stands in front of a picture.
pub(super) enum Front<'a> {
    Nothing,
    Character(Vec<&'a Reading>),
    /// Pixels of a text's colour that are no known shape, or not only.
    Unknown,
}

/// What stands in front of the picture in a cell.
pub(super) fn front<'a>(
    screen: &Framebuffer,
    grid: &'a Grid,
    cell: (usize, usize),
    inks: &[[u8; 3]],
) -> Front<'a> {
    if inks.is_empty() {
        return Front::Unknown;
    }
    let mut seen = false;
    for ink in inks {
        let (bitmap, pixels) = grid.ink(screen, cell, *ink);
        if pixels == 0 {
            continue;
        }
        seen = true;
        // Nobody draws with blocks in front of a picture, but pictures have edges.
        let is_block = |reading: &&Reading| ('▀'..='▟').contains(&reading.char);
        let readings: Vec<_> = grid.shapes.drawn(bitmap).filter(|reading| !is_block(reading)).collect();
        if !readings.is_empty() {
            return Front::Character(readings);
        }
    }
    if seen { Front::Unknown } else { Front::Nothing }
}
