//! Converts cells to characters.

use super::font::{self, Bitmap, MAX_HEIGHT, Reading, Shapes};
use super::grid::{self, Cell, Grid};
use super::overlay::{self, Foreground};
use super::screen::{ScreenText, UNREAD};
use crate::console::Framebuffer;
use std::cmp::{Ordering, Reverse};

/// Maximum number of unknown cells that are examined for a cursor over a character; a screen with more of them shows an
/// image.
const MAX_CURSOR_CELLS: usize = 24;

/// Reads what a screen shows as text.
///
/// Cells are found wherever the console put them, in 8 × 16, 9 × 16 (VGA text mode), 8 × 19 pixels (UEFI) and the other
/// sizes that consoles have, up to 16 × 32; a screen has a single cell size. Cells may have any two colours, and a
/// character may be in front of an image. A cell that no known font explains is [`UNREAD`]; a screen without text
/// results in a text without rows. Characters that look alike in the screen's font are read as the ASCII one if there
/// is one, else as the most common one. A cell of a single colour is a blank, whatever the colour, and so is a full
/// block (`█`).
#[must_use]
pub fn read(screen: &Framebuffer) -> ScreenText {
    match grid::find(screen) {
        Some(grid) => read_grid(screen, &grid),
        None => ScreenText::new(0, Vec::new()),
    }
}

fn read_grid(screen: &Framebuffer, grid: &Grid) -> ScreenText {
    let mut cells = Vec::with_capacity(grid.rows * grid.columns);
    let mut votes = vec![0; font::count()];
    for row in 0..grid.rows {
        for column in 0..grid.columns {
            let cell = grid.cell(screen, column, row);
            if let Cell::Shape { bitmap, .. } = &cell {
                // A glyph that only one font has is stronger evidence than one that all of them have.
                let readings = grid.shapes.readings(bitmap);
                readings.iter().for_each(|reading| votes[reading.font] += 60 / readings.len());
            }
            cells.push(cell);
        }
    }
    let inks = overlay::inks(screen, grid, &cells);
    let everywhere = Backgrounds::of(&cells, grid.shapes);
    let mut chars = Vec::with_capacity(cells.len());
    let mut unknown = Vec::new();
    for (row, line) in cells.chunks(grid.columns.max(1)).enumerate() {
        let here = Backgrounds::of(line, grid.shapes);
        for (column, cell) in line.iter().enumerate() {
            let best = match cell {
                Cell::Blank(_) => Some(' '),
                Cell::Shape { bitmap, corner, other } => {
                    // Inverted, some glyphs are another character: the background of the surrounding text decides.
                    let inverted =
                        here.inverted(*corner, *other).or_else(|| everywhere.inverted(*corner, *other));
                    match choose(grid.shapes.readings(bitmap), &votes, inverted) {
                        Some(best) => {
                            let ink = if best.corner { *corner } else { *other };
                            Some(if overlay::is_text(best.char, ink, &inks) { best.char } else { ' ' })
                        }
                        None => (!inks.is_empty() && !inks.contains(corner) && !inks.contains(other))
                            .then_some(' '),
                    }
                }
                Cell::Image => match overlay::foreground(screen, grid, (column, row), &inks) {
                    Foreground::Nothing => Some(' '),
                    Foreground::Character(readings) => choose(readings, &votes, None).map(|best| best.char),
                    Foreground::Unknown => None,
                },
            };
            if best.is_none() {
                unknown.push(chars.len());
            }
            chars.push(best.unwrap_or(UNREAD));
        }
    }
    let few = unknown.len() <= MAX_CURSOR_CELLS;
    for index in unknown {
        if let Some(char) = under_cursor(screen, grid, index, few.then_some(&votes)) {
            chars[index] = char;
        }
    }
    // GRUB's cursor in graphics mode looks like a block of one eighth, but a diagram contains more than one.
    let mut blocks = chars.iter_mut().filter(|char| **char == '▁');
    if let (Some(only), None) = (blocks.next(), blocks.next()) {
        *only = ' ';
    }
    ScreenText::new(grid.columns, chars)
}

/// Chooses the reading of the font in which most of the screen is written.
fn choose<'a>(
    readings: impl IntoIterator<Item = &'a Reading>,
    votes: &[usize],
    inverted: Option<bool>,
) -> Option<&'a Reading> {
    readings.into_iter().min_by_key(|reading| {
        let unlikely = inverted.is_some_and(|inverted| inverted != reading.corner);
        (Reverse(votes[reading.font]), reading.font, unlikely)
    })
}

/// The background colours of text, derived from glyphs that are not another character when inverted.
struct Backgrounds {
    /// How often something is written in the second colour on the first.
    pairs: Vec<([[u8; 3]; 2], usize)>,
    blank_cells: Vec<([u8; 3], usize)>,
}

impl Backgrounds {
    /// A screen with more colours than this shows an image.
    const MAX_COLOURS: usize = 32;

    fn of(cells: &[Cell], shapes: &Shapes) -> Self {
        let mut backgrounds = Self { pairs: Vec::new(), blank_cells: Vec::new() };
        for cell in cells {
            match cell {
                Cell::Blank(colour) => count(&mut backgrounds.blank_cells, *colour),
                Cell::Shape { bitmap, corner, other } => {
                    let mut corners = shapes.readings(bitmap).iter().map(|reading| reading.corner);
                    if let Some(first) = corners.next()
                        && corners.all(|corner| corner == first)
                    {
                        count(
                            &mut backgrounds.pairs,
                            if first { [*other, *corner] } else { [*corner, *other] },
                        );
                    }
                }
                Cell::Image => {}
            }
        }
        backgrounds
    }

    /// Whether the pixel at the top left belongs to the character, judged by its colour and the other colour of its
    /// cell.
    fn inverted(&self, corner: [u8; 3], other: [u8; 3]) -> Option<bool> {
        let pairs = count_of(&self.pairs, [corner, other]).cmp(&count_of(&self.pairs, [other, corner]));
        match pairs.then(count_of(&self.blank_cells, corner).cmp(&count_of(&self.blank_cells, other))) {
            Ordering::Greater => Some(false),
            Ordering::Less => Some(true),
            Ordering::Equal => None,
        }
    }
}

fn count<T: PartialEq>(counts: &mut Vec<(T, usize)>, value: T) {
    match counts.iter().position(|(known, _)| *known == value) {
        Some(index) => counts[index].1 += 1,
        None if counts.len() < Backgrounds::MAX_COLOURS => counts.push((value, 1)),
        None => {}
    }
}

fn count_of<T: PartialEq>(counts: &[(T, usize)], value: T) -> usize {
    counts.iter().find(|(known, _)| *known == value).map_or(0, |(_, count)| *count)
}

/// Returns the character of a cell in which a cursor (or an underline) covers some rows in the lower half, in any
/// colour. Without votes, only a blank is recognised.
fn under_cursor(screen: &Framebuffer, grid: &Grid, index: usize, votes: Option<&Vec<usize>>) -> Option<char> {
    let size = grid.shapes.size;
    let (x, y) = (grid.x + index % grid.columns * size.width, grid.y + index / grid.columns * size.height);
    let line = |down: usize| &screen.row(y + down)[x..x + size.width];
    let uniform = |down: usize| line(down).iter().all(|pixel| *pixel == line(down)[0]).then(|| line(down)[0]);
    let corner = line(0)[0];
    for first in size.height / 2..size.height {
        let Some(colour) = uniform(first).filter(|colour| *colour != corner) else { continue };
        let last = (first..size.height).take_while(|&down| uniform(down) == Some(colour)).count() + first;
        if last - first > 5 {
            continue;
        }
        // The rest of the cell must not have more than two colours.
        let mut other = None;
        let mut bitmap = [0; MAX_HEIGHT];
        let mut plain = true;
        for down in (0..first).chain(last..size.height) {
            for &pixel in line(down) {
                bitmap[down] <<= 1;
                if pixel != corner {
                    plain &= *other.get_or_insert(pixel) == pixel;
                    bitmap[down] |= 1;
                }
            }
        }
        if !plain {
            continue;
        }
        if other.is_none() {
            return Some(' ');
        }
        if let Some(votes) = votes
            && let Some(char) = covered(grid.shapes, &bitmap, first..last, votes)
        {
            return Some(char);
        }
    }
    None
}

/// Returns the character that has these pixels outside of the hidden rows: the one without pixels in those, else the
/// only candidate.
fn covered(
    shapes: &Shapes,
    visible: &Bitmap,
    hidden: std::ops::Range<usize>,
    votes: &[usize],
) -> Option<char> {
    let same = |bitmap: &Bitmap| {
        (0..shapes.size.height).all(|row| hidden.contains(&row) || bitmap[row] == visible[row])
    };
    let mut candidates: Vec<_> = shapes.all().filter(|(bitmap, _)| same(bitmap)).collect();
    let readings = candidates.iter().flat_map(|(_, readings)| *readings);
    let font = readings.min_by_key(|reading| (Reverse(votes[reading.font]), reading.font))?.font;
    candidates.retain(|(_, readings)| readings.iter().any(|reading| reading.font == font));
    let plain = candidates.iter().find(|(bitmap, _)| bitmap[hidden.clone()].iter().all(|row| *row == 0));
    let only = if candidates.len() == 1 { candidates.first() } else { None };
    let (_, readings) = plain.or(only)?;
    readings.iter().find(|reading| reading.font == font).map(|reading| reading.char)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::console::text::draw;

    const GREY: [u8; 3] = [170; 3];
    const BLACK: [u8; 3] = [0; 3];

    #[test]
    fn text_is_read_at_any_offset_and_in_any_colours() {
        for (x, y) in [(0, 0), (3, 5), (240, 105)] {
            let mut screen = Framebuffer::new(1024, 768);
            draw(&mut screen, (x, y), "localhost login: root", GREY, BLACK);
            draw(
                &mut screen,
                (x, y + 16),
                "Password: \"~!@#$%^&*()_+`-={}[]|\\:;'<>?,./\"",
                [250, 10, 20],
                [0, 0, 90],
            );
            draw(&mut screen, (x + 8, y + 48), "  Selected item  ", BLACK, GREY);
            let text = read(&screen);
            assert_eq!(text.unread(), 0, "{text}");
            assert!(text.contains("localhost login: root"), "{text}");
            assert!(text.contains("Password: \"~!@#$%^&*()_+`-={}[]|\\:;'<>?,./\" Selected item"), "{text}");
        }
    }

    #[test]
    fn text_under_a_cursor_is_read() {
        for (char, colour) in [(' ', GREY), ('e', GREY), ('k', [255, 0, 0])] {
            let mut screen = Framebuffer::new(640, 480);
            draw(&mut screen, (0, 0), "the prompt and its cursor:", GREY, BLACK);
            draw(&mut screen, (0, 16), &format!("> {char}x"), GREY, BLACK);
            for y in 29..31 {
                screen.row_mut(y)[16..24].fill(colour);
            }
            assert!(read(&screen).contains(&format!("> {char}x")), "{}", read(&screen));
        }
    }

    #[test]
    fn a_character_that_a_cursor_makes_ambiguous_is_not_guessed() {
        let mut screen = Framebuffer::new(640, 480);
        draw(&mut screen, (0, 0), "Debug", GREY, BLACK); // or q, whose tail is hidden as well
        for y in 13..15 {
            screen.row_mut(y)[32..40].fill(GREY);
        }
        assert_eq!(read(&screen).to_string(), "Debu\u{fffd}");
    }

    #[test]
    fn an_image_is_not_read_as_text() {
        let mut screen = Framebuffer::new(320, 200);
        assert_eq!(read(&screen).to_string(), "");
        assert_eq!(read(&Framebuffer::new(0, 0)).columns(), 0);
        assert_eq!(read(&Framebuffer::new(5, 3)).share_read(), 1.0);
        for y in 0..200 {
            for (x, pixel) in screen.row_mut(y).iter_mut().enumerate() {
                *pixel = [(x * 7 % 256) as u8, (y * 3) as u8, (x * y % 251) as u8];
            }
        }
        assert_eq!(read(&screen).to_string(), "");
    }
}
