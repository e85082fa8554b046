//! Waiting for text on the serial line.
//!
//! The line is read from the record that the hypervisor keeps of it ([`Machine::serial_tail`]), so that nothing is missed
//! that was said before, and the line stays free for a person. Where no record is kept, [`Machine::serial`] is read.

use super::Console;
use crate::{
    Error, ErrorKind, Result,
    backend::{BoxedStream, Machine},
};
use std::time::Duration;
use tokio::{
    io::AsyncReadExt as _,
    time::{Instant, sleep_until, timeout_at},
};

/// How often the record is looked at.
const LOOK: Duration = Duration::from_millis(100);
/// How much of the end of the record tells whether anything was added.
const GLANCE: usize = 512;
/// How much of the record is read at most.
const MOST: usize = 16 << 20;
/// How much text is remembered.
const REMEMBERED: usize = 1 << 20;
/// How many of the last lines an error shows.
const SHOWN: usize = 20;

/// What was said on a serial line, without control sequences, and how far it was waited for.
#[derive(Default)]
pub(super) struct SerialLine {
    source: Source,
    parser: vte::Parser,
    said: Said,
}

impl std::fmt::Debug for SerialLine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SerialLine").field("waited", &self.said.waited).finish_non_exhaustive()
    }
}

/// Where the bytes come from.
#[derive(Default)]
enum Source {
    #[default]
    Undecided,
    /// The record: how much of it was read, and its end then.
    Record { read: usize, end: Vec<u8> },
    /// The line itself.
    Stream(BoxedStream),
}

#[derive(Default)]
struct Said {
    text: String,
    /// Up to where the last wait that succeeded came.
    waited: usize,
}

impl vte::Perform for Said {
    fn print(&mut self, character: char) {
        self.text.push(character);
    }

    fn execute(&mut self, byte: u8) {
        if matches!(byte, b'\n' | b'\t') {
            self.text.push(char::from(byte));
        }
    }
}

impl Said {
    /// Whether this was said since the last wait; then it is the last wait.
    fn take(&mut self, text: &str) -> bool {
        let Some(at) = self.text[self.waited..].find(text) else { return false };
        self.waited += at + text.len();
        true
    }

    fn forget(&mut self) {
        let over = self.text.len().saturating_sub(REMEMBERED);
        if over > REMEMBERED / 4 {
            let over = (over..).find(|at| self.text.is_char_boundary(*at)).unwrap_or(over);
            self.text.drain(..over);
            self.waited = self.waited.saturating_sub(over);
        }
    }

    fn last_lines(&self) -> String {
        let lines: Vec<_> = self.text.lines().filter(|line| !line.trim().is_empty()).collect();
        lines[lines.len().saturating_sub(SHOWN)..].join("\n")
    }
}

impl SerialLine {
    fn take_in(&mut self, bytes: &[u8]) {
        self.parser.advance(&mut self.said, bytes);
        self.said.forget();
    }

    /// Reads what is new, or waits a moment for it.
    async fn listen(&mut self, machine: &dyn Machine, deadline: Instant) -> Result<()> {
        if !matches!(self.source, Source::Stream(_)) && self.read_record(machine).await? {
            return Ok(());
        }
        if let Source::Undecided = self.source {
            // A line that cannot be had now may be had later; the record may begin meanwhile.
            if let Ok(stream) = machine.serial().await {
                self.source = Source::Stream(stream);
            }
        }
        let moment = deadline.min(Instant::now() + LOOK);
        let Source::Stream(stream) = &mut self.source else {
            sleep_until(moment).await;
            return Ok(());
        };
        let mut buffer = [0; 4096];
        match timeout_at(moment, stream.read(&mut buffer)).await {
            Ok(Ok(count @ 1..)) => self.take_in(&buffer[..count]),
            // The machine ended, or the line broke: the next look begins anew.
            Ok(_) => {
                self.source = Source::Undecided;
                sleep_until(moment).await;
            }
            Err(_) => {}
        }
        Ok(())
    }

    /// Reads what was added to the record; whether there was anything.
    async fn read_record(&mut self, machine: &dyn Machine) -> Result<bool> {
        let glance = machine.serial_tail(GLANCE).await?;
        if glance.is_empty() {
            return Ok(false);
        }
        let (read, end) = match &self.source {
            Source::Record { read, end } => (*read, end.as_slice()),
            _ => (0, &[][..]),
        };
        if glance == end {
            return Ok(false);
        }
        let mut limit = (read + (64 << 10)).min(MOST);
        let record = loop {
            let record = machine.serial_tail(limit).await?;
            if record.len() < limit || limit == MOST {
                break record;
            }
            limit = (limit * 2).min(MOST);
        };
        let kept = end.len().min(read);
        let fresh = if record.len() >= read && record[read - kept..read] == end[end.len() - kept..] {
            read
        } else if let Some(at) = find_last(&record, end) {
            // Its beginning is no longer kept.
            at + end.len()
        } else {
            // Another power-on, another record.
            self.said = Said::default();
            self.parser = vte::Parser::new();
            0
        };
        self.take_in(&record[fresh..]);
        let end = record[record.len().saturating_sub(GLANCE)..].to_vec();
        self.source = Source::Record { read: record.len(), end };
        Ok(true)
    }
}

fn find_last(record: &[u8], end: &[u8]) -> Option<usize> {
    if end.is_empty() {
        return None;
    }
    record.windows(end.len()).rposition(|window| window == end)
}

impl Console {
    /// Waits until a text comes on the serial line. Control sequences between its letters do not matter. What was said
    /// before counts from where the last such wait ended, and at first from power-on, as far as it is kept; a machine that
    /// is powered on anew begins anew. Waits of several callers come one after the other.
    ///
    /// # Errors
    /// `TimedOut` after the limit, with the last lines of the serial console; what [`Machine::serial_tail`] fails with.
    pub async fn wait_serial(&self, text: &str, limit: Duration) -> Result<()> {
        crate::runtime::check()?;
        let deadline = Instant::now() + limit;
        let mut last = String::new();
        if let Ok(mut serial) = timeout_at(deadline, self.serial.lock()).await {
            loop {
                if serial.said.take(text) {
                    return Ok(());
                }
                if Instant::now() >= deadline {
                    break;
                }
                serial.listen(&*self.machine, deadline).await?;
            }
            last = serial.said.last_lines();
        }
        let last =
            if last.is_empty() { "it said nothing".to_owned() } else { format!("it said last:\n{last}") };
        let message =
            format!("expected {text:?} on the serial line within {} s, but {last}", limit.as_secs_f32());
        Err(Error::new(ErrorKind::TimedOut, message))
    }
}
