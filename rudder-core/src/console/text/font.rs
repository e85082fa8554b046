//! The shapes of the characters of consoles, from the tables in `fonts/` (made by `tools/fonts/make`).

use std::collections::{HashMap, HashSet};
use std::sync::LazyLock;

use crate::console::Framebuffer;

/// Size of a cell in pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Size {
    pub(super) width: usize,
    pub(super) height: usize,
}

/// No cell is taller.
pub(super) const TALLEST: usize = 32;

/// The pixels of a cell: one number for each row from the top, the pixel at the left in the highest of `width` bits.
pub(super) type Bitmap = [u16; TALLEST];

/// How a shape can be read.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reading {
    /// Which font has it, as an index into [`FONTS`].
    pub(super) font: usize,
    pub(super) char: char,
    /// Whether the pixel at the top left belongs to the character, not to what is behind it.
    pub(super) corner: bool,
}

struct Font {
    name: &'static str,
    table: &'static str,
    height: usize,
    /// Whether VGA text mode may show it, in cells of 9 pixels.
    vga: bool,
}

macro_rules! font {
    ($name:literal, $height:literal, $vga:literal) => {
        Font {
            name: $name,
            table: include_str!(concat!("fonts/", $name, ".hex")),
            height: $height,
            vga: $vga,
        }
    };
}

/// In the order in which they are preferred where a screen does not tell.
static FONTS: [Font; 8] = [
    font!("bios-8x16", 16, true),
    font!("linux-8x16", 16, true),
    font!("unifont-8x16", 16, false),
    font!("fixed-8x16", 16, true),
    font!("terminus-8x16", 16, true),
    font!("terminus-bold-8x16", 16, true),
    font!("vga-8x16", 16, true),
    font!("edk2-8x19", 19, false),
];

/// All shapes of one size of cell.
pub(super) struct Shapes {
    pub(super) size: Size,
    known: HashMap<Bitmap, Vec<Reading>>,
}

/// The shapes of every size of cell that consoles use, the most usual first.
pub(super) static SHAPES: LazyLock<[Shapes; 3]> = LazyLock::new(|| {
    let mut narrow = Shapes::of(8, 16);
    let mut wide = Shapes::of(9, 16);
    let mut tall = Shapes::of(8, 19);
    for (index, font) in FONTS.iter().enumerate() {
        for (chars, bitmap) in font.glyphs() {
            let Some(&char) = chars.first() else { continue };
            if font.height == 19 {
                tall.add(index, char, bitmap);
                continue;
            }
            narrow.add(index, char, bitmap);
            if font.vga {
                // A ninth column is blank, or repeats the eighth where the adapter takes the character for line graphics.
                let blank = bitmap.map(|row| row << 1);
                let repeated = bitmap.map(|row| row << 1 | row & 1);
                wide.add(index, char, blank);
                if repeated != blank {
                    wide.add(index, char, repeated);
                }
            }
        }
    }
    [narrow, wide, tall]
});

/// Characters that some font draws alike: the one that is read, and the other.
static ALIKE: LazyLock<HashSet<(char, char)>> = LazyLock::new(|| {
    let glyphs = FONTS.iter().flat_map(Font::glyphs);
    glyphs
        .flat_map(|(chars, _)| chars.iter().skip(1).map(|&other| (chars[0], other)).collect::<Vec<_>>())
        .collect()
});

/// Whether a character that was read may stand for one that is looked for.
pub(super) fn alike(read: char, wanted: char) -> bool {
    read == wanted || (!wanted.is_ascii() && ALIKE.contains(&(read, wanted)))
}

/// How many fonts there are.
pub(super) fn count() -> usize {
    FONTS.len()
}

impl Font {
    /// Each shape with the characters that it stands for, the one to read first.
    fn glyphs(&self) -> impl Iterator<Item = (Vec<char>, Bitmap)> {
        self.table.lines().map(|line| {
            let glyph = glyph(line);
            debug_assert!(glyph.is_some(), "{}: {line}", self.name);
            glyph.unwrap_or((Vec::new(), [0; TALLEST]))
        })
    }
}

/// A line of a table: `0041,0410:` and two hexadecimal digits for each row.
fn glyph(line: &str) -> Option<(Vec<char>, Bitmap)> {
    let (codes, rows) = line.split_once(':')?;
    let chars = codes
        .split(',')
        .map(|code| char::from_u32(u32::from_str_radix(code, 16).ok()?))
        .collect::<Option<_>>()?;
    let mut bitmap = [0; TALLEST];
    for (row, digits) in bitmap.iter_mut().zip(rows.as_bytes().chunks(2)) {
        *row = u16::from_str_radix(str::from_utf8(digits).ok()?, 16).ok()?;
    }
    Some((chars, bitmap))
}

impl Shapes {
    fn of(width: usize, height: usize) -> Self {
        Self { size: Size { width, height }, known: HashMap::new() }
    }

    fn add(&mut self, font: usize, char: char, bitmap: Bitmap) {
        let (bitmap, corner) = self.size.turned(bitmap);
        self.known.entry(bitmap).or_default().push(Reading { font, char, corner });
    }

    /// How a shape can be read whose pixel at the top left is 0; nothing when no font has it.
    pub(super) fn readings(&self, bitmap: &Bitmap) -> &[Reading] {
        self.known.get(bitmap).map_or(&[], Vec::as_slice)
    }

    /// All shapes, to look for one that is partly covered.
    pub(super) fn all(&self) -> impl Iterator<Item = (&Bitmap, &[Reading])> {
        self.known.iter().map(|(bitmap, readings)| (bitmap, readings.as_slice()))
    }
}

impl Size {
    /// The same shape with 0 at the top left, and whether that took exchanging ones and zeros.
    pub(super) fn turned(self, mut bitmap: Bitmap) -> (Bitmap, bool) {
        let corner = bitmap[0] >> (self.width - 1) & 1 == 1;
        if corner {
            let full = self.full_row();
            bitmap[..self.height].iter_mut().for_each(|row| *row ^= full);
        }
        (bitmap, corner)
    }

    /// A row of ones.
    pub(super) fn full_row(self) -> u16 {
        u16::MAX >> (16 - self.width)
    }
}

/// Draws a line of text the way a PC's BIOS does, in cells of 8 × 16 pixels with the first one at `(x, y)`: screens for tests and
/// for simulated machines. A character that the BIOS has no shape for is left blank; what is over the edge of the screen is cut.
pub fn draw(screen: &mut Framebuffer, (x, y): (usize, usize), text: &str, ink: [u8; 3], paper: [u8; 3]) {
    static BIOS: LazyLock<HashMap<char, Bitmap>> = LazyLock::new(|| {
        FONTS[0]
            .glyphs()
            .flat_map(|(chars, bitmap)| chars.into_iter().map(move |char| (char, bitmap)))
            .collect()
    });
    for (at, char) in text.chars().enumerate() {
        paint(
            screen,
            (x + 8 * at, y),
            Size { width: 8, height: 16 },
            &BIOS.get(&char).copied().unwrap_or([0; TALLEST]),
            ink,
            paper,
        );
    }
}

/// Draws one cell.
fn paint(
    screen: &mut Framebuffer,
    (x, y): (usize, usize),
    size: Size,
    bitmap: &Bitmap,
    ink: [u8; 3],
    paper: [u8; 3],
) {
    let rows = screen.height().saturating_sub(y).min(size.height);
    for (down, bits) in bitmap[..rows].iter().enumerate() {
        let cell = screen.row_mut(y + down).iter_mut().skip(x).take(size.width);
        for (right, pixel) in cell.enumerate() {
            *pixel = if bits >> (size.width - 1 - right) & 1 == 1 { ink } else { paper };
        }
    }
}
