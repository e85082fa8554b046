//! A running domain: what happens to it, and how it is ended. What that means is decided in
//! [`rudder_local::lifecycle`].
//!
//! Libvirt is polled for the state of the domain; the kernel reports the end of its process.

use crate::{
    connection::{Connection, Failure, Refusal, domain},
    domain_state::DomainState,
    picture::picture,
    process::{self, Broke, Found},
};
use futures::{
    FutureExt as _,
    future::{BoxFuture, Fuse, FusedFuture as _},
};
use rudder_core::Result;
use rudder_local::lifecycle::{Observation, Outcome, ProcessEnd, Reporter, Run};
use std::{fmt, sync::Arc, time::Duration};
use tokio::time::{Instant, sleep_until};
use virt::{connect::Connect, sys};

/// Interval between checks of the domain's state.
const LOOK: Duration = Duration::from_millis(250);
/// Interval between checks once the machine's process has ended: libvirt is about to report how.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// A running domain.
pub(crate) struct LibvirtRun {
    target: Target,
    /// When to check its state next.
    look: Instant,
    /// One check at a time: libvirt blocks queries about a domain that it is stopping.
    looking: Fuse<BoxFuture<'static, Option<Observation>>>,
    killing: Fuse<BoxFuture<'static, ()>>,
    process_gone: Fuse<BoxFuture<'static, Option<Broke>>>,
}

impl fmt::Debug for LibvirtRun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LibvirtRun").field("domain", &self.target.name).finish_non_exhaustive()
    }
}

/// A domain of a connection, by its name.
#[derive(Clone)]
struct Target {
    connection: Arc<Connection>,
    name: String,
}

impl LibvirtRun {
    /// Watches a domain, whose process is given if it was found.
    pub(crate) fn new(connection: Arc<Connection>, name: String, process: Option<Found>) -> Self {
        Self {
            target: Target { connection, name },
            look: Instant::now() + LOOK,
            looking: Fuse::terminated(),
            killing: Fuse::terminated(),
            process_gone: process::ended(process).boxed().fuse(),
        }
    }
}

impl Run for LibvirtRun {
    const REPORTER: Reporter = Reporter::Daemon;

    async fn observe(&mut self) -> Observation {
        loop {
            tokio::select! {
                broke = &mut self.process_gone, if !self.process_gone.is_terminated() => {
                    self.look = Instant::now();
                    return Observation::ProcessEnded(process_end(broke));
                }
                () = &mut self.killing, if !self.killing.is_terminated() => self.look = Instant::now(),
                () = sleep_until(self.look), if self.looking.is_terminated() => {
                    self.looking = self.target.clone().look().boxed().fuse();
                }
                seen = &mut self.looking, if !self.looking.is_terminated() => {
                    let ended = self.process_gone.is_terminated();
                    self.look = Instant::now() + if ended { LOOK_AGAIN } else { LOOK };
                    if let Some(seen) = seen {
                        return seen;
                    }
                }
            }
        }
    }

    fn press_power_button(&mut self) {
        let Target { connection, name } = self.target.clone();
        tokio::spawn(async move {
            let press = move |connect: &Connect| {
                domain(connect, &name)?.shutdown_flags(sys::VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN)
            };
            connection.order(press).await
        });
    }

    fn quit(&mut self) {
        // Libvirt asks QEMU to end before it kills it.
        self.kill();
    }

    fn kill(&mut self) {
        if self.killing.is_terminated() {
            self.killing = self.target.clone().destroy().boxed().fuse();
        }
    }

    fn screenshot(&self) -> impl Future<Output = Result<Vec<u8>>> + Send + 'static {
        let Target { connection, name } = self.target.clone();
        async move { picture(&connection, &name).await }
    }
}

fn process_end(broke: Option<Broke>) -> ProcessEnd {
    let (outcome, detail) = match broke {
        Some(broke) => (Outcome::Failure, format!("QEMU {broke}")),
        None => (Outcome::Unknown, "QEMU ended, and libvirt does not say why".to_owned()),
    };
    ProcessEnd { outcome, detail, last_lines: String::new() }
}

impl Target {
    /// Checks the state of the domain; `None` if libvirt does not report it.
    async fn look(self) -> Option<Observation> {
        let name = self.name.clone();
        let look = move |connect: &Connect| {
            domain(connect, &name)?.get_state().map(|(state, reason)| DomainState::of(state, reason))
        };
        match self.connection.ask(look).await {
            Ok(DomainState::Observed(observation)) => Some(observation),
            Ok(DomainState::DiskFailed) => {
                Some(Observation::DiskFailed { detail: None, full: self.is_disk_full().await })
            }
            Err(failure) if failure.is_no_domain() => Some(Observation::Off {
                powered_off: false,
                detail: "somebody removed the machine's domain from libvirt".to_owned(),
            }),
            Err(Failure::Refused(refusal)) => {
                tracing::debug!(domain = self.name, refusal = refusal.message(), "cannot query a domain");
                None
            }
            Err(Failure::Lost(error)) => {
                Some(Observation::Unreachable(format!("libvirt is out of reach: {}", error.report())))
            }
        }
    }

    /// Ends the domain. If it ended by itself or cannot be reached, the next check shows it.
    async fn destroy(self) {
        let name = self.name.clone();
        let destroy = move |connect: &Connect| -> Result<(), Refusal> { domain(connect, &name)?.destroy() };
        if let Err(failure) = self.connection.order(destroy).await {
            tracing::debug!(domain = self.name, ?failure, "cannot destroy a domain");
        }
    }

    /// Returns whether a device stopped because the host's disk is full (QEMU QMP Reference Manual, `query-block`:
    /// `nospace`).
    async fn is_disk_full(&self) -> bool {
        let name = self.name.clone();
        let ask = move |connect: &Connect| {
            domain(connect, &name)?.qemu_monitor_command(r#"{"execute": "query-block"}"#, 0)
        };
        let answer = self.connection.ask(ask).await.unwrap_or_default();
        let answer: serde_json::Value = serde_json::from_str(&answer).unwrap_or_default();
        let devices = answer["return"].as_array().into_iter().flatten();
        devices.into_iter().any(|device| device["io-status"] == "nospace")
    }
}
