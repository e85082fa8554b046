//! What guests, sources and operations are told to do: the vocabulary of a test.

use crate::{Error, ErrorKind, backend::Death};
use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

/// A countdown that all clones of a script share: how often something still happens.
#[derive(Debug, Clone)]
pub(super) struct Budget(Arc<AtomicU32>);

impl Budget {
    fn endless() -> Self {
        Self(Arc::new(AtomicU32::new(u32::MAX)))
    }

    fn times(times: u32) -> Self {
        Self(Arc::new(AtomicU32::new(times)))
    }

    /// Takes one, if there is one left.
    pub(super) fn take(&self) -> bool {
        self.0
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| match left {
                0 => None,
                u32::MAX => Some(u32::MAX),
                left => Some(left - 1),
            })
            .is_ok()
    }
}

/// One thing that a command does, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Act {
    /// Writes to standard output.
    Stdout(Vec<u8>),
    /// Writes to standard error.
    Stderr(Vec<u8>),
    /// Lets time pass.
    Wait(Duration),
    /// Ends with this code.
    Exit(u32),
    /// Is ended by this signal (RFC 4254, 6.10: `KILL`, `TERM`…).
    Signal(String),
    /// Never ends.
    Hang,
    /// The connection breaks.
    Cut,
    /// The guest powers off, and the command does not return.
    PowerOff,
    /// The guest reboots, and the command does not return.
    Reboot,
    /// The machine dies.
    Die(Death),
}

/// How a guest answers a command.
///
/// ```
/// # use rudder_core::memory::Response;
/// # use std::time::Duration;
/// Response::ok("Reading package lists...\n").wait(Duration::from_secs(3)).stderr("E: no such package\n").exit(100);
/// ```
#[derive(Debug, Clone)]
#[must_use]
pub struct Response {
    pub(super) acts: Vec<Act>,
    pub(super) budget: Budget,
}

impl Response {
    /// Writes this and succeeds, unless something that is added says otherwise.
    pub fn ok(stdout: impl Into<Vec<u8>>) -> Self {
        Self { acts: Vec::new(), budget: Budget::endless() }.stdout(stdout)
    }

    /// Writes this to standard error and exits with this code.
    pub fn fails(code: u32, stderr: impl Into<Vec<u8>>) -> Self {
        Self::ok("").stderr(stderr).exit(code)
    }

    /// Writes to standard output.
    pub fn stdout(self, bytes: impl Into<Vec<u8>>) -> Self {
        let bytes = bytes.into();
        if bytes.is_empty() { self } else { self.then(Act::Stdout(bytes)) }
    }

    /// Writes to standard error.
    pub fn stderr(self, bytes: impl Into<Vec<u8>>) -> Self {
        let bytes = bytes.into();
        if bytes.is_empty() { self } else { self.then(Act::Stderr(bytes)) }
    }

    /// Lets time pass (tokio's time: a paused clock jumps).
    pub fn wait(self, time: Duration) -> Self {
        self.then(Act::Wait(time))
    }

    /// Ends with this code.
    pub fn exit(self, code: u32) -> Self {
        self.then(Act::Exit(code))
    }

    /// Is ended by a signal: `KILL`, `TERM`…
    pub fn signal(self, name: impl Into<String>) -> Self {
        self.then(Act::Signal(name.into()))
    }

    /// Never ends.
    pub fn hangs(self) -> Self {
        self.then(Act::Hang)
    }

    /// The connection breaks here; the guest stays up.
    pub fn cuts_the_stream(self) -> Self {
        self.then(Act::Cut)
    }

    /// The guest powers off here.
    pub fn powers_off(self) -> Self {
        self.then(Act::PowerOff)
    }

    /// The guest reboots here.
    pub fn reboots(self) -> Self {
        self.then(Act::Reboot)
    }

    /// The machine dies here.
    pub fn dies(self, cause: Death) -> Self {
        self.then(Act::Die(cause))
    }

    /// Answers like this so many times; afterwards the next rule that matches counts, or none.
    pub fn times(mut self, times: u32) -> Self {
        self.budget = Budget::times(times);
        self
    }

    fn then(mut self, act: Act) -> Self {
        self.acts.push(act);
        self
    }
}

/// How a guest that never answers behaves at its SSH port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Silence {
    /// Nobody listens.
    Refuses,
    /// Connections are accepted, and nothing is said.
    Accepts,
}

/// What a guest does. Without any of it, it boots at once, accepts the keys of its seed, runs what it knows of a shell
/// (`echo`, `exit`, redirection, `mkdir`, `rm`, `mv`, `sleep`, `reboot`, `poweroff`…) and lets every other command succeed.
#[derive(Debug, Clone)]
#[must_use]
pub struct Guest {
    pub(super) boot_delay: Duration,
    pub(super) shutdown_delay: Duration,
    pub(super) reboot_linger: Duration,
    pub(super) rules: Vec<(String, Response)>,
    pub(super) keys: Vec<String>,
    pub(super) passwords: Vec<(String, String)>,
    pub(super) files: Vec<(String, Vec<u8>)>,
    pub(super) missing: BTreeSet<String>,
    pub(super) serial: Vec<u8>,
    pub(super) silence: Option<Silence>,
    pub(super) rejects: bool,
    pub(super) new_host_key_each_boot: bool,
    pub(super) ignores_shutdown: bool,
    pub(super) dies_in_boot: Option<(Death, Duration)>,
    pub(super) dies_in_shutdown: Option<Death>,
    pub(super) stream_limit: Option<u64>,
    pub(super) faulty_boots: u32,
    pub(super) echoes: BTreeSet<u16>,
    pub(super) screen: String,
    pub(super) answers: Vec<(String, String)>,
    pub(super) hides_typing: bool,
    pub(super) key_interval: Duration,
    /// After so many keys the connection to the display breaks, and whether it stays so.
    pub(super) display_breaks: Option<(u32, bool)>,
}

impl Default for Guest {
    fn default() -> Self {
        Self {
            boot_delay: Duration::ZERO,
            // Long enough for the command that asked to report its exit code, as on a real system.
            shutdown_delay: Duration::from_millis(5),
            reboot_linger: Duration::from_millis(5),
            rules: Vec::new(),
            keys: Vec::new(),
            passwords: Vec::new(),
            files: Vec::new(),
            missing: BTreeSet::new(),
            serial: b"Booting in memory\n".to_vec(),
            silence: None,
            rejects: false,
            new_host_key_each_boot: false,
            ignores_shutdown: false,
            dies_in_boot: None,
            dies_in_shutdown: None,
            stream_limit: None,
            faulty_boots: u32::MAX,
            echoes: BTreeSet::new(),
            screen: String::new(),
            answers: Vec::new(),
            hides_typing: false,
            key_interval: Duration::ZERO,
            display_breaks: None,
        }
    }
}

impl Guest {
    /// Answers commands that contain this text, or that run an uploaded file that contains it, directly or through
    /// another uploaded file. The first rule that matches counts.
    pub fn on(mut self, text: impl Into<String>, response: Response) -> Self {
        self.rules.push((text.into(), response));
        self
    }

    /// How long from power-on, and from a reboot, until the SSH server answers.
    pub fn boot_delay(mut self, delay: Duration) -> Self {
        self.boot_delay = delay;
        self
    }

    /// How long from the request to power off until it is off.
    pub fn shutdown_delay(mut self, delay: Duration) -> Self {
        self.shutdown_delay = delay;
        self
    }

    /// How long the old SSH server goes on answering after a reboot was asked for.
    pub fn reboot_linger(mut self, delay: Duration) -> Self {
        self.reboot_linger = delay;
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

    /// Does not have this program: its commands end with code 127.
    pub fn without(mut self, program: impl Into<String>) -> Self {
        self.missing.insert(program.into());
        self
    }

    /// Writes this on its serial console when it boots.
    pub fn serial(mut self, text: impl Into<Vec<u8>>) -> Self {
        self.serial = text.into();
        self
    }

    /// Never answers at its SSH port.
    pub fn never_answers(mut self, how: Silence) -> Self {
        self.silence = Some(how);
        self
    }

    /// Sends back what it receives on this port, and ends its side when the other has ended its own.
    pub fn echoes(mut self, port: u16) -> Self {
        self.echoes.insert(port);
        self
    }

    /// Refuses every key and password.
    pub fn rejects_credentials(mut self) -> Self {
        self.rejects = true;
        self
    }

    /// Shows another host key after each boot, as an impostor would.
    pub fn changes_host_key(mut self) -> Self {
        self.new_host_key_each_boot = true;
        self
    }

    /// Does not power off when asked, neither by command nor by the power button.
    pub fn ignores_shutdown(mut self) -> Self {
        self.ignores_shutdown = true;
        self
    }

    /// Dies so long after power-on. A delay shorter than [`boot_delay`](Self::boot_delay): before SSH answers.
    pub fn dies_after_power_on(mut self, cause: Death, delay: Duration) -> Self {
        self.dies_in_boot = Some((cause, delay));
        self
    }

    /// Dies instead of powering off.
    pub fn dies_in_shutdown(mut self, cause: Death) -> Self {
        self.dies_in_shutdown = Some(cause);
        self
    }

    /// Every connection to it breaks after so many bytes, counting both directions.
    pub fn breaks_streams_after(mut self, bytes: u64) -> Self {
        self.stream_limit = Some(bytes);
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
        self.display_breaks = Some((keys, false));
        self
    }

    /// The same, and no new connection can be made.
    pub fn loses_display_after(mut self, keys: u32) -> Self {
        self.display_breaks = Some((keys, true));
        self
    }

    /// The faults above (silence, credentials, deaths, broken streams and displays, ignored shutdown) happen on the first so many
    /// power-ons of machines of this name only; afterwards the guest is well.
    pub fn recovers_after(mut self, power_ons: u32) -> Self {
        self.faulty_boots = power_ons;
        self
    }

    /// The same guest without its faults.
    pub(super) fn healthy(&self) -> Self {
        Self {
            silence: None,
            rejects: false,
            new_host_key_each_boot: false,
            ignores_shutdown: false,
            dies_in_boot: None,
            dies_in_shutdown: None,
            stream_limit: None,
            display_breaks: None,
            ..self.clone()
        }
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
