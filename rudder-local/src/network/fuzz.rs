//! Entry points for fuzzing the code that reads bytes from guests. Not covered by semantic versioning.

use super::{
    Network, NetworkOptions, dhcp, dns,
    segment::Segment,
    stack::PortId,
    wire::{Packet, Refusal, fragments},
};
use rudder_core::hardware::NicModel;
use rudder_core::plan::{PlannedNetwork, PlannedNic, PlannedSubnet, PlannedVpc};

/// Returns a plan of two VPCs: the first with two subnets, the second with one that has the same addresses and one without a
/// router. They have no internet, so that nothing leaves this process.
fn plan() -> PlannedNetwork {
    let vpc = |name: &str| PlannedVpc { name: name.to_owned(), internet: false };
    let subnet = |name: &str, vpc: &str, third: u8, unmanaged: bool| PlannedSubnet {
        name: name.to_owned(),
        vpc: vpc.to_owned(),
        cidr: format!("10.0.{third}.0/24").parse().unwrap_or_else(|_| unreachable!("a network")),
        dhcp: !unmanaged,
        dns: Vec::new(),
        unmanaged,
    };
    PlannedNetwork {
        declared: true,
        vpcs: vec![vpc("a"), vpc("b")],
        subnets: vec![
            subnet("web", "a", 2, false),
            subnet("db", "a", 3, false),
            subnet("same", "b", 2, false),
            subnet("bare", "b", 4, true),
        ],
    }
}

/// Creates a network with a machine on each subnet of [`plan`], named like the subnet.
fn network() -> Network {
    let plan = plan();
    let network = Network::new(&plan, &NetworkOptions::new("fuzz"));
    for (number, subnet) in (0..).zip(&plan.subnets) {
        let nic = PlannedNic {
            name: "nic1".to_owned(),
            subnet: subnet.name.clone(),
            slot: 1,
            slot_pinned: false,
            ip: None,
            mac: rudder_core::units::MacAddress::new([2, 0, 0, 0, 0, number]),
            model: NicModel::Virtio,
        };
        let _ = network.add_machine(&subnet.name, &[nic]);
    }
    network
}

/// Sends frames, each preceded by its length as QEMU sends it, from the first NIC, with the rest as a second batch from the
/// second. Must be called on a Tokio runtime.
pub fn frames(bytes: &[u8]) {
    let network = network();
    let vpc = &network.vpcs[0];
    vpc.lock().segments.iter().flat_map(|segment| &segment.nics).for_each(|nic| nic.port.set_connected(true));
    let mut rest = bytes;
    for segment in [0, 1, 0] {
        let Ok((taken, _)) = vpc.frames(PortId { segment, port: 0 }, rest) else { return };
        rest = &rest[taken..];
    }
}

/// Sends one frame with this content to the gateway, with valid headers, so that the code behind them is reached.
/// Must be called on a Tokio runtime.
pub fn packet(bytes: &[u8]) {
    let Some((kind, content)) = bytes.split_first() else { return };
    let protocol = [1, 6, 17, *kind][usize::from(*kind % 4)];
    let to = [[10, 0, 2, 1], [10, 0, 3, 15], [8, 8, 8, 8], [10, 0, 2, 15]][usize::from(*kind / 4 % 4)];
    let content = &content[..content.len().min(1480)];
    let mut frame = vec![0x52, 0x55, 0x0a, 0, 0, 1, 2, 0, 0, 0, 0, 0, 8, 0];
    frame.extend(super::wire::packet(([10, 0, 2, 15].into(), to.into()), protocol, content));
    let length = u32::try_from(frame.len()).unwrap_or_default();
    frames(&[&length.to_be_bytes()[..], &frame].concat());
}

/// Parses a packet, and derives from it every kind of packet that is made from others.
pub fn ip(bytes: &[u8]) {
    let Some(packet) = Packet::parse(bytes) else { return };
    let _ = (packet.ports(), packet.datagram(), packet.is_syn(), packet.echo_reply(), packet.forwarded());
    let _ = Refusal::TooBig.icmp_message(&packet, [10, 0, 2, 1].into());
    let total: usize = fragments(bytes.to_vec()).iter().map(Vec::len).sum();
    assert!(total >= packet.bytes.len(), "fragments hold all of a packet");
}

/// Answers a DHCP message.
pub fn dhcp(bytes: &[u8]) {
    let Some(subnet) = plan().subnets.into_iter().next() else { return };
    let mut segment = Segment::new(subnet, [2; 6]);
    segment.add(&"web".into(), [2, 0, 0, 0, 0, 0], None);
    let _ = dhcp::answer(&mut segment, 0, "fuzz.internal", bytes);
}

/// Answers a DNS message.
pub fn dns(bytes: &[u8]) {
    let names = dns::Names::from([("web".to_owned(), vec![[10, 0, 2, 15].into()])]);
    if let Some(dns::Answer::Local(reply)) = dns::answer(&names, "fuzz.internal", bytes) {
        assert!(reply.len() <= bytes.len() + 300, "an answer is in proportion to its question");
    }
    let _ = (dns::no_such_name(bytes), dns::server_failure(bytes), dns::fit(bytes.to_vec(), 20));
}
