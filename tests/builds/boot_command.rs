//! Boot commands that fail on real machines: what is reported of the screen, what was fetched, and that nothing is left
//! behind.

use crate::support::{Bench, Ended};
use serde_json::{Value, json};
use std::fs;

/// CD-ROMs of Debian's packages `ipxe` and `grub-rescue-pc`, which `tools/setup` installs.
const IPXE: &str = "/usr/lib/ipxe/ipxe.iso";
const GRUB: &str = "/usr/lib/grub-rescue/grub-rescue-cdrom.iso";

/// Returns a manifest of one VM that boots from a CD-ROM because its disk is blank.
fn from_iso(iso: &str, boot_command: &[&str], more: &str) -> String {
    let boot_command: String = boot_command.iter().map(|line| format!("      - \"{line}\"\n")).collect();
    format!(
        "name: nothing\n{more}vms:\n  - name: vm\n    source: {{blank: true}}\n    isos: [{{url: 'file://{iso}'}}]\n    \
         resources: {{cpu: 1, memory: 256Mi}}\n    disks: [{{name: rootdisk, size: 1Gi}}]\n    \
         communicator: {{sshPassword: hunter2, sshTimeout: 15s}}\n    bootCommand:\n{boot_command}"
    )
}

/// Builds a manifest that must fail in its boot command and leave nothing behind; returns its failure.
fn failed(bench: &Bench, manifest: &str, kind: &str) -> (Ended, Value) {
    let ended = bench.build(manifest);
    ended.expect_code(1);
    bench.expect_clean();
    let outcome = ended.outcome().clone();
    assert_eq!(outcome["phase"], "BootCommand");
    assert_eq!(outcome["kind"], kind);
    let screenshot = fs::read(outcome["screenshot"].as_str().expect("a screenshot")).unwrap();
    assert!(screenshot.starts_with(b"\x89PNG"));
    assert!(!format!("{}{}", ended.stdout, ended.stderr).contains("hunter2"));
    (ended, outcome)
}

fn screen(outcome: &Value) -> String {
    outcome["screen"].as_array().unwrap().iter().map(|line| format!("{}\n", line.as_str().unwrap())).collect()
}

#[test]
fn a_text_that_never_appears_fails_with_the_screen() {
    let bench = Bench::new();
    let command = [
        "<waitText 'for a command-line' 3m>c<waitText 'grub>' 1m>",
        "echo I am {{ .Name }}, hunter2<enter>",
        "<waitText 'never to be seen' 5s>",
    ];
    let (ended, outcome) = failed(&bench, &from_iso(GRUB, &command, ""), "timed_out");
    ended.expect_text(&[
        "boot command action 6 of 6: wait up to 5s for \"never to be seen\" on the screen",
        "expected \"never to be seen\" on the screen within 5 s, but it shows:",
        "I am vm, ***",
        "screenshot: ",
    ]);
    let screen = screen(&outcome);
    assert!(screen.contains("grub> echo I am vm, ***\nI am vm, ***\n"), "{screen}");
    let typed = ended.event(|event| event["doing"] == "type \"echo I am vm, ***\"");
    assert_eq!(typed.expect("typing is reported")["action"], 4);
}

#[test]
fn a_looping_installer_is_reported_with_its_requests() {
    let bench = Bench::new();
    let more = "files:\n  - name: boot.ipxe\n    inline: |\n      #!ipxe\n      echo The installer starts\n      sleep 2\n      \
                chain boot.ipxe\n  - {name: answers.cfg, inline: none}\n\
                httpDirectory: {files: [{name: boot.ipxe}, {name: answers.cfg}]}\n";
    let command = [
        "<waitText 'Ctrl-B' 3m><leftCtrlOn>b<leftCtrlOff><waitText 'iPXE>' 1m>",
        "dhcp && chain http://{{ .HTTPIP }}:{{ .HTTPPort }}/boot.ipxe<enter><waitText 'starts' 1m>",
    ];
    let (ended, outcome) = failed(&bench, &from_iso(IPXE, &command, more), "guest_unreachable");
    ended.expect_text(&[
        "expected an SSH login within 15 s",
        "served files:",
        "answers.cfg: never requested",
    ]);
    let served = outcome["served"].as_array().unwrap();
    assert_eq!(served[0]["name"], "boot.ipxe");
    assert!(served[0]["requests"].as_u64().unwrap() >= 3, "{served:?}");
    assert_eq!(served[1], json!({"name": "answers.cfg", "requests": 0}));
    assert!(screen(&outcome).matches("The installer starts").count() >= 2, "{}", screen(&outcome));
}
