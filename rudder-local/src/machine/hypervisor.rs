//! What a hypervisor of this host has to implement.

use super::Definition;
use crate::lifecycle::Run;
use async_trait::async_trait;
use futures::future::BoxFuture;
use rudder_core::{
    Result,
    backend::{BoxedStream, Exit},
};
use std::{fmt, net::IpAddr};

/// The start of a machine.
pub type Start = BoxFuture<'static, Result<()>>;

/// A machine of a kept lab, as another process finds it.
#[derive(Debug)]
pub enum Found<R> {
    /// It has never been started.
    Defined,
    /// It runs.
    Running(R),
    /// It has ended.
    Ended(Exit),
}

/// How a hypervisor starts a machine, and what is particular to it.
#[async_trait]
pub trait Hypervisor: fmt::Debug + Send + Sync + 'static {
    /// A machine that was powered on.
    type Run: Run;

    /// The name of the backend.
    const BACKEND: &'static str;

    /// The sockets that it creates for a machine, besides its NICs and its serial console. They are removed before the
    /// machine is powered on.
    const SOCKETS: &'static [&'static str] = &[];

    /// Waits until the hypervisor has released the previous run of a machine, whose end may have been reported earlier.
    ///
    /// # Errors
    /// `LaunchFailed`.
    async fn await_release(&self, _machine: &Definition) -> Result<()> {
        Ok(())
    }

    /// Powers on a machine whose guest does not run yet, and waits until it can be controlled. Dropping the future ends
    /// what was started, unless [`complete`](Self::complete) prevents that it is dropped.
    ///
    /// # Errors
    /// `LaunchFailed`, with the reason that the hypervisor gives.
    async fn power_on(&self, machine: &Definition) -> Result<Self::Run>;

    /// Finds a machine that another process started, or did not start, and takes control of it if it runs.
    ///
    /// # Errors
    /// The machine runs and cannot be controlled.
    async fn find(&self, machine: &Definition) -> Result<Found<Self::Run>>;

    /// Returns the arguments to record for processes that find the machine.
    fn arguments(&self) -> &[String] {
        &[]
    }

    /// Ends a machine whose guest has not run. Best effort: whatever is left is removed with the lab.
    async fn discard(&self, run: Self::Run) {
        drop(run);
    }

    /// Carries out the start of a machine. A hypervisor that completes what was requested even if the caller is dropped
    /// continues the start in a task of its own; it is killed once it runs.
    ///
    /// # Errors
    /// Those of the start.
    async fn complete(&self, start: Start) -> Result<()> {
        start.await
    }

    /// Returns whether the NICs of its machines are connected to the lab's own network.
    fn uses_lan(&self) -> bool {
        true
    }

    /// Returns the address at which this host reaches the guest, if it does and that is known.
    fn address(&self) -> Option<IpAddr> {
        None
    }

    /// Connects to a port of the guest of a running machine.
    ///
    /// # Errors
    /// As [`Machine::dial`](rudder_core::backend::Machine::dial).
    async fn dial(&self, machine: &Definition, port: u16) -> Result<BoxedStream> {
        machine.lan.dial(&machine.storage, &machine.spec, port).await
    }

    /// Returns how a person connects to the ports of the guest, one line per port.
    fn port_access(&self, machine: &Definition) -> Vec<String> {
        machine.lan.access(&machine.storage, &machine.spec)
    }
}
