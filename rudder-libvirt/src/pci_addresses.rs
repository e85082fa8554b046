//! The addresses of a domain's devices in libvirt's notation. They match the locations that the QEMU backend uses
//! ([`rudder_local::pci_layout`]), so that a guest finds its disks and NICs there whichever backend built its module.

use crate::xml::Xml;
use rudder_core::{Result, hardware::Bus};
use rudder_local::pci_layout::{AHCI_PORTS, Chipset, Location, Locations, XHCI_PORTS, bus_name, slot};

/// The attributes of an `address` element.
pub(crate) type Address = Vec<(&'static str, String)>;

pub(crate) fn pci(slot: u8, function: usize, multifunction: bool) -> Address {
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

/// The location of a disk.
#[derive(Debug)]
pub(crate) struct DiskLocation {
    /// The name that libvirt requires: `vda`, `sdb`. The guest may use another one.
    pub(crate) target: String,
    /// The bus, in libvirt's terms.
    pub(crate) bus: &'static str,
    pub(crate) address: Address,
}

/// Assigns a location to each disk.
#[derive(Debug)]
pub(crate) struct DiskLocations {
    chipset: Chipset,
    locations: Locations,
    /// Number of names assigned per prefix; several buses share a prefix.
    names: [usize; 3],
}

impl DiskLocations {
    /// Returns an allocator with all locations free.
    pub(crate) fn new(chipset: Chipset) -> Self {
        Self { chipset, locations: Locations::new(chipset), names: [0; 3] }
    }

    /// Returns the number of the first additional SATA controller; the chipset's own, if it has one, is number 0.
    fn first_sata(&self) -> usize {
        usize::from(self.chipset == Chipset::Q35)
    }

    /// Takes the next location on a bus.
    pub(crate) fn take(&mut self, bus: Bus) -> Result<DiskLocation> {
        let on_sata = bus == Bus::Ide && self.chipset == Chipset::Q35;
        let address = match self.locations.take(bus)? {
            Location::Virtio { slot, function } => pci(slot, function, true),
            Location::Scsi { target } => drive(0, 0, target, 0),
            Location::Sata { controller, port } => drive(self.first_sata() + controller, 0, 0, port),
            Location::Usb { controller, port } => {
                vec![("type", "usb".to_owned()), ("bus", controller.to_string()), ("port", port.to_string())]
            }
            Location::Chipset { unit } if on_sata => drive(0, 0, 0, unit),
            Location::Chipset { unit } => drive(0, unit / 2, 0, unit % 2),
        };
        let bus = if on_sata { "sata" } else { bus_name(bus) };
        Ok(DiskLocation { target: self.name(bus), bus, address })
    }

    /// Returns the next name of a disk: `vda` … `vdz`, `vdaa` …
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

    /// Writes the controllers that the assigned locations need.
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
        if self.locations.used(Bus::Scsi) > 0 {
            write("scsi", 0, Some("virtio-scsi"), None, Some(pci(slot::SCSI, 0, false)));
        }
        for index in 0..self.locations.used(Bus::Sata).div_ceil(AHCI_PORTS) {
            let number = self.first_sata() + index;
            write("sata", number, None, None, Some(pci(slot::AHCI, index, true)));
        }
        for index in 0..self.locations.used(Bus::Usb).div_ceil(XHCI_PORTS) {
            write("usb", index, Some("qemu-xhci"), Some(XHCI_PORTS), Some(pci(slot::XHCI, index, true)));
        }
        if self.locations.used(Bus::Usb) == 0 {
            write("usb", 0, Some("none"), None, None);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn disk_names_continue_after_the_alphabet() {
        let mut locations = DiskLocations::new(Chipset::I440Fx);
        let names: Vec<String> = (0..64).map(|_| locations.take(Bus::Virtio).unwrap().target).collect();
        assert_eq!((names[0].as_str(), names[25].as_str(), names[26].as_str()), ("vda", "vdz", "vdaa"));
        assert!(locations.take(Bus::Virtio).unwrap_err().report().contains("at most 64 disks on virtio"));
        assert_eq!(locations.take(Bus::Scsi).unwrap().target, "sda");
        assert_eq!(locations.take(Bus::Sata).unwrap().target, "sdb");
        assert_eq!(locations.take(Bus::Ide).unwrap().target, "hda");
    }
}
