//! What a guest is asked to run, and how a test lets it respond.

use crate::backend::Death;
use std::{
    collections::BTreeMap,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

/// A script that a guest was asked to run: the script of a `shell` step, the command of a `reboot` step, or a command
/// of [`Guest::command`](crate::guest::Guest::command).
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Execution {
    /// The user that was logged in.
    pub user: String,
    /// The text of the script.
    pub script: String,
    /// The environment of the script.
    pub env: BTreeMap<String, String>,
    /// The command line that runs the script, with `{{.Command}}` in place of its path, if the step has one.
    pub execute_command: Option<String>,
}

type Answer = dyn Fn(&Execution) -> Option<Response> + Send + Sync;

/// Responds to some executions.
#[derive(Clone)]
pub(super) struct Rule(Arc<Answer>);

impl Rule {
    pub(super) fn new(answer: impl Fn(&Execution) -> Option<Response> + Send + Sync + 'static) -> Self {
        Self(Arc::new(answer))
    }

    /// Returns what to do for this execution; `None` if the rule does not apply.
    pub(super) fn answer(&self, execution: &Execution) -> Option<Vec<Act>> {
        (self.0)(execution).filter(|response| response.budget.take()).map(|response| response.acts)
    }
}

impl fmt::Debug for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rule").finish_non_exhaustive()
    }
}

/// How many more times something happens; clones share the count.
#[derive(Debug, Clone)]
pub(super) struct Budget(Arc<AtomicU32>);

impl Budget {
    pub(super) fn endless() -> Self {
        Self::times(u32::MAX)
    }

    pub(super) fn times(times: u32) -> Self {
        Self(Arc::new(AtomicU32::new(times)))
    }

    /// Takes one from the budget; `false` if none is left.
    pub(super) fn take(&self) -> bool {
        let less = |left| if left == u32::MAX { Some(left) } else { u32::checked_sub(left, 1) };
        self.0.fetch_update(Ordering::SeqCst, Ordering::SeqCst, less).is_ok()
    }
}

/// A single action of a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Act {
    Stdout(Vec<u8>),
    Stderr(Vec<u8>),
    /// Writes a file of the guest to standard output.
    ReadFile(String),
    WriteFile(String, Vec<u8>),
    Wait(Duration),
    Exit(u32),
    /// Ends with this signal (RFC 4254, 6.10: `KILL`, `TERM`…).
    Signal(String),
    Hang,
    CutStream,
    PowerOff,
    Reboot,
    Die(Death),
}

/// How a guest responds when it is asked to run something: a sequence of actions, followed by exit code 0.
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
    /// Returns a response that writes this to standard output.
    pub fn ok(stdout: impl Into<Vec<u8>>) -> Self {
        Self { acts: Vec::new(), budget: Budget::endless() }.stdout(stdout)
    }

    /// Returns a response that writes this to standard error and ends with this exit code.
    pub fn fails(code: u32, stderr: impl Into<Vec<u8>>) -> Self {
        Self::ok("").stderr(stderr).exit(code)
    }

    /// Writes to standard output.
    pub fn stdout(self, bytes: impl Into<Vec<u8>>) -> Self {
        self.then(Act::Stdout(bytes.into()))
    }

    /// Writes to standard error.
    pub fn stderr(self, bytes: impl Into<Vec<u8>>) -> Self {
        self.then(Act::Stderr(bytes.into()))
    }

    /// Writes a file of the guest to standard output; ends with exit code 1 if it does not exist. In addition to the
    /// files of the boot disk, there are:
    ///
    /// | path | content |
    /// |---|---|
    /// | `/dev/vdb`, `/dev/vdc`… | what was written to the second disk, the third… |
    /// | `/dev/sr0`…, `/dev/fd0` | the first 2 KiB of a CD-ROM, of the floppy |
    /// | `/proc/cpuinfo`, `/proc/meminfo`, `/proc/partitions` | processors, memory, disks, as proc(5) has them |
    /// | `/proc/nics` | a line for each NIC: its hardware address, and `slot` with the number of its slot |
    /// | `/etc/hostname` | the name of the machine |
    pub fn reads(self, path: impl Into<String>) -> Self {
        self.then(Act::ReadFile(path.into()))
    }

    /// Writes a file of the guest, regardless of the user, and creates its parent directories. `/dev/ttyS0` is the
    /// serial console, `/dev/tty1` the screen, `/dev/vdb` the second disk.
    pub fn writes(self, path: impl Into<String>, content: impl Into<Vec<u8>>) -> Self {
        self.then(Act::WriteFile(path.into(), content.into()))
    }

    /// Waits (in tokio's time: a paused clock jumps).
    pub fn wait(self, time: Duration) -> Self {
        self.then(Act::Wait(time))
    }

    /// Ends with this exit code.
    pub fn exit(self, code: u32) -> Self {
        self.then(Act::Exit(code))
    }

    /// Ends with a signal: `KILL`, `TERM`…
    pub fn signal(self, name: impl Into<String>) -> Self {
        self.then(Act::Signal(name.into()))
    }

    /// Never ends.
    pub fn hangs(self) -> Self {
        self.then(Act::Hang)
    }

    /// Breaks the connection; the guest stays up.
    pub fn cuts_the_stream(self) -> Self {
        self.then(Act::CutStream)
    }

    /// Powers off the guest; the script does not end before that.
    pub fn powers_off(self) -> Self {
        self.then(Act::PowerOff).hangs()
    }

    /// Reboots the guest; the script does not end before that.
    pub fn reboots(self) -> Self {
        self.then(Act::Reboot).hangs()
    }

    /// The machine dies.
    pub fn dies(self, cause: Death) -> Self {
        self.then(Act::Die(cause)).hangs()
    }

    /// Limits the response to this many uses; afterwards the next matching rule applies, if there is one.
    pub fn times(mut self, times: u32) -> Self {
        self.budget = Budget::times(times);
        self
    }

    fn then(mut self, act: Act) -> Self {
        self.acts.push(act);
        self
    }
}
