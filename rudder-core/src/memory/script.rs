//! The behaviour of guests, sources and operations: the vocabulary of a test.

use super::rules::{Budget, Execution, Response, Rule};
use crate::{Error, ErrorKind, backend::Death};
use std::{collections::BTreeSet, time::Duration};

/// How the SSH port of a guest behaves that never answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Silence {
    /// Connections are refused.
    Refuses,
    /// Connections are accepted, and nothing is sent.
    Accepts,
}

/// The behaviour of a guest. By default it boots at once, accepts the keys of its seed, reboots and powers off when
/// asked to (`reboot`, `sudo poweroff`…), and everything else that it is asked to run succeeds and prints nothing.
#[derive(Debug, Clone, Default)]
#[must_use]
pub struct Guest {
    pub(super) boot_delay: Duration,
    pub(super) shutdown_delay: Option<Duration>,
    pub(super) reboot_linger: Option<Duration>,
    pub(super) rules: Vec<Rule>,
    pub(super) keys: Vec<String>,
    pub(super) passwords: Vec<(String, String)>,
    pub(super) files: Vec<(String, Vec<u8>)>,
    pub(super) lacks_sftp: bool,
    pub(super) serial: Option<Vec<u8>>,
    pub(super) echoes: BTreeSet<u16>,
    pub(super) screen: String,
    pub(super) answers: Vec<(String, String)>,
    pub(super) hides_typing: bool,
    pub(super) key_interval: Duration,
    pub(super) faults: Faults,
    /// The number of power-ons on which the faults happen; `None` for all.
    pub(super) faulty_boots: Option<u32>,
}

/// The faults of a guest.
#[derive(Debug, Clone, Default)]
pub(super) struct Faults {
    pub(super) silence: Option<Silence>,
    pub(super) rejects_credentials: bool,
    pub(super) changes_host_key: bool,
    pub(super) ignores_shutdown: bool,
    pub(super) dies_in_boot: Option<(Death, Duration)>,
    pub(super) dies_in_shutdown: Option<Death>,
    pub(super) stream_limit: Option<u64>,
    /// The number of keys after which the connection to the display breaks, and whether it stays broken.
    pub(super) display_breaks: Option<(u32, bool)>,
}

impl Guest {
    /// Adds a response to scripts that contain this text, and to scripts whose `executeCommand` does. The first
    /// matching rule applies.
    pub fn on(self, text: impl Into<String>, response: Response) -> Self {
        let text = text.into();
        self.answers(move |execution| {
            let command = execution.execute_command.as_deref().unwrap_or_default();
            [&execution.script, command].iter().any(|part| part.contains(&text)).then(|| response.clone())
        })
    }

    /// Adds a rule: responds with what this function returns; if it returns `None`, later rules are tried.
    ///
    /// ```
    /// # use rudder_core::memory::{MemoryBackend, Response};
    /// MemoryBackend::new().machine("web", |guest| {
    ///     guest.answers(|execution| {
    ///         let version = execution.env.get("VERSION")?;
    ///         Some(Response::ok(format!("installing {version}\n")).writes("/etc/version", version.as_str()))
    ///     })
    /// });
    /// ```
    pub fn answers(
        mut self,
        answer: impl Fn(&Execution) -> Option<Response> + Send + Sync + 'static,
    ) -> Self {
        self.rules.push(Rule::new(answer));
        self
    }

    /// Sets the time from a power-on or a reboot until the SSH server answers.
    pub fn boot_delay(mut self, delay: Duration) -> Self {
        self.boot_delay = delay;
        self
    }

    /// Sets the time from the request to power off until the machine is off.
    pub fn shutdown_delay(mut self, delay: Duration) -> Self {
        self.shutdown_delay = Some(delay);
        self
    }

    /// Sets how long the old SSH server continues to answer after a reboot was requested.
    pub fn reboot_linger(mut self, delay: Duration) -> Self {
        self.reboot_linger = Some(delay);
        self
    }

    /// Accepts this public key (a line of `authorized_keys`) in addition to those of the seed.
    pub fn authorized_key(mut self, line: impl Into<String>) -> Self {
        self.keys.push(line.into());
        self
    }

    /// Accepts this password.
    pub fn password(mut self, user: impl Into<String>, password: impl Into<String>) -> Self {
        self.passwords.push((user.into(), password.into()));
        self
    }

    /// Adds a file that exists when the machine is first powered on.
    pub fn file(mut self, path: impl Into<String>, content: impl Into<Vec<u8>>) -> Self {
        self.files.push((path.into(), content.into()));
        self
    }

    /// Removes the SFTP server: files are uploaded by commands.
    pub fn without_sftp(mut self) -> Self {
        self.lacks_sftp = true;
        self
    }

    /// Writes this to the serial console at boot.
    pub fn serial(mut self, text: impl Into<Vec<u8>>) -> Self {
        self.serial = Some(text.into());
        self
    }

    /// Never answers at the SSH port.
    pub fn never_answers(mut self, how: Silence) -> Self {
        self.faults.silence = Some(how);
        self
    }

    /// Echoes everything received on this port, and closes its side once the peer has closed its own.
    pub fn echoes(mut self, port: u16) -> Self {
        self.echoes.insert(port);
        self
    }

    /// Refuses every key and password.
    pub fn rejects_credentials(mut self) -> Self {
        self.faults.rejects_credentials = true;
        self
    }

    /// Presents another host key after each boot, as an impostor would.
    pub fn changes_host_key(mut self) -> Self {
        self.faults.changes_host_key = true;
        self
    }

    /// Does not power off when asked, neither by command nor by the power button.
    pub fn ignores_shutdown(mut self) -> Self {
        self.faults.ignores_shutdown = true;
        self
    }

    /// Dies this long after power-on. With a delay shorter than [`boot_delay`](Self::boot_delay), before SSH answers.
    pub fn dies_after_power_on(mut self, cause: Death, delay: Duration) -> Self {
        self.faults.dies_in_boot = Some((cause, delay));
        self
    }

    /// Dies instead of powering off.
    pub fn dies_in_shutdown(mut self, cause: Death) -> Self {
        self.faults.dies_in_shutdown = Some(cause);
        self
    }

    /// Breaks every connection after this many bytes, counting both directions.
    pub fn breaks_streams_after(mut self, bytes: u64) -> Self {
        self.faults.stream_limit = Some(bytes);
        self
    }

    /// Shows these lines on the screen at boot, at most 24 of 80 columns, above a prompt at which it echoes what is
    /// [typed](super::MemoryBackend::typed). Without this the screen shows only the prompt.
    pub fn screen(mut self, text: impl Into<String>) -> Self {
        self.screen = text.into();
        self
    }

    /// Shows this answer on the screen when the line was typed at the prompt.
    pub fn on_line(mut self, line: impl Into<String>, answer: impl Into<String>) -> Self {
        self.answers.push((line.into(), answer.into()));
        self
    }

    /// Does not echo what is typed, as at a password prompt.
    pub fn hides_typing(mut self) -> Self {
        self.hides_typing = true;
        self
    }

    /// Takes one keyboard event (a key that goes down or up) per interval. The keyboard queues 16 events, as a PS/2
    /// keyboard queues bytes; events that arrive when it is full are lost.
    pub fn takes_keys_every(mut self, interval: Duration) -> Self {
        self.key_interval = interval;
        self
    }

    /// Breaks the connection to the display once, when this many keys have gone down since power-on. Everything that
    /// the client sent after that key is lost.
    pub fn breaks_display_after(mut self, keys: u32) -> Self {
        self.faults.display_breaks = Some((keys, false));
        self
    }

    /// Breaks the connection to the display after this many keys, and accepts no new one.
    pub fn loses_display_after(mut self, keys: u32) -> Self {
        self.faults.display_breaks = Some((keys, true));
        self
    }

    /// Limits the faults above (silence, credentials, deaths, broken streams and displays, ignored shutdown) to the
    /// first power-ons of machines with this name; afterwards the guest behaves.
    pub fn recovers_after(mut self, power_ons: u32) -> Self {
        self.faulty_boots = Some(power_ons);
        self
    }
}

/// The content behind a URL. By default it is an image of 2 GiB whose bytes are derived from the URL, served at once,
/// with whatever checksum the manifest expects.
#[derive(Debug, Clone)]
#[must_use]
pub struct Source {
    pub(super) virtual_size: u64,
    pub(super) served: u64,
    pub(super) takes: Duration,
    pub(super) revision: u32,
    pub(super) verified: bool,
    pub(super) contents: Option<Vec<u8>>,
    pub(super) files: Vec<(String, Vec<u8>)>,
    pub(super) fault: Option<Fault>,
}

impl Default for Source {
    fn default() -> Self {
        Self {
            virtual_size: 2 << 30,
            served: 64 << 20,
            takes: Duration::ZERO,
            revision: 1,
            verified: false,
            contents: None,
            files: Vec::new(),
            fault: None,
        }
    }
}

impl Source {
    /// Sets the size of the disk that the image describes, in bytes.
    pub fn virtual_size(mut self, bytes: u64) -> Self {
        self.virtual_size = bytes;
        self
    }

    /// Sets how many bytes the server sends.
    pub fn served(mut self, bytes: u64) -> Self {
        self.served = bytes;
        self
    }

    /// Sets how long the transfer takes; progress is reported ten times.
    pub fn takes(mut self, time: Duration) -> Self {
        self.takes = time;
        self
    }

    /// Sets the revision: another number means other bytes behind the same URL.
    pub fn revision(mut self, revision: u32) -> Self {
        self.revision = revision;
        self
    }

    /// Compares the derived bytes with the checksum that the manifest expects, which does not match.
    pub fn wrong_checksum(mut self) -> Self {
        self.verified = true;
        self
    }

    /// Serves these bytes, as a file of the manifest; their checksum is verified.
    pub fn contents(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        let bytes = bytes.into();
        self.served = bytes.len() as u64;
        self.contents = Some(bytes);
        self
    }

    /// Makes the download fail.
    pub fn fails(mut self, fault: Fault) -> Self {
        self.fault = Some(fault);
        self
    }

    /// Adds a file to the image.
    pub fn file(mut self, path: impl Into<String>, content: impl Into<Vec<u8>>) -> Self {
        self.files.push((path.into(), content.into()));
        self
    }
}

/// An operation of the backend that can be made to fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[allow(missing_docs)] // The names are the methods of the contract.
pub enum Operation {
    OpenLab,
    Import,
    Fetch,
    CreateMachine,
    Start,
    Capture,
    Publish,
    Keep,
    Destroy,
}

/// How an operation fails.
#[derive(Debug, Clone)]
#[must_use]
pub struct Fault {
    pub(super) kind: ErrorKind,
    pub(super) message: String,
    pub(super) budget: Budget,
}

impl Fault {
    /// Returns a fault with an error of this kind and message, which happens every time.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), budget: Budget::endless() }
    }

    /// Limits the fault to this many occurrences.
    pub fn times(mut self, times: u32) -> Self {
        self.budget = Budget::times(times);
        self
    }

    pub(super) fn error(&self) -> Error {
        Error::new(self.kind, self.message.clone())
    }
}
