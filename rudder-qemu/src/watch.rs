//! The watcher of a running machine: receives its events, ends it on request, and reports how it ended.
//!
//! ```text
//! Defined ──start──▶ Starting ──▶ Running ──▶ Ended(exit) ──start──▶ Starting …
//!                        │ failed, or dropped
//!                        ▼
//!                   as it was before
//! ```
//! Each running machine has one task, which owns the process; dropping the task kills the process unless it was
//! released.

use crate::qmp::{Note, Qmp};
use rudder_core::backend::{Death, Exit, Stop};
use rudder_local::{
    log_tail::last_lines,
    process::{OwnedChild, describe},
    serial::SerialConsole,
    tpm::Tpm,
};
use std::{path::PathBuf, process::ExitStatus, sync::Arc, time::Duration};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep_until, timeout},
};

/// Interval at which the power button is pressed again for a guest that does not react: it may not have been listening
/// yet.
const PRESS_AGAIN: Duration = Duration::from_secs(10);
/// How long QEMU may take to exit cleanly before it is killed.
const QUIT_LIMIT: Duration = Duration::from_secs(2);
/// How long the last screenshot of a failed machine may take.
const PICTURE_LIMIT: Duration = Duration::from_millis(500);
/// How long to wait, after the process or the QMP connection has ended, for the other to end as well.
const HANG_UP_LIMIT: Duration = Duration::from_secs(1);

/// The phase of a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Phase {
    Defined,
    Starting,
    Running,
    Ended(Exit),
}

/// What was observed of a machine, and what was done to it.
#[derive(Debug, Default, PartialEq, Eq)]
struct Seen {
    shutdown: Option<(bool, String)>,
    panicked: bool,
    /// The first disk error: its description, and whether the host's disk is full.
    io_error: Option<(String, bool)>,
    hung_up: bool,
    /// How its TPM ended, if it ended before QEMU did.
    tpm_ended: Option<String>,
    /// Why Rudder ended it.
    killed: Option<String>,
}

/// The watcher of a running machine.
#[derive(Debug)]
pub(crate) struct Watcher {
    pub(crate) child: OwnedChild,
    /// The TPM of the machine.
    pub(crate) tpm: Option<Tpm>,
    pub(crate) qmp: Qmp,
    pub(crate) notes: mpsc::UnboundedReceiver<Note>,
    pub(crate) orders: mpsc::UnboundedReceiver<Stop>,
    pub(crate) phase: watch::Sender<Phase>,
    /// The file with QEMU's messages.
    pub(crate) log: PathBuf,
    pub(crate) console: Arc<SerialConsole>,
    /// The file for a last screenshot.
    pub(crate) picture: PathBuf,
}

/// A request to shut down that the guest has not fulfilled yet.
struct Request {
    limit: Duration,
    deadline: Instant,
    press: Instant,
}

impl Watcher {
    /// Watches until the machine has ended, and publishes how it ended.
    pub(crate) async fn run(mut self) -> Exit {
        let mut seen = Seen::default();
        let mut request: Option<Request> = None;
        let mut kill_at: Option<Instant> = None;
        let mut tpm = self.tpm.take();
        let mut tpm_told = None;
        let status = loop {
            let press = request.as_ref().map(|request| request.press);
            let deadline = request.as_ref().map(|request| request.deadline);
            tokio::select! {
                status = self.child.wait() => break status,
                note = self.notes.recv(), if !seen.hung_up => match note {
                    Some(note) => if seen.hear(note) {
                        self.take_last_picture().await;
                        self.child.kill();
                    },
                    // QEMU has just ended, or can no longer be controlled.
                    None => {
                        seen.hung_up = true;
                        kill_at.get_or_insert(Instant::now() + HANG_UP_LIMIT);
                    }
                },
                Some(order) = self.orders.recv() => match order {
                    Stop::Graceful { limit } => {
                        let now = Instant::now();
                        request.get_or_insert(Request { limit, deadline: now + limit, press: now });
                    }
                    Stop::Kill => {
                        seen.killed.get_or_insert_with(|| "was told to end at once".to_owned());
                        kill_at.get_or_insert(self.quit());
                    }
                },
                () = sleep_until(press.unwrap_or_else(Instant::now)), if press.is_some() => {
                    let qmp = self.qmp.clone();
                    // Not awaited: the guest may end before QEMU replies.
                    tokio::spawn(async move { qmp.press_power_button().await });
                    if let Some(request) = &mut request {
                        request.press += PRESS_AGAIN;
                    }
                }
                () = sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => {
                    let limit = request.take().map_or(Duration::ZERO, |request| request.limit);
                    seen.killed.get_or_insert_with(|| format!("did not power off within {limit:?}"));
                    kill_at.get_or_insert(self.quit());
                }
                // The TPM ends when QEMU closes its connection, which happens shortly before QEMU itself ends.
                told = ended(&mut tpm), if tpm.is_some() && tpm_told.is_none() => {
                    tpm_told = Some(told);
                    if seen.shutdown.is_none() {
                        kill_at.get_or_insert(Instant::now() + HANG_UP_LIMIT);
                    }
                }
                () = sleep_until(kill_at.unwrap_or_else(Instant::now)), if kill_at.is_some() => {
                    kill_at = None;
                    seen.tpm_ended = tpm_told.take();
                    self.child.kill();
                }
            }
        };
        if let Some(tpm) = &mut tpm {
            // The state of a TPM is complete once it has ended.
            tpm.finish().await;
        }
        // The last output of the guest and the last events may still be in transit.
        let _ = timeout(HANG_UP_LIMIT, self.console.finished()).await;
        while let Ok(Some(note)) = timeout(HANG_UP_LIMIT, self.notes.recv()).await {
            seen.hear(note);
        }
        let ended = match status {
            Ok(status) => Ended { told: describe(status), orderly: status == ExitStatus::default() },
            Err(error) => Ended { told: format!("could not be waited for: {error}"), orderly: false },
        };
        let exit = verdict(&seen, &ended, &last_lines(&self.log).await);
        self.phase.send_replace(Phase::Ended(exit.clone()));
        exit
    }

    /// Takes a last screenshot of a failed machine. One that is cut short by the end of QEMU is discarded.
    async fn take_last_picture(&self) {
        let Some(name) = self.picture.file_name().and_then(|name| name.to_str()) else { return };
        // Relative to QEMU's directory, which is the lab's.
        let begun = format!("last.{name}");
        if let Ok(Ok(())) = timeout(PICTURE_LIMIT, self.qmp.screendump(&begun)).await {
            let renamed = tokio::fs::rename(self.picture.with_file_name(&begun), &self.picture).await;
            if let Err(error) = renamed {
                tracing::debug!(%error, "cannot keep the last picture of a machine");
            }
        }
    }

    /// Asks QEMU to exit, which flushes what it holds in memory; returns when to kill it if it does not.
    fn quit(&self) -> Instant {
        let qmp = self.qmp.clone();
        tokio::spawn(async move { qmp.quit().await });
        Instant::now() + QUIT_LIMIT
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        // Dropped before the machine ended: publish an end, so that no caller waits forever.
        self.phase.send_if_modified(|phase| {
            let running = *phase == Phase::Running;
            if running {
                *phase = Phase::Ended(Exit::Killed { why: "its lab was dropped".to_owned() });
            }
            running
        });
    }
}

impl Seen {
    /// Records an event; returns whether the machine cannot recover.
    fn hear(&mut self, note: Note) -> bool {
        match note {
            Note::Shutdown { by_guest, reason } => {
                self.shutdown.get_or_insert((by_guest, reason));
                false
            }
            Note::Panicked => {
                self.panicked = true;
                true
            }
            Note::IoError { node, operation, reason, full } => {
                self.io_error.get_or_insert((format!("{operation} of {node} failed: {reason}"), full));
                true
            }
        }
    }
}

/// Waits until the TPM has ended, and returns how; never completes if there is none.
async fn ended(tpm: &mut Option<Tpm>) -> String {
    match tpm {
        Some(tpm) => tpm.ended().await,
        None => std::future::pending().await,
    }
}

/// How the QEMU process ended.
struct Ended {
    told: String,
    orderly: bool,
}

/// Determines how a machine ended from everything that is known.
fn verdict(seen: &Seen, ended: &Ended, last_words: &str) -> Exit {
    let with_words = |what: String| match last_words {
        "" => what,
        words => format!("{what}; its last words: {words}"),
    };
    let died = |cause, detail: String| Exit::Died { cause, detail };
    if let Some((what, full)) = &seen.io_error {
        let (cause, why) = match full {
            true => (Death::HostDiskFull, "the host has no space left for the machine's disks"),
            false => (Death::IoError, "the host could not read or write a disk of the machine"),
        };
        return died(cause, format!("{why}: {what}"));
    }
    if seen.panicked {
        return died(Death::GuestPanic, "the guest's kernel panicked".to_owned());
    }
    if let (Some(told), None, None) = (&seen.tpm_ended, &seen.shutdown, &seen.killed) {
        return died(Death::Hypervisor, format!("the TPM of the machine is gone: swtpm {told}"));
    }
    match (&seen.shutdown, &seen.killed) {
        (Some((true, reason)), _) if reason == "guest-shutdown" && ended.orderly => Exit::PoweredOff,
        (_, Some(why)) => Exit::Killed { why: why.clone() },
        (Some((_, reason)), None) => {
            died(Death::Hypervisor, with_words(format!("QEMU {} (it said: {reason})", ended.told)))
        }
        (None, None) if seen.hung_up => {
            died(Death::Hypervisor, with_words(format!("QEMU {}, or did not talk any more", ended.told)))
        }
        (None, None) => died(Death::Hypervisor, with_words(format!("QEMU {}", ended.told))),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn orderly() -> Ended {
        Ended { told: "exited with code 0".to_owned(), orderly: true }
    }

    fn killed() -> Ended {
        Ended { told: "was ended by signal 9".to_owned(), orderly: false }
    }

    fn seen(notes: impl IntoIterator<Item = Note>) -> Seen {
        let mut seen = Seen::default();
        for note in notes {
            seen.hear(note);
        }
        seen
    }

    fn shutdown(by_guest: bool, reason: &str) -> Note {
        Note::Shutdown { by_guest, reason: reason.to_owned() }
    }

    #[test]
    fn only_the_guest_powers_off() {
        let off = seen([shutdown(true, "guest-shutdown")]);
        assert_eq!(verdict(&off, &orderly(), ""), Exit::PoweredOff);
        // Even if it was about to be killed for being slow.
        let late = Seen { killed: Some("did not power off within 60s".to_owned()), ..off };
        assert_eq!(verdict(&late, &orderly(), ""), Exit::PoweredOff);
        let told = Seen { killed: Some("why".to_owned()), ..seen([shutdown(false, "host-qmp-quit")]) };
        assert_eq!(verdict(&told, &orderly(), ""), Exit::Killed { why: "why".to_owned() });
        let quit = verdict(&seen([shutdown(false, "host-signal")]), &orderly(), "terminating on signal 15");
        assert_eq!(
            quit,
            Exit::Died {
                cause: Death::Hypervisor,
                detail:
                    "QEMU exited with code 0 (it said: host-signal); its last words: terminating on signal 15"
                        .to_owned()
            }
        );
    }

    #[test]
    fn a_death_is_told_by_what_came_first() {
        let full = Note::IoError {
            node: "disk0".to_owned(),
            operation: "write".to_owned(),
            reason: "No space left on device".to_owned(),
            full: true,
        };
        let Exit::Died { cause, detail } = verdict(&seen([full, Note::Panicked]), &killed(), "") else {
            panic!()
        };
        assert_eq!(cause, Death::HostDiskFull);
        assert_eq!(
            detail,
            "the host has no space left for the machine's disks: write of disk0 failed: No space left on device"
        );
        let Exit::Died { cause, .. } = verdict(&seen([Note::Panicked]), &killed(), "") else { panic!() };
        assert_eq!(cause, Death::GuestPanic);
        let Exit::Died { cause, detail } = verdict(&Seen::default(), &killed(), "x | y") else { panic!() };
        assert_eq!(
            (cause, detail.as_str()),
            (Death::Hypervisor, "QEMU was ended by signal 9; its last words: x | y")
        );
    }

    #[test]
    fn the_end_of_a_tpm_is_told_unless_there_is_another_reason() {
        let gone =
            || Seen { tpm_ended: Some("was ended by signal 9 (SIGKILL)".to_owned()), ..Seen::default() };
        let Exit::Died { cause, detail } = verdict(&gone(), &killed(), "") else { panic!() };
        assert_eq!(cause, Death::Hypervisor);
        assert_eq!(detail, "the TPM of the machine is gone: swtpm was ended by signal 9 (SIGKILL)");
        let told = Seen { killed: Some("why".to_owned()), ..gone() };
        assert_eq!(verdict(&told, &killed(), ""), Exit::Killed { why: "why".to_owned() });
        let off = Seen { shutdown: Some((true, "guest-shutdown".to_owned())), ..gone() };
        assert_eq!(verdict(&off, &orderly(), ""), Exit::PoweredOff);
    }
}
