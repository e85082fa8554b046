//! Masks lines that arrive one after the other. Text that may be the beginning of a secret is held back until more is
//! known.

use super::{MASK, Masker};
use std::ops::Range;

/// Maximum number of bytes held back.
const MAX_HELD: usize = 16 * 1024;

/// Masks lines that arrive one after the other, long ones in pieces. Finds secrets that were cut in two or wrapped, or
/// that a dump shows on several lines.
///
/// A line whose end may be the beginning of a secret (at least three characters of it) is held back until the next line
/// arrives or [`finish`](Self::finish) is called.
#[derive(Debug)]
pub struct PieceMasker<'m> {
    masker: &'m Masker,
    /// Lines with their line ends; the last may be incomplete. The first have been output already, and are kept because
    /// a secret may have begun in them.
    text: String,
    /// Number of bytes of `text` that have been output.
    sent: usize,
}

impl<'m> PieceMasker<'m> {
    pub(super) fn new(masker: &'m Masker) -> Self {
        Self { masker, text: String::new(), sent: 0 }
    }

    /// Adds the next piece; `more` means that the line continues in the next piece. Passes everything that is known by
    /// then to `output`, masked and line by line. A line that arrives in pieces is output in pieces, which may be cut
    /// differently.
    pub fn push(&mut self, piece: &str, more: bool, output: &mut dyn FnMut(&str)) {
        self.text.push_str(piece);
        if !more {
            self.text.push('\n');
        }
        let (ranges, open) = self.masker.find_open(&self.text);
        let mut end = match open.hold {
            Some(at) => self.line_start(at),
            None => self.text.len(),
        };
        if more {
            // An incomplete line may end with any part of a secret, in any form.
            let known = self.text.floor_char_boundary(self.text.len().saturating_sub(self.masker.longest()));
            let spanning = ranges.iter().find(|range| range.start < known && known < range.end);
            let known = spanning.map_or(known, |range| range.start).min(open.hold.unwrap_or(known));
            let line = self.line_start(self.text.len());
            if end >= line {
                end = known.max(line);
            }
        } else if self.text.len() - self.sent > MAX_HELD {
            end = self.text.len();
        }
        let end = end.max(self.sent);
        emit(&self.text, self.sent..end, &ranges, output);
        self.sent = end;
        // The next piece may continue a secret that began here.
        let kept = open.any.map_or(end, |at| self.line_start(at)).min(end);
        let kept = if end - kept > MAX_HELD { end } else { kept };
        self.text.drain(..kept);
        self.sent -= kept;
    }

    /// Outputs what was held back; no piece may follow.
    pub fn finish(&mut self, output: &mut dyn FnMut(&str)) {
        let (text, sent) = (std::mem::take(&mut self.text), std::mem::take(&mut self.sent));
        emit(&text, sent..text.len(), &self.masker.find(&text), output);
    }

    /// Returns the beginning of the line that contains this position.
    fn line_start(&self, at: usize) -> usize {
        self.text[..at].rfind('\n').map_or(0, |end| end + 1)
    }
}

/// Outputs lines with each range masked; a range over several lines gets a mask in each.
fn emit(text: &str, part: Range<usize>, ranges: &[Range<usize>], output: &mut dyn FnMut(&str)) {
    let (mut start, mut ranges) = (part.start, ranges.iter().peekable());
    for line in text[part].split_inclusive('\n') {
        let end = start + line.trim_end_matches('\n').len();
        let (mut out, mut from) = (String::with_capacity(line.len()), start);
        while let Some(range) = ranges.peek().filter(|range| range.start < end) {
            if range.end > from && from < end {
                out.push_str(&text[from..range.start.max(from)]);
                out.push_str(MASK);
                from = range.end.min(end);
            }
            if range.end > end {
                break;
            }
            ranges.next();
        }
        out.push_str(&text[from..end]);
        output(&out);
        start += line.len();
    }
}
