//! What guests, sources and operations are told to do: the vocabulary of a test.

use super::rules::{Budget, Execution, Response, Rule};
use crate::{Error, ErrorKind, backend::Death};
use std::{collections::BTreeSet, time::Duration};

/// How a guest that never answers behaves at its SSH port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Silence {
    /// Nobody listens.
    Refuses,
    /// Connections are accepted, and nothing is said.
    Accepts,
}

/// What a guest does. Without any of it, it boots at once, accepts the keys of its seed, reboots and powers off when asked to
/// (`reboot`, `sudo poweroff`…), and whatever else it is asked to run succeeds and prints nothing.
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
    /// On how many power-ons the faults happen, if not on all.
    pub(super) faulty_boots: Option<u32>,
}

/// What a guest does wrong.
#[derive(Debug, Clone, Default)]
pub(super) struct Faults {
    pub(super) silence: Option<Silence>,
    pub(super) rejects_credentials: bool,
    pub(super) changes_host_key: bool,
    pub(super) ignores_shutdown: bool,
    pub(super) dies_in_boot: Option<(Death, Duration)>,
    pub(super) dies_in_shutdown: Option<Death>,
    pub(super) stream_limit: Option<u64>,
    /// After how many keys the connection to the display breaks, and whether it stays broken.
    pub(super) display_breaks: Option<(u32, bool)>,
}

impl Guest {
    /// Answers scripts that contain this text, and scripts whose `executeCommand` does. The first rule that matches counts.
    pub fn on(self, text: impl Into<String>, response: Response) -> Self {
        let text = text.into();
        self.answers(move |execution| {
            let command = execution.execute_command.as_deref().unwrap_or_default();
            [&execution.script, command].iter().any(|part| part.contains(&text)).then(|| response.clone())
        })
    }

    /// Answers what this function answers; rules behind it are asked about the rest.
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

    /// How long from power-on, and from a reboot, until the SSH server answers.
    pub fn boot_delay(mut self, delay: Duration) -> Self {
        self.boot_delay = delay;
        self
    }

    /// How long from the request to power off until it is off.
    pub fn shutdown_delay(mut self, delay: Duration) -> Self {
        self.shutdown_delay = Some(delay);
        self
    }

    /// How long the old SSH server goes on answering after a reboot was asked for.
    pub fn reboot_linger(mut self, delay: Duration) -> Self {
        self.reboot_linger = Some(delay);
        self
    }

    /// Accepts this public key (a line of `authorized_keys`) beside those of the seed.
    pub fn authorized_key(mut self, line: impl Into<String>) -> Self {
        self.keys.push(line.into());
        self
    }

    /// Accepts this password.
    pub fn password(mut self, user: impl Into<String>, password: impl Into<String>) -> Self {
        self.passwords.push((user.into(), password.into()));
        self
    }

    /// Has this file when it is first powered on.
    pub fn file(mut self, path: impl Into<String>, content: impl Into<Vec<u8>>) -> Self {
        self.files.push((path.into(), content.into()));
        self
    }

    /// Has no SFTP server: files are uploaded by commands.
    pub fn without_sftp(mut self) -> Self {
        self.lacks_sftp = true;
        self
    }

    /// Writes this on its serial console when it boots.
    pub fn serial(mut self, text: impl Into<Vec<u8>>) -> Self {
        self.serial = Some(text.into());
        self
    }

    /// Never answers at its SSH port.
    pub fn never_answers(mut self, how: Silence) -> Self {
        self.faults.silence = Some(how);
        self
    }

    /// Sends back what it receives on this port, and ends its side when the other has ended its own.
    pub fn echoes(mut self, port: u16) -> Self {
        self.echoes.insert(port);
        self
    }

    /// Refuses every key and password.
    pub fn rejects_credentials(mut self) -> Self {
        self.faults.rejects_credentials = true;
        self
    }

    /// Shows another host key after each boot, as an impostor would.
    pub fn changes_host_key(mut self) -> Self {
        self.faults.changes_host_key = true;
        self
    }

    /// Does not power off when asked, neither by command nor by the power button.
    pub fn ignores_shutdown(mut self) -> Self {
        self.faults.ignores_shutdown = true;
        self
    }

    /// Dies so long after power-on. A delay shorter than [`boot_delay`](Self::boot_delay): before SSH answers.
    pub fn dies_after_power_on(mut self, cause: Death, delay: Duration) -> Self {
        self.faults.dies_in_boot = Some((cause, delay));
        self
    }

    /// Dies instead of powering off.
    pub fn dies_in_shutdown(mut self, cause: Death) -> Self {
        self.faults.dies_in_shutdown = Some(cause);
        self
    }

    /// Every connection to it breaks after so many bytes, counting both directions.
    pub fn breaks_streams_after(mut self, bytes: u64) -> Self {
        self.faults.stream_limit = Some(bytes);
        self
    }

    /// Shows these lines on its screen when it boots, at most 24 of 80 columns, above a prompt at which it shows what is
    /// [typed](super::MemoryBackend::typed). Without this the prompt is all there is.
    pub fn screen(mut self, text: impl Into<String>) -> Self {
        self.screen = text.into();
        self
    }

    /// Shows this on its screen when the line was typed at its prompt.
    pub fn on_line(mut self, line: impl Into<String>, answer: impl Into<String>) -> Self {
        self.answers.push((line.into(), answer.into()));
        self
    }

    /// Does not show what is typed, as where a password is asked for.
    pub fn hides_typing(mut self) -> Self {
        self.hides_typing = true;
        self
    }

    /// Takes an event of its keyboard, a key that goes down or up, only so often. The keyboard keeps 16 events, as a PS/2
    /// keyboard keeps bytes; what comes when it is full is lost.
    pub fn takes_keys_every(mut self, interval: Duration) -> Self {
        self.key_interval = interval;
        self
    }

    /// The connection to its display breaks, once, when so many keys went down since power-on. What the client has sent
    /// behind that key is lost.
    pub fn breaks_display_after(mut self, keys: u32) -> Self {
        self.faults.display_breaks = Some((keys, false));
        self
    }

    /// The same, and no new connection can be made.
    pub fn loses_display_after(mut self, keys: u32) -> Self {
        self.faults.display_breaks = Some((keys, true));
        self
    }

    /// The faults above (silence, credentials, deaths, broken streams and displays, ignored shutdown) happen on the first so many
    /// power-ons of machines of this name only; afterwards the guest is well.
    pub fn recovers_after(mut self, power_ons: u32) -> Self {
        self.faulty_boots = Some(power_ons);
        self
    }
}

/// What stands behind a URL. Without any of it: an image of 2 GiB whose bytes are invented from the URL, served at once,
/// with whatever checksum the manifest promises.
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
    /// How large the disk is that the image describes, in bytes.
    pub fn virtual_size(mut self, bytes: u64) -> Self {
        self.virtual_size = bytes;
        self
    }

    /// How many bytes the server sends.
    pub fn served(mut self, bytes: u64) -> Self {
        self.served = bytes;
        self
    }

    /// How long the transfer takes; progress is reported ten times.
    pub fn takes(mut self, time: Duration) -> Self {
        self.takes = time;
        self
    }

    /// Another number stands for other bytes behind the same URL.
    pub fn revision(mut self, revision: u32) -> Self {
        self.revision = revision;
        self
    }

    /// Compares the invented bytes with the checksum that the manifest promises, which they do not have.
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

    /// Getting it fails.
    pub fn fails(mut self, fault: Fault) -> Self {
        self.fault = Some(fault);
        self
    }

    /// The image has this file.
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
    /// With an error of this kind that says this, every time.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), budget: Budget::endless() }
    }

    /// So many times, and never again.
    pub fn times(mut self, times: u32) -> Self {
        self.budget = Budget::times(times);
        self
    }

    pub(super) fn error(&self) -> Error {
        Error::new(self.kind, self.message.clone())
    }
}
