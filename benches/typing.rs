//! How fast text is typed into programs that read the keyboard at boot, on QEMU.
//!
//! ```text
//! make bench
//! ```
//!
//! 2,000 printable characters of every kind are typed into the command line of GRUB, the shell of iPXE and a Linux
//! console, and read back; a lost character fails the bench. For comparison, Packer from Debian's packages types some
//! of the same characters into GRUB at its default pace: 100 ms after every press and after every release, including
//! those of Shift.

#![allow(missing_docs, clippy::print_stdout, clippy::unwrap_used)] // A program that prints, and ends where it cannot go on.

#[path = "../tests/support/typing.rs"]
mod typing;

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};
use typing::{GRUB, Typed, printable};

const MANY: usize = 2000;
/// Enough characters for Packer, whose pace is fixed.
const FEW: usize = 60;

#[tokio::main]
async fn main() {
    let guests = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/guests");
    let tiny = guests.join("tiny.qcow2");
    assert!(tiny.exists(), "this bench needs {}: make guests", tiny.display());

    println!("typing {MANY} characters of every printable kind, read back identical");
    let packer = packer(&printable(FEW));
    println!("  Packer, its default pace    {packer:6.1} characters per second");
    let text = printable(MANY);
    for (into, typed) in [
        ("GRUB's command line", typing::grub(&text).await),
        ("iPXE's shell", typing::ipxe(&text).await),
        ("a Linux console", typing::linux(&text, &tiny).await),
    ] {
        let rate = rate(&typed);
        println!("  into {into:21}  {rate:6.1} characters per second   {:.0} × as fast", rate / packer);
    }
}

fn rate(typed: &Typed) -> f64 {
    assert_eq!(typed.found, typed.wanted, "what was read back");
    typed.rate()
}

/// Returns the speed of Packer in characters per second, from its message that it starts to type until its next
/// message.
fn packer(text: &str) -> f64 {
    let dir = tempfile::Builder::new().prefix("bench.").tempdir().unwrap();
    // Packer would treat these two characters as the start of a template or a token instead of typing them.
    let text: String = text.chars().filter(|character| !"<{".contains(*character)).collect();
    let template = serde_json::json!({"builders": [{
        "type": "qemu",
        "accelerator": "tcg",
        "headless": true,
        "vnc_bind_address": "127.0.0.1",
        "memory": 128,
        "iso_url": GRUB,
        "iso_checksum": "none",
        "disk_size": "64M",
        "output_directory": dir.path().join("packer"),
        "boot_wait": "10s",
        "boot_command": [text],
        "communicator": "ssh",
        "ssh_username": "nobody",
        "ssh_password": "none",
        // No SSH server answers: Packer gives up, and ends its machine.
        "ssh_timeout": "1s",
        "qemuargs": [["-netdev", "user,id=user.0,hostfwd=tcp:127.0.0.1:{{ .SSHHostPort }}-:22"]],
    }]});
    let path = dir.path().join("packer.json");
    fs::write(&path, template.to_string()).unwrap();
    let mut child = Command::new("packer")
        .args(["build", "-color=false"])
        .arg(&path)
        .env("PACKER_CACHE_DIR", dir.path().join("cache"))
        .env("CHECKPOINT_DISABLE", "1") // No calls to its maker.
        .env("HOME", dir.path())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut begun, mut took, mut log) = (None, Duration::ZERO, String::new());
    for line in BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok) {
        log.push_str(&line);
        log.push('\n');
        match begun {
            None if line.contains("Typing the boot command") => begun = Some(Instant::now()),
            Some(begin) if took.is_zero() => took = begin.elapsed(),
            _ => {}
        }
    }
    child.wait().unwrap();
    assert!(!took.is_zero(), "Packer typed nothing:\n{log}");
    text.chars().count() as f64 / took.as_secs_f64()
}
