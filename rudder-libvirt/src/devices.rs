//! The devices of a domain, as XML: disks and media, firmware, the serial console, the TPM and NICs.

use crate::{
    network::Nic,
    pci_addresses::{DiskLocation, address, pci},
    xml::Xml,
};
use rudder_core::{Error, ErrorKind, Result, hardware::Bus};
use rudder_local::{machine_state::Flash, pci_layout::slot};
use std::path::{Path, PathBuf};

/// The longest path of a socket, in bytes (unix(7), without the terminating NUL).
const SOCKET_PATH: usize = 107;

/// A disk of a domain.
#[derive(Debug)]
pub(crate) struct Disk {
    /// The absolute path of its image.
    pub(crate) path: PathBuf,
    pub(crate) bus: Bus,
    /// Whether writes to it are discarded when the domain ends.
    pub(crate) transient: bool,
}

/// The host side of the serial console.
#[derive(Debug)]
pub(crate) enum Serial {
    /// A socket. Libvirt's own log is not used: without its log daemon, it grows for as long as the guest writes.
    Socket(PathBuf),
    /// A terminal that libvirt allocates, for `virsh console`.
    Terminal,
}

/// The firmware of a domain with UEFI.
#[derive(Debug)]
pub(crate) struct Uefi {
    pub(crate) flash: Flash,
    pub(crate) variables: Variables,
}

/// The file of the firmware's variables.
#[derive(Debug)]
pub(crate) enum Variables {
    /// This file itself.
    Own(PathBuf),
    /// A copy of this file, which libvirt creates and keeps.
    CopyOf(PathBuf),
}

/// The TPM of a domain.
#[derive(Debug)]
pub(crate) enum Tpm {
    /// A TPM process that already listens on this socket.
    At(PathBuf),
    /// A TPM that libvirt starts and keeps.
    OfLibvirt,
}

pub(crate) fn write_serial(xml: &mut Xml, serial: &Serial) {
    match serial {
        Serial::Socket(socket) => xml.element("serial", &[("type", "unix")], |xml| {
            xml.empty("source", &[("mode", "bind"), ("path", &text(socket))]);
            xml.empty("target", &[("port", "0")]);
        }),
        Serial::Terminal => {
            xml.element("serial", &[("type", "pty")], |xml| xml.empty("target", &[("port", "0")]));
        }
    }
}

pub(crate) fn write_disk(xml: &mut Xml, disk: &Disk, location: &DiskLocation, boots: bool) {
    xml.element("disk", &[("type", "file"), ("device", "disk")], |xml| {
        // The disks of a lab are discarded when the host crashes, so no flush has to reach the physical disk. An I/O
        // error pauses the machine instead of being reported to the guest, where a problem of the host would look like
        // a broken disk.
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
        xml.empty("target", &[("dev", &location.target), ("bus", location.bus)]);
        if disk.transient {
            // With a shared backing file the image is opened read-only, but the disk is hot-plugged, which not every
            // bus supports.
            let shared = matches!(disk.bus, Bus::Virtio | Bus::Scsi | Bus::Usb);
            xml.empty("transient", if shared { &[("shareBacking", "yes")] } else { &[] });
        }
        if boots {
            xml.empty("boot", &[("order", "1")]);
        }
        address(xml, &location.address);
    });
}

/// Writes a read-only medium.
pub(crate) fn write_medium(
    xml: &mut Xml,
    device: &str,
    path: &Path,
    location: &DiskLocation,
    order: Option<usize>,
) {
    xml.element("disk", &[("type", "file"), ("device", device)], |xml| {
        xml.empty("driver", &[("name", "qemu"), ("type", "raw")]);
        xml.empty("source", &[("file", &text(path))]);
        xml.empty("target", &[("dev", &location.target), ("bus", location.bus)]);
        xml.empty("readonly", &[]);
        if let Some(order) = order {
            xml.empty("boot", &[("order", &order.to_string())]);
        }
        address(xml, &location.address);
    });
}

pub(crate) fn write_floppy(xml: &mut Xml, path: &Path) {
    xml.element("disk", &[("type", "file"), ("device", "floppy")], |xml| {
        xml.empty("driver", &[("name", "qemu"), ("type", "raw")]);
        xml.empty("source", &[("file", &text(path))]);
        xml.empty("target", &[("dev", "fda"), ("bus", "fdc")]);
    });
}

pub(crate) fn write_firmware(xml: &mut Xml, uefi: &Uefi) {
    let mut attributes = vec![("readonly", "yes"), ("type", "pflash")];
    if uefi.flash.smm {
        attributes.push(("secure", "yes"));
    }
    // Raw is libvirt's default, and the only format that older versions know.
    if uefi.flash.code.format != "raw" {
        attributes.push(("format", &uefi.flash.code.format));
    }
    xml.text("loader", &attributes, &text(&uefi.flash.code.path));
    match &uefi.variables {
        Variables::Own(path) => xml.text("nvram", &[], &text(path)),
        Variables::CopyOf(path) => xml.empty("nvram", &[("template", &text(path))]),
    }
}

pub(crate) fn write_tpm(xml: &mut Xml, tpm: &Tpm) {
    xml.element("tpm", &[("model", "tpm-crb")], |xml| match tpm {
        Tpm::At(socket) => xml.element("backend", &[("type", "external")], |xml| {
            xml.empty("source", &[("type", "unix"), ("mode", "connect"), ("path", &text(socket))]);
        }),
        Tpm::OfLibvirt => xml.empty("backend", &[("type", "emulator"), ("version", "2.0")]),
    });
}

pub(crate) fn write_nic(xml: &mut Xml, nic: &Nic) {
    xml.element("interface", &[("type", "network")], |xml| {
        xml.empty("mac", &[("address", &nic.mac)]);
        xml.empty("source", &[("network", &nic.network)]);
        xml.empty("model", &[("type", nic.model)]);
        // No boot ROM: nothing boots from the network, and loading the ROM takes time.
        xml.empty("rom", &[("enabled", "no")]);
        address(xml, &pci(slot::NICS + nic.slot, 0, false));
    });
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

pub(crate) fn check_socket(path: &Path) -> Result<()> {
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_path_that_is_too_long_for_a_socket_is_refused() {
        assert!(check_socket(Path::new("/short")).is_ok());
        let error = check_socket(Path::new(&"/long".repeat(40))).unwrap_err();
        assert!(error.report().contains("shorter path"), "{}", error.report());
    }
}
