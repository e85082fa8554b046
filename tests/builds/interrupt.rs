//! Builds that are interrupted in every phase: by Ctrl-C, which cleans up, and by SIGKILL, after which the next start
//! cleans up.

use crate::support::{
    Bench, Running, guest_path,
    http::{Answer, Server},
    one_vm, tiny_manifest,
};
use rustix::process::Signal;
use std::{fs, time::Duration};

const STEP: &str = "- {type: shell, name: work, shell: {inline: 'echo started; sleep 600'}}";

/// Starts a build and waits until it is in a phase; also returns the server that must live as long as the build.
fn start_until(bench: &Bench, phase: &str) -> (Running, Option<Server>) {
    let mut server = None;
    let manifest = match phase {
        "SourceImporting" => {
            let image = fs::read(guest_path("tiny.qcow2")).unwrap();
            let stalls = Server::start(Answer::Stall(image.into(), 1 << 20));
            let url = stalls.url("tiny.qcow2");
            server = Some(stalls);
            one_vm("victim", &format!("{{url: '{url}'}}"), "")
        }
        "Provisioning" => tiny_manifest("victim", STEP),
        _ => tiny_manifest("victim", ""),
    };
    let mut running = Running::start(bench.command(&manifest));
    match phase {
        "SourceImporting" => running.until("bytes of the download", |event| event["event"] == "progress"),
        "Provisioning" => running.until_output("started"),
        phase => running.until_phase(phase),
    };
    (running, server)
}

fn interrupted(phase: &str) {
    let bench = Bench::new();
    let (running, _server) = start_until(&bench, phase);
    running.signal(Signal::INT);
    let ended = running.end();
    let (_, modules, _) = bench.run("modules", &["list"]);
    if phase == "TemplateProvisioning" && ended.code == 0 {
        // Publishing is one rename: the signal arrived after it, and the module is complete.
        assert_eq!(ended.outcome()["result"], "built");
        assert!(modules.contains("victim"), "{modules}");
    } else {
        ended.expect_code(130).expect_text(&["cancelled"]);
        assert_eq!(ended.outcome()["result"], "cancelled");
        assert!(!modules.contains("victim"), "a module of a cancelled build: {modules}");
    }
    bench.expect_clean();
}

fn killed(phase: &str) {
    let bench = Bench::new();
    let (running, server) = start_until(&bench, phase);
    running.signal(Signal::KILL);
    running.end();
    bench.expect_no_process_within(Duration::from_secs(5));
    drop(server);
    let (code, _, stderr) = bench.run("modules", &["gc"]);
    assert_eq!(code, 0, "{stderr}");
    bench.expect_clean();
    let (_, modules, _) = bench.run("modules", &["list"]);
    assert!(
        phase == "TemplateProvisioning" || !modules.contains("victim"),
        "a module of a killed build: {modules}"
    );
    // The store is intact: the same build succeeds on it.
    bench.built(&tiny_manifest("victim", ""));
    bench.expect_clean();
}

macro_rules! in_each_phase {
    ($($name:ident: $phase:literal),*) => {
        mod ctrl_c { $(#[test] fn $name() { super::interrupted($phase); })* }
        mod sigkill { $(#[test] fn $name() { super::killed($phase); })* }
    };
}

in_each_phase! {
    importing: "SourceImporting",
    booting: "Booting",
    provisioning: "Provisioning",
    shutting_down: "ShuttingDown",
    capturing: "CapturingDisks",
    publishing: "TemplateProvisioning"
}

#[test]
fn the_next_build_removes_what_a_killed_one_left() {
    let bench = Bench::new();
    let (running, _) = start_until(&bench, "Provisioning");
    running.signal(Signal::KILL);
    running.end();
    bench.expect_no_process_within(Duration::from_secs(5));
    bench.built(&tiny_manifest("successor", ""));
    bench.expect_clean();
}
