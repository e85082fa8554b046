//! The XML of a domain (<https://libvirt.org/formatdomain.html>): from what a machine is made of to what libvirt defines.
//! Nothing here touches the host.
//!
//! Everything sits where it sits on raw QEMU (the table in rudder-qemu's `command_line`), so that a guest finds its disks
//! and cards at the same places whichever of the two built its module. Cards in the user
//! network are given to QEMU as arguments, because libvirt's own user network forwards no ports (its `portForward` needs
//! passt).

use crate::{label::Label, network::Card, offer::Offer, xml::Xml};
use rudder_core::{Error, ErrorKind, Result, backend::LabId, plan::Bus, store::LAB_VARIABLE};
use rudder_qemu::parts::Loader;
use std::path::{Path, PathBuf};

/// PCI slots.
mod place {
    pub(super) const VGA: usize = 0x02;
    pub(super) const SCSI: usize = 0x03;
    pub(super) const AHCI: usize = 0x04;
    pub(super) const XHCI: usize = 0x05;
    pub(super) const RNG: usize = 0x06;
    pub(super) const VIRTIO_DISKS: usize = 0x08;
    pub(super) const CARDS: usize = 0x10;
    pub(super) const SEED: usize = 0x1a;
}

/// Functions of a PCI device.
const FUNCTIONS: usize = 8;
/// Ports of an AHCI controller.
const AHCI_PORTS: usize = 6;
/// Ports of an xHCI controller that are used.
const XHCI_PORTS: usize = 8;
/// The longest path of a socket, in bytes (unix(7), without the closing zero).
const SOCKET_PATH: usize = 107;

/// A disk of a domain.
#[derive(Debug)]
pub(crate) struct Disk {
    /// Its file; absolute.
    pub(crate) path: PathBuf,
    pub(crate) bus: Bus,
    /// Whether what is written to it is thrown away when the domain ends.
    pub(crate) transient: bool,
}

/// Where the serial console goes.
#[derive(Debug)]
pub(crate) enum Serial {
    /// A socket, and a file with all that was written.
    Socket { socket: PathBuf, log: PathBuf },
    /// A terminal of libvirt's, for `virsh console`.
    Terminal,
}

/// The cards of a domain.
#[derive(Debug)]
pub(crate) enum Cards {
    /// In networks of libvirt's.
    Bridged(Vec<Card>),
    /// In QEMU's user network: its arguments.
    User(Vec<String>),
}

/// The firmware of a domain with UEFI.
#[derive(Debug)]
pub(crate) struct Uefi {
    pub(crate) loader: Loader,
    pub(crate) variables: Variables,
}

/// The variables of a domain's firmware.
#[derive(Debug)]
pub(crate) enum Variables {
    /// This file.
    Own(PathBuf),
    /// A copy of this file, which libvirt keeps.
    CopyOf(PathBuf),
}

/// The TPM of a domain.
#[derive(Debug)]
pub(crate) enum Tpm {
    /// Somebody listens on this socket.
    At(PathBuf),
    /// One that libvirt makes and keeps.
    OfLibvirt,
}

/// Everything that a domain is made of.
#[derive(Debug)]
pub(crate) struct Domain<'a> {
    pub(crate) name: &'a str,
    /// What people see of it.
    pub(crate) title: &'a str,
    pub(crate) label: &'a Label,
    pub(crate) offer: &'a Offer,
    pub(crate) cpus: u32,
    /// In bytes.
    pub(crate) memory: u64,
    pub(crate) disks: Vec<Disk>,
    /// QEMU's machine: `pc` or `q35`.
    pub(crate) board: &'static str,
    /// `None`: BIOS.
    pub(crate) uefi: Option<Uefi>,
    pub(crate) tpm: Option<Tpm>,
    /// Images of CD-ROMs, in order.
    pub(crate) cdroms: Vec<PathBuf>,
    pub(crate) floppy: Option<PathBuf>,
    pub(crate) seed: Option<PathBuf>,
    pub(crate) serial: Serial,
    pub(crate) cards: Cards,
    /// Whose rights its process has, where libvirt may choose; `None`: libvirt's choice.
    pub(crate) owner: Option<(u32, u32)>,
    /// The lab whose end ends its process.
    pub(crate) lab: Option<&'a LabId>,
}

impl Domain<'_> {
    /// As XML.
    ///
    /// # Errors
    /// `InvalidInput` when the machine cannot be put together: too many disks on a bus, a path that libvirt cannot hold.
    pub(crate) fn xml(&self) -> Result<String> {
        if let Serial::Socket { socket, .. } = &self.serial {
            check_socket(socket)?;
        }
        if let Some(Tpm::At(socket)) = &self.tpm {
            check_socket(socket)?;
        }
        let mut places = Places { q35: self.is_q35(), ..Places::default() };
        let disks = self.disks.iter().map(|disk| places.take(disk.bus)).collect::<Result<Vec<_>>>()?;
        let cdrom_bus = self.cdrom_bus(places.units());
        let cdroms = self.cdroms.iter().map(|_| places.take(cdrom_bus)).collect::<Result<Vec<_>>>()?;
        let seed = match (&self.seed, self.disks.first().map_or(Bus::Virtio, |disk| disk.bus)) {
            (None, _) => None,
            // On the bus of the boot disk, because the guest has a driver for that one; last, so that no disk moves.
            (Some(_), Bus::Virtio) => {
                let address = pci(place::SEED, 0, false);
                Some((Bus::Virtio, Place { target: places.name("virtio"), bus: "virtio", address }))
            }
            (Some(_), bus) => Some((bus, places.take(bus)?)),
        };
        let mut xml = Xml::new();
        let namespace = ("xmlns:qemu", "http://libvirt.org/schemas/domain/qemu/1.0");
        xml.element("domain", &[("type", self.offer.kind), namespace], |xml| {
            self.machine(xml);
            xml.element("devices", &[], |xml| {
                xml.text("emulator", &[], &self.offer.emulator);
                for (index, (disk, place)) in self.disks.iter().zip(&disks).enumerate() {
                    write_disk(xml, disk, place, index == 0);
                }
                for (index, (image, place)) in self.cdroms.iter().zip(&cdroms).enumerate() {
                    // Behind the boot disk: a blank one falls through to here.
                    write_medium(xml, "cdrom", image, place, Some(index + 2));
                }
                if let Some(image) = &self.floppy {
                    write_floppy(xml, image);
                }
                if let (Some(path), Some((bus, place))) = (&self.seed, &seed) {
                    let device = if matches!(bus, Bus::Virtio | Bus::Usb) { "disk" } else { "cdrom" };
                    write_medium(xml, device, path, place, None);
                }
                places.controllers(xml);
                self.devices(xml);
            });
            let arguments = match &self.cards {
                Cards::User(arguments) => arguments.as_slice(),
                Cards::Bridged(_) => &[],
            };
            if !arguments.is_empty() || self.lab.is_some() {
                xml.element("qemu:commandline", &[], |xml| {
                    for argument in arguments {
                        xml.empty("qemu:arg", &[("value", argument)]);
                    }
                    if let Some(lab) = self.lab {
                        xml.empty("qemu:env", &[("name", LAB_VARIABLE), ("value", lab.as_str())]);
                    }
                });
            }
        });
        Ok(xml.finish())
    }

    fn is_q35(&self) -> bool {
        self.board == "q35"
    }

    /// The bus of the CD-ROMs, IDE meaning the chipset's own controller: one for all, so that the guest finds them in order.
    fn cdrom_bus(&self, units: usize) -> Bus {
        let disks = self.disks.iter().filter(|disk| disk.bus == Bus::Ide).count();
        // The seed is there, too, when the boot disk is.
        let seed = self.seed.is_some() && self.disks.first().is_some_and(|disk| disk.bus == Bus::Ide);
        if disks + usize::from(seed) + self.cdroms.len() <= units { Bus::Ide } else { Bus::Sata }
    }

    fn machine(&self, xml: &mut Xml) {
        xml.text("name", &[], self.name);
        xml.text("title", &[], self.title);
        self.label.write(xml);
        xml.text("memory", &[("unit", "KiB")], &(self.memory.div_ceil(1 << 20).max(1) << 10).to_string());
        let cpus = self.cpus.max(1).to_string();
        xml.text("vcpu", &[], &cpus);
        xml.element("os", &[], |xml| {
            // The older board by the name that libvirt said it has; the other one it finds out itself.
            let machine = if self.is_q35() { self.board } else { &self.offer.machine };
            xml.text("type", &[("arch", "x86_64"), ("machine", machine)], "hvm");
            if let Some(uefi) = &self.uefi {
                write_firmware(xml, uefi);
            }
        });
        xml.element("features", &[], |xml| {
            xml.empty("acpi", &[]);
            xml.empty("apic", &[]);
            xml.empty("vmport", &[("state", "off")]);
            if let Some(uefi) = &self.uefi {
                xml.empty("smm", &[("state", if uefi.loader.smm { "on" } else { "off" })]);
            }
        });
        let topology = |xml: &mut Xml| {
            xml.empty("topology", &[("sockets", "1"), ("cores", &cpus), ("threads", "1")]);
        };
        match self.offer.cpu {
            Some(mode) => xml.element("cpu", &[("mode", mode)], topology),
            None => xml.element("cpu", &[], topology),
        }
        xml.empty("clock", &[("offset", "utc")]);
        if self.uefi.is_some() {
            // Sleep would leave the firmware in the middle of what it guards; no guest here has a use for it.
            xml.element("pm", &[], |xml| xml.empty("suspend-to-mem", &[("enabled", "no")]));
        }
        xml.text("on_poweroff", &[], "destroy");
        xml.text("on_reboot", &[], "restart");
        // Looked at before it is ended: the picture of a panic says what happened.
        xml.text("on_crash", &[], "preserve");
        if let Some((user, group)) = self.owner {
            // The files are its owner's already, and stay so: other labs read the same images.
            xml.element("seclabel", &[("type", "static"), ("model", "dac"), ("relabel", "no")], |xml| {
                xml.text("label", &[], &format!("+{user}:+{group}"));
            });
        }
    }

    fn devices(&self, xml: &mut Xml) {
        match &self.serial {
            Serial::Socket { socket, log } => xml.element("serial", &[("type", "unix")], |xml| {
                xml.empty("source", &[("mode", "bind"), ("path", &text(socket))]);
                xml.empty("log", &[("file", &text(log)), ("append", "off")]);
                xml.empty("target", &[("port", "0")]);
            }),
            Serial::Terminal => {
                xml.element("serial", &[("type", "pty")], |xml| xml.empty("target", &[("port", "0")]));
            }
        }
        if let Cards::Bridged(cards) = &self.cards {
            for card in cards {
                write_card(xml, card);
            }
        }
        // Reached through libvirt alone: nothing listens.
        xml.element("graphics", &[("type", "vnc"), ("sharePolicy", "force-shared")], |xml| {
            xml.empty("listen", &[("type", "none")]);
        });
        xml.element("video", &[], |xml| {
            xml.empty("model", &[("type", "vga")]);
            address(xml, &pci(place::VGA, 0, false));
        });
        if let Some(tpm) = &self.tpm {
            write_tpm(xml, tpm);
        }
        xml.empty("memballoon", &[("model", "none")]);
        if self.offer.host.has_device("pvpanic") {
            xml.empty("panic", &[("model", "isa")]);
        }
        if self.offer.host.has_device("virtio-rng-pci") {
            xml.element("rng", &[("model", "virtio")], |xml| {
                xml.text("backend", &[("model", "random")], "/dev/urandom");
                address(xml, &pci(place::RNG, 0, false));
            });
        }
    }
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

fn check_socket(path: &Path) -> Result<()> {
    let length = path.as_os_str().len();
    if length <= SOCKET_PATH {
        return Ok(());
    }
    let message = format!(
        "expected a path of at most {SOCKET_PATH} bytes for a socket, but found {length}: {}",
        path.display()
    );
    Err(Error::new(ErrorKind::InvalidInput, message).with_help("use a store with a shorter path"))
}

/// An address: the attributes of `address`.
type Address = Vec<(&'static str, String)>;

fn pci(slot: usize, function: usize, multifunction: bool) -> Address {
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

fn address(xml: &mut Xml, address: &Address) {
    let attributes: Vec<(&str, &str)> = address.iter().map(|(key, value)| (*key, value.as_str())).collect();
    xml.empty("address", &attributes);
}

fn write_disk(xml: &mut Xml, disk: &Disk, place: &Place, boots: bool) {
    xml.element("disk", &[("type", "file"), ("device", "disk")], |xml| {
        // A lab's disks are thrown away when the host crashes: no flush has to reach its platters. Paused rather than
        // told to the guest: the host's trouble would look like a broken disk there.
        xml.empty(
            "driver",
            &[
                ("name", "qemu"),
                ("type", "qcow2"),
                ("cache", "unsafe"),
                ("error_policy", "stop"),
                ("rerror_policy", "stop"),
                ("discard", "unmap"),
                ("detect_zeroes", "unmap"),
            ],
        );
        xml.empty("source", &[("file", &text(&disk.path))]);
        xml.empty("target", &[("dev", &place.target), ("bus", place.bus)]);
        if disk.transient {
            // With a shared backing file it is opened for reading only, but plugged in late, which not every bus can do.
            let shared = matches!(disk.bus, Bus::Virtio | Bus::Scsi | Bus::Usb);
            xml.empty("transient", if shared { &[("shareBacking", "yes")] } else { &[] });
        }
        if boots {
            xml.empty("boot", &[("order", "1")]);
        }
        address(xml, &place.address);
    });
}

/// A medium that nobody writes to.
fn write_medium(xml: &mut Xml, device: &str, path: &Path, place: &Place, order: Option<usize>) {
    xml.element("disk", &[("type", "file"), ("device", device)], |xml| {
        xml.empty("driver", &[("name", "qemu"), ("type", "raw")]);
        xml.empty("source", &[("file", &text(path))]);
        xml.empty("target", &[("dev", &place.target), ("bus", place.bus)]);
        xml.empty("readonly", &[]);
        if let Some(order) = order {
            xml.empty("boot", &[("order", &order.to_string())]);
        }
        address(xml, &place.address);
    });
}

fn write_floppy(xml: &mut Xml, path: &Path) {
    xml.element("disk", &[("type", "file"), ("device", "floppy")], |xml| {
        xml.empty("driver", &[("name", "qemu"), ("type", "raw")]);
        xml.empty("source", &[("file", &text(path))]);
        xml.empty("target", &[("dev", "fda"), ("bus", "fdc")]);
    });
}

fn write_firmware(xml: &mut Xml, uefi: &Uefi) {
    let mut attributes = vec![("readonly", "yes"), ("type", "pflash")];
    if uefi.loader.smm {
        attributes.push(("secure", "yes"));
    }
    // Raw is what libvirt takes for granted; older ones know nothing else.
    if uefi.loader.format != "raw" {
        attributes.push(("format", &uefi.loader.format));
    }
    xml.text("loader", &attributes, &text(&uefi.loader.code));
    match &uefi.variables {
        Variables::Own(path) => xml.text("nvram", &[], &text(path)),
        Variables::CopyOf(path) => xml.empty("nvram", &[("template", &text(path))]),
    }
}

fn write_tpm(xml: &mut Xml, tpm: &Tpm) {
    xml.element("tpm", &[("model", "tpm-crb")], |xml| match tpm {
        Tpm::At(socket) => xml.element("backend", &[("type", "external")], |xml| {
            xml.empty("source", &[("type", "unix"), ("mode", "connect"), ("path", &text(socket))]);
        }),
        Tpm::OfLibvirt => xml.empty("backend", &[("type", "emulator"), ("version", "2.0")]),
    });
}

fn write_card(xml: &mut Xml, card: &Card) {
    xml.element("interface", &[("type", "network")], |xml| {
        xml.empty("mac", &[("address", &card.mac)]);
        xml.empty("source", &[("network", &card.network)]);
        xml.empty("model", &[("type", card.model)]);
        // Without a boot ROM: nothing boots from the network, and loading it takes time.
        xml.empty("rom", &[("enabled", "no")]);
        address(xml, &pci(place::CARDS + usize::from(card.slot), 0, false));
    });
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
struct Place {
    /// The name that libvirt wants: `vda`, `sdb`. A guest may call it otherwise.
    target: String,
    /// As libvirt calls it.
    bus: &'static str,
    address: Address,
}

/// How many places of each bus are taken.
#[derive(Debug, Default)]
struct Places {
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
    /// Units on the chipset's own disk controller: IDE's two channels of two, or six ports of SATA.
    fn units(&self) -> usize {
        if self.q35 { AHCI_PORTS } else { 4 }
    }

    /// The next place on a bus.
    fn take(&mut self, bus: Bus) -> Result<Place> {
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
    fn name(&mut self, bus: &str) -> String {
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
    fn controllers(&self, xml: &mut Xml) {
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

    #[test]
    fn a_path_that_is_too_long_for_a_socket_is_refused() {
        assert!(check_socket(Path::new("/short")).is_ok());
        let error = check_socket(Path::new(&"/long".repeat(40))).unwrap_err();
        assert!(error.report().contains("shorter path"), "{}", error.report());
    }
}
