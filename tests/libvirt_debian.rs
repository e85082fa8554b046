//! Full Debian systems on libvirt: the demo's two layers, and the installations from an ISO. What one hypervisor built
//! starts afresh on the other, and both report and record the same. Run by `make test-slow`; `libvirt.rs` covers the
//! same paths with a tiny guest.
#![allow(clippy::unwrap_used)]

#[path = "../rudder-libvirt/tests/common/daemon.rs"]
mod daemon;
mod support;

use daemon::Daemon;
use std::{fs, path::Path};
use support::{Bench, Ended, Running, alike::expect_alike, guest_path, install};

/// Returns a manifest of the demo, with the guest of these tests.
fn demo(file: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/manifests").join(file);
    let guest = format!("file://{}", guest_path("debian-12.qcow2").display());
    fs::read_to_string(path).unwrap().replace("file:../../target/guests/debian-12.qcow2", &guest)
}

/// Builds a manifest on libvirt, to completion.
fn build(bench: &Bench, daemon: &Daemon, manifest: &str) -> Ended {
    let mut command = bench.command(manifest);
    command.args(["--backend", "libvirt"]).env("LIBVIRT_DEFAULT_URI", daemon.uri());
    let ended = Running::start(command).end();
    ended.expect_code(0);
    bench.expect_clean();
    ended
}

/// Returns whether a line is the same in every build, unlike some output of apt.
fn persists(line: &str) -> bool {
    !["Get:", "Hit:", "Ign:", "Fetched "].iter().any(|start| line.starts_with(start))
}

#[test]
fn the_demo_boots_modules_of_the_other_hypervisor() {
    let host = Bench::new();
    let daemon = Daemon::start(&host.path("libvirt"));
    let (here, there) = (Bench::new(), Bench::new());
    expect_alike(&build(&here, &daemon, &demo("base.yaml")), &there.build(&demo("base.yaml")), persists);
    assert_eq!(daemon.domains(), ["demo-base.debian"]);

    let layer = demo("layer.yaml");
    for site in [here.build(&layer), build(&there, &daemon, &layer)] {
        site.expect_code(0);
        let page = "<h1>Built in two layers</h1>";
        assert!(site.event(|event| event["line"] == page).is_some(), "{}", site.stdout);
    }
    assert_eq!(daemon.domains(), ["demo-base.debian", "demo-site.web"]);
}

#[test]
fn debian_installed_with_bios_on_libvirt_boots_on_qemu() {
    let host = Bench::new();
    let daemon = Daemon::start(&host.path("libvirt"));
    let on_libvirt = |bench: &Bench, manifest: &str| build(bench, &daemon, manifest);
    let (_bench, _, lines) = install::installs(&install::BIOS, &on_libvirt);
    assert_eq!(lines.last().unwrap(), "started by BIOS");
}

#[test]
fn debian_installed_with_uefi_on_libvirt_boots_on_qemu() {
    let host = Bench::new();
    let daemon = Daemon::start(&host.path("libvirt"));
    let on_libvirt = |bench: &Bench, manifest: &str| build(bench, &daemon, manifest);
    let (_bench, _, lines) = install::installs(&install::UEFI, &on_libvirt);
    install::expect_entry(&lines);
}
