//! The glyphs of console fonts, from the tables in `fonts/`, which `tools/fonts/make` generates.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::LazyLock;

use crate::console::Framebuffer;

/// Size of a cell in pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Size {
    pub(super) width: usize,
    pub(super) height: usize,
}

/// Maximum width of a cell.
pub(super) const MAX_WIDTH: usize = 16;

/// Maximum height of a cell.
pub(super) const MAX_HEIGHT: usize = 32;

/// The pixels of a cell: one number per row from the top, with the leftmost pixel in the highest of `width` bits.
pub(super) type Bitmap = [u16; MAX_HEIGHT];

/// A way to read a glyph.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reading {
    /// The font that contains it, as an index into [`FONTS`].
    pub(super) font: usize,
    pub(super) char: char,
    /// Whether the pixel at the top left belongs to the character and not to its background.
    pub(super) corner: bool,
}

struct Font {
    name: &'static str,
    table: &'static str,
    size: Size,
    /// Whether VGA text mode may show it, in cells 9 pixels wide.
    vga: bool,
}

macro_rules! fonts {
    ($($name:literal $width:literal x $height:literal $(in $vga:ident text mode)?,)*) => {
        [$(Font {
            name: $name,
            table: include_str!(concat!("fonts/", $name, "-", $width, "x", $height, ".hex")),
            size: Size { width: $width, height: $height },
            vga: !concat!("" $(, stringify!($vga))?).is_empty(),
        },)*]
    };
}

/// All fonts, in the order of preference where a screen does not decide.
static FONTS: &[Font] = &fonts![
    "bios" 8 x 16 in VGA text mode,
    "linux" 8 x 16 in VGA text mode,
    "unifont" 8 x 16,
    "edk2" 8 x 19,
    "fixed" 8 x 16 in VGA text mode,
    "terminus" 8 x 16 in VGA text mode,
    "terminus-bold" 8 x 16 in VGA text mode,
    "vga" 8 x 16 in VGA text mode,
    "spleen" 8 x 16,
    "linux" 16 x 32,
    "bios" 8 x 8 in VGA text mode,
    "linux" 8 x 8,
    "vga" 8 x 8 in VGA text mode,
    "bios" 8 x 14 in VGA text mode,
    "vga" 8 x 14 in VGA text mode,
    "fixed" 8 x 14 in VGA text mode,
    "terminus" 8 x 14 in VGA text mode,
    "terminus-bold" 8 x 14 in VGA text mode,
    "terminus" 16 x 32,
    "terminus-bold" 16 x 32,
    "vga" 16 x 32,
    "spleen" 16 x 32,
    "terminus" 12 x 24,
    "terminus-bold" 12 x 24,
    "spleen" 12 x 24,
    "terminus" 10 x 20,
    "terminus-bold" 10 x 20,
    "terminus" 14 x 28,
    "terminus-bold" 14 x 28,
    "vga" 16 x 28,
    "fixed" 8 x 13,
    "fixed" 8 x 15,
    "fixed" 8 x 18,
    "terminus" 6 x 12,
];

/// All glyphs of one cell size.
pub(super) struct Shapes {
    pub(super) size: Size,
    known: HashMap<Bitmap, Vec<Reading>, BuildHasherDefault<GlyphHasher>>,
    /// Digests of the glyphs, as a bit set.
    digests: Vec<u64>,
}

/// A hash of a few multiplications, because hundreds of thousands of glyphs are looked up to find the cells of a
/// screen. The keys are in the tables, so that they cannot be chosen to collide.
#[derive(Default)]
pub(super) struct GlyphHasher(u64);

/// 2⁶⁴ divided by the golden ratio: multiplying by it moves small differences to the upper bits.
const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

impl Hasher for GlyphHasher {
    fn write(&mut self, bytes: &[u8]) {
        for part in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..part.len()].copy_from_slice(part);
            self.write_u64(u64::from_ne_bytes(word));
        }
    }

    fn write_u64(&mut self, word: u64) {
        self.0 = (self.0 ^ word).wrapping_mul(GOLDEN).rotate_left(29);
    }

    fn write_usize(&mut self, _length: usize) {} // the same for all

    fn finish(&self) -> u64 {
        self.0.wrapping_mul(GOLDEN)
    }
}

/// The glyphs of every cell size that consoles use, the most common first.
pub(super) static SHAPES: LazyLock<Vec<Shapes>> = LazyLock::new(|| {
    let mut all = Vec::new();
    for (index, font) in FONTS.iter().enumerate() {
        let narrow = of_size(&mut all, font.size);
        font.glyphs().for_each(|(chars, bitmap)| narrow.add(index, &chars, bitmap));
        if font.vga {
            let wide = of_size(&mut all, Size { width: 9, ..font.size });
            for (chars, bitmap) in font.glyphs() {
                // The ninth column is empty, or repeats the eighth if the adapter treats the character as line
                // graphics.
                let blank = bitmap.map(|row| row << 1);
                let repeated = bitmap.map(|row| row << 1 | row & 1);
                wide.add(index, &chars, blank);
                if repeated != blank {
                    wide.add(index, &chars, repeated);
                }
            }
        }
    }
    all
});

fn of_size(all: &mut Vec<Shapes>, size: Size) -> &mut Shapes {
    let index = all.iter().position(|shapes| shapes.size == size).unwrap_or_else(|| {
        all.push(Shapes { size, known: HashMap::default(), digests: vec![0; DIGESTS / 64] });
        all.len() - 1
    });
    &mut all[index]
}

/// The glyphs of each character in all fonts, as numbers.
static SHAPES_OF: LazyLock<HashMap<char, Vec<usize>>> = LazyLock::new(|| {
    let mut numbers = HashMap::new();
    let mut shapes_of: HashMap<char, Vec<usize>> = HashMap::new();
    for font in FONTS {
        for (chars, bitmap) in font.glyphs() {
            let next = numbers.len();
            let number = *numbers.entry((font.size.width, font.size.height, bitmap)).or_insert(next);
            chars.into_iter().for_each(|char| shapes_of.entry(char).or_default().push(number));
        }
    }
    shapes_of
});

/// Whether a character that was read may stand for the wanted one, because they share a glyph.
pub(super) fn alike(read: char, expected: char) -> bool {
    let shapes = |char| SHAPES_OF.get(char).map_or(&[][..], Vec::as_slice);
    read == expected
        || (!expected.is_ascii() && shapes(&read).iter().any(|shape| shapes(&expected).contains(shape)))
}

/// Returns the number of fonts.
pub(super) fn count() -> usize {
    FONTS.len()
}

/// Returns the cell size of a font, and its characters; those of VGA text mode, if requested and if the font may be
/// used there.
#[cfg(test)]
pub(super) fn glyphs(font: usize, in_text_mode: bool) -> (Size, Vec<(char, Bitmap)>) {
    let font = &FONTS[font];
    let all = font.glyphs().flat_map(|(chars, bitmap)| chars.into_iter().map(move |char| (char, bitmap)));
    if in_text_mode && font.vga {
        (
            Size { width: 9, ..font.size },
            all.map(|(char, bitmap)| (char, bitmap.map(|row| row << 1))).collect(),
        )
    } else {
        (font.size, all.collect())
    }
}

impl Font {
    /// Returns each glyph with the characters that it stands for, the preferred one first.
    fn glyphs(&self) -> impl Iterator<Item = (Vec<char>, Bitmap)> {
        self.table.lines().map(|line| {
            let glyph = glyph(line, self.size);
            debug_assert!(glyph.is_some(), "{} {:?}: {line}", self.name, self.size);
            glyph.unwrap_or((Vec::new(), [0; MAX_HEIGHT]))
        })
    }
}

/// Parses a line of a table: `0041,0410:` followed by two hexadecimal digits for each row, or four if it is wider than
/// 8 pixels.
fn glyph(line: &str, size: Size) -> Option<(Vec<char>, Bitmap)> {
    let (codes, rows) = line.split_once(':')?;
    let chars = codes
        .split(',')
        .map(|code| char::from_u32(u32::from_str_radix(code, 16).ok()?))
        .collect::<Option<_>>()?;
    let bytes = size.width.div_ceil(8);
    let mut bitmap = [0; MAX_HEIGHT];
    for (row, digits) in bitmap.iter_mut().zip(rows.as_bytes().chunks(2 * bytes)) {
        *row = u16::from_str_radix(str::from_utf8(digits).ok()?, 16).ok()? >> (8 * bytes - size.width);
    }
    Some((chars, bitmap))
}

/// Number of possible digests.
const DIGESTS: usize = 1 << 16;

impl Shapes {
    fn add(&mut self, font: usize, chars: &[char], bitmap: Bitmap) {
        let Some(&char) = chars.first() else { return };
        let digest = self.digest(&bitmap);
        self.digests[digest / 64] |= 1 << (digest % 64);
        let (bitmap, corner) = self.size.inverted(bitmap);
        self.known.entry(bitmap).or_default().push(Reading { font, char, corner });
    }

    /// Returns a number for the rows in the middle of a glyph, where the glyphs of characters differ most.
    fn digest(&self, rows: &[u16]) -> usize {
        let row = |eighths: usize| u64::from(rows[self.size.height * eighths / 8]);
        let mixed = (row(3) << 48 | row(4) << 32 | row(5) << 16 | row(6)).wrapping_mul(GOLDEN);
        (mixed >> 48) as usize % DIGESTS
    }

    /// Whether a glyph with these rows may be known; faster than a lookup.
    pub(super) fn may_be_known(&self, rows: &[u16]) -> bool {
        let digest = self.digest(rows);
        self.digests[digest / 64] >> (digest % 64) & 1 == 1
    }

    /// Returns how a glyph whose pixel at the top left is 0 can be read; empty if no font contains it.
    pub(super) fn readings(&self, bitmap: &Bitmap) -> &[Reading] {
        self.known.get(bitmap).map_or(&[], Vec::as_slice)
    }

    /// Returns how pixels of a character's colour can be read, whatever the background.
    pub(super) fn drawn(&self, bitmap: Bitmap) -> impl Iterator<Item = &Reading> {
        let (bitmap, corner) = self.size.inverted(bitmap);
        self.readings(&bitmap).iter().filter(move |reading| reading.corner == corner)
    }

    /// Returns all glyphs, to search for one that is partly covered.
    pub(super) fn all(&self) -> impl Iterator<Item = (&Bitmap, &[Reading])> {
        self.known.iter().map(|(bitmap, readings)| (bitmap, readings.as_slice()))
    }
}

impl Size {
    /// Returns the same glyph with 0 at the top left, and whether ones and zeros were exchanged for that.
    pub(super) fn inverted(self, mut bitmap: Bitmap) -> (Bitmap, bool) {
        let corner = bitmap[0] >> (self.width - 1) & 1 == 1;
        if corner {
            let full = self.full_row();
            bitmap[..self.height].iter_mut().for_each(|row| *row ^= full);
        }
        (bitmap, corner)
    }

    /// Returns a row of ones.
    pub(super) fn full_row(self) -> u16 {
        u16::MAX >> (16 - self.width)
    }
}

/// Draws a line of text the way a PC's BIOS does, in cells of 8 × 16 pixels with the first one at `(x, y)`: screens for
/// tests and for simulated machines. A character without a glyph in the BIOS font is left empty; what exceeds the
/// screen is clipped.
pub fn draw(screen: &mut Framebuffer, (x, y): (usize, usize), text: &str, ink: [u8; 3], background: [u8; 3]) {
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
            &BIOS.get(&char).copied().unwrap_or([0; MAX_HEIGHT]),
            ink,
            background,
        );
    }
}

/// Draws one cell.
pub(super) fn paint(
    screen: &mut Framebuffer,
    (x, y): (usize, usize),
    size: Size,
    bitmap: &Bitmap,
    ink: [u8; 3],
    background: [u8; 3],
) {
    let rows = screen.height().saturating_sub(y).min(size.height);
    for (down, bits) in bitmap[..rows].iter().enumerate() {
        let cell = screen.row_mut(y + down).iter_mut().skip(x).take(size.width);
        for (right, pixel) in cell.enumerate() {
            *pixel = if bits >> (size.width - 1 - right) & 1 == 1 { ink } else { background };
        }
    }
}
