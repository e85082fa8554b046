//! A running domain: what happens to it, and how it is ended. What that means is decided in
//! [`rudder_local::lifecycle`].
//!
//! Libvirt is polled for the state of the domain; the kernel reports the end of its process.

use crate::{
    connection::{Connection, Failure, Refusal, domain},
    domain_state::DomainState,
    screenshot::screenshot,
};
use async_trait::async_trait;
use futures::{
    FutureExt as _,
    future::{BoxFuture, Fuse, FusedFuture as _},
};
use rudder_core::{Error, ErrorKind, Result, backend::BoxedStream};
use rudder_local::{
    lifecycle::{Control, Observation, Outcome, ProcessEnd, Reporter, Run},
    process::{OwnedChild, describe},
};
use std::{
    fmt,
    os::{fd::AsRawFd, unix::net::UnixStream as StdUnixStream},
    sync::Arc,
    time::Duration,
};
use tokio::{
    net::UnixStream,
    time::{Instant, sleep_until},
};
use virt::{connect::Connect, domain::Domain, sys};

/// Interval between checks of the domain's state.
const POLL_INTERVAL: Duration = Duration::from_millis(250);
/// Interval between checks once the machine's process has ended: libvirt is about to report how.
const RETRY_INTERVAL: Duration = Duration::from_millis(20);

/// A running domain.
pub(crate) struct LibvirtRun {
    control: DomainControl,
    /// When to check its state next.
    next_poll: Instant,
    /// One check at a time: libvirt blocks queries about a domain that it is stopping.
    polling: Fuse<BoxFuture<'static, Option<Observation>>>,
    killing: Fuse<BoxFuture<'static, ()>>,
    process_ended: Fuse<BoxFuture<'static, ProcessEnd>>,
}

impl fmt::Debug for LibvirtRun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LibvirtRun").field("domain", &self.control.name).finish_non_exhaustive()
    }
}

impl LibvirtRun {
    /// Watches a domain, whose process is given if it was found.
    pub(crate) fn new(control: DomainControl, process: Option<OwnedChild>) -> Self {
        Self {
            control,
            next_poll: Instant::now() + POLL_INTERVAL,
            polling: Fuse::terminated(),
            killing: Fuse::terminated(),
            process_ended: ended(process).boxed().fuse(),
        }
    }
}

impl Run for LibvirtRun {
    type Control = DomainControl;
    const REPORTER: Reporter = Reporter::Daemon;

    fn control(&self) -> DomainControl {
        self.control.clone()
    }

    async fn observe(&mut self) -> Observation {
        loop {
            tokio::select! {
                end = &mut self.process_ended, if !self.process_ended.is_terminated() => {
                    self.next_poll = Instant::now();
                    return Observation::ProcessEnded(end);
                }
                () = &mut self.killing, if !self.killing.is_terminated() => self.next_poll = Instant::now(),
                () = sleep_until(self.next_poll), if self.polling.is_terminated() => {
                    self.polling = self.control.clone().poll_state().boxed().fuse();
                }
                observation = &mut self.polling, if !self.polling.is_terminated() => {
                    let ended = self.process_ended.is_terminated();
                    self.next_poll = Instant::now() + if ended { RETRY_INTERVAL } else { POLL_INTERVAL };
                    if let Some(observation) = observation {
                        return observation;
                    }
                }
            }
        }
    }

    fn quit(&mut self) {
        // Libvirt asks QEMU to end before it kills it.
        self.kill();
    }

    fn kill(&mut self) {
        if self.killing.is_terminated() {
            self.killing = self.control.clone().destroy().boxed().fuse();
        }
    }
}

/// Waits until the process of a domain has ended, and returns how. Never completes if it was not found.
async fn ended(process: Option<OwnedChild>) -> ProcessEnd {
    let Some(mut process) = process else { return std::future::pending().await };
    let (outcome, detail) = match process.wait().await {
        Ok(status) if !status.success() => (Outcome::Failure, format!("QEMU {}", describe(status))),
        // Only libvirt knows whether its guest powered off.
        _ => (Outcome::Unknown, "QEMU ended, and libvirt does not report why".to_owned()),
    };
    ProcessEnd { outcome, detail, last_lines: String::new() }
}

/// A domain of a connection, by its name.
#[derive(Debug, Clone)]
pub(crate) struct DomainControl {
    connection: Arc<Connection>,
    name: String,
}

#[async_trait]
impl Control for DomainControl {
    async fn resume(&self) -> Result<()> {
        let resumed = self.command(|domain| domain.resume().map(drop)).await;
        resumed.map_err(|failure| failure.into_error(ErrorKind::LaunchFailed, "start the domain"))
    }

    async fn press_power_button(&self) -> Result<()> {
        let press =
            |domain: &Domain| domain.shutdown_flags(sys::VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN).map(drop);
        let pressed = self.command(press).await;
        pressed.map_err(|failure| failure.into_error(ErrorKind::Protocol, "press the power button"))
    }

    async fn screenshot(&self) -> Result<Vec<u8>> {
        screenshot(&self.connection, &self.name).await
    }

    async fn display(&self) -> Result<BoxedStream> {
        let failed = |error| Error::io("create a pair of sockets", error);
        let (ours, theirs) = StdUnixStream::pair().map_err(failed)?;
        ours.set_nonblocking(true).map_err(failed)?;
        let hand_over = move |domain: &Domain| {
            domain.open_graphics(0, theirs.as_raw_fd(), sys::VIR_DOMAIN_OPEN_GRAPHICS_SKIPAUTH).map(drop)
        };
        let handed = self.command(hand_over).await;
        handed.map_err(|failure| failure.into_error(ErrorKind::Protocol, "connect to the display"))?;
        Ok(Box::new(UnixStream::from_std(ours).map_err(failed)?))
    }

    fn display_command(&self) -> String {
        format!("virt-viewer --connect '{}' --attach {}", self.connection.uri(), self.name)
    }
}

impl DomainControl {
    pub(crate) fn new(connection: &Arc<Connection>, name: &str) -> Self {
        Self { connection: Arc::clone(connection), name: name.to_owned() }
    }

    /// Runs a command on the domain.
    async fn command<T: Send + 'static>(
        &self,
        command: impl FnOnce(&Domain) -> Result<T, Refusal> + Send + 'static,
    ) -> Result<T, Failure> {
        let name = self.name.clone();
        self.connection.command(move |connect| command(&domain(connect, &name)?)).await
    }

    /// Checks the state of the domain; `None` if libvirt does not report it.
    async fn poll_state(self) -> Option<Observation> {
        let name = self.name.clone();
        let poll = move |connect: &Connect| {
            domain(connect, &name)?.get_state().map(|(state, reason)| DomainState::of(state, reason))
        };
        match self.connection.query(poll).await {
            Ok(DomainState::Observed(observation)) => Some(observation),
            Ok(DomainState::DiskFailed) => {
                Some(Observation::DiskFailed { detail: None, full: self.is_disk_full().await })
            }
            Err(failure) if failure.is_no_domain() => Some(Observation::Off {
                powered_off: false,
                detail: "the machine's domain was removed from libvirt".to_owned(),
            }),
            Err(Failure::Refused(refusal)) => {
                tracing::debug!(domain = self.name, refusal = refusal.message(), "cannot query a domain");
                None
            }
            Err(Failure::Lost(error)) => {
                Some(Observation::Unreachable(format!("libvirt is unreachable: {}", error.report())))
            }
        }
    }

    /// Ends the domain. If it ended by itself or cannot be reached, the next check shows it.
    pub(crate) async fn destroy(self) {
        if let Err(failure) = self.command(Domain::destroy).await {
            tracing::debug!(domain = self.name, ?failure, "cannot destroy a domain");
        }
    }

    /// Returns whether a device stopped because the host's disk is full (QEMU QMP Reference Manual, `query-block`:
    /// `nospace`).
    async fn is_disk_full(&self) -> bool {
        let name = self.name.clone();
        let query = move |connect: &Connect| {
            domain(connect, &name)?.qemu_monitor_command(r#"{"execute": "query-block"}"#, 0)
        };
        let answer = self.connection.query(query).await.unwrap_or_default();
        let answer: serde_json::Value = serde_json::from_str(&answer).unwrap_or_default();
        let devices = answer["return"].as_array().into_iter().flatten();
        devices.into_iter().any(|device| device["io-status"] == "nospace")
    }
}
