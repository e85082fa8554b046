//! Text for people: control characters are shown, not interpreted.
//!
//! The output of guests and servers, and the text of manifests, may contain escape sequences, control characters,
//! characters that change the direction of text and invisible characters. Everything that a person reads passes through
//! this module; what programs read (JSON) is left unchanged.

use std::{borrow::Cow, fmt};

/// The replacement for a tab: what follows it is in the same column on every terminal.
const TAB: &str = "    ";

/// Makes a text safe to show to people: every control character and every character that hides or reorders text is
/// escaped. Newlines are kept, so this suits texts of several lines; for a value inside a line, see [`visible_line`].
///
/// ```
/// use rudder_core::visible::visible;
/// assert_eq!(visible("a\x1b[2Jb\u{202e}c\nd\te"), "a␛[2Jb<U+202E>c\nd    e");
/// ```
#[must_use]
pub fn visible(text: &str) -> Cow<'_, str> {
    convert(text, true)
}

/// Makes a text safe to show in one line: like [`visible`], but also escapes newlines.
#[must_use]
pub fn visible_line(text: &str) -> Cow<'_, str> {
    convert(text, false)
}

/// Makes a line of output safe to show: like [`visible_line`], but removes sequences that only set colours (ECMA-48,
/// SGR).
#[must_use]
pub fn visible_output(line: &str) -> Cow<'_, str> {
    match without_colours(line) {
        Some(plain) => Cow::Owned(visible_line(&plain).into_owned()),
        None => visible_line(line),
    }
}

/// Whether a character must be escaped. Newlines and tabs are included.
#[must_use]
pub fn is_hidden(c: char) -> bool {
    // Most text is ASCII.
    if c.is_ascii() {
        return c.is_ascii_control();
    }
    c.is_control()
        || matches!(c,
            // Soft hyphen, combining grapheme joiner, Arabic letter mark, fillers without a glyph, the Mongolian vowel
            // separator.
            '\u{ad}' | '\u{34f}' | '\u{61c}' | '\u{115f}' | '\u{1160}' | '\u{17b4}' | '\u{17b5}' | '\u{180b}'..='\u{180f}'
            // Zero-width characters and directional marks; line and paragraph separators, embeddings, overrides;
            // invisible operators, isolates, deprecated format characters.
            | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}'
            | '\u{3164}' | '\u{feff}' | '\u{ffa0}' | '\u{fff0}'..='\u{fffb}' | '\u{fffe}' | '\u{ffff}'
            // Shorthand and musical format controls, tags, further variation selectors.
            | '\u{1bca0}'..='\u{1bca3}' | '\u{1d173}'..='\u{1d17a}' | '\u{e0000}'..='\u{e0fff}')
}

/// Writes a character in the form that is safe for a terminal.
pub(crate) fn write_visible(c: char, out: &mut impl fmt::Write) -> fmt::Result {
    match c {
        '\t' => out.write_str(TAB),
        // Symbols for control characters (the Control Pictures of Unicode, from U+2400).
        '\0'..='\x1f' => out.write_char(char::from_u32(0x2400 + u32::from(c)).unwrap_or('\u{fffd}')),
        '\x7f' => out.write_char('\u{2421}'),
        c if is_hidden(c) => write!(out, "<U+{:04X}>", u32::from(c)),
        c => out.write_char(c),
    }
}

fn convert(text: &str, keep_lines: bool) -> Cow<'_, str> {
    let converts = |c: char| is_hidden(c) && !(keep_lines && c == '\n');
    let Some(first) = text.find(converts) else { return Cow::Borrowed(text) };
    let mut out = String::with_capacity(text.len() + 16);
    out.push_str(&text[..first]);
    let mut characters = text[first..].chars().peekable();
    while let Some(c) = characters.next() {
        match c {
            '\n' if keep_lines => out.push('\n'),
            '\r' if keep_lines && characters.peek() == Some(&'\n') => {}
            // Writing to a String does not fail.
            c => drop(write_visible(c, &mut out)),
        }
    }
    Cow::Owned(out)
}

/// Returns the text without sequences that set colours; `None` if there are none.
fn without_colours(text: &str) -> Option<String> {
    const START: &str = "\x1b[";
    text.find(START)?;
    let (mut out, mut rest) = (String::with_capacity(text.len()), text);
    while let Some(at) = rest.find(START) {
        let tail = &rest[at + START.len()..];
        let end = tail.find(|c: char| !c.is_ascii_digit() && c != ';' && c != ':').unwrap_or(tail.len());
        let is_colour = tail[end..].starts_with('m');
        out.push_str(&rest[..at]);
        if is_colour {
            rest = &tail[end + 1..];
        } else {
            out.push_str(START);
            rest = tail;
        }
    }
    out.push_str(rest);
    Some(out)
}

/// Maximum number of characters of a value that a message quotes; longer values are truncated.
const MAX_QUOTED: usize = 80;

/// A foreign value as a message quotes it: in quotes, escaped, and truncated if it is long.
#[derive(Clone, Copy)]
pub(crate) struct Quoted<'t>(pub(crate) &'t str);

impl fmt::Debug for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match cut(self.0, MAX_QUOTED) {
            Some(short) => write!(f, "{short:?}…"),
            None => write!(f, "{:?}", self.0),
        }
    }
}

/// Returns the first characters of a text; `None` if it has no more.
pub(crate) fn cut(text: &str, characters: usize) -> Option<&str> {
    if text.len() <= characters {
        return None;
    }
    text.char_indices().nth(characters).map(|(end, _)| &text[..end])
}

/// Writes everything through [`visible`], for `Display` implementations that people read.
pub(crate) struct Visible<'f, 'g>(pub(crate) &'f mut fmt::Formatter<'g>);

impl fmt::Write for Visible<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.0.write_str(&visible(text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_kind_of_control_character_is_made_visible() {
        for (text, shown) in [
            ("\x1b]52;c;aGk=\x07", "␛]52;c;aGk=␇"),
            ("\0\x08\x7f\r", "␀␈␡␍"),
            ("\u{9b}2J\u{85}", "<U+009B>2J<U+0085>"),
            ("\u{202e}abc\u{2066}\u{200b}\u{feff}", "<U+202E>abc<U+2066><U+200B><U+FEFF>"),
            ("\u{2028}\u{2029}\u{e0041}\u{ad}", "<U+2028><U+2029><U+E0041><U+00AD>"),
            ("grüß 漢字 🚀 é\u{301}", "grüß 漢字 🚀 é\u{301}"),
        ] {
            assert_eq!(visible(text), shown);
            assert_eq!(visible_line(text), shown);
        }
        assert_eq!((&*visible("a\r\nb"), &*visible_line("a\nb")), ("a\nb", "a␊b"));
    }

    #[test]
    fn colours_are_removed_from_output_and_other_sequences_are_shown() {
        assert_eq!(visible_output("\x1b[1;31mred\x1b[0m \x1b[38:2:1:2:3mx\x1b[2J"), "red x␛[2J");
        assert_eq!(visible_output("\x1b[\x1b[mm"), "␛[m");
    }

    proptest! {
        #[test]
        fn no_text_keeps_hidden_characters(bytes in prop::collection::vec(any::<u8>(), 0..200), text in any::<String>()) {
            for text in [String::from_utf8_lossy(&bytes).into_owned(), text] {
                prop_assert!(!visible(&text).chars().any(|c| is_hidden(c) && c != '\n'));
                for line in [visible_line(&text), visible_output(&text)] {
                    prop_assert!(!line.chars().any(is_hidden), "{:?}", line);
                }
            }
        }

        #[test]
        fn printable_text_is_unchanged(text in "[ -~äß漢🚀]{0,40}") {
            prop_assert_eq!(visible_output(&text), text.as_str());
        }
    }
}
