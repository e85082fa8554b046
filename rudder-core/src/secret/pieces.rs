//! Masks lines that come one after the other: what may be the beginning of a secret waits until what follows is known.

use super::{MASK, Masker};
use std::ops::Range;

/// How much waits at most, in bytes.
const MAX_HELD: usize = 16 * 1024;

/// Masks lines that come one after the other, long ones in pieces: a secret that was cut in two, that was wrapped, or that a
/// dump shows on several lines is found.
///
/// A line whose end may be the beginning of a secret (three characters of it) is held back until the next comes, or
/// [`finish`](Self::finish) is called.
#[derive(Debug)]
pub struct PieceMasker<'m> {
    masker: &'m Masker,
    /// Lines with their ends; the last may have none yet. The first were given out already, and are kept because a secret may
    /// have begun in them.
    text: String,
    /// How much of it was given out.
    sent: usize,
}

impl<'m> PieceMasker<'m> {
    pub(super) fn new(masker: &'m Masker) -> Self {
        Self { masker, text: String::new(), sent: 0 }
    }

    /// Takes the next piece; `more`: the line goes on in the next. What is known by then is given to `output`, masked, line by
    /// line; a line that came in pieces leaves in pieces, which need not be the same.
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
            // Of a line that goes on, any part of a secret may be at the end, in any form.
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
        // What comes next may be the rest of a secret that began here.
        let kept = open.any.map_or(end, |at| self.line_start(at)).min(end);
        let kept = if end - kept > MAX_HELD { end } else { kept };
        self.text.drain(..kept);
        self.sent -= kept;
    }

    /// Gives out what was held back: nothing follows.
    pub fn finish(&mut self, output: &mut dyn FnMut(&str)) {
        let (text, sent) = (std::mem::take(&mut self.text), std::mem::take(&mut self.sent));
        emit(&text, sent..text.len(), &self.masker.find(&text), output);
    }

    /// Where the line around this place begins.
    fn line_start(&self, at: usize) -> usize {
        self.text[..at].rfind('\n').map_or(0, |end| end + 1)
    }
}

/// Gives out lines with a mask in place of each range; of a range over several lines, one in each.
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
