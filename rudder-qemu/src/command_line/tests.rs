//! Whole command lines, compared argument by argument.
#![allow(clippy::unwrap_used)]

use super::*;
use rudder_core::{
    Result,
    backend::{MachineDisk, Seed, Volume},
    hardware::{Firmware, NicModel},
    plan::{PlannedNic, PlannedSubnet, PlannedVpc},
};
use rudder_local::{
    nic_arguments::user_nic_arguments,
    pci_layout::{Locations, bus_name},
};

fn network(internet: bool) -> PlannedNetwork {
    let subnet = |name: &str, cidr: &str| PlannedSubnet {
        name: name.to_owned(),
        vpc: "vpc".to_owned(),
        cidr: cidr.parse().unwrap(),
        dhcp: true,
        dns: Vec::new(),
        unmanaged: false,
    };
    PlannedNetwork {
        declared: false,
        vpcs: vec![PlannedVpc { name: "vpc".to_owned(), internet }],
        subnets: vec![subnet("default", "10.0.2.0/24"), subnet("other", "192.168.7.0/28")],
    }
}

fn nic(slot: u8, subnet: &str, model: NicModel) -> PlannedNic {
    PlannedNic {
        name: format!("nic{slot}"),
        subnet: subnet.to_owned(),
        slot,
        slot_pinned: true,
        ip: None,
        mac: format!("52:54:00:00:00:{slot:02x}").parse().unwrap(),
        model,
    }
}

fn disk(index: usize, bus: Bus) -> MachineDisk {
    let volume = Volume::new(format!("v{index}.qcow2"), 1 << 30);
    MachineDisk::new(format!("d{index}"), bus, volume)
}

fn with_disks(buses: impl IntoIterator<Item = Bus>) -> MachineSpec {
    let mut spec = MachineSpec::new("web", 2, 1 << 30);
    spec.disks = buses.into_iter().enumerate().map(|(index, bus)| disk(index, bus)).collect();
    spec
}

fn seed() -> Option<Seed> {
    Some(Seed::new(String::new(), Vec::new(), None, std::sync::Arc::from([])))
}

fn flash(firmware: Firmware) -> Option<Flash> {
    let smm = firmware == Firmware::UefiSecureBoot;
    let code = rudder_local::firmware::Image { path: "/x/code, 4M.fd".into(), format: "raw".to_owned() };
    (firmware != Firmware::Bios).then(|| Flash { code, variables: "raw".to_owned(), smm })
}

fn line_of(mark: &str, spec: &MachineSpec, network: &PlannedNetwork) -> Result<Vec<String>> {
    let files = Files::new(0);
    let flash = flash(spec.firmware);
    let machine = Machine {
        mark,
        spec,
        network,
        files: &files,
        accelerator: Chosen::Tcg,
        flash: flash.as_ref().map(|flash| (flash, "m0.variables")),
        tpm_socket: spec.tpm.then_some("m0.tpm.ctrl"),
    };
    arguments(&machine, Extras { panic: true, random: true })
}

fn line(spec: &MachineSpec) -> Vec<String> {
    line_of("rudder-lab", spec, &network(true)).unwrap()
}

/// Returns the values of an option that contain a text.
fn values(line: &[String], option: &str, with: &str) -> Vec<String> {
    let pairs = line.windows(2).filter(|pair| pair[0] == option && pair[1].contains(with));
    pairs.map(|pair| pair[1].clone()).collect()
}

#[test]
fn an_ordinary_machine() {
    let mut spec = with_disks([Bus::Virtio]);
    spec.nics = vec![nic(1, "default", NicModel::E1000)];
    spec.ports = vec![22];
    spec.seed = seed();
    let expected = r#"
-name guest=rudder-lab/web,process=rudder-vm
-nodefaults
-no-user-config
-machine pc,usb=off,vmport=off,dump-guest-core=off,mem-merge=off
-accel tcg,thread=multi
-cpu max
-smp cpus=2,sockets=1,cores=2,threads=1
-m 1024M
-rtc base=utc
-boot strict=on,menu=off
-action panic=pause,shutdown=poweroff,reboot=reset
-msg timestamp=on
-display none
-vnc unix:m0.vnc,share=force-shared,key-delay-ms=0
-device VGA,bus=pci.0,addr=02.0
-chardev socket,id=qmp,path=m0.qmp,server=on,wait=off
-mon chardev=qmp,mode=control
-chardev socket,id=serial,path=m0.serial,server=on,wait=off
-serial chardev:serial
-device pvpanic
-object rng-random,id=rng,filename=/dev/urandom
-device virtio-rng-pci,bus=pci.0,addr=06.0,rng=rng
-blockdev {"node-name":"disk0","driver":"qcow2","file":{"driver":"file","filename":"v0.qcow2"},"cache":{"no-flush":true},"discard":"unmap","detect-zeroes":"unmap"}
-device virtio-blk-pci,bus=pci.0,addr=08.0,multifunction=on,id=disk0-device,drive=disk0,werror=stop,rerror=stop,bootindex=0
-blockdev {"node-name":"seed","driver":"raw","read-only":true,"file":{"driver":"file","filename":"m0.seed.img","read-only":true}}
-device virtio-blk-pci,bus=pci.0,addr=1a.0,id=seed-device,drive=seed
-netdev stream,id=net0,server=on,addr.type=unix,addr.path=m0.n0
-device e1000,bus=pci.0,addr=11.0,id=nic0,netdev=net0,mac=52:54:00:00:00:01,romfile=
-S
"#;
    assert_eq!(line(&spec).join(" ").replace(" -", "\n-"), expected.trim());
}

#[test]
fn text_from_a_manifest_stays_one_value() {
    let mut spec = with_disks([]);
    spec.name = "we b,\"process=x\" 'é\n".to_owned();
    let line = line_of("rudder-a,b", &spec, &network(true)).unwrap();
    assert_eq!(values(&line, "-name", ""), ["guest=rudder-a,,b/we b,,\"process=x\" 'é\n,process=rudder-vm"]);
}

#[test]
fn every_bus_has_its_own_locations() {
    let all = line(&with_disks([Bus::Sata, Bus::Virtio, Bus::Scsi, Bus::Usb, Bus::Ide, Bus::Virtio]));
    let expected = [
        "virtio-scsi-pci,bus=pci.0,addr=03.0,id=scsi",
        "ich9-ahci,bus=pci.0,addr=04.0,multifunction=on,id=sata0",
        "ide-hd,bus=sata0.0,id=disk0-device,drive=disk0,werror=stop,rerror=stop,bootindex=0",
        "virtio-blk-pci,bus=pci.0,addr=08.0,multifunction=on,id=disk1-device,drive=disk1,werror=stop,rerror=stop",
        "scsi-hd,bus=scsi.0,scsi-id=0,id=disk2-device,drive=disk2,werror=stop,rerror=stop",
        "qemu-xhci,bus=pci.0,addr=05.0,multifunction=on,id=usb0,p2=8,p3=8",
        "usb-storage,bus=usb0.0,port=1,id=disk3-device,drive=disk3,werror=stop,rerror=stop",
        "ide-hd,bus=ide.0,unit=0,id=disk4-device,drive=disk4,werror=stop,rerror=stop",
        "virtio-blk-pci,bus=pci.0,addr=09.0,multifunction=on,id=disk5-device,drive=disk5,werror=stop,rerror=stop",
    ];
    let devices = values(&all, "-device", "");
    assert_eq!(devices.iter().filter(|device| expected.contains(&device.as_str())).count(), expected.len());
}

#[test]
fn no_two_devices_share_a_location() {
    for bus in [Bus::Virtio, Bus::Scsi, Bus::Sata, Bus::Usb, Bus::Ide] {
        let mut spec = with_disks(std::iter::repeat_n(bus, Locations::new(Chipset::I440Fx).limit(bus)));
        spec.nics = (1..=9).map(|slot| nic(slot, "default", NicModel::Virtio)).collect();
        spec.seed = seed();
        let line = line(&spec);
        let places = values(&line, "-device", "bus=").into_iter().map(|device| {
            let parts = device.split(',').filter(|part| {
                ["bus=", "addr=", "unit=", "port=", "scsi-id="].iter().any(|key| part.starts_with(key))
            });
            parts.collect::<Vec<_>>().join(",")
        });
        let mut places: Vec<String> = places.collect();
        let all = places.len();
        places.sort();
        places.dedup();
        assert_eq!(places.len(), all, "{bus:?}");
        spec.disks.push(disk(99, bus));
        let error = line_of("rudder-lab", &spec, &network(true)).unwrap_err();
        assert_eq!(
            error.report(),
            format!(
                "vm web: expected at most {} disks on {}, but found more\n  help: put the other disks on virtio or scsi",
                Locations::new(Chipset::I440Fx).limit(bus),
                bus_name(bus)
            )
        );
    }
}

#[test]
fn the_seed_is_on_the_bus_of_the_boot_disk() {
    for (bus, device) in [
        (Bus::Virtio, "virtio-blk-pci,bus=pci.0,addr=1a.0,id=seed-device,drive=seed"),
        (Bus::Scsi, "scsi-cd,bus=scsi.0,scsi-id=1,id=seed-device,drive=seed"),
        (Bus::Sata, "ide-cd,bus=sata0.1,id=seed-device,drive=seed"),
        (Bus::Ide, "ide-cd,bus=ide.0,unit=1,id=seed-device,drive=seed"),
    ] {
        let mut spec = with_disks([bus]);
        spec.seed = seed();
        assert_eq!(values(&line(&spec), "-device", "seed"), [device]);
    }
    // All four IDE locations are taken, so it goes where there is space.
    let mut spec = with_disks([Bus::Ide; 4]);
    spec.seed = seed();
    assert_eq!(values(&line(&spec), "-device", "seed").len(), 1);
}

#[test]
fn every_nic_has_a_socket_of_its_own() {
    let mut spec = with_disks([]);
    spec.ports = vec![22, 80];
    spec.nics = vec![
        nic(3, "default", NicModel::Virtio),
        nic(1, "other", NicModel::Pcnet),
        nic(9, "default", NicModel::Ne2kPci),
    ];
    let line = line_of("rudder-lab", &spec, &network(false)).unwrap();
    assert_eq!(
        values(&line, "-netdev", ""),
        [0, 1, 2]
            .map(|index| { format!("stream,id=net{index},server=on,addr.type=unix,addr.path=m0.n{index}") })
    );
    assert!(!line.iter().any(|word| word.contains("hostfwd") || word.contains("user,")), "{line:?}");
    assert_eq!(
        values(&line, "-device", "netdev"),
        [
            "virtio-net-pci,bus=pci.0,addr=13.0,id=nic0,netdev=net0,mac=52:54:00:00:00:03,romfile=",
            "pcnet,bus=pci.0,addr=11.0,id=nic1,netdev=net1,mac=52:54:00:00:00:01,romfile=",
            "ne2k_pci,bus=pci.0,addr=19.0,id=nic2,netdev=net2,mac=52:54:00:00:00:09,romfile=",
        ]
    );
}

#[test]
fn a_machine_without_a_lab_is_in_the_user_network_and_unreachable() {
    let mut spec = with_disks([]);
    spec.ports = vec![22];
    spec.nics = vec![
        nic(3, "default", NicModel::Virtio),
        nic(1, "other", NicModel::Pcnet),
        nic(9, "default", NicModel::Ne2kPci),
    ];
    let line = user_nic_arguments(&spec, &network(false)).unwrap();
    assert_eq!(
        values(&line, "-netdev", ""),
        [
            "user,id=up0,ipv6=off,net=10.0.2.0/24,restrict=on",
            "hubport,id=up0hub,hubid=0,netdev=up0",
            "hubport,id=net0,hubid=0",
            "user,id=net1,ipv6=off,net=192.168.7.0/28,restrict=on",
            "hubport,id=net2,hubid=0",
        ]
    );
}

#[test]
fn a_nic_needs_a_subnet_and_a_slot() {
    let mut spec = with_disks([]);
    spec.nics = vec![nic(1, "nowhere", NicModel::Virtio)];
    let error = line_of("rudder-lab", &spec, &network(true)).unwrap_err();
    assert_eq!(error.report(), "vm web: nic nic1: expected a subnet of the lab, but found \"nowhere\"");
    spec.nics = vec![nic(10, "default", NicModel::Virtio)];
    let error = line_of("rudder-lab", &spec, &network(true)).unwrap_err();
    assert_eq!(error.report(), "vm web: nic nic10: expected a slot from 1 to 9, but found 10");
}

#[test]
fn memory_is_at_least_one_whole_mebibyte() {
    let mut spec = MachineSpec::new("web", 0, 0);
    assert_eq!(values(&line(&spec), "-m", ""), ["1M"]);
    assert_eq!(values(&line(&spec), "-smp", ""), ["cpus=1,sockets=1,cores=1,threads=1"]);
    spec.memory = (512 << 20) + 1;
    assert_eq!(values(&line(&spec), "-m", ""), ["513M"]);
}

#[test]
fn uefi_is_flash_memory_on_q35() {
    let mut spec = with_disks([Bus::Virtio, Bus::Sata, Bus::Usb, Bus::Scsi]);
    spec.nics = vec![nic(1, "default", NicModel::Virtio)];
    spec.firmware = Firmware::Uefi;
    let plain = line(&spec);
    assert_eq!(
        values(&plain, "-machine", ""),
        [
            "q35,usb=off,vmport=off,dump-guest-core=off,mem-merge=off,pflash0=firmware,pflash1=variables,smm=off"
        ]
    );
    assert_eq!(
        values(&plain, "-blockdev", "node-name\":\"firmware"),
        [
            r#"{"node-name":"firmware","driver":"raw","read-only":true,"file":{"driver":"file","filename":"/x/code, 4M.fd","read-only":true}}"#
        ]
    );
    assert_eq!(
        values(&plain, "-blockdev", "variables"),
        [r#"{"node-name":"variables","driver":"raw","file":{"driver":"file","filename":"m0.variables"}}"#]
    );
    assert_eq!(values(&plain, "-global", ""), ["ICH9-LPC.disable_s3=1"]);
    assert!(values(&plain, "-device", "pci.0").is_empty(), "everything is on the bus that is there");
    assert_eq!(values(&plain, "-device", "pcie.0").len(), 7);
    spec.firmware = Firmware::UefiSecureBoot;
    let secure = line(&spec);
    assert!(values(&secure, "-machine", "")[0].ends_with(",smm=on"));
    assert_eq!(
        values(&secure, "-global", ""),
        ["driver=cfi.pflash01,property=secure,value=on", "ICH9-LPC.disable_s3=1"]
    );
    assert!(values(&line(&with_disks([])), "-global", "").is_empty());
}

#[test]
fn uefi_with_ide_disks_is_on_i440fx() {
    let mut spec = with_disks([Bus::Ide, Bus::Ide, Bus::Ide]);
    spec.firmware = Firmware::Uefi;
    let line = line(&spec);
    assert!(values(&line, "-machine", "")[0].starts_with("pc,"));
    assert_eq!(values(&line, "-global", ""), ["PIIX4_PM.disable_s3=1"]);
    assert_eq!(values(&line, "-device", "bus=ide.1,unit=0,id=disk2").len(), 1);
}

#[test]
fn a_tpm_is_a_device_connected_to_swtpm() {
    let mut spec = with_disks([]);
    spec.tpm = true;
    let line = line(&spec);
    assert_eq!(values(&line, "-chardev", "id=tpm"), ["socket,id=tpm,path=m0.tpm.ctrl"]);
    assert_eq!(values(&line, "-tpmdev", ""), ["emulator,id=tpm0,chardev=tpm"]);
    assert_eq!(values(&line, "-device", "tpm"), ["tpm-crb,tpmdev=tpm0"]);
    assert!(devices(&spec).contains(&"tpm-crb"));
}

fn cdroms<const N: usize>(paths: [&str; N]) -> Vec<Volume> {
    paths.map(|path| Volume::new(path.to_owned(), 1 << 20)).into()
}

#[test]
fn cd_roms_and_a_floppy() {
    let mut spec = with_disks([Bus::Virtio]);
    spec.cdroms = cdroms(["/store/a, b", "/store/c"]);
    spec.floppy = Some(std::sync::Arc::from([]));
    let made = line(&spec);
    assert_eq!(
        values(&made, "-blockdev", "cdrom0"),
        [
            r#"{"node-name":"cdrom0","driver":"raw","read-only":true,"file":{"driver":"file","filename":"/store/a, b","read-only":true}}"#
        ]
    );
    assert_eq!(
        values(&made, "-blockdev", "floppy"),
        [r#"{"node-name":"floppy","driver":"raw","file":{"driver":"file","filename":"m0.floppy.img"}}"#]
    );
    assert_eq!(
        values(&made, "-device", "drive="),
        [
            "virtio-blk-pci,bus=pci.0,addr=08.0,multifunction=on,id=disk0-device,drive=disk0,werror=stop,rerror=stop,bootindex=0",
            "ide-cd,bus=ide.0,unit=0,id=cdrom0-device,drive=cdrom0,bootindex=1",
            "ide-cd,bus=ide.0,unit=1,id=cdrom1-device,drive=cdrom1,bootindex=2",
            "floppy,id=floppy-device,drive=floppy,drive-type=144",
        ]
    );
    assert_eq!(devices(&spec), ["VGA", "virtio-blk-pci", "ide-cd", "floppy"]);
}

#[test]
fn q35_has_sata_for_cd_roms_and_lacks_a_floppy_controller() {
    let mut spec = with_disks([Bus::Virtio]);
    spec.firmware = Firmware::Uefi;
    spec.cdroms = cdroms(["/0", "/1", "/2", "/3", "/4", "/5"]);
    spec.floppy = Some(std::sync::Arc::from([]));
    assert_eq!(
        values(&line(&spec), "-device", "cdrom5"),
        ["ide-cd,bus=ide.5,id=cdrom5-device,drive=cdrom5,bootindex=6"]
    );
    assert_eq!(values(&line(&spec), "-device", "isa-fdc"), ["isa-fdc"]);
    assert_eq!(devices(&spec), ["VGA", "virtio-blk-pci", "ide-cd", "floppy", "isa-fdc"]);
}

#[test]
fn cd_roms_are_all_on_one_bus() {
    let drives = |spec: &MachineSpec| values(&line(spec), "-device", "ide-cd,");
    let mut spec = with_disks([Bus::Ide, Bus::Ide]);
    spec.cdroms = cdroms(["/a", "/b"]);
    assert_eq!(
        drives(&spec),
        [
            "ide-cd,bus=ide.1,unit=0,id=cdrom0-device,drive=cdrom0,bootindex=1",
            "ide-cd,bus=ide.1,unit=1,id=cdrom1-device,drive=cdrom1,bootindex=2",
        ]
    );
    // With the seed there is no space for both.
    spec.seed = seed();
    assert_eq!(
        drives(&spec),
        [
            "ide-cd,bus=sata0.0,id=cdrom0-device,drive=cdrom0,bootindex=1",
            "ide-cd,bus=sata0.1,id=cdrom1-device,drive=cdrom1,bootindex=2",
            "ide-cd,bus=ide.1,unit=0,id=seed-device,drive=seed",
        ]
    );
    assert!(devices(&spec).contains(&"ich9-ahci"));
}
