//! Boot media of machines, and the files that they fetch while booting.

use super::{Ended, build, plans::*, run};
use rudder_core::{
    ErrorKind,
    backend::MachineSpec,
    event::{Event, EventKind},
    media::floppy,
    memory::{MemoryBackend, Response},
    module::InputRole,
};
use serde_json::{Value, json};
use std::{
    io::{Read, Write},
    net::TcpStream,
    process::Command,
};

/// Returns a plan that serves `answers.cfg`, which it contains, and `tool`, which has a URL.
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

/// Returns the port of the file server, if the event reports it.
pub fn port(event: &Event) -> Option<u16> {
    let EventKind::Notice { message } = &event.kind else { return None };
    message.strip_prefix("files are served at http://127.0.0.1:")?.strip_suffix('/')?.parse().ok()
}

pub fn get(port: u16, path: &str) -> String {
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
    let backend = MemoryBackend::new().machine("a", |guest| {
        guest.answers(|execution| {
            let address = execution.env.get("RUDDER_HTTP_ADDR")?;
            Some(Response::ok(format!("at {address}\n")).hangs())
        })
    });
    let mut served_at = None;
    let mut guest = None;
    let mut answered = 0;
    let mut lines = Vec::new();
    let steps = vec![shell("first", "fetch the answers")];
    let ended = run(&backend, serving(steps), |build| build, &[], |event, handle| match &event.kind {
        EventKind::Notice { .. } => served_at = served_at.or(port(event)),
        EventKind::StepOutput { line, .. } => {
            lines.push(line.clone());
            let port = served_at.unwrap();
            guest = Some(std::thread::spawn(move || {
                // A process that is not a machine of the lab.
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
    assert_eq!(lines, [format!("at 127.0.0.1:{}", served_at.unwrap())]);
    let (stranger, [answers, tool, private]) = guest.unwrap().join().unwrap();
    assert_eq!(stranger, b"");
    assert!(answers.starts_with("HTTP/1.1 200") && answers.ends_with("\r\n\r\nlang=en\n"), "{answers}");
    assert!(tool.starts_with("HTTP/1.1 200"), "{tool}");
    assert!(private.starts_with("HTTP/1.1 404"), "{private}");
    // Each request is reported after its answer was sent; the next answer may be sent before that.
    let mut requests = requests(&ended);
    requests.sort_unstable();
    assert_eq!(requests.len(), 3, "{requests:?}");
    assert_eq!(requests[0], "GET /answers.cfg: 200, 8B");
    assert_eq!(requests[1], "GET /private: 404, 0B");
    // Nothing is served after the build: the listener is closed as soon as its task has ended.
    while TcpStream::connect(("127.0.0.1", served_at.unwrap())).is_ok() {
        tokio::task::yield_now().await;
    }
    assert_eq!(backend.leftovers().await, Vec::<String>::new());
}

#[tokio::test]
async fn a_plan_that_serves_an_undeclared_file_is_refused() {
    let mut plan = serving(Vec::new());
    plan["http_files"] = json!(["other.cfg"]);
    let ended = build(&MemoryBackend::new(), plan).await;
    let report = ended.failure().report.to_string();
    assert!(report.contains("expected \"other.cfg\" in the files of the plan, but found none"), "{report}");
}

/// Returns a plan of two VMs: both have the same CD-ROM, the first also has another and a floppy.
fn installing() -> Value {
    let url = |url: &str| json!({"url": url, "sha256": null});
    let mut plan = plan(vec![vm("a", Vec::new()), vm("b", Vec::new())]);
    plan["iso_cache_ttl"] = json!(3_600_000);
    plan["machines"][0]["isos"] =
        json!([url("http://files.test/os.iso"), url("http://files.test/drivers.iso")]);
    plan["machines"][1]["isos"] = json!([url("http://files.test/os.iso")]);
    plan["machines"][0]["floppy"] = json!(["Autounattend.xml", "driver.sys"]);
    plan["files"] = json!([
        {"name": "Autounattend.xml", "content": {"inline": b"<unattend/>"}},
        {"name": "driver.sys", "content": {"url": url("http://files.test/driver.sys")}},
    ]);
    plan
}

#[tokio::test(start_paused = true)]
async fn cd_roms_and_floppies_exist_when_a_machine_is_defined() {
    let backend = MemoryBackend::new()
        .source("http://files.test/os.iso", |source| source.contents("the system"))
        .source("http://files.test/drivers.iso", |source| source.contents("drivers"))
        .source("http://files.test/driver.sys", |source| source.contents("a driver"));
    let ended = build(&backend, installing()).await;
    let inputs = &ended.module().provenance.inputs;
    let isos: Vec<&str> =
        inputs.iter().filter(|input| input.role == InputRole::Iso).map(|input| input.url.as_str()).collect();
    assert_eq!(isos, ["http://files.test/drivers.iso", "http://files.test/os.iso"], "each is fetched once");
    let spec = |name: &str| ended.specs.iter().find(|spec| spec.name == name).unwrap();
    let (a, b) = (spec("a"), spec("b"));
    assert_eq!((a.cdroms.len(), b.cdroms.len()), (2, 1));
    let sizes = |spec: &MachineSpec| spec.cdroms.iter().map(|cdrom| cdrom.virtual_size).collect::<Vec<_>>();
    assert_eq!((sizes(a), sizes(b)), (vec![10, 7], vec![10]));
    assert!(b.floppy.is_none());
    let expected: [(&str, &[u8]); 2] = [("Autounattend.xml", b"<unattend/>"), ("driver.sys", b"a driver")];
    assert_eq!(a.floppy.clone().unwrap(), floppy::image(&expected).unwrap());
}

#[tokio::test(start_paused = true)]
async fn a_floppy_with_too_large_files_fails_with_the_excess() {
    let large = "x".repeat(2 << 20);
    let backend =
        MemoryBackend::new().source("http://files.test/driver.sys", |source| source.contents(large.as_str()));
    let ended = build(&backend, installing()).await;
    let report = ended.failure().report.to_string();
    for part in ["vm a", "expected at most 1457664 bytes", "640000 too many", "httpDirectory"] {
        assert!(report.contains(part), "{part:?} in\n{report}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_iso_with_another_checksum_fails_the_build() {
    let backend =
        MemoryBackend::new().source("http://files.test/os.iso", |source| source.contents("tampered"));
    let mut plan = installing();
    plan["machines"][0]["isos"][0]["sha256"] = json!("22".repeat(32));
    let ended = build(&backend, plan).await;
    let failure = ended.failure();
    assert_eq!(ended.error().kind(), ErrorKind::ChecksumMismatch);
    let report = failure.report.to_string();
    for part in ["vm a", "cdrom iso1", "http://files.test/os.iso", "expected sha256 2222"] {
        assert!(report.contains(part), "{part:?} in\n{report}");
    }
}
