//! The command line of a machine: turns the description of a machine into QEMU's arguments, without touching the host.
//!
//! [`rudder_local::pci_layout`] decides where each device is attached.
//!
//! Text from a manifest appears in one argument only, the name of the process, and goes through
//! [`escape`](rudder_local::process::escape). File names are chosen by Rudder.

mod disks;

use rudder_core::{Result, backend::MachineSpec, hardware::Bus, plan::PlannedNetwork};
use rudder_local::{
    accelerator::Chosen,
    machine::{FLOPPY, SEED, SERIAL},
    machine_state::Flash,
    nic_arguments::{driver, nic_arguments, nic_socket},
    pci_layout::{Chipset, cdrom_bus, slot},
    process::escape,
};
use serde_json::json;

/// The control socket.
pub(crate) const QMP: &str = "qmp";
/// The socket of the display.
pub(crate) const DISPLAY: &str = "vnc";
/// QEMU's own output.
pub(crate) const LOG: &str = "qemu.log";

/// The names of the files on a machine's command line, relative to its lab's directory.
#[derive(Debug, Clone)]
pub(crate) struct Files {
    /// The control socket.
    pub(crate) qmp: String,
    /// The socket of the display.
    pub(crate) display: String,
    /// QEMU's socket of the serial console, which serves one client at a time.
    pub(crate) serial: String,
    /// The seed medium.
    pub(crate) seed: String,
    /// The floppy image.
    pub(crate) floppy: String,
    /// The sockets of its NICs.
    pub(crate) nics: Vec<String>,
}

impl Files {
    /// Returns the file names of the machine with this number. They are short because the path of a socket has at most
    /// 107 bytes (unix(7)).
    pub(crate) fn new(number: usize) -> Self {
        let file = |suffix: &str| format!("m{number}.{suffix}");
        Self {
            qmp: file(QMP),
            display: file(DISPLAY),
            serial: file(SERIAL),
            seed: file(SEED),
            floppy: file(FLOPPY),
            nics: (0..MAX_NICS).map(|index| nic_socket(number, index)).collect(),
        }
    }
}

/// Maximum number of NICs of a machine: each has a slot of its own.
const MAX_NICS: usize = 9;

/// Everything that the command line is built from.
#[derive(Debug)]
pub(crate) struct Machine<'a> {
    /// The name that identifies its process; contains the id of the lab.
    pub(crate) mark: &'a str,
    pub(crate) spec: &'a MachineSpec,
    pub(crate) network: &'a PlannedNetwork,
    pub(crate) files: &'a Files,
    pub(crate) accelerator: Chosen,
    /// The flash memory of a machine with UEFI, and the file with its variables.
    pub(crate) flash: Option<(&'a Flash, &'a str)>,
    /// The socket of its TPM.
    pub(crate) tpm_socket: Option<&'a str>,
}

/// Returns the devices that this machine needs besides those of the chipset, by their QEMU names.
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
        devices.extend((cdrom_bus(spec) == Bus::Sata).then_some("ich9-ahci"));
    }
    if spec.floppy.is_some() {
        devices.push("floppy");
        devices.extend(Chipset::of(spec).floppies());
    }
    devices.extend(spec.nics.iter().map(|nic| driver(nic.model)));
    if spec.tpm {
        devices.push(TPM);
    }
    devices.dedup();
    devices
}

/// The interface of a TPM: the command response buffer of the "TCG PC Client Platform TPM Profile", for which all kinds
/// of firmware and guests have drivers.
const TPM: &str = "tpm-crb";

/// Optional devices, used if this QEMU supports them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Extras {
    /// `pvpanic`: reports a panic of the guest's kernel.
    pub(crate) panic: bool,
    /// `virtio-rng-pci`: a source of entropy, without which old guests wait at boot.
    pub(crate) random: bool,
}

/// Returns QEMU's arguments for a machine.
///
/// # Errors
/// `InvalidInput` when the machine cannot be assembled: too many disks on a bus, or a NIC in no subnet.
pub(crate) fn arguments(machine: &Machine<'_>, extras: Extras) -> Result<Vec<String>> {
    let Machine { mark, spec, files, .. } = machine;
    let chipset = Chipset::of(spec);
    let mut line = Line { arguments: Vec::new(), chipset };
    let name = format!("{mark}/{}", spec.name);
    line.option("-name", format!("guest={0},process={1}", escape(&name), escape("rudder-vm")));
    line.flag("-nodefaults");
    line.flag("-no-user-config");
    let mut board = format!("{},usb=off,vmport=off,dump-guest-core=off,mem-merge=off", chipset.machine());
    if let Some((flash, _)) = machine.flash {
        board.push_str(",pflash0=firmware,pflash1=variables");
        board.push_str(if flash.smm { ",smm=on" } else { ",smm=off" });
    }
    line.option("-machine", board);
    if let Some((flash, variables)) = machine.flash {
        line.flash(flash, variables);
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
    // Boots only from devices with a boot index; the first disk has one.
    line.option("-boot", "strict=on,menu=off");
    line.option("-action", "panic=pause,shutdown=poweroff,reboot=reset");
    line.option("-msg", "timestamp=on");
    line.option("-display", "none");
    line.option("-vnc", format!("unix:{},share=force-shared,key-delay-ms=0", files.display));
    let vga = line.device("VGA", slot::VGA, 0);
    line.option("-device", vga);
    line.option("-chardev", format!("socket,id=qmp,path={},server=on,wait=off", files.qmp));
    line.option("-mon", "chardev=qmp,mode=control");
    line.option(
        "-chardev",
        // QEMU's own log is not used: it grows for as long as the guest writes.
        format!("socket,id=serial,path={},server=on,wait=off", files.serial),
    );
    line.option("-serial", "chardev:serial");
    if extras.panic {
        line.option("-device", "pvpanic");
    }
    if extras.random {
        line.option("-object", "rng-random,id=rng,filename=/dev/urandom");
        let random = line.device("virtio-rng-pci", slot::RNG, 0);
        line.option("-device", format!("{random},rng=rng"));
    }
    if let Some(socket) = machine.tpm_socket {
        line.option("-chardev", format!("socket,id=tpm,path={}", escape(socket)));
        line.option("-tpmdev", "emulator,id=tpm0,chardev=tpm");
        line.option("-device", format!("{TPM},tpmdev=tpm0"));
    }
    disks::attach(&mut line, spec, files)?;
    line.arguments.extend(nic_arguments(spec, machine.network, &files.nics)?);
    // The guest must not run before its events are received.
    line.flag("-S");
    Ok(line.arguments)
}

struct Line {
    arguments: Vec<String>,
    chipset: Chipset,
}

impl Line {
    fn flag(&mut self, flag: &str) {
        self.arguments.push(flag.to_owned());
    }

    fn option(&mut self, option: &str, value: impl Into<String>) {
        self.arguments.push(option.to_owned());
        self.arguments.push(value.into());
    }

    /// Adds a block device in QEMU's JSON form, which needs no escaping beyond that of JSON.
    fn blockdev(&mut self, value: &serde_json::Value) {
        self.option("-blockdev", value.to_string());
    }

    /// Returns the options of a device at a PCI address.
    fn device(&self, driver: &str, address: u8, function: usize) -> String {
        self.chipset.device(driver, address, function)
    }

    /// Returns the options of a controller that may have several functions, each of which must be declared `multifunction`.
    fn controller(&self, driver: &str, address: u8, function: usize) -> String {
        format!("{},multifunction=on", self.device(driver, address, function))
    }

    /// Adds the two flash devices: the firmware's code, and its variables.
    fn flash(&mut self, flash: &Flash, variables: &str) {
        self.blockdev(&json!({
            "node-name": "firmware",
            "driver": flash.code.format,
            "read-only": true,
            "file": {"driver": "file", "filename": flash.code.path, "read-only": true},
        }));
        self.blockdev(&json!({
            "node-name": "variables",
            "driver": flash.variables,
            "file": {"driver": "file", "filename": variables},
        }));
        if flash.smm {
            // The variables can only be written in system management mode.
            self.option("-global", "driver=cfi.pflash01,property=secure,value=on");
        }
        // Suspending to RAM would interrupt what the firmware protects; no guest here needs it.
        self.option("-global", format!("{}.disable_s3=1", self.chipset.power()));
    }
}

#[cfg(test)]
mod tests;
