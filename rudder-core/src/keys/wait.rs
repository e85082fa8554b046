//! The tokens of boot commands that wait: for a duration, or for a text on the screen or the serial console.

use super::BootMistakeKind;
use crate::units::parse_duration;
use std::{ops::Range, time::Duration};

/// How long a boot command waits for a text unless it specifies a limit.
pub const DEFAULT_WAIT_LIMIT: Duration = Duration::from_secs(60);

/// The tokens that wait for a text.
pub(super) const NAMES: [&str; 2] = ["waitText", "waitSerial"];

/// Where a text is waited for.
#[derive(Debug, Clone, Copy)]
pub(super) enum On {
    Screen,
    Serial,
}

/// A parsed token that waits for a text. Ranges and positions are relative to its `<`.
#[derive(Debug)]
pub(super) struct Read<'t> {
    pub(super) on: On,
    /// The length of the token; on a mistake, of what is taken for it.
    pub(super) length: usize,
    pub(super) text: Result<Text<'t>, (BootMistakeKind, Range<usize>)>,
}

/// What the token waits for.
#[derive(Debug)]
pub(super) struct Text<'t> {
    /// The text between the quotes, unparsed.
    pub(super) raw: &'t str,
    /// The position at which that text begins.
    pub(super) raw_at: usize,
    /// The quote, which is escaped in the text by doubling it.
    pub(super) quote: char,
    pub(super) limit: Duration,
}

/// Parses `<waitText 'TEXT' LIMIT>` or `<waitSerial …>`; `None` where neither of them begins.
pub(super) fn for_text(rest: &str) -> Option<Read<'_>> {
    let body = rest.strip_prefix('<')?;
    let (name, on) = NAMES
        .into_iter()
        .zip([On::Screen, On::Serial])
        .find(|(name, _)| body.get(..name.len()).is_some_and(|start| start.eq_ignore_ascii_case(name)))?;
    let named = 1 + name.len();
    if !rest[named..].starts_with(|c: char| c.is_whitespace() || "'\">".contains(c)) {
        return None;
    }
    let (length, text) = quoted(rest, named);
    Some(Read { on, length, text })
}

/// Parses what follows the name, which ends at `at`. Returns the length of the whole token, and its content.
fn quoted(rest: &str, at: usize) -> (usize, Result<Text<'_>, (BootMistakeKind, Range<usize>)>) {
    use BootMistakeKind as Kind;
    let opening = after_spaces(rest, at);
    let Some(quote) = rest[opening..].chars().next().filter(|c| "'\"".contains(*c)) else {
        let length = rest.find('>').map_or(rest.len(), |end| end + 1);
        return (length, Err((Kind::MissingText, 0..length)));
    };
    let raw_at = opening + 1;
    let Some(raw) = until_quote(&rest[raw_at..], quote) else {
        return (rest.len(), Err((Kind::UnclosedText, opening..rest.len())));
    };
    let closed = raw_at + raw.len() + 1;
    let Some(limit_length) = rest[closed..].find('>') else {
        return (rest.len(), Err((Kind::UnclosedText, 0..rest.len())));
    };
    let length = closed + limit_length + 1;
    if raw.is_empty() {
        return (length, Err((Kind::MissingText, opening..closed)));
    }
    let written = rest[closed..length - 1].trim();
    let limit = match written {
        "" => Some(DEFAULT_WAIT_LIMIT),
        _ => duration(written).filter(|limit| !limit.is_zero()),
    };
    let text = match limit {
        Some(limit) => Ok(Text { raw, raw_at, quote, limit }),
        None => {
            let start = after_spaces(rest, closed);
            Err((Kind::BadLimit, start..start + written.len()))
        }
    };
    (length, text)
}

/// Returns the text before the first quote that is not doubled; `None` if there is none.
fn until_quote(text: &str, quote: char) -> Option<&str> {
    let mut at = 0;
    loop {
        at += text[at..].find(quote)?;
        if !text[at + 1..].starts_with(quote) {
            return Some(&text[..at]);
        }
        at += 2;
    }
}

fn after_spaces(text: &str, at: usize) -> usize {
    text.len() - text[at..].trim_start().len()
}

/// Parses a duration as written after `wait` and after a text: nothing (1 s), seconds, or a duration.
pub(super) fn duration(text: &str) -> Option<Duration> {
    match text {
        "" => Some(Duration::from_secs(1)),
        _ if text.bytes().all(|c| c.is_ascii_digit()) => parse_duration(&format!("{text}s")).ok(),
        _ => parse_duration(text).ok(),
    }
}
