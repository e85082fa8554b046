//! How a script and its output travel through an arbitrary login shell: both ends of the protocol.
//!
//! An SSH server hands every command line to the user's login shell, which may be any program (csh, fish, zsh, a
//! wrapper), and whose start-up files may write anything before and after the command. So:
//!
//! - the line is always the same except for two random words. It contains no variables, newlines, backslashes or
//!   exclamation marks outside of what every shell takes literally in single quotes, and replaces the login shell with
//!   `/bin/sh`;
//! - the script is not part of the line: `/bin/sh` reads it from its standard input, once it has reported that it is
//!   running;
//! - on each stream, everything before a random mark is from the login shell, and so is everything after a second mark.
//!   The exit status of the script follows the second mark, since a wrapper may end with another status.
//!
//! ```text
//! line    exec /bin/sh -c '… printf %s A B … read -r rudder; eval "$rudder"'
//! output  Welcome to example.org!AB⏎ hello⏎ ENDO 0⏎ENDO⏎ bye
//! input   loader ENDO⏎ echo hello⏎ ENDO⏎ what the script reads
//! ```

use crate::event::CommandStatus;
use std::fmt::Write as _;

/// What the marks of each stream begin with.
const OUT: &str = "O";
const ERR: &str = "E";
/// How much of what a login shell writes before a script runs is kept for an error, in bytes.
const MAX_NOISE: usize = 4096;

/// The marks of one script.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Frame {
    begin: String,
    end: String,
}

impl Frame {
    pub(crate) fn new() -> Self {
        let word = || format!("{:016x}{:016x}", rand::random::<u64>(), rand::random::<u64>());
        Self { begin: word(), end: word() }
    }

    /// Returns the command line that an SSH server is asked to run.
    pub(crate) fn line(&self) -> String {
        let begin = &self.begin;
        // In two arguments, so that a login shell which echoes its commands does not print the mark.
        format!(
            "exec /bin/sh -c 'printf %s {ERR} {begin} >&2; echo >&2; printf %s {OUT} {begin}; echo; read -r rudder; eval \"$rudder\"'"
        )
    }

    /// Returns what is sent to standard input, before what the script reads, once the shell has begun.
    pub(crate) fn input(&self, script: &str) -> String {
        let end = &self.end;
        // If a child was ended by a signal, a shell reports it with a message of its own and with 128 plus the signal's
        // number; for an exit code, it prints no message.
        let mut text = format!(
            "{{ set +eux; }} 2>/dev/null; rudder=; rudder_n=$(printf '\\n_'); rudder_n=${{rudder_n%_}}; \
             while IFS= read -r rudder_l && [ \"$rudder_l\" != {OUT}{end} ]; do rudder=$rudder$rudder_l$rudder_n; done; \
             exec 3>&1 4>&2; rudder=$( {{ ( eval \"$rudder\" ) >&3 2>&4 3>&- 4>&-; echo \"$?\"; }} 2>&1 ); \
             printf '%s\\n' \"{OUT}{end} $rudder\" {OUT}{end}; printf %s {ERR}{end} >&2\n"
        );
        let _ = write!(text, "{script}\n{OUT}{end}\n");
        text
    }

    /// Returns a cutter that extracts the script's standard output.
    pub(crate) fn stdout(&self) -> Cutter {
        Cutter::new(OUT, self)
    }

    /// Returns a cutter that extracts the script's standard error.
    pub(crate) fn stderr(&self) -> Cutter {
        Cutter::new(ERR, self)
    }
}

/// Extracts the output of a script from one stream.
#[derive(Debug)]
pub(crate) struct Cutter {
    begin: Vec<u8>,
    end: Vec<u8>,
    position: Position,
    /// Before: a possible beginning of the first mark. Within: a possible beginning of the second mark. After: what
    /// followed the second mark.
    held: Vec<u8>,
    noise: Vec<u8>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Position {
    Before,
    Within,
    After,
}

impl Cutter {
    fn new(stream: &str, frame: &Frame) -> Self {
        Self {
            begin: format!("{stream}{}\n", frame.begin).into_bytes(),
            end: format!("{stream}{}", frame.end).into_bytes(),
            position: Position::Before,
            held: Vec::new(),
            noise: Vec::new(),
        }
    }

    /// Whether the script has begun.
    pub(crate) fn has_begun(&self) -> bool {
        self.position != Position::Before
    }

    /// Whether the script has ended.
    pub(crate) fn has_ended(&self) -> bool {
        self.position == Position::After
    }

    /// Takes received bytes, and returns those of the script among them and the bytes that were held back.
    pub(crate) fn push(&mut self, chunk: &[u8]) -> Vec<u8> {
        self.held.extend_from_slice(chunk);
        if self.position == Position::Before {
            let Some(at) = find(&self.held, &self.begin) else {
                let kept = beginning(&self.held, &self.begin);
                self.noise.extend(self.held.drain(..self.held.len() - kept));
                self.noise.drain(..self.noise.len().saturating_sub(MAX_NOISE));
                return Vec::new();
            };
            self.noise.extend_from_slice(&self.held[..at]);
            self.held.drain(..at + self.begin.len());
            self.position = Position::Within;
        }
        if self.position == Position::After {
            self.held.truncate(MAX_NOISE);
            return Vec::new();
        }
        if let Some(at) = find(&self.held, &self.end) {
            self.position = Position::After;
            let rest = self.held.split_off(at);
            return std::mem::replace(&mut self.held, rest[self.end.len()..].to_vec());
        }
        let kept = beginning(&self.held, &self.end);
        let rest = self.held.split_off(self.held.len() - kept);
        std::mem::replace(&mut self.held, rest)
    }

    /// Returns the held back bytes of the script's output, once nothing more arrives.
    pub(crate) fn rest(&mut self) -> Vec<u8> {
        if self.position == Position::Within { std::mem::take(&mut self.held) } else { Vec::new() }
    }

    /// Returns what the login shell wrote before the script began.
    pub(crate) fn noise(&self) -> String {
        let before = if self.has_begun() { &[][..] } else { &self.held };
        String::from_utf8_lossy(&[&self.noise, before].concat()).trim().to_owned()
    }

    /// Returns the exit status of the script, if it was received.
    pub(crate) fn status(&self) -> Option<CommandStatus> {
        if self.position != Position::After {
            return None;
        }
        let text = &self.held[..find(&self.held, &self.end)?];
        let text = String::from_utf8_lossy(text);
        let mut lines = text.lines().filter(|line| !line.trim().is_empty());
        let code = lines.next_back()?.trim().parse().ok()?;
        let is_signal = code > 128 && lines.next().is_some();
        Some(if is_signal { CommandStatus::Signal(signal(code - 128)) } else { CommandStatus::Code(code) })
    }
}

/// Returns the name of a signal as in RFC 4254, 6.10, by its number, for numbers that are the same on all systems
/// (POSIX, kill(1)) or on most.
fn signal(number: u32) -> String {
    let name = match number {
        1 => "HUP",
        2 => "INT",
        3 => "QUIT",
        4 => "ILL",
        6 => "ABRT",
        8 => "FPE",
        9 => "KILL",
        10 => "USR1",
        11 => "SEGV",
        12 => "USR2",
        13 => "PIPE",
        14 => "ALRM",
        15 => "TERM",
        _ => return number.to_string(),
    };
    name.to_owned()
}

fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    bytes.windows(what.len()).position(|window| window == what)
}

/// Returns how many bytes at the end may be the beginning of `what`.
fn beginning(bytes: &[u8], what: &[u8]) -> usize {
    (1..what.len().min(bytes.len() + 1)).rev().find(|count| bytes.ends_with(&what[..*count])).unwrap_or(0)
}

/// The other end: a guest that understands the line without a shell.
#[cfg(feature = "memory")]
#[derive(Debug)]
pub(crate) struct Served {
    begin: String,
}

/// What was sent to a [`Served`] line.
#[cfg(feature = "memory")]
#[derive(Debug)]
pub(crate) struct Sent {
    end: String,
    /// The script.
    pub(crate) script: String,
    /// The input of the script.
    pub(crate) input: Vec<u8>,
}

#[cfg(feature = "memory")]
impl Served {
    /// Parses a command line; `None` when it is a different one.
    pub(crate) fn read(line: &str) -> Option<Self> {
        let rest = line.strip_prefix("exec /bin/sh -c 'printf %s E ")?;
        let begin = rest.split(' ').next()?.to_owned();
        let frame = Frame { begin, end: String::new() };
        (frame.line() == line).then_some(Self { begin: frame.begin })
    }

    /// Returns what is written when the line runs, to standard output and to standard error.
    pub(crate) fn begin(&self) -> (String, String) {
        (format!("{OUT}{}\n", self.begin), format!("{ERR}{}\n", self.begin))
    }
}

#[cfg(feature = "memory")]
impl Sent {
    /// Parses what was sent; `None` when it is incomplete.
    pub(crate) fn read(bytes: &[u8]) -> Option<Self> {
        let first = bytes.iter().position(|c| *c == b'\n')?;
        let loader = std::str::from_utf8(&bytes[..first]).ok()?;
        let (_, end) = loader.rsplit_once(&format!(" {OUT}"))?;
        let end = end.split(';').next()?.to_owned();
        let mark = format!("\n{OUT}{end}\n");
        let at = first + find(&bytes[first..], mark.as_bytes())?;
        let script = String::from_utf8_lossy(bytes.get(first + 1..at).unwrap_or_default()).into_owned();
        Some(Self { script, input: bytes[at + mark.len()..].to_vec(), end })
    }

    /// Returns what is written at the end, to standard output and to standard error.
    pub(crate) fn end(&self, code: u32) -> (String, String) {
        let end = &self.end;
        (format!("{OUT}{end} {code}\n{OUT}{end}\n"), format!("{ERR}{end}"))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_line_is_safe_in_every_shell() {
        let line = Frame::new().line();
        assert!(!line.contains(['\n', '!', '\\', '`', '#', '*', '?', '[', '{', '~', '^']), "{line}");
        assert_eq!(line.matches('\'').count(), 2);
        let outside: String = line.split('\'').step_by(2).collect();
        assert_eq!(outside, "exec /bin/sh -c ");
    }

    #[test]
    #[cfg(feature = "memory")]
    fn the_guest_side_understands_the_line() {
        let frame = Frame::new();
        let served = Served::read(&frame.line()).unwrap();
        assert_eq!(served.begin, frame.begin);
        assert!(Served::read("exec /bin/sh -c 'true'").is_none());
        for (script, input) in [("echo a\necho b", &b"data\n"[..]), ("", b""), ("\n", b"\0")] {
            let bytes = [frame.input(script).as_bytes(), input].concat();
            let sent = Sent::read(&bytes).unwrap();
            assert_eq!((&*sent.script, &*sent.input, &sent.end), (script, input, &frame.end));
            assert!(Sent::read(&bytes[..bytes.len() - input.len() - 1]).is_none());
        }
    }

    #[test]
    fn the_exit_status_follows_the_end_mark() {
        for (said, expected) in [
            ("0", Some(CommandStatus::Code(0))),
            ("137", Some(CommandStatus::Code(137))),
            ("Killed\n137", Some(CommandStatus::Signal("KILL".into()))),
            ("sh: 1: terminated by 35\n163", Some(CommandStatus::Signal("35".into()))),
            ("a warning\n3", Some(CommandStatus::Code(3))),
            ("", None),
        ] {
            let frame = Frame::new();
            let mut out = frame.stdout();
            let end = format!("O{}", frame.end);
            out.push(format!("O{}\ntext{end} {said}\n{end}\nbye, exit code 0", frame.begin).as_bytes());
            assert_eq!(out.status(), expected, "{said:?}");
        }
    }

    proptest! {
        /// The script's output is extracted whatever a login shell writes around it, and however it is split into
        /// chunks.
        #[test]
        fn the_output_is_extracted_from_any_noise(
            before in prop::collection::vec(any::<u8>(), 0..200),
            text in prop::collection::vec(any::<u8>(), 0..200),
            after in prop::collection::vec(any::<u8>(), 0..200),
            sizes in prop::collection::vec(1usize..40, 1..80),
            partial in 0usize..34,
        ) {
            let frame = Frame::new();
            let (begin, end) = (format!("O{}\n", frame.begin), format!("O{}", frame.end));
            // Partial marks, which are not marks.
            let before = [&before[..], &begin.as_bytes()[..partial.min(33)]].concat();
            let text = [&text[..], &end.as_bytes()[..partial.min(32)]].concat();
            let stream = [&before[..], begin.as_bytes(), &text, format!("{end} 5\n{end}\n").as_bytes(), &after].concat();
            let mut out = frame.stdout();
            let (mut found, mut rest, mut sizes) = (Vec::new(), &stream[..], sizes.into_iter().cycle());
            while !rest.is_empty() {
                let (chunk, more) = rest.split_at(sizes.next().unwrap().min(rest.len()));
                found.extend(out.push(chunk));
                rest = more;
            }
            prop_assert_eq!(found, text);
            prop_assert_eq!(out.status(), Some(CommandStatus::Code(5)));
        }

        /// Output is passed on as soon as it cannot be a mark, even without a newline.
        #[test]
        fn output_is_not_held_back(text in "[a-zN-Z ]{1,100}") {
            let frame = Frame::new();
            let mut out = frame.stdout();
            out.push(format!("O{}\n", frame.begin).as_bytes());
            let held = usize::from(text.ends_with('O'));
            prop_assert_eq!(out.push(text.as_bytes()), &text.as_bytes()[..text.len() - held]);
        }
    }
}
