//! Powering on a domain: what it requires, and what it produces.

use super::Inner;
use crate::{
    connection::domain,
    process::{self, Found},
};
use rudder_core::{Error, ErrorKind, Result};
use rudder_local::{serial::SerialConsole, tpm::Tpm};
use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};
use tokio::time::{Instant, sleep, timeout_at};
use virt::{connect::Connect, sys};

/// How long libvirt may take to release a machine that has ended before it is started again.
const REST_LIMIT: Duration = Duration::from_secs(30);
/// Interval between checks for that.
const REST_LOOK: Duration = Duration::from_millis(20);

/// What a domain runs with after it was powered on.
#[derive(Debug)]
pub(super) struct Launched {
    pub(super) ways: Ways,
    pub(super) process: Option<Found>,
    pub(super) tpm: Option<Tpm>,
    pub(super) console: Arc<SerialConsole>,
}

/// How the ports of a guest are reached.
#[derive(Debug, Clone)]
pub(super) enum Ways {
    /// Through the lab's own switches and routers.
    Switched,
    /// Through the guest's address on a bridge, once that is known.
    Bridged(Option<Ipv4Addr>),
}

impl Ways {
    pub(super) fn to(&self, port: u16) -> Option<SocketAddr> {
        match self {
            Self::Switched => None,
            Self::Bridged(address) => address.map(|address| SocketAddr::from((address, port))),
        }
    }
}

impl Inner {
    /// Powers on the domain.
    pub(super) async fn launch(&self) -> Result<Launched> {
        self.await_rest().await?;
        let connection = &self.context.connection;
        for suffix in ["serial", "console", "screen.png"] {
            let path = self.context.storage.path(&self.file(suffix));
            match tokio::fs::remove_file(&path).await {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(Error::io(format_args!("remove {} of the last run", path.display()), error));
                }
                _ => {}
            }
        }
        self.context.lan.clear(&self.context.storage, &self.spec.name)?;
        let flags = match self.context.storage.dir().may_be_kept() {
            true => 0,
            false => sys::VIR_DOMAIN_START_AUTODESTROY,
        };
        let tpm = self.state.start_tpm().await?;
        let name = self.domain.clone();
        // Paused until its serial console is recorded, so that none of its output is lost.
        let flags = flags | sys::VIR_DOMAIN_START_PAUSED;
        let start = move |connect: &Connect| domain(connect, &name)?.create_with_flags(flags).map(drop);
        let started = connection.order(start).await;
        started.map_err(|failure| self.refused(failure, ErrorKind::LaunchFailed, "start the domain"))?;
        let process = process::find(self.domain.clone(), self.context.storage.id().clone()).await;
        let rest = async {
            let ways = match self.context.bridges() {
                Some(_) => Ways::Bridged(None),
                None => {
                    self.context
                        .lan
                        .connect(&self.context.storage, &self.spec.name, self.lifecycle.rest())
                        .await?;
                    Ways::Switched
                }
            };
            let console = self.attach_console().await?;
            let name = self.domain.clone();
            let resumed = connection.order(move |connect| domain(connect, &name)?.resume().map(drop)).await;
            resumed.map_err(|failure| self.refused(failure, ErrorKind::LaunchFailed, "start the domain"))?;
            Ok((ways, console))
        };
        match rest.await {
            Ok((ways, console)) => Ok(Launched { ways, process, tpm, console }),
            Err(error) => {
                let name = self.domain.clone();
                // The original error is returned; this is best-effort clean-up, repeated when the lab ends.
                let _ = connection.order(move |connect| domain(connect, &name)?.destroy()).await;
                Err(error)
            }
        }
    }

    /// Waits until libvirt has released the previous run, whose end may have been reported earlier.
    async fn await_rest(&self) -> Result<()> {
        let held = |what: &str| {
            let limit = REST_LIMIT.as_secs();
            let message = format!(
                "expected libvirt to let go of the machine's last run within {limit} s, but it {what}"
            );
            self.error(ErrorKind::LaunchFailed, message).with_help(
                "its process may be one that the host's init does not take note of: look with virsh and ps",
            )
        };
        let deadline = Instant::now() + REST_LIMIT;
        loop {
            let name = self.domain.clone();
            let ask = move |connect: &Connect| domain(connect, &name)?.is_active();
            let told = timeout_at(deadline, self.context.connection.ask(ask)).await;
            let told = told.map_err(|_| held("does not answer"))?;
            let active =
                told.map_err(|failure| self.refused(failure, ErrorKind::LaunchFailed, "look at the domain"))?;
            if !active {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(held("still runs"));
            }
            sleep(REST_LOOK).await;
        }
    }
}
