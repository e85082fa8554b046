//! A small installation: a machine whose disk does not boot is started from a CD-ROM as a floppy directs, and its disk
//! is repaired with a served file. It covers every part of an installation from an ISO, and takes seconds.

use super::{Bench, guest_path};
use std::{
    fs,
    io::{Read, Seek, Write},
    path::Path,
    process::Command,
};

/// A step for a layer on the module: the captured disk boots by itself, without the CD-ROM.
pub const CHECK: &str = "- {type: shell, shell: {inline: 'test ! -e /dev/sr0 && cat /etc/motd'}}";

/// Returns the manifest of the module `rescued`; its disk and the served files are in the bench.
pub fn manifest(bench: &Bench) -> String {
    let grub = "/usr/lib/grub-rescue/grub-rescue-cdrom.iso";
    assert!(Path::new(grub).is_file(), "{grub} is missing: run `make test`, or install grub-rescue-pc");
    let disk = bench.path("broken.img");
    let convert = Command::new("qemu-img")
        .args(["convert", "-O", "raw"])
        .args([guest_path("tiny.qcow2"), disk.clone()])
        .status();
    assert!(convert.unwrap().success());
    let mut disk = fs::File::options().read(true).write(true).open(disk).unwrap();
    let mut code = [0; 440];
    disk.read_exact(&mut code).unwrap();
    fs::write(bench.path("boot.bin"), code).unwrap();
    disk.rewind().unwrap();
    // int 18h: continue with the next boot device ("BIOS Boot Specification" 1.01, 6.7).
    disk.write_all(&[0xcd, 0x18]).unwrap();
    drop(disk);
    format!(
        r#"
name: rescued
files:
  - name: rescue instructions.cfg
    inline: |
      echo The floppy was read.
      search --set=root --file /boot/vmlinuz
      configfile /boot/grub/grub.cfg
  - {{name: boot.bin, url: "file:boot.bin"}}
httpDirectory: {{files: [{{name: boot.bin}}]}}
vms:
  - name: vm
    source: {{url: "file:broken.img"}}
    resources: {{cpu: 1, memory: 256Mi}}
    isos: [{{url: "file://{grub}"}}]
    floppy: {{files: [{{name: rescue instructions.cfg}}]}}
    bootCommand:
      - "<waitText 'GNU GRUB' 3m>c<waitText 'grub>'>"
      - cat "(fd0)/rescue instructions.cfg"<enter><waitText 'configfile /boot/grub/grub.cfg'>
      - source "(fd0)/rescue instructions.cfg"<enter>
    cloudInit: {{}}
    communicator: {{sshTimeout: 5m}}
    provisioners:
      - type: shell
        shell:
          inline:
            - wget -q -O /tmp/boot.bin "http://$RUDDER_HTTP_ADDR/boot.bin"
            - dd if=/tmp/boot.bin of=/dev/vda bs=440 count=1 conv=notrunc
            - sync
      - type: reboot
      - type: shell
        shell: {{inline: test -b /dev/sr0 && echo repaired > /etc/motd}}
"#
    )
}
