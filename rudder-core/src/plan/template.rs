//! Conversions between planned and template networks and NICs: a module stores those of its plan, and machines made
//! from a module get them back.

use super::{PlannedNetwork, PlannedNic, PlannedSubnet, PlannedVpc};
use crate::module::{TemplateNetwork, TemplateNic, TemplateSubnet, TemplateVpc};

/// Implements `From` in both directions for structs with the same fields; fields after `each` are lists whose elements
/// are converted.
macro_rules! both_ways {
    ($planned:ident = $template:ident { $($same:ident),* $(; each $($list:ident),*)? }) => {
        both_ways!(@one $planned, $template, [$($same)*], [$($($list)*)?]);
        both_ways!(@one $template, $planned, [$($same)*], [$($($list)*)?]);
    };
    (@one $from:ident, $to:ident, [$($same:ident)*], [$($list:ident)*]) => {
        impl From<$from> for $to {
            fn from($from { $($same,)* $($list,)* }: $from) -> Self {
                Self { $($same,)* $($list: $list.into_iter().map(Into::into).collect(),)* }
            }
        }
    };
}

both_ways!(PlannedNic = TemplateNic { name, subnet, slot, slot_pinned, ip, mac, model });
both_ways!(PlannedNetwork = TemplateNetwork { declared; each vpcs, subnets });
both_ways!(PlannedVpc = TemplateVpc { name, internet });
both_ways!(PlannedSubnet = TemplateSubnet { name, vpc, cidr, dhcp, dns, unmanaged });
