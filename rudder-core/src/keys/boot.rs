//! The grammar of boot commands: parses the strings of a manifest into tokens and mistakes.

use super::{NAMED, named_key, us_stroke, wait};
use crate::visible::cut;
use std::time::Duration;

/// The variables that a template in a boot command may use.
pub const BOOT_VARIABLES: &[&str] = &["HTTPIP", "HTTPPort", "Name"];

/// A token of a boot command.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum BootToken {
    /// Text to type. Templates in it are normalised to `{{ .Name }}`, with the inner spaces.
    Text(String),
    /// Presses and releases a key.
    Press(u32),
    /// Holds a key down.
    Hold(u32),
    /// Releases a key.
    Release(u32),
    /// Waits.
    Wait(Duration),
    /// Waits until a text appears on the screen. Templates are normalised as in [`Text`](Self::Text).
    WaitText {
        /// The text, not empty.
        text: String,
        /// Maximum time to wait.
        limit: Duration,
    },
    /// Waits until a text appears on the serial console. Templates are normalised as in [`Text`](Self::Text).
    WaitSerial {
        /// The text, not empty.
        text: String,
        /// Maximum time to wait.
        limit: Duration,
    },
}

/// The kind of a mistake in a boot command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum BootMistakeKind {
    /// `<…>` is not a token.
    UnknownToken,
    /// `{{ … }}` is not a variable.
    UnknownVariable,
    /// A key is held and never released.
    UnclosedHold,
    /// A key is released that is not held.
    NotHeld,
    /// A character does not exist on a US keyboard.
    Untypable,
    /// A wait for a text has no text in quotes.
    MissingText,
    /// The quotes of a text to wait for, or the token after them, are not closed.
    UnclosedText,
    /// What follows a text to wait for is not a duration above 0.
    BadLimit,
}

/// A mistake in a boot command, with its location.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct BootMistake {
    /// The index of the list element.
    pub element: usize,
    /// The byte range in the element.
    pub range: std::ops::Range<usize>,
    /// The kind of mistake.
    pub kind: BootMistakeKind,
    /// The text at that location, truncated if it is long.
    pub found: String,
}

/// Maximum number of mistakes reported for one boot command; parsing does not look for more.
const MAX_MISTAKES: usize = 1000;

/// Maximum number of characters of the text that a mistake quotes.
const MAX_FOUND: usize = 80;

/// Parses a boot command into tokens and mistakes. Each element is parsed on its own, but a hold may end in a later
/// one.
///
/// `<waitText 'TEXT'>` and `<waitSerial 'TEXT' 90s>` contain a text in single or double quotes. That quote is escaped
/// by doubling it; every other character is literal.
///
/// `<` opens a token where `>` follows a word (`<enter>`), or a character and `On` or `Off` (`<aOn>`, `<<On>`); any
/// other `<` is typed. So `["<", "b>"]` types what `["<b>"]` would parse as a token.
///
/// The work is linear in the length of the text. At most a thousand mistakes are reported.
pub fn parse_boot_command<'a>(
    elements: impl IntoIterator<Item = &'a str>,
) -> (Vec<BootToken>, Vec<BootMistake>) {
    let mut parser = Parser::default();
    for (index, element) in elements.into_iter().enumerate() {
        parser.element(index, element);
    }
    let Parser { tokens, mut mistakes, held, .. } = parser;
    mistakes.extend(held.into_iter().map(|(_, mistake)| mistake));
    mistakes.sort_by_key(|mistake| (mistake.element, mistake.range.start));
    (tokens, mistakes)
}

#[derive(Default)]
struct Parser {
    tokens: Vec<BootToken>,
    mistakes: Vec<BootMistake>,
    /// Keys that are held, each with the mistake to report if nothing releases it.
    held: Vec<(u32, BootMistake)>,
    /// The index of the current element.
    index: usize,
    /// Whether no template is closed from here on.
    unclosed: bool,
}

impl Parser {
    fn element(&mut self, index: usize, text: &str) {
        self.index = index;
        self.unclosed = false;
        let mut at = 0;
        while let Some(character) = text[at..].chars().next() {
            let rest = &text[at..];
            let length = match character {
                '<' => self.token(at, rest),
                '{' => self.template(at, rest),
                _ => None,
            };
            at += length.unwrap_or_else(|| self.typed(at, character));
        }
    }

    fn typed(&mut self, at: usize, character: char) -> usize {
        let length = character.len_utf8();
        if us_stroke(character).is_none() {
            let found = character.escape_debug().to_string();
            self.mistake(at..at + length, BootMistakeKind::Untypable, &found);
        }
        self.push_text(character.encode_utf8(&mut [0; 4]));
        length
    }

    /// Parses `<…>` at the start of `rest`. Returns its length, or `None` when the `<` is a literal.
    fn token(&mut self, at: usize, rest: &str) -> Option<usize> {
        if let Some((character, down, length)) = character_hold(rest) {
            let keysym = match us_stroke(character) {
                Some(stroke) => stroke.keysym,
                None => {
                    let found = character.escape_debug().to_string();
                    self.mistake(at..at + length, BootMistakeKind::Untypable, &found);
                    return Some(length);
                }
            };
            self.hold(at..at + length, &rest[..length], keysym, down);
            return Some(length);
        }
        if let Some(read) = wait::for_text(rest) {
            return Some(self.wait_for_text(at, rest, read));
        }
        // A token contains no `<`, so a later one does not scan this text again.
        let body = &rest[1..1 + rest[1..].find(['<', '>'])?];
        if rest[1 + body.len()..].starts_with('<') {
            return None;
        }
        let length = body.len() + 2;
        let is_word = !body.is_empty() && body.chars().all(|c| c.is_alphanumeric() || c == '.');
        let is_wait = body.get(..4).is_some_and(|start| start.eq_ignore_ascii_case("wait"));
        let opens = is_word || is_wait;
        if !opens {
            return None;
        }
        let range = at..at + length;
        if is_wait {
            match wait::duration(&body[4..]) {
                Some(duration) => self.tokens.push(BootToken::Wait(duration)),
                None => self.mistake(range, BootMistakeKind::UnknownToken, &rest[..length]),
            }
        } else if let Some(keysym) = named_key(body) {
            self.tokens.push(BootToken::Press(keysym));
        } else if let Some((keysym, down)) = named_hold(body) {
            self.hold(range, &rest[..length], keysym, down);
        } else {
            self.mistake(range, BootMistakeKind::UnknownToken, &rest[..length]);
        }
        Some(length)
    }

    /// Adds the token for `<waitText …>` or `<waitSerial …>` at `at`. Returns its length.
    fn wait_for_text(&mut self, at: usize, rest: &str, read: wait::Read<'_>) -> usize {
        let wait::Read { on, length, text } = read;
        match text {
            Ok(wait::Text { raw, raw_at, quote, limit }) => {
                let text = self.waited_for(at + raw_at, raw, quote);
                self.tokens.push(match on {
                    wait::On::Screen => BootToken::WaitText { text, limit },
                    wait::On::Serial => BootToken::WaitSerial { text, limit },
                });
            }
            Err((kind, range)) => {
                self.mistake(at + range.start..at + range.end, kind, &rest[range]);
            }
        }
        length
    }

    /// Returns the text between quotes, with doubled quotes unescaped and templates normalised.
    fn waited_for(&mut self, at: usize, raw: &str, quote: char) -> String {
        let (mut text, mut done) = (String::new(), 0);
        let outside = std::mem::take(&mut self.unclosed);
        while let Some(character) = raw[done..].chars().next() {
            let rest = &raw[done..];
            if let Some((template, length)) = self.read_template(at + done, rest) {
                text.push_str(&template);
                done += length;
            } else {
                text.push(character);
                done += if character == quote { 2 } else { character.len_utf8() };
            }
        }
        self.unclosed = outside;
        text
    }

    /// Parses `{{…}}` at the start of `rest`. Returns its length, or `None` when the brace is a literal.
    fn template(&mut self, at: usize, rest: &str) -> Option<usize> {
        let (template, length) = self.read_template(at, rest)?;
        self.push_text(&template);
        Some(length)
    }

    /// Returns the normalised template at the start of `rest` (empty if it is a mistake), and its length in the source.
    fn read_template(&mut self, at: usize, rest: &str) -> Option<(String, usize)> {
        let body = rest.strip_prefix("{{").filter(|_| !self.unclosed)?;
        let Some(length) = body.find("}}") else {
            self.unclosed = true;
            return None;
        };
        let body = &body[..length];
        let length = body.len() + 4;
        let variable = body.trim().strip_prefix('.').filter(|name| BOOT_VARIABLES.contains(name));
        if let Some(name) = variable {
            return Some((format!("{{{{ .{name} }}}}"), length));
        }
        self.mistake(at..at + length, BootMistakeKind::UnknownVariable, &rest[..length]);
        Some((String::new(), length))
    }

    fn hold(&mut self, range: std::ops::Range<usize>, found: &str, keysym: u32, down: bool) {
        let position = self.held.iter().position(|(held, _)| *held == keysym);
        let mistake = |kind| BootMistake { element: self.index, range, kind, found: found.to_owned() };
        let is_reported = self.mistakes.len() < MAX_MISTAKES;
        match (down, position) {
            (true, None) => self.held.push((keysym, mistake(BootMistakeKind::UnclosedHold))),
            (true, Some(_)) => {}
            (false, Some(position)) => {
                self.held.remove(position);
            }
            (false, None) if !is_reported => {}
            (false, None) => {
                let mistake = mistake(BootMistakeKind::NotHeld);
                self.mistakes.push(mistake);
            }
        }
        self.tokens.push(if down { BootToken::Hold(keysym) } else { BootToken::Release(keysym) });
    }

    fn push_text(&mut self, piece: &str) {
        if piece.is_empty() {
            return;
        }
        if let Some(BootToken::Text(text)) = self.tokens.last_mut() {
            text.push_str(piece);
        } else {
            self.tokens.push(BootToken::Text(piece.to_owned()));
        }
    }

    fn mistake(&mut self, range: std::ops::Range<usize>, kind: BootMistakeKind, found: &str) {
        if self.mistakes.len() >= MAX_MISTAKES {
            return;
        }
        let found = match cut(found, MAX_FOUND) {
            Some(short) => format!("{short}…"),
            None => found.to_owned(),
        };
        self.mistakes.push(BootMistake { element: self.index, range, kind, found });
    }
}

/// Parses `<`, one character, `On` or `Off`, and `>`. Returns the character, whether it goes down, and the length.
fn character_hold(rest: &str) -> Option<(char, bool, usize)> {
    let mut characters = rest[1..].chars();
    let character = characters.next()?;
    let tail = characters.as_str();
    for (suffix, down) in [("On>", true), ("Off>", false)] {
        if tail.get(..suffix.len()).is_some_and(|start| start.eq_ignore_ascii_case(suffix)) {
            return Some((character, down, 1 + character.len_utf8() + suffix.len()));
        }
    }
    None
}

/// Parses a key's name followed by `On` or `Off`.
fn named_hold(body: &str) -> Option<(u32, bool)> {
    [("on", true), ("off", false)].into_iter().find_map(|(suffix, down)| {
        let split = body.len().checked_sub(suffix.len())?;
        let end = body.get(split..)?;
        end.eq_ignore_ascii_case(suffix).then(|| Some((named_key(&body[..split])?, down)))?
    })
}

/// Returns the known token nearest to `found` (with its angle brackets), if one is similar.
#[must_use]
pub fn nearest_token(found: &str) -> Option<String> {
    let body = found.trim_start_matches('<').trim_end_matches('>').to_ascii_lowercase();
    // In a token with a text, only the name can be misspelt.
    if let Some((name, _)) = body.split_once(char::is_whitespace) {
        let similar = wait::NAMES.iter().filter(|known| {
            strsim::damerau_levenshtein(name, &known.to_ascii_lowercase()) * 3 <= known.len()
        });
        return similar.copied().next().map(|name| format!("<{name} 'TEXT'>"));
    }
    let suffixes: &[&str] = if body.ends_with("on") {
        &["", "On"]
    } else if body.ends_with("off") {
        &["", "Off"]
    } else {
        &[""]
    };
    let names = NAMED.iter().map(|(name, _)| *name).chain(["wait"]);
    names
        .flat_map(|name| suffixes.iter().map(move |suffix| format!("{name}{suffix}")))
        .map(|name| (strsim::damerau_levenshtein(&body, &name.to_ascii_lowercase()), name))
        .filter(|(distance, name)| *distance * 3 <= name.len().max(3))
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, name)| format!("<{name}>"))
}

#[cfg(test)]
mod tests;
