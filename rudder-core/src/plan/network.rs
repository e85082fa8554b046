//! Plans networks, NICs and their hardware addresses.

use super::{PlannedNetwork, PlannedNic, PlannedSubnet, PlannedVpc};
use crate::{
    check::{DEFAULT_SUBNET, model},
    digest::Digest,
    hardware::NicModel,
    manifest::{BuildSpec, Nic},
    units::MacAddress,
};
use std::{
    collections::{HashMap, HashSet},
    net::Ipv4Addr,
};

/// Name of the implicit VPC and subnet.
const AUTOMATIC: &str = DEFAULT_SUBNET.0;

/// Returns the networks that clones get.
///
/// A subnet without a VPC belongs to the implicit VPC, which has internet access unless a VPC is declared. If there are
/// no subnets, the first VPC gets one with QEMU's default addresses.
pub(super) fn base(spec: &BuildSpec) -> Option<PlannedNetwork> {
    let network = spec.network.as_ref();
    let (vpcs, subnets) =
        network.map_or((&[][..], &[][..]), |network| (&network.vpcs[..], &network.subnets[..]));
    let mut planned =
        PlannedNetwork { declared: !vpcs.is_empty() || !subnets.is_empty(), ..PlannedNetwork::default() };
    for vpc in vpcs {
        let internet = vpc.internet.unwrap_or(false);
        planned.vpcs.push(PlannedVpc { name: vpc.name.clone()?, internet });
    }
    let automatic = vpcs.is_empty() || subnets.iter().any(|subnet| subnet.vpc.is_none());
    if automatic && !planned.vpcs.iter().any(|vpc| vpc.name == AUTOMATIC) {
        planned.vpcs.push(PlannedVpc { name: AUTOMATIC.to_owned(), internet: vpcs.is_empty() });
    }
    for subnet in subnets {
        let unmanaged = subnet.unmanaged.unwrap_or(false);
        let dns = subnet.dns.as_deref().unwrap_or_default();
        let dns: Vec<Ipv4Addr> = dns.split(',').filter_map(|server| server.trim().parse().ok()).collect();
        planned.subnets.push(PlannedSubnet {
            name: subnet.name.clone()?,
            vpc: subnet.vpc.clone().unwrap_or_else(|| AUTOMATIC.to_owned()),
            cidr: subnet.cidr.as_deref()?.parse().ok()?,
            dhcp: subnet.dhcp.unwrap_or(true) && !unmanaged,
            dns: if unmanaged { Vec::new() } else { dns },
            unmanaged,
        });
    }
    if planned.subnets.is_empty() {
        planned.subnets.push(PlannedSubnet {
            name: AUTOMATIC.to_owned(),
            vpc: planned.vpcs.first()?.name.clone(),
            cidr: DEFAULT_SUBNET.1.parse().ok()?,
            dhcp: true,
            dns: Vec::new(),
            unmanaged: false,
        });
    }
    Some(planned)
}

/// Returns the networks while the build runs: the base with `buildOverrides` applied.
pub(super) fn overridden(spec: &BuildSpec, base: &PlannedNetwork) -> Option<PlannedNetwork> {
    let mut network = base.clone();
    let Some(overrides) = &spec.build_overrides else { return Some(network) };
    let vpcs: HashMap<_, _> = indices_by_name(base.vpcs.iter().map(|vpc| vpc.name.as_str()));
    let subnets: HashMap<_, _> = indices_by_name(base.subnets.iter().map(|subnet| subnet.name.as_str()));
    let declared = spec.network.iter().flat_map(|network| &network.subnets);
    let declared: HashMap<_, _> =
        declared.filter_map(|subnet| Some((subnet.name.as_deref()?, subnet))).collect();
    for one in &overrides.vpcs {
        let vpc = &mut network.vpcs[*vpcs.get(one.name.as_deref()?)?];
        vpc.internet = one.internet.unwrap_or(vpc.internet);
    }
    for one in &overrides.subnets {
        let name = one.name.as_deref()?;
        let subnet = &mut network.subnets[*subnets.get(name)?];
        let written = declared.get(name)?;
        subnet.unmanaged = one.unmanaged.unwrap_or(subnet.unmanaged);
        // Settings without effect on an unmanaged subnet apply again when an override makes it managed.
        subnet.dhcp = written.dhcp.unwrap_or(true) && !subnet.unmanaged;
        let dns = written.dns.as_deref().filter(|_| !subnet.unmanaged).unwrap_or_default();
        subnet.dns = dns.split(',').filter_map(|server| server.trim().parse().ok()).collect();
    }
    Some(network)
}

fn indices_by_name<'n>(names: impl Iterator<Item = &'n str>) -> HashMap<&'n str, usize> {
    names.enumerate().map(|(index, name)| (name, index)).collect()
}

/// The hardware addresses of a build: unique, and the same each time the build is planned.
#[derive(Debug)]
pub(super) struct Macs<'m> {
    build: &'m str,
    taken: HashSet<MacAddress>,
}

impl<'m> Macs<'m> {
    /// Reserves all addresses that the manifest sets, including those in overrides.
    pub(super) fn new(build: &'m str, spec: &BuildSpec) -> Self {
        let base = spec.vms.iter().flat_map(|vm| &vm.nics);
        let overrides = spec.build_overrides.iter().flat_map(|overrides| &overrides.vms);
        let nics = base.chain(overrides.flat_map(|vm| &vm.nics));
        Self { build, taken: nics.filter_map(|nic| nic.mac.as_deref()?.parse().ok()).collect() }
    }

    fn derive(&mut self, vm: &str, nic: &str) -> MacAddress {
        let mut attempt = 0u32;
        loop {
            let text = format!("rudder/mac/v1\n{}\n{vm}\n{nic}\n{attempt}", self.build);
            let digest = Digest::of(text.as_bytes());
            let mut bytes = [0; 6];
            bytes.copy_from_slice(&digest.as_bytes()[..6]);
            // Locally administered, unicast (IEEE 802, clause 8.2): does not clash with a vendor's address.
            bytes[0] = bytes[0] & !0b01 | 0b10;
            let mac = MacAddress::new(bytes);
            if self.taken.insert(mac) {
                return mac;
            }
            attempt += 1;
        }
    }

    /// Plans the NICs of a VM: those in `written`, or a single one if there are none. `base` holds the same VM's NICs
    /// without overrides; those with the same name keep their hardware address, model and pinned slot.
    pub(super) fn plan_nics(
        &mut self,
        vm: &str,
        written: &[Nic],
        base: &[PlannedNic],
        network: &PlannedNetwork,
    ) -> Option<Vec<PlannedNic>> {
        let default = [Nic::default()];
        let written = if written.is_empty() { &default[..] } else { written };
        let names = names(written);
        let inherited = |name: &str| base.iter().find(|nic| nic.name == name);
        let pinned = |nic: &Nic, name: &str| {
            let of_base = inherited(name).filter(|base| base.slot_pinned).map(|base| base.slot);
            of_base.or_else(|| nic.slot.and_then(|slot| u8::try_from(slot).ok()))
        };
        let taken: HashSet<u8> =
            written.iter().zip(&names).filter_map(|(nic, name)| pinned(nic, name)).collect();
        let mut free = (1..=u8::MAX).filter(|slot| !taken.contains(slot));
        let mut planned = Vec::with_capacity(written.len());
        for (nic, name) in written.iter().zip(names) {
            let of_base = inherited(&name);
            let slot = pinned(nic, &name);
            let mac = match (of_base, nic.mac.as_deref()) {
                (Some(base), _) => base.mac,
                (None, Some(mac)) => mac.parse().ok()?,
                (None, None) => self.derive(vm, &name),
            };
            planned.push(PlannedNic {
                subnet: nic.subnet.clone().or_else(|| Some(network.subnets.first()?.name.clone()))?,
                slot_pinned: slot.is_some(),
                slot: slot.or_else(|| free.next())?,
                ip: match nic.ip.as_deref() {
                    Some(ip) => Some(ip.parse().ok()?),
                    None => None,
                },
                mac,
                model: match (of_base, nic.model.as_deref()) {
                    (Some(base), _) => base.model,
                    (None, Some(name)) => model(name)?,
                    (None, None) => NicModel::E1000,
                },
                name,
            });
        }
        Some(planned)
    }
}

/// Returns the names of NICs: the name in the manifest, else `nic1`, `nic2`… by position, or the next number that is
/// free.
fn names(nics: &[Nic]) -> Vec<String> {
    let mut taken: HashSet<String> = nics.iter().filter_map(|nic| nic.name.clone()).collect();
    let mut name = |(index, nic): (usize, &Nic)| match &nic.name {
        Some(name) => name.clone(),
        None => {
            let mut names = (index + 1..).map(|number| format!("nic{number}"));
            let name = names.find(|name| !taken.contains(name)).unwrap_or_default();
            taken.insert(name.clone());
            name
        }
    };
    nics.iter().enumerate().map(&mut name).collect()
}
