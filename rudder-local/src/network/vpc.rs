//! A VPC: its segments, the router between them, and what the router does itself. One lock for all of it, which is taken once
//! per read of a NIC's frames and not once per frame.

use super::{
    dhcp,
    dns::{self, Names},
    nat,
    port::Port,
    segment::Segment,
    service::Services,
    stack::{Flow, Place, Stack},
    stream::GuestStream,
    wire::{self, Arp, BROADCAST, Frame, MTU, Packet, Payload, Refusal, fragments, is_group},
};
use smoltcp::iface::SocketHandle;
use std::{
    collections::HashMap,
    io,
    net::Ipv4Addr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::{sync::Notify, time::Instant};
use tokio_util::sync::CancellationToken;

/// Connections of one NIC to the gateway and beyond it, at a time.
const FLOWS: usize = 256;
/// How long a guest may take to tell its address when it is dialled, and how often it is asked.
const HEARING: Duration = Duration::from_secs(3);
const ASKING: Duration = Duration::from_millis(250);
/// How long a guest may take to answer a dial.
const CONNECTING: Duration = Duration::from_secs(10);
/// The longest frame that a NIC may send: QEMU's own limit is about 68 KiB.
pub(crate) const LONGEST_FRAME: usize = 69 << 10;
/// The stack is left alone for at least so long.
const REST: Duration = Duration::from_millis(1);

/// What is the same for all VPCs of a lab.
#[derive(Debug)]
pub(crate) struct Settings {
    /// What the names of machines end with.
    pub(crate) domain: String,
    /// Where questions for other names go; the host's servers when it is `None`.
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

/// Where a connection that a guest opens is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Opened {
    /// Its other end is being connected.
    Pending,
    /// The stack has it.
    Established,
}

/// What is behind the lock.
#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) internet: bool,
    pub(crate) segments: Vec<Segment>,
    pub(crate) names: Names,
    pub(crate) stack: Stack,
    pub(crate) services: Services,
    pub(crate) datagrams: nat::Datagrams,
    flows: HashMap<Flow, Opened>,
    timer: Arc<Notify>,
    /// When the timer is to fire.
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

    /// Keeps time: retransmissions, packets that wait in vain.
    pub(crate) async fn keep_time(self: Arc<Self>) {
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

    /// Takes the whole frames at the front of what a NIC sent: how many bytes they are, and the ports to wait for.
    ///
    /// # Errors
    /// `InvalidData` for a frame that is longer than any.
    pub(crate) fn frames(
        self: &Arc<Self>,
        place: Place,
        bytes: &[u8],
    ) -> io::Result<(usize, Vec<Arc<Port>>)> {
        let mut rest = bytes;
        let mut inner = self.lock();
        while let Some((head, after)) = rest.split_first_chunk::<4>() {
            let length = usize::try_from(u32::from_be_bytes(*head)).unwrap_or(usize::MAX);
            if length > LONGEST_FRAME {
                return Err(io::ErrorKind::InvalidData.into());
            }
            let Some((frame, after)) = after.split_at_checked(length) else { break };
            rest = after;
            if let Some(frame) = Frame::parse(frame) {
                inner.frame(self, place, &frame);
            }
        }
        inner.poll();
        let full = inner.segments.iter_mut().flat_map(Segment::take_full).collect();
        Ok((bytes.len() - rest.len(), full))
    }

    /// Takes note that a NIC is no longer connected: its connections are over.
    pub(crate) fn disconnected(&self, place: Place) {
        let mut inner = self.lock();
        if let Some(segment) = inner.segments.get_mut(place.segment) {
            segment.disconnected(place.port);
        }
        inner.datagrams.forget(place);
        inner.stack.abort_at(place);
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
    pub(crate) async fn dial(self: &Arc<Self>, place: Place, port: u16) -> io::Result<GuestStream> {
        let address = tokio::time::timeout(HEARING, self.hear(place)).await;
        let address = address.map_err(|_| {
            io::Error::new(io::ErrorKind::HostUnreachable, "the guest has not taken its address yet")
        })??;
        let stream = {
            let mut inner = self.lock();
            let gateway = inner.segments.get(place.segment).map(|segment| segment.gateway);
            let handle =
                inner.stack.connect(place, gateway.unwrap_or(Ipv4Addr::UNSPECIFIED), (address, port))?;
            inner.poll();
            drop(inner);
            GuestStream::new(Arc::clone(self), handle)
        };
        let connected = tokio::time::timeout(CONNECTING, stream.connected()).await;
        connected.map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "the guest does not answer"))??;
        Ok(stream)
    }

    /// Waits until the guest behind a NIC has told its address: the planned one, or, where none is planned, any.
    async fn hear(&self, place: Place) -> io::Result<Ipv4Addr> {
        loop {
            let heard = match self.lock().look(place)? {
                Ok(address) => return Ok(address),
                Err(heard) => heard,
            };
            // Heard in between or not: it is looked again soon.
            let _ = tokio::time::timeout(ASKING, heard.notified()).await;
        }
    }

    /// Establishes a connection that a guest asked for with this packet.
    pub(crate) fn accept(self: &Arc<Self>, place: Place, flow: Flow, syn: Vec<u8>) -> Option<GuestStream> {
        let mut inner = self.lock();
        match inner.accept(place, flow, syn) {
            Ok(handle) => Some(GuestStream::new(Arc::clone(self), handle)),
            Err(error) => {
                tracing::debug!(%error, ?flow, "cannot take a connection");
                inner.end_flow(place, flow);
                None
            }
        }
    }

    /// Refuses a connection that a guest asked for with this packet.
    pub(crate) fn refuse(&self, place: Place, flow: Flow, syn: Vec<u8>, why: Option<Refusal>) {
        let mut inner = self.lock();
        inner.end_flow(place, flow);
        inner.refuse(place, syn, why);
        inner.poll();
    }
}

impl Inner {
    /// Lets the stack and the switches do what there is to do.
    pub(crate) fn poll(&mut self) {
        for packet in self.stack.run() {
            self.send(packet);
        }
        for (place, flow) in self.stack.retire() {
            if let Some(flow) = flow {
                self.end_flow(place, flow);
            }
        }
        let now = Instant::now();
        for segment in 0..self.segments.len() {
            let gateway = self.segments[segment].gateway;
            for packet in self.segments[segment].unresolved(now) {
                let told = Packet::parse(&packet)
                    .and_then(|packet| Refusal::HostUnreachable.about(&packet, gateway));
                if let Some(told) = told {
                    self.send(told);
                }
            }
        }
        self.segments.iter_mut().for_each(Segment::flush);
        let stack = self.stack.delay().map(|delay| now + delay.max(REST));
        let waiting = self.segments.iter().filter_map(Segment::next_unresolved);
        let due = waiting.chain(stack).min();
        if due.is_some_and(|due| self.due.is_none_or(|before| due < before)) {
            self.due = due;
            self.timer.notify_one();
        }
    }

    /// Sends a packet of the router's or the stack's to the host that it is for.
    pub(crate) fn send(&mut self, packet: Vec<u8>) {
        let Some(to) = Packet::parse(&packet).map(|packet| packet.dst) else { return };
        if let Some(segment) = self.segments.iter_mut().find(|segment| segment.reaches(to)) {
            fragments(packet).into_iter().for_each(|packet| segment.send(to, packet));
        }
    }

    /// The address of the guest behind a NIC; else what tells that there may be news of it, after the guest was asked.
    fn look(&mut self, place: Place) -> io::Result<Result<Ipv4Addr, Arc<Notify>>> {
        let segment = self.segments.get_mut(place.segment).ok_or(io::ErrorKind::NotConnected)?;
        match segment.nics.get(place.port).and_then(|nic| nic.address) {
            Some(planned) if segment.is_heard(planned, place.port) => return Ok(Ok(planned)),
            Some(planned) => segment.ask(planned),
            None => {
                if let Some(address) = segment.heard_at(place.port) {
                    return Ok(Ok(address));
                }
            }
        }
        segment.flush();
        Ok(Err(Arc::clone(&segment.heard)))
    }

    fn frame(&mut self, vpc: &Arc<Vpc>, place: Place, frame: &Frame<'_>) {
        let Some(segment) = self.segments.get_mut(place.segment) else { return };
        if !segment.learn_mac(frame.from, place.port) {
            return;
        }
        if segment.is_routed() {
            if let Payload::Arp(bytes) = frame.payload
                && let Some(arp) = Arp::parse(bytes).filter(|arp| arp.sender.0 == frame.from)
            {
                segment.arp(place.port, &arp);
            }
            if let Payload::Ipv4(bytes) = frame.payload
                && let Some(packet) = Packet::parse(bytes)
            {
                if segment.is_for_gateway(frame) {
                    self.packet(vpc, place, frame, &packet);
                    return;
                }
                if is_group(frame.to) && is_dhcp(&packet) {
                    self.dhcp(vpc, place, &packet);
                }
            }
            if self.segments[place.segment].is_for_gateway(frame) {
                return;
            }
        }
        self.segments[place.segment].switch_frame(place.port, frame);
    }

    fn dhcp(&mut self, vpc: &Arc<Vpc>, place: Place, packet: &Packet<'_>) {
        let (Some(message), Some(segment)) = (packet.datagram(), self.segments.get_mut(place.segment)) else {
            return;
        };
        if let Some((mac, reply)) = dhcp::answer(segment, place.port, &vpc.settings.domain, message)
            && (mac == BROADCAST || !is_group(mac))
        {
            segment.send_frame(mac, place.port, &reply);
        }
    }

    /// Takes a packet that was sent to the router.
    fn packet(&mut self, vpc: &Arc<Vpc>, place: Place, frame: &Frame<'_>, packet: &Packet<'_>) {
        if is_dhcp(packet) {
            return self.dhcp(vpc, place, packet);
        }
        let Some(segment) = self.segments.get_mut(place.segment) else { return };
        // Nobody speaks for another.
        if !segment.learn(packet.src, frame.from, place.port) {
            return;
        }
        if self.segments.iter().any(|segment| segment.is_routed() && segment.gateway == packet.dst) {
            return self.for_gateway(vpc, place, packet);
        }
        if packet.ttl <= 1 {
            return self.tell(place, packet, Refusal::TimeExceeded);
        }
        if let Some(to) = self.segments.iter().find(|segment| segment.reaches(packet.dst)) {
            if !to.is_host(packet.dst) {
                return self.tell(place, packet, Refusal::Prohibited);
            }
            if packet.bytes.len() > MTU && packet.whole {
                return self.tell(place, packet, Refusal::TooBig);
            }
            return self.send(packet.after_a_hop());
        }
        self.for_outside(vpc, place, packet);
    }

    fn for_gateway(&mut self, vpc: &Arc<Vpc>, place: Place, packet: &Packet<'_>) {
        match (packet.protocol, packet.ports()) {
            (wire::ICMP, _) => {
                if let Some(reply) = packet.echo_reply() {
                    self.send(reply);
                }
            }
            (wire::UDP, Some((_, 53))) => self.dns(vpc, place, packet),
            (wire::UDP, Some(_)) => self.tell(place, packet, Refusal::PortUnreachable),
            (wire::TCP, Some(ports)) => self.segment(vpc, place, packet, ports),
            (wire::UDP | wire::TCP, None) => {}
            _ => self.tell(place, packet, Refusal::ProtocolUnreachable),
        }
    }

    fn for_outside(&mut self, vpc: &Arc<Vpc>, place: Place, packet: &Packet<'_>) {
        let refusal = match (packet.protocol, packet.ports()) {
            _ if !self.internet => Refusal::NoRoute,
            (wire::TCP, Some(ports)) => return self.segment(vpc, place, packet, ports),
            (wire::UDP, Some((from, to))) => {
                let flow = Flow { guest: (packet.src, from), to: (packet.dst, to) };
                let Some(content) = packet.datagram() else { return };
                if self.datagrams.pass(flow, content) {
                    return;
                }
                // Looked up when a flow begins, and not for each of its datagrams.
                if (vpc.settings.is_outside)(packet.dst) {
                    return nat::datagram(vpc, self, place, flow, content);
                }
                Refusal::Prohibited
            }
            _ => Refusal::Prohibited,
        };
        if packet.protocol == wire::TCP && packet.is_syn() {
            self.refuse(place, packet.bytes.to_vec(), Some(refusal));
        } else {
            self.tell(place, packet, refusal);
        }
    }

    /// Tells the sender why its packet goes no further.
    pub(crate) fn tell(&mut self, place: Place, packet: &Packet<'_>, refusal: Refusal) {
        let Some(gateway) = self.segments.get(place.segment).map(|segment| segment.gateway) else { return };
        if let Some(told) = refusal.about(packet, gateway) {
            self.send(told);
        }
    }

    fn dns(&mut self, vpc: &Arc<Vpc>, place: Place, packet: &Packet<'_>) {
        let (Some(query), Some((from, to))) = (packet.datagram(), packet.ports()) else { return };
        let reply = match dns::answer(&self.names, &vpc.settings.domain, query) {
            Some(dns::Answer::Here(reply)) => Some(reply),
            Some(dns::Answer::Elsewhere) if self.internet => {
                nat::question(
                    vpc,
                    self,
                    place,
                    Flow { guest: (packet.src, from), to: (packet.dst, to) },
                    query,
                );
                None
            }
            Some(dns::Answer::Elsewhere) => dns::unknown(query),
            None => None,
        };
        if let Some(reply) = reply {
            self.send(wire::udp((packet.dst, to), (packet.src, from), &reply));
        }
    }

    /// Takes a TCP segment for the gateway or for the outside.
    fn segment(&mut self, vpc: &Arc<Vpc>, place: Place, packet: &Packet<'_>, (from, to): (u16, u16)) {
        let flow = Flow { guest: (packet.src, from), to: (packet.dst, to) };
        match self.flows.get(&flow) {
            // A retransmission.
            Some(Opened::Pending) => return,
            Some(Opened::Established) => return self.stack.receive(packet.bytes.to_vec()),
            None if !packet.is_syn() => return self.stack.receive(packet.bytes.to_vec()),
            None => {}
        }
        let syn = packet.bytes.to_vec();
        let Some(nic) =
            self.segments.get_mut(place.segment).and_then(|segment| segment.nics.get_mut(place.port))
        else {
            return;
        };
        if nic.flows >= FLOWS {
            return self.refuse(place, syn, None);
        }
        nic.flows += 1;
        let machine = Arc::clone(&nic.machine);
        self.flows.insert(flow, Opened::Pending);
        let is_gateway =
            self.segments.iter().any(|segment| segment.is_routed() && segment.gateway == packet.dst);
        if !is_gateway {
            return nat::connection(vpc, place, flow, syn);
        }
        let Some(service) = self.services.at(to) else {
            self.end_flow(place, flow);
            return self.refuse(place, syn, None);
        };
        // Taken when the lock is free again: the stream takes it itself.
        let vpc = Arc::clone(vpc);
        tokio::spawn(async move {
            if let Some(stream) = vpc.accept(place, flow, syn) {
                service.take(machine, stream);
            }
        });
    }

    fn accept(&mut self, place: Place, flow: Flow, syn: Vec<u8>) -> io::Result<SocketHandle> {
        let handle = self.stack.accept(place, flow, syn)?;
        self.flows.insert(flow, Opened::Established);
        self.poll();
        Ok(handle)
    }

    fn end_flow(&mut self, place: Place, flow: Flow) {
        if self.flows.remove(&flow).is_some()
            && let Some(nic) =
                self.segments.get_mut(place.segment).and_then(|segment| segment.nics.get_mut(place.port))
        {
            nic.flows = nic.flows.saturating_sub(1);
        }
    }

    /// Refuses a connection: with a reset, which every guest understands, behind the reason, which many do.
    fn refuse(&mut self, place: Place, syn: Vec<u8>, why: Option<Refusal>) {
        if let (Some(why), Some(packet)) = (why, Packet::parse(&syn)) {
            self.tell(place, &packet, why);
        }
        // The stack resets what no socket waits for.
        self.stack.receive(syn);
    }
}

fn is_dhcp(packet: &Packet<'_>) -> bool {
    packet.protocol == wire::UDP && packet.ports() == Some((68, 67))
}
