//! The record of a network, for the process that runs it after its lab was kept.

use crate::lab_record;
use rudder_core::{
    Result,
    hardware::NicModel,
    plan::{PlannedNetwork, PlannedNic, PlannedSubnet, PlannedVpc},
    units::{Cidr, MacAddress},
};
use serde::{Deserialize, Serialize};
use std::{net::Ipv4Addr, path::Path};

/// The format version of the record; later versions are not read.
pub const FORMAT: u32 = 1;

/// The record of a network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct NetworkRecord {
    /// The format version.
    pub format: u32,
    /// The name of the lab.
    pub name: String,
    /// Its plan.
    #[serde(with = "NetworkEntry")]
    pub network: PlannedNetwork,
    /// Its machines.
    pub machines: Vec<MachineRecord>,
}

impl NetworkRecord {
    pub(crate) fn new(name: String, network: PlannedNetwork, machines: Vec<MachineRecord>) -> Self {
        Self { format: FORMAT, name, network, machines }
    }

    /// Reads a record; `path` is its location, for messages.
    ///
    /// # Errors
    /// `Unsupported` for a later format; `InvalidInput` for what is not a record.
    pub fn from_json(path: &Path, text: &[u8]) -> Result<Self> {
        let help = "install the rudder-helper of the version that kept the lab";
        lab_record::parse("network record", path, text, FORMAT, help)
    }
}

/// The record of a machine on a network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct MachineRecord {
    /// Its name.
    pub name: String,
    /// Its NICs, with their addresses.
    #[serde(with = "nics")]
    pub nics: Vec<PlannedNic>,
    /// The files, in the lab's directory, of the sockets on which QEMU listens for its NICs.
    pub sockets: Vec<String>,
    /// Ports of the guest, with the files of the sockets that lead to them.
    #[serde(rename = "doors")]
    pub port_forwards: Vec<(u16, String)>,
}

impl MachineRecord {
    pub(crate) fn new(nics: Vec<PlannedNic>, name: String) -> Self {
        Self { name, nics, sockets: Vec::new(), port_forwards: Vec::new() }
    }
}

/// The serialised form of a network, independent of the field names of a plan.
#[derive(Serialize, Deserialize)]
#[serde(remote = "PlannedNetwork")]
struct NetworkEntry {
    declared: bool,
    #[serde(with = "vpcs")]
    vpcs: Vec<PlannedVpc>,
    #[serde(with = "subnets")]
    subnets: Vec<PlannedSubnet>,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "PlannedVpc")]
struct VpcEntry {
    name: String,
    internet: bool,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "PlannedSubnet")]
struct SubnetEntry {
    name: String,
    vpc: String,
    cidr: Cidr,
    dhcp: bool,
    dns: Vec<Ipv4Addr>,
    unmanaged: bool,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "PlannedNic")]
struct NicEntry {
    name: String,
    subnet: String,
    slot: u8,
    slot_pinned: bool,
    ip: Option<Ipv4Addr>,
    mac: MacAddress,
    model: NicModel,
}

/// Implements a module for `#[serde(with)]` that reads and writes lists of a type as lists of its entry type.
macro_rules! lists {
    ($($visibility:vis $name:ident: $planned:ident as $entry:ident = $text:literal),*) => {$(
        $visibility mod $name {
            use super::{$entry, $planned};
            use serde::{Deserialize, Deserializer, Serialize, Serializer};

            #[derive(Deserialize)]
            struct Read(#[serde(with = $text)] $planned);

            #[derive(Serialize)]
            struct Written<'a>(#[serde(with = $text)] &'a $planned);

            pub(crate) fn serialize<S: Serializer>(list: &[$planned], to: S) -> Result<S::Ok, S::Error> {
                to.collect_seq(list.iter().map(Written))
            }

            pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<$planned>, D::Error> {
                Ok(Vec::<Read>::deserialize(from)?.into_iter().map(|read| read.0).collect())
            }
        }
    )*};
}

lists! {
    vpcs: PlannedVpc as VpcEntry = "VpcEntry",
    subnets: PlannedSubnet as SubnetEntry = "SubnetEntry",
    pub(crate) nics: PlannedNic as NicEntry = "NicEntry"
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use rudder_core::ErrorKind;

    /// A record as written by version 0.1.0. Never changed.
    const FORMAT_1: &str = r#"{
  "format": 1,
  "name": "web",
  "network": {
    "declared": true,
    "vpcs": [
      {
        "name": "office",
        "internet": true
      }
    ],
    "subnets": [
      {
        "name": "front",
        "vpc": "office",
        "cidr": "10.20.0.0/24",
        "dhcp": true,
        "dns": [
          "10.20.0.53"
        ],
        "unmanaged": false
      }
    ]
  },
  "machines": [
    {
      "name": "web",
      "nics": [
        {
          "name": "nic1",
          "subnet": "front",
          "slot": 3,
          "slot_pinned": true,
          "ip": "10.20.0.10",
          "mac": "52:54:00:12:34:56",
          "model": "e1000"
        },
        {
          "name": "nic2",
          "subnet": "front",
          "slot": 1,
          "slot_pinned": false,
          "ip": null,
          "mac": "02:a1:b2:c3:d4:e5",
          "model": "virtio"
        }
      ],
      "sockets": [
        "nic-0-0",
        "nic-0-1"
      ],
      "doors": [
        [
          22,
          "door-0-22"
        ]
      ]
    }
  ]
}"#;

    #[test]
    fn a_record_of_format_1_is_written_unchanged() {
        let record = NetworkRecord::from_json(Path::new("network.json"), FORMAT_1.as_bytes()).unwrap();
        assert_eq!(record.machines[0].nics[0].ip, Some(Ipv4Addr::new(10, 20, 0, 10)));
        assert_eq!(serde_json::to_string_pretty(&record).unwrap(), FORMAT_1);
    }

    #[test]
    fn a_record_of_a_later_format_is_refused() {
        let read = |text: &str| {
            NetworkRecord::from_json(Path::new("lab/network.json"), text.as_bytes()).unwrap_err()
        };
        let error = read("{\"format\": 2}");
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert_eq!(
            error.to_string(),
            "expected a network record of format 1 or earlier in lab/network.json, but found format 2"
        );
        assert_eq!(read("{\"format\": 1}").kind(), ErrorKind::InvalidInput);
    }
}
