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

use crate::{accelerator::Chosen, state::Flash};
use rudder_core::{
    Error, ErrorKind, Result,
    backend::MachineSpec,
    plan::{Bus, Firmware, NicModel, PlannedNetwork, PlannedNic, PlannedSubnet},
};
use serde_json::json;
use std::net::Ipv4Addr;

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

/// What a machine is built around.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Chipset {
    /// QEMU's `pc`.
    I440Fx,
    /// QEMU's `q35`.
    Q35,
}

impl Chipset {
    /// That of a machine.
    pub(crate) fn of(spec: &MachineSpec) -> Self {
        let ide = spec.disks.iter().any(|disk| disk.bus == Bus::Ide);
        match spec.firmware {
            Firmware::Bios => Self::I440Fx,
            Firmware::Uefi if ide => Self::I440Fx,
            Firmware::Uefi | Firmware::UefiSecureBoot => Self::Q35,
        }
    }

    /// QEMU's short name for its machine.
    pub(crate) fn machine(self) -> &'static str {
        match self {
            Self::I440Fx => "pc",
            Self::Q35 => "q35",
        }
    }

    /// Its PCI bus.
    fn bus(self) -> &'static str {
        match self {
            Self::I440Fx => "pci.0",
            Self::Q35 => "pcie.0",
        }
    }

    /// The device that does power management.
    fn power(self) -> &'static str {
        match self {
            Self::I440Fx => "PIIX4_PM",
            Self::Q35 => "ICH9-LPC",
        }
    }

    /// The controller of floppies that it lacks.
    fn floppies(self) -> Option<&'static str> {
        match self {
            Self::I440Fx => None,
            Self::Q35 => Some("isa-fdc"),
        }
    }

    /// Units on its own disk controller: IDE's two channels of two, or six ports of SATA.
    fn units(self) -> usize {
        match self {
            Self::I440Fx => 4,
            Self::Q35 => 6,
        }
    }

    /// A unit on its own disk controller.
    fn unit(self, index: usize) -> String {
        match self {
            Self::I440Fx => format!("bus=ide.{},unit={}", index / 2, index % 2),
            Self::Q35 => format!("bus=ide.{index}"),
        }
    }
}

/// Functions of a PCI device.
const FUNCTIONS: usize = 8;
/// Ports of an AHCI controller.
const AHCI_PORTS: usize = 6;
/// Ports of an xHCI controller that are used.
const XHCI_PORTS: usize = 8;
/// Disks on the SCSI controller.
const SCSI_TARGETS: usize = 64;

/// The names of a machine's files, relative to the directory of its lab.
#[derive(Debug, Clone)]
pub(crate) struct Files {
    /// Of the control socket.
    pub(crate) qmp: String,
    /// Of the display's socket.
    pub(crate) display: String,
    /// Of the serial console's socket.
    pub(crate) serial: String,
    /// Of what the guest wrote on its serial console.
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
}

impl Files {
    /// The files of the machine of this number. Short, because a socket's path has at most 107 bytes (unix(7)).
    pub(crate) fn new(number: usize) -> Self {
        let file = |suffix: &str| format!("m{number}.{suffix}");
        Self {
            qmp: file("qmp"),
            display: file("vnc"),
            serial: file("serial"),
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
        }
    }
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
        devices.extend((cdrom_bus(spec) == Bus::Sata).then_some("ich9-ahci"));
    }
    if spec.floppy.is_some() {
        devices.push("floppy");
        devices.extend(Chipset::of(spec).floppies());
    }
    devices.extend(spec.nics.iter().map(|nic| card(nic.model)));
    if spec.tpm {
        devices.push(TPM);
    }
    devices.dedup();
    devices
}

fn card(model: NicModel) -> &'static str {
    match model {
        NicModel::E1000 => "e1000",
        NicModel::Virtio => "virtio-net-pci",
        NicModel::E1000e => "e1000e",
        NicModel::Rtl8139 => "rtl8139",
        NicModel::Pcnet => "pcnet",
        NicModel::Ne2kPci => "ne2k_pci",
    }
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
        format!(
            "socket,id=serial,path={},server=on,wait=off,logfile={},logappend=off",
            files.serial, files.serial_log
        ),
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
    disks(&mut line, spec, files)?;
    cards(&mut line, spec, machine.network)?;
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

fn too_many(spec: &MachineSpec, bus: &str, limit: usize) -> Error {
    Error::new(ErrorKind::InvalidInput, format!("expected at most {limit} disks on {bus}, but found more"))
        .with_context("vm", &spec.name)
        .with_help("put the others on virtio or scsi")
}

fn disks(line: &mut Line, spec: &MachineSpec, files: &Files) -> Result<()> {
    let mut used = Used::default();
    if spec.disks.iter().any(|disk| disk.bus == Bus::Scsi) {
        let scsi = line.device("virtio-scsi-pci", place::SCSI, 0);
        line.option("-device", format!("{scsi},id=scsi"));
    }
    for (index, disk) in spec.disks.iter().enumerate() {
        let node = format!("disk{index}");
        line.blockdev(&json!({
            "node-name": node,
            "driver": "qcow2",
            "file": {"driver": "file", "filename": disk.volume.id},
            // A lab's disks are thrown away when the host crashes: no flush has to reach its platters.
            "cache": {"no-flush": true},
            "discard": "unmap",
            "detect-zeroes": "unmap",
        }));
        let place = used
            .take(line, disk.bus)
            .ok_or_else(|| too_many(spec, bus_name(disk.bus), limit(disk.bus, line.chipset)))?;
        let driver = match disk.bus {
            Bus::Virtio => "virtio-blk-pci",
            Bus::Scsi => "scsi-hd",
            Bus::Sata | Bus::Ide => "ide-hd",
            Bus::Usb => "usb-storage",
        };
        let boot = if index == 0 { ",bootindex=0" } else { "" };
        // Paused rather than told to the guest: the host's trouble would look like a broken disk there.
        line.option(
            "-device",
            format!("{driver},{place},id={node}-device,drive={node},werror=stop,rerror=stop{boot}"),
        );
    }
    for (index, image) in spec.cdroms.iter().enumerate() {
        let node = format!("cdrom{index}");
        line.blockdev(&json!({
            "node-name": node,
            "driver": "raw",
            "read-only": true,
            "file": {"driver": "file", "filename": image, "read-only": true},
        }));
        let bus = cdrom_bus(spec);
        let place =
            used.take(line, bus).ok_or_else(|| too_many(spec, bus_name(bus), limit(bus, line.chipset)))?;
        // Behind the boot disk, which has 0: a blank one falls through to here.
        let boot = index + 1;
        line.option("-device", format!("ide-cd,{place},id={node}-device,drive={node},bootindex={boot}"));
    }
    if spec.floppy.is_some() {
        line.blockdev(&json!({
            "node-name": "floppy",
            "driver": "raw",
            "file": {"driver": "file", "filename": files.floppy},
        }));
        if let Some(controller) = line.chipset.floppies() {
            line.option("-device", controller);
        }
        line.option("-device", "floppy,id=floppy-device,drive=floppy,drive-type=144");
    }
    if spec.seed.is_some() {
        line.blockdev(&json!({
            "node-name": "seed",
            "driver": "raw",
            "read-only": true,
            "file": {"driver": "file", "filename": files.seed, "read-only": true},
        }));
        // On the bus of the boot disk, because the guest has a driver for that one; last, so that no disk moves.
        let bus = spec.disks.first().map_or(Bus::Virtio, |disk| disk.bus);
        let place = match bus {
            Bus::Virtio => None,
            Bus::Scsi => used.take(line, bus).map(|place| ("scsi-cd", place)),
            Bus::Sata | Bus::Ide => used.take(line, bus).map(|place| ("ide-cd", place)),
            Bus::Usb => used.take(line, bus).map(|place| ("usb-storage", place)),
        };
        let place = place.map_or_else(
            || line.device("virtio-blk-pci", place::SEED, 0),
            |(driver, place)| format!("{driver},{place}"),
        );
        line.option("-device", format!("{place},id=seed-device,drive=seed"));
    }
    Ok(())
}

/// The bus of the CD-ROMs, IDE meaning the chipset's own controller: one for all, so that the guest finds them in order.
fn cdrom_bus(spec: &MachineSpec) -> Bus {
    let disks = spec.disks.iter().filter(|disk| disk.bus == Bus::Ide).count();
    // The seed is there, too, when the boot disk is.
    let seed = spec.seed.is_some() && spec.disks.first().is_some_and(|disk| disk.bus == Bus::Ide);
    if disks + usize::from(seed) + spec.cdroms.len() <= Chipset::of(spec).units() {
        Bus::Ide
    } else {
        Bus::Sata
    }
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

fn limit(bus: Bus, chipset: Chipset) -> usize {
    match bus {
        Bus::Virtio => FUNCTIONS * FUNCTIONS,
        Bus::Scsi => SCSI_TARGETS,
        Bus::Sata => FUNCTIONS * AHCI_PORTS,
        Bus::Usb => FUNCTIONS * XHCI_PORTS,
        Bus::Ide => chipset.units(),
    }
}

/// How many places of each bus are taken.
#[derive(Default)]
struct Used {
    virtio: usize,
    scsi: usize,
    sata: usize,
    usb: usize,
    ide: usize,
}

impl Used {
    /// The next place on a bus, as options of a device; brings the controller where it is the first on it.
    fn take(&mut self, line: &mut Line, bus: Bus) -> Option<String> {
        let counter = match bus {
            Bus::Virtio => &mut self.virtio,
            Bus::Scsi => &mut self.scsi,
            Bus::Sata => &mut self.sata,
            Bus::Usb => &mut self.usb,
            Bus::Ide => &mut self.ide,
        };
        let index = *counter;
        if index >= limit(bus, line.chipset) {
            return None;
        }
        *counter += 1;
        Some(match bus {
            Bus::Virtio => {
                let address = place::VIRTIO_DISKS + u8::try_from(index % FUNCTIONS).ok()?;
                format!(
                    "bus={},addr={address:02x}.{},multifunction=on",
                    line.chipset.bus(),
                    index / FUNCTIONS
                )
            }
            Bus::Scsi => format!("bus=scsi.0,scsi-id={index}"),
            Bus::Sata => {
                let (number, port) = (index / AHCI_PORTS, index % AHCI_PORTS);
                if port == 0 {
                    let device = line.controller("ich9-ahci", place::AHCI, number);
                    line.option("-device", format!("{device},id=sata{number}"));
                }
                format!("bus=sata{number}.{port}")
            }
            Bus::Usb => {
                let (number, port) = (index / XHCI_PORTS, index % XHCI_PORTS + 1);
                if port == 1 {
                    let device = line.controller("qemu-xhci", place::XHCI, number);
                    line.option(
                        "-device",
                        format!("{device},id=usb{number},p2={XHCI_PORTS},p3={XHCI_PORTS}"),
                    );
                }
                format!("bus=usb{number}.0,port={port}")
            }
            Bus::Ide => line.chipset.unit(index),
        })
    }
}

/// The arguments that make the cards of a machine, as [`arguments`] puts them: on the PCI bus of a `pc`, with forwarded
/// ports.
///
/// # Errors
/// `InvalidInput` when a card is in no subnet of the lab, or its slot is none.
pub fn card_arguments(spec: &MachineSpec, network: &PlannedNetwork) -> Result<Vec<String>> {
    let mut line = Line { words: Vec::new(), chipset: Chipset::I440Fx };
    cards(&mut line, spec, network)?;
    Ok(line.words)
}

/// Whether the guests of a subnet reach the host, and through it the internet: QEMU's user network has both or neither.
pub(crate) fn reaches_host(network: &PlannedNetwork, subnet: &PlannedSubnet) -> bool {
    network.vpcs.iter().any(|vpc| vpc.name == subnet.vpc && vpc.internet)
}

/// The address by which the guests of a subnet reach the loopback of the host: the second of the subnet, as QEMU has it
/// in networks of 256 addresses.
pub(crate) fn host_address(subnet: &PlannedSubnet) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(subnet.cidr.network()).saturating_add(2))
}

/// The networks, each of which is QEMU's user network (slirp) with the addresses of its subnet, and the cards in them.
fn cards(line: &mut Line, spec: &MachineSpec, network: &PlannedNetwork) -> Result<()> {
    let invalid = |nic: &PlannedNic, message: String| {
        Error::new(ErrorKind::InvalidInput, message)
            .with_context("nic", &nic.name)
            .with_context("vm", &spec.name)
    };
    let mut hubs: Vec<&str> = Vec::new();
    let mut forwards: String =
        spec.ports.iter().map(|port| format!(",hostfwd=tcp:127.0.0.1:0-:{port}")).collect();
    for (index, nic) in spec.nics.iter().enumerate() {
        let subnet = network.subnets.iter().find(|subnet| subnet.name == nic.subnet);
        let subnet = subnet.ok_or_else(|| {
            invalid(nic, format!("expected a subnet of the lab, but found {:?}", nic.subnet))
        })?;
        let shared = spec.nics.iter().filter(|other| other.subnet == nic.subnet).count() > 1;
        if !hubs.contains(&nic.subnet.as_str()) {
            let restrict = if reaches_host(network, subnet) { "off" } else { "on" };
            // A port of 0 is chosen by the kernel, and read back later: nobody else can take it in between.
            let forwards = std::mem::take(&mut forwards);
            let id = if shared { format!("up{}", hubs.len()) } else { format!("net{index}") };
            line.option(
                "-netdev",
                format!(
                    "user,id={id},ipv6=off,net={},host={},restrict={restrict}{forwards}",
                    subnet.cidr,
                    host_address(subnet)
                ),
            );
            if shared {
                line.option("-netdev", format!("hubport,id={id}hub,hubid={},netdev={id}", hubs.len()));
            }
            hubs.push(&nic.subnet);
        }
        if shared {
            let hub = hubs.iter().position(|name| *name == nic.subnet).unwrap_or_default();
            line.option("-netdev", format!("hubport,id=net{index},hubid={hub}"));
        }
        if !(1..=9).contains(&nic.slot) {
            return Err(invalid(nic, format!("expected a slot from 1 to 9, but found {}", nic.slot)));
        }
        // Without a boot ROM: nothing boots from the network, and loading it takes time.
        let card = line.device(card(nic.model), place::CARDS + nic.slot, 0);
        line.option("-device", format!("{card},id=nic{index},netdev=net{index},mac={},romfile=", nic.mac));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
