//! The watcher of a running machine: polls its state, ends it on request, and reports how it ended.
//!
//! ```text
//! Defined ──start──▶ Starting ──▶ Running ──▶ Ended(exit) ──start──▶ Starting …
//!                        │ failed
//!                        ▼
//!                   as it was before
//! ```

use crate::{
    connection::{Connection, Failure, domain},
    exit_reason::{Gone, Seen, died, told},
    picture::picture,
    process::{self, Broke, Found},
};
use futures::{
    FutureExt as _,
    future::{BoxFuture, Fuse, FusedFuture as _},
};
use rudder_core::{
    backend::{Death, Exit, Stop},
    files::replace_file,
};
use rudder_local::{lab_storage::blocking, serial::SerialConsole, tpm::Tpm};
use std::{path::PathBuf, sync::Arc, time::Duration};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep_until, timeout},
};
use virt::sys;

/// Interval between checks of the domain's state.
const LOOK: Duration = Duration::from_millis(250);
/// Interval between checks once the machine's process has ended: libvirt is about to report how.
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// How long libvirt may be unreachable, for example while its daemon restarts, before the machine counts as lost.
const LOST_LIMIT: Duration = Duration::from_secs(3);
/// Interval at which the power button is pressed again for a guest that does not react: it may not have been listening
/// yet.
const PRESS_AGAIN: Duration = Duration::from_secs(10);
/// How long a machine may keep running after its TPM has ended.
const TPM_LIMIT: Duration = Duration::from_millis(500);
/// How long the last screenshot of a failed machine may take.
const PICTURE_LIMIT: Duration = Duration::from_secs(1);

/// How long recording the last output of the guest may take.
const CONSOLE_LIMIT: Duration = Duration::from_millis(500);

/// The phase of a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Phase {
    Defined,
    Starting,
    Running,
    Ended(Exit),
}

/// The watcher of a running machine.
#[derive(Debug)]
pub(crate) struct Watcher {
    pub(crate) connection: Arc<Connection>,
    /// The name of the domain.
    pub(crate) domain: String,
    /// The process of the domain, if it was found.
    pub(crate) process: Option<Found>,
    pub(crate) orders: mpsc::UnboundedReceiver<Stop>,
    /// The TPM of the machine.
    pub(crate) tpm: Option<Tpm>,
    pub(crate) phase: watch::Sender<Phase>,
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
    pub(crate) async fn run(mut self) {
        let exit = self.watch().await;
        if let Some(tpm) = &mut self.tpm {
            tpm.finish().await;
        }
        // The last output of the guest may still be in transit.
        let _ = timeout(CONSOLE_LIMIT, self.console.finished()).await;
        self.phase.send_replace(Phase::Ended(exit));
    }

    async fn watch(&mut self) -> Exit {
        let mut killed: Option<String> = None;
        let mut request: Option<Request> = None;
        let mut lost_since: Option<Instant> = None;
        // One check at a time: libvirt blocks queries about a domain that it is stopping.
        let mut look = Instant::now() + LOOK;
        let mut looking: Fuse<BoxFuture<'static, _>> = Fuse::terminated();
        let mut killing: Fuse<BoxFuture<'static, ()>> = Fuse::terminated();
        let mut gone = process::ended(self.process.take()).boxed().fuse();
        let mut gone_since: Option<(Instant, Option<Broke>)> = None;
        let mut shutting_down = false;
        let mut tpm_ended: Option<(Instant, String)> = None;
        loop {
            let mut patience = None;
            if let Some((since, broke)) = gone_since {
                let killed = killed.as_deref();
                let known = Gone { since: since.elapsed(), broke, shutting_down, killed };
                if let Some(exit) = known.conclude() {
                    return exit;
                }
                patience = Some(since + known.patience());
            }
            let press = request.as_ref().map(|request| request.press);
            let deadline = request.as_ref().map(|request| request.deadline);
            tokio::select! {
                Some(order) = self.orders.recv() => match order {
                    Stop::Graceful { limit } => {
                        let now = Instant::now();
                        request.get_or_insert(Request { limit, deadline: now + limit, press: now });
                    }
                    Stop::Kill if gone_since.is_some() => {}
                    Stop::Kill => {
                        killed.get_or_insert_with(|| "was told to end at once".to_owned());
                        if killing.is_terminated() {
                            killing = self.kill().boxed().fuse();
                        }
                    }
                },
                () = sleep_until(press.unwrap_or(look)), if press.is_some() => {
                    self.press();
                    if let Some(request) = &mut request {
                        request.press += PRESS_AGAIN;
                    }
                }
                () = sleep_until(deadline.unwrap_or(look)), if deadline.is_some() => {
                    let limit = request.take().map_or(Duration::ZERO, |request| request.limit);
                    if gone_since.is_none() {
                        killed.get_or_insert_with(|| format!("did not power off within {limit:?}"));
                        if killing.is_terminated() {
                            killing = self.kill().boxed().fuse();
                        }
                    }
                }
                () = &mut killing => look = Instant::now(),
                broke = &mut gone => {
                    gone_since = Some((Instant::now(), broke));
                    look = Instant::now();
                }
                () = sleep_until(patience.unwrap_or(look)), if patience.is_some() => {}
                told = ended_of(&mut self.tpm), if self.tpm.is_some() && tpm_ended.is_none() => {
                    tpm_ended = Some((Instant::now(), told));
                }
                () = sleep_until(look), if looking.is_terminated() => looking = self.look().boxed().fuse(),
                seen = &mut looking => {
                    look = Instant::now() + if gone_since.is_some() { LOOK_AGAIN } else { LOOK };
                    match seen {
                        Ok(Seen::Running) => {
                            lost_since = None;
                            // The TPM also ends with its machine, whose end is observed a moment later.
                            if let Some((since, told)) = tpm_ended.take_if(|(since, _)| since.elapsed() >= TPM_LIMIT) {
                                tracing::debug!(domain = self.domain, ?since, told, "a machine lost its TPM");
                                self.end(gone).await;
                                return died(Death::Hypervisor, &format!("the TPM of the machine is gone: swtpm {told}"));
                            }
                        }
                        Ok(Seen::ShuttingDown) => (shutting_down, lost_since) = (true, None),
                        Ok(Seen::Off { reason }) => return told(reason, killed.as_deref()),
                        Ok(Seen::Panicked) => {
                            self.keep_picture().await;
                            self.end(gone).await;
                            return died(Death::GuestPanic, "the guest's kernel panicked");
                        }
                        Ok(Seen::IoError) => {
                            let full = self.is_disk_full().await;
                            self.keep_picture().await;
                            self.end(gone).await;
                            return match full {
                                true => died(Death::HostDiskFull, "the host has no space left for the machine's disks"),
                                false => died(Death::IoError, "the host could not read or write a disk of the machine"),
                            };
                        }
                        Err(failure) if failure.is_no_domain() => {
                            return match killed {
                                Some(why) => Exit::Killed { why },
                                None => died(Death::Hypervisor, "somebody removed the machine's domain from libvirt"),
                            };
                        }
                        Err(Failure::Refused(refusal)) => {
                            tracing::debug!(domain = self.domain, refusal = refusal.message(), "cannot look at a domain");
                        }
                        Err(Failure::Lost(error)) => {
                            let since = *lost_since.get_or_insert_with(Instant::now);
                            if since.elapsed() >= LOST_LIMIT {
                                return died(Death::Hypervisor, &format!("libvirt is out of reach: {}", error.report()));
                            }
                        }
                    }
                }
            }
        }
    }

    fn look(&self) -> impl Future<Output = Result<Seen, Failure>> + use<> {
        let (connection, name) = (Arc::clone(&self.connection), self.domain.clone());
        async move {
            let look = move |connect: &virt::connect::Connect| {
                domain(connect, &name)?.get_state().map(|(state, reason)| Seen::of(state, reason))
            };
            connection.ask(look).await
        }
    }

    fn kill(&self) -> impl Future<Output = ()> + use<> {
        let (connection, name) = (Arc::clone(&self.connection), self.domain.clone());
        async move {
            let kill = {
                let name = name.clone();
                move |connect: &virt::connect::Connect| domain(connect, &name)?.destroy()
            };
            // If the domain ended by itself or cannot be reached, the next check shows it.
            if let Err(failure) = connection.order(kill).await {
                tracing::debug!(domain = name, ?failure, "cannot destroy a domain");
            }
        }
    }

    /// Ends the machine, and waits for the end of its process or libvirt's confirmation, whichever comes first.
    async fn end(&self, gone: Fuse<BoxFuture<'static, Option<Broke>>>) {
        tokio::select! {
            () = self.kill() => {}
            _ = gone => {}
        }
    }

    /// Presses the power button. Does not wait: the guest may end before libvirt replies.
    fn press(&self) {
        let (connection, name) = (Arc::clone(&self.connection), self.domain.clone());
        tokio::spawn(async move {
            let press = move |connect: &virt::connect::Connect| {
                domain(connect, &name)?.shutdown_flags(sys::VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN)
            };
            connection.order(press).await
        });
    }

    async fn keep_picture(&self) {
        let taken = timeout(PICTURE_LIMIT, picture(&self.connection, &self.domain)).await;
        let Ok(Ok(bytes)) = taken else { return };
        let path = self.picture.clone();
        if let Err(error) = blocking(move || replace_file(&path, &bytes)).await {
            tracing::debug!(%error, "cannot keep the last picture of a machine");
        }
    }

    /// Returns whether a device stopped because the host's disk is full (QEMU QMP Reference Manual, `query-block`:
    /// `nospace`).
    async fn is_disk_full(&self) -> bool {
        let name = self.domain.clone();
        let ask = move |connect: &virt::connect::Connect| {
            domain(connect, &name)?.qemu_monitor_command(r#"{"execute": "query-block"}"#, 0)
        };
        let answer = self.connection.ask(ask).await.unwrap_or_default();
        let answer: serde_json::Value = serde_json::from_str(&answer).unwrap_or_default();
        let devices = answer["return"].as_array().into_iter().flatten();
        devices.into_iter().any(|device| device["io-status"] == "nospace")
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

/// Waits until the TPM has ended, and returns how; never completes if there is none.
async fn ended_of(tpm: &mut Option<Tpm>) -> String {
    match tpm {
        Some(tpm) => tpm.ended().await,
        None => std::future::pending().await,
    }
}
