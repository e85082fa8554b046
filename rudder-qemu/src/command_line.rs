//! The command line of a machine: from what a machine is made of to QEMU's arguments. Nothing here touches the host.
//!
//! Where everything sits is decided by [`rudder_local::pci_layout`].
//!
//! Text of a manifest is in one place only, the name of the process, and goes through [`escape`](rudder_local::process::escape). File names are ours.

mod disks;

use rudder_core::{Result, backend::MachineSpec, hardware::Bus, plan::PlannedNetwork};
use rudder_local::{
    accelerator::Chosen,
    machine_state::Flash,
    nic_arguments::{driver, nic_arguments, nic_socket},
    pci_layout::{Chipset, cdrom_bus, slot},
    process::escape,
};
use serde_json::json;

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
            nics: (0..MOST_NICS).map(|index| nic_socket(number, index)).collect(),
        }
    }
}

/// NICs of a machine at most: each has a slot of its own.
const MOST_NICS: usize = 9;

/// Everything that the command line is made of.
#[derive(Debug)]
pub(crate) struct Machine<'a> {
    /// The mark by which its process is known: contains the id of the lab.
    pub(crate) mark: &'a str,
    pub(crate) spec: &'a MachineSpec,
    pub(crate) network: &'a PlannedNetwork,
    pub(crate) files: &'a Files,
    pub(crate) accelerator: Chosen,
    /// The flash memory of a machine with UEFI, and the file of its variables.
    pub(crate) flash: Option<(&'a Flash, &'a str)>,
    /// The socket of the machine's TPM.
    pub(crate) tpm_socket: Option<&'a str>,
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
    // Only what was asked for is booted, and the first disk is asked for.
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
        // No log of QEMU's: it grows for as long as the guest writes.
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
    line.words.extend(nic_arguments(spec, machine.network, &files.nics)?);
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
        self.chipset.device(driver, address, function)
    }

    /// A controller with more than one function says so on each.
    fn controller(&self, driver: &str, address: u8, function: usize) -> String {
        format!("{},multifunction=on", self.device(driver, address, function))
    }

    /// The two pieces of flash memory: the firmware's program, and its variables.
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
            // Only in system management mode are the variables written to.
            self.option("-global", "driver=cfi.pflash01,property=secure,value=on");
        }
        // Sleep would leave the firmware in the middle of what it guards; no guest here has a use for it.
        self.option("-global", format!("{}.disable_s3=1", self.chipset.power()));
    }
}

#[cfg(test)]
mod tests;
