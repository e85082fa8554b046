//! Secrets show nowhere: not in events, reports, errors, warnings, module records.

use super::{build, plans::*};
use rudder_core::{
    ErrorKind,
    memory::{Fault, MemoryBackend, Operation, Response},
};

const SECRET: &str = "hunter2";

#[tokio::test(start_paused = true)]
async fn a_secret_shows_nowhere_when_a_build_fails() {
    let leak = Response::ok("the password is hunter2\nencoded aHVudGVyMg==\n").stderr("hunter2!\n").exit(1);
    let backend = MemoryBackend::new()
        .machine("a", |guest| guest.on("work", leak).serial("login with hunter2\nlogin:"));
    let ended = build(&backend, plan(vec![vm("a", vec![shell("work hunter2", "work")])])).await;
    let failure = ended.failure();
    assert_eq!(failure.report.output_tail.len(), 3);
    assert!(failure.report.serial_tail[0].starts_with("login with ***"), "{}", failure.report);
    let mut texts = vec![format!("{failure:?}"), failure.error.report(), failure.report.to_string()];
    texts.extend(
        ended.events.iter().flat_map(|event| [event.to_json(), event.to_string(), format!("{event:?}")]),
    );
    for text in texts {
        assert!(!text.contains(SECRET) && !text.contains("aHVudGVyMg"), "{text}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_secret_shows_nowhere_when_a_build_succeeds_or_its_backend_talks() {
    let backend = MemoryBackend::new();
    let ended = build(&backend, plan(vec![vm("a", vec![])])).await;
    let record = serde_json::to_string(ended.module()).unwrap();
    assert!(record.contains("***") && !record.contains(SECRET), "{record}");

    let fault = Fault::new(ErrorKind::Io, "cannot write hunter2");
    let backend = MemoryBackend::new().fails(Operation::Start, fault);
    let ended = build(&backend, plan(vec![vm("a", vec![])])).await;
    let failure = ended.failure();
    assert!(failure.error.report().contains("cannot write ***"));
    assert!(!format!("{failure:?}").contains(SECRET));
}
