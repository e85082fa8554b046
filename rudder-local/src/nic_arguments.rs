//! QEMU's arguments for NICs and the networks behind them.

use crate::{
    pci_layout::{Chipset, slot},
    process::escape,
};
use rudder_core::{
    Error, ErrorKind, Result,
    backend::MachineSpec,
    hardware::NicModel,
    plan::{PlannedNetwork, PlannedNic, PlannedSubnet},
};

/// Returns the name of a NIC's socket in the lab, on which QEMU listens: `number` is the machine's, `index` the NIC's.
#[must_use]
pub fn nic_socket(number: usize, index: usize) -> String {
    format!("m{number}.n{index}")
}

/// Returns QEMU's name of a NIC model.
#[must_use]
pub fn driver(model: NicModel) -> &'static str {
    match model {
        NicModel::E1000 => "e1000",
        NicModel::Virtio => "virtio-net-pci",
        NicModel::E1000e => "e1000e",
        NicModel::Rtl8139 => "rtl8139",
        NicModel::Pcnet => "pcnet",
        NicModel::Ne2kPci => "ne2k_pci",
    }
}

/// Returns the arguments for the NICs of a machine, each with the socket path on which QEMU listens for the lab's network.
///
/// # Errors
/// `InvalidInput` when a NIC is in no subnet of the lab, or its slot is out of range.
pub fn nic_arguments(
    spec: &MachineSpec,
    network: &PlannedNetwork,
    sockets: &[String],
) -> Result<Vec<String>> {
    let mut arguments = Arguments { list: Vec::new(), chipset: Chipset::of(spec) };
    if let Some(nic) = spec.nics.get(sockets.len()) {
        return Err(invalid(spec, nic, format!("expected at most {} NICs, but found more", sockets.len())));
    }
    for (index, (nic, socket)) in spec.nics.iter().zip(sockets).enumerate() {
        subnet(spec, nic, network)?;
        // QEMU 7.2. It listens, because only later versions reconnect after the other side was away.
        let path = escape(socket);
        arguments
            .option("-netdev", format!("stream,id=net{index},server=on,addr.type=unix,addr.path={path}"));
        device(&mut arguments, spec, index, nic)?;
    }
    Ok(arguments.list)
}

/// Returns the arguments for the NICs of a machine that is started without a lab: each is in QEMU's user network with the
/// addresses of its subnet. It reaches the outside if its VPC has internet, and nothing reaches it.
///
/// # Errors
/// As [`nic_arguments`].
pub fn user_nic_arguments(spec: &MachineSpec, network: &PlannedNetwork) -> Result<Vec<String>> {
    let mut arguments = Arguments { list: Vec::new(), chipset: Chipset::of(spec) };
    let mut hubs: Vec<&str> = Vec::new();
    for (index, nic) in spec.nics.iter().enumerate() {
        let subnet = subnet(spec, nic, network)?;
        let shared = spec.nics.iter().filter(|other| other.subnet == nic.subnet).count() > 1;
        if !hubs.contains(&nic.subnet.as_str()) {
            let internet = network.vpcs.iter().any(|vpc| vpc.name == subnet.vpc && vpc.internet);
            let restrict = if internet { "off" } else { "on" };
            let id = if shared { format!("up{}", hubs.len()) } else { format!("net{index}") };
            let value = format!("user,id={id},ipv6=off,net={},restrict={restrict}", subnet.cidr);
            arguments.option("-netdev", value);
            if shared {
                arguments.option("-netdev", format!("hubport,id={id}hub,hubid={},netdev={id}", hubs.len()));
            }
            hubs.push(&nic.subnet);
        }
        if shared {
            let hub = hubs.iter().position(|name| *name == nic.subnet).unwrap_or_default();
            arguments.option("-netdev", format!("hubport,id=net{index},hubid={hub}"));
        }
        device(&mut arguments, spec, index, nic)?;
    }
    Ok(arguments.list)
}

fn invalid(spec: &MachineSpec, nic: &PlannedNic, message: String) -> Error {
    Error::new(ErrorKind::InvalidInput, message).with_context("nic", &nic.name).with_context("vm", &spec.name)
}

/// Returns the subnet of a NIC.
fn subnet<'n>(
    spec: &MachineSpec,
    nic: &PlannedNic,
    network: &'n PlannedNetwork,
) -> Result<&'n PlannedSubnet> {
    network.subnets.iter().find(|subnet| subnet.name == nic.subnet).ok_or_else(|| {
        invalid(spec, nic, format!("expected a subnet of the lab, but found {:?}", nic.subnet))
    })
}

/// Arguments under construction.
struct Arguments {
    list: Vec<String>,
    chipset: Chipset,
}

impl Arguments {
    fn option(&mut self, option: &str, value: String) {
        self.list.extend([option.to_owned(), value]);
    }
}

/// Adds a NIC in its slot.
fn device(arguments: &mut Arguments, spec: &MachineSpec, index: usize, nic: &PlannedNic) -> Result<()> {
    if !(1..=9).contains(&nic.slot) {
        return Err(invalid(spec, nic, format!("expected a slot from 1 to 9, but found {}", nic.slot)));
    }
    // Without a boot ROM: nothing boots from the network, and loading it takes time.
    let device = arguments.chipset.device(driver(nic.model), slot::NICS + nic.slot, 0);
    arguments.option("-device", format!("{device},id=nic{index},netdev=net{index},mac={},romfile=", nic.mac));
    Ok(())
}
