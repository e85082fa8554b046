//! DHCP (RFC 2131) without stored leases: a planned NIC always gets its planned address, and any other one gets a free address.

use super::{
    segment::Segment,
    wire::{BROADCAST, MTU, Mac, udp},
};
use smoltcp::wire::{DhcpMessageType as Kind, DhcpOption, DhcpPacket, DhcpRepr, EthernetAddress};
use std::net::Ipv4Addr;

/// Lease time in seconds: longer than builds take.
const LEASE_TIME: u32 = 7 * 24 * 3600;
/// Length of the shortest message that old clients accept (RFC 1542, 2.1).
const MIN_LENGTH: usize = 300;
/// Maximum number of DNS servers in an answer.
const MAX_SERVERS: usize = 3;
const OPTION_DOMAIN: u8 = 15;
const OPTION_MTU: u8 = 26;

/// Answers a client's message that arrived at a port: returns the hardware address to send to, and the packet.
pub(crate) fn answer(
    segment: &mut Segment,
    port: usize,
    domain: &str,
    message: &[u8],
) -> Option<(Mac, Vec<u8>)> {
    let packet = DhcpPacket::new_checked(message).ok()?;
    let request = DhcpRepr::parse(&packet).ok()?;
    if !segment.plan.dhcp || !segment.is_routed() {
        return None;
    }
    let server = segment.gateway;
    if request.server_identifier.is_some_and(|chosen| chosen != server) {
        return None;
    }
    let mac = request.client_hardware_address.0;
    let yours = segment.lease(mac, port)?;
    let kind = match request.message_type {
        Kind::Discover => Kind::Offer,
        Kind::Request if request.requested_ip.unwrap_or(request.client_ip) == yours => Kind::Ack,
        Kind::Request => Kind::Nak,
        Kind::Inform => Kind::Ack,
        _ => return None,
    };
    let refused = kind == Kind::Nak;
    let informed = request.message_type == Kind::Inform;
    let mtu = u16::try_from(MTU).unwrap_or(u16::MAX).to_be_bytes();
    let options = [
        DhcpOption { kind: OPTION_DOMAIN, data: domain.as_bytes() },
        DhcpOption { kind: OPTION_MTU, data: &mtu },
    ];
    let own = [server];
    let servers = if segment.plan.dns.is_empty() { &own[..] } else { &segment.plan.dns };
    let mask = u32::from(segment.plan.cidr.network()) ^ u32::from(segment.plan.cidr.broadcast());
    let reply = DhcpRepr {
        message_type: kind,
        transaction_id: request.transaction_id,
        secs: 0,
        client_hardware_address: EthernetAddress(mac),
        client_ip: if refused { Ipv4Addr::UNSPECIFIED } else { request.client_ip },
        your_ip: if refused || informed { Ipv4Addr::UNSPECIFIED } else { yours },
        server_ip: server,
        router: (!refused).then_some(server),
        subnet_mask: (!refused).then(|| Ipv4Addr::from(!mask)),
        relay_agent_ip: Ipv4Addr::UNSPECIFIED,
        broadcast: request.broadcast,
        requested_ip: None,
        client_identifier: None,
        server_identifier: Some(server),
        parameter_request_list: None,
        dns_servers: (!refused).then(|| servers.iter().copied().take(MAX_SERVERS).collect()),
        max_size: None,
        lease_duration: (!refused && !informed).then_some(LEASE_TIME),
        renew_duration: None,
        rebind_duration: None,
        additional_options: if refused { &[] } else { &options },
    };
    let mut bytes = vec![0; reply.buffer_len().max(MIN_LENGTH)];
    reply.emit(&mut DhcpPacket::new_unchecked(&mut bytes[..])).ok()?;
    let has_address = !request.client_ip.is_unspecified() && !refused;
    // RFC 2131, 4.1.
    let (to, address) = match (refused || request.broadcast, has_address) {
        (_, true) => (mac, request.client_ip),
        (true, false) => (BROADCAST, Ipv4Addr::BROADCAST),
        (false, false) => (mac, yours),
    };
    Some((to, udp((server, 67), (address, 68), &bytes)))
}
