//! Secrets appear nowhere: not in events, reports, errors, warnings or module records.

use super::{build, plans::*};
use rudder_core::{
    ErrorKind,
    event::EventKind,
    memory::{Fault, MemoryBackend, Operation, Response},
};

const SECRET: &str = "hunter2";

#[tokio::test(start_paused = true)]
async fn a_failed_build_shows_no_secret() {
    let leak = Response::ok("the password is hunter2\nencoded aHVudGVyMg==\n").stderr("hunter2!\n").exit(1);
    let backend = MemoryBackend::new()
        .machine("a", |guest| guest.on("work", leak).serial("login with hunter2\nlogin:"));
    let ended = build(&backend, plan(vec![vm("a", vec![shell("work hunter2", "work")])])).await;
    let failure = ended.failure();
    assert_eq!(failure.report.output_tail.len(), 3);
    assert!(failure.report.serial_tail[0].starts_with("login with ***"), "{}", failure.report);
    let mut texts = vec![format!("{:?}", ended.error()), ended.error().report(), failure.report.to_string()];
    texts.extend(
        ended.events.iter().flat_map(|event| [event.to_json(), event.to_string(), format!("{event:?}")]),
    );
    for text in texts {
        assert!(!text.contains(SECRET) && !text.contains("aHVudGVyMg"), "{text}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_successful_build_and_its_backend_show_no_secret() {
    let backend = MemoryBackend::new();
    let ended = build(&backend, plan(vec![vm("a", vec![])])).await;
    let record = ended.module().to_record().unwrap();
    assert!(record.contains("***") && !record.contains(SECRET), "{record}");

    let fault = Fault::new(ErrorKind::Io, "cannot write hunter2");
    let backend = MemoryBackend::new().fails(Operation::Start, fault);
    let ended = build(&backend, plan(vec![vm("a", vec![])])).await;
    assert!(ended.error().report().contains("cannot write ***"));
    assert!(!format!("{:?}", ended.error()).contains(SECRET));
}

#[tokio::test(start_paused = true)]
async fn a_secret_split_over_pieces_is_masked_without_losing_lines() {
    let output = "one hun\nter2 two\n\x1b[31mhun\x1b[0mter2\n68 75 6e 74 65 72 32\n00000000: 6875 6e74  hunt\n00000004: 6572 32    er2\n\
                  plain\nthe last hunt";
    let backend = MemoryBackend::new().machine("a", |guest| guest.on("work", Response::ok(output)));
    let ended = build(&backend, plan(vec![vm("a", vec![shell("work", "work")])])).await;
    ended.module();
    let lines: Vec<&str> = ended
        .events
        .iter()
        .filter_map(|event| match &event.kind {
            EventKind::StepOutput { line, .. } => Some(line.as_str()),
            _ => None,
        })
        .collect();
    assert_eq!(lines.len(), 8, "{lines:?}");
    assert_eq!((lines[0], lines[1], lines[6], lines[7]), ("one ***", "*** two", "plain", "the last hunt"));
    for line in &lines[..6] {
        assert!(line.contains("***"), "{lines:?}");
        assert!(!["hun", "ter2", "6875", "68 75", "er2"].iter().any(|part| line.contains(part)), "{lines:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn credentials_in_a_url_are_masked_but_the_input_is_named() {
    let backend = MemoryBackend::new();
    let url = "https://me:pw0rd99@images.test/base.qcow2?X-Amz-Signature=s1gnature&arch=arm64";
    let mut machine = vm("a", vec![]);
    machine["source"]["url"]["url"] = url.into();
    let mut plan = plan(vec![machine]);
    plan["manifest"] = format!("vms: [{{source: {{url: '{url}'}}}}]\n").into();
    let ended = build(&backend, plan).await;
    let module = ended.module();
    let mut texts = vec![module.to_record().unwrap(), format!("{module:?}")];
    texts.extend(
        ended.events.iter().flat_map(|event| [event.to_json(), event.to_string(), format!("{event:?}")]),
    );
    for text in &texts {
        assert!(!text.contains("pw0rd99") && !text.contains("s1gnature"), "{text}");
    }
    let input = &module.provenance.inputs[0];
    assert_eq!(input.url, "https://***@images.test/base.qcow2?X-Amz-Signature=***&arch=arm64");
    assert!(module.provenance.manifest.contains("images.test/base.qcow2"));
}
