//! The network of a lab in user space: a learning switch for each subnet and a router for each VPC, on
//! [smoltcp](https://docs.rs/smoltcp). It needs no privileges, no packages and no state of the kernel.
//!
//! ```text
//! QEMU ── unix socket ── cable ── port ┐
//!                                      ├ segment (switch) ── vpc (router) ── stack (TCP) ── stream: dial, services
//! QEMU ── unix socket ── cable ── port ┘                        ├ dhcp, dns           └ nat ── sockets of this host
//!                                                               └ policy
//! ```
//!
//! A guest can reach the guests of its VPC; the gateway, which answers ping, DHCP, DNS and what the lab
//! [serves](Network::serve); and, if its VPC has internet, other hosts over TCP and UDP. It never reaches this host, whose
//! loopback and addresses are refused when a connection is made. Nothing listens on this host.
//!
//! Guests are not trusted: every frame is read with bounds checks, a guest cannot take the planned address of another machine,
//! and the state that it can cause this process to keep is bounded: connections, addresses, waiting packets.

mod cable;
mod dhcp;
mod dns;
mod nat;
mod policy;
mod port;
mod port_forward;
mod record;
mod segment;
mod service;
mod stack;
mod stream;
mod vpc;
mod wire;

#[doc(hidden)]
pub mod fuzz;
#[cfg(test)]
mod tests;

pub(crate) use self::record::nics as record_of_nics;
pub use self::{
    record::{FORMAT, MachineRecord, NetworkRecord},
    stream::GuestStream,
};

use self::{
    segment::Segment,
    stack::PortId,
    vpc::{Settings, Vpc},
};
use rudder_core::{
    Error, ErrorKind, Result,
    backend::{Served, Site},
    media::http::answer,
    plan::{PlannedNetwork, PlannedNic},
};
use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tokio::{io, sync::mpsc, task::JoinSet};
use tokio_util::{
    sync::{CancellationToken, DropGuard},
    task::AbortOnDropHandle,
};

/// The first port on which files are served.
const FIRST_SITE_PORT: u16 = 8000;
/// The port of DNS.
const DNS: u16 = 53;
/// Maximum number of concurrent connections to one site; further ones wait.
const MAX_CONNECTIONS: usize = 256;

/// Options for creating a [`Network`].
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct NetworkOptions {
    /// The name of the lab, from which the domain of its machines is derived: `web.NAME.internal`.
    pub name: String,
    /// The server that answers queries for other names; `None` for the host's, from `/etc/resolv.conf`.
    pub resolver: Option<SocketAddr>,
}

impl NetworkOptions {
    /// Returns options for a lab of this name.
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), resolver: None }
    }

    /// Sets the DNS server to ask instead of the host's.
    #[must_use]
    pub fn resolver(mut self, resolver: SocketAddr) -> Self {
        self.resolver = Some(resolver);
        self
    }
}

/// The network of a lab. Dropping it ends it, and every connection over it.
#[derive(Debug)]
pub struct Network {
    plan: PlannedNetwork,
    name: String,
    vpcs: Vec<Arc<Vpc>>,
    machines: Mutex<BTreeMap<String, Vec<Attached>>>,
    _end: DropGuard,
}

/// A NIC of a machine.
#[derive(Debug, Clone)]
struct Attached {
    nic: PlannedNic,
    vpc: Arc<Vpc>,
    port_id: PortId,
}

impl Attached {
    fn address(&self) -> Option<Ipv4Addr> {
        self.vpc.lock().segments.get(self.port_id.segment)?.nics.get(self.port_id.port)?.address
    }
}

impl Network {
    /// Creates the network of a plan. Must be called on a Tokio runtime.
    #[must_use]
    pub fn new(plan: &PlannedNetwork, options: &NetworkOptions) -> Self {
        Self::with_policy(plan, options, policy::is_outside)
    }

    fn with_policy(
        plan: &PlannedNetwork,
        options: &NetworkOptions,
        is_outside: fn(Ipv4Addr) -> bool,
    ) -> Self {
        let end = CancellationToken::new();
        let domain = format!("{}.internal", label(&options.name));
        let settings =
            Arc::new(Settings { domain, resolver: options.resolver, is_outside, end: end.clone() });
        let vpcs = plan.vpcs.iter().enumerate().map(|(number, planned)| {
            let subnets = plan.subnets.iter().filter(|subnet| subnet.vpc == planned.name);
            let segments = subnets
                .enumerate()
                .map(|(index, subnet)| Segment::new(subnet.clone(), gateway_mac(number, index)));
            let vpc = Vpc::new(&planned.name, planned.internet, segments.collect(), &settings);
            vpc.spawn(Arc::clone(&vpc).run_timer());
            serve_dns(&vpc);
            vpc
        });
        Self {
            plan: plan.clone(),
            name: options.name.clone(),
            vpcs: vpcs.collect(),
            machines: Mutex::default(),
            _end: end.drop_guard(),
        }
    }

    fn machines(&self) -> MutexGuard<'_, BTreeMap<String, Vec<Attached>>> {
        self.machines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a machine, and assigns addresses to its NICs.
    ///
    /// # Errors
    /// `InvalidInput` for a NIC in no subnet of the network; `Conflict` when a machine of this name exists.
    pub fn add_machine(&self, name: &str, nics: &[PlannedNic]) -> Result<()> {
        let find = |nic: &PlannedNic| {
            let found_in = self.vpcs.iter().find_map(|vpc| {
                let segment =
                    vpc.lock().segments.iter().position(|segment| segment.plan.name == nic.subnet)?;
                Some((Arc::clone(vpc), segment))
            });
            found_in.ok_or_else(|| {
                let message = format!("expected a subnet of the lab, but found {:?}", nic.subnet);
                Error::new(ErrorKind::InvalidInput, message).with_context("nic", &nic.name)
            })
        };
        let found: Vec<_> = nics.iter().map(find).collect::<Result<_>>()?;
        let mut machines = self.machines();
        if machines.contains_key(name) {
            let message = format!("expected an unused machine name, but found {name:?}");
            return Err(Error::new(ErrorKind::Conflict, message));
        }
        let owner: Arc<str> = name.into();
        let attached = nics.iter().zip(found).map(|(nic, (vpc, segment))| {
            let port = vpc.lock().segments[segment].add(&owner, nic.mac.bytes(), nic.ip);
            Attached { nic: nic.clone(), vpc, port_id: PortId { segment, port } }
        });
        machines.insert(name.to_owned(), attached.collect());
        drop(machines);
        self.update_names();
        Ok(())
    }

    /// Removes a machine.
    pub fn remove_machine(&self, name: &str) {
        let attached = self.machines().remove(name).unwrap_or_default();
        for Attached { vpc, port_id, .. } in attached {
            vpc.disconnected(port_id);
            if let Some(segment) = vpc.lock().segments.get_mut(port_id.segment) {
                segment.remove(port_id.port);
            }
        }
        self.update_names();
    }

    /// Passes the names of the machines to DNS.
    fn update_names(&self) {
        for vpc in &self.vpcs {
            let mut inner = vpc.lock();
            let nics =
                inner.segments.iter().filter(|segment| segment.is_routed()).flat_map(|segment| &segment.nics);
            let mut names = dns::Names::new();
            for nic in nics {
                if let Some(address) = nic.address {
                    names.entry(nic.machine.to_ascii_lowercase()).or_default().push(address);
                }
            }
            inner.names = names;
        }
    }

    /// Returns the NICs of a machine, with their planned addresses.
    #[must_use]
    pub fn nics(&self, machine: &str) -> Vec<PlannedNic> {
        let attached = self.machines().get(machine).cloned().unwrap_or_default();
        attached
            .iter()
            .map(|attached| PlannedNic { ip: attached.address(), ..attached.nic.clone() })
            .collect()
    }

    /// Connects the NICs of a started machine, in order, to the sockets on which QEMU listens for them. Dropping the returned
    /// value disconnects them.
    #[must_use]
    pub fn plug(&self, machine: &str, sockets: impl IntoIterator<Item = PathBuf>) -> Plugged {
        let attached = self.machines().get(machine).cloned().unwrap_or_default();
        let mut cables = JoinSet::new();
        let (first, connected) = mpsc::channel(attached.len().max(1));
        for (Attached { vpc, port_id, .. }, socket) in attached.into_iter().zip(sockets) {
            let port = {
                let inner = vpc.lock();
                inner.segments[port_id.segment].nics.get(port_id.port).map(|nic| Arc::clone(&nic.port))
            };
            let Some(port) = port else { continue };
            let (end, first) = (vpc.settings.end.clone(), first.clone());
            cables.spawn(async move {
                let plugged = cable::keep_connected(vpc, port_id, port, socket, first);
                let _ = end.run_until_cancelled(plugged).await;
            });
        }
        Plugged { missing: cables.len(), connected, _cables: cables }
    }

    /// Connects to a TCP port of a machine, over its first NIC that the router reaches.
    ///
    /// # Errors
    /// `ConnectionRefused` at once when nothing listens, `HostUnreachable` and `TimedOut` after a few seconds when the guest has
    /// no address or does not answer; `NotConnected` for a machine without such a NIC.
    pub async fn dial(&self, machine: &str, port: u16) -> io::Result<GuestStream> {
        let attached = self.machines().get(machine).cloned().unwrap_or_default();
        let routed = attached.into_iter().find(|attached| {
            let inner = attached.vpc.lock();
            inner.segments.get(attached.port_id.segment).is_some_and(Segment::is_routed)
        });
        let Attached { vpc, port_id, .. } = routed.ok_or(io::ErrorKind::NotConnected)?;
        vpc.dial(port_id, port).await
    }

    /// Serves files on the gateways of all subnets that have one, until the returned value is dropped.
    #[must_use]
    pub fn serve(&self, site: Site) -> Served {
        let port = self.free_port();
        let (callers, mut accepted) = mpsc::channel::<service::Caller>(1);
        let mut tasks = JoinSet::new();
        for vpc in &self.vpcs {
            let (mut opened, callers) = (vpc.lock().services.open(port), callers.clone());
            tasks.spawn(async move {
                while let Some(caller) = opened.recv().await {
                    if callers.send(caller).await.is_err() {
                        return;
                    }
                }
            });
        }
        let server = AbortOnDropHandle::new(tokio::spawn(async move {
            let (site, mut connections, _tasks) = (Arc::new(site), JoinSet::new(), tasks);
            while let Some((machine, stream)) = accepted.recv().await {
                while connections.try_join_next().is_some() {}
                if connections.len() >= MAX_CONNECTIONS {
                    connections.join_next().await;
                }
                connections.spawn(answer(Arc::clone(&site), Some(machine.to_string()), stream));
            }
        }));
        Served::new(self.gateways(), port, server)
    }

    /// Returns the addresses of the gateways, by subnet name.
    #[must_use]
    pub fn gateways(&self) -> BTreeMap<String, Ipv4Addr> {
        let routed = self.plan.subnets.iter().filter(|subnet| !subnet.unmanaged);
        routed.map(|subnet| (subnet.name.clone(), subnet.cidr.gateway())).collect()
    }

    /// Returns a port of the gateways on which nothing is served.
    fn free_port(&self) -> u16 {
        let is_free = |port: &u16| self.vpcs.iter().all(|vpc| vpc.lock().services.at(*port).is_none());
        (FIRST_SITE_PORT..u16::MAX).find(is_free).unwrap_or(FIRST_SITE_PORT)
    }

    /// Opens sockets on this host that lead to ports of a machine, in a directory that only their owner can enter. Dropping the
    /// returned value closes them.
    ///
    /// # Errors
    /// A socket cannot be created.
    pub fn forward_ports(
        self: &Arc<Self>,
        machine: &str,
        ports: impl IntoIterator<Item = (u16, PathBuf)>,
    ) -> io::Result<PortForwards> {
        port_forward::open(self, machine, ports)
    }

    /// Returns a record with which another process can run this network.
    #[must_use]
    pub fn record(&self) -> NetworkRecord {
        let names: Vec<String> = self.machines().keys().cloned().collect();
        let machines = names.into_iter().map(|name| MachineRecord::new(self.nics(&name), name));
        NetworkRecord::new(self.name.clone(), self.plan.clone(), machines.collect())
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        // Lets users of open connections know that they are over.
        self.vpcs.iter().for_each(|vpc| vpc.shut_down());
    }
}

/// The plugged cables of a machine.
#[derive(Debug)]
pub struct Plugged {
    /// Number of NICs that have not been connected yet.
    missing: usize,
    connected: mpsc::Receiver<()>,
    _cables: JoinSet<()>,
}

impl Plugged {
    /// Waits until every NIC has been connected once. QEMU 7.2 crashes when a guest sends over a NIC on whose socket QEMU could not
    /// listen, which it does not report.
    pub async fn connected(&mut self) {
        while self.missing > 0 && self.connected.recv().await.is_some() {
            self.missing -= 1;
        }
    }
}

pub use port_forward::PortForwards;

/// Returns the hardware address of a gateway: locally administered (IEEE 802, clause 8.2), and in a range that plans draw from
/// only by chance.
fn gateway_mac(vpc: usize, subnet: usize) -> wire::Mac {
    let number = |number: usize| u8::try_from(number % 256).unwrap_or_default();
    [0x52, 0x55, 0x0a, number(vpc), number(subnet), 0x01]
}

/// Converts a name to a DNS label: lower case letters, digits and `-`.
fn label(name: &str) -> String {
    let plain = name.chars().filter(|c| c.is_ascii_alphanumeric() || *c == '-').take(63);
    let label: String = plain.map(|c| c.to_ascii_lowercase()).collect();
    let label = label.trim_matches('-');
    if label.is_empty() { "lab".to_owned() } else { label.to_owned() }
}

fn serve_dns(vpc: &Arc<Vpc>) {
    let mut questions = vpc.lock().services.open(DNS);
    let owned = Arc::clone(vpc);
    vpc.spawn(async move {
        let mut connections = JoinSet::new();
        while let Some((_, stream)) = questions.recv().await {
            while connections.try_join_next().is_some() {}
            connections.spawn(nat::answer_over_tcp(Arc::clone(&owned), stream));
        }
    });
}
