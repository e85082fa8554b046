//! Installs Debian with UEFI from an ISO onto a blank disk, by a boot command that waits for text on the screen: the manifest
//! of `examples/`. Starts the captured disk afresh. Also covers installers that never finish. The same with BIOS is among
//! the slow tests.

use crate::support::{Bench, install};
use std::fs;

#[test]
fn debian_installed_with_uefi_boots_from_its_variables() {
    let (_bench, record, lines) = install::installs(&install::UEFI, &Bench::build);
    install::expect_entry(&lines);
    let inputs = record["provenance"]["inputs"].as_array().unwrap();
    let iso = inputs.iter().find(|input| input["url"].as_str().unwrap().ends_with("/ipxe.iso"));
    assert_eq!(iso.expect("the ISO is among the inputs")["sha256"].as_str().unwrap().len(), 64);
    assert!(
        !record["machines"][0]["state"].as_array().unwrap().is_empty(),
        "the variables are part of the module: {record}"
    );
}

#[test]
fn a_failed_installer_is_reported_with_its_screen() {
    let bench = Bench::new();
    let manifest = install::manifest("install.yaml")
        .replace("archive         debian.tar.zst", "archive         absent.tar.zst")
        .replace("<waitText 'installed login:' 15m>", "<waitText 'installed login:' 10s>");
    let ended = bench.build(&manifest);
    ended.expect_code(1).expect_text(&[
        "installed login:",
        "10 s",
        "installer: failed: the archive could not be unpacked",
        "boot command",
    ]);
    assert_eq!(ended.outcome()["phase"], "BootCommand");
    assert_eq!(install::requests(&ended).last().unwrap(), &("/absent.tar.zst".to_owned(), 404));
    let screenshot = ended.outcome()["screenshot"].as_str().expect("a screenshot");
    assert!(fs::read(screenshot).unwrap().starts_with(b"\x89PNG"));
    bench.expect_clean();
}

#[test]
fn a_looping_installer_is_reported() {
    let bench = Bench::new();
    let iso = bench.path("loops.iso");
    fs::write(&iso, looping_iso()).unwrap();
    let manifest = format!(
        "name: loops\nvms:\n  - name: vm\n    source: {{blank: true}}\n    resources: {{cpu: 1, memory: 128Mi}}\n    \
         isos: [{{url: 'file://{}'}}]\n    communicator: {{sshPassword: unused}}\n    \
         bootCommand: [\"<waitText 'Installing' 3m>\", \"<waitText 'login:' 15s>\"]\n",
        iso.display()
    );
    let ended = bench.build(&manifest);
    ended.expect_code(1).expect_text(&["login:", "15 s", "boot command", "action 2 of 2"]);
    assert_eq!(ended.outcome()["phase"], "BootCommand");
    assert!(ended.outcome()["screenshot"].is_string(), "{}", ended.outcome());
    bench.expect_clean();
}

/// Returns an ISO (ECMA-119) that boots with BIOS only ("El Torito" 1.0), announces an installation, and restarts the
/// machine.
fn looping_iso() -> Vec<u8> {
    const SECTOR: usize = 2048;
    let mut iso = vec![0; 32 * SECTOR];
    let mut put = |sector: usize, at: usize, bytes: &[u8]| {
        iso[sector * SECTOR + at..][..bytes.len()].copy_from_slice(bytes);
    };
    put(16, 0, b"\x01CD001\x01"); // the primary volume descriptor
    put(17, 0, b"\x00CD001\x01EL TORITO SPECIFICATION"); // the boot record: the catalogue is in sector 19
    put(17, 0x47, &19_u32.to_le_bytes());
    put(18, 0, b"\xffCD001\x01");
    put(19, 0, &[1]); // validation entry, whose words add up to 0
    put(19, 0x1c, &[0xaa, 0x55, 0x55, 0xaa]);
    put(19, 0x20, &[0x88, 0, 0, 0, 0, 0, 4, 0, 20]); // initial entry: no emulation, four sectors of 512 bytes, from 20
    // cld; ds = 0; every byte of the text to the BIOS's teletype; a wait of a second; a jump to the reset vector.
    #[rustfmt::skip]
    let code = [
        0xfc, 0x31, 0xc0, 0x8e, 0xd8, 0xbe, 0x25, 0x7c,
        0xac, 0x84, 0xc0, 0x74, 0x09, 0xb4, 0x0e, 0xbb, 0x07, 0x00, 0xcd, 0x10, 0xeb, 0xf2,
        0xb4, 0x86, 0xb9, 0x0f, 0x00, 0xba, 0x40, 0x42, 0xcd, 0x15,
        0xea, 0x00, 0x00, 0xff, 0xff,
    ];
    put(20, 0, &code);
    put(20, code.len(), b"Installing the system...\r\n\0");
    iso
}
