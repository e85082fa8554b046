//! The manifests of `examples/` that install Debian from an ISO: builds them, checks what their installers requested,
//! and starts their modules afresh.

use super::{Bench, Ended, guest_path};
use serde_json::Value;
use std::{fs, path::Path};

/// One of the examples, its module, and a way to see how the module was started.
pub struct Example {
    file: &'static str,
    module: &'static str,
    firmware: &'static str,
    check: &'static str,
}

pub const BIOS: Example = Example {
    file: "install.yaml",
    module: "installed",
    firmware: "",
    check: "test ! -d /sys/firmware/efi && echo started by BIOS",
};

pub const UEFI: Example = Example {
    file: "install-uefi.yaml",
    module: "installed-uefi",
    firmware: "    efiFirmware: {}\n",
    check: "sudo efibootmgr",
};

/// Returns the manifest of an example, with the guests of these tests.
pub fn manifest(file: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/manifests").join(file);
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let kernel = guest_path("installer/linux");
    let guests = kernel.ancestors().nth(2).unwrap();
    let (here, there) = ("file:../../target/guests/", format!("file://{}/", guests.display()));
    assert!(text.contains(here), "{} names the guests of `make guests`", path.display());
    text.replace(here, &there)
}

/// Returns the requested files with the status of the answers, in order.
pub fn requests(ended: &Ended) -> Vec<(String, u64)> {
    let requests = ended.events.iter().filter(|event| event["event"] == "http_request");
    requests
        .map(|event| (event["path"].as_str().unwrap().to_owned(), event["status"].as_u64().unwrap()))
        .collect()
}

/// Returns the lines that the steps of a build wrote.
fn said(ended: &Ended) -> Vec<&str> {
    let lines = ended.events.iter().filter(|event| event["event"] == "step_output");
    lines.filter_map(|event| event["line"].as_str()).collect()
}

/// Builds an example, and starts the captured disk afresh on QEMU: a layer on the module, whose only step inspects it.
/// Returns the bench, the `module.json`, and the output of the step.
pub fn installs(example: &Example, build: &dyn Fn(&Bench, &str) -> Ended) -> (Bench, Value, Vec<String>) {
    let Example { file, module, firmware, check } = example;
    let bench = Bench::new();
    let ended = build(&bench, &manifest(file));
    ended.expect_code(0);
    let asked: Vec<_> =
        requests(&ended).into_iter().map(|(path, status)| format!("{path} {status}")).collect();
    let files = ["install.ipxe", "linux", "initrd", "answers", "debian.tar.zst"];
    assert_eq!(asked, files.map(|file| format!("/{file} 200")), "what the installer asked for");
    let lines = said(&ended);
    assert!(lines.contains(&"Debian GNU/Linux 12 (bookworm) on /dev/vda2 ext4"), "{lines:?}");
    assert!(ended.event(|event| event["phase"] == "BootCommand").is_some(), "{}", ended.stdout);
    bench.expect_clean();
    let record = ended.stdout.lines().last().unwrap();
    let record = serde_json::from_slice(&fs::read(record).unwrap()).unwrap();

    let layer = format!(
        "name: afresh\nvms:\n  - name: debian\n    source: {{buildRef: {{name: {module}}}}}\n{firmware}    resources: {{cpu: 2, memory: 1Gi}}\n    \
         communicator: {{sshUsername: admin, sshPassword: fresh from the disc, sshTimeout: 10m}}\n    \
         provisioners: [{{type: shell, shell: {{inline: ['cat /etc/motd', hostname, '{check}']}}}}]\n"
    );
    let ended = bench.build(&layer);
    ended.expect_code(0);
    let lines: Vec<_> = said(&ended).into_iter().map(str::to_owned).collect();
    assert!(lines[..2] == ["Installed by a boot command", "installed"], "{lines:?}");
    assert!(requests(&ended).is_empty(), "nothing is installed again: {}", ended.stdout);
    bench.expect_clean();
    (bench, record, lines)
}

/// Fails unless the firmware started the entry that the installer added to its variables, as `efibootmgr` shows it.
#[track_caller]
pub fn expect_entry(lines: &[String]) {
    let current =
        lines.iter().find_map(|line| line.strip_prefix("BootCurrent: ")).expect("what the firmware started");
    let entry = format!("Boot{current}* debian");
    assert!(lines.iter().any(|line| line.starts_with(&entry)), "expected {entry}, but found {lines:?}");
}
