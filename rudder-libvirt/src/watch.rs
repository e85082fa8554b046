//! Who watches a running machine: looks how it fares, ends it when told to, and says how it ended.
//!
//! ```text
//! Defined ──start──▶ Starting ──▶ Running ──▶ Ended(exit) ──start──▶ Starting …
//!                        │ failed
//!                        ▼
//!                   as it was before
//! ```

use crate::{
    connection::{Connection, Failure, domain},
    machine::picture,
    process,
};
use rudder_core::backend::{Death, Exit, LabId, Stop};
use rudder_qemu::parts::Tpm;
use std::{path::PathBuf, sync::Arc, time::Duration};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep_until, timeout},
};
use virt::sys;

/// How often is looked.
const LOOK: Duration = Duration::from_millis(250);
/// How often is looked once the machine's process has ended: libvirt is about to say how.
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// How long libvirt may be out of reach, as when its daemon is restarted, before the machine counts as lost.
const LOST_LIMIT: Duration = Duration::from_secs(3);
/// How often the power button is pressed for a guest that does not react: it may not have been listening yet.
const PRESS_AGAIN: Duration = Duration::from_secs(10);
/// How long a machine may run on after its TPM has ended.
const TPM_LIMIT: Duration = Duration::from_millis(500);
/// How long the last picture of a machine that failed may take.
const PICTURE_LIMIT: Duration = Duration::from_secs(1);

/// Where a machine is in its life.
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
    /// Its lab.
    pub(crate) lab: LabId,
    pub(crate) orders: mpsc::UnboundedReceiver<Stop>,
    /// Its TPM.
    pub(crate) tpm: Option<Tpm>,
    pub(crate) phase: watch::Sender<Phase>,
    /// Where a last picture of the screen goes.
    pub(crate) picture: PathBuf,
}

/// A guest that was asked to end.
struct Request {
    limit: Duration,
    deadline: Instant,
    press: Instant,
}

/// What a look showed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Seen {
    Running,
    Panicked,
    IoError,
    Off { reason: i32 },
}

impl Seen {
    /// What a state and its reason (virDomainState, virDomainPausedReason, virDomainCrashedReason) mean.
    fn of(state: sys::virDomainState, reason: i32) -> Self {
        match state {
            sys::VIR_DOMAIN_CRASHED => Self::Panicked,
            sys::VIR_DOMAIN_PAUSED if is(reason, sys::VIR_DOMAIN_PAUSED_IOERROR) => Self::IoError,
            sys::VIR_DOMAIN_PAUSED if is(reason, sys::VIR_DOMAIN_PAUSED_CRASHED) => Self::Panicked,
            sys::VIR_DOMAIN_SHUTOFF => Self::Off { reason },
            _ => Self::Running,
        }
    }
}

fn is(reason: i32, constant: u32) -> bool {
    u32::try_from(reason) == Ok(constant)
}

impl Watcher {
    /// Watches until the machine has ended, and publishes how.
    pub(crate) async fn run(mut self) {
        let exit = self.watch().await;
        if let Some(tpm) = &mut self.tpm {
            tpm.finish().await;
        }
        self.phase.send_replace(Phase::Ended(exit));
    }

    async fn watch(&mut self) -> Exit {
        let mut killed: Option<String> = None;
        let mut request: Option<Request> = None;
        let mut lost_since: Option<Instant> = None;
        let mut look = Instant::now() + LOOK;
        let gone = process::ended(self.domain.clone(), self.lab.clone());
        tokio::pin!(gone);
        let mut is_gone = false;
        let mut tpm_ended: Option<(Instant, String)> = None;
        loop {
            let press = request.as_ref().map(|request| request.press);
            let deadline = request.as_ref().map(|request| request.deadline);
            tokio::select! {
                Some(order) = self.orders.recv() => match order {
                    Stop::Graceful { limit } => {
                        let now = Instant::now();
                        request.get_or_insert(Request { limit, deadline: now + limit, press: now });
                    }
                    Stop::Kill => {
                        killed.get_or_insert_with(|| "was told to end at once".to_owned());
                        self.kill().await;
                        look = Instant::now();
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
                    killed.get_or_insert_with(|| format!("did not power off within {limit:?}"));
                    self.kill().await;
                    look = Instant::now();
                }
                () = &mut gone, if !is_gone => {
                    is_gone = true;
                    look = Instant::now();
                }
                told = ended_of(&mut self.tpm), if self.tpm.is_some() && tpm_ended.is_none() => {
                    tpm_ended = Some((Instant::now(), told));
                }
                () = sleep_until(look) => {
                    look = Instant::now() + if is_gone { LOOK_AGAIN } else { LOOK };
                    match self.look().await {
                        Ok(Seen::Running) => {
                            lost_since = None;
                            // It ends with its machine, which is seen a moment later.
                            if let Some((since, told)) = tpm_ended.take_if(|(since, _)| since.elapsed() >= TPM_LIMIT) {
                                tracing::debug!(domain = self.domain, ?since, told, "a machine lost its TPM");
                                self.kill().await;
                                return died(Death::Hypervisor, &format!("the TPM of the machine is gone: swtpm {told}"));
                            }
                        }
                        Ok(Seen::Off { reason }) => return ended(reason, killed),
                        Ok(Seen::Panicked) => {
                            self.keep_picture().await;
                            self.kill().await;
                            return died(Death::GuestPanic, "the guest's kernel panicked");
                        }
                        Ok(Seen::IoError) => {
                            let full = self.is_disk_full().await;
                            self.keep_picture().await;
                            self.kill().await;
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

    async fn look(&self) -> Result<Seen, Failure> {
        let name = self.domain.clone();
        self.connection
            .ask(move |connect| {
                domain(connect, &name)?.get_state().map(|(state, reason)| Seen::of(state, reason))
            })
            .await
    }

    async fn kill(&self) {
        let name = self.domain.clone();
        // One that ended by itself, or cannot be reached, is seen at the next look.
        if let Err(failure) = self.connection.order(move |connect| domain(connect, &name)?.destroy()).await {
            tracing::debug!(domain = self.domain, ?failure, "cannot destroy a domain");
        }
    }

    /// Not waited for: the guest's end may come before libvirt's answer.
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
        if let Ok(Ok(bytes)) = taken
            && let Err(error) = tokio::fs::write(&self.picture, bytes).await
        {
            tracing::debug!(%error, "cannot keep the last picture of a machine");
        }
    }

    /// Whether a device stopped because the host's disk is full (QEMU QMP Reference Manual, `query-block`: `nospace`).
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
        // Dropped before its time: nobody waits for ever.
        self.phase.send_if_modified(|phase| {
            let running = *phase == Phase::Running;
            if running {
                *phase = Phase::Ended(Exit::Killed { why: "its lab was dropped".to_owned() });
            }
            running
        });
    }
}

/// How a TPM ended. Of none, for ever.
async fn ended_of(tpm: &mut Option<Tpm>) -> String {
    match tpm {
        Some(tpm) => tpm.ended().await,
        None => std::future::pending().await,
    }
}

fn died(cause: Death, detail: &str) -> Exit {
    Exit::Died { cause, detail: detail.to_owned() }
}

/// How a machine that is off got there (virDomainShutoffReason).
fn ended(reason: i32, killed: Option<String>) -> Exit {
    if is(reason, sys::VIR_DOMAIN_SHUTOFF_SHUTDOWN) {
        return Exit::PoweredOff;
    }
    if let Some(why) = killed {
        return Exit::Killed { why };
    }
    died(
        Death::Hypervisor,
        match u32::try_from(reason) {
            Ok(sys::VIR_DOMAIN_SHUTOFF_DESTROYED) => "somebody destroyed the machine's domain",
            Ok(sys::VIR_DOMAIN_SHUTOFF_CRASHED) => {
                "QEMU ended, or was killed; libvirt's log of the domain says more"
            }
            Ok(sys::VIR_DOMAIN_SHUTOFF_DAEMON) => "QEMU ended while libvirt was not watching it",
            Ok(sys::VIR_DOMAIN_SHUTOFF_SAVED) => "somebody saved the machine's domain",
            Ok(sys::VIR_DOMAIN_SHUTOFF_MIGRATED) => "somebody moved the machine's domain to another host",
            _ => "QEMU ended; libvirt does not say why",
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_is_told_by_its_reason() {
        let reason = |constant: u32| i32::try_from(constant).unwrap_or(-1);
        let shutdown = reason(sys::VIR_DOMAIN_SHUTOFF_SHUTDOWN);
        let destroyed = reason(sys::VIR_DOMAIN_SHUTOFF_DESTROYED);
        assert_eq!(ended(shutdown, Some("late".to_owned())), Exit::PoweredOff);
        assert_eq!(ended(destroyed, Some("ours".to_owned())), Exit::Killed { why: "ours".to_owned() });
        assert!(
            matches!(ended(destroyed, None), Exit::Died { cause: Death::Hypervisor, detail } if detail.contains("somebody"))
        );
        let crashed = ended(reason(sys::VIR_DOMAIN_SHUTOFF_CRASHED), None);
        assert!(matches!(crashed, Exit::Died { cause: Death::Hypervisor, .. }));
    }

    #[test]
    fn a_paused_machine_is_in_trouble_only_for_some_reasons() {
        let paused = |reason: u32| Seen::of(sys::VIR_DOMAIN_PAUSED, i32::try_from(reason).unwrap_or(-1));
        assert_eq!(paused(sys::VIR_DOMAIN_PAUSED_IOERROR), Seen::IoError);
        assert_eq!(paused(sys::VIR_DOMAIN_PAUSED_USER), Seen::Running);
        assert_eq!(Seen::of(sys::VIR_DOMAIN_CRASHED, 0), Seen::Panicked);
        assert_eq!(Seen::of(sys::VIR_DOMAIN_RUNNING, 1), Seen::Running);
    }
}
