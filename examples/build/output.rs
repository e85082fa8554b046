//! What the examples print. Printing never panics: a stream may be closed, full, or a terminal that is gone.

use rudder::visible::visible;
use std::{
    fmt::Display,
    io::{self, ErrorKind, Write as _, stderr, stdout},
};

/// What a shell reports of a program that SIGPIPE ended: nobody reads its output any more, as after `| head -1`.
const NOBODY_READS: u8 = 141;

/// Writes lines for people to standard error. When it cannot be written, nobody is there to miss them.
pub(crate) fn tell(text: impl Display) {
    // What guests and servers said is shown, not obeyed.
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

/// Standard output could not be written.
#[derive(Debug)]
pub(crate) struct Unwritten(pub(crate) io::Error);

impl Unwritten {
    /// Says so, and gives the exit code: `otherwise`, except when a reader has just had enough.
    pub(crate) fn tell(&self, otherwise: u8) -> u8 {
        if self.0.kind() == ErrorKind::BrokenPipe {
            return NOBODY_READS;
        }
        tell(format_args!("error: cannot write to standard output: {}", self.0));
        otherwise
    }
}
