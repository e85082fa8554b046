//! Evidence of a failure, gathered before its machine is torn down: console, screen, last output.

use super::sink::Sink;
use crate::{
    backend::Machine,
    capability::{Capabilities, Capability},
    console::{Console, text},
    event::FailureReport,
    files::replace_file,
};
use futures::FutureExt as _;
use std::{path::Path, sync::Arc, time::Duration};
use tokio::time::{Instant, timeout, timeout_at};

/// Time limit for gathering all evidence from a failing machine. Readers of events already know of the failure by then.
const EVIDENCE_LIMIT: Duration = Duration::from_secs(5);
/// How much of that time the display may take; the rest is for a screenshot that the backend takes by other means.
const DISPLAY_LIMIT: Duration = Duration::from_secs(3);
/// How much of the serial console is read (bytes) and shown (lines).
const SERIAL_BYTES: usize = 16 * 1024;
const SERIAL_LINES: usize = 40;

/// Adds the available evidence to the report. Never fails: what cannot be gathered is left out.
pub(super) async fn gather(
    report: &mut FailureReport,
    machine: &Arc<dyn Machine>,
    capabilities: &Capabilities,
    screenshot: Option<&Path>,
    sink: &Sink,
) {
    let end = Instant::now() + EVIDENCE_LIMIT;
    let screen = async {
        // Text and screenshot come from the same frame if the display provides both.
        if !capabilities.has(Capability::Display) || !runs(machine) {
            return None;
        }
        let console = Console::new(Arc::clone(machine));
        timeout(DISPLAY_LIMIT, console.framebuffer()).await.ok()?.ok()
    };
    let (serial, frame) = futures::join!(timeout_at(end, machine.serial_tail(SERIAL_BYTES)), screen);
    if let Ok(Ok(bytes)) = serial {
        // Masked as one text first, since a secret may span lines.
        let text = sink.mask(&plain_lines(&bytes).join("\n"));
        let lines: Vec<&str> = text.lines().collect();
        let shown = &lines[lines.len().saturating_sub(SERIAL_LINES)..];
        report.serial_tail = shown.iter().map(|line| (*line).to_owned()).collect();
    }
    let mut png = None;
    if let Some(frame) = frame {
        let text = sink.mask(text::read(&frame).to_string().trim_end());
        report.screen = text.lines().map(str::to_owned).collect();
        png = frame.to_png().ok();
    }
    let Some(path) = screenshot else { return };
    if png.is_none() && capabilities.has(Capability::Screenshot) {
        png = timeout_at(end, machine.screenshot()).await.ok().and_then(Result::ok);
    }
    let Some(png) = png else { return };
    match save(path, &png).await {
        Ok(()) => report.screenshot = Some(path.to_owned()),
        Err(error) => tracing::warn!(%error, path = %path.display(), "cannot save the screenshot"),
    }
}

/// Returns whether a machine is running. The display of a machine that has ended is not waited for.
fn runs(machine: &Arc<dyn Machine>) -> bool {
    machine.wait().now_or_never().is_none()
}

/// Writes a file that only its owner may read, and creates its directory.
pub(super) async fn save(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let (path, bytes) = (path.to_owned(), bytes.to_vec());
    let write = move || {
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir)?;
        }
        // Another process may be reading the file that an earlier build left there.
        replace_file(&path, &bytes).map_err(std::io::Error::other)
    };
    tokio::task::spawn_blocking(write).await.map_err(std::io::Error::other)?
}

/// Returns the lines of a terminal's output without its control sequences (ECMA-48), parsed with a terminal's state machine.
/// Carriage returns end a line as well, because progress bars use them to overwrite themselves. Empty lines are left out.
pub(super) fn plain_lines(bytes: &[u8]) -> Vec<String> {
    #[derive(Default)]
    struct Screen {
        lines: Vec<String>,
        line: String,
    }
    impl Screen {
        fn end_line(&mut self) {
            let line = std::mem::take(&mut self.line);
            if !line.trim().is_empty() {
                self.lines.push(line.trim_end().to_owned());
            }
        }
    }
    impl vte::Perform for Screen {
        fn print(&mut self, c: char) {
            if !c.is_control() {
                self.line.push(c);
            }
        }

        fn execute(&mut self, byte: u8) {
            match byte {
                b'\n' | b'\r' => self.end_line(),
                b'\t' => self.line.push(' '),
                _ => {}
            }
        }
    }
    let mut screen = Screen::default();
    vte::Parser::new().advance(&mut screen, bytes);
    screen.end_line();
    screen.lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn console_output_is_converted_to_plain_lines() {
        let console = b"\x1b[2J\x1b[1;1HLoading\x1b[0m...\r\n\r\n10%\r20%\r\n\x1b]0;title\x07login:\ttty\x07 \xff\x1b[K";
        assert_eq!(plain_lines(console), ["Loading...", "10%", "20%", "login: tty \u{fffd}"]);
    }

    proptest! {
        #[test]
        fn no_control_character_remains(bytes in prop::collection::vec(any::<u8>(), 0..500)) {
            for line in plain_lines(&bytes) {
                prop_assert!(!line.contains(|c: char| c.is_ascii_control()), "{:?}", line);
                prop_assert!(!line.trim().is_empty());
            }
        }
    }
}
