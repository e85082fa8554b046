//! Network cards, and the networks behind them.

use super::{Chipset, Line, place};
use rudder_core::{
    Error, ErrorKind, Result,
    backend::MachineSpec,
    plan::{NicModel, PlannedNetwork, PlannedNic, PlannedSubnet},
};
use std::net::Ipv4Addr;

/// QEMU's name of a card.
pub(super) fn driver(model: NicModel) -> &'static str {
    match model {
        NicModel::E1000 => "e1000",
        NicModel::Virtio => "virtio-net-pci",
        NicModel::E1000e => "e1000e",
        NicModel::Rtl8139 => "rtl8139",
        NicModel::Pcnet => "pcnet",
        NicModel::Ne2kPci => "ne2k_pci",
    }
}

/// The arguments that make the cards of a machine, as a machine of this backend gets them, with forwarded ports.
///
/// # Errors
/// `InvalidInput` when a card is in no subnet of the lab, or its slot is none.
pub fn card_arguments(spec: &MachineSpec, network: &PlannedNetwork) -> Result<Vec<String>> {
    let mut line = Line { words: Vec::new(), chipset: Chipset::of(spec) };
    attach(&mut line, spec, network)?;
    Ok(line.words)
}

/// Whether the guests of a subnet reach the host, and through it the internet: QEMU's user network has both or neither.
pub(crate) fn reaches_host(network: &PlannedNetwork, subnet: &PlannedSubnet) -> bool {
    network.vpcs.iter().any(|vpc| vpc.name == subnet.vpc && vpc.internet)
}

/// The address by which the guests of a subnet reach the loopback of the host: the second of the subnet, as QEMU has it
/// in networks of 256 addresses.
pub(crate) fn host_address(subnet: &PlannedSubnet) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(subnet.cidr.network()).saturating_add(2))
}

/// Puts the networks in, each of which is QEMU's user network (slirp) with the addresses of its subnet, and the cards in them.
pub(super) fn attach(line: &mut Line, spec: &MachineSpec, network: &PlannedNetwork) -> Result<()> {
    let invalid = |nic: &PlannedNic, message: String| {
        Error::new(ErrorKind::InvalidInput, message)
            .with_context("nic", &nic.name)
            .with_context("vm", &spec.name)
    };
    let mut hubs: Vec<&str> = Vec::new();
    let mut forwards: String =
        spec.ports.iter().map(|port| format!(",hostfwd=tcp:127.0.0.1:0-:{port}")).collect();
    for (index, nic) in spec.nics.iter().enumerate() {
        let subnet = network.subnets.iter().find(|subnet| subnet.name == nic.subnet);
        let subnet = subnet.ok_or_else(|| {
            invalid(nic, format!("expected a subnet of the lab, but found {:?}", nic.subnet))
        })?;
        let shared = spec.nics.iter().filter(|other| other.subnet == nic.subnet).count() > 1;
        if !hubs.contains(&nic.subnet.as_str()) {
            let restrict = if reaches_host(network, subnet) { "off" } else { "on" };
            // A port of 0 is chosen by the kernel, and read back later: nobody else can take it in between.
            let forwards = std::mem::take(&mut forwards);
            let id = if shared { format!("up{}", hubs.len()) } else { format!("net{index}") };
            line.option(
                "-netdev",
                format!(
                    "user,id={id},ipv6=off,net={},host={},restrict={restrict}{forwards}",
                    subnet.cidr,
                    host_address(subnet)
                ),
            );
            if shared {
                line.option("-netdev", format!("hubport,id={id}hub,hubid={},netdev={id}", hubs.len()));
            }
            hubs.push(&nic.subnet);
        }
        if shared {
            let hub = hubs.iter().position(|name| *name == nic.subnet).unwrap_or_default();
            line.option("-netdev", format!("hubport,id=net{index},hubid={hub}"));
        }
        if !(1..=9).contains(&nic.slot) {
            return Err(invalid(nic, format!("expected a slot from 1 to 9, but found {}", nic.slot)));
        }
        // Without a boot ROM: nothing boots from the network, and loading it takes time.
        let card = line.device(driver(nic.model), place::CARDS + nic.slot, 0);
        line.option("-device", format!("{card},id=nic{index},netdev=net{index},mac={},romfile=", nic.mac));
    }
    Ok(())
}
