//! Boot commands: typing, waiting, events, and everything that can end them.

use super::{
    Ended, build,
    display::Display,
    hooks::Hooked,
    media::{get, port},
    plans::*,
};
use rudder_core::{
    ErrorKind,
    backend::Death,
    build::{Build, BuildHandle},
    capability::Capability as C,
    event::{Event, EventKind, ServedFile, VmPhase as V},
    memory::MemoryBackend,
};
use serde_json::{Value, json};
use std::{sync::Arc, time::Duration};

const ENTER: u32 = 0xff0d;
const CTRL: u32 = 0xffe3;

/// Returns a plan of one VM with this boot command.
fn booting(actions: Value) -> Value {
    let mut machine = vm("a", vec![shell("work", "true")]);
    machine["boot_command"] = actions;
    plan(vec![machine])
}

fn wait_text(text: &str, seconds: u64) -> Value {
    json!({"wait-text": {"text": text, "limit": seconds * 1000}})
}

/// Runs a build to its end, on machines with this display.
async fn on(display: &Display, backend: &MemoryBackend, plan: Value) -> Ended {
    reacting(display, backend, plan, |build| build, |_, _| {}).await
}

async fn reacting(
    display: &Display,
    backend: &MemoryBackend,
    plan: Value,
    options: impl FnOnce(Build) -> Build,
    mut react: impl FnMut(&Event, &BuildHandle),
) -> Ended {
    let hooked = Hooked::new(backend, &[]).with_display(display.clone());
    let handle = options(Build::new(read(plan), Arc::new(hooked))).start();
    let (mut reader, mut events) = (handle.events(), Vec::new());
    while let Some(event) = reader.next().await {
        react(&event, &handle);
        events.push(event);
    }
    let ended = Ended { events, outcome: handle.outcome().await, specs: Vec::new() };
    assert_eq!(backend.leftovers().await, Vec::<String>::new());
    // The console disconnects from the display in a task of its own.
    let released = async {
        while !display.held().is_empty() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), released).await.expect("keys are released");
    ended
}

fn actions_done(ended: &Ended) -> Vec<&str> {
    let of = |event| match event {
        &Event { kind: EventKind::BootAction { ref doing, .. }, .. } => Some(doing.as_str()),
        _ => None,
    };
    ended.events.iter().filter_map(of).collect()
}

#[tokio::test(start_paused = true)]
async fn a_boot_command_is_typed_before_the_login() {
    let display = Display::showing("boot:").answers("linux hunter2 http://127.0.0.1/a", "Loading linux");
    let mut plan = booting(json!([
        wait_text("boot:", 60),
        {"type": "linux hunter2 http://{{ .HTTPIP }}/a"},
        {"press": ENTER},
        wait_text("Loading linux", 5),
        {"hold": CTRL},
        {"press": 0xffbe},
        {"release": CTRL},
        {"wait": 90_500},
        {"wait-serial": {"text": "in memory", "limit": 60_000}},
        {"type": "port {{ .HTTPPort }}\n"},
    ]));
    plan["http_files"] = json!(["a"]);
    plan["files"] = json!([{"name": "a", "content": {"inline": b"a"}}]);
    let ended = on(&display, &MemoryBackend::new(), plan).await;
    ended.module();
    assert_eq!(&ended.vm_phases("a")[2..5], [V::Booting, V::BootCommand, V::Provisioning]);
    let served = ended.events.iter().find_map(|event| match &event.kind {
        EventKind::Notice { message } => message.strip_prefix("files are served at http://127.0.0.1:"),
        _ => None,
    });
    let port = served.unwrap().trim_end_matches('/');
    assert_eq!(display.typed(), ["linux hunter2 http://127.0.0.1/a", &format!("port {port}"), ""]);
    assert_eq!(display.pressed(), [CTRL, 0xffbe]);
    let expected = [
        "wait up to 1m for \"boot:\" on the screen",
        "type \"linux *** http://127.0.0.1/a\"",
        "press <enter>",
        "wait up to 5s for \"Loading linux\" on the screen",
        "hold <leftCtrl>",
        "press <f1>",
        "release <leftCtrl>",
        "wait 1m30s500ms",
        "wait up to 1m for \"in memory\" on the serial console",
    ];
    let actions_done = actions_done(&ended);
    assert_eq!(&actions_done[..9], expected);
    assert_eq!(actions_done[9], format!("type \"port {port}\\n\""));
    let done = ended.place(|event| matches!(event.kind, EventKind::BootCommandDone { millis: 90_500.. }));
    let ready = ended.place(|event| matches!(event.kind, EventKind::GuestReady { millis: 90_500.. }));
    assert!(done < ready);
}

#[tokio::test(start_paused = true)]
async fn a_text_that_never_appears_fails_with_the_screen() {
    let reports = tempfile::tempdir().unwrap();
    let display = Display::showing("error: no hunter2 on this disk").answers("linux", "not found");
    let actions = json!([{"type": "linux\n"}, {"hold": CTRL}, wait_text("login:", 90), {"type": "root"}]);
    let options = |build: Build| build.report_dir(reports.path());
    let ended = reacting(&display, &MemoryBackend::new(), booting(actions), options, |_, _| {}).await;
    let failure = ended.failure();
    assert_eq!(ended.error().kind(), ErrorKind::TimedOut);
    let report = &failure.report;
    assert_eq!(report.phase, Some(V::BootCommand));
    assert_eq!(report.screen, ["error: no *** on this disk", "> linux", "not found", ">"]);
    let rendered = report.to_string();
    for text in [
        "boot command action 3 of 4: wait up to 1m30s for \"login:\" on the screen",
        "expected \"login:\" on the screen within 90 s, but it shows:\n",
    ] {
        assert!(rendered.contains(text), "{rendered}");
    }
    assert_eq!(rendered.matches("not found").count(), 1, "the screen is shown once: {rendered}");
    assert!(!rendered.contains("hunter2"), "{rendered}");
    assert!(std::fs::read(report.screenshot.as_ref().unwrap()).unwrap().starts_with(b"\x89PNG"));
    assert_eq!(display.typed(), ["linux", ""]);
}

#[tokio::test(start_paused = true)]
async fn a_timeout_after_the_boot_command_shows_the_screen() {
    let display = Display::showing("Choose a language:");
    let backend =
        MemoryBackend::new().machine("a", |guest| guest.never_answers(rudder_core::memory::Silence::Refuses));
    let ended = on(&display, &backend, booting(json!([{"wait": 3_600_000}, {"press": ENTER}]))).await;
    let report = &ended.failure().report;
    assert_eq!(ended.error().kind(), ErrorKind::TimedOut);
    // The build's limit expires before the boot command ends.
    assert!(report.message.contains("the build did not end within 30m"), "{report}");
    assert!(report.to_string().contains("\n  screen:\n    | Choose a language:\n"), "{report}");

    // `sshTimeout` starts when the boot command is done.
    let ended = on(&display, &backend, booting(json!([{"wait": 600_000}, {"press": ENTER}]))).await;
    let report = &ended.failure().report;
    assert_eq!(report.phase, Some(V::BootCommand));
    assert!(report.message.contains("within 300 s"), "{report}");
    assert!(report.screen.contains(&"Choose a language:".to_owned()), "{report}");
}

#[tokio::test(start_paused = true)]
async fn a_boot_command_ends_when_the_build_or_its_machine_ends() {
    let display = Display::showing("boot:");
    let actions = || booting(json!([{"hold": CTRL}, {"type": "x"}, wait_text("never", 1000)]));
    let ended = reacting(
        &display,
        &MemoryBackend::new(),
        actions(),
        |build| build,
        |event, handle| {
            if matches!(event.kind, EventKind::BootAction { action: 3, .. }) {
                handle.cancel();
            }
        },
    )
    .await;
    assert!(ended.is_cancelled());
    assert_eq!(display.pressed(), [CTRL]);

    let dying = MemoryBackend::new()
        .machine("a", |guest| guest.dies_after_power_on(Death::GuestPanic, Duration::from_secs(100)));
    let ended = on(&display, &dying, actions()).await;
    let report = &ended.failure().report;
    assert_eq!(ended.error().kind(), ErrorKind::MachineDied);
    assert!(report.message.contains("panicked while typing the boot command"), "{report}");
}

#[tokio::test(start_paused = true)]
async fn after_a_lost_display_each_key_is_typed_at_most_once() {
    let text = "the quick brown fox jumps over 13 lazy dogs";
    let actions = || booting(json!([{"type": text}, {"press": ENTER}]));
    for keys in (1..=text.len()).step_by(5) {
        let display = Display::showing("boot:").breaks_after(keys);
        let ended = on(&display, &MemoryBackend::new(), actions()).await;
        match &ended.outcome {
            Ok(_) => assert_eq!(display.typed(), [text, ""], "lost after {keys} keys"),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Protocol);
                let report = error.report();
                assert!(report.contains("the connection to the display broke"), "{report}");
                assert!(report.contains(&format!("of {} characters", text.len())), "{report}");
                let typed = display.typed().concat();
                assert!(text.starts_with(&typed), "lost after {keys} keys: {typed:?}");
            }
        }
    }

    let display = Display::showing("boot:").breaks_after(9).permanently();
    let ended = on(&display, &MemoryBackend::new(), actions()).await;
    let report = &ended.failure().report;
    assert!(report.to_string().contains("the display is gone"), "{report}");
    assert_eq!((display.typed(), report.screen.len()), (vec!["the quick".to_owned()], 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_boot_reports_which_files_the_guest_requested() {
    let display = Display::showing("Loading the answers").breaks_after(1).permanently();
    let mut plan = booting(json!([wait_text("Loading the tool", 600), {"press": ENTER}, {"press": ENTER}]));
    plan["http_files"] = json!(["answers.cfg", "tool"]);
    plan["files"] = json!([
        {"name": "answers.cfg", "content": {"inline": b"a"}},
        {"name": "tool", "content": {"inline": b"b"}},
    ]);
    let screen = display.clone();
    let react = move |event: &Event, _: &BuildHandle| {
        if let Some(port) = port(event) {
            for path in ["/tool", "/t%6fol", "/private"] {
                get(port, path);
            }
            screen.show("Loading the tool");
        }
    };
    let ended = reacting(&display, &MemoryBackend::new(), plan, |build| build, react).await;
    let report = &ended.failure().report;
    assert_eq!(report.served, [ServedFile::new("answers.cfg", 0), ServedFile::new("tool", 2)]);
    let section = "\n  served files:\n    | answers.cfg: never requested\n    | tool: 2 times";
    assert!(report.to_string().contains(section), "{report}");
}

#[tokio::test(start_paused = true)]
async fn everything_a_boot_command_needs_exists_before_power_on() {
    let display = Display::showing("boot:");
    let actions = json!([{"type": "http://{{ .HTTPIP }}/"}]);
    let ended = on(&display, &MemoryBackend::new(), booting(actions)).await;
    let report = &ended.failure().report;
    assert_eq!(ended.error().kind(), ErrorKind::InvalidInput);
    assert!(report.message.contains("httpDirectory"), "{report}");
    assert_eq!(ended.vm_phases("a"), [V::Pending, V::SourceImporting, V::Booting, V::Failed]);
    assert_eq!(display.typed(), [""]);

    let blind = MemoryBackend::new().with_capabilities([C::SourceUrl, C::DiskVirtio]);
    let ended = build(&blind, booting(json!([{"press": ENTER}]))).await;
    assert_eq!(ended.error().kind(), ErrorKind::Unsupported);
}
