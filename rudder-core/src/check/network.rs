//! Checks of networks: VPCs, subnets, NICs, addresses, and their overrides during the build.

use super::{
    codes,
    findings::Findings,
    vm::{self, MAX_NICS},
};
use crate::{
    hardware::NicModel,
    manifest::{BuildSpec, Network, Nic, ValuePath},
    units::{Cidr, MacAddress},
    visible::{Quoted, cut},
};
use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::Ipv4Addr,
};

/// Name and addresses of the subnet of a build that declares none; the addresses are those of QEMU's user network.
pub(crate) const DEFAULT_SUBNET: (&str, &str) = ("default", "10.0.2.0/24");

/// The names that a network declares.
#[derive(Debug)]
pub(super) struct Declared<'m> {
    vpcs: Vec<&'m str>,
    subnets: Vec<&'m str>,
    known_vpcs: HashSet<&'m str>,
    known_subnets: HashSet<&'m str>,
}

impl<'m> Declared<'m> {
    pub(super) fn new(network: Option<&'m Network>) -> Self {
        let mut vpcs = Vec::new();
        let mut subnets = Vec::new();
        if let Some(network) = network {
            vpcs.extend(network.vpcs.iter().filter_map(|vpc| vpc.name.as_deref()));
            subnets.extend(network.subnets.iter().filter_map(|subnet| subnet.name.as_deref()));
        }
        let known_vpcs = vpcs.iter().copied().collect();
        let known_subnets = subnets.iter().copied().collect();
        Self { vpcs, subnets, known_vpcs, known_subnets }
    }

    fn subnet(&self, findings: &mut Findings<'_>, name: &str, at: &ValuePath<'_>) {
        let automatic = self.subnets.is_empty() && name == DEFAULT_SUBNET.0;
        if !automatic && !self.known_subnets.contains(name) {
            let known = self.subnets.iter().copied();
            findings.unknown_reference(
                &codes::UNKNOWN_SUBNET,
                at,
                "an entry in `network.subnets`",
                name,
                known,
            );
        }
    }

    fn vpc(&self, findings: &mut Findings<'_>, name: &str, at: &ValuePath<'_>) {
        if !self.known_vpcs.contains(name) {
            let known = self.vpcs.iter().copied();
            findings.unknown_reference(&codes::UNKNOWN_VPC, at, "an entry in `network.vpcs`", name, known);
        }
    }
}

/// Checks `vpcs` and `subnets`.
pub(super) fn network(findings: &mut Findings<'_>, network: &Network, at: &ValuePath<'_>) {
    let declared = Declared::new(Some(network));
    let vpcs = at.key("vpcs");
    findings.unique("VPC", &vpcs, network.vpcs.iter().map(|vpc| vpc.name.as_deref()));
    for (index, vpc) in network.vpcs.iter().enumerate() {
        findings.required_name(
            vpc.name.as_deref(),
            &vpcs.index(index),
            "name the VPC, so that subnets can \
             refer to it",
        );
    }
    let subnets = at.key("subnets");
    findings.unique("subnet", &subnets, network.subnets.iter().map(|subnet| subnet.name.as_deref()));
    // The networks seen so far, per VPC.
    let mut used: HashMap<Option<&str>, Taken> = HashMap::new();
    for (index, subnet) in network.subnets.iter().enumerate() {
        let at = subnets.index(index);
        findings.required_name(subnet.name.as_deref(), &at, "name the subnet, so that NICs can refer to it");
        if let Some(vpc) = subnet.vpc.as_deref() {
            declared.vpc(findings, vpc, &at.key("vpc"));
        }
        let unmanaged = subnet.unmanaged == Some(true);
        match subnet.cidr.as_deref() {
            None => findings.missing(&at, "cidr", "give an IPv4 network such as `10.1.0.0/24`"),
            Some(text) => {
                let cidr_at = at.key("cidr");
                match text.parse::<Cidr>() {
                    Err(error) => {
                        let help =
                            without_host_bits(text).map(|network| format!("did you mean `{network}`?"));
                        findings.invalid(&codes::INVALID_CIDR, &cidr_at, &error).help = help;
                    }
                    Ok(cidr) => {
                        narrow(findings, cidr, unmanaged, &cidr_at);
                        let others = used.entry(subnet.vpc.as_deref()).or_default();
                        if let Some((other, first)) = others.take(cidr, index) {
                            let first = network.subnets[first].name.as_deref().unwrap_or("another");
                            let message = format!(
                                "expected a network that overlaps no other of its VPC, but found {cidr}, \
                                 which overlaps {other} of {}",
                                cut(first, 80).unwrap_or(first)
                            );
                            findings.report(&codes::SUBNETS_OVERLAP, &cidr_at, message).help = Some(
                                "traffic is routed between the subnets of one VPC; subnets of different VPCs \
                                 may overlap"
                                    .to_owned(),
                            );
                        }
                    }
                }
            }
        }
        if let Some(dns) = subnet.dns.as_deref() {
            for server in dns.split(',').map(str::trim).filter(|server| !server.is_empty()) {
                if server.parse::<Ipv4Addr>().is_err() {
                    findings.report(
                        &codes::INVALID_IP,
                        &at.key("dns"),
                        format!(
                            "expected IPv4 addresses separated by commas, but found {server:?}",
                            server = Quoted(server)
                        ),
                    );
                }
            }
        }
        if unmanaged {
            for (written, field) in [(subnet.dns.is_some(), "dns"), (subnet.dhcp.is_some(), "dhcp")] {
                if written {
                    findings.report(
                        &codes::INEFFECTIVE_FIELD,
                        &at.key(field),
                        format!(
                            "`{field}` has no effect on an unmanaged subnet, where a guest provides DHCP \
                             and DNS"
                        ),
                    );
                }
            }
        }
    }
}

/// The networks seen so far in a VPC, by first address. They do not overlap.
#[derive(Default)]
struct Taken(BTreeMap<u32, (Cidr, usize)>);

impl Taken {
    /// Adds a network, and returns one that it overlaps, if any. Of two overlapping networks, one contains the other.
    fn take(&mut self, cidr: Cidr, index: usize) -> Option<(Cidr, usize)> {
        let (first, last) = (u32::from(cidr.network()), u32::from(cidr.broadcast()));
        let before = self.0.range(..=first).next_back().map(|(_, other)| *other);
        if let Some(around) = before.filter(|(other, _)| other.overlaps(cidr)) {
            return Some(around);
        }
        let inside: Vec<u32> = self.0.range(first..=last).map(|(start, _)| *start).collect();
        let other = inside.first().and_then(|start| self.0.get(start).copied());
        for start in inside {
            self.0.remove(&start);
        }
        self.0.insert(first, (cidr, index));
        other
    }
}

/// Reports a subnet without room for a gateway and a guest; a subnet that a guest serves needs at least a /29.
fn narrow(findings: &mut Findings<'_>, cidr: Cidr, unmanaged: bool, at: &ValuePath<'_>) {
    let (most, what) = if unmanaged { (29, "an unmanaged subnet of") } else { (30, "a subnet of") };
    if cidr.prefix() > most {
        findings.report(
            &codes::SUBNET_TOO_NARROW,
            at,
            format!("expected {what} /{most} or wider, but found /{}", cidr.prefix()),
        );
    }
}

/// Clears the host bits: `10.1.0.5/24` becomes `10.1.0.0/24`.
fn without_host_bits(text: &str) -> Option<String> {
    let (address, prefix) = text.split_once('/')?;
    let address = u32::from(address.parse::<Ipv4Addr>().ok()?);
    let length: u32 = prefix.parse().ok().filter(|length| *length <= 32)?;
    let mask = u32::MAX.checked_shl(32 - length).unwrap_or(0);
    Some(format!("{}/{length}", Ipv4Addr::from(address & mask)))
}

const MODELS: &[&str] = &["e1000", "virtio", "e1000e", "rtl8139", "pcnet", "ne2k_pci"];

/// Returns the model with this name.
pub(crate) fn model(name: &str) -> Option<NicModel> {
    Some(match name {
        "e1000" => NicModel::E1000,
        "virtio" => NicModel::Virtio,
        "e1000e" => NicModel::E1000e,
        "rtl8139" => NicModel::Rtl8139,
        "pcnet" => NicModel::Pcnet,
        "ne2k_pci" => NicModel::Ne2kPci,
        _ => return None,
    })
}

/// Checks the `nics` of `parent` one by one. Without `network`, their references cannot be checked.
pub(super) fn nics(
    findings: &mut Findings<'_>,
    nics: &[Nic],
    parent: &ValuePath<'_>,
    network: Option<&Declared<'_>>,
) {
    if nics.is_empty() {
        return;
    }
    let at = parent.key("nics");
    findings.unique("NIC", &at, nics.iter().map(|nic| nic.name.as_deref()));
    if nics.len() > MAX_NICS {
        findings.report(
            &codes::TOO_MANY_NICS,
            &at,
            format!("expected at most {MAX_NICS} NICs, but found {}", nics.len()),
        );
    }
    let mut slots = HashMap::new();
    for (index, nic) in nics.iter().enumerate() {
        let at = at.index(index);
        findings.optional_name(nic.name.as_deref(), &at.key("name"));
        if let (Some(subnet), Some(network)) = (nic.subnet.as_deref(), network) {
            network.subnet(findings, subnet, &at.key("subnet"));
        }
        if let Some(slot) = nic.slot {
            let at = at.key("slot");
            if !(1..=9).contains(&slot) {
                findings.report(
                    &codes::INVALID_SLOT,
                    &at,
                    format!("expected a slot from 1 to 9, but found {slot}"),
                );
            } else if let Some(first) = slots.insert(slot, index) {
                let other = nics[first].name.as_deref().map(|name| cut(name, 80).unwrap_or(name).to_owned());
                let other = other.unwrap_or_else(|| format!("nics[{first}]"));
                findings.report(
                    &codes::SLOT_TAKEN,
                    &at,
                    format!("expected a unique slot, but found {slot}, which {other} uses"),
                );
            }
        }
        if let Some(ip) = nic.ip.as_deref()
            && ip.parse::<Ipv4Addr>().is_err()
        {
            let help = ip.contains('/').then(|| "write the address alone, without a prefix".to_owned());
            findings
                .report(
                    &codes::INVALID_IP,
                    &at.key("ip"),
                    format!("expected an IPv4 address, but found {ip:?}", ip = Quoted(ip)),
                )
                .help = help;
        }
        if let Some(mac) = nic.mac.as_deref()
            && let Err(error) = mac.parse::<MacAddress>()
        {
            let multicast =
                mac.as_bytes().get(1).is_some_and(|c| b"13579bBdDfF".contains(c)) && mac.len() == 17;
            findings.invalid(&codes::INVALID_MAC, &at.key("mac"), &error).help =
                multicast.then(|| "use a unicast address: its second digit is even".to_owned());
        }
        if let Some(written) = nic.model.as_deref()
            && model(written).is_none()
        {
            findings.unknown_value(&at.key("model"), written, MODELS);
        }
    }
}

/// Checks that everything named in `buildOverrides` exists.
pub(super) fn overrides(
    findings: &mut Findings<'_>,
    spec: &BuildSpec,
    at: &ValuePath<'_>,
    network: &Declared<'_>,
) {
    let Some(overrides) = &spec.build_overrides else { return };
    let at = at.key("buildOverrides");
    let vpcs = at.key("vpcs");
    findings.unique("VPC", &vpcs, overrides.vpcs.iter().map(|vpc| vpc.name.as_deref()));
    for (index, one) in overrides.vpcs.iter().enumerate() {
        let at = vpcs.index(index);
        match one.name.as_deref() {
            None => findings.missing(&at, "name", "name an entry in `network.vpcs`"),
            Some(name) => network.vpc(findings, name, &at.key("name")),
        }
    }
    let declared = spec.network.iter().flat_map(|network| &network.subnets);
    let declared: HashMap<&str, _> =
        declared.filter_map(|subnet| Some((subnet.name.as_deref()?, subnet))).collect();
    let subnets = at.key("subnets");
    findings.unique("subnet", &subnets, overrides.subnets.iter().map(|subnet| subnet.name.as_deref()));
    for (index, one) in overrides.subnets.iter().enumerate() {
        let at = subnets.index(index);
        let Some(name) = one.name.as_deref() else {
            findings.missing(&at, "name", "name an entry in `network.subnets`");
            continue;
        };
        if !network.known_subnets.contains(name) {
            let known = network.subnets.iter().copied();
            let at = at.key("name");
            findings.unknown_reference(
                &codes::UNKNOWN_SUBNET,
                &at,
                "an entry in `network.subnets`",
                name,
                known,
            );
        }
        let base = declared.get(name);
        if one.unmanaged == Some(true)
            && let Some(base) = base.filter(|base| base.unmanaged != Some(true))
            && let Some(cidr) = base.cidr.as_deref().and_then(|cidr| cidr.parse::<Cidr>().ok())
            && cidr.prefix() <= 30
        {
            narrow(findings, cidr, true, &at.key("unmanaged"));
        }
    }
    let vms = at.key("vms");
    let names: HashSet<&str> = spec.vms.iter().filter_map(|vm| vm.name.as_deref()).collect();
    findings.unique("VM", &vms, overrides.vms.iter().map(|vm| vm.name.as_deref()));
    for (index, one) in overrides.vms.iter().enumerate() {
        let at = vms.index(index);
        match one.name.as_deref() {
            None => findings.missing(&at, "name", "name an entry in `vms`"),
            Some(name) if !names.contains(name) => {
                let known = spec.vms.iter().filter_map(|vm| vm.name.as_deref());
                findings.unknown_reference(
                    &codes::UNKNOWN_VM,
                    &at.key("name"),
                    "an entry in `vms`",
                    name,
                    known,
                );
            }
            Some(_) => {}
        }
        if let Some(resources) = &one.resources {
            vm::resources(findings, resources, &at.key("resources"), vm::Required::No);
        }
        nics(findings, &one.nics, &at, Some(network));
    }
}

/// Checks the fixed addresses of all NICs together, once as clones have them and once as the build has them.
pub(super) fn addresses(findings: &mut Findings<'_>, spec: &BuildSpec, at: &ValuePath<'_>) {
    let fixed = |nics: &[Nic]| nics.iter().any(|nic| nic.ip.is_some() || nic.mac.is_some());
    let overrides = spec.build_overrides.as_ref();
    if !spec.vms.iter().any(|vm| fixed(&vm.nics))
        && !overrides.is_some_and(|overrides| overrides.vms.iter().any(|vm| fixed(&vm.nics)))
    {
        return;
    }
    let vms = at.key("vms");
    let mut base = Addresses::new(spec, false);
    for (index, vm) in spec.vms.iter().enumerate() {
        base.nics(findings, &vm.nics, &vms.index(index).key("nics"));
    }
    let Some(overrides) = overrides else { return };
    let overrides_at = at.key("buildOverrides");
    let overrides_at = overrides_at.key("vms");
    let mut build = Addresses::new(spec, true);
    // NICs without overrides first, so that a conflict is reported at the override.
    let overridden: HashMap<&str, usize> = overrides
        .vms
        .iter()
        .enumerate()
        .filter(|(_, one)| !one.nics.is_empty())
        .filter_map(|(index, one)| Some((one.name.as_deref()?, index)))
        .collect();
    for (index, vm) in spec.vms.iter().enumerate() {
        if !vm.name.as_deref().is_some_and(|name| overridden.contains_key(name)) {
            build.nics(findings, &vm.nics, &vms.index(index).key("nics"));
        }
    }
    for (index, one) in overrides.vms.iter().enumerate() {
        build.nics(findings, &one.nics, &overrides_at.index(index).key("nics"));
    }
}

/// The addresses in use so far, for the networks of the clones or those of the build.
struct Addresses<'m> {
    subnets: HashMap<&'m str, (Cidr, bool)>,
    first: Option<&'m str>,
    taken: HashMap<(&'m str, Ipv4Addr), String>,
    macs: HashMap<MacAddress, String>,
}

impl<'m> Addresses<'m> {
    fn new(spec: &'m BuildSpec, build: bool) -> Self {
        let overrides =
            spec.build_overrides.iter().filter(|_| build).flat_map(|overrides| &overrides.subnets);
        let overrides: HashMap<&str, bool> =
            overrides.filter_map(|one| Some((one.name.as_deref()?, one.unmanaged?))).collect();
        let mut subnets = HashMap::new();
        let mut first = None;
        for subnet in spec.network.iter().flat_map(|network| &network.subnets) {
            let Some(name) = subnet.name.as_deref() else { continue };
            first = first.or(Some(name));
            let unmanaged = overrides.get(name).copied().unwrap_or(subnet.unmanaged == Some(true));
            if let Some(cidr) = subnet.cidr.as_deref().and_then(|cidr| cidr.parse().ok()) {
                subnets.insert(name, (cidr, unmanaged));
            }
        }
        if first.is_none()
            && let Ok(cidr) = DEFAULT_SUBNET.1.parse()
        {
            subnets.insert(DEFAULT_SUBNET.0, (cidr, false));
            first = Some(DEFAULT_SUBNET.0);
        }
        Self { subnets, first, taken: HashMap::new(), macs: HashMap::new() }
    }

    fn nics(&mut self, findings: &mut Findings<'_>, nics: &'m [Nic], at: &ValuePath<'_>) {
        for (index, nic) in nics.iter().enumerate() {
            let at = at.index(index);
            if let Some(mac) = nic.mac.as_deref().and_then(|mac| mac.parse::<MacAddress>().ok()) {
                if let Some(other) = self.macs.get(&mac) {
                    let message =
                        format!("expected a unique hardware address, but found {mac}, which {other} uses");
                    findings.report(&codes::MAC_TAKEN, &at.key("mac"), message);
                } else {
                    self.macs.insert(mac, at.to_string());
                }
            }
            let Some(ip) = nic.ip.as_deref().and_then(|ip| ip.parse::<Ipv4Addr>().ok()) else { continue };
            let Some(subnet) = nic.subnet.as_deref().or(self.first) else { continue };
            let Some((cidr, unmanaged)) = self.subnets.get(subnet) else { continue };
            let ip_at = at.key("ip");
            let reserved = if ip == cidr.network() {
                Some("the network address")
            } else if ip == cidr.broadcast() {
                Some("the broadcast address")
            } else if ip == cidr.gateway() && !unmanaged {
                Some("the gateway address")
            } else {
                None
            };
            if !cidr.contains(ip) {
                let message = format!("expected an address in the subnet {subnet} ({cidr}), but found {ip}");
                findings.report(&codes::IP_OUTSIDE_SUBNET, &ip_at, message);
            } else if let Some(reserved_for) = reserved {
                let message = format!(
                    "expected a free address in the subnet {subnet}, but found {ip}, which is {reserved_for}"
                );
                findings.report(&codes::IP_RESERVED, &ip_at, message);
            } else if let Some(other) = self.taken.get(&(subnet, ip)) {
                let message = format!("expected a unique address, but found {ip}, which {other} uses");
                findings.report(&codes::IP_TAKEN, &ip_at, message);
            } else {
                self.taken.insert((subnet, ip), at.to_string());
            }
        }
    }
}
