//! Decodes bytes to text: size, encoding, byte order mark.

use super::number;
use crate::{
    diagnostic::{Diagnostic, Span},
    manifest::file::MAX_BYTES,
};

/// Returns the text of a file, or why it cannot be decoded.
pub(super) fn decode(bytes: &[u8]) -> Result<&str, Box<Diagnostic>> {
    let refuse = |code: &str, at: Option<usize>, message: String, help: &str| {
        let span = at.map(|at| span_at(bytes, at));
        Err(Box::new(Diagnostic::error(code, "", span, message).with_help(help)))
    };
    if bytes.len() > MAX_BYTES {
        return refuse(
            "too-large",
            None,
            format!("expected a file of at most {} MiB, but found more", MAX_BYTES >> 20),
            "provide large files with `url` in `files`",
        );
    }
    let other = match bytes {
        [0xff, 0xfe, 0, 0, ..] | [0, 0, 0xfe, 0xff, ..] => Some("UTF-32"),
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] | [0, _, 0, ..] | [_, 0, _, 0, ..] => Some("UTF-16"),
        _ => None,
    };
    if let Some(other) = other {
        let message = format!("expected text in UTF-8, but found {other}");
        return refuse("encoding", Some(0), message, "save the file as UTF-8");
    }
    let text = match std::str::from_utf8(bytes) {
        Ok(text) => text,
        Err(error) => {
            let at = error.valid_up_to();
            let message = format!("expected text in UTF-8, but found the byte 0x{:02x}", bytes[at]);
            return refuse("encoding", Some(at), message, "save the file as UTF-8");
        }
    };
    if let Some(at) = bytes.iter().position(|byte| *byte == 0) {
        let message = "expected text, but found a NUL character".to_owned();
        return refuse("encoding", Some(at), message, "use a text file; this may be a binary file");
    }
    Ok(text)
}

/// Returns the location of a byte, before anything was parsed.
fn span_at(bytes: &[u8], at: usize) -> Span {
    let before = &bytes[..at];
    let line_start = before.iter().rposition(|byte| *byte == b'\n').map_or(0, |newline| newline + 1);
    let line = before.iter().filter(|byte| **byte == b'\n').count() + 1;
    let column =
        String::from_utf8_lossy(&before[line_start..]).trim_start_matches('\u{feff}').chars().count() + 1;
    Span { line: number(line), column: number(column), start: at, end: (at + 1).min(bytes.len()) }
}
