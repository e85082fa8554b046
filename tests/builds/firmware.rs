//! Whole builds on QEMU with UEFI: Secure Boot enforced, a TPM, what both keep from layer to layer, and what a host
//! must provide.

use crate::support::{Bench, Ended, Running, debian, guest_path, one_vm, processes_naming, tiny_manifest};
use rustix::process::Signal;
use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

/// Speaks the protocol of the TPM ("TCG TPM 2.0 Library", part 3: `NV_DefineSpace`, `NV_Write`, `NV_Read`), because the
/// guest has no tools for it: writes a text to the non-volatile memory of the TPM, or reads it.
const TPM: &str = r#"
import struct, sys
OWNER, INDEX, TEXT = 0x40000001, 0x01500016, b'kept by the TPM'
PASSWORD = struct.pack('>IIHBH', 9, 0x40000009, 0, 0, 0)
tpm = open('/dev/tpm0', 'r+b', buffering=0)

def run(code, handles, parameters):
    body = handles + PASSWORD + parameters
    tpm.write(struct.pack('>HII', 0x8002, 10 + len(body), code) + body)
    answer = tpm.read(4096)
    status = struct.unpack('>I', answer[6:10])[0]
    assert status == 0, f'the TPM answers {status:#x}'
    return answer[14:]

if sys.argv[1] == 'write':
    # Read and written with the password of the owner, which is empty.
    public = struct.pack('>IHIHH', INDEX, 0x000b, 0x00020002, 0, len(TEXT))
    run(0x12a, struct.pack('>I', OWNER), struct.pack('>HH', 0, len(public)) + public)
    run(0x137, struct.pack('>II', OWNER, INDEX), struct.pack('>H', len(TEXT)) + TEXT + struct.pack('>H', 0))
else:
    answer = run(0x14e, struct.pack('>II', OWNER, INDEX), struct.pack('>HH', len(TEXT), 0))
    print(answer[2:2 + len(TEXT)].decode())
"#;

/// A firmware variable of these tests.
const VARIABLE: &str = "/sys/firmware/efi/efivars/RudderTest-8e6f2a4c-5b1d-4c3e-9a7f-0d2b4c6e8f10";

/// Returns a manifest of one VM with Secure Boot and a TPM.
fn secure(name: &str, source: &str, lines: &[&str]) -> String {
    let script: String = TPM.lines().map(|line| format!("      {line}\n")).collect();
    let lines: String = lines.iter().map(|line| format!("            - {line}\n")).collect();
    format!(
        "name: {name}\n\
         files:\n  - name: tpm.py\n    inline: |\n{script}\
         vms:\n  - name: vm\n    source: {source}\n    resources: {{cpu: 2, memory: 1Gi}}\n    efiFirmware: {{secureBoot: true}}\n    \
         tpm: true\n    cloudInit: {{}}\n    communicator: {{sshTimeout: 9m}}\n    provisioners:\n      - {{type: file, file: {{fileRef: tpm.py, destination: /tmp/tpm.py}}}}\n      \
         - type: shell\n        shell:\n          inline:\n{lines}"
    )
}

fn printed(ended: &Ended) -> Vec<&str> {
    let outputs = ended.events.iter().filter(|event| event["event"] == "step_output");
    outputs.filter_map(|event| event["line"].as_str()).collect()
}

#[test]
fn secure_boot_is_on_and_variables_and_tpm_persist_in_the_layer() {
    let bench = Bench::new();
    let base = bench.build(&secure(
        "base",
        &format!("{{url: '{}'}}", debian()),
        &[
            "mokutil --sb-state",
            "cat /sys/kernel/security/lockdown",
            "echo TPM version $(cat /sys/class/tpm/tpm0/tpm_version_major)",
            "python3 /tmp/tpm.py write",
            // The attributes of the variable in four bytes (UEFI specification, 8.2: non-volatile, boot service and
            // runtime access), followed by the text.
            &format!("printf '\\007\\000\\000\\000kept by the firmware' >{VARIABLE}"),
        ],
    ));
    base.expect_code(0);
    let lines = printed(&base);
    for line in ["SecureBoot enabled", "none [integrity] confidentiality", "TPM version 2"] {
        assert!(lines.contains(&line), "{line}: {lines:?}");
    }
    bench.expect_clean();

    let layer = bench.build(&secure(
        "layer",
        "{buildRef: {name: base}}",
        &["mokutil --sb-state", "python3 /tmp/tpm.py read", &format!("cat {VARIABLE} | tail -c +5; echo")],
    ));
    layer.expect_code(0);
    assert_eq!(printed(&layer), ["SecureBoot enabled", "kept by the TPM", "kept by the firmware"]);
    bench.expect_clean();

    // Both are in the module, and the versions of their programs are in its provenance.
    let module = fs::read(layer.stdout.lines().last().unwrap()).unwrap();
    let module: serde_json::Value = serde_json::from_slice(&module).unwrap();
    let state = module["machines"][0]["state"].as_array().unwrap();
    let kinds: Vec<_> = state.iter().map(|state| &state["kind"]).collect();
    assert_eq!(kinds, ["firmware-variables", "tpm"]);
    let versions = &module["provenance"]["versions"];
    assert!(versions["firmware"].as_str().unwrap().contains(" sha256:"), "{versions}");
    assert!(versions["swtpm"].is_string(), "{versions}");
}

/// Makes a copy of the tiny guest whose boot loader is not signed any more.
fn unsigned(bench: &Bench) -> PathBuf {
    let disk = bench.path("unsigned.raw");
    let converted = Command::new("qemu-img")
        .args(["convert", "-O", "raw"])
        .args([guest_path("tiny.qcow2"), disk.clone()])
        .status()
        .unwrap();
    assert!(converted.success());
    let mut bytes = fs::read(&disk).unwrap();
    let mark = b"UEFI SHIM\n";
    let marks: Vec<usize> =
        (0..bytes.len() - mark.len()).step_by(16).filter(|at| bytes[*at..].starts_with(mark)).collect();
    // Once at the path of removable media, and once at Debian's path.
    assert_eq!(marks.len(), 2, "shim is there");
    for mark in marks {
        // "PE Format": the file begins with MZ; the offset of the header is at 0x3c; the offset and size of the
        // signature are 0xa8 behind that, in the data directory of a 64-bit program.
        let start = (0..=mark).rev().find(|at| at % 512 == 0 && bytes[*at..].starts_with(b"MZ")).unwrap();
        let header =
            start + u32::from_le_bytes(bytes[start + 0x3c..start + 0x40].try_into().unwrap()) as usize;
        assert!(bytes[header..].starts_with(b"PE\0\0") && bytes[header + 0x18..].starts_with(b"\x0b\x02"));
        let signature = &mut bytes[header + 0xa8..header + 0xb0];
        assert!(signature.iter().any(|byte| *byte != 0), "it was signed");
        signature.fill(0);
    }
    fs::write(&disk, bytes).unwrap();
    disk
}

#[test]
fn an_unsigned_loader_boots_unless_secure_boot_is_on() {
    let bench = Bench::new();
    let source = format!("{{url: 'file://{}'}}", unsigned(&bench).display());
    let check = "- {type: shell, shell: {inline: 'test -d /sys/firmware/efi && echo it booted'}}";
    let with = |firmware: &str| {
        // With less memory GRUB does not load a kernel.
        one_vm("unsigned", &source, check)
            .replace("256Mi", "512Mi")
            .replace("    cloudInit", &format!("    {firmware}\n    tpm: false\n    cloudInit"))
    };
    let ended = bench.build(&with("efiFirmware: {}"));
    ended.expect_code(0);
    assert_eq!(printed(&ended), ["it booted"]);

    let ended = bench.build(&with("efiFirmware: {secureBoot: true}").replace("3m", "1m"));
    ended.expect_code(1).expect_text(&["vm vm", "Access Denied"]);
    assert_eq!(ended.outcome()["kind"], "guest_unreachable");
    bench.expect_clean();
}

/// Runs a build that must be refused because the host lacks something, before anything was started.
fn refused(bench: &Bench, manifest: &str, change: impl FnOnce(&mut Command)) -> Ended {
    let mut command = bench.command(manifest);
    change(&mut command);
    let ended = Running::start(command).end();
    ended.expect_code(1);
    assert_eq!(ended.outcome()["kind"], "host_missing");
    assert!(ended.event(|event| event["event"] == "progress").is_none(), "{}", ended.stdout);
    bench.expect_clean();
    ended
}

#[test]
fn missing_firmware_and_a_missing_tpm_are_refused_at_once() {
    let bench = Bench::new();
    // An empty descriptor hides those with the same name in less specific directories.
    let hidden = bench.path("config/qemu/firmware");
    fs::create_dir_all(&hidden).unwrap();
    for directory in ["/etc/qemu/firmware", "/usr/share/qemu/firmware"] {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            fs::write(hidden.join(entry.file_name()), "").unwrap();
        }
    }
    for (firmware, expected) in [
        ("efiFirmware: {}", "expected UEFI firmware for"),
        ("efiFirmware: {secureBoot: true}", "expected UEFI firmware that enforces Secure Boot"),
    ] {
        let manifest =
            tiny_manifest("missing", "").replace("    cloudInit", &format!("    {firmware}\n    cloudInit"));
        let ended = refused(&bench, &manifest, |command| {
            command.env("XDG_CONFIG_HOME", bench.path("config"));
        });
        ended.expect_text(&[expected, "apt-get install --no-install-recommends ovmf"]);
    }

    // A host that has everything except swtpm.
    let bin = bench.path("bin");
    fs::create_dir(&bin).unwrap();
    for program in ["qemu-system-x86_64", "qemu-img", "qemu-nbd", "setpriv"] {
        symlink(which(program), bin.join(program)).unwrap();
    }
    let manifest = tiny_manifest("missing", "").replace("    cloudInit", "    tpm: true\n    cloudInit");
    let ended = refused(&bench, &manifest, |command| {
        command.env("PATH", &bin);
    });
    ended.expect_text(&["the program swtpm", "apt-get install --no-install-recommends swtpm swtpm-tools"]);
}

fn which(program: &str) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap();
    let found =
        std::env::split_paths(&path).map(|directory| directory.join(program)).find(|file| file.is_file());
    found.unwrap_or_else(|| panic!("{program} is missing: run `tools/setup qemu`"))
}

/// Returns whether a TPM of this bench is running.
fn has_tpm(bench: &Bench) -> bool {
    let is = |pid: i32| fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe.ends_with("swtpm"));
    processes_naming(Path::new(&bench.store())).into_iter().any(|(pid, _)| is(pid))
}

#[test]
fn a_tpm_ends_with_its_builder() {
    for (signal, code) in [(Signal::INT, 130), (Signal::KILL, -1)] {
        let bench = Bench::new();
        let manifest = tiny_manifest("ended", "- {type: shell, shell: {inline: 'echo started; sleep 600'}}")
            .replace("    cloudInit", "    tpm: true\n    cloudInit");
        let mut running = Running::start(bench.command(&manifest));
        running.until_output("started");
        assert!(has_tpm(&bench));
        running.signal(signal);
        running.end().expect_code(code);
        bench.expect_no_process_within(Duration::from_secs(5));
        assert_eq!(bench.run("modules", &["gc"]).0, 0);
        bench.expect_clean();
    }
}
