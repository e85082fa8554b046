//! Steps that wait for a person, on real machines: resumed by a program, and by a person with a VNC viewer.

use crate::support::{Bench, Running, one_vm, tiny_manifest};
use rudder::{
    backend::Backend,
    build::Build,
    event::EventKind,
    plan::{PlanContext, prepare},
    qemu::QemuBackend,
    store::Store,
};
use rustix::process::Signal;
use std::{
    fs,
    net::{SocketAddr, TcpStream},
    process::{Command, Stdio},
    sync::Arc,
};
use tokio::io::AsyncReadExt as _;

const BY_HAND: &str = "- {type: handbuild, name: by hand, handbuild: {instructions: Type something.}}";

#[tokio::test]
async fn a_program_resumes_a_paused_build() {
    let bench = Bench::new();
    let backend: Arc<dyn Backend> =
        Arc::new(QemuBackend::builder(Store::open(bench.store()).unwrap()).build());
    let manifest =
        tiny_manifest("program", &format!("{BY_HAND}\n- {{type: shell, shell: {{inline: echo after}}}}"));
    let context = PlanContext::new(backend.capabilities());
    let plans = prepare("manifest.yaml", manifest.as_bytes(), &context).into_plans().unwrap();
    let build = Build::new(plans.into_iter().next().unwrap(), backend).start();
    let mut events = build.events();
    let mut reported = Vec::new();
    while let Some(event) = events.next().await {
        if let EventKind::Paused { step: 1, instructions, access } = &event.kind {
            assert_eq!(instructions, "Type something.");
            assert!(access.iter().any(|line| line.contains("display")), "{access:?}");
            let paused = build.paused().remove(0);
            assert_eq!((paused.vm(), paused.step(), paused.instructions()), ("vm", 1, "Type something."));
            let mut greeting = [0; 4];
            paused.machine().display().await.unwrap().read_exact(&mut greeting).await.unwrap();
            assert_eq!(&greeting, b"RFB ");
            build.resume("vm").unwrap();
        }
        reported.push(event.kind);
    }
    let module = build.outcome().await.unwrap_or_else(|error| panic!("{}", error.report()));
    let why = "VM vm has a handbuild step, which needs a person".to_owned();
    assert!(module.provenance.not_repeatable.contains(&why), "{:?}", module.provenance.not_repeatable);
    let written = fs::read_to_string(module.path.unwrap()).unwrap();
    assert!(written.contains(&why), "{written}");
    assert!(reported.iter().any(|kind| matches!(kind, EventKind::Resumed { step: 1, .. })));
    bench.expect_clean();
}

/// Types a text on a display, with a VNC client that is independent of this project.
fn type_by_vnc(address: SocketAddr, password: &str, text: &str) {
    const SCRIPT: &str = r#"
        use strict; use warnings; use Net::VNC;
        my ($host, $port, $password, $text) = @ARGV;
        my $vnc = Net::VNC->new({hostname => $host, port => $port, password => $password});
        $vnc->login;
        $vnc->capture;
        for my $character (split //, $text) {
            my $shift = $character =~ /[A-Z~!@#\$%^&*()_+{}|:"<>?]/;
            my $sym = $character eq "\n" ? 0xff0d : ord $character;
            $vnc->send_key_event_down(0xffe1) if $shift;
            $vnc->send_key_event($sym);
            $vnc->send_key_event_up(0xffe1) if $shift;
            # As a person does, go on when the screen has changed: a keyboard has a small memory.
            $vnc->capture;
        }
    "#;
    let output = Command::new("perl")
        .args(["-e", SCRIPT, &address.ip().to_string(), &address.port().to_string(), password, text])
        .stdin(Stdio::null())
        .output()
        .expect("perl is missing: apt-get install perl");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "the VNC client failed (without it: apt-get install libnet-vnc-perl): {errors}"
    );
}

/// Starts a build with standard input, and waits for its pause; returns the address of its display, and the password.
fn paused(bench: &Bench, manifest: &str) -> (Running, SocketAddr, String) {
    let mut command = bench.command(manifest);
    command.stdin(Stdio::piped());
    let mut build = Running::start(command);
    let event = build.until("a pause", |event| event["event"] == "paused");
    assert_eq!(event["instructions"], "Type something.");
    let line = build.until_printed("vm: display: vncviewer 127.");
    let (address, rest) = line.split_once(", password ").unwrap();
    let address = format!("127.{}", address.replace("::", ":")).parse().unwrap();
    (build, address, rest.split_once(' ').unwrap().0.to_owned())
}

#[test]
fn a_person_types_over_vnc_and_resumes_the_build() {
    let bench = Bench::new();
    // A shell on the console instead of a login, which would drop what is typed before its prompt.
    let steps = format!(
        r"- type: shell
  shell:
    inline: |
      printf '#!/bin/sh\necho ready >/run/shell\nexec /bin/sh\n' >/etc/shell
      chmod 755 /etc/shell
      sed -i 's|^tty1::.*|tty1::respawn:/etc/shell|' /etc/inittab
      kill -HUP 1
      for i in $(seq 120); do if [ -s /run/shell ]; then exit 0; fi; sleep 0.5; done
      exit 1
{BY_HAND}
- type: shell
  shell:
    inline: |
      for i in $(seq 120); do if [ -s /by-hand ]; then exit 0; fi; sleep 0.5; done
      exit 1"
    );
    let (mut build, address, password) = paused(&bench, &tiny_manifest("hands", &steps));
    type_by_vnc(address, &password, "echo 'Typed: BY hand & more' >/by-hand\n");
    // The viewer has disconnected: the next one needs a new password.
    build.until_printed("(works once)\n");
    build.press_enter();
    build.until("the end of the pause", |event| event["event"] == "resumed");
    let ended = build.end();
    ended.expect_code(0).expect_text(&["Type something.", "press Enter when you are done"]);
    assert!(!ended.stdout.contains(&password), "the password shows in an event");
    assert!(TcpStream::connect(address).is_err(), "the display is still open");
    let path = ended.stdout.lines().last().unwrap().to_owned();
    assert!(fs::read_to_string(path).unwrap().contains("which needs a person"));

    let check = "- {type: shell, shell: {inline: [cat /by-hand]}}";
    let layered = bench.build(&one_vm("look", "{buildRef: {name: hands}}", check));
    layered.expect_code(0);
    let line = layered.event(|event| event["event"] == "step_output").unwrap();
    assert_eq!(line["line"], "Typed: BY hand & more");
    bench.expect_clean();
}

#[test]
fn a_paused_build_can_be_interrupted_and_needs_an_interactive_input() {
    let bench = Bench::new();
    let manifest = tiny_manifest("paused", BY_HAND);
    let (build, address, _) = paused(&bench, &manifest);
    build.signal(Signal::INT);
    build.end().expect_code(130);
    assert!(TcpStream::connect(address).is_err(), "the display is still open");
    bench.expect_clean();

    let (mut build, address, _) = paused(&bench, &manifest);
    build.close_input();
    build.end().expect_code(130).expect_text(&["standard input has ended"]);
    assert!(TcpStream::connect(address).is_err(), "the display is still open");
    bench.expect_clean();

    // Standard input is /dev/null, so the build could never be resumed.
    let refused = bench.build(&manifest);
    refused.expect_code(2).expect_text(&["step 1 (by hand) of VM vm", "neither a terminal nor a pipe"]);
    assert_eq!(refused.events.len(), 0);
    bench.expect_clean();
}
