//! The command line of a machine: from what a machine is made of to QEMU's arguments. Nothing here touches the host.
//!
//! # Where everything sits
//! With BIOS, the machine is QEMU's `pc` (i440FX, 1996): every card and disk of the manifest has a place on it that guests of
//! all ages find. With UEFI it is `q35` (ICH9, 2007), for which UEFI and its system management mode are made; but where
//! there are IDE disks, which only the older chipset has. On either, all is on one PCI bus with fixed addresses, so that what
//! a guest saw in a build is at the same place in a clone:
//!
//! | address | what |
//! |---|---|
//! | 00, 01 (`pc`) or 00, 1f (`q35`) | the chipset: host bridge, ISA bridge with the controller of floppies, IDE or SATA, ACPI |
//! | 02 | VGA |
//! | 03 | the SCSI controller (virtio-scsi), if there are scsi disks |
//! | 04 | SATA controllers (AHCI), six disks each, one per function |
//! | 05 | the USB controllers (xHCI), eight disks each, one per function |
//! | 06 | the random number generator |
//! | 08–0f | virtio disks: the first eight on function 0, the next on function 1 … |
//! | 11–19 | the cards: slot 1–9 of the manifest |
//! | 1a | the seed |
//!
//! CD-ROMs are on the chipset's own controller, behind the disks there, or all of them on SATA where they would not fit.
//! What boots is the first disk; one that does not boot falls through to the CD-ROMs, in order.
//!
//! Text of a manifest is in one place only, the name of the process, and goes through [`escape`]. File names are ours.

mod cards;
mod chipset;
mod disks;

pub use self::cards::{nic_arguments, user_nic_arguments};
pub(crate) use self::chipset::Chipset;

use crate::{accelerator::Chosen, state::Flash};
use rudder_core::{
    Result,
    backend::MachineSpec,
    plan::{Bus, PlannedNetwork},
};
use serde_json::json;

/// PCI addresses, see the table above.
mod place {
    pub(super) const VGA: u8 = 0x02;
    pub(super) const SCSI: u8 = 0x03;
    pub(super) const AHCI: u8 = 0x04;
    pub(super) const XHCI: u8 = 0x05;
    pub(super) const RNG: u8 = 0x06;
    pub(super) const VIRTIO_DISKS: u8 = 0x08;
    pub(super) const CARDS: u8 = 0x10;
    pub(super) const SEED: u8 = 0x1a;
}

/// The names of a machine's files, relative to the directory of its lab.
#[derive(Debug, Clone)]
pub(crate) struct Files {
    /// Of the control socket.
    pub(crate) qmp: String,
    /// Of the display's socket.
    pub(crate) display: String,
    /// Of the serial console's socket, which serves one client at a time.
    pub(crate) serial: String,
    /// Of the socket on which people share the serial console.
    pub(crate) console: String,
    /// Of the end of what the guest wrote on its serial console.
    pub(crate) serial_log: String,
    /// Of what QEMU says.
    pub(crate) log: String,
    /// Of the seed's medium.
    pub(crate) seed: String,
    /// Of the floppy.
    pub(crate) floppy: String,
    /// Of the last picture of the screen.
    pub(crate) picture: String,
    /// Of the firmware's variables.
    pub(crate) variables: String,
    /// Of the directory of the TPM's state.
    pub(crate) tpm: String,
    /// Of the TPM's control socket.
    pub(crate) tpm_socket: String,
    /// Of what swtpm says.
    pub(crate) tpm_log: String,
    /// What the names of captured state begin with.
    pub(crate) captured: String,
    /// Of the sockets of its NICs.
    pub(crate) nics: Vec<String>,
}

impl Files {
    /// The files of the machine of this number. Short, because a socket's path has at most 107 bytes (unix(7)).
    pub(crate) fn new(number: usize) -> Self {
        let file = |suffix: &str| format!("m{number}.{suffix}");
        Self {
            qmp: file("qmp"),
            display: file("vnc"),
            serial: file("serial"),
            console: file("console"),
            serial_log: file("serial.log"),
            log: file("qemu.log"),
            seed: file("seed.img"),
            floppy: file("floppy.img"),
            picture: file("screen.png"),
            variables: file("variables"),
            tpm: file("tpm"),
            tpm_socket: file("tpm.ctrl"),
            tpm_log: file("tpm.log"),
            captured: file("captured"),
            nics: (0..MOST_NICS).map(|index| nic_socket(number, index)).collect(),
        }
    }
}

/// NICs of a machine at most: each has a slot of its own.
const MOST_NICS: usize = 9;

/// The file of the socket of a NIC, on which QEMU listens.
pub(crate) fn nic_socket(number: usize, index: usize) -> String {
    format!("m{number}.n{index}")
}

/// Everything that the command line is made of.
#[derive(Debug)]
pub(crate) struct Machine<'a> {
    /// The mark by which its process is known: contains the id of the lab.
    pub(crate) mark: &'a str,
    pub(crate) spec: &'a MachineSpec,
    pub(crate) network: &'a PlannedNetwork,
    pub(crate) files: &'a Files,
    pub(crate) accelerator: Chosen,
    /// The flash memory of a machine with UEFI.
    pub(crate) flash: Option<&'a Flash>,
}

/// A value inside a QEMU option: commas are doubled (qemu(1), "-drive"), and nothing else is special.
pub(crate) fn escape(value: &str) -> String {
    value.replace(',', ",,")
}

/// The devices that this machine needs besides the chipset's, by the names QEMU has for them.
pub(crate) fn devices(spec: &MachineSpec) -> Vec<&'static str> {
    let mut devices = vec!["VGA"];
    for disk in &spec.disks {
        devices.extend(match disk.bus {
            Bus::Virtio => ["virtio-blk-pci"].as_slice(),
            Bus::Scsi => &["virtio-scsi-pci", "scsi-hd"],
            Bus::Sata => &["ich9-ahci", "ide-hd"],
            Bus::Usb => &["qemu-xhci", "usb-storage"],
            Bus::Ide => &["ide-hd"],
        });
    }
    if !spec.cdroms.is_empty() {
        devices.push("ide-cd");
        devices.extend((disks::cdrom_bus(spec) == Bus::Sata).then_some("ich9-ahci"));
    }
    if spec.floppy.is_some() {
        devices.push("floppy");
        devices.extend(Chipset::of(spec).floppies());
    }
    devices.extend(spec.nics.iter().map(|nic| cards::driver(nic.model)));
    if spec.tpm {
        devices.push(TPM);
    }
    devices.dedup();
    devices
}

/// The interface of a TPM: the command response buffer of "TCG PC Client Platform TPM Profile", which firmware and guests of
/// all kinds have drivers for.
const TPM: &str = "tpm-crb";

/// Optional devices: used where this QEMU has them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Extras {
    /// `pvpanic`: tells when the guest's kernel panics.
    pub(crate) panic: bool,
    /// `virtio-rng-pci`: entropy, without which old guests wait at boot.
    pub(crate) random: bool,
}

/// The arguments.
///
/// # Errors
/// `InvalidInput` when the machine cannot be put together: too many disks on a bus, a card in no subnet.
pub(crate) fn arguments(machine: &Machine<'_>, extras: Extras) -> Result<Vec<String>> {
    let Machine { mark, spec, files, .. } = machine;
    let chipset = Chipset::of(spec);
    let mut line = Line { words: Vec::new(), chipset };
    let name = format!("{mark}/{}", spec.name);
    line.option("-name", format!("guest={0},process={1}", escape(&name), escape("rudder-vm")));
    line.flag("-nodefaults");
    line.flag("-no-user-config");
    let mut board = format!("{},usb=off,vmport=off,dump-guest-core=off,mem-merge=off", chipset.machine());
    if let Some(flash) = machine.flash {
        board.push_str(",pflash0=firmware,pflash1=variables");
        board.push_str(if flash.smm { ",smm=on" } else { ",smm=off" });
    }
    line.option("-machine", board);
    if let Some(flash) = machine.flash {
        line.flash(flash, files);
    }
    match machine.accelerator {
        Chosen::Kvm => {
            line.option("-accel", "kvm");
            line.option("-cpu", "host");
        }
        Chosen::Tcg => {
            line.option("-accel", "tcg,thread=multi");
            line.option("-cpu", "max");
        }
    }
    line.option("-smp", format!("cpus={0},sockets=1,cores={0},threads=1", spec.cpus.max(1)));
    line.option("-m", format!("{}M", spec.memory.div_ceil(1 << 20).max(1)));
    line.option("-rtc", "base=utc");
    // Only what was asked for is booted, and the first disk is asked for.
    line.option("-boot", "strict=on,menu=off");
    line.option("-action", "panic=pause,shutdown=poweroff,reboot=reset");
    line.option("-msg", "timestamp=on");
    line.option("-display", "none");
    line.option("-vnc", format!("unix:{},share=force-shared,key-delay-ms=0", files.display));
    let vga = line.device("VGA", place::VGA, 0);
    line.option("-device", vga);
    line.option("-chardev", format!("socket,id=qmp,path={},server=on,wait=off", files.qmp));
    line.option("-mon", "chardev=qmp,mode=control");
    line.option(
        "-chardev",
        // No log of QEMU's: it grows for as long as the guest writes.
        format!("socket,id=serial,path={},server=on,wait=off", files.serial),
    );
    line.option("-serial", "chardev:serial");
    if extras.panic {
        line.option("-device", "pvpanic");
    }
    if extras.random {
        line.option("-object", "rng-random,id=rng,filename=/dev/urandom");
        let random = line.device("virtio-rng-pci", place::RNG, 0);
        line.option("-device", format!("{random},rng=rng"));
    }
    if spec.tpm {
        line.option("-chardev", format!("socket,id=tpm,path={}", files.tpm_socket));
        line.option("-tpmdev", "emulator,id=tpm0,chardev=tpm");
        line.option("-device", format!("{TPM},tpmdev=tpm0"));
    }
    disks::attach(&mut line, spec, files)?;
    cards::attach(&mut line, spec, machine.network, &files.nics)?;
    // Nothing runs before its events are heard.
    line.flag("-S");
    Ok(line.words)
}

struct Line {
    words: Vec<String>,
    chipset: Chipset,
}

impl Line {
    fn flag(&mut self, flag: &str) {
        self.words.push(flag.to_owned());
    }

    fn option(&mut self, option: &str, value: impl Into<String>) {
        self.words.push(option.to_owned());
        self.words.push(value.into());
    }

    /// A block device in QEMU's JSON form, in which nothing needs escaping but what JSON escapes.
    fn blockdev(&mut self, value: &serde_json::Value) {
        self.option("-blockdev", value.to_string());
    }

    /// A device at a place of the PCI bus.
    fn device(&self, driver: &str, address: u8, function: usize) -> String {
        format!("{driver},bus={},addr={address:02x}.{function}", self.chipset.bus())
    }

    /// A controller with more than one function says so on each.
    fn controller(&self, driver: &str, address: u8, function: usize) -> String {
        format!("{},multifunction=on", self.device(driver, address, function))
    }

    /// The two pieces of flash memory: the firmware's program, and its variables.
    fn flash(&mut self, flash: &Flash, files: &Files) {
        self.blockdev(&json!({
            "node-name": "firmware",
            "driver": flash.code.format,
            "read-only": true,
            "file": {"driver": "file", "filename": flash.code.path, "read-only": true},
        }));
        self.blockdev(&json!({
            "node-name": "variables",
            "driver": flash.variables,
            "file": {"driver": "file", "filename": files.variables},
        }));
        if flash.smm {
            // Only in system management mode are the variables written to.
            self.option("-global", "driver=cfi.pflash01,property=secure,value=on");
        }
        // Sleep would leave the firmware in the middle of what it guards; no guest here has a use for it.
        self.option("-global", format!("{}.disable_s3=1", self.chipset.power()));
    }
}

#[cfg(test)]
mod tests;
