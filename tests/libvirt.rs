//! Whole builds on libvirt, each with its own libvirtd: the same manifests, events and modules as on QEMU, and modules
//! that are passed from one to the other.
#![allow(clippy::unwrap_used)]

#[path = "../rudder-libvirt/tests/common/daemon.rs"]
mod daemon;
mod support;

use daemon::{Daemon, Scope, in_namespaces};
use rustix::process::Signal;
use std::{
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};
use support::{Bench, Running, alike::expect_alike, one_vm, rescue, tiny_manifest};

const WAITS: &str = "- {type: shell, name: work, shell: {inline: 'echo started; sleep 600'}}";

/// A bench, and a libvirtd whose files are in it.
struct TestHost {
    scope: Scope,
    daemon: Daemon,
    bench: Bench,
}

impl TestHost {
    fn new() -> Self {
        Self::of(Scope::Session)
    }

    fn of(scope: Scope) -> Self {
        let bench = Bench::new();
        Self { scope, daemon: Daemon::of(scope, &bench.path("libvirt")), bench }
    }

    /// Returns the command that builds a manifest on libvirt.
    fn command(&self, manifest: &str) -> Command {
        let mut command = self.bench.command(manifest);
        command.args(["--backend", "libvirt"]).env("LIBVIRT_DEFAULT_URI", self.daemon.uri());
        command
    }

    /// Builds a manifest on libvirt.
    fn build(&self, manifest: &str) -> support::Ended {
        Running::start(self.command(manifest)).end()
    }

    /// Runs the example `modules` on libvirt, which must succeed; returns its output.
    fn modules(&self, args: &[&str]) -> String {
        let mut command = Command::new(support::example("modules"));
        command.args(["--backend", "libvirt", "--store"]).arg(self.bench.store()).args(args);
        let output = command.env("LIBVIRT_DEFAULT_URI", self.daemon.uri()).output().unwrap();
        assert!(output.status.success(), "modules {args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Asserts that a build left nothing behind, apart from the daemon's own files and processes.
    #[track_caller]
    fn expect_clean(&self) {
        assert_eq!(self.bench.machines(), Vec::<i32>::new());
        let labs: Vec<_> = std::fs::read_dir(self.bench.store().join("labs")).unwrap().flatten().collect();
        assert!(labs.is_empty(), "{labs:?}");
        let domains = self.daemon.domains();
        assert!(domains.iter().all(|domain| !domain.starts_with("rudder.")), "{domains:?}");
        if self.scope == Scope::System {
            assert_eq!(self.daemon.networks(), Vec::<String>::new());
        }
    }
}

/// Queries everything that exists repeatedly, with libvirt's own tool.
fn watch(daemon: &Daemon, enough: &AtomicBool) -> usize {
    let mut checks = 0;
    while !enough.load(Ordering::Relaxed) {
        for domain in daemon.domains() {
            for about in
                ["dumpxml", "dominfo", "domstate", "domblklist", "domiflist", "domstats", "ttyconsole"]
            {
                // The domain may have ended in the meantime.
                daemon.try_virsh(&[about, &domain]);
            }
            daemon.try_virsh(&["console", &domain]);
            daemon.try_virsh(&["screenshot", &domain, "/dev/null"]);
        }
        daemon.try_virsh(&["net-list", "--all"]);
        daemon.try_virsh(&["pool-list", "--all"]);
        checks += 1;
    }
    checks
}

#[test]
fn modules_move_between_hypervisors_while_others_watch() {
    let host = TestHost::new();
    let said = |ended: &support::Ended, text: &str| {
        assert!(ended.event(|event| event["line"] == text).is_some(), "{text}; {}", ended.stdout);
    };
    let step = |text: &str| {
        format!("- {{type: shell, shell: {{inline: 'cat /notes || true; echo {text} >> /notes; sync'}}}}")
    };
    let base = tiny_manifest("base", &step("on-libvirt"));
    let enough = AtomicBool::new(false);
    let built = thread::scope(|scope| {
        let watcher = scope.spawn(|| watch(&host.daemon, &enough));
        let built = host.build(&base);
        enough.store(true, Ordering::Relaxed);
        assert!(watcher.join().unwrap() > 0);
        built
    });
    built.expect_code(0);
    host.expect_clean();
    assert_eq!(host.daemon.domains(), ["base.vm"]);
    let elsewhere = Bench::new();
    expect_alike(&built, &elsewhere.build(&base), |_| true);

    let ended = host.bench.build(&one_vm("middle", "{buildRef: {name: base}}", &step("on-qemu")));
    ended.expect_code(0);
    said(&ended, "on-libvirt");
    host.expect_clean();

    let ended = host.build(&one_vm("top", "{buildRef: {name: middle}}", &step("on-libvirt-again")));
    ended.expect_code(0);
    said(&ended, "on-qemu");
    host.expect_clean();
    // Modules built on QEMU have no domains.
    assert_eq!(host.daemon.domains(), ["base.vm", "top.vm"]);
    assert!(host.modules(&["show", "top"]).contains("version  libvirt"));
    for module in ["top", "middle", "base"] {
        host.modules(&["remove", module]);
    }
    assert_eq!(host.daemon.domains(), Vec::<String>::new());
}

#[test]
fn a_failed_step_is_reported_as_on_qemu() {
    let host = TestHost::new();
    let manifest =
        tiny_manifest("broken", "- {type: shell, name: bad, shell: {inline: 'echo to-be-read; exit 9'}}");
    let ended = host.build(&manifest);
    ended.expect_code(1).expect_text(&["bad", "9", "to-be-read"]);
    host.expect_clean();
    let on_qemu = host.bench.build(&manifest);
    let reported = |ended: &support::Ended| {
        let outcome = ended.outcome();
        ["kind", "message", "phase", "step", "exit_code", "output_tail"].map(|key| outcome[key].clone())
    };
    assert_eq!(reported(&ended), reported(&on_qemu));
    assert!(reported(&ended)[0].is_string(), "{:?}", reported(&ended));
}

/// Boots from a CD-ROM as a floppy directs, types, waits for texts on the screen, and downloads a served file.
#[test]
fn a_disk_repaired_from_a_cd_boots_on_qemu() {
    repaired(&TestHost::new());
}

#[test]
fn on_system_libvirt_a_disk_is_repaired_from_a_cd() {
    if in_namespaces("on_system_libvirt_a_disk_is_repaired_from_a_cd") {
        repaired(&TestHost::of(Scope::System));
    }
}

fn repaired(host: &TestHost) {
    let ended = host.build(&rescue::manifest(&host.bench));
    ended.expect_code(0);
    let asked = ended.event(|event| event["event"] == "http_request").expect("a served file was asked for");
    assert_eq!((&asked["path"], &asked["status"]), (&"/boot.bin".into(), &200.into()));
    host.expect_clean();
    let ended = host.bench.build(&one_vm("child", "{buildRef: {name: rescued}}", rescue::CHECK));
    ended.expect_code(0);
    assert!(ended.event(|event| event["line"] == "repaired").is_some(), "{}", ended.stdout);
    host.expect_clean();
}

#[test]
fn a_killed_libvirtd_fails_the_build_with_its_cause() {
    libvirtd_is_killed(TestHost::new());
}

#[test]
fn networks_left_by_a_killed_system_libvirtd_are_reaped() {
    if in_namespaces("networks_left_by_a_killed_system_libvirtd_are_reaped") {
        libvirtd_is_killed(TestHost::of(Scope::System));
    }
}

fn libvirtd_is_killed(mut host: TestHost) {
    let mut running = Running::start(host.command(&tiny_manifest("victim", WAITS)));
    running.until_output("started");
    host.daemon.kill();
    let killed = Instant::now();
    let ended = running.end();
    // Libvirt may be unreachable for three seconds; the rest is a margin for a busy host.
    assert!(killed.elapsed() < Duration::from_secs(15), "it took {:?}", killed.elapsed());
    ended.expect_code(1);
    let outcome = ended.outcome();
    assert_eq!(outcome["kind"], "machine_died", "{outcome}");
    assert_eq!((&outcome["vm"], &outcome["phase"]), (&"vm".into(), &"Provisioning".into()), "{outcome}");
    assert_eq!(
        (&outcome["step"], &outcome["output_tail"]),
        (&"1 (work)".into(), &serde_json::json!(["started"]))
    );
    let message = outcome["message"].as_str().unwrap();
    let uri = host.daemon.uri();
    for part in [
        "build victim: vm vm: step 1 (work): ",
        &format!("libvirt is unreachable: uri {uri}: cannot connect to libvirt: "),
        "help: start libvirtd (systemctl start libvirtd",
    ] {
        assert!(message.contains(part), "expected {part:?}, but found {message}");
    }
    host.daemon.restart();
    host.modules(&["gc"]);
    host.expect_clean();
    // The next build is not affected.
    host.build(&tiny_manifest("after", "")).expect_code(0);
    host.expect_clean();
}

#[test]
fn the_next_build_removes_what_a_killed_builder_left() {
    let host = TestHost::new();
    let mut running = Running::start(host.command(&tiny_manifest("victim", WAITS)));
    running.until_output("started");
    running.signal(Signal::KILL);
    drop(running.end());
    let deadline = Instant::now() + Duration::from_secs(30);
    while !host.bench.machines().is_empty() {
        assert!(Instant::now() < deadline, "libvirt does not end what its owner left");
        thread::sleep(Duration::from_millis(50));
    }
    host.modules(&["gc"]);
    host.expect_clean();
}

#[test]
fn on_system_libvirt_machines_are_on_a_bridge() {
    if !in_namespaces("on_system_libvirt_machines_are_on_a_bridge") {
        return;
    }
    let host = TestHost::of(Scope::System);
    let step = "- {type: shell, name: look, shell: {inline: 'echo on-a-bridge > /notes; sync; ip -o -4 addr show; sleep 2'}}";
    let mut running = Running::start(host.command(&tiny_manifest("base", step)));
    let leased = running.until_output("scope global");
    let line = leased["line"].as_str().unwrap();
    let address = line.split_whitespace().find(|word| word.contains("/24")).unwrap();
    let networks = host.daemon.networks();
    assert_eq!(networks.len(), 1, "{networks:?}");
    assert!(host.daemon.virsh(&["net-dhcp-leases", &networks[0]]).contains(address), "{line}");
    running.end().expect_code(0);
    host.expect_clean();
    assert_eq!(host.daemon.domains(), ["base.vm"]);
    // Two labs at once, each with its own address range.
    let layer =
        |name: &str| one_vm(name, "{buildRef: {name: base}}", "- {type: shell, shell: {inline: cat /notes}}");
    let other = host.bench.write("other.yaml", &layer("two"));
    let mut second = Command::new(support::example("build"));
    second.args(["--backend", "libvirt", "--events", "json", "--store"]).arg(host.bench.store()).arg(other);
    second.env("LIBVIRT_DEFAULT_URI", host.daemon.uri());
    let second = Running::start(second);
    let first = host.build(&layer("one"));
    for ended in [first, second.end()] {
        ended.expect_code(0);
        assert!(ended.event(|event| event["line"] == "on-a-bridge").is_some(), "{}", ended.stdout);
    }
    host.expect_clean();
}
