//! The network between simulated guests, made of single frames or with a TCP stack of their own.
#![allow(clippy::unwrap_used)]

mod frames;
mod guest;
mod hostile;
mod tcp;

use super::*;
use guest::Guest;
use rudder_core::hardware::NicModel;
use rudder_core::plan::{PlannedSubnet, PlannedVpc};
use std::time::Duration;

/// Time limit for expected events on a slow host.
const PATIENCE: Duration = Duration::from_secs(30);

fn subnet(name: &str, vpc: &str, cidr: &str) -> PlannedSubnet {
    PlannedSubnet {
        name: name.to_owned(),
        vpc: vpc.to_owned(),
        cidr: cidr.parse().unwrap(),
        dhcp: true,
        dns: Vec::new(),
        unmanaged: false,
    }
}

fn vpc(name: &str, internet: bool) -> PlannedVpc {
    PlannedVpc { name: name.to_owned(), internet }
}

/// Returns the network of a manifest that declares none.
fn undeclared() -> PlannedNetwork {
    PlannedNetwork {
        declared: false,
        vpcs: vec![vpc("default", true)],
        subnets: vec![subnet("default", "default", "10.0.2.0/24")],
    }
}

/// Returns two VPCs with the same addresses, the first with a second subnet and an unmanaged one.
fn two_vpcs() -> PlannedNetwork {
    let mut bare = subnet("bare", "a", "10.0.9.0/24");
    bare.unmanaged = true;
    PlannedNetwork {
        declared: true,
        vpcs: vec![vpc("a", false), vpc("b", false)],
        subnets: vec![
            subnet("web", "a", "10.0.2.0/24"),
            subnet("db", "a", "10.0.3.0/24"),
            bare,
            subnet("same", "b", "10.0.2.0/24"),
        ],
    }
}

fn nic(subnet: &str, last: u8, ip: Option<&str>) -> PlannedNic {
    PlannedNic {
        name: "nic1".to_owned(),
        subnet: subnet.to_owned(),
        slot: 1,
        slot_pinned: false,
        ip: ip.map(|ip| ip.parse().unwrap()),
        mac: rudder_core::units::MacAddress::new([2, 0, 0, 0, 0, last]),
        model: NicModel::Virtio,
    }
}

/// Returns a network on which "outside" is the loopback of this host, so that no test leaves it.
fn network(plan: &PlannedNetwork) -> Arc<Network> {
    network_with(plan, &NetworkOptions::new("Test_Lab-1"))
}

fn network_with(plan: &PlannedNetwork, options: &NetworkOptions) -> Arc<Network> {
    Arc::new(Network::with_policy(plan, options, |address| address == Ipv4Addr::LOCALHOST))
}

/// Adds a machine with one NIC, and connects it.
fn join(network: &Network, name: &str, nic: &PlannedNic) -> Guest {
    network.add_machine(name, std::slice::from_ref(nic)).unwrap();
    connect(network, name)
}

/// Connects the only NIC of a machine.
fn connect(network: &Network, name: &str) -> Guest {
    connect_nic(network, name, 0)
}

fn connect_nic(network: &Network, name: &str, nic: usize) -> Guest {
    let attached = network.machines()[name][nic].clone();
    let (ours, theirs) = io::duplex(1 << 20);
    let port =
        Arc::clone(&attached.vpc.lock().segments[attached.port_id.segment].nics[attached.port_id.port].port);
    // Immediately, not when the task runs: frames for a NIC that is not connected are dropped.
    port.set_connected(true);
    let address = attached.address();
    let gateway = attached.vpc.lock().segments[attached.port_id.segment].gateway;
    tokio::spawn(async move { cable::copy_frames(&attached.vpc, attached.port_id, &port, ours).await });
    Guest::new(theirs, attached.nic.mac.bytes(), address, gateway)
}

#[test]
fn names_are_converted_to_dns_labels() {
    assert_eq!(label("Web_Lab-1"), "weblab-1");
    assert_eq!(label("--"), "lab");
    assert_eq!(label(&"a".repeat(100)).len(), 63);
}

#[tokio::test]
async fn fixed_addresses_take_precedence() {
    let network = network(&undeclared());
    for (number, ip) in [(1, None), (2, Some("10.0.2.16")), (3, None), (4, Some("10.0.2.15"))] {
        network.add_machine(&format!("m{number}"), &[nic("default", number, ip)]).unwrap();
    }
    let address = |name: &str| network.nics(name)[0].ip.unwrap().to_string();
    // The last one took the address that had been given to the first.
    assert_eq!(["m1", "m2", "m3", "m4"].map(address), ["10.0.2.18", "10.0.2.16", "10.0.2.17", "10.0.2.15"]);
    let again = network.add_machine("m1", &[]).unwrap_err();
    assert_eq!(again.kind(), ErrorKind::Conflict);
    let nowhere = network.add_machine("m5", &[nic("none", 5, None)]).unwrap_err();
    assert_eq!(nowhere.kind(), ErrorKind::InvalidInput);
    network.remove_machine("m2");
    network.add_machine("m6", &[nic("default", 6, None)]).unwrap();
    assert_eq!(address("m6"), "10.0.2.16");
}

#[tokio::test]
async fn a_small_subnet_runs_out_of_addresses() {
    let mut plan = undeclared();
    plan.subnets[0].cidr = "10.0.2.8/29".parse().unwrap();
    let network = network(&plan);
    let addresses: Vec<_> = (0..6)
        .map(|number| {
            network.add_machine(&format!("m{number}"), &[nic("default", number, None)]).unwrap();
            network.nics(&format!("m{number}"))[0].ip.map(|ip| ip.octets()[3])
        })
        .collect();
    assert_eq!(addresses, [Some(10), Some(11), Some(12), Some(13), Some(14), None]);
}

#[tokio::test]
async fn a_record_recreates_the_same_network() {
    let first = network(&undeclared());
    for number in 1..4 {
        first.add_machine(&format!("m{number}"), &[nic("default", number, None)]).unwrap();
    }
    let text = serde_json::to_string(&first.record()).unwrap();
    let record: NetworkRecord = serde_json::from_str(&text).unwrap();
    let second = network_with(&record.network, &NetworkOptions::new(&record.name));
    for machine in record.machines.iter().rev() {
        second.add_machine(&machine.name, &machine.nics).unwrap();
    }
    for number in 1..4 {
        let name = format!("m{number}");
        assert_eq!(first.nics(&name)[0].ip, second.nics(&name)[0].ip);
    }
}
