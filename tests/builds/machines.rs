//! Whole builds on QEMU whose machines fail: what is reported, and that nothing is left behind.

use crate::support::{Bench, Running, one_vm, tiny, tiny_manifest};
use rustix::process::{Pid, Signal, kill_process};
use std::{
    fs, io, net::TcpListener, os::unix::fs::PermissionsExt, path::Path, process::Command, time::Duration,
};

#[test]
fn a_missing_qemu_is_reported() {
    let bench = Bench::new();
    let mut command = bench.command(&tiny_manifest("broken", ""));
    command.env("PATH", bench.path("empty"));
    let ended = Running::start(command).end();
    ended.expect_code(1).expect_text(&["qemu-system-x86_64", "apt"]);
    bench.expect_clean();
}

#[test]
fn a_qemu_that_does_not_start_is_reported() {
    let bench = Bench::new();
    let bin = bench.path("bin");
    fs::create_dir_all(&bin).unwrap();
    let real = which("qemu-system-x86_64");
    // Answers queries about features like the real one, but fails to start a machine.
    let script = format!(
        "#!/bin/sh\ncase \" $* \" in *' -blockdev '*|*' -drive '*|*' -netdev '*) echo 'cannot set up guest memory: Cannot allocate memory' >&2; exit 1;; esac\nexec {real} \"$@\"\n"
    );
    let fake = bin.join("qemu-system-x86_64");
    fs::write(&fake, script).unwrap();
    fs::set_permissions(&fake, fs::Permissions::from_mode(0o755)).unwrap();
    let mut command = bench.command(&tiny_manifest("broken", ""));
    command.env("PATH", format!("{}:{}", bin.display(), std::env::var("PATH").unwrap()));
    let ended = Running::start(command).end();
    ended.expect_code(1).expect_text(&["vm vm", "Cannot allocate memory"]);
    assert_eq!(ended.outcome()["kind"], "launch_failed");
    bench.expect_clean();
}

fn which(program: &str) -> String {
    std::env::var("PATH")
        .unwrap()
        .split(':')
        .map(|directory| format!("{directory}/{program}"))
        .find(|path| fs::metadata(path).is_ok())
        .unwrap_or_else(|| panic!("{program} is missing: apt-get install qemu-system-x86"))
}

fn kill_the_machine(bench: &Bench) {
    let machines = bench.machines();
    assert_eq!(machines.len(), 1);
    kill_process(Pid::from_raw(machines[0]).unwrap(), Signal::KILL).unwrap();
}

#[test]
fn a_qemu_killed_while_booting_is_reported() {
    let bench = Bench::new();
    let mut running = Running::start(bench.command(&tiny_manifest("broken", "")));
    running.until_phase("Booting");
    // Its kernel writes to the console, so it is booting.
    let speaks = |file: &Path| {
        file.to_string_lossy().ends_with("serial.log") && file.metadata().is_ok_and(|log| log.len() > 0)
    };
    while !crate::support::walk(&bench.store().join("labs")).iter().any(|file| speaks(file)) {
        std::thread::sleep(Duration::from_millis(20));
    }
    kill_the_machine(&bench);
    let ended = running.end();
    ended.expect_code(1).expect_text(&["vm vm", "SIGKILL"]);
    assert_eq!(ended.outcome()["kind"], "machine_died");
    assert_eq!(ended.outcome()["phase"], "Booting");
    bench.expect_clean();
}

#[test]
fn a_qemu_killed_in_a_step_is_reported() {
    let bench = Bench::new();
    let manifest =
        tiny_manifest("broken", "- {type: shell, name: long, shell: {inline: 'echo started; sleep 600'}}");
    let mut running = Running::start(bench.command(&manifest));
    running.until_output("started");
    kill_the_machine(&bench);
    let ended = running.end();
    ended.expect_code(1).expect_text(&["step 1 (long)", "SIGKILL"]);
    assert_eq!(ended.outcome()["kind"], "machine_died");
    assert_eq!(ended.outcome()["output_tail"][0], "started");
    assert!(!ended.outcome()["serial_tail"].as_array().unwrap().is_empty(), "the serial console spoke");
    bench.expect_clean();
}

#[test]
fn a_guest_that_panics_is_reported() {
    let bench = Bench::new();
    let manifest = tiny_manifest(
        "broken",
        "- {type: shell, name: crash, shell: {inline: 'echo c > /proc/sysrq-trigger; sleep 600'}}",
    );
    let ended = bench.build(&manifest);
    ended.expect_code(1).expect_text(&["step 1 (crash)", "panic"]);
    assert_eq!(ended.outcome()["kind"], "machine_died");
    let serial = ended.outcome()["serial_tail"].to_string();
    assert!(serial.contains("sysrq triggered crash") || serial.contains("Kernel panic"), "{serial}");
    bench.expect_clean();
}

#[test]
fn a_silent_guest_is_reported() {
    let bench = Bench::new();
    let manifest = one_vm("broken", "{blank: true}", "").replace("sshTimeout: 3m", "sshTimeout: 6s");
    let ended = bench.build(&manifest);
    ended.expect_code(1).expect_text(&["vm vm", "6 s", "sshTimeout"]);
    assert_eq!(ended.outcome()["kind"], "guest_unreachable");
    let screenshot = ended.outcome()["screenshot"].as_str().expect("a screenshot");
    assert!(fs::read(screenshot).unwrap().starts_with(b"\x89PNG"));
    bench.expect_clean();
}

#[test]
fn refused_credentials_are_reported() {
    let bench = Bench::new();
    let manifest = format!(
        "name: broken\nvms:\n  - name: vm\n    source: {{url: '{}'}}\n    resources: {{cpu: 1, memory: 256Mi}}\n    communicator: \
         {{sshUsername: tester, sshPassword: not-the-password, sshTimeout: 45s}}\n",
        tiny()
    );
    let ended = bench.build(&manifest);
    ended.expect_code(1).expect_text(&["vm vm", "tester", "refused"]);
    assert!(
        !ended.stderr.contains("not-the-password") && !ended.stdout.contains("not-the-password"),
        "a secret shows"
    );
    assert_eq!(ended.outcome()["kind"], "authentication");
    bench.expect_clean();
}

#[test]
fn a_machine_too_large_for_the_host_is_reported() {
    let bench = Bench::new();
    let ended = bench.build(&tiny_manifest("broken", "").replace("256Mi", "64Ti"));
    ended.expect_code(1).expect_text(&["vm vm", "memory"]);
    assert_eq!(ended.outcome()["kind"], "launch_failed");
    bench.expect_clean();
}

#[test]
fn guests_and_other_users_of_the_host_cannot_reach_each_other() {
    let bench = Bench::new();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let port = listener.local_addr().unwrap().port();
    // The gateway, and the address at which QEMU's user network would expose the host's loopback.
    let script = format!(
        "for address in 10.0.2.1 10.0.2.2; do if nc -w 20 $address {port} </dev/null; then echo reached $address; exit 1; fi; done; \
         echo no address is reachable"
    );
    let manifest = tiny_manifest("alone", &format!("- {{type: shell, shell: {{inline: '{script}'}}}}"));
    let mut running = Running::start(bench.command(&manifest));
    running.until_phase("Provisioning");
    // Everything that leads to the guest is in the store, which other users cannot enter.
    let store = bench.store();
    assert_eq!(fs::metadata(&store).unwrap().permissions().mode() & 0o777, 0o700);
    if rustix::process::geteuid().is_root() {
        fs::set_permissions(store.parent().unwrap(), fs::Permissions::from_mode(0o755)).unwrap();
        let mut nobody = Command::new("setpriv");
        nobody.args(["--reuid=65534", "--regid=65534", "--clear-groups", "--", "ls"]).arg(store.join("labs"));
        assert!(!nobody.output().unwrap().status.success(), "another user sees the labs");
    }
    let ended = running.end();
    ended.expect_code(0);
    let said = |event: &&serde_json::Value| {
        event["event"] == "step_output" && event["line"] == "no address is reachable"
    };
    assert!(ended.events.iter().any(|event| said(&event)), "{:?}", ended.events);
    assert_eq!(listener.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock, "a guest reached the host");
    bench.expect_clean();
}
