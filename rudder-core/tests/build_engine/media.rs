//! What machines boot with and fetch while they do.

use super::{Ended, build, plans::*, run};
use rudder_core::{
    event::{Event, EventKind},
    memory::MemoryBackend,
};
use serde_json::{Value, json};
use std::{
    io::{Read, Write},
    net::TcpStream,
    process::Command,
};

/// A plan that serves `answers.cfg`, which is in it, and `tool`, which is behind a URL.
fn serving(steps: Vec<Value>) -> Value {
    let mut plan = plan(vec![vm("a", steps)]);
    plan["http_files"] = json!(["answers.cfg", "tool"]);
    plan["files"] = json!([
        {"name": "answers.cfg", "content": {"inline": b"lang=en\n"}},
        {"name": "tool", "content": {"url": {"url": "http://files.test/tool", "sha256": null}}},
        {"name": "private", "content": {"inline": b"not served"}},
    ]);
    plan
}

/// The port that an event says files are served at.
fn port(event: &Event) -> Option<u16> {
    let EventKind::Notice { message } = &event.kind else { return None };
    message.strip_prefix("files are served at http://127.0.0.1:")?.strip_suffix('/')?.parse().ok()
}

fn get(port: u16, path: &str) -> String {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

fn requests(ended: &Ended) -> Vec<String> {
    let of = |event: &Event| match &event.kind {
        EventKind::HttpRequest { .. } => Some(event.to_string()),
        _ => None,
    };
    ended.events.iter().filter_map(of).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn files_are_served_to_the_machines_while_they_provision() {
    let backend = MemoryBackend::new();
    let mut served_at = None;
    let mut guest = None;
    let mut answered = 0;
    let steps = vec![shell("first", "sleep 3600")];
    let ended = run(&backend, serving(steps), |build| build, &[], |event, handle| match event.kind {
        EventKind::Notice { .. } => served_at = served_at.or(port(event)),
        EventKind::StepStarted { .. } => {
            let port = served_at.unwrap();
            guest = Some(std::thread::spawn(move || {
                // A process that is none of the lab's machines.
                let ask = "exec 3<>/dev/tcp/127.0.0.1/$0; printf 'GET /answers.cfg HTTP/1.0\r\n\r\n' >&3; cat <&3";
                let stranger = Command::new("bash").args(["-c", ask, &port.to_string()]).output().unwrap();
                (stranger.stdout, ["/answers.cfg", "/tool", "/private"].map(|path| get(port, path)))
            }));
        }
        EventKind::HttpRequest { .. } => {
            answered += 1;
            if answered == 3 {
                handle.cancel();
            }
        }
        _ => {}
    })
    .await;
    let (stranger, [answers, tool, private]) = guest.unwrap().join().unwrap();
    assert_eq!(stranger, b"");
    assert!(answers.starts_with("HTTP/1.1 200") && answers.ends_with("\r\n\r\nlang=en\n"), "{answers}");
    assert!(tool.starts_with("HTTP/1.1 200"), "{tool}");
    assert!(private.starts_with("HTTP/1.1 404"), "{private}");
    let requests = requests(&ended);
    assert_eq!(requests.len(), 3, "{requests:?}");
    assert_eq!(requests[0], "GET /answers.cfg: 200, 8B");
    assert_eq!(requests[2], "GET /private: 404, 0B");
    // Nothing is served after the build: its listener is gone as soon as its task has ended.
    while TcpStream::connect(("127.0.0.1", served_at.unwrap())).is_ok() {
        tokio::task::yield_now().await;
    }
    assert_eq!(backend.leftovers().await, Vec::<String>::new());
}

#[tokio::test]
async fn a_plan_that_serves_what_it_has_not_is_refused() {
    let mut plan = serving(Vec::new());
    plan["http_files"] = json!(["other.cfg"]);
    let ended = build(&MemoryBackend::new(), plan).await;
    let report = ended.failure().report.to_string();
    assert!(report.contains("expected \"other.cfg\" in the files of the plan, but found none"), "{report}");
}
