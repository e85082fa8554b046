//! Decides what is done with a running machine, and how it ended.
//!
//! A pure state machine: [`Kernel::handle`] takes an [`Input`] and the time, and returns the [`Action`]s to carry out.
//! Times are durations since the machine started to run. The caller calls it again at [`Kernel::deadline`] at the latest,
//! until [`Kernel::exit`] returns how the machine ended.
//!
//! # What ends a machine
//! | observed or requested | what happens | how the machine ended, unless a line above applies |
//! |---|---|---|
//! | a panic, or a disk error | a last screenshot, then it is killed | died: of the first of them |
//! | the hypervisor is unreachable for [`LOST_LIMIT`] | nothing: it cannot be controlled | died with its hypervisor |
//! | it still runs [`GIVE_UP_LIMIT`] after it was killed | nothing is left to do | died with its hypervisor |
//! | its TPM ends, and the machine does not end within [`TPM_LIMIT`] | it is killed | died with its hypervisor |
//! | its guest powers off | its process ends by itself | powered off |
//! | [`Stop::Kill`], or the limit of [`Stop::Graceful`] | it is asked to quit, and killed after [`QUIT_LIMIT`] | killed, for the first reason |
//! | its control connection closes, and it does not end within [`HANG_UP_LIMIT`] | it is killed | died with its hypervisor |
//! | its process ends, or is reported to have ended | – | died with its hypervisor |
//!
//! A guest that powers off while the machine is about to be killed for being slow has powered off.
//!
//! # Who reports the end
//! See [`Reporter`]. A process and what is reported about it are observed separately, in any order, so after the end of
//! the process there is a limit for the rest of the report. A daemon is the best source of how a machine ended, but it
//! can be slow: libvirt waits until the host's init has reaped the process, and answers nothing about the domain in the
//! meantime. Whatever it has not reported after [`DAEMON_GRACE`] is concluded from what is known. If only the daemon can
//! know whether the guest powered off, it gets [`DAEMON_PATIENCE`].

mod facts;

use self::facts::{Facts, Lost};
use rudder_core::backend::{Death, Exit, Stop};
use std::time::Duration;

/// Interval at which the power button is pressed again for a guest that does not react: it may not have been listening
/// yet.
pub const PRESS_AGAIN: Duration = Duration::from_secs(10);
/// How long a hypervisor may take to exit cleanly before it is killed.
pub const QUIT_LIMIT: Duration = Duration::from_secs(2);
/// Interval at which a machine is killed again that has not ended: the hypervisor's daemon may have been unreachable.
pub const KILL_AGAIN: Duration = Duration::from_secs(2);
/// How long a machine may take to end after it was killed for the first time.
pub const GIVE_UP_LIMIT: Duration = Duration::from_secs(60);
/// How long the last screenshot of a failed machine may take.
pub const SCREENSHOT_LIMIT: Duration = Duration::from_secs(1);
/// How long to wait, after the process or its control connection has ended, for the other to end as well.
pub const HANG_UP_LIMIT: Duration = Duration::from_secs(1);
/// How long a machine may keep running after its TPM has ended. A TPM ends when its machine does, which may be observed
/// a moment later.
pub const TPM_LIMIT: Duration = Duration::from_secs(1);
/// How long a daemon may be unreachable, for example while it restarts, before the machine counts as lost.
pub const LOST_LIMIT: Duration = Duration::from_secs(3);
/// How long a daemon may take to report how a machine ended, once its process is known to have ended.
pub const DAEMON_GRACE: Duration = Duration::from_millis(750);
/// The same, for a process that exited successfully or whose exit status is unknown: only the daemon knows whether its
/// guest powered off.
pub const DAEMON_PATIENCE: Duration = Duration::from_secs(30);

/// Who reports what happens to a machine, apart from the end of its process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reporter {
    /// The process itself, over a control connection that closes when the process ends. The process ends by itself when
    /// its guest powers off, so a guest has powered off only if the process did not fail.
    Process,
    /// A daemon, which may be slow or unreachable. It ends the process of a guest that powered off, so the exit status
    /// of the process means nothing then.
    Daemon,
}

/// Why a machine shut down.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Shutdown {
    /// Its guest powered off.
    ByGuest,
    /// For this other reason, as the hypervisor reports it.
    Other(String),
}

/// How a process ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcessEnd {
    /// Whether it succeeded.
    pub outcome: Outcome,
    /// A clause about it: "QEMU was ended by signal 9 (SIGKILL)".
    pub detail: String,
    /// The last lines of its output; may be empty.
    pub last_lines: String,
}

/// Whether a process succeeded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It exited with code 0.
    Success,
    /// It exited with another code, or a signal ended it.
    Failure,
    /// Its exit status could not be read.
    Unknown,
}

/// What was observed of a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Observation {
    /// A daemon reports that the machine runs.
    Running,
    /// The machine shuts down, and its process is about to end. Only the first one counts.
    Shutdown(Shutdown),
    /// The guest's kernel panicked.
    Panicked,
    /// A disk could not be read or written, and the machine was paused.
    DiskFailed {
        /// Which operation failed, and why, if that is known.
        detail: Option<String>,
        /// Whether the host's disk is full.
        full: bool,
    },
    /// The TPM of the machine has ended, in this way.
    TpmEnded(String),
    /// The control connection to the process has closed. Nothing else is reported after that.
    Disconnected,
    /// The daemon cannot be reached, for this reason.
    Unreachable(String),
    /// A daemon reports that the machine is off.
    Off {
        /// Whether its guest powered off.
        powered_off: bool,
        /// Why it is off, if its guest did not power off and it was not ended on request.
        detail: String,
    },
    /// The process has ended.
    ProcessEnded(ProcessEnd),
    /// The requested screenshot was taken, or could not be taken.
    ScreenshotTaken,
}

/// An input of the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// A request to end the machine.
    Stop(Stop),
    /// Something was observed.
    Observed(Observation),
    /// Nothing but the passing of time.
    Time,
}

/// An action for the driver. None of them is waited for: what they lead to is observed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Press the power button.
    PressPowerButton,
    /// Ask the hypervisor to end the machine cleanly, so that it writes what it holds in memory.
    Quit,
    /// End the machine immediately.
    Kill,
    /// Take a last screenshot, and report [`Observation::ScreenshotTaken`].
    TakeScreenshot,
}

/// A request to shut down that the guest has not fulfilled yet.
#[derive(Debug)]
struct Request {
    limit: Duration,
    deadline: Duration,
    press: Duration,
}

/// The state of a machine from the moment it runs until it has ended.
#[derive(Debug)]
pub struct Kernel {
    reporter: Reporter,
    facts: Facts,
    request: Option<Request>,
    quit_requested: bool,
    disconnected: bool,
    /// When the TPM ended, and how.
    tpm_ended: Option<(Duration, String)>,
    unreachable_since: Option<Duration>,
    process_ended: Option<Duration>,
    screenshot_at: Option<Duration>,
    hang_up_at: Option<Duration>,
    kill_at: Option<Duration>,
    give_up_at: Option<Duration>,
    exit: Option<Exit>,
}

impl Kernel {
    /// Returns the state of a machine that has just started to run.
    #[must_use]
    pub fn new(reporter: Reporter) -> Self {
        Self {
            reporter,
            facts: Facts::default(),
            request: None,
            quit_requested: false,
            disconnected: false,
            tpm_ended: None,
            unreachable_since: None,
            process_ended: None,
            screenshot_at: None,
            hang_up_at: None,
            kill_at: None,
            give_up_at: None,
            exit: None,
        }
    }

    /// Returns how the machine ended, once it has. Nothing changes after that.
    #[must_use]
    pub fn exit(&self) -> Option<&Exit> {
        self.exit.as_ref()
    }

    /// Returns when to call [`handle`](Self::handle) at the latest; `None` if only an observation or a request can
    /// change anything. Always later than the time of the last call.
    #[must_use]
    pub fn deadline(&self) -> Option<Duration> {
        if self.exit.is_some() {
            return None;
        }
        let request = self.request.as_ref().map(|request| request.press.min(request.deadline));
        [
            request,
            self.screenshot_at,
            self.hang_up_at,
            self.tpm_at(),
            self.kill_at,
            self.give_up_at,
            self.settle_at(),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// Takes an input at a time, which never decreases, and returns what to do now.
    #[must_use]
    pub fn handle(&mut self, now: Duration, input: Input) -> Vec<Action> {
        let mut actions = Vec::new();
        if self.exit.is_some() {
            return actions;
        }
        // Before the timers: what happened at the limit happened in time.
        match input {
            Input::Stop(how) => self.stop(now, how, &mut actions),
            Input::Observed(observation) => self.observe(now, observation, &mut actions),
            Input::Time => {}
        }
        self.run_timers(now, &mut actions);
        if self.exit.is_some() {
            actions.clear();
        }
        actions
    }

    fn stop(&mut self, now: Duration, how: Stop, actions: &mut Vec<Action>) {
        if self.process_ended.is_some() {
            return;
        }
        match how {
            Stop::Kill => {
                self.facts.killed.get_or_insert_with(|| "an immediate stop was requested".to_owned());
                self.quit(now, actions);
            }
            Stop::Graceful { limit } if !self.is_ending() => {
                let deadline = now.saturating_add(limit);
                self.request.get_or_insert(Request { limit, deadline, press: now });
            }
            Stop::Graceful { .. } => {}
        }
    }

    /// Returns whether the machine was asked to quit, or is about to be killed.
    fn is_ending(&self) -> bool {
        self.quit_requested || self.kill_at.is_some() || self.screenshot_at.is_some()
    }

    fn observe(&mut self, now: Duration, observation: Observation, actions: &mut Vec<Action>) {
        match observation {
            Observation::Running => {
                self.unreachable_since = None;
                if self.tpm_ended.as_ref().is_some_and(|(since, _)| now >= *since + TPM_LIMIT) {
                    self.lose_tpm(now, actions);
                }
            }
            Observation::Shutdown(shutdown) => {
                self.unreachable_since = None;
                self.facts.shutdown.get_or_insert(shutdown);
            }
            Observation::Panicked => {
                self.fail(now, Death::GuestPanic, "the guest's kernel panicked".to_owned(), actions);
            }
            Observation::DiskFailed { detail, full } => {
                let (cause, what) = match full {
                    true => (Death::HostDiskFull, "the host has no space left for the machine's disks"),
                    false => (Death::IoError, "the host could not read or write a disk of the machine"),
                };
                let detail = detail.map_or_else(|| what.to_owned(), |detail| format!("{what}: {detail}"));
                self.fail(now, cause, detail, actions);
            }
            Observation::TpmEnded(how) => {
                self.tpm_ended.get_or_insert((now, how));
            }
            Observation::Disconnected => {
                self.disconnected = true;
                if self.kill_at.is_none() && self.process_ended.is_none() {
                    self.hang_up_at.get_or_insert(now + HANG_UP_LIMIT);
                }
            }
            Observation::Unreachable(detail) => {
                let since = *self.unreachable_since.get_or_insert(now);
                // Not by a timer: the daemon may be about to answer a request that was sent in the meantime.
                if now >= since + LOST_LIMIT {
                    self.abandon(detail);
                }
            }
            Observation::Off { powered_off, detail } => {
                self.facts.off = Some((powered_off, detail));
                self.conclude();
            }
            Observation::ProcessEnded(end) => {
                self.facts.process.get_or_insert(end);
                self.process_ended.get_or_insert(now);
                self.request = None;
                (self.screenshot_at, self.hang_up_at, self.kill_at, self.give_up_at) =
                    (None, None, None, None);
            }
            Observation::ScreenshotTaken => {
                if self.screenshot_at.take().is_some() {
                    self.kill(now, actions);
                }
            }
        }
    }

    fn run_timers(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let is_due = |at: Option<Duration>| at.is_some_and(|at| at <= now);
        if is_due(self.settle_at()) {
            return self.conclude();
        }
        if is_due(self.give_up_at) {
            let limit = GIVE_UP_LIMIT.as_secs();
            return self
                .abandon(format!("the machine's process did not end within {limit} s after it was killed"));
        }
        if is_due(self.tpm_at()) {
            self.lose_tpm(now, actions);
        }
        if is_due(self.hang_up_at) {
            self.facts.lost.get_or_insert(Lost::Connection);
            self.kill(now, actions);
        }
        if let Some(request) = &mut self.request {
            if request.press <= now {
                actions.push(Action::PressPowerButton);
                request.press = now + PRESS_AGAIN;
            }
            if request.deadline <= now {
                let limit = request.limit;
                self.facts.killed.get_or_insert_with(|| format!("did not power off within {limit:?}"));
                self.quit(now, actions);
            }
        }
        if is_due(self.screenshot_at) || is_due(self.kill_at) {
            self.kill(now, actions);
        }
    }

    /// Returns when a machine is killed whose TPM has ended. A daemon has to report first that the machine still runs.
    fn tpm_at(&self) -> Option<Duration> {
        let waits = self.reporter == Reporter::Process
            && self.facts.shutdown.is_none()
            && self.process_ended.is_none()
            && !self.is_ending();
        self.tpm_ended.as_ref().filter(|_| waits).map(|(since, _)| *since + TPM_LIMIT)
    }

    /// Returns when to conclude how a machine ended whose process has ended.
    fn settle_at(&self) -> Option<Duration> {
        let Facts { shutdown, failure, killed, lost, process, .. } = &self.facts;
        let patience = match self.reporter {
            Reporter::Process if self.disconnected => Duration::ZERO,
            Reporter::Process => HANG_UP_LIMIT,
            Reporter::Daemon if failure.is_some() || lost.is_some() => Duration::ZERO,
            Reporter::Daemon if *shutdown == Some(Shutdown::ByGuest) => DAEMON_GRACE,
            Reporter::Daemon if killed.is_some() => Duration::ZERO,
            Reporter::Daemon => match process.as_ref().map(|process| process.outcome) {
                Some(Outcome::Failure) => DAEMON_GRACE,
                _ => DAEMON_PATIENCE,
            },
        };
        self.process_ended.map(|at| at + patience)
    }

    fn lose_tpm(&mut self, now: Duration, actions: &mut Vec<Action>) {
        if self.process_ended.is_some() || self.is_ending() {
            return;
        }
        if let Some((_, how)) = &self.tpm_ended {
            self.facts.lost.get_or_insert(Lost::Tpm(how.clone()));
            self.kill(now, actions);
        }
    }

    fn fail(&mut self, now: Duration, cause: Death, detail: String, actions: &mut Vec<Action>) {
        if self.facts.failure.is_some() {
            return;
        }
        self.facts.failure = Some((cause, detail));
        if self.process_ended.is_none() {
            self.request = None;
            self.screenshot_at = Some(now + SCREENSHOT_LIMIT);
            actions.push(Action::TakeScreenshot);
        }
    }

    fn quit(&mut self, now: Duration, actions: &mut Vec<Action>) {
        self.request = None;
        if !self.quit_requested {
            self.quit_requested = true;
            actions.push(Action::Quit);
        }
        self.kill_at.get_or_insert(now + QUIT_LIMIT);
    }

    fn kill(&mut self, now: Duration, actions: &mut Vec<Action>) {
        self.request = None;
        (self.screenshot_at, self.hang_up_at) = (None, None);
        self.kill_at = Some(now + KILL_AGAIN);
        self.give_up_at.get_or_insert(now + GIVE_UP_LIMIT);
        actions.push(Action::Kill);
    }

    fn abandon(&mut self, why: String) {
        self.facts.abandoned = Some(why);
        self.conclude();
    }

    fn conclude(&mut self) {
        self.exit = Some(self.facts.exit(self.reporter));
    }
}

#[cfg(test)]
mod tests;
