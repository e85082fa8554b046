//! Any text in any known font is read back, at any position and in any colours.
#![allow(clippy::unwrap_used)]

use super::font::{self, Bitmap, MAX_HEIGHT, Size};
use super::{ScreenText, read};
use crate::console::Framebuffer;
use proptest::prelude::*;

type Colour = [u8; 3];

/// Draws the glyphs of a line side by side.
fn draw(
    screen: &mut Framebuffer,
    (x, y): (usize, usize),
    size: Size,
    line: &[(char, Bitmap)],
    colours: [Colour; 2],
) {
    for (at, (_, bitmap)) in line.iter().enumerate() {
        font::paint(screen, (x + at * size.width, y), size, bitmap, colours[0], colours[1]);
    }
}

/// Whether the characters appear side by side somewhere on the screen.
fn shows(text: &ScreenText, line: &[(char, Bitmap)]) -> bool {
    let same = |(read, (expected, _)): (&char, &(char, Bitmap))| {
        font::alike(*read, *expected) || (*read == ' ' && ['█', '▁'].contains(expected)) // as `read` says
    };
    text.rows().any(|row| row.windows(line.len()).any(|cells| cells.iter().zip(line).all(same)))
}

fn colour() -> impl Strategy<Value = Colour> {
    prop_oneof![Just([0; 3]), Just([170; 3]), Just([255; 3]), any::<Colour>()]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_text_in_any_font_is_read_back(
        font in 0..font::count(),
        in_text_mode in any::<bool>(),
        (x, y) in (0..80usize, 0..60usize),
        chosen in prop::collection::vec(any::<prop::sample::Index>(), 1..30),
        inverse in any::<bool>(),
        colours in [colour(), colour()].prop_filter("two colours", |[ink, background]| ink != background),
        more in [colour(), colour()].prop_filter("two colours", |[ink, background]| ink != background),
    ) {
        let (size, glyphs) = font::glyphs(font, in_text_mode);
        let blank = (' ', [0; MAX_HEIGHT]);
        let ascii: Vec<_> = glyphs.iter().filter(|(char, _)| char.is_ascii()).copied().collect();
        let chosen: Vec<_> =
            chosen.iter().map(|index| *index.get(&glyphs)).chain([blank]).collect();
        let mut screen = Framebuffer::new(480, 300);
        for row in 0..300 {
            screen.row_mut(row).fill(colours[1]);
        }
        let columns = (480 - x) / size.width;
        let chosen = &chosen[..chosen.len().min(columns)];
        let last = if inverse { [colours[1], colours[0]] } else { more };
        // The screen's font and colours are determined from the rest of its text.
        let mut lines = vec![(chosen, last), (chosen, colours)];
        lines.extend(ascii.chunks(columns).map(|line| (line, colours)).take((300 - y) / size.height - 2));
        for (row, (line, colours)) in lines.iter().enumerate() {
            draw(&mut screen, (x, y + row * size.height), size, line, *colours);
        }
        let text = read(&screen);
        for (line, _) in lines {
            let expected = line.iter().map(|(char, _)| char).collect::<String>();
            prop_assert!(shows(&text, line), "expected {:?}, but read\n{}", expected, text);
        }
    }

}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]

    #[test]
    fn text_in_front_of_an_image_is_read(
        (x, y) in (0..80usize, 0..60usize),
        noise in any::<[u8; 6]>(),
        shadow in any::<bool>(),
    ) {
        let (size, glyphs) = font::glyphs(0, false);
        let mut screen = Framebuffer::new(480, 200);
        for row in 0..200 {
            for (column, pixel) in screen.row_mut(row).iter_mut().enumerate() {
                let [a, b, c, d, e, f] = noise.map(usize::from);
                *pixel = [(column * a + row * b) >> 4, (column * c + row * d) >> 5, (column ^ row) * e + f].map(|value| (value % 200) as u8);
            }
        }
        let line: Vec<_> = "Debian GNU/Linux installer menu"
            .chars()
            .map(|expected| glyphs.iter().find(|(char, _)| *char == expected).copied().unwrap_or((' ', [0; MAX_HEIGHT])))
            .collect();
        for (offset, colour) in [(1, [0, 0, 0]), (0, [255; 3])].into_iter().skip(usize::from(!shadow)) {
            for (at, (_, bitmap)) in line.iter().enumerate() {
                for (down, bits) in bitmap.iter().take(size.height).enumerate() {
                    for right in (0..size.width).filter(|right| bits >> (size.width - 1 - right) & 1 == 1) {
                        screen.row_mut(y + down + offset)[x + at * size.width + right + offset] = colour;
                    }
                }
            }
        }
        let text = read(&screen);
        prop_assert!(text.contains("Debian GNU/Linux installer menu"), "{}", text);
    }
}
