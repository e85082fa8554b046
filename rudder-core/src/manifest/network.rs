//! The networks of a build, and the build overrides.

use super::{Nic, Resources, Unknown};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// VPCs and subnets; by default one of each, with DHCP and internet access.
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
    /// Required: a unique Name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Whether the VMs of the VPC have internet access; default false.
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
    /// Required: a unique Name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The VPC of the subnet; by default the automatic one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vpc: Option<String>,
    /// Required: the IPv4 network.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cidr: Option<String>,
    /// Whether addresses are assigned over DHCP; default true.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dhcp: Option<bool>,
    /// Comma-separated addresses of DNS servers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dns: Option<String>,
    /// Whether the subnet is a bare layer-2 segment, on which a guest provides DHCP and DNS; default false.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unmanaged: Option<bool>,
    /// Keys that Rudder does not know.
    #[serde(flatten)]
    #[schemars(skip)]
    pub unknown: Unknown,
}

/// Settings that apply during the build only.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct BuildOverrides {
    /// Overrides of VPCs, by name.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub vpcs: Vec<VpcOverride>,
    /// Overrides of subnets, by name.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub subnets: Vec<SubnetOverride>,
    /// Overrides of VMs, by name.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub vms: Vec<VmOverride>,
    /// Keys that Rudder does not know.
    #[serde(flatten)]
    #[schemars(skip)]
    pub unknown: Unknown,
}

/// Overrides of a VPC.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct VpcOverride {
    /// An existing VPC.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Whether the VMs of the VPC have internet access.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub internet: Option<bool>,
    /// Keys that Rudder does not know.
    #[serde(flatten)]
    #[schemars(skip)]
    pub unknown: Unknown,
}

/// Overrides of a subnet.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct SubnetOverride {
    /// An existing subnet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Whether the subnet is unmanaged.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unmanaged: Option<bool>,
    /// Keys that Rudder does not know.
    #[serde(flatten)]
    #[schemars(skip)]
    pub unknown: Unknown,
}

/// Overrides of a VM.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct VmOverride {
    /// An existing VM.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Cores and memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resources: Option<Resources>,
    /// All NICs of the VM; one with the name of a base NIC keeps the `mac`, `slot` and `model` of that NIC.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub nics: Vec<Nic>,
    /// Keys that Rudder does not know.
    #[serde(flatten)]
    #[schemars(skip)]
    pub unknown: Unknown,
}
