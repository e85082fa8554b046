//! Guests on bridges that libvirt creates: they are reached at the addresses that libvirt reports.

use super::{Libvirt, LibvirtMachine};
use crate::{connection::domain, network};
use rudder_core::{ErrorKind, Result, backend::BoxedStream};
use rudder_local::machine::Definition;
use std::{io, net::Ipv4Addr, sync::PoisonError, time::Duration};
use tokio::{net::TcpStream, time::timeout};
use virt::connect::Connect;

/// How long a guest may take to accept a connection.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

impl Libvirt {
    /// Returns the guest's address on a bridge, if it is known.
    pub(super) fn known_address(&self) -> Option<Ipv4Addr> {
        *self.address.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn keep_address(&self, found: Option<Ipv4Addr>) {
        *self.address.lock().unwrap_or_else(PoisonError::into_inner) = found;
    }

    /// Returns the guest's current address on the bridge of its first NIC, as libvirt knows it.
    async fn find_address(&self, machine: &Definition) -> Result<Option<Ipv4Addr>> {
        let Some(mac) = machine.spec.nics.first().map(|nic| nic.mac.to_string()) else { return Ok(None) };
        let name = self.domain.clone();
        let query = move |connect: &Connect| network::address(&domain(connect, &name)?, &mac);
        let found = self.context.connection.query(query).await;
        let found = found.map_err(|failure| {
            let error = failure.into_error(ErrorKind::GuestUnreachable, "find the guest's address");
            error.with_context("vm", &machine.spec.name)
        })?;
        self.keep_address(found);
        Ok(found)
    }

    /// Connects to a port of the guest.
    pub(super) async fn dial_bridged(&self, machine: &Definition, port: u16) -> Result<BoxedStream> {
        if !machine.spec.ports.contains(&port) || machine.spec.nics.is_empty() {
            let message = format!("expected one of the machine's ports, but found {port}");
            return Err(machine
                .error(ErrorKind::InvalidInput, message)
                .with_help("add the port to MachineSpec::ports, and a NIC to the machine"));
        }
        let unreachable = |what: String| machine.error(ErrorKind::GuestUnreachable, what);
        let address = match self.known_address() {
            Some(address) => address,
            None => {
                let found = self.find_address(machine).await?;
                found.ok_or_else(|| unreachable("the guest has no address yet".to_owned()))?
            }
        };
        let connected = timeout(CONNECT_LIMIT, TcpStream::connect((address, port))).await;
        let connected = connected.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
        let stream = connected.map_err(|error| {
            // The guest may have a different address next time.
            self.keep_address(None);
            unreachable(format!("cannot connect to port {port} of the guest")).with_source(error)
        })?;
        // Keystrokes and SSH packets are small, and each is waited for.
        let _ = stream.set_nodelay(true);
        Ok(Box::new(stream))
    }

    /// Returns how a person connects to the ports of the guest, one line per port.
    pub(super) fn bridged_access(&self, machine: &Definition) -> Vec<String> {
        let Some(host) = self.known_address() else { return Vec::new() };
        let name = &machine.spec.name;
        let ports = machine.spec.ports.iter();
        ports
            .map(|port| {
                format!("{name}: port {port} of the guest: {host}:{port} (ssh -p {port} USER@{host})")
            })
            .collect()
    }
}

/// Returns whether a machine has this address in a subnet. Blocks.
pub(crate) fn has_address(machine: &LibvirtMachine, subnet: &str, address: Ipv4Addr) -> bool {
    let (libvirt, spec) = (machine.hypervisor(), &machine.definition().spec);
    let nics = spec.nics.iter().filter(|nic| nic.subnet == subnet);
    let macs: Vec<String> = nics.map(|nic| nic.mac.to_string()).collect();
    let found = libvirt.context.connection.query_blocking(|connect| {
        let domain = domain(connect, &libvirt.domain)?;
        macs.iter().map(|mac| network::address(&domain, mac)).collect::<Result<Vec<_>, _>>()
    });
    found.is_ok_and(|found| found.contains(&Some(address)))
}
