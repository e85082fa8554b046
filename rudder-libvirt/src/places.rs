//! Where the devices of a domain sit: at the same places as on raw QEMU (the table in rudder-qemu's `command_line`), so that a
//! guest finds its disks and cards there whichever of the two built its module.

use crate::xml::Xml;
use rudder_core::{Error, ErrorKind, Result, plan::Bus};

/// PCI slots.
pub(crate) mod place {
    pub(crate) const VGA: usize = 0x02;
    pub(crate) const SCSI: usize = 0x03;
    pub(crate) const AHCI: usize = 0x04;
    pub(crate) const XHCI: usize = 0x05;
    pub(crate) const RNG: usize = 0x06;
    pub(crate) const VIRTIO_DISKS: usize = 0x08;
    pub(crate) const CARDS: usize = 0x10;
    pub(crate) const SEED: usize = 0x1a;
}

/// Functions of a PCI device.
const FUNCTIONS: usize = 8;
/// Ports of an AHCI controller.
const AHCI_PORTS: usize = 6;
/// Ports of an xHCI controller that are used.
const XHCI_PORTS: usize = 8;
/// An address: the attributes of `address`.
pub(crate) type Address = Vec<(&'static str, String)>;

pub(crate) fn pci(slot: usize, function: usize, multifunction: bool) -> Address {
    let mut address = vec![
        ("type", "pci".to_owned()),
        ("domain", "0".to_owned()),
        ("bus", "0".to_owned()),
        ("slot", slot.to_string()),
        ("function", function.to_string()),
    ];
    if multifunction {
        address.push(("multifunction", "on".to_owned()));
    }
    address
}

fn drive(controller: usize, bus: usize, target: usize, unit: usize) -> Address {
    vec![
        ("type", "drive".to_owned()),
        ("controller", controller.to_string()),
        ("bus", bus.to_string()),
        ("target", target.to_string()),
        ("unit", unit.to_string()),
    ]
}

pub(crate) fn address(xml: &mut Xml, address: &Address) {
    let attributes: Vec<(&str, &str)> = address.iter().map(|(key, value)| (*key, value.as_str())).collect();
    xml.empty("address", &attributes);
}

fn bus_name(bus: Bus) -> &'static str {
    match bus {
        Bus::Virtio => "virtio",
        Bus::Scsi => "scsi",
        Bus::Sata => "sata",
        Bus::Usb => "usb",
        Bus::Ide => "ide",
    }
}

/// Where a disk sits.
#[derive(Debug)]
pub(crate) struct Place {
    /// The name that libvirt wants: `vda`, `sdb`. A guest may call it otherwise.
    pub(crate) target: String,
    /// As libvirt calls it.
    pub(crate) bus: &'static str,
    pub(crate) address: Address,
}

/// How many places of each bus are taken.
#[derive(Debug, Default)]
pub(crate) struct Places {
    /// Whether the chipset's own controller is one of SATA, and not of IDE.
    q35: bool,
    virtio: usize,
    scsi: usize,
    sata: usize,
    usb: usize,
    ide: usize,
    /// Names are given by prefix, which several buses share.
    names: [usize; 3],
}

impl Places {
    /// None is taken yet, on a `q35` or an older board.
    pub(crate) fn new(q35: bool) -> Self {
        Self { q35, ..Self::default() }
    }

    /// Units on the chipset's own disk controller: IDE's two channels of two, or six ports of SATA.
    pub(crate) fn units(&self) -> usize {
        if self.q35 { AHCI_PORTS } else { 4 }
    }

    /// The next place on a bus.
    pub(crate) fn take(&mut self, bus: Bus) -> Result<Place> {
        let (units, q35) = (self.units(), self.q35);
        let (counter, limit) = match bus {
            Bus::Virtio => (&mut self.virtio, FUNCTIONS * FUNCTIONS),
            Bus::Scsi => (&mut self.scsi, 64),
            Bus::Sata => (&mut self.sata, FUNCTIONS * AHCI_PORTS),
            Bus::Usb => (&mut self.usb, FUNCTIONS * XHCI_PORTS),
            Bus::Ide => (&mut self.ide, units),
        };
        let index = *counter;
        if index >= limit {
            let message = format!("expected at most {limit} disks on {}, but found more", bus_name(bus));
            return Err(
                Error::new(ErrorKind::InvalidInput, message).with_help("put the others on virtio or scsi")
            );
        }
        *counter += 1;
        let address = match bus {
            Bus::Virtio => pci(place::VIRTIO_DISKS + index % FUNCTIONS, index / FUNCTIONS, true),
            Bus::Scsi => drive(0, 0, index, 0),
            // The chipset's own comes first.
            Bus::Sata => drive(usize::from(q35) + index / AHCI_PORTS, 0, 0, index % AHCI_PORTS),
            Bus::Usb => vec![
                ("type", "usb".to_owned()),
                ("bus", (index / XHCI_PORTS).to_string()),
                ("port", (index % XHCI_PORTS + 1).to_string()),
            ],
            Bus::Ide if q35 => drive(0, 0, 0, index),
            Bus::Ide => drive(0, index / 2, 0, index % 2),
        };
        let bus = if bus == Bus::Ide && q35 { "sata" } else { bus_name(bus) };
        Ok(Place { target: self.name(bus), bus, address })
    }

    /// The next name of a disk: `vda` … `vdz`, `vdaa` …
    pub(crate) fn name(&mut self, bus: &str) -> String {
        let (prefix, index) = match bus {
            "virtio" => ("vd", 0),
            "ide" => ("hd", 2),
            _ => ("sd", 1),
        };
        let mut number = self.names[index];
        self.names[index] += 1;
        let mut letters = Vec::new();
        loop {
            letters.push(char::from(b'a' + (number % 26) as u8));
            match (number / 26).checked_sub(1) {
                Some(rest) => number = rest,
                None => break,
            }
        }
        format!("{prefix}{}", letters.iter().rev().collect::<String>())
    }

    /// The controllers of what was taken.
    pub(crate) fn controllers(&self, xml: &mut Xml) {
        let mut write =
            |kind: &str, index: usize, model: Option<&str>, ports: Option<usize>, at: Option<Address>| {
                let (index, ports) = (index.to_string(), ports.map(|ports| ports.to_string()));
                let mut attributes = vec![("type", kind), ("index", index.as_str())];
                attributes.extend(model.map(|model| ("model", model)));
                attributes.extend(ports.as_deref().map(|ports| ("ports", ports)));
                xml.element("controller", &attributes, |xml| {
                    if let Some(at) = &at {
                        address(xml, at);
                    }
                });
            };
        if self.scsi > 0 {
            write("scsi", 0, Some("virtio-scsi"), None, Some(pci(place::SCSI, 0, false)));
        }
        for index in 0..self.sata.div_ceil(AHCI_PORTS) {
            let number = usize::from(self.q35) + index;
            write("sata", number, None, None, Some(pci(place::AHCI, index, true)));
        }
        for index in 0..self.usb.div_ceil(XHCI_PORTS) {
            write("usb", index, Some("qemu-xhci"), Some(XHCI_PORTS), Some(pci(place::XHCI, index, true)));
        }
        if self.usb == 0 {
            write("usb", 0, Some("none"), None, None);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn disks_are_named_beyond_the_alphabet() {
        let mut places = Places::default();
        let names: Vec<String> = (0..64).map(|_| places.take(Bus::Virtio).unwrap().target).collect();
        assert_eq!((names[0].as_str(), names[25].as_str(), names[26].as_str()), ("vda", "vdz", "vdaa"));
        assert!(places.take(Bus::Virtio).unwrap_err().report().contains("at most 64 disks on virtio"));
        assert_eq!(places.take(Bus::Scsi).unwrap().target, "sda");
        assert_eq!(places.take(Bus::Sata).unwrap().target, "sdb");
        assert_eq!(places.take(Bus::Ide).unwrap().target, "hda");
    }
}
