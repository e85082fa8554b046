//! Powering a domain on: what has to be there before, and what it runs with afterwards.

use super::Inner;
use crate::{
    connection::domain,
    process::{self, Found},
};
use rudder_core::{Error, ErrorKind, Result, backend::Retention};
use rudder_qemu::parts::{SerialConsole, Tpm, read_forwards};
use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};
use tokio::time::{Instant, sleep, timeout_at};
use virt::{connect::Connect, sys};

/// How long libvirt may take to let go of a machine that has ended before it is started again, and how often is looked.
const REST_LIMIT: Duration = Duration::from_secs(30);
const REST_LOOK: Duration = Duration::from_millis(20);

/// What a domain that was powered on runs with.
#[derive(Debug)]
pub(super) struct Launched {
    pub(super) ways: Ways,
    pub(super) process: Option<Found>,
    pub(super) tpm: Option<Tpm>,
    pub(super) console: Arc<SerialConsole>,
}

/// The ways to the ports of a guest.
#[derive(Debug, Clone)]
pub(super) enum Ways {
    /// Ports of the host, and those of the guest that they lead to.
    Forwarded(Vec<(u16, u16)>),
    /// Its address on a bridge, once it was seen.
    Bridged(Option<Ipv4Addr>),
}

impl Ways {
    pub(super) fn to(&self, port: u16) -> Option<SocketAddr> {
        match self {
            Self::Forwarded(forwards) => {
                let (host, _) = forwards.iter().find(|(_, guest)| *guest == port)?;
                Some(SocketAddr::from((Ipv4Addr::LOCALHOST, *host)))
            }
            Self::Bridged(address) => address.map(|address| SocketAddr::from((address, port))),
        }
    }
}

impl Inner {
    /// Powers the domain on.
    pub(super) async fn launch(&self) -> Result<Launched> {
        self.await_rest().await?;
        let connection = &self.footing.connection;
        for suffix in ["serial", "console", "screen.png"] {
            let path = self.footing.ground.path(&self.file(suffix));
            match tokio::fs::remove_file(&path).await {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(Error::io(format_args!("remove {} of the last run", path.display()), error));
                }
                _ => {}
            }
        }
        let flags = match self.footing.ground.retention() {
            Retention::EndWithOwner => sys::VIR_DOMAIN_START_AUTODESTROY,
            Retention::MayBeKept => 0,
        };
        let tpm = self.state.start_tpm().await?;
        let name = self.domain.clone();
        // Paused until its serial console is recorded: nothing of what it writes is missed.
        let flags = flags | sys::VIR_DOMAIN_START_PAUSED;
        let start = move |connect: &Connect| domain(connect, &name)?.create_with_flags(flags).map(drop);
        let started = connection.order(start).await;
        started.map_err(|failure| self.refused(failure, ErrorKind::LaunchFailed, "start the domain"))?;
        let process = process::find(self.domain.clone(), self.footing.ground.id().clone()).await;
        let rest = async {
            let ways = match self.footing.bridges() {
                Some(_) => Ways::Bridged(None),
                None => Ways::Forwarded(self.read_forwards().await?),
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
                // What failed is told; this only tidies up, and the end of the lab does so again.
                let _ = connection.order(move |connect| domain(connect, &name)?.destroy()).await;
                Err(error)
            }
        }
    }

    /// Waits until libvirt has let go of the last run: its end may have been told before libvirt was done with it.
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
            let told = timeout_at(deadline, self.footing.connection.ask(ask)).await;
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

    /// The ports that QEMU's user network forwards: the kernel chose those of the host.
    async fn read_forwards(&self) -> Result<Vec<(u16, u16)>> {
        if self.spec.ports.is_empty() || self.spec.nics.is_empty() {
            return Ok(Vec::new());
        }
        let name = self.domain.clone();
        let ask = move |connect: &Connect| {
            domain(connect, &name)?
                .qemu_monitor_command("info usernet", sys::VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP)
        };
        let told = self.footing.connection.ask(ask).await;
        let told =
            told.map_err(|failure| self.refused(failure, ErrorKind::LaunchFailed, "list forwarded ports"))?;
        let forwards = read_forwards(&told);
        match self.spec.ports.iter().find(|port| !forwards.iter().any(|(_, guest)| guest == *port)) {
            None => Ok(forwards),
            Some(port) => {
                let message =
                    format!("expected QEMU to forward a port to port {port} of the guest, but found none");
                Err(self.error(ErrorKind::LaunchFailed, message))
            }
        }
    }
}
