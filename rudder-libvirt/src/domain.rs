//! The XML of a domain (<https://libvirt.org/formatdomain.html>): turns the description of a machine into what libvirt
//! defines, without touching the host.
//!
//! `pci_addresses` decides where its devices are attached, `devices` writes each of them. NICs that are not on a
//! network of libvirt are passed to QEMU as arguments, because libvirt does not support a stream of frames over a unix
//! socket.

use crate::{
    devices::{
        Disk, Serial, Tpm, Uefi, check_socket, write_disk, write_firmware, write_floppy, write_medium,
        write_nic, write_serial, write_tpm,
    },
    host_capabilities::HostCapabilities,
    label::Label,
    network::Nic,
    pci_addresses::{DiskLocation, DiskLocations, address, pci},
    xml::Xml,
};
use rudder_core::{Result, backend::LabId, hardware::Bus};
use rudder_local::{
    pci_layout::{Chipset, slot},
    store::LAB_VARIABLE,
};
use std::path::PathBuf;

/// The NICs of a domain.
#[derive(Debug)]
pub(crate) enum Nics {
    /// NICs on networks of libvirt.
    Bridged(Vec<Nic>),
    /// NICs defined by these QEMU arguments.
    Arguments(Vec<String>),
}

/// Everything that the XML of a domain is built from.
#[derive(Debug)]
pub(crate) struct Domain<'a> {
    pub(crate) name: &'a str,
    /// A title for people.
    pub(crate) title: &'a str,
    pub(crate) label: &'a Label,
    pub(crate) host_capabilities: &'a HostCapabilities,
    pub(crate) cpus: u32,
    /// Memory, in bytes.
    pub(crate) memory: u64,
    pub(crate) disks: Vec<Disk>,
    /// The chipset of the machine.
    pub(crate) chipset: Chipset,
    /// The bus of the CD-ROMs.
    pub(crate) cdrom_bus: Bus,
    /// The firmware with UEFI; `None` means BIOS.
    pub(crate) uefi: Option<Uefi>,
    pub(crate) tpm: Option<Tpm>,
    /// The images of the CD-ROMs, in order.
    pub(crate) cdroms: Vec<PathBuf>,
    pub(crate) floppy: Option<PathBuf>,
    pub(crate) seed: Option<PathBuf>,
    pub(crate) serial: Serial,
    pub(crate) nics: Nics,
    /// The user and group that the QEMU process runs as, where libvirt may choose; `None` leaves the choice to libvirt.
    pub(crate) owner: Option<(u32, u32)>,
    /// The lab whose removal also ends the process.
    pub(crate) lab: Option<&'a LabId>,
}

impl Domain<'_> {
    /// Returns the XML of the domain.
    ///
    /// # Errors
    /// `InvalidInput` when the machine cannot be assembled: too many disks on a bus, or a path that libvirt cannot
    /// represent.
    pub(crate) fn xml(&self) -> Result<String> {
        if let Serial::Socket(socket) = &self.serial {
            check_socket(socket)?;
        }
        if let Some(Tpm::At(socket)) = &self.tpm {
            check_socket(socket)?;
        }
        let mut locations = DiskLocations::new(self.chipset);
        let disks = self.disks.iter().map(|disk| locations.take(disk.bus)).collect::<Result<Vec<_>>>()?;
        let cdroms =
            self.cdroms.iter().map(|_| locations.take(self.cdrom_bus)).collect::<Result<Vec<_>>>()?;
        let seed = match (&self.seed, self.disks.first().map_or(Bus::Virtio, |disk| disk.bus)) {
            (None, _) => None,
            // On the bus of the boot disk, for which the guest has a driver; last, so that no disk moves.
            (Some(_), Bus::Virtio) => {
                let address = pci(slot::SEED, 0, false);
                Some((Bus::Virtio, DiskLocation { target: locations.name("virtio"), bus: "virtio", address }))
            }
            (Some(_), bus) => Some((bus, locations.take(bus)?)),
        };
        let mut xml = Xml::new();
        let namespace = ("xmlns:qemu", "http://libvirt.org/schemas/domain/qemu/1.0");
        xml.element("domain", &[("type", self.host_capabilities.kind), namespace], |xml| {
            self.machine(xml);
            xml.element("devices", &[], |xml| {
                xml.text("emulator", &[], &self.host_capabilities.emulator);
                for (index, (disk, location)) in self.disks.iter().zip(&disks).enumerate() {
                    write_disk(xml, disk, location, index == 0);
                }
                for (index, (image, location)) in self.cdroms.iter().zip(&cdroms).enumerate() {
                    // After the boot disk: firmware falls through to the CD-ROM if that disk is blank.
                    write_medium(xml, "cdrom", image, location, Some(index + 2));
                }
                if let Some(image) = &self.floppy {
                    write_floppy(xml, image);
                }
                if let (Some(path), Some((bus, location))) = (&self.seed, &seed) {
                    let device = if matches!(bus, Bus::Virtio | Bus::Usb) { "disk" } else { "cdrom" };
                    write_medium(xml, device, path, location, None);
                }
                locations.controllers(xml);
                self.devices(xml);
            });
            let arguments = match &self.nics {
                Nics::Arguments(arguments) => arguments.as_slice(),
                Nics::Bridged(_) => &[],
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
        self.chipset == Chipset::Q35
    }

    fn machine(&self, xml: &mut Xml) {
        xml.text("name", &[], self.name);
        xml.text("title", &[], self.title);
        self.label.write(xml);
        xml.text("memory", &[("unit", "KiB")], &(self.memory.div_ceil(1 << 20).max(1) << 10).to_string());
        let cpus = self.cpus.max(1).to_string();
        xml.text("vcpu", &[], &cpus);
        xml.element("os", &[], |xml| {
            // The older board is named as libvirt reported it; libvirt resolves the name of the other one by itself.
            let machine =
                if self.is_q35() { self.chipset.machine() } else { &self.host_capabilities.machine };
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
                xml.empty("smm", &[("state", if uefi.flash.smm { "on" } else { "off" })]);
            }
        });
        let topology = |xml: &mut Xml| {
            xml.empty("topology", &[("sockets", "1"), ("cores", &cpus), ("threads", "1")]);
        };
        match self.host_capabilities.cpu {
            Some(mode) => xml.element("cpu", &[("mode", mode)], topology),
            None => xml.element("cpu", &[], topology),
        }
        xml.empty("clock", &[("offset", "utc")]);
        if self.uefi.is_some() {
            // Suspending to RAM would interrupt what the firmware protects; no guest here needs it.
            xml.element("pm", &[], |xml| xml.empty("suspend-to-mem", &[("enabled", "no")]));
        }
        xml.text("on_poweroff", &[], "destroy");
        xml.text("on_reboot", &[], "restart");
        // Preserved until a screenshot is taken, which shows what happened.
        xml.text("on_crash", &[], "preserve");
        if let Some((user, group)) = self.owner {
            // The files already belong to this owner, and libvirt must not relabel them: other labs read the same
            // images.
            xml.element("seclabel", &[("type", "static"), ("model", "dac"), ("relabel", "no")], |xml| {
                xml.text("label", &[], &format!("+{user}:+{group}"));
            });
        }
    }

    fn devices(&self, xml: &mut Xml) {
        write_serial(xml, &self.serial);
        if let Nics::Bridged(nics) = &self.nics {
            for nic in nics {
                write_nic(xml, nic);
            }
        }
        // The display is only reachable through libvirt: no port is opened.
        xml.element("graphics", &[("type", "vnc"), ("sharePolicy", "force-shared")], |xml| {
            xml.empty("listen", &[("type", "none")]);
        });
        xml.element("video", &[], |xml| {
            xml.empty("model", &[("type", "vga")]);
            address(xml, &pci(slot::VGA, 0, false));
        });
        if let Some(tpm) = &self.tpm {
            write_tpm(xml, tpm);
        }
        xml.empty("memballoon", &[("model", "none")]);
        if self.host_capabilities.host.has_device("pvpanic") {
            xml.empty("panic", &[("model", "isa")]);
        }
        if self.host_capabilities.host.has_device("virtio-rng-pci") {
            xml.element("rng", &[("model", "virtio")], |xml| {
                xml.text("backend", &[("model", "random")], "/dev/urandom");
                address(xml, &pci(slot::RNG, 0, false));
            });
        }
    }
}
