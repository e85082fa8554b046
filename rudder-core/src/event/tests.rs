//! Events as read by people and by programs.
#![allow(clippy::unwrap_used)]
use super::*;
use crate::{content::Content, module::InputRole, visible::is_hidden};
use proptest::prelude::*;

/// Returns every kind of event that contains text, with this text in every field that can hold it.
fn events(text: &str) -> Vec<EventKind> {
    let text = || text.to_owned();
    let sha256 = crate::digest::Digest::of(b"");
    let input = InputRecord::new(InputRole::source(text()), text(), Content::of_bytes(1, sha256));
    let report = FailureReport {
        message: text(),
        exit: Some(CommandStatus::Signal(text())),
        output_tail: vec![text(), text()],
        serial_tail: vec![text()],
        served: vec![ServedFile::new(text(), 2)],
        screen: vec![text()],
        screenshot: Some(text().into()),
        ..FailureReport::default()
    };
    let finished = |outcome| EventKind::Finished { outcome, timings: Vec::new() };
    vec![
        EventKind::BuildStarted { build: text(), plan: text(), backend: text(), attempt: 2 },
        EventKind::Progress { task: text(), done: 1, total: Some(2) },
        EventKind::Progress { task: text(), done: 1, total: None },
        EventKind::Input(input),
        EventKind::Notice { message: text() },
        EventKind::Warning { message: text() },
        EventKind::BootAction { action: 0, of: 1, doing: text() },
        EventKind::HttpRequest { method: text(), path: text(), status: 200, bytes: 1 },
        EventKind::StepStarted { step: 0, name: text() },
        EventKind::StepOutput { step: 0, stream: OutputStream::Stdout, line: text() },
        EventKind::StepFinished {
            step: 0,
            name: text(),
            millis: 1,
            success: false,
            exit: Some(CommandStatus::Signal(text())),
        },
        EventKind::Paused { step: 0, instructions: text(), access: vec![text()] },
        EventKind::Retrying { attempt: 2, of: 3, reason: text() },
        EventKind::Kept { access: vec![text()], lab: text() },
        finished(Outcome::Built { module: text(), path: Some(text().into()) }),
        finished(Outcome::Failed(Box::new(report))),
    ]
}

fn event(kind: EventKind, vm: &str) -> Event {
    let build_id = BuildId::random();
    Event { build_id, seq: 0, time: crate::timestamp::Timestamp::UNIX_EPOCH, vm: Some(vm.to_owned()), kind }
}

proptest! {
    #[test]
    fn every_text_of_an_event_is_shown_to_people_and_serialised_for_programs(
        text in "(\\x1b\\[2J|\\x1b\\]52;c;aGk=\\x07|\u{202e}|\u{9b}|\r|\n|.|[\u{0}-\u{9f}]|[\u{200b}-\u{206f}]|[\u{e0000}-\u{e007f}]){0,12}"
    ) {
        for kind in events(&text) {
            let event = event(kind, &text);
            let shown = event.to_string();
            prop_assert!(!shown.chars().any(|c| is_hidden(c) && c != '\n'), "{:?}", shown);
            let json = serde_json::to_string(&event).unwrap();
            prop_assert_eq!(serde_json::from_str::<Event>(&json).unwrap(), event);
        }
    }
}

#[test]
fn a_value_cannot_break_its_line_and_colours_are_removed() {
    let started = EventKind::StepStarted { step: 1, name: "a\nbuilt module b".into() };
    assert_eq!(event(started, "v\r").to_string(), "v␍: step 1 (a␊built module b)");
    let line = "\x1b[32mok\x1b[0m \x1b[2Jx".to_owned();
    let output = EventKind::StepOutput { step: 0, stream: OutputStream::Stdout, line };
    assert_eq!(output.to_string(), "| ok ␛[2Jx");
    let paused = EventKind::Paused { step: 1, instructions: "one\r\n\x07two".into(), access: vec![] };
    assert_eq!(paused.to_string(), "step 1 is paused until a person has done the following:\n  one\n  ␇two");
}
