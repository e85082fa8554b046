//! A VPC: its segments, the router between them, and the router's own services. One lock covers all of it, which is acquired
//! once per read of a NIC's frames and not once per frame.

mod router;

use super::{
    dns::Names,
    nat,
    port::Port,
    segment::Segment,
    service::Services,
    stack::{Flow, PortId, Stack},
    stream::GuestStream,
    wire::{Frame, Packet, Refusal, fragments},
};
use std::{
    collections::HashMap,
    io,
    net::Ipv4Addr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::{sync::Notify, time::Instant};
use tokio_util::sync::CancellationToken;

/// Maximum number of concurrent connections per NIC to the gateway and beyond it.
const MAX_FLOWS: usize = 256;
/// Time limit for a dialled guest to announce its address, and the interval at which it is asked.
const ADDRESS_LIMIT: Duration = Duration::from_secs(3);
const ARP_INTERVAL: Duration = Duration::from_millis(250);
/// Time limit for a guest to answer a dial.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// The longest frame that a NIC may send: QEMU's own limit is about 68 KiB.
pub(crate) const MAX_FRAME: usize = 69 << 10;
/// Minimum delay before the timer runs the stack again.
const MIN_TIMER_DELAY: Duration = Duration::from_millis(1);

/// Settings shared by all VPCs of a lab.
#[derive(Debug)]
pub(crate) struct Settings {
    /// The domain of the machines' names.
    pub(crate) domain: String,
    /// The server for queries about other names; `None` for the host's servers.
    pub(crate) resolver: Option<std::net::SocketAddr>,
    /// Whether guests may connect to an address outside.
    pub(crate) is_outside: fn(Ipv4Addr) -> bool,
    /// Cancelled when the network ends.
    pub(crate) end: CancellationToken,
}

/// A VPC.
#[derive(Debug)]
pub(crate) struct Vpc {
    name: String,
    pub(crate) settings: Arc<Settings>,
    timer: Arc<Notify>,
    inner: Mutex<Inner>,
}

/// The state of a connection that a guest opens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum FlowState {
    /// Its other end is being connected.
    Pending,
    /// The stack has it.
    Established,
}

/// The state behind the lock.
#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) internet: bool,
    pub(crate) segments: Vec<Segment>,
    pub(crate) names: Names,
    pub(crate) stack: Stack,
    pub(crate) services: Services,
    pub(crate) datagrams: nat::Datagrams,
    flows: HashMap<Flow, FlowState>,
    timer: Arc<Notify>,
    /// When the timer fires.
    due: Option<Instant>,
}

impl Vpc {
    pub(crate) fn new(
        name: &str,
        internet: bool,
        segments: Vec<Segment>,
        settings: &Arc<Settings>,
    ) -> Arc<Self> {
        let timer: Arc<Notify> = Arc::default();
        let inner = Inner {
            internet,
            segments,
            names: Names::new(),
            stack: Stack::new(),
            services: Services::default(),
            datagrams: nat::Datagrams::default(),
            flows: HashMap::new(),
            timer: Arc::clone(&timer),
            due: None,
        };
        let settings = Arc::clone(settings);
        Arc::new(Self { name: name.to_owned(), settings, timer, inner: Mutex::new(inner) })
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs something until it is done or the network ends.
    pub(crate) fn spawn(self: &Arc<Self>, work: impl Future<Output = ()> + Send + 'static) {
        let end = self.settings.end.clone();
        tokio::spawn(async move { end.run_until_cancelled(work).await });
    }

    /// Runs the timer: retransmissions, and packets that wait in vain.
    pub(crate) async fn run_timer(self: Arc<Self>) {
        loop {
            let due = self.lock().due;
            let wait = async {
                match due {
                    Some(due) => tokio::time::sleep_until(due).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = self.timer.notified() => {}
                () = wait => {
                    let mut inner = self.lock();
                    inner.due = None;
                    inner.poll();
                }
            }
        }
    }

    /// Handles the complete frames at the front of what a NIC sent: returns their length in bytes, and the ports to wait for.
    ///
    /// # Errors
    /// `InvalidData` for a frame longer than the limit.
    pub(crate) fn frames(
        self: &Arc<Self>,
        port_id: PortId,
        bytes: &[u8],
    ) -> io::Result<(usize, Vec<Arc<Port>>)> {
        let mut rest = bytes;
        let mut inner = self.lock();
        while let Some((head, after)) = rest.split_first_chunk::<4>() {
            let length = usize::try_from(u32::from_be_bytes(*head)).unwrap_or(usize::MAX);
            if length > MAX_FRAME {
                return Err(io::ErrorKind::InvalidData.into());
            }
            let Some((frame, after)) = after.split_at_checked(length) else { break };
            rest = after;
            if let Some(frame) = Frame::parse(frame) {
                inner.frame(self, port_id, &frame);
            }
        }
        inner.poll();
        let full = inner.segments.iter_mut().flat_map(Segment::take_full).collect();
        Ok((bytes.len() - rest.len(), full))
    }

    /// Handles the disconnection of a NIC, which ends its connections.
    pub(crate) fn disconnected(&self, port_id: PortId) {
        let mut inner = self.lock();
        if let Some(segment) = inner.segments.get_mut(port_id.segment) {
            segment.disconnected(port_id.port);
        }
        inner.datagrams.forget(port_id);
        inner.stack.abort_at(port_id);
        inner.poll();
    }

    /// Ends all connections.
    pub(crate) fn shut_down(&self) {
        let mut inner = self.lock();
        inner.datagrams.clear();
        inner.services.clear();
        inner.stack.abort_all();
        inner.poll();
    }

    /// Connects to a port of the guest behind a NIC.
    pub(crate) async fn dial(self: &Arc<Self>, port_id: PortId, port: u16) -> io::Result<GuestStream> {
        let address = tokio::time::timeout(ADDRESS_LIMIT, self.guest_address(port_id)).await;
        let address = address.map_err(|_| {
            io::Error::new(io::ErrorKind::HostUnreachable, "the guest has not configured its address yet")
        })??;
        let stream = {
            let mut inner = self.lock();
            let gateway = inner.segments.get(port_id.segment).map(|segment| segment.gateway);
            let handle =
                inner.stack.connect(port_id, gateway.unwrap_or(Ipv4Addr::UNSPECIFIED), (address, port))?;
            inner.poll();
            drop(inner);
            GuestStream::new(Arc::clone(self), handle)
        };
        let connected = tokio::time::timeout(CONNECT_LIMIT, stream.connected()).await;
        connected.map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "the guest does not answer"))??;
        Ok(stream)
    }

    /// Waits until the guest behind a NIC has announced its address: the planned one, or any if none is planned.
    async fn guest_address(&self, port_id: PortId) -> io::Result<Ipv4Addr> {
        loop {
            let news = match self.lock().poll_guest_address(port_id)? {
                Ok(address) => return Ok(address),
                Err(news) => news,
            };
            // Whether notified or not, it is checked again soon.
            let _ = tokio::time::timeout(ARP_INTERVAL, news.notified()).await;
        }
    }

    /// Accepts a connection that a guest opened with this packet.
    pub(crate) fn accept(self: &Arc<Self>, port_id: PortId, flow: Flow, syn: Vec<u8>) -> Option<GuestStream> {
        let mut inner = self.lock();
        match inner.accept(port_id, flow, syn) {
            Ok(handle) => Some(GuestStream::new(Arc::clone(self), handle)),
            Err(error) => {
                tracing::debug!(%error, ?flow, "cannot accept a connection");
                inner.end_flow(port_id, flow);
                None
            }
        }
    }

    /// Refuses a connection that a guest opened with this packet.
    pub(crate) fn refuse(&self, port_id: PortId, flow: Flow, syn: Vec<u8>, why: Option<Refusal>) {
        let mut inner = self.lock();
        inner.end_flow(port_id, flow);
        inner.refuse(port_id, syn, why);
        inner.poll();
    }
}

impl Inner {
    /// Lets the stack and the switches process what is pending.
    pub(crate) fn poll(&mut self) {
        for packet in self.stack.run() {
            self.send(packet);
        }
        for (port_id, flow) in self.stack.remove_ended() {
            if let Some(flow) = flow {
                self.end_flow(port_id, flow);
            }
        }
        let now = Instant::now();
        for segment in 0..self.segments.len() {
            let gateway = self.segments[segment].gateway;
            for packet in self.segments[segment].unresolved(now) {
                let reply = Packet::parse(&packet)
                    .and_then(|packet| Refusal::HostUnreachable.icmp_message(&packet, gateway));
                if let Some(reply) = reply {
                    self.send(reply);
                }
            }
        }
        self.segments.iter_mut().for_each(Segment::flush);
        let stack = self.stack.delay().map(|delay| now + delay.max(MIN_TIMER_DELAY));
        let waiting = self.segments.iter().filter_map(Segment::next_unresolved);
        let due = waiting.chain(stack).min();
        if due.is_some_and(|due| self.due.is_none_or(|before| due < before)) {
            self.due = due;
            self.timer.notify_one();
        }
    }

    /// Sends a packet of the router or the stack to its destination.
    pub(crate) fn send(&mut self, packet: Vec<u8>) {
        let Some(to) = Packet::parse(&packet).map(|packet| packet.dst) else { return };
        if let Some(segment) = self.segments.iter_mut().find(|segment| segment.reaches(to)) {
            fragments(packet).into_iter().for_each(|packet| segment.send(to, packet));
        }
    }

    /// Returns the address of the guest behind a NIC; else asks for it, and returns what to wait on for news.
    fn poll_guest_address(&mut self, port_id: PortId) -> io::Result<Result<Ipv4Addr, Arc<Notify>>> {
        let segment = self.segments.get_mut(port_id.segment).ok_or(io::ErrorKind::NotConnected)?;
        match segment.nics.get(port_id.port).and_then(|nic| nic.address) {
            Some(planned) if segment.has_learned(planned, port_id.port) => return Ok(Ok(planned)),
            Some(planned) => segment.send_arp_request(planned),
            None => {
                if let Some(address) = segment.learned_at(port_id.port) {
                    return Ok(Ok(address));
                }
            }
        }
        segment.flush();
        Ok(Err(Arc::clone(&segment.learned_address)))
    }
}
