//! Conversions between planned and template networks and NICs: a module stores those of its plan, and machines made
//! from a module get them back.

use super::{PlannedNetwork, PlannedNic, PlannedSubnet, PlannedVpc};
use crate::both_ways::both_ways;
use crate::module::{TemplateNetwork, TemplateNic, TemplateSubnet, TemplateVpc};

both_ways!(PlannedNic = TemplateNic { name, subnet, slot, slot_pinned, ip, mac, model });
both_ways!(PlannedNetwork = TemplateNetwork { declared; each vpcs, subnets });
both_ways!(PlannedVpc = TemplateVpc { name, internet });
both_ways!(PlannedSubnet = TemplateSubnet { name, vpc, cidr, dhcp, dns, unmanaged });
