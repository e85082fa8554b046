//! The gateway's TCP: smoltcp's sockets on an interface that answers for every address. The router decides which packets
//! reach it.

use smoltcp::{
    iface::{Config, Interface, SocketHandle, SocketSet},
    phy::{Checksum, Device, DeviceCapabilities, Medium, RxToken, TxToken},
    socket::tcp::{self, State},
    time::{Duration as StackDuration, Instant as StackInstant},
    wire::{HardwareAddress, IpAddress, IpCidr},
};
use std::{
    collections::{HashMap, VecDeque},
    io,
    net::Ipv4Addr,
    time::Duration,
};
use tokio::time::Instant;

use super::wire::MTU;

/// Receive buffer of a connection, in bytes: what a guest may send before it is read.
const RECEIVE_BUFFER: usize = 128 << 10;
/// Send buffer of a connection, in bytes: seven segments. QEMU loses frames that wait for a NIC beyond the free descriptors of its
/// ring (`qemu_net_queue_flush` treats the -1 of `e1000_receive_iov` as delivered), and a boot loader offers eight.
const SEND_BUFFER: usize = 7 * 1460;
/// Time after which a guest that does not answer loses its connection, and the interval between keep-alives while idle.
const IDLE_LIMIT: StackDuration = StackDuration::from_secs(600);
const KEEP_ALIVE_INTERVAL: StackDuration = StackDuration::from_secs(60);
/// Time limit for a guest to close a connection that is no longer used here.
const LINGER: StackDuration = StackDuration::from_secs(30);
/// The same for a guest that answers but does not close its side.
const MAX_LINGER: Duration = Duration::from_secs(60);
/// The interface's own address, from a range that no network uses (RFC 7600).
const OWN_ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 0, 0, 8);
/// Local ports of connections to guests (RFC 6335).
const EPHEMERAL_PORTS: std::ops::Range<u16> = 49152..65535;

/// A NIC of a VPC: its segment, and its port there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct PortId {
    pub(crate) segment: usize,
    pub(crate) port: usize,
}

/// The two ends of a connection that a guest opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Flow {
    pub(crate) guest: (Ipv4Addr, u16),
    pub(crate) to: (Ipv4Addr, u16),
}

/// Packets into the stack and out of it.
#[derive(Debug, Default)]
struct Queues {
    received: VecDeque<Vec<u8>>,
    sent: Vec<Vec<u8>>,
}

struct Received(Vec<u8>);

struct Sending<'a>(&'a mut Vec<Vec<u8>>);

impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, read: F) -> R {
        read(&self.0)
    }
}

impl TxToken for Sending<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, write: F) -> R {
        let mut packet = vec![0; length];
        let result = write(&mut packet);
        self.0.push(packet);
        result
    }
}

impl Device for Queues {
    type RxToken<'a> = Received;
    type TxToken<'a> = Sending<'a>;

    fn receive(&mut self, _: StackInstant) -> Option<(Received, Sending<'_>)> {
        Some((Received(self.received.pop_front()?), Sending(&mut self.sent)))
    }

    fn transmit(&mut self, _: StackInstant) -> Option<Sending<'_>> {
        Some(Sending(&mut self.sent))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = MTU;
        // A unix socket does not corrupt data.
        capabilities.checksum.tcp = Checksum::Tx;
        capabilities.checksum.ipv4 = Checksum::Tx;
        capabilities
    }
}

/// The NIC of a connection, and the ends of a connection that the guest opened.
#[derive(Debug, Clone, Copy)]
struct Connection {
    port_id: PortId,
    flow: Option<Flow>,
}

/// The gateway's TCP of a VPC.
pub(crate) struct Stack {
    interface: Interface,
    queues: Queues,
    sockets: SocketSet<'static>,
    connections: HashMap<SocketHandle, Connection>,
    /// Connections that are no longer used here.
    closing: Vec<(SocketHandle, Instant)>,
    started: Instant,
    next_port: u16,
}

impl std::fmt::Debug for Stack {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stack").field("connections", &self.connections).finish_non_exhaustive()
    }
}

impl Stack {
    pub(crate) fn new() -> Self {
        let mut queues = Queues::default();
        let mut config = Config::new(HardwareAddress::Ip);
        config.random_seed = rand::random();
        let mut interface = Interface::new(config, &mut queues, StackInstant::ZERO);
        interface.set_any_ip(true);
        interface.update_ip_addrs(|addresses| {
            // There is space for the first.
            let _ = addresses.push(IpCidr::new(IpAddress::Ipv4(OWN_ADDRESS), 32));
        });
        // A route via itself makes it treat every address as its own.
        let _ = interface.routes_mut().add_default_ipv4_route(OWN_ADDRESS);
        Self {
            interface,
            queues,
            sockets: SocketSet::new(Vec::new()),
            connections: HashMap::new(),
            closing: Vec::new(),
            started: Instant::now(),
            next_port: EPHEMERAL_PORTS.start,
        }
    }

    fn now(&self) -> StackInstant {
        StackInstant::from_micros(i64::try_from(self.started.elapsed().as_micros()).unwrap_or(i64::MAX))
    }

    /// Passes it a packet of a guest.
    pub(crate) fn receive(&mut self, packet: Vec<u8>) {
        self.queues.received.push_back(packet);
    }

    /// Processes what is pending, and returns the packets to send.
    pub(crate) fn run(&mut self) -> Vec<Vec<u8>> {
        let now = self.now();
        self.interface.poll(now, &mut self.queues, &mut self.sockets);
        std::mem::take(&mut self.queues.sent)
    }

    /// Returns the time until it has to be run again, unless something happens before.
    pub(crate) fn delay(&mut self) -> Option<Duration> {
        let now = self.now();
        self.interface.poll_delay(now, &self.sockets).map(|delay| Duration::from_micros(delay.total_micros()))
    }

    /// Removes connections that have ended and are no longer used, and returns them.
    pub(crate) fn remove_ended(&mut self) -> Vec<(PortId, Option<Flow>)> {
        let Self { sockets, closing, connections, .. } = self;
        let mut removed = Vec::new();
        closing.retain(|(handle, since)| {
            let socket = sockets.get_mut::<tcp::Socket<'_>>(*handle);
            if socket.recv_queue() > 0 || since.elapsed() > MAX_LINGER {
                // The guest still sends data that would never be read.
                socket.abort();
            }
            let ended = match socket.state() {
                // While the peer is known, the reset has not been sent yet.
                State::Closed => socket.remote_endpoint().is_none(),
                // Nothing is lost or delayed between a guest and its gateway.
                State::TimeWait => true,
                _ => false,
            };
            if ended {
                sockets.remove(*handle);
                removed.extend(
                    connections.remove(handle).map(|connection| (connection.port_id, connection.flow)),
                );
            }
            !ended
        });
        removed
    }

    fn add(&mut self, socket: tcp::Socket<'static>, port_id: PortId, flow: Option<Flow>) -> SocketHandle {
        let handle = self.sockets.add(socket);
        self.connections.insert(handle, Connection { port_id, flow });
        handle
    }

    /// Opens a connection to a guest.
    pub(crate) fn connect(
        &mut self,
        port_id: PortId,
        gateway: Ipv4Addr,
        to: (Ipv4Addr, u16),
    ) -> io::Result<SocketHandle> {
        let used = |port: u16| {
            self.sockets.iter().any(|(_, socket)| match socket {
                smoltcp::socket::Socket::Tcp(socket) => {
                    socket.local_endpoint().is_some_and(|local| local.port == port)
                }
                #[allow(unreachable_patterns)]
                _ => false,
            })
        };
        let start = self.next_port;
        let port = (start..EPHEMERAL_PORTS.end).chain(EPHEMERAL_PORTS.start..start).find(|port| !used(*port));
        let port = port.ok_or(io::ErrorKind::AddrInUse)?;
        self.next_port = if port + 1 < EPHEMERAL_PORTS.end { port + 1 } else { EPHEMERAL_PORTS.start };
        let mut socket = socket();
        socket
            .connect(
                self.interface.context(),
                (IpAddress::Ipv4(to.0), to.1),
                (IpAddress::Ipv4(gateway), port),
            )
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error.to_string()))?;
        Ok(self.add(socket, port_id, None))
    }

    /// Accepts a connection that a guest opens with this packet.
    pub(crate) fn accept(&mut self, port_id: PortId, flow: Flow, syn: Vec<u8>) -> io::Result<SocketHandle> {
        let mut socket = socket();
        socket
            .listen((IpAddress::Ipv4(flow.to.0), flow.to.1))
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error.to_string()))?;
        self.receive(syn);
        Ok(self.add(socket, port_id, Some(flow)))
    }

    pub(crate) fn socket(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    /// Closes a connection gracefully: what was written still arrives.
    pub(crate) fn close(&mut self, handle: SocketHandle) {
        let socket = self.socket(handle);
        socket.close();
        // Covers guests that no longer answer.
        socket.set_timeout(Some(LINGER));
        socket.set_keep_alive(Some(LINGER / 3));
        self.closing.push((handle, Instant::now()));
    }

    /// Resets the connections of a NIC.
    pub(crate) fn abort_at(&mut self, port_id: PortId) {
        let Self { sockets, connections, .. } = self;
        for (handle, _) in connections.iter().filter(|(_, connection)| connection.port_id == port_id) {
            sockets.get_mut::<tcp::Socket<'_>>(*handle).abort();
        }
    }

    /// Resets all connections.
    pub(crate) fn abort_all(&mut self) {
        let Self { sockets, connections, .. } = self;
        connections.keys().for_each(|handle| sockets.get_mut::<tcp::Socket<'_>>(*handle).abort());
    }
}

fn socket() -> tcp::Socket<'static> {
    let buffer = |bytes| tcp::SocketBuffer::new(vec![0; bytes]);
    let mut socket = tcp::Socket::new(buffer(RECEIVE_BUFFER), buffer(SEND_BUFFER));
    // Keystrokes are small, and each one is waited for.
    socket.set_nagle_enabled(false);
    socket.set_ack_delay(None);
    socket.set_timeout(Some(IDLE_LIMIT));
    socket.set_keep_alive(Some(KEEP_ALIVE_INTERVAL));
    socket
}
