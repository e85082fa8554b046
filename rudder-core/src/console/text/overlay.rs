//! Characters in front of images: boot menus have a background, firmware draws a logo and writes over it.
//!
//! A character has one exact colour, whatever its background, and even if it casts a shadow. The colours of a screen's
//! text are those in which letters and digits appear on it.

use super::font::Reading;
use super::grid::{Cell, Grid, MIN_PIXELS};
use crate::console::Framebuffer;
use std::{cmp::Reverse, collections::HashMap};

/// Number of letters and digits in a colour that make it a colour of text.
const MIN_CHARACTERS: usize = 3;

/// Maximum number of colours of text.
const MAX_TEXT_COLOURS: usize = 16;

/// Returns the colours of text, the most common first; empty for a screen without text in front of an image.
pub(super) fn inks(screen: &Framebuffer, grid: &Grid, cells: &[Cell]) -> Vec<[u8; 3]> {
    let significant = |reading: &&Reading| reading.char.is_alphanumeric();
    let mut inks: HashMap<[u8; 3], usize> = HashMap::new();
    let mut in_front = 0;
    for (index, cell) in cells.iter().enumerate() {
        match cell {
            Cell::Blank(_) => {}
            Cell::Shape { bitmap, corner, other } => {
                if let Some(reading) = grid.shapes.readings(bitmap).iter().find(significant) {
                    *inks.entry(if reading.corner { *corner } else { *other }).or_default() += 1;
                }
            }
            Cell::Image => {
                let position = (index % grid.columns, index / grid.columns);
                let mut pixels: Vec<_> = grid.pixels(screen, position).flatten().copied().collect();
                pixels.sort_unstable();
                for same in pixels.chunk_by(|a, b| a == b).filter(|same| same.len() >= MIN_PIXELS as usize) {
                    let (bitmap, _) = grid.ink(screen, position, same[0]);
                    if grid.shapes.drawn(bitmap).any(|reading| significant(&reading)) {
                        *inks.entry(same[0]).or_default() += 1;
                        in_front += 1;
                    }
                }
            }
        }
    }
    if in_front < MIN_CHARACTERS {
        return Vec::new();
    }
    let mut inks: Vec<_> = inks.into_iter().filter(|(_, count)| *count >= MIN_CHARACTERS).collect();
    inks.sort_by_key(|(ink, count)| (Reverse(*count), *ink));
    inks.into_iter().map(|(ink, _)| ink).take(MAX_TEXT_COLOURS).collect()
}

/// Whether a character of two-coloured pixels is text, and not a stroke of an image, on a screen with text in front of
/// images.
pub(super) fn is_text(char: char, ink: [u8; 3], inks: &[[u8; 3]]) -> bool {
    inks.is_empty() || inks.contains(&ink) || char.is_alphanumeric()
}

/// What is in front of an image.
pub(super) enum Foreground<'a> {
    Nothing,
    Character(Vec<&'a Reading>),
    /// Pixels of a text's colour that are not, or not only, a known glyph.
    Unknown,
}

/// Returns what is in front of the image in a cell.
pub(super) fn foreground<'a>(
    screen: &Framebuffer,
    grid: &'a Grid,
    cell: (usize, usize),
    inks: &[[u8; 3]],
) -> Foreground<'a> {
    if inks.is_empty() {
        return Foreground::Unknown;
    }
    let mut has_ink = false;
    for ink in inks {
        let (bitmap, pixels) = grid.ink(screen, cell, *ink);
        if pixels == 0 {
            continue;
        }
        has_ink = true;
        // Block characters are not drawn in front of an image, but images have edges that look like them.
        let is_block = |reading: &&Reading| ('▀'..='▟').contains(&reading.char);
        let readings: Vec<_> = grid.shapes.drawn(bitmap).filter(|reading| !is_block(reading)).collect();
        if !readings.is_empty() {
            return Foreground::Character(readings);
        }
    }
    if has_ink { Foreground::Unknown } else { Foreground::Nothing }
}
