//! The handling of a guest's frames: switched, answered by the gateway, routed, or forwarded to the outside.

use super::{FlowState, Inner, MAX_FLOWS, Vpc};
use crate::network::{
    dhcp, dns, nat,
    stack::{Flow, PortId},
    wire::{self, Arp, BROADCAST, Frame, MTU, Packet, Payload, Refusal, is_group},
};
use smoltcp::iface::SocketHandle;
use std::{io, sync::Arc};

impl Inner {
    pub(super) fn frame(&mut self, vpc: &Arc<Vpc>, port_id: PortId, frame: &Frame<'_>) {
        let Some(segment) = self.segments.get_mut(port_id.segment) else { return };
        if !segment.learn_mac(frame.from, port_id.port) {
            return;
        }
        if segment.is_routed() {
            if let Payload::Arp(bytes) = frame.payload
                && let Some(arp) = Arp::parse(bytes).filter(|arp| arp.sender.0 == frame.from)
            {
                segment.arp(port_id.port, &arp);
            }
            if let Payload::Ipv4(bytes) = frame.payload
                && let Some(packet) = Packet::parse(bytes)
            {
                if segment.is_for_gateway(frame) {
                    self.packet(vpc, port_id, frame, &packet);
                    return;
                }
                if is_group(frame.to) && is_dhcp(&packet) {
                    self.dhcp(vpc, port_id, &packet);
                }
            }
            if self.segments[port_id.segment].is_for_gateway(frame) {
                return;
            }
        }
        self.segments[port_id.segment].switch_frame(port_id.port, frame);
    }

    fn dhcp(&mut self, vpc: &Arc<Vpc>, port_id: PortId, packet: &Packet<'_>) {
        let (Some(message), Some(segment)) = (packet.datagram(), self.segments.get_mut(port_id.segment))
        else {
            return;
        };
        if let Some((mac, reply)) = dhcp::answer(segment, port_id.port, &vpc.settings.domain, message)
            && (mac == BROADCAST || !is_group(mac))
        {
            segment.send_frame(mac, port_id.port, &reply);
        }
    }

    /// Handles a packet that was sent to the router.
    fn packet(&mut self, vpc: &Arc<Vpc>, port_id: PortId, frame: &Frame<'_>, packet: &Packet<'_>) {
        if is_dhcp(packet) {
            return self.dhcp(vpc, port_id, packet);
        }
        let Some(segment) = self.segments.get_mut(port_id.segment) else { return };
        // No guest can use the address of another.
        if !segment.learn_ip(packet.src, frame.from, port_id.port) {
            return;
        }
        if self.segments.iter().any(|segment| segment.is_routed() && segment.gateway == packet.dst) {
            return self.for_gateway(vpc, port_id, packet);
        }
        if packet.ttl <= 1 {
            return self.send_icmp_error(port_id, packet, Refusal::TimeExceeded);
        }
        if let Some(to) = self.segments.iter().find(|segment| segment.reaches(packet.dst)) {
            if !to.is_host(packet.dst) {
                return self.send_icmp_error(port_id, packet, Refusal::Prohibited);
            }
            if packet.bytes.len() > MTU && packet.dont_fragment {
                return self.send_icmp_error(port_id, packet, Refusal::TooBig);
            }
            return self.send(packet.forwarded());
        }
        self.for_outside(vpc, port_id, packet);
    }

    fn for_gateway(&mut self, vpc: &Arc<Vpc>, port_id: PortId, packet: &Packet<'_>) {
        match (packet.protocol, packet.ports()) {
            (wire::ICMP, _) => {
                if let Some(reply) = packet.echo_reply() {
                    self.send(reply);
                }
            }
            (wire::UDP, Some((_, 53))) => self.dns(vpc, port_id, packet),
            (wire::UDP, Some(_)) => self.send_icmp_error(port_id, packet, Refusal::PortUnreachable),
            (wire::TCP, Some(ports)) => self.segment(vpc, port_id, packet, ports),
            (wire::UDP | wire::TCP, None) => {}
            _ => self.send_icmp_error(port_id, packet, Refusal::ProtocolUnreachable),
        }
    }

    fn for_outside(&mut self, vpc: &Arc<Vpc>, port_id: PortId, packet: &Packet<'_>) {
        let refusal = match (packet.protocol, packet.ports()) {
            _ if !self.internet => Refusal::NoRoute,
            (wire::TCP, Some(ports)) => return self.segment(vpc, port_id, packet, ports),
            (wire::UDP, Some((from, to))) => {
                let flow = Flow { guest: (packet.src, from), to: (packet.dst, to) };
                let Some(content) = packet.datagram() else { return };
                if self.datagrams.send(flow, content) {
                    return;
                }
                // Checked when a flow begins, and not for each of its datagrams.
                if (vpc.settings.is_outside)(packet.dst) {
                    return nat::datagram(vpc, self, port_id, flow, content);
                }
                Refusal::Prohibited
            }
            _ => Refusal::Prohibited,
        };
        if packet.protocol == wire::TCP && packet.is_syn() {
            self.refuse(port_id, packet.bytes.to_vec(), Some(refusal));
        } else {
            self.send_icmp_error(port_id, packet, refusal);
        }
    }

    /// Informs the sender why its packet goes no further.
    pub(in crate::network) fn send_icmp_error(
        &mut self,
        port_id: PortId,
        packet: &Packet<'_>,
        refusal: Refusal,
    ) {
        let Some(gateway) = self.segments.get(port_id.segment).map(|segment| segment.gateway) else { return };
        if let Some(reply) = refusal.icmp_message(packet, gateway) {
            self.send(reply);
        }
    }

    fn dns(&mut self, vpc: &Arc<Vpc>, port_id: PortId, packet: &Packet<'_>) {
        let (Some(query), Some((from, to))) = (packet.datagram(), packet.ports()) else { return };
        let reply = match dns::answer(&self.names, &vpc.settings.domain, query) {
            Some(dns::Answer::Local(reply)) => Some(reply),
            Some(dns::Answer::Forward) if self.internet => {
                nat::forward_query(
                    vpc,
                    self,
                    port_id,
                    Flow { guest: (packet.src, from), to: (packet.dst, to) },
                    query,
                );
                None
            }
            Some(dns::Answer::Forward) => dns::no_such_name(query),
            None => None,
        };
        if let Some(reply) = reply {
            self.send(wire::udp((packet.dst, to), (packet.src, from), &reply));
        }
    }

    /// Handles a TCP segment for the gateway or for the outside.
    fn segment(&mut self, vpc: &Arc<Vpc>, port_id: PortId, packet: &Packet<'_>, (from, to): (u16, u16)) {
        let flow = Flow { guest: (packet.src, from), to: (packet.dst, to) };
        match self.flows.get(&flow) {
            // A retransmission.
            Some(FlowState::Pending) => return,
            Some(FlowState::Established) => return self.stack.receive(packet.bytes.to_vec()),
            None if !packet.is_syn() => return self.stack.receive(packet.bytes.to_vec()),
            None => {}
        }
        let syn = packet.bytes.to_vec();
        let Some(nic) =
            self.segments.get_mut(port_id.segment).and_then(|segment| segment.nics.get_mut(port_id.port))
        else {
            return;
        };
        if nic.flows >= MAX_FLOWS {
            return self.refuse(port_id, syn, None);
        }
        nic.flows += 1;
        let machine = Arc::clone(&nic.machine);
        self.flows.insert(flow, FlowState::Pending);
        let is_gateway =
            self.segments.iter().any(|segment| segment.is_routed() && segment.gateway == packet.dst);
        if !is_gateway {
            return nat::connection(vpc, port_id, flow, syn);
        }
        let Some(service) = self.services.at(to) else {
            self.end_flow(port_id, flow);
            return self.refuse(port_id, syn, None);
        };
        // In a task, because accepting acquires the lock, which is held here.
        let vpc = Arc::clone(vpc);
        tokio::spawn(async move {
            if let Some(stream) = vpc.accept(port_id, flow, syn) {
                service.accept(machine, stream);
            }
        });
    }

    pub(super) fn accept(&mut self, port_id: PortId, flow: Flow, syn: Vec<u8>) -> io::Result<SocketHandle> {
        let handle = self.stack.accept(port_id, flow, syn)?;
        self.flows.insert(flow, FlowState::Established);
        self.poll();
        Ok(handle)
    }

    pub(super) fn end_flow(&mut self, port_id: PortId, flow: Flow) {
        if self.flows.remove(&flow).is_some()
            && let Some(nic) =
                self.segments.get_mut(port_id.segment).and_then(|segment| segment.nics.get_mut(port_id.port))
        {
            nic.flows = nic.flows.saturating_sub(1);
        }
    }

    /// Refuses a connection: first sends the reason, which many guests understand, then a reset, which all understand.
    pub(super) fn refuse(&mut self, port_id: PortId, syn: Vec<u8>, why: Option<Refusal>) {
        if let (Some(why), Some(packet)) = (why, Packet::parse(&syn)) {
            self.send_icmp_error(port_id, &packet, why);
        }
        // The stack resets connections that no socket waits for.
        self.stack.receive(syn);
    }
}

fn is_dhcp(packet: &Packet<'_>) -> bool {
    packet.protocol == wire::UDP && packet.ports() == Some((68, 67))
}
