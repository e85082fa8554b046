//! Installs Debian on a slowed machine: everything runs on one core, together with other programs that compute all the
//! time. Waits for text still work there; fixed waits that were measured without the load do not.
//! Run by `make test-slow`.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod support;

use serde_json::Value;
use std::{
    fs,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};
use support::{Bench, Ended, Running, install};

/// Number of programs that compute on the same core as the build.
const COMPETITORS: usize = 3;

/// The programs that keep a core busy. They end with this program, however it ends.
struct Load(Vec<Child>);

impl Load {
    fn on(core: &str) -> Self {
        let competitor = || {
            let args = ["--pdeathsig", "KILL", "taskset", "-c", core, "sh", "-c", "while :; do :; done"];
            Command::new("setpriv").args(args).stdin(Stdio::null()).spawn().unwrap()
        };
        Self((0..COMPETITORS).map(|_| competitor()).collect())
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Returns the first core that this program may use.
fn first_core() -> String {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let cores = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap();
    cores.trim().split(['-', ',']).next().unwrap().to_owned()
}

/// Builds a manifest on that core only, together with its rivals.
fn build_slowed(bench: &Bench, manifest: &str) -> Ended {
    let core = first_core();
    let plain = bench.command(manifest);
    let mut command = Command::new("taskset");
    command.args(["-c", &core]).arg(plain.get_program()).args(plain.get_args()).stdin(Stdio::null());
    command.current_dir(plain.get_current_dir().unwrap());
    command.envs(plain.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let _load = Load::on(&core);
    Running::start(command).end()
}

fn time(event: &Value) -> jiff::Timestamp {
    event["time"].as_str().unwrap().parse().unwrap()
}

/// Returns how long each wait of the boot command took.
fn waits(ended: &Ended) -> Vec<Duration> {
    let of =
        |event: &&Value| ["boot_action", "boot_command_done"].contains(&event["event"].as_str().unwrap());
    let actions: Vec<_> = ended.events.iter().filter(of).collect();
    let waits = actions.windows(2).filter(|pair| pair[0]["doing"].as_str().unwrap().starts_with("wait "));
    waits.map(|pair| time(pair[1]).duration_since(time(pair[0])).unsigned_abs()).collect()
}

/// Replaces the waits for text of a manifest by fixed waits, each a second longer than measured.
fn with_fixed_waits(manifest: &str, measured: &[Duration]) -> String {
    let mut rest = manifest;
    let mut made = String::new();
    for wait in measured {
        let (before, from) = rest.split_once("<waitText '").expect("a wait for each that was measured");
        let (_text, after) = from.split_once('\'').unwrap();
        let after = &after[after.find('>').unwrap() + 1..];
        made.push_str(&format!("{before}<wait{}s>", wait.as_secs() + 1));
        rest = after;
    }
    assert!(!rest.contains("<waitText"), "every wait was measured");
    made + rest
}

/// Cuts a manifest where the installer unpacks Debian: the rest is done by the installer, and needs no keys.
fn up_to_the_installer(manifest: &str, name: &str) -> String {
    let last = "      - <waitText 'installed login:' 60m>\n";
    assert!(manifest.contains(last));
    manifest
        .replace(last, "")
        .replace("name: installed\n", &format!("name: {name}\n"))
        .replace("sshTimeout: 30m", "sshTimeout: 5s")
}

#[test]
fn debian_is_installed_with_bios_and_boots() {
    let (_bench, _record, lines) = install::installs(&install::BIOS, &Bench::build);
    assert_eq!(lines.last().unwrap(), "started by BIOS");
}

#[test]
fn waiting_for_text_works_where_fixed_waits_fail() {
    let bench = Bench::new();
    // Nothing in this manifest depends on the speed of the machine, except its limits.
    let manifest = install::manifest("install.yaml")
        .replace(" 3m>", " 20m>")
        .replace("'iPXE>'>", "'iPXE>' 20m>")
        .replace(" 5m>", " 30m>")
        .replace(" 15m>", " 60m>")
        .replace("timeout: 30m", "timeout: 2h")
        .replace("sshTimeout: 10m", "sshTimeout: 30m");

    let begun = up_to_the_installer(&manifest, "begun");
    let ended = bench.build(&begun);
    assert_eq!(ended.outcome()["kind"], "guest_unreachable", "{}", ended.stderr);
    assert!(install::requests(&ended).contains(&("/answers".to_owned(), 200)), "{}", ended.stdout);
    let measured = waits(&ended);
    eprintln!("not slowed: the waits took {measured:.1?}");
    bench.expect_clean();

    let ended = build_slowed(&bench, &with_fixed_waits(&begun, &measured));
    eprintln!("slowed, waits for time: {}", ended.stderr);
    assert_eq!(ended.outcome()["kind"], "guest_unreachable", "{}", ended.stderr);
    let asked = install::requests(&ended);
    assert!(
        !asked.iter().any(|(path, _)| path == "/answers"),
        "the installer was driven after all: {asked:?}"
    );
    bench.expect_clean();

    let start = Instant::now();
    let ended = build_slowed(&bench, &manifest);
    ended.expect_code(0);
    eprintln!(
        "slowed, waits for text: installed in {:.0?}; the waits took {:.1?}",
        start.elapsed(),
        waits(&ended)
    );
    bench.expect_clean();
}
