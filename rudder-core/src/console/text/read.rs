//! Cells to characters.

use super::font::{self, Bitmap, Reading, Shapes, TALLEST};
use super::grid::{self, Cell, Grid};
use super::screen::{ScreenText, UNREAD};
use crate::console::Framebuffer;

/// Cells that may be hidden by a cursor are looked at closely; a screen with more unknown cells than this shows a picture.
const CURSORS: usize = 24;

/// Reads what a screen shows as text.
///
/// Cells are found wherever the console put them, in 8 × 16, 9 × 16 (VGA text mode) and 8 × 19 pixels (UEFI), and may have any two
/// colours. A cell that no known font explains is [`UNREAD`]; a screen without text gives a text without rows. Characters that the
/// screen's font draws alike are read as the ASCII one if there is one, else as the most usual one; a cell of a single colour is a
/// blank, whatever the colour, and so is a full block (`█`).
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
                // A shape that only one font has says more than one that all of them have.
                let readings = grid.shapes.readings(bitmap);
                readings.iter().for_each(|reading| votes[reading.font] += 60 / readings.len());
            }
            cells.push(cell);
        }
    }
    let paper = most_common(cells.iter());
    let mut chars = Vec::with_capacity(cells.len());
    let mut unknown = Vec::new();
    for line in cells.chunks(grid.columns.max(1)) {
        let paper = most_common(line.iter()).or(paper);
        for cell in line {
            let best = match cell {
                Cell::Blank(_) => Some(' '),
                Cell::Shape { bitmap, corner, other } => {
                    // Upside down, some shapes are another character: what is behind the text around it decides.
                    let turned = if Some(*corner) == paper {
                        Some(false)
                    } else {
                        (Some(*other) == paper).then_some(true)
                    };
                    choose(grid.shapes.readings(bitmap), &votes, turned)
                }
                Cell::Picture => None,
            };
            if best.is_none() {
                unknown.push(chars.len());
            }
            chars.push(best.unwrap_or(UNREAD));
        }
    }
    if unknown.len() <= CURSORS {
        for index in unknown {
            if let Some(char) = under_cursor(screen, grid, index, &votes) {
                chars[index] = char;
            }
        }
    }
    // GRUB's cursor in graphics mode looks like a block of one eighth: who draws a diagram draws more than one.
    let mut blocks = chars.iter_mut().filter(|char| **char == '▁');
    if let (Some(only), None) = (blocks.next(), blocks.next()) {
        *only = ' ';
    }
    ScreenText::new(grid.columns, chars)
}

/// The reading of the font that most of the screen is written in.
fn choose(readings: &[Reading], votes: &[usize], turned: Option<bool>) -> Option<char> {
    let best = readings.iter().min_by_key(|reading| {
        let unlikely = turned.is_some_and(|turned| turned != reading.corner);
        (std::cmp::Reverse(votes[reading.font]), reading.font, unlikely)
    });
    best.map(|reading| reading.char)
}

/// The colour of most blank cells.
fn most_common<'a>(cells: impl Iterator<Item = &'a Cell>) -> Option<[u8; 3]> {
    let mut seen: Vec<([u8; 3], usize)> = Vec::new();
    for cell in cells {
        if let Cell::Blank(colour) = cell {
            match seen.iter().position(|(known, _)| known == colour) {
                Some(index) => seen[index].1 += 1,
                None if seen.len() < 16 => seen.push((*colour, 1)), // more are a picture
                None => {}
            }
        }
    }
    seen.into_iter().max_by_key(|(_, count)| *count).map(|(colour, _)| colour)
}

/// The character of a cell of which a cursor (or an underline) covers some rows in the lower half, in whatever colour.
fn under_cursor(screen: &Framebuffer, grid: &Grid, index: usize, votes: &[usize]) -> Option<char> {
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
        // The rest of the cell must be of two colours.
        let mut other = None;
        let mut bitmap = [0; TALLEST];
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
        if let Some(char) = covered(grid.shapes, &bitmap, first..last, votes) {
            return Some(char);
        }
    }
    None
}

/// The character that has these pixels except for the hidden rows: the one with nothing under there, else the only one.
fn covered(shapes: &Shapes, seen: &Bitmap, hidden: std::ops::Range<usize>, votes: &[usize]) -> Option<char> {
    let same = |bitmap: &Bitmap| {
        (0..shapes.size.height).all(|row| hidden.contains(&row) || bitmap[row] == seen[row])
    };
    let mut candidates: Vec<_> = shapes.all().filter(|(bitmap, _)| same(bitmap)).collect();
    let readings = candidates.iter().flat_map(|(_, readings)| *readings);
    let font = readings.min_by_key(|reading| (std::cmp::Reverse(votes[reading.font]), reading.font))?.font;
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
    fn a_screen_is_read_at_any_offset_and_in_any_colours() {
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
    fn a_cursor_hides_nothing() {
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
    fn a_picture_is_not_text() {
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
