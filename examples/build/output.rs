//! Output of the examples. Printing never panics: a stream may be closed, full, or a terminal that is gone.

use rudder::visible::visible;
use std::{
    fmt::Display,
    io::{self, ErrorKind, Write as _, stderr, stdout},
};

/// The exit code that a shell reports for a program ended by SIGPIPE: its output has no reader any more (`| head -1`).
const NO_READER: u8 = 141;

/// Writes lines for people to standard error. Failures are ignored: no one is there to read them.
pub(crate) fn report(text: impl Display) {
    // Control characters in the output of guests and servers are made visible, so that a terminal does not obey them.
    let _ = writeln!(stderr().lock(), "{}", visible(&text.to_string()));
}

/// Writes lines for programs to standard output.
///
/// # Errors
/// Standard output cannot be written.
pub(crate) fn print(text: impl Display) -> Result<(), Unwritten> {
    let mut out = stdout().lock();
    writeln!(out, "{text}").and_then(|()| out.flush()).map_err(Unwritten)
}

/// The error of writing to standard output.
#[derive(Debug)]
pub(crate) struct Unwritten(pub(crate) io::Error);

impl Unwritten {
    /// Reports the error, and returns the exit code: `otherwise`, unless a reader just closed its end.
    pub(crate) fn report(&self, otherwise: u8) -> u8 {
        if self.0.kind() == ErrorKind::BrokenPipe {
            return NO_READER;
        }
        report(format_args!("error: cannot write to standard output: {}", self.0));
        otherwise
    }
}
