#![allow(clippy::unwrap_used)]
use super::*;
use futures::FutureExt as _;
use proptest::prelude::*;

fn powered_off(lifecycle: &Lifecycle) {
    lifecycle.start().unwrap().finish().end(Exit::PoweredOff);
}

#[test]
fn a_start_that_fails_leaves_everything_as_it_was() {
    let lifecycle = Lifecycle::new("web");
    drop(lifecycle.start().unwrap());
    assert_eq!(lifecycle.phase(), Phase::Defined);
    powered_off(&lifecycle);
    let starting = lifecycle.start().unwrap();
    assert_eq!(lifecycle.phase(), Phase::Starting);
    drop(starting);
    assert_eq!(lifecycle.phase(), Phase::Ended(Exit::PoweredOff));
}

#[test]
fn a_watcher_that_is_dropped_publishes_an_end() {
    let lifecycle = Lifecycle::new("web");
    let running = lifecycle.start().unwrap().finish();
    let (waiting, resting) = (lifecycle.wait(), lifecycle.rest());
    drop(running);
    let exit = waiting.now_or_never().unwrap().unwrap();
    assert_eq!(exit, Exit::Killed { why: "its lab was dropped".to_owned() });
    assert_eq!(resting.now_or_never(), Some(()));
}

#[test]
fn waiting_for_a_machine_that_is_not_started_is_an_error() {
    let lifecycle = Lifecycle::new("web");
    let error = lifecycle.wait().now_or_never().unwrap().unwrap_err();
    assert_eq!(error.to_string(), "expected a machine that was started, but found one that was not");
    let starting = lifecycle.start().unwrap();
    let mut waiting = Box::pin(lifecycle.wait());
    assert!(waiting.as_mut().now_or_never().is_none());
    assert_eq!(lifecycle.started().now_or_never(), None);
    drop(starting);
    assert_eq!(lifecycle.started().now_or_never(), Some(()));
    let error = waiting.now_or_never().unwrap().unwrap_err();
    assert_eq!(error.to_string(), "expected a machine that was started, but its start failed");
}

#[test]
fn a_machine_may_run_again_before_its_last_end_is_dropped() {
    let lifecycle = Lifecycle::new("web");
    powered_off(&lifecycle);
    let running = lifecycle.start().unwrap().finish();
    assert_eq!(lifecycle.phase(), Phase::Running);
    running.end(Exit::PoweredOff);
}

#[derive(Debug, Clone, Copy)]
enum Step {
    Start,
    FinishStart,
    DropStart,
    End,
    DropRunning,
    Capture,
    FinishCapture,
}

fn any_step() -> impl Strategy<Value = Step> {
    use Step::{Capture, DropRunning, DropStart, End, FinishCapture, FinishStart, Start};
    prop::sample::select(vec![Start, FinishStart, DropStart, End, DropRunning, Capture, FinishCapture])
}

proptest! {
    #[test]
    fn capturing_and_running_exclude_each_other(steps in prop::collection::vec(any_step(), 0..40)) {
        let lifecycle = Lifecycle::new("web");
        let (mut starting, mut running, mut captures) = (None, None, Vec::new());
        for step in steps {
            let may_start = starting.is_none() && running.is_none() && captures.is_empty();
            let may_capture = starting.is_none() && running.is_none();
            match step {
                Step::Start => {
                    let started = lifecycle.start();
                    prop_assert_eq!(started.is_ok(), may_start);
                    if let Ok(started) = started {
                        starting = Some(started);
                    }
                }
                Step::FinishStart => running = starting.take().map(Starting::finish).or(running),
                Step::DropStart => drop(starting.take()),
                Step::End => {
                    if let Some(running) = running.take() {
                        running.end(Exit::PoweredOff);
                        prop_assert_eq!(lifecycle.phase(), Phase::Ended(Exit::PoweredOff));
                    }
                }
                Step::DropRunning => drop(running.take()),
                Step::Capture => {
                    let captured = lifecycle.at_rest();
                    prop_assert_eq!(captured.is_ok(), may_capture);
                    captures.extend(captured);
                }
                Step::FinishCapture => drop(captures.pop()),
            }
            prop_assert_eq!(lifecycle.phase() == Phase::Starting, starting.is_some());
            prop_assert_eq!(lifecycle.phase() == Phase::Running, running.is_some());
            prop_assert_eq!(lifecycle.check_running().is_ok(), running.is_some());
        }
    }
}
