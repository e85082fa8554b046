//! Connections and datagrams of guests to the outside, over sockets of this host; and queries to the host's DNS servers.

use super::{
    dns,
    stack::{Flow, PortId},
    vpc::{Inner, Vpc},
    wire::{self, MTU, Refusal},
};
use std::{
    collections::HashMap,
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, copy_bidirectional_with_sizes},
    net::{TcpStream, UdpSocket},
    sync::mpsc,
    time::{Instant, timeout},
};

/// Time limit for a connection to the outside.
const CONNECT_LIMIT: Duration = Duration::from_secs(20);
/// Number of bytes that are copied at a time.
const CHUNK: usize = 64 << 10;
/// Time without datagrams after which their socket is closed (RFC 4787, 4.3, asks for two minutes).
const IDLE_LIMIT: Duration = Duration::from_secs(120);
/// Maximum number of datagram sockets per NIC; the least recently used one is closed to make room.
const MAX_FLOWS: usize = 128;
/// Number of datagrams that may wait for a socket.
const QUEUE_LENGTH: usize = 64;
/// Time limit for an answer of a DNS server, and the number of servers that are asked.
const DNS_LIMIT: Duration = Duration::from_secs(5);
const MAX_SERVERS: usize = 3;
/// The largest answer over UDP that reaches a guest in one packet.
const MAX_UDP_ANSWER: usize = MTU - 28;
const DNS: u16 = 53;

/// Connects a guest to the outside.
pub(crate) fn connection(vpc: &Arc<Vpc>, port_id: PortId, flow: Flow, syn: Vec<u8>) {
    let (network, owned) = (Arc::clone(vpc), Arc::clone(vpc));
    network.spawn(async move {
        let vpc = owned;
        if !(vpc.settings.is_outside)(flow.to.0) {
            return vpc.refuse(port_id, flow, syn, Some(Refusal::Prohibited));
        }
        let mut host = match connect(flow.to).await {
            Ok(host) => host,
            Err(why) => return vpc.refuse(port_id, flow, syn, why),
        };
        let Some(mut guest) = vpc.accept(port_id, flow, syn) else { return };
        // An error also ends both sides at once: neither waits for the other.
        if copy_bidirectional_with_sizes(&mut guest, &mut host, CHUNK, CHUNK).await.is_err() {
            guest.abort();
            let _ = host.set_zero_linger();
        }
    });
}

/// Connects to a host outside; an error of `None` means that it refused.
async fn connect((address, port): (Ipv4Addr, u16)) -> Result<TcpStream, Option<Refusal>> {
    match timeout(CONNECT_LIMIT, TcpStream::connect((address, port))).await {
        Ok(Ok(stream)) => {
            let _ = stream.set_nodelay(true);
            Ok(stream)
        }
        Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => Err(None),
        Ok(Err(error)) if error.kind() == io::ErrorKind::NetworkUnreachable => Err(Some(Refusal::NoRoute)),
        Ok(Err(_)) | Err(_) => Err(Some(Refusal::HostUnreachable)),
    }
}

/// Sockets for the datagrams of guests.
#[derive(Debug, Default)]
pub(crate) struct Datagrams {
    flows: HashMap<Flow, Datagram>,
    /// Distinguishes flows with the same ends.
    number: u64,
}

#[derive(Debug)]
struct Datagram {
    port_id: PortId,
    /// Datagrams that the guest sends; dropping it closes the socket.
    queue: mpsc::Sender<Vec<u8>>,
    used: Instant,
    number: u64,
}

impl Datagrams {
    /// Sends a datagram over the socket of its flow, if there is one. Returns whether there was.
    pub(crate) fn send(&mut self, flow: Flow, content: &[u8]) -> bool {
        let Some(known) = self.flows.get_mut(&flow) else { return false };
        known.used = Instant::now();
        // Datagrams that do not fit are dropped.
        !matches!(known.queue.try_send(content.to_vec()), Err(mpsc::error::TrySendError::Closed(_)))
    }

    fn open(&mut self, port_id: PortId, flow: Flow) -> (mpsc::Receiver<Vec<u8>>, u64) {
        let of_port = self.flows.iter().filter(|(_, known)| known.port_id == port_id);
        if of_port.clone().count() >= MAX_FLOWS {
            let oldest = of_port.min_by_key(|(_, known)| known.used).map(|(flow, _)| *flow);
            oldest.map(|oldest| self.flows.remove(&oldest));
        }
        let (queue, receiver) = mpsc::channel(QUEUE_LENGTH);
        self.number += 1;
        let (used, number) = (Instant::now(), self.number);
        self.flows.insert(flow, Datagram { port_id, queue, used, number });
        (receiver, number)
    }

    fn close(&mut self, flow: Flow, number: u64) {
        if self.flows.get(&flow).is_some_and(|known| known.number == number) {
            self.flows.remove(&flow);
        }
    }

    /// Closes the sockets of a NIC.
    pub(crate) fn forget(&mut self, port_id: PortId) {
        self.flows.retain(|_, known| known.port_id != port_id);
    }

    pub(crate) fn clear(&mut self) {
        self.flows.clear();
    }
}

/// Sends a datagram of a new flow to the outside; replies go to the guest.
pub(crate) fn datagram(vpc: &Arc<Vpc>, inner: &mut Inner, port_id: PortId, flow: Flow, content: &[u8]) {
    let (queue, number) = inner.datagrams.open(port_id, flow);
    inner.datagrams.send(flow, content);
    let (network, owned) = (Arc::clone(vpc), Arc::clone(vpc));
    network.spawn(async move {
        if let Err(error) = exchange(&owned, flow, queue).await {
            tracing::debug!(%error, ?flow, "a UDP flow ended");
            if error.kind() == io::ErrorKind::ConnectionRefused {
                owned.send_port_unreachable(port_id, flow);
            }
        }
        owned.lock().datagrams.close(flow, number);
    });
}

async fn exchange(vpc: &Vpc, flow: Flow, mut queue: mpsc::Receiver<Vec<u8>>) -> io::Result<()> {
    let socket = connected(SocketAddr::from(flow.to)).await?;
    let mut buffer = vec![0; 64 << 10];
    loop {
        let event = async {
            tokio::select! {
                content = queue.recv() => match content {
                    Some(content) => socket.send(&content).await.map(|_| true),
                    None => Ok(false),
                },
                length = socket.recv(&mut buffer) => {
                    let mut inner = vpc.lock();
                    inner.send(wire::udp(flow.to, flow.guest, &buffer[..length?]));
                    inner.poll();
                    Ok(true)
                }
            }
        };
        match timeout(IDLE_LIMIT, event).await {
            Ok(Ok(true)) => {}
            Ok(Ok(false)) | Err(_) => return Ok(()),
            Ok(Err(error)) => return Err(error),
        }
    }
}

async fn connected(server: SocketAddr) -> io::Result<UdpSocket> {
    let any: SocketAddr = match server {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (std::net::Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(any).await?;
    socket.connect(server).await?;
    Ok(socket)
}

impl Vpc {
    /// Notifies a guest that nothing listens at the destination of its datagrams.
    fn send_port_unreachable(&self, port_id: PortId, flow: Flow) {
        let sent = wire::udp(flow.guest, flow.to, &[]);
        let mut inner = self.lock();
        if let Some(packet) = wire::Packet::parse(&sent) {
            inner.send_icmp_error(port_id, &packet, Refusal::PortUnreachable);
        }
        inner.poll();
    }

    /// Returns the DNS servers to ask.
    fn servers(&self) -> Vec<SocketAddr> {
        if let Some(resolver) = self.settings.resolver {
            return vec![resolver];
        }
        let text = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
        let servers = nameservers(&text);
        // resolv.conf(5): without any, the server on this host.
        if servers.is_empty() { vec![(Ipv4Addr::LOCALHOST, DNS).into()] } else { servers }
    }
}

/// Returns the servers named in a resolv.conf(5).
fn nameservers(text: &str) -> Vec<SocketAddr> {
    let addresses = text.lines().filter_map(|line| {
        let mut fields = line.split_whitespace();
        let address = (fields.next()? == "nameserver").then(|| fields.next())??;
        address.parse::<IpAddr>().ok()
    });
    addresses.take(MAX_SERVERS).map(|address| (address, DNS).into()).collect()
}

/// Forwards a query about names outside the lab to the host's servers.
pub(crate) fn forward_query(vpc: &Arc<Vpc>, inner: &mut Inner, port_id: PortId, flow: Flow, query: &[u8]) {
    if inner.datagrams.send(flow, query) {
        return;
    }
    let (mut queue, number) = inner.datagrams.open(port_id, flow);
    inner.datagrams.send(flow, query);
    let (network, vpc) = (Arc::clone(vpc), Arc::clone(vpc));
    network.spawn(async move {
        // A resolver may send several queries from one port.
        while let Ok(Some(query)) = timeout(DNS_LIMIT, queue.recv()).await {
            let answer = ask(&vpc.servers(), &query).await.or_else(|| dns::server_failure(&query));
            if let Some(answer) = answer.and_then(|answer| dns::fit(answer, MAX_UDP_ANSWER)) {
                let mut inner = vpc.lock();
                inner.send(wire::udp(flow.to, flow.guest, &answer));
                inner.poll();
            }
        }
        vpc.lock().datagrams.close(flow, number);
    });
}

/// Asks the servers in turn over UDP.
async fn ask(servers: &[SocketAddr], query: &[u8]) -> Option<Vec<u8>> {
    let mut buffer = vec![0; 64 << 10];
    for server in servers {
        let exchange_with_server = async {
            let socket = connected(*server).await?;
            socket.send(query).await?;
            loop {
                let length = socket.recv(&mut buffer).await?;
                if buffer[..length].get(..2) == query.get(..2) {
                    return io::Result::Ok(length);
                }
            }
        };
        match timeout(DNS_LIMIT, exchange_with_server).await {
            Ok(Ok(length)) => return Some(buffer[..length].to_vec()),
            Ok(Err(error)) => tracing::debug!(%error, %server, "a DNS server does not answer"),
            Err(_) => tracing::debug!(%server, "a DNS server does not answer in time"),
        }
    }
    None
}

/// Answers queries over a TCP connection (RFC 7766), until it ends.
pub(crate) async fn answer_over_tcp(vpc: Arc<Vpc>, mut guest: super::stream::GuestStream) -> io::Result<()> {
    while let Ok(length) = timeout(IDLE_LIMIT, guest.read_u16()).await? {
        let mut query = vec![0; usize::from(length)];
        timeout(IDLE_LIMIT, guest.read_exact(&mut query)).await??;
        let (known, internet) = {
            let inner = vpc.lock();
            (dns::answer(&inner.names, &vpc.settings.domain, &query), inner.internet)
        };
        let answer = match known {
            Some(dns::Answer::Local(reply)) => Some(reply),
            Some(dns::Answer::Forward) if internet => {
                ask_over_tcp(&vpc.servers(), &query).await.or_else(|| dns::server_failure(&query))
            }
            Some(dns::Answer::Forward) => dns::no_such_name(&query),
            None => return Ok(()),
        };
        let Some(answer) = answer else { return Ok(()) };
        guest.write_u16(u16::try_from(answer.len()).unwrap_or(u16::MAX)).await?;
        guest.write_all(&answer).await?;
    }
    Ok(())
}

/// Asks the servers in turn over TCP.
async fn ask_over_tcp(servers: &[SocketAddr], query: &[u8]) -> Option<Vec<u8>> {
    for server in servers {
        let exchange_with_server = async {
            let mut stream = TcpStream::connect(server).await?;
            stream.write_u16(u16::try_from(query.len()).unwrap_or(u16::MAX)).await?;
            stream.write_all(query).await?;
            let mut answer = vec![0; usize::from(stream.read_u16().await?)];
            stream.read_exact(&mut answer).await?;
            io::Result::Ok(answer)
        };
        match timeout(DNS_LIMIT, exchange_with_server).await {
            Ok(Ok(answer)) => return Some(answer),
            Ok(Err(error)) => tracing::debug!(%error, %server, "a DNS server does not answer over TCP"),
            Err(_) => tracing::debug!(%server, "a DNS server does not answer over TCP in time"),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::nameservers;

    #[test]
    fn name_servers_are_read_from_resolv_conf() {
        let text = "# x\nsearch example.org\nnameserver 192.0.2.1\n nameserver ::1 # local\nnameserver x\noptions edns0\n";
        let found: Vec<String> = nameservers(text).iter().map(ToString::to_string).collect();
        assert_eq!(found, ["192.0.2.1:53", "[::1]:53"]);
    }
}
