//! Views of a text: the bytes that it stands for, each with the range of the text that it comes from.
//!
//! Secrets and the texts in which they are searched for are transformed into the same views. So it does not matter how
//! often and in which order a text was escaped: both are compared after nothing more can be unescaped.

use std::ops::Range;

/// A byte that no part of a secret contains; it separates bytes that do not belong together.
pub(super) const BREAK: u8 = 0;

/// Number of layers of escapes, possibly of different kinds, that are undone.
const LAYERS: usize = 3;

/// A byte of a view, and the bytes of the text that it comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Unit {
    pub(super) byte: u8,
    pub(super) start: u32,
    pub(super) end: u32,
}

/// A transformed text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct View(pub(super) Vec<Unit>);

impl View {
    pub(super) fn bytes(&self) -> impl Iterator<Item = u8> {
        self.0.iter().map(|unit| unit.byte)
    }

    /// Returns the range of the text that these bytes of the view come from.
    pub(super) fn source(&self, range: &Range<usize>) -> Range<usize> {
        let units = &self.0[range.clone()];
        let start = units.iter().map(|unit| unit.start).min().unwrap_or(0);
        let end = units.iter().map(|unit| unit.end).max().unwrap_or(0);
        start as usize..end as usize
    }

    fn push_char(&mut self, c: char, start: u32, end: u32) {
        let mut utf8 = [0; 4];
        let bytes = c.encode_utf8(&mut utf8).bytes();
        self.0.extend(bytes.map(|byte| Unit { byte, start, end }));
    }

    pub(super) fn push_break(&mut self) {
        if let Some(last) = self.0.last().filter(|last| last.byte != BREAK) {
            let end = last.end;
            self.0.push(Unit { byte: BREAK, start: end, end });
        }
    }
}

/// Whether line ends are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lines {
    Keep,
    Join,
}

fn to_offset(at: usize) -> u32 {
    u32::try_from(at).unwrap_or(u32::MAX)
}

/// Returns what a terminal shows of a text: without control sequences (ECMA-48), control characters, zero-width
/// characters and overstruck characters. Text that a terminal does not show, such as titles, is appended.
pub(super) fn plain(text: &str, lines: Lines) -> View {
    let mut view = View(Vec::with_capacity(text.len()));
    let mut hidden = View::default();
    let mut at = 0;
    // Where an overstruck character began.
    let mut struck = None;
    while let Some(c) = text[at..].chars().next() {
        let end = at + c.len_utf8();
        match c {
            '\x1b' | '\u{9b}' | '\u{90}' | '\u{98}' | '\u{9d}'..='\u{9f}' => {
                let (payload, after) = sequence(text, at);
                for (offset, c) in text[payload.clone()].char_indices() {
                    if !c.is_control() {
                        let start = payload.start + offset;
                        hidden.push_char(c, to_offset(start), to_offset(start + c.len_utf8()));
                    }
                }
                hidden.push_break();
                at = after;
                continue;
            }
            '\x08' => {
                while let Some(unit) = view.0.pop_if(|unit| unit.byte != BREAK && unit.byte != b'\n') {
                    struck = Some(unit.start);
                    // The first byte of a character.
                    if unit.byte & 0xc0 != 0x80 {
                        break;
                    }
                }
            }
            '\n' if lines == Lines::Keep => view.push_char('\n', to_offset(at), to_offset(end)),
            '\u{a0}' => view.push_char(' ', to_offset(at), to_offset(end)),
            c if crate::visible::is_hidden(c) || matches!(c, '\u{fe00}'..='\u{fe0f}') => {}
            c => view.push_char(c, struck.take().unwrap_or(to_offset(at)), to_offset(end)),
        }
        at = end;
    }
    if !hidden.0.is_empty() {
        view.push_break();
        view.0.append(&mut hidden.0);
    }
    view
}

/// Parses a control sequence: returns the range of the text inside, if it is of a kind that has any, and where it ends.
fn sequence(text: &str, at: usize) -> (Range<usize>, usize) {
    let Some(introducer) = text[at..].chars().next() else { return (at..at, at) };
    let mut after = at + introducer.len_utf8();
    let kind = if introducer == '\x1b' {
        let Some(kind) = text[after..].chars().next().filter(|c| matches!(c, ' '..='~')) else {
            return (after..after, after);
        };
        after += 1;
        kind
    } else {
        // The same as a single character (C1).
        char::from_u32(u32::from(introducer) - 0x40).unwrap_or('[')
    };
    let skip = |from: usize, matches: fn(u8) -> bool| {
        let bytes = text.as_bytes();
        (from..bytes.len()).find(|at| !matches(bytes[*at])).unwrap_or(bytes.len())
    };
    match kind {
        '[' => {
            let parameters = skip(after, |byte| matches!(byte, 0x20..=0x3f));
            let has_end = text.as_bytes().get(parameters).is_some_and(|byte| matches!(byte, 0x40..=0x7e));
            let end = parameters + usize::from(has_end);
            (end..end, end)
        }
        ']' | 'P' | 'X' | '^' | '_' => {
            let is_end = |c: char| matches!(c, '\x07' | '\x1b' | '\u{9c}' | '\n');
            let end = text[after..].find(is_end).map_or(text.len(), |length| after + length);
            let tail = &text[end..];
            let terminator = ["\x07", "\x1b\\", "\u{9c}"].iter().find(|end| tail.starts_with(**end));
            (after..end, end + terminator.map_or(0, |end| end.len()))
        }
        ' '..='/' => {
            let end = skip(after, |byte| matches!(byte, 0x20..=0x2f));
            let end = (end + 1).min(text.len());
            let end = if text.is_char_boundary(end) { end } else { end - 1 };
            (end..end, end)
        }
        _ => (after..after, after),
    }
}

/// Whether a view contains anything that [`unescaped`] would change, apart from what is the same in all forms.
pub(super) fn has_escapes(view: &View) -> bool {
    view.bytes().any(|byte| matches!(byte, b'\\' | b'%' | b'&' | b'+' | b'\'' | b'"'))
}

/// Whether quotes are part of a view.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Quotes {
    /// Drop quotes: shells and YAML write a quote inside quotes as several.
    Drop,
    /// Keep quotes, for secrets that consist of little else.
    Keep,
}

/// Undoes the escapes of a view, of any origin and nesting: of JSON, YAML, C and shells (backslashes), of URLs and
/// forms (`%41`, `+`), of HTML and XML (`&quot;`). Characters that serve only for quoting are removed: backslashes,
/// control characters, and quotes.
pub(super) fn unescaped(view: &View, quotes: Quotes) -> View {
    let mut units = view.0.clone();
    for _ in 0..LAYERS {
        let before = units.len();
        units = entities(&units);
        units = percent(&units);
        units = backslashes(&units);
        if units.len() == before {
            break;
        }
    }
    units.retain(|unit| match unit.byte {
        b'\'' | b'"' => quotes == Quotes::Keep,
        byte => !matches!(byte, 1..=0x1f | 0x7f),
    });
    View(units)
}

/// Removes quotes and backslashes from a view without undoing any escape, since what follows a secret may look like the
/// rest of an escape with which it ends.
pub(super) fn bare(view: &View) -> View {
    let is_text = |unit: &&Unit| !matches!(unit.byte, b'\'' | b'"' | b'\\' | 1..=0x1f | 0x7f);
    View(view.0.iter().filter(is_text).copied().collect())
}

/// Parses a number in the given base.
fn number(units: &[Unit], radix: u32) -> Option<u32> {
    let digit = |unit: &Unit| char::from(unit.byte).to_digit(radix);
    let add = |sum: u32, unit: &Unit| sum.checked_mul(radix)?.checked_add(digit(unit)?);
    (!units.is_empty()).then_some(units)?.iter().try_fold(0, add)
}

/// Adds a character that replaces some units.
fn put(out: &mut Vec<Unit>, c: char, of: &[Unit]) {
    let (Some(first), Some(last)) = (of.first(), of.last()) else { return };
    let mut utf8 = [0; 4];
    let bytes = c.encode_utf8(&mut utf8).bytes();
    out.extend(bytes.map(|byte| Unit { byte, start: first.start, end: last.end }));
}

fn entities(units: &[Unit]) -> Vec<Unit> {
    let mut out = Vec::with_capacity(units.len());
    let mut at = 0;
    while at < units.len() {
        match entity(&units[at..]) {
            Some((c, length)) => {
                put(&mut out, c, &units[at..at + length]);
                at += length;
            }
            None => {
                out.push(units[at]);
                at += 1;
            }
        }
    }
    out
}

fn entity(units: &[Unit]) -> Option<(char, usize)> {
    if units[0].byte != b'&' {
        return None;
    }
    let window = &units[1..units.len().min(12)];
    let length = window.iter().position(|unit| unit.byte == b';')?;
    let body = &window[..length];
    let name: Vec<u8> = body.iter().map(|unit| unit.byte).collect();
    let c = match name.as_slice() {
        b"amp" => '&',
        b"lt" => '<',
        b"gt" => '>',
        b"quot" => '"',
        b"apos" => '\'',
        b"nbsp" => ' ',
        [b'#', b'x' | b'X', ..] => char::from_u32(number(&body[2..], 16)?)?,
        [b'#', ..] => char::from_u32(number(&body[1..], 10)?)?,
        _ => return None,
    };
    Some((c, length + 2))
}

fn percent(units: &[Unit]) -> Vec<Unit> {
    let mut out = Vec::with_capacity(units.len());
    let mut at = 0;
    while at < units.len() {
        let unit = units[at];
        match unit.byte {
            b'%' => {
                // A percent sign may itself be encoded, as `%25`.
                let mut digits = at + 1;
                while units.get(digits..digits + 4).is_some_and(|next| {
                    next[0].byte == b'2' && next[1].byte == b'5' && number(&next[2..4], 16).is_some()
                }) {
                    digits += 2;
                }
                let code = units.get(digits..digits + 2).and_then(|digits| number(digits, 16));
                if let Some(code) = code.and_then(|code| u8::try_from(code).ok()) {
                    out.push(Unit { byte: code, start: unit.start, end: units[digits + 1].end });
                    at = digits + 2;
                    continue;
                }
                out.push(unit);
            }
            // Forms encode a space as `+`.
            b'+' => out.push(Unit { byte: b' ', ..unit }),
            _ => out.push(unit),
        }
        at += 1;
    }
    out
}

fn backslashes(units: &[Unit]) -> Vec<Unit> {
    let mut out = Vec::with_capacity(units.len());
    let mut at = 0;
    while at < units.len() {
        if units[at].byte != b'\\' {
            out.push(units[at]);
            at += 1;
            continue;
        }
        let start = at;
        while units.get(at).is_some_and(|unit| unit.byte == b'\\') {
            at += 1;
        }
        at += escape(&units[start..], at - start, &mut out);
    }
    out
}

/// Decodes the escape at the start of `units`, which begins with `slashes` backslashes: adds its meaning to `out`, and
/// returns its length.
fn escape(units: &[Unit], slashes: usize, out: &mut Vec<Unit>) -> usize {
    let rest = &units[slashes..];
    let code = |digits: Range<usize>| rest.get(digits).and_then(|digits| number(digits, 16));
    let whole = |length: usize| &units[..slashes + length];
    match rest.first().map(|unit| unit.byte) {
        Some(b'n' | b'r' | b't' | b'a' | b'b' | b'e' | b'f' | b'v') => 1,
        Some(b'x') => match code(1..3).and_then(|code| u8::try_from(code).ok()) {
            Some(byte) => {
                out.push(Unit { byte, start: units[0].start, end: rest[2].end });
                3
            }
            None => 0,
        },
        Some(b'u') if rest.get(1).is_some_and(|unit| unit.byte == b'{') => {
            let window = &rest[2..rest.len().min(10)];
            let length = window.iter().position(|unit| unit.byte == b'}').unwrap_or(0);
            match number(&window[..length], 16).and_then(char::from_u32) {
                Some(c) => {
                    put(out, c, whole(length + 3));
                    length + 3
                }
                None => 0,
            }
        }
        Some(b'u') => match code(1..5) {
            // Half of a surrogate pair (UTF-16); the other half follows after the same number of backslashes.
            Some(high @ 0xd800..=0xdbff) => {
                let second = &rest[5..];
                let skipped = second.iter().take_while(|unit| unit.byte == b'\\').count();
                let low = second.get(skipped..skipped + 5).filter(|units| units[0].byte == b'u');
                match low.and_then(|units| number(&units[1..], 16)) {
                    Some(low @ 0xdc00..=0xdfff) if skipped > 0 => {
                        let c = char::from_u32(0x10000 + ((high - 0xd800) << 10) + (low - 0xdc00));
                        let length = 5 + skipped + 5;
                        put(out, c.unwrap_or('\u{fffd}'), whole(length));
                        length
                    }
                    _ => 0,
                }
            }
            Some(code) => {
                put(out, char::from_u32(code).unwrap_or('\u{fffd}'), whole(5));
                5
            }
            None => 0,
        },
        Some(b'U') => match code(1..9).and_then(char::from_u32) {
            Some(c) => {
                put(out, c, whole(9));
                9
            }
            None => 0,
        },
        Some(b'0'..=b'7') => {
            let octal = rest.get(..3).and_then(|digits| number(digits, 8));
            match octal.and_then(|code| u8::try_from(code).ok()) {
                Some(byte) => {
                    out.push(Unit { byte, start: units[0].start, end: rest[2].end });
                    3
                }
                None => usize::from(rest[0].byte == b'0'),
            }
        }
        _ => 0,
    }
}

/// Converts base64 in the URL-safe alphabet to the standard one (RFC 4648, section 5); `plus` is a further byte that
/// stands for `+`.
pub(super) fn one_alphabet(view: &View, plus: u8) -> View {
    let byte = |byte| match byte {
        b'-' => b'+',
        byte if byte == plus => b'+',
        b'_' => b'/',
        other => other,
    };
    View(view.0.iter().map(|unit| Unit { byte: byte(unit.byte), ..*unit }).collect())
}
