//! Splits output bytes into lines of text.

use crate::event::OutputStream;
use std::time::Duration;
use tokio::time::Instant;

/// A line that grows to this many bytes is delivered in pieces of at least this length. The last piece, and a line that
/// is delivered whole, is shorter, and may be empty. So a text of this length or more continues in the next one.
pub const MAX_LINE: usize = 8 * 1024;

/// Interval between delivered states of a line that is redrawn with carriage returns.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);

/// Splits one stream of output into lines.
///
/// - A line ends with `\n` or `\r\n`, which is not part of it. What follows the last line ending is delivered by
///   [`finish`](Self::finish).
/// - A `\r` inside a line starts redrawing it: the previous state is delivered at most once a second, the final state
///   always.
/// - Bytes that are not UTF-8 become U+FFFD; a character that is split between two chunks stays whole.
#[derive(Debug)]
pub(super) struct Lines {
    stream: OutputStream,
    text: String,
    // The beginning of a character whose rest has not arrived yet: at most 3 bytes.
    partial: Vec<u8>,
    // A carriage return arrived, and it is not known yet whether a newline follows.
    returned: bool,
    // Pieces of the current line were delivered.
    pieces: bool,
    last_progress: Option<Instant>,
}

impl Lines {
    pub(super) fn new(stream: OutputStream) -> Self {
        Self {
            stream,
            text: String::new(),
            partial: Vec::new(),
            returned: false,
            pieces: false,
            last_progress: None,
        }
    }

    /// Takes a chunk, and delivers every line that it completes.
    pub(super) fn push(&mut self, chunk: &[u8], output: &mut dyn FnMut(OutputStream, &str)) {
        let mut bytes = std::mem::take(&mut self.partial);
        bytes.extend_from_slice(chunk);
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            match std::str::from_utf8(rest) {
                Ok(text) => {
                    self.push_str(text, output);
                    break;
                }
                Err(error) => {
                    let (good, bad) = rest.split_at(error.valid_up_to());
                    self.push_str(std::str::from_utf8(good).unwrap_or_default(), output);
                    match error.error_len() {
                        Some(len) => {
                            self.push_str("\u{fffd}", output);
                            rest = &bad[len..];
                        }
                        None => {
                            self.partial = bad.to_vec();
                            break;
                        }
                    }
                }
            }
        }
    }

    /// Delivers what remains after the last line ending.
    pub(super) fn finish(&mut self, output: &mut dyn FnMut(OutputStream, &str)) {
        if !std::mem::take(&mut self.partial).is_empty() {
            self.push_str("\u{fffd}", output);
        }
        if !self.text.is_empty() || self.pieces {
            output(self.stream, &self.text);
        }
        self.start_line();
    }

    fn push_str(&mut self, text: &str, output: &mut dyn FnMut(OutputStream, &str)) {
        let mut rest = text;
        while let Some(found) = rest.find(['\n', '\r']) {
            let (head, tail) = rest.split_at(found);
            self.append(head, output);
            if tail.starts_with('\n') {
                output(self.stream, &self.text);
                self.start_line();
            } else {
                self.returned = true;
            }
            rest = &tail[1..];
        }
        self.append(rest, output);
    }

    fn append(&mut self, text: &str, output: &mut dyn FnMut(OutputStream, &str)) {
        if text.is_empty() {
            return;
        }
        if std::mem::take(&mut self.returned) {
            self.draw_over(output);
        }
        let mut rest = text;
        while self.text.len() + rest.len() >= MAX_LINE {
            let room = rest.ceil_char_boundary(MAX_LINE.saturating_sub(self.text.len()));
            let (head, tail) = rest.split_at(room);
            self.text.push_str(head);
            output(self.stream, &self.text);
            self.text.clear();
            self.pieces = true;
            rest = tail;
        }
        self.text.push_str(rest);
    }

    fn draw_over(&mut self, output: &mut dyn FnMut(OutputStream, &str)) {
        let due = self.last_progress.is_none_or(|last| last.elapsed() >= PROGRESS_INTERVAL);
        if self.pieces || due && !self.text.is_empty() {
            output(self.stream, &self.text);
            self.last_progress = Some(Instant::now());
        }
        self.text.clear();
        self.pieces = false;
    }

    fn start_line(&mut self) {
        self.text.clear();
        self.returned = false;
        self.pieces = false;
        self.last_progress = None;
    }
}
