//! A subnet: a learning switch, and the gateway's knowledge of the hosts on it.

use super::{
    port::Port,
    wire::{Arp, BROADCAST, Frame, Mac, ipv4_header, is_group},
};
use rudder_core::plan::PlannedSubnet;
use std::{
    collections::{HashMap, HashSet},
    net::Ipv4Addr,
    sync::Arc,
    time::Duration,
};
use tokio::{sync::Notify, time::Instant};

/// Maximum number of learned hardware addresses, and of IP addresses, per port, besides the planned ones.
const MAX_LEARNED: usize = 256;
/// Maximum number of addresses that are being resolved at a time.
const MAX_UNRESOLVED: usize = 64;
/// Maximum number of packets that wait for each of them.
const MAX_WAITING: usize = 16;
/// How long they wait.
pub(crate) const RESOLUTION_LIMIT: Duration = Duration::from_secs(2);
/// Maximum number of addresses for unplanned NICs, such as those of machines inside guests.
const MAX_UNPLANNED: usize = 64;

/// A NIC, and the port that it is connected to.
#[derive(Debug)]
pub(crate) struct Nic {
    pub(crate) machine: Arc<str>,
    pub(crate) mac: Mac,
    /// Its planned address.
    pub(crate) address: Option<Ipv4Addr>,
    /// Whether the author chose the address.
    pub(crate) fixed: bool,
    pub(crate) port: Arc<Port>,
    /// Number of connections to the gateway and beyond it.
    pub(crate) flows: usize,
    macs: usize,
    neighbours: usize,
}

/// Packets for a host whose hardware address is being resolved.
#[derive(Debug)]
struct Waiting {
    since: Instant,
    packets: Vec<Vec<u8>>,
}

/// A subnet of a VPC.
#[derive(Debug)]
pub(crate) struct Segment {
    pub(crate) plan: PlannedSubnet,
    pub(crate) gateway: Ipv4Addr,
    mac: Mac,
    pub(crate) nics: Vec<Nic>,
    /// The ports behind which hardware addresses are.
    table: HashMap<Mac, usize>,
    neighbours: HashMap<Ipv4Addr, (Mac, usize)>,
    waiting: HashMap<Ipv4Addr, Waiting>,
    unplanned: HashMap<Mac, Ipv4Addr>,
    /// Ports with new frames.
    dirty: HashSet<usize>,
    /// Ports whose senders should wait.
    full: HashSet<usize>,
    /// Notified when the address of a host becomes known.
    pub(crate) learned_address: Arc<Notify>,
}

impl Segment {
    pub(crate) fn new(plan: PlannedSubnet, mac: Mac) -> Self {
        Self {
            gateway: plan.cidr.gateway(),
            plan,
            mac,
            nics: Vec::new(),
            table: HashMap::new(),
            neighbours: HashMap::new(),
            waiting: HashMap::new(),
            unplanned: HashMap::new(),
            dirty: HashSet::new(),
            full: HashSet::new(),
            learned_address: Arc::default(),
        }
    }

    /// Returns whether the router is on the subnet.
    pub(crate) fn is_routed(&self) -> bool {
        !self.plan.unmanaged
    }

    /// Returns whether the router reaches this address on the subnet.
    pub(crate) fn reaches(&self, address: Ipv4Addr) -> bool {
        self.is_routed() && self.plan.cidr.contains(address)
    }

    /// Returns whether the address can belong to a host other than the gateway.
    pub(crate) fn is_host(&self, address: Ipv4Addr) -> bool {
        let edges = [self.plan.cidr.network(), self.plan.cidr.broadcast(), self.gateway];
        self.plan.cidr.contains(address) && !edges.contains(&address)
    }

    /// Adds a NIC with an address, if the subnet has one left; returns the number of its port.
    pub(crate) fn add(&mut self, machine: &Arc<str>, mac: Mac, fixed: Option<Ipv4Addr>) -> usize {
        let number = self.nics.len();
        let holder = |nic: &Nic| fixed.is_some() && nic.address == fixed && !nic.fixed;
        let displaced = self.nics.iter().position(holder);
        self.nics.push(Nic {
            machine: Arc::clone(machine),
            mac,
            address: fixed,
            fixed: fixed.is_some(),
            port: Arc::default(),
            flows: 0,
            macs: 0,
            neighbours: 0,
        });
        self.table.insert(mac, number);
        if let Some(fixed) = fixed {
            self.forget(|address, _| address == fixed);
        }
        for without in [displaced, fixed.is_none().then_some(number)].into_iter().flatten() {
            if self.is_routed() && self.plan.dhcp {
                self.nics[without].address = None;
                self.nics[without].address = self.free_address();
            }
        }
        number
    }

    /// Releases the addresses of a NIC; its port stays, disconnected.
    pub(crate) fn remove(&mut self, number: usize) {
        self.disconnected(number);
        if let Some(nic) = self.nics.get_mut(number) {
            nic.address = None;
            let mac = nic.mac;
            self.table.remove(&mac);
        }
    }

    /// Returns the first free address: from the 15th on, as in QEMU's user network, or from the first on if the
    /// subnet is too small.
    fn free_address(&self) -> Option<Ipv4Addr> {
        let taken: HashSet<Ipv4Addr> =
            self.nics.iter().filter_map(|nic| nic.address).chain(self.unplanned.values().copied()).collect();
        let (first, last) = (u32::from(self.plan.cidr.network()), u32::from(self.plan.cidr.broadcast()));
        let start = if last - first > 32 { first + 15 } else { first };
        // As many as could be taken, plus some that cannot be hosts: a large subnet is not searched.
        let candidates = (start..=last).chain(first..start).take(taken.len() + 32);
        candidates.map(Ipv4Addr::from).find(|address| self.is_host(*address) && !taken.contains(address))
    }

    /// Returns the address for a NIC that asks from this port.
    pub(crate) fn lease(&mut self, mac: Mac, port: usize) -> Option<Ipv4Addr> {
        if let Some(number) = self.nics.iter().position(|nic| nic.mac == mac && nic.address.is_some()) {
            return self.nics[number].address.filter(|_| number == port);
        }
        if let Some(address) = self.unplanned.get(&mac) {
            return Some(*address);
        }
        if is_group(mac) || self.unplanned.len() >= MAX_UNPLANNED {
            return None;
        }
        let address = self.free_address()?;
        self.unplanned.insert(mac, address);
        Some(address)
    }

    /// Learns the hardware address of a frame's sender; returns whether it may send.
    pub(crate) fn learn_mac(&mut self, mac: Mac, port: usize) -> bool {
        if is_group(mac) || mac == self.mac && self.is_routed() {
            return false;
        }
        match self.table.get(&mac) {
            Some(known) if *known == port => return true,
            // A planned address stays at its port. Its machine may use it on another of its own NICs, as a bridge in the guest
            // does.
            Some(known) if self.nics.get(*known).is_some_and(|nic| nic.mac == mac) => {
                return self.are_of_same_machine(*known, port);
            }
            Some(known) => {
                if let Some(nic) = self.nics.get_mut(*known) {
                    nic.macs = nic.macs.saturating_sub(1);
                }
            }
            None => {}
        }
        if self.nics.get(port).is_none_or(|nic| nic.macs >= MAX_LEARNED) {
            let nics = &self.nics;
            self.table.retain(|mac, at| *at != port || nics.get(port).is_some_and(|nic| nic.mac == *mac));
            if let Some(nic) = self.nics.get_mut(port) {
                nic.macs = 0;
            }
        }
        if let Some(nic) = self.nics.get_mut(port) {
            nic.macs += 1;
            self.table.insert(mac, port);
        }
        true
    }

    fn are_of_same_machine(&self, one: usize, other: usize) -> bool {
        let machine = |number: usize| self.nics.get(number).map(|nic| &nic.machine);
        machine(one).is_some() && machine(one) == machine(other)
    }

    /// Learns the hardware address for an IP address; returns whether the sender may use it. A planned address may only be used by
    /// its machine, over any of the machine's NICs on the subnet (RFC 1122, 3.3.4.2, the weak model).
    pub(crate) fn learn_ip(&mut self, address: Ipv4Addr, mac: Mac, port: usize) -> bool {
        let planned = self.nics.iter().position(|nic| nic.address == Some(address));
        if !self.is_host(address)
            || is_group(mac)
            || planned.is_some_and(|planned| !self.are_of_same_machine(planned, port))
        {
            return false;
        }
        // A system with several NICs on a subnet answers for an address over any of them. The reply goes to the NIC that has the
        // address: the others may be slow, and drop frames that arrive fast.
        let has_plan = |number: &usize| self.nics.get(*number).is_some_and(|nic| nic.mac == mac);
        let (mac, port) = match planned {
            Some(planned) if has_plan(&port) => (self.nics[planned].mac, planned),
            _ => (mac, port),
        };
        if self.neighbours.get(&address) == Some(&(mac, port)) {
            return true;
        }
        if self.nics.get(port).is_none_or(|nic| nic.neighbours >= MAX_LEARNED) {
            self.forget(|_, at| at == port);
        }
        if let Some((_, before)) = self.neighbours.insert(address, (mac, port))
            && let Some(nic) = self.nics.get_mut(before)
        {
            nic.neighbours = nic.neighbours.saturating_sub(1);
        }
        if let Some(nic) = self.nics.get_mut(port) {
            nic.neighbours += 1;
        }
        for packet in self.waiting.remove(&address).map(|waiting| waiting.packets).unwrap_or_default() {
            self.send_to(mac, Some(port), &packet);
        }
        self.learned_address.notify_waiters();
        true
    }

    /// Returns whether this address, planned for this port, was heard.
    pub(crate) fn has_learned(&self, address: Ipv4Addr, port: usize) -> bool {
        self.neighbours.get(&address).is_some_and(|(_, at)| self.are_of_same_machine(*at, port))
    }

    /// Returns an address that was heard behind this port.
    pub(crate) fn learned_at(&self, port: usize) -> Option<Ipv4Addr> {
        self.neighbours.iter().filter(|(_, (_, at))| *at == port).map(|(address, _)| *address).min()
    }

    fn forget(&mut self, which: impl Fn(Ipv4Addr, usize) -> bool) {
        let nics = &mut self.nics;
        self.neighbours.retain(|address, (_, port)| {
            let forgotten = which(*address, *port);
            if forgotten && let Some(nic) = nics.get_mut(*port) {
                nic.neighbours = nic.neighbours.saturating_sub(1);
            }
            !forgotten
        });
    }

    /// Forgets what was learned about a NIC that is no longer connected.
    pub(crate) fn disconnected(&mut self, port: usize) {
        self.forget(|_, at| at == port);
        let Some(nic) = self.nics.get_mut(port) else { return };
        nic.port.set_connected(false);
        nic.macs = 0;
        let planned = nic.mac;
        self.table.retain(|mac, at| *at != port || *mac == planned);
    }

    /// Sends a frame out of a port.
    fn push(&mut self, port: usize, pieces: &[&[u8]], hold_back: bool) {
        let Some(nic) = self.nics.get(port) else { return };
        if nic.port.push(pieces) && hold_back {
            self.full.insert(port);
        }
        self.dirty.insert(port);
    }

    /// Sends a frame out of the port of its destination, or out of all ports but `from` if that is unknown.
    pub(crate) fn switch(&mut self, from: Option<usize>, to: Mac, pieces: &[&[u8]]) {
        match self.table.get(&to).copied().filter(|_| !is_group(to)) {
            Some(port) if Some(port) == from => {}
            Some(port) => self.push(port, pieces, true),
            None => {
                // Ports that may not even be the destination hold back no sender.
                (0..self.nics.len())
                    .filter(|port| Some(*port) != from)
                    .for_each(|port| self.push(port, pieces, false));
            }
        }
    }

    /// Switches a guest's frame.
    pub(crate) fn switch_frame(&mut self, from: usize, frame: &Frame<'_>) {
        self.switch(Some(from), frame.to, &[frame.bytes]);
    }

    /// Returns whether a frame is for the gateway alone.
    pub(crate) fn is_for_gateway(&self, frame: &Frame<'_>) -> bool {
        self.is_routed() && frame.to == self.mac
    }

    fn send_to(&mut self, mac: Mac, port: Option<usize>, packet: &[u8]) {
        let header = ipv4_header(mac, self.mac);
        match port {
            Some(port) => self.push(port, &[&header, packet], true),
            None => self.switch(None, mac, &[&header, packet]),
        }
    }

    /// Sends a packet of the gateway to a NIC that has no address yet.
    pub(crate) fn send_frame(&mut self, mac: Mac, port: usize, packet: &[u8]) {
        self.send_to(mac, Some(port), packet);
    }

    /// Sends a packet of the router to a host of the subnet.
    pub(crate) fn send(&mut self, to: Ipv4Addr, packet: Vec<u8>) {
        if let Some((mac, port)) = self.neighbours.get(&to).copied() {
            return self.send_to(mac, Some(port), &packet);
        }
        if !self.is_host(to) {
            return;
        }
        if !self.waiting.contains_key(&to) && self.waiting.len() >= MAX_UNRESOLVED {
            return;
        }
        let waiting =
            self.waiting.entry(to).or_insert_with(|| Waiting { since: Instant::now(), packets: Vec::new() });
        if waiting.packets.len() < MAX_WAITING {
            waiting.packets.push(packet);
        }
        self.send_arp_request(to);
    }

    /// Asks for the hardware address of a host.
    pub(crate) fn send_arp_request(&mut self, address: Ipv4Addr) {
        let request = Arp { request: true, sender: (self.mac, self.gateway), target: ([0; 6], address) };
        self.switch(None, BROADCAST, &[&request.frame(BROADCAST)]);
    }

    /// Handles an ARP packet of a guest.
    pub(crate) fn arp(&mut self, port: usize, arp: &Arp) {
        let (mac, address) = arp.sender;
        let learned = self.learn_ip(address, mac, port);
        // A host that probes whether its address is free has none yet (RFC 5227).
        if arp.request && arp.target.1 == self.gateway && (learned || address.is_unspecified()) {
            let reply = Arp { request: false, sender: (self.mac, self.gateway), target: arp.sender };
            self.push(port, &[&reply.frame(mac)], false);
        }
    }

    /// Returns the packets that waited in vain.
    pub(crate) fn unresolved(&mut self, now: Instant) -> Vec<Vec<u8>> {
        let (mut left, mut unresolved) = (HashMap::new(), Vec::new());
        for (address, waiting) in self.waiting.drain() {
            if now.duration_since(waiting.since) >= RESOLUTION_LIMIT {
                unresolved.extend(waiting.packets);
            } else {
                left.insert(address, waiting);
            }
        }
        self.waiting = left;
        unresolved
    }

    /// Returns when the first waiting packet times out.
    pub(crate) fn next_unresolved(&self) -> Option<Instant> {
        self.waiting.values().map(|waiting| waiting.since + RESOLUTION_LIMIT).min()
    }

    /// Signals the ports with new frames.
    pub(crate) fn flush(&mut self) {
        for port in self.dirty.drain() {
            if let Some(nic) = self.nics.get(port) {
                nic.port.flush();
            }
        }
    }

    /// Returns the number of addresses and packets that are remembered.
    #[cfg(test)]
    pub(crate) fn state_size(&self) -> usize {
        let packets: usize = self.waiting.values().map(|waiting| waiting.packets.len()).sum();
        self.table.len() + self.neighbours.len() + self.unplanned.len() + packets
    }

    pub(crate) fn take_full(&mut self) -> Vec<Arc<Port>> {
        self.full.drain().filter_map(|port| Some(Arc::clone(&self.nics.get(port)?.port))).collect()
    }
}
