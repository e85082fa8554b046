//! The networks of a lab (<https://libvirt.org/formatnetwork.html>), through which its machines are reached.
//!
//! The system's libvirt creates bridges: each subnet of the lab is a network of its own, isolated or with NAT to the
//! outside, and with DHCP if the subnet has it. The guest's address is in libvirt's leases, and every process on the
//! host can reach it. The libvirt of a user's session may not create bridges: there, machines are on the lab's own
//! network in user space.

use crate::{
    connection::{Connection, Refusal},
    label::Label,
    xml::Xml,
};
use rudder_core::{
    Error, ErrorKind, Result,
    backend::{LabId, MachineSpec},
    hardware::NicModel,
    plan::{PlannedNetwork, PlannedNic, PlannedSubnet},
    units::Cidr,
};
use std::{net::Ipv4Addr, sync::Arc};
use virt::{connect::Connect, domain::Domain, error::ErrorNumber, network::Network, sys};

/// Maximum number of address ranges to try, since some may be in use on the host.
const RANGE_ATTEMPTS: usize = 16;

/// A libvirt network for a subnet of a lab.
#[derive(Debug, Clone)]
pub(crate) struct Bridge {
    /// The name of the subnet.
    pub(crate) subnet: String,
    /// The name of the network.
    pub(crate) network: String,
    /// Its addresses; the host has the first one.
    pub(crate) addresses: Cidr,
}

/// A NIC of a domain.
#[derive(Debug)]
pub(crate) struct Nic {
    pub(crate) mac: String,
    pub(crate) network: String,
    pub(crate) model: &'static str,
    pub(crate) slot: u8,
}

/// Returns the NICs of a machine on these bridges.
///
/// # Errors
/// `InvalidInput` for a NIC that is in no subnet, or whose slot does not exist.
pub(crate) fn nics(spec: &MachineSpec, bridges: &[Bridge]) -> Result<Vec<Nic>> {
    let bridged = |nic: &PlannedNic| {
        let invalid = |message: String| {
            Error::new(ErrorKind::InvalidInput, message)
                .with_context("nic", &nic.name)
                .with_context("vm", &spec.name)
        };
        let bridge = bridges.iter().find(|bridge| bridge.subnet == nic.subnet);
        let bridge = bridge
            .ok_or_else(|| invalid(format!("expected a subnet of the lab, but found {:?}", nic.subnet)))?;
        if !(1..=9).contains(&nic.slot) {
            return Err(invalid(format!("expected a slot from 1 to 9, but found {}", nic.slot)));
        }
        Ok(Nic {
            mac: nic.mac.to_string(),
            network: bridge.network.clone(),
            model: model(nic.model),
            slot: nic.slot,
        })
    };
    spec.nics.iter().map(bridged).collect()
}

/// Returns libvirt's name of a NIC model: `virtio`, or the name of QEMU's device.
fn model(model: NicModel) -> &'static str {
    match model {
        NicModel::E1000 => "e1000",
        NicModel::Virtio => "virtio",
        NicModel::E1000e => "e1000e",
        NicModel::Rtl8139 => "rtl8139",
        NicModel::Pcnet => "pcnet",
        NicModel::Ne2kPci => "ne2k_pci",
    }
}

/// Creates the networks of a lab, with this label. They do not survive a reboot of the host.
pub(crate) fn create(
    connect: &Connect,
    lab: &LabId,
    label: &Label,
    planned: &PlannedNetwork,
) -> Result<Vec<Bridge>, Refusal> {
    let mut bridges = Vec::new();
    for (index, subnet) in planned.subnets.iter().enumerate() {
        let network = format!("rudder.{lab}.{index}");
        let internet = planned.vpcs.iter().any(|vpc| vpc.name == subnet.vpc && vpc.internet);
        let mut refused = None;
        for _ in 0..RANGE_ATTEMPTS {
            let any = if planned.declared { None } else { any_range() };
            let addresses = any.unwrap_or(subnet.cidr);
            match Network::create_xml(connect, &xml(&network, label, subnet, addresses, internet)) {
                Ok(_) => {
                    refused = None;
                    bridges.push(Bridge { subnet: subnet.name.clone(), network: network.clone(), addresses });
                    break;
                }
                // The range is in use on this host: libvirt has no error code of its own for that.
                Err(refusal) if !planned.declared && refusal.code() == ErrorNumber::InternalError => {
                    refused = Some(refusal);
                }
                Err(refusal) => return Err(refusal),
            }
        }
        if let Some(refusal) = refused {
            return Err(refusal);
        }
    }
    Ok(bridges)
}

/// Returns 256 addresses of a rarely used private range (RFC 1918). All labs of a host share its address space, so each
/// gets a range of its own.
fn any_range() -> Option<Cidr> {
    // Between 10.128.0.0 and 10.255.255.0.
    let first = Ipv4Addr::from(0x0a80_0000 | rand::random_range(0..1_u32 << 15) << 8);
    format!("{first}/24").parse().ok()
}

fn xml(name: &str, label: &Label, subnet: &PlannedSubnet, addresses: Cidr, internet: bool) -> String {
    let mut xml = Xml::new();
    // https://libvirt.org/formatnetwork.html#network-namespaces
    let dnsmasq = ("xmlns:dnsmasq", "http://libvirt.org/schemas/network/dnsmasq/1.0");
    xml.element("network", &[dnsmasq], |xml| {
        xml.text("name", &[], name);
        label.write(xml);
        if internet {
            xml.empty("forward", &[("mode", "nat")]);
        }
        // Nothing attached to the bridge can form a loop, so its ports may forward at once.
        xml.empty("bridge", &[("stp", "off"), ("delay", "0")]);
        if !subnet.dns.is_empty() {
            xml.element("dns", &[], |xml| {
                for server in &subnet.dns {
                    xml.empty("forwarder", &[("addr", &server.to_string())]);
                }
            });
        }
        let attributes =
            [("address", addresses.gateway().to_string()), ("prefix", addresses.prefix().to_string())];
        let attributes = [("address", attributes[0].1.as_str()), ("prefix", attributes[1].1.as_str())];
        xml.element("ip", &attributes, |xml| {
            if subnet.dhcp {
                let first = Ipv4Addr::from(u32::from(addresses.gateway()).saturating_add(1));
                let last = Ipv4Addr::from(u32::from(addresses.broadcast()).saturating_sub(1));
                xml.element("dhcp", &[], |xml| {
                    xml.empty("range", &[("start", &first.to_string()), ("end", &last.to_string())]);
                });
            }
        });
        if subnet.dhcp {
            // Before it offers an address, dnsmasq pings it for three seconds, one address after the other. On a bridge of
            // the lab's own, no address is in use that it does not know of.
            xml.element("dnsmasq:options", &[], |xml| xml.empty("dnsmasq:option", &[("value", "no-ping")]));
        }
    });
    xml.finish()
}

/// Returns the networks that carry a label of Rudder, each with its label.
pub(crate) fn labelled(connect: &Connect) -> Result<Vec<(Network, Label)>, Refusal> {
    let networks = match connect.list_all_networks(0) {
        // This libvirt has no network driver.
        Err(refusal) if refusal.code() == ErrorNumber::NoSupport => return Ok(Vec::new()),
        other => other?,
    };
    let mut found = Vec::new();
    for network in networks {
        match network.get_xml_desc(0) {
            Ok(text) => found.extend(Label::of_network(&text).map(|label| (network, label))),
            // Was just removed.
            Err(refusal) if refusal.code() == ErrorNumber::NoNetwork => {}
            Err(refusal) => return Err(refusal),
        }
    }
    Ok(found)
}

/// Ends a network. A network that does not exist is not an error.
pub(crate) fn remove(network: &Network) -> Result<(), Refusal> {
    match network.destroy() {
        Err(refusal) if !matches!(refusal.code(), ErrorNumber::NoNetwork | ErrorNumber::OperationInvalid) => {
            Err(refusal)
        }
        _ => Ok(()),
    }
}

/// Returns the address of a domain's NIC, if it has one: from libvirt's leases, otherwise from the host's ARP table.
pub(crate) fn address(domain: &Domain, mac: &str) -> Result<Option<Ipv4Addr>, Refusal> {
    let sources = [
        sys::VIR_DOMAIN_INTERFACE_ADDRESSES_SRC_LEASE,
        // For a guest that configured its address itself.
        sys::VIR_DOMAIN_INTERFACE_ADDRESSES_SRC_ARP,
    ];
    for source in sources {
        for interface in domain.interface_addresses(source, 0)? {
            if interface.hwaddr.eq_ignore_ascii_case(mac)
                && let Some(address) = interface.addrs.iter().find_map(|address| address.addr.parse().ok())
            {
                return Ok(Some(address));
            }
        }
    }
    Ok(None)
}

/// Returns whether this URI is that of the system's libvirt, which may create bridges
/// (<https://libvirt.org/drvqemu.html>).
pub(crate) fn is_system(connection: &Arc<Connection>) -> bool {
    let path = connection.uri().split(['?', '#']).next().unwrap_or_default();
    path.ends_with("/system")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::{label::StoreLabel, xml::elements};

    fn subnet(dhcp: bool) -> PlannedSubnet {
        PlannedSubnet {
            name: "lan".to_owned(),
            vpc: "default".to_owned(),
            cidr: "192.168.7.0/24".parse().unwrap(),
            dhcp,
            dns: vec!["9.9.9.9".parse().unwrap()],
            unmanaged: false,
        }
    }

    #[test]
    fn a_network_names_its_owner_and_its_dhcp_range() {
        let label = Label::Lab {
            store: StoreLabel { path: "/a&b".to_owned(), mark: "m".to_owned() },
            lab: LabId::parse("web-0123456789ab").unwrap(),
            vm: String::new(),
            owner: 1,
        };
        let text = xml("n", &label, &subnet(true), "10.1.2.0/24".parse().unwrap(), true);
        assert_eq!(Label::of_network(&text), Some(label.clone()));
        let found = elements(&text);
        let range = found.iter().find(|element| element.name == "range").unwrap();
        assert_eq!(
            (range.attribute("start"), range.attribute("end")),
            (Some("10.1.2.2"), Some("10.1.2.254"))
        );
        assert!(found.iter().any(|element| element.attribute("mode") == Some("nat")));
        assert!(found.iter().any(|element| element.attribute("value") == Some("no-ping")));
        let text = xml("n", &label, &subnet(false), "10.1.2.0/24".parse().unwrap(), false);
        assert!(!text.contains("nat") && !text.contains("range") && text.contains("9.9.9.9"), "{text}");
    }

    #[test]
    fn a_foreign_network_has_no_label() {
        let theirs = "<network><metadata><x:lab xmlns:x='urn:x' id='web-0123456789ab' vm='' store='/s' owner='1'/></metadata></network>";
        assert_eq!(Label::of_network(theirs), None);
    }

    #[test]
    fn ranges_are_private_and_aligned() {
        let all: Cidr = "10.128.0.0/9".parse().unwrap();
        for _ in 0..100 {
            let range = any_range().unwrap();
            assert!(all.contains(range.network()) && range.network().octets()[3] == 0, "{range}");
        }
    }
}
