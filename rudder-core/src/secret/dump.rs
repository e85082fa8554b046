//! Decodes dumps of bytes as people and programs print them: `xxd`, `hexdump`, `od` in all its bases, arrays of C, Rust
//! and Python, characters one by one. Offsets at the beginning of lines and text columns at their end are skipped, so
//! that a secret that spans several lines is found.

use super::view::{Unit, View};

/// The possible readings of a text as a dump.
#[derive(Debug, Default)]
pub(super) struct Dumps {
    /// Hexadecimal digits in lower case.
    pub(super) hex: Vec<View>,
    /// Bytes.
    pub(super) bytes: Vec<View>,
}

/// A run of letters and digits; positions are those in the view.
#[derive(Debug, Clone, Copy)]
struct Word {
    start: usize,
    end: usize,
    /// Number of spaces before it.
    gap: usize,
    /// Whether there is a bar between this word and the one before.
    bar: bool,
}

/// Whether numbers at the beginning of lines are skipped as offsets. Both readings are tried, since such a number may
/// be data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Offsets {
    Skip,
    Read,
}

/// Returns all readings of a text as a dump; the text must have its line ends.
pub(super) fn dumps(text: &View) -> Dumps {
    let mut dumps = Dumps::default();
    let units = &text.0;
    let digits = units.iter().filter(|unit| unit.byte.is_ascii_hexdigit()).count();
    let spaces = units.iter().filter(|unit| matches!(unit.byte, b' ' | b'\t' | b',')).count();
    let lines: Vec<(usize, usize)> = lines(units);
    if digits >= 2 {
        let words: Vec<Vec<Word>> = lines.iter().map(|(start, end)| words(units, *start, *end)).collect();
        for offsets in [Offsets::Skip, Offsets::Read] {
            numbers(units, &lines, &words, offsets, &mut dumps);
        }
    }
    if spaces >= 3 {
        dumps.bytes.push(characters(units, &lines, Offsets::Skip));
        dumps.bytes.push(characters(units, &lines, Offsets::Read));
    }
    dumps.hex.retain(|view| !view.0.is_empty());
    dumps.bytes.retain(|view| !view.0.is_empty());
    dumps
}

fn lines(units: &[Unit]) -> Vec<(usize, usize)> {
    let mut lines = Vec::new();
    let mut start = 0;
    for line in units.split_inclusive(|unit| unit.byte == b'\n') {
        let end = start + line.len();
        lines.push((start, if line.last().is_some_and(|unit| unit.byte == b'\n') { end - 1 } else { end }));
        start = end;
    }
    lines
}

fn words(units: &[Unit], start: usize, end: usize) -> Vec<Word> {
    let mut words = Vec::new();
    let (mut at, mut gap, mut bar) = (start, 0, false);
    while at < end {
        let is_word = |unit: &Unit| unit.byte.is_ascii_alphanumeric() || unit.byte >= 0x80;
        if is_word(&units[at]) {
            let first = at;
            while at < end && is_word(&units[at]) {
                at += 1;
            }
            words.push(Word { start: first, end: at, gap, bar });
            (gap, bar) = (0, false);
            continue;
        }
        match units[at].byte {
            b' ' | b'\t' => gap += 1,
            byte => {
                bar |= matches!(byte, b'|' | b'>');
                gap = 0;
            }
        }
        at += 1;
    }
    words
}

fn is_hex(units: &[Unit]) -> bool {
    !units.is_empty() && units.iter().all(|unit| unit.byte.is_ascii_hexdigit())
}

/// Returns the digits of a hexadecimal word, without `0x`.
fn hex_digits(units: &[Unit], word: Word) -> Option<&[Unit]> {
    let units = &units[word.start..word.end];
    let digits = match units {
        [zero, x, rest @ ..] if zero.byte == b'0' && x.byte | 0x20 == b'x' => rest,
        _ => units,
    };
    is_hex(digits).then_some(digits)
}

/// Returns which words of a line of a dump are data: those after the offset and before the text column.
fn data(units: &[Unit], words: &[Word]) -> std::ops::Range<usize> {
    let Some(first) = words.first().filter(|_| words.len() > 1) else { return 0..words.len() };
    let is_offset = first.end - first.start >= 4 && is_hex(&units[first.start..first.end]);
    if !is_offset {
        return 0..words.len();
    }
    // xxd writes a colon, and two spaces before its text column; hexdump and od put bars around theirs.
    let colon = units.get(first.end).is_some_and(|unit| unit.byte == b':');
    let is_text = |(index, word): (usize, &Word)| {
        let is_first = index == 0;
        word.bar
            || colon && !is_first && word.gap >= 2
            || hex_digits(units, *word).is_none() && !is_decimal(units, *word)
    };
    let end = words[1..].iter().enumerate().position(is_text).map_or(words.len(), |at| at + 1);
    1..end
}

fn is_decimal(units: &[Unit], word: Word) -> bool {
    units[word.start..word.end].iter().all(|unit| unit.byte.is_ascii_digit())
}

/// Reads the numbers of all lines, in every base and width.
fn numbers(
    units: &[Unit],
    lines: &[(usize, usize)],
    words: &[Vec<Word>],
    offsets: Offsets,
    dumps: &mut Dumps,
) {
    const SHAPES: [(u32, usize); 8] = [(8, 1), (8, 2), (8, 4), (8, 8), (10, 1), (10, 2), (10, 4), (10, 8)];
    let (mut big, mut little, mut text) = (View::default(), View::default(), View::default());
    let mut values: [View; 8] = Default::default();
    for ((_, line_end), words) in lines.iter().zip(words) {
        let data = match offsets {
            Offsets::Skip => data(units, words),
            Offsets::Read => 0..words.len(),
        };
        for word in &words[data.clone()] {
            match hex_digits(units, *word) {
                Some(digits) => {
                    let lower = |unit: &Unit| Unit { byte: unit.byte.to_ascii_lowercase(), ..*unit };
                    big.0.extend(digits.iter().map(lower));
                    match digits.len() {
                        4 | 8 | 16 => little.0.extend(digits.rchunks(2).flatten().map(lower)),
                        _ => little.0.extend(digits.iter().map(lower)),
                    }
                }
                None => {
                    big.push_break();
                    little.push_break();
                }
            }
            for ((base, width), view) in SHAPES.iter().zip(&mut values) {
                match number(units, *word, *base, *width) {
                    Some(value) => {
                        let (start, end) = (units[word.start].start, units[word.end - 1].end);
                        let bytes = value.to_le_bytes();
                        view.0.extend(bytes[..*width].iter().map(|byte| Unit { byte: *byte, start, end }));
                    }
                    None => view.push_break(),
                }
            }
        }
        if offsets == Offsets::Skip && data.end < words.len() {
            text.0.extend(column(&units[words[data.end - 1].end..*line_end]));
        }
    }
    dumps.hex.extend([big, little]);
    dumps.bytes.push(text);
    dumps.bytes.extend(values);
}

/// Returns the text column of a line, given what follows the data, without the surrounding spaces and bars.
fn column(units: &[Unit]) -> &[Unit] {
    let is_space = |unit: &Unit| matches!(unit.byte, b' ' | b'\t');
    let start = units.iter().position(|unit| !is_space(unit)).unwrap_or(units.len());
    match &units[start..] {
        [open, rest @ .., close] if matches!((open.byte, close.byte), (b'|', b'|') | (b'>', b'<')) => rest,
        rest => rest,
    }
}

/// Parses a number of `width` bytes as `od` prints it.
fn number(units: &[Unit], word: Word, base: u32, width: usize) -> Option<u64> {
    let digits = &units[word.start..word.end];
    let fits = match (base, width) {
        // Octal numbers are padded with zeros.
        (8, 1) => digits.len() == 3,
        (8, 2) => digits.len() == 6,
        (8, 4) => digits.len() == 11,
        (8, _) => digits.len() == 22,
        _ => digits.len() <= 20,
    };
    let text = fits.then(|| digits.iter().map(|unit| char::from(unit.byte)).collect::<String>())?;
    let value = u64::from_str_radix(&text, base).ok()?;
    (width == 8 || value < 1 << (8 * width)).then_some(value)
}

/// Reads single characters separated by spaces, as `od -c` prints them.
fn characters(units: &[Unit], lines: &[(usize, usize)], offsets: Offsets) -> View {
    let mut view = View::default();
    for (start, end) in lines {
        let line = &units[*start..*end];
        let words =
            line.split(|unit| matches!(unit.byte, b' ' | b'\t' | b',')).filter(|word| !word.is_empty());
        let is_offset = |word: &[Unit]| offsets == Offsets::Skip && word.len() >= 6 && is_hex(word);
        for (index, word) in words.enumerate() {
            match word {
                [_] => view.0.push(word[0]),
                word if index == 0 && is_offset(word) => {}
                [quote, unit, close] if quote.byte == close.byte && matches!(quote.byte, b'\'' | b'"') => {
                    view.0.push(*unit);
                }
                // Spaces and control characters by name (`od -a`), and by escape.
                [slash, _] if slash.byte == b'\\' => {}
                [s, p] if (s.byte, p.byte) == (b's', b'p') || (s.byte, p.byte) == (b'n', b'l') => {}
                [first, .., last] if word.len() == 3 => {
                    let digits: String = word.iter().map(|unit| char::from(unit.byte)).collect();
                    match u8::from_str_radix(&digits, 8) {
                        Ok(byte) => view.0.push(Unit { byte, start: first.start, end: last.end }),
                        Err(_) => view.push_break(),
                    }
                }
                // One character of several bytes.
                [first, .., last] if word.len() <= 4 && first.byte >= 0xc0 && first.start == last.start => {
                    view.0.extend_from_slice(word);
                }
                _ => view.push_break(),
            }
        }
    }
    view
}
