//! Waiting for text on the serial console.
//!
//! The console is read from its log ([`Machine::serial_log`]), so that nothing written earlier is missed, and the
//! console stays free for a person.

use super::Console;
use crate::{
    Error, ErrorKind, Result,
    backend::{Machine, SerialLog},
};
use std::time::Duration;
use tokio::{
    io::AsyncReadExt as _,
    time::{Instant, sleep_until, timeout_at},
};

/// Interval between checks whether a machine that has ended, or was never started, was powered on.
const POWER_ON_INTERVAL: Duration = Duration::from_millis(500);
/// How much text is kept, in bytes.
const MAX_KEPT: usize = 1 << 20;
/// How many of the last lines an error shows.
const SHOWN_LINES: usize = 20;

/// The output of a serial console, without control sequences, and the position up to which it was waited for.
#[derive(Default)]
pub(super) struct SerialLine {
    source: Source,
    parser: vte::Parser,
    output: Output,
}

impl std::fmt::Debug for SerialLine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SerialLine").field("matched", &self.output.matched).finish_non_exhaustive()
    }
}

/// Where the bytes come from.
#[derive(Default)]
struct Source {
    /// The power-on that the log belongs to; 0 before there was one.
    power_on: u64,
    /// The position after the last byte that was read.
    read: u64,
    /// The log, until it ends.
    open: Option<SerialLog>,
}

#[derive(Default)]
struct Output {
    text: String,
    /// The end of the text that the last successful wait matched.
    matched: usize,
}

impl vte::Perform for Output {
    fn print(&mut self, character: char) {
        self.text.push(character);
    }

    fn execute(&mut self, byte: u8) {
        if matches!(byte, b'\n' | b'\t') {
            self.text.push(char::from(byte));
        }
    }
}

impl Output {
    /// Whether a text was written since the last successful wait; if so, this becomes the last one.
    fn take(&mut self, text: &str) -> bool {
        let Some(at) = self.text[self.matched..].find(text) else { return false };
        self.matched += at + text.len();
        true
    }

    fn forget(&mut self) {
        let over = self.text.len().saturating_sub(MAX_KEPT);
        if over > MAX_KEPT / 4 {
            let over = (over..).find(|at| self.text.is_char_boundary(*at)).unwrap_or(over);
            self.text.drain(..over);
            self.matched = self.matched.saturating_sub(over);
        }
    }

    fn last_lines(&self) -> String {
        let lines: Vec<_> = self.text.lines().filter(|line| !line.trim().is_empty()).collect();
        lines[lines.len().saturating_sub(SHOWN_LINES)..].join("\n")
    }
}

impl SerialLine {
    fn push(&mut self, bytes: &[u8]) {
        self.parser.advance(&mut self.output, bytes);
        self.output.forget();
    }

    /// Reads new output, or waits for it until the deadline at most.
    async fn read_more(&mut self, machine: &dyn Machine, deadline: Instant) -> Result<()> {
        let mut buffer = [0; 4096];
        let Some(log) = &mut self.source.open else { return self.open(machine, deadline).await };
        match timeout_at(deadline, log.stream.read(&mut buffer)).await {
            Ok(Ok(count @ 1..)) => {
                self.source.read += count as u64;
                self.push(&buffer[..count]);
            }
            // The machine has ended, or the connection broke.
            Ok(_) => self.source.open = None,
            Err(_) => {}
        }
        Ok(())
    }

    /// Opens the log at the position that was read last; the log of another power-on from its beginning.
    async fn open(&mut self, machine: &dyn Machine, deadline: Instant) -> Result<()> {
        let mut log = machine.serial_log(self.source.read).await?;
        if log.power_on != self.source.power_on {
            // A log that was requested from a position starts at that position.
            if log.start > 0 && self.source.read > 0 {
                log = machine.serial_log(0).await?;
            }
            self.output = Output::default();
            self.parser = vte::Parser::new();
        } else if log.end == self.source.read {
            sleep_until(deadline.min(Instant::now() + POWER_ON_INTERVAL)).await;
        }
        self.source = Source { power_on: log.power_on, read: log.start, open: Some(log) };
        Ok(())
    }
}

impl Console {
    /// Waits until a text appears on the serial console. Control sequences between its letters are ignored. Earlier
    /// output counts from where the last such wait ended, and at first from power-on, as far as it is kept; after
    /// another power-on, it counts from the beginning. Concurrent waits run one after another.
    ///
    /// # Errors
    /// `TimedOut` after the limit, with the last lines of the serial console; otherwise the errors of
    /// [`Machine::serial_log`].
    pub async fn wait_serial(&self, text: &str, limit: Duration) -> Result<()> {
        crate::runtime::check()?;
        let deadline = Instant::now() + limit;
        let mut last = String::new();
        if let Ok(mut serial) = timeout_at(deadline, self.serial.lock()).await {
            loop {
                if serial.output.take(text) {
                    return Ok(());
                }
                if Instant::now() >= deadline {
                    break;
                }
                serial.read_more(&*self.machine, deadline).await?;
            }
            last = serial.output.last_lines();
        }
        let last = if last.is_empty() {
            "it wrote nothing".to_owned()
        } else {
            format!("its last output was:\n{last}")
        };
        let message =
            format!("expected {text:?} on the serial console within {} s, but {last}", limit.as_secs_f32());
        Err(Error::new(ErrorKind::TimedOut, message))
    }
}
