//! The networks of a build, and the build overrides.

use super::{Nic, Resources, Unknown};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// VPCs and subnets; left out: one of each, DHCP, internet.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Network {
    /// Networks that do not reach each other.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub vpcs: Vec<Vpc>,
    /// Segments of VPCs.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub subnets: Vec<Subnet>,
    /// Keys that Rudder does not know.
    #[serde(flatten)]
    #[schemars(skip)]
    pub unknown: Unknown,
}

/// A private network.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Vpc {
    /// Required, unique, a Name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Whether its VMs reach the internet; default false.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub internet: Option<bool>,
    /// Keys that Rudder does not know.
    #[serde(flatten)]
    #[schemars(skip)]
    pub unknown: Unknown,
}

/// A segment of a VPC.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Subnet {
    /// Required, unique, a Name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Its VPC; left out, the automatic one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vpc: Option<String>,
    /// Required: the IPv4 network.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cidr: Option<String>,
    /// Whether addresses are handed out; default true.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dhcp: Option<bool>,
    /// Comma-separated addresses of DNS servers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dns: Option<String>,
    /// A bare layer-2 segment that a guest serves; default false.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unmanaged: Option<bool>,
    /// Keys that Rudder does not know.
    #[serde(flatten)]
    #[schemars(skip)]
    pub unknown: Unknown,
}

/// What is true during the build only.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct BuildOverrides {
    /// By the name of a VPC.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub vpcs: Vec<VpcOverride>,
    /// By the name of a subnet.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub subnets: Vec<SubnetOverride>,
    /// By the name of a VM.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub vms: Vec<VmOverride>,
    /// Keys that Rudder does not know.
    #[serde(flatten)]
    #[schemars(skip)]
    pub unknown: Unknown,
}

/// What differs for a VPC.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct VpcOverride {
    /// An existing VPC.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Whether its VMs reach the internet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub internet: Option<bool>,
    /// Keys that Rudder does not know.
    #[serde(flatten)]
    #[schemars(skip)]
    pub unknown: Unknown,
}

/// What differs for a subnet.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct SubnetOverride {
    /// An existing subnet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Whether a guest serves it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unmanaged: Option<bool>,
    /// Keys that Rudder does not know.
    #[serde(flatten)]
    #[schemars(skip)]
    pub unknown: Unknown,
}

/// What differs for a VM.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct VmOverride {
    /// An existing VM.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Cores and memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resources: Option<Resources>,
    /// All its cards; one with the name of a base card keeps that card's `mac`, `slot` and `model`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub nics: Vec<Nic>,
    /// Keys that Rudder does not know.
    #[serde(flatten)]
    #[schemars(skip)]
    pub unknown: Unknown,
}
