#![allow(clippy::unwrap_used)]
use super::*;
use proptest::prelude::*;

const START: Duration = Duration::ZERO;

fn secs(count: u64) -> Duration {
    Duration::from_secs(count)
}

fn observed(observation: Observation) -> Input {
    Input::Observed(observation)
}

fn process_ended(outcome: Outcome) -> Input {
    ended_with_output(outcome, "")
}

fn ended_with_output(outcome: Outcome, last_lines: &str) -> Input {
    let detail = match outcome {
        Outcome::Success => "QEMU exited with code 0",
        Outcome::Failure => "QEMU was ended by signal 9",
        Outcome::Unknown => "QEMU ended, and libvirt does not report why",
    };
    observed(Observation::ProcessEnded(ProcessEnd {
        outcome,
        detail: detail.to_owned(),
        last_lines: last_lines.to_owned(),
    }))
}

fn shutdown_for(reason: &str) -> Input {
    observed(Observation::Shutdown(Shutdown::Other(reason.to_owned())))
}

const POWERED_OFF: Input = Input::Observed(Observation::Shutdown(Shutdown::ByGuest));
const DISCONNECTED: Input = Input::Observed(Observation::Disconnected);
const PANICKED: Input = Input::Observed(Observation::Panicked);

fn disk_full() -> Input {
    observed(Observation::DiskFailed {
        detail: Some("write of disk0 failed: No space left on device".to_owned()),
        full: true,
    })
}

fn tpm_ended() -> Input {
    observed(Observation::TpmEnded("was ended by signal 9 (SIGKILL)".to_owned()))
}

fn off(powered_off: bool) -> Input {
    observed(Observation::Off {
        powered_off,
        detail: "the machine's domain was destroyed from outside".to_owned(),
    })
}

fn graceful(limit: Duration) -> Input {
    Input::Stop(Stop::Graceful { limit })
}

/// Runs a machine through these inputs, one immediately after the other, and then until it has ended.
fn exit(reporter: Reporter, inputs: impl IntoIterator<Item = Input>) -> Exit {
    let mut kernel = Kernel::new(reporter);
    for input in inputs {
        let _ = kernel.handle(START, input);
    }
    while kernel.exit().is_none() {
        let deadline = kernel.deadline().expect("a machine that ends");
        let _ = kernel.handle(deadline, Input::Time);
    }
    kernel.exit().unwrap().clone()
}

/// Returns how a machine ended whose process reports what happens.
fn exit_of_process(inputs: impl IntoIterator<Item = Input>) -> Exit {
    exit(Reporter::Process, inputs)
}

fn died(detail: &str) -> Exit {
    Exit::Died { cause: Death::Hypervisor, detail: detail.to_owned() }
}

fn killed(why: &str) -> Exit {
    Exit::Killed { why: why.to_owned() }
}

#[test]
fn only_the_guest_powers_off() {
    assert_eq!(exit_of_process([POWERED_OFF, process_ended(Outcome::Success)]), Exit::PoweredOff);
    // Even if it was about to be killed for being slow.
    let late = [graceful(START), POWERED_OFF, process_ended(Outcome::Success)];
    assert_eq!(exit_of_process(late), Exit::PoweredOff);
    let requested = [Input::Stop(Stop::Kill), shutdown_for("host-qmp-quit"), process_ended(Outcome::Success)];
    assert_eq!(exit_of_process(requested), killed("an immediate stop was requested"));
    let signal =
        [shutdown_for("host-signal"), ended_with_output(Outcome::Success, "terminating on signal 15")];
    assert_eq!(
        exit_of_process(signal),
        died(
            "QEMU exited with code 0 (reported reason: host-signal); its last output: terminating on signal 15"
        )
    );
    let crashed = [POWERED_OFF, process_ended(Outcome::Failure)];
    assert_eq!(exit_of_process(crashed), died("QEMU was ended by signal 9 while its guest was powering off"));
}

#[test]
fn the_first_failure_explains_the_end() {
    let inputs = [disk_full(), PANICKED, process_ended(Outcome::Failure)];
    let Exit::Died { cause, detail } = exit_of_process(inputs) else { panic!() };
    assert_eq!(cause, Death::HostDiskFull);
    assert_eq!(
        detail,
        "the host has no space left for the machine's disks: write of disk0 failed: No space left on device"
    );
    let inputs = [Input::Stop(Stop::Kill), PANICKED, disk_full(), process_ended(Outcome::Failure)];
    let Exit::Died { cause, .. } = exit_of_process(inputs) else { panic!() };
    assert_eq!(cause, Death::GuestPanic);
    let inputs = [ended_with_output(Outcome::Failure, "x | y")];
    assert_eq!(exit_of_process(inputs), died("QEMU was ended by signal 9; its last output: x | y"));
}

#[test]
fn a_failed_machine_is_killed_after_its_last_screenshot() {
    let mut kernel = Kernel::new(Reporter::Process);
    assert_eq!(kernel.handle(START, PANICKED), [Action::TakeScreenshot]);
    assert_eq!(kernel.handle(START, observed(Observation::ScreenshotTaken)), [Action::Kill]);
    let mut kernel = Kernel::new(Reporter::Process);
    assert_eq!(kernel.handle(START, PANICKED), [Action::TakeScreenshot]);
    assert_eq!(kernel.deadline(), Some(SCREENSHOT_LIMIT));
    assert_eq!(kernel.handle(SCREENSHOT_LIMIT, Input::Time), [Action::Kill]);
}

#[test]
fn the_end_of_a_tpm_is_reported_unless_there_is_another_reason() {
    let detail = "the TPM of the machine has ended: swtpm was ended by signal 9 (SIGKILL)";
    let mut kernel = Kernel::new(Reporter::Process);
    assert_eq!(kernel.handle(START, tpm_ended()), []);
    assert_eq!(kernel.handle(TPM_LIMIT, Input::Time), [Action::Kill]);
    let _ = kernel.handle(TPM_LIMIT, process_ended(Outcome::Failure));
    let _ = kernel.handle(TPM_LIMIT, DISCONNECTED);
    assert_eq!(kernel.exit(), Some(&died(detail)));

    let requested = [Input::Stop(Stop::Kill), tpm_ended(), process_ended(Outcome::Failure)];
    assert_eq!(exit_of_process(requested), killed("an immediate stop was requested"));
    let powered_off = [POWERED_OFF, tpm_ended(), process_ended(Outcome::Success)];
    assert_eq!(exit_of_process(powered_off), Exit::PoweredOff);
    // A TPM also ends because its machine does.
    let crashed = [tpm_ended(), process_ended(Outcome::Failure)];
    assert_eq!(exit_of_process(crashed), died("QEMU was ended by signal 9"));

    // A daemon has to report that the machine still runs.
    let mut kernel = Kernel::new(Reporter::Daemon);
    assert_eq!(kernel.handle(START, tpm_ended()), []);
    assert_eq!(kernel.deadline(), None);
    assert_eq!(kernel.handle(START, observed(Observation::Running)), []);
    assert_eq!(kernel.handle(TPM_LIMIT, observed(Observation::Running)), [Action::Kill]);
    let _ = kernel.handle(TPM_LIMIT, off(false));
    assert_eq!(kernel.exit(), Some(&died(detail)));
}

#[test]
fn a_process_that_closes_its_control_connection_is_killed() {
    let mut kernel = Kernel::new(Reporter::Process);
    assert_eq!(kernel.handle(START, DISCONNECTED), []);
    assert_eq!(kernel.handle(HANG_UP_LIMIT, Input::Time), [Action::Kill]);
    let _ = kernel.handle(HANG_UP_LIMIT, process_ended(Outcome::Failure));
    let detail = "QEMU was ended by signal 9 after it had closed its control connection";
    assert_eq!(kernel.exit(), Some(&died(detail)));
    // One that is about to end closes it as well.
    assert_eq!(
        exit_of_process([DISCONNECTED, process_ended(Outcome::Failure)]),
        died("QEMU was ended by signal 9")
    );
}

#[test]
fn the_power_button_is_pressed_until_the_limit() {
    let mut kernel = Kernel::new(Reporter::Process);
    assert_eq!(kernel.handle(START, graceful(secs(25))), [Action::PressPowerButton]);
    // The first limit counts.
    assert_eq!(kernel.handle(secs(1), graceful(secs(1))), []);
    for at in [secs(10), secs(20)] {
        assert_eq!(kernel.deadline(), Some(at));
        assert_eq!(kernel.handle(at, Input::Time), [Action::PressPowerButton]);
    }
    assert_eq!(kernel.handle(secs(25), Input::Time), [Action::Quit]);
    assert_eq!(kernel.handle(secs(25) + QUIT_LIMIT, Input::Time), [Action::Kill]);
    let _ = kernel.handle(secs(28), process_ended(Outcome::Failure));
    let _ = kernel.handle(secs(28), DISCONNECTED);
    assert_eq!(kernel.exit(), Some(&killed("did not power off within 25s")));
}

#[test]
fn a_daemon_that_reports_nothing_is_waited_for_within_a_limit() {
    let mut kernel = Kernel::new(Reporter::Daemon);
    let _ = kernel.handle(START, process_ended(Outcome::Failure));
    assert_eq!((kernel.exit(), kernel.deadline()), (None, Some(DAEMON_GRACE)));
    let _ = kernel.handle(DAEMON_GRACE, Input::Time);
    assert_eq!(kernel.exit(), Some(&died("QEMU was ended by signal 9")));
    // Its report is more precise than the exit status.
    let inputs = [process_ended(Outcome::Failure), off(false)];
    assert_eq!(exit(Reporter::Daemon, inputs), died("the machine's domain was destroyed from outside"));
}

#[test]
fn a_requested_end_does_not_wait_for_the_daemon() {
    for outcome in [Outcome::Success, Outcome::Failure, Outcome::Unknown] {
        let mut kernel = Kernel::new(Reporter::Daemon);
        let _ = kernel.handle(START, Input::Stop(Stop::Kill));
        let _ = kernel.handle(START, process_ended(outcome));
        assert_eq!(kernel.exit(), Some(&killed("an immediate stop was requested")));
    }
    // A request after the end of the process did not end it.
    let inputs = [process_ended(Outcome::Failure), Input::Stop(Stop::Kill)];
    assert_eq!(exit(Reporter::Daemon, inputs), died("QEMU was ended by signal 9"));
}

#[test]
fn a_guest_that_powers_off_has_not_died() {
    for outcome in [Outcome::Success, Outcome::Failure, Outcome::Unknown] {
        for first in [None, Some(graceful(START))] {
            let mut kernel = Kernel::new(Reporter::Daemon);
            for input in first.into_iter().chain([POWERED_OFF, process_ended(outcome)]) {
                let _ = kernel.handle(START, input);
            }
            assert_eq!((kernel.exit(), kernel.deadline()), (None, Some(DAEMON_GRACE)));
            let _ = kernel.handle(DAEMON_GRACE, Input::Time);
            assert_eq!(kernel.exit(), Some(&Exit::PoweredOff));
        }
    }
    // It may have powered off between two checks: QEMU exited successfully, and the daemon has to report why.
    for outcome in [Outcome::Success, Outcome::Unknown] {
        let mut kernel = Kernel::new(Reporter::Daemon);
        let _ = kernel.handle(START, process_ended(outcome));
        assert_eq!((kernel.exit(), kernel.deadline()), (None, Some(DAEMON_PATIENCE)));
        let _ = kernel.handle(DAEMON_PATIENCE, Input::Time);
        assert!(matches!(kernel.exit(), Some(Exit::Died { cause: Death::Hypervisor, .. })));
    }
}

#[test]
fn the_report_of_a_daemon_decides() {
    assert_eq!(exit(Reporter::Daemon, [graceful(START), off(true)]), Exit::PoweredOff);
    let inputs = [Input::Stop(Stop::Kill), off(false)];
    assert_eq!(exit(Reporter::Daemon, inputs), killed("an immediate stop was requested"));
    assert_eq!(exit(Reporter::Daemon, [off(false)]), died("the machine's domain was destroyed from outside"));
    let Exit::Died { cause, .. } = exit(Reporter::Daemon, [PANICKED, off(false)]) else { panic!() };
    assert_eq!(cause, Death::GuestPanic);
}

#[test]
fn a_daemon_may_be_unreachable_for_a_moment() {
    let unreachable = || observed(Observation::Unreachable("libvirt is unreachable".to_owned()));
    let mut kernel = Kernel::new(Reporter::Daemon);
    let _ = kernel.handle(START, unreachable());
    let _ = kernel.handle(secs(2), observed(Observation::Running));
    let _ = kernel.handle(secs(3), unreachable());
    let _ = kernel.handle(secs(5), unreachable());
    assert_eq!(kernel.exit(), None);
    let _ = kernel.handle(secs(6), unreachable());
    assert_eq!(kernel.exit(), Some(&died("libvirt is unreachable")));
}

#[test]
fn a_machine_that_cannot_be_killed_is_abandoned() {
    let mut kernel = Kernel::new(Reporter::Process);
    let _ = kernel.handle(START, Input::Stop(Stop::Kill));
    assert_eq!(kernel.handle(QUIT_LIMIT, Input::Time), [Action::Kill]);
    assert_eq!(kernel.handle(QUIT_LIMIT + KILL_AGAIN, Input::Time), [Action::Kill], "it is killed again");
    let _ = kernel.handle(QUIT_LIMIT + GIVE_UP_LIMIT, Input::Time);
    let detail = "the machine's process did not end within 60 s after it was killed";
    assert_eq!(kernel.exit(), Some(&died(detail)));

    // Nothing is done for a request that arrives at that moment.
    let mut kernel = Kernel::new(Reporter::Process);
    let _ = kernel.handle(START, DISCONNECTED);
    assert_eq!(kernel.handle(HANG_UP_LIMIT, Input::Time), [Action::Kill]);
    assert_eq!(kernel.handle(HANG_UP_LIMIT + GIVE_UP_LIMIT, Input::Stop(Stop::Kill)), []);
    assert_eq!(kernel.exit(), Some(&died(detail)));
}

fn any_input() -> impl Strategy<Value = Input> {
    let outcome = prop_oneof![Just(Outcome::Success), Just(Outcome::Failure), Just(Outcome::Unknown)];
    prop_oneof![
        4 => Just(Input::Time),
        2 => (0..40_000u64).prop_map(|limit| graceful(Duration::from_millis(limit))),
        1 => Just(Input::Stop(Stop::Kill)),
        1 => Just(POWERED_OFF),
        1 => Just(shutdown_for("host-qmp-quit")),
        1 => Just(PANICKED),
        1 => Just(disk_full()),
        1 => Just(tpm_ended()),
        1 => Just(observed(Observation::ScreenshotTaken)),
        1 => outcome.prop_map(process_ended),
        1 => Just(DISCONNECTED),
        2 => Just(observed(Observation::Running)),
        1 => Just(observed(Observation::Unreachable("libvirt is unreachable".to_owned()))),
        1 => any::<bool>().prop_map(off),
    ]
}

/// Inputs, each with the time after the one before it.
fn any_history() -> impl Strategy<Value = (Reporter, Vec<(Duration, Input)>)> {
    let reporter = prop_oneof![Just(Reporter::Process), Just(Reporter::Daemon)];
    let pause = prop_oneof![Just(0), 0..3_000u64, 0..40_000u64].prop_map(Duration::from_millis);
    (reporter, prop::collection::vec((pause, any_input()), 0..20))
}

/// What happened at a time.
type Entry = (Duration, Input, Vec<Action>);

/// Drives a kernel like a driver does: with the inputs at their times, and at each deadline in between. Then ends the
/// process, unless it has ended, and waits until the machine has ended.
fn play(reporter: Reporter, history: Vec<(Duration, Input)>) -> (Kernel, Vec<Entry>) {
    let (mut kernel, mut now, mut log) = (Kernel::new(reporter), START, Vec::new());
    let mut handle = |kernel: &mut Kernel, now: Duration, input: Input| {
        let done = kernel.exit().cloned();
        let actions = kernel.handle(now, input.clone());
        if done.is_some() {
            assert_eq!(
                (kernel.exit().cloned(), actions.as_slice()),
                (done, [].as_slice()),
                "it ended before"
            );
        }
        if kernel.exit().is_some() {
            assert_eq!(kernel.deadline(), None);
            assert_eq!(actions, [], "nothing is done to a machine that has ended");
        }
        assert!(kernel.deadline().is_none_or(|deadline| deadline > now), "a deadline in the past: busy loop");
        log.push((now, input, actions));
    };
    for (pause, input) in history {
        let next = now + pause;
        while let Some(deadline) = kernel.deadline().filter(|deadline| *deadline < next) {
            now = deadline;
            handle(&mut kernel, now, Input::Time);
        }
        now = next;
        handle(&mut kernel, now, input);
    }
    handle(&mut kernel, now, process_ended(Outcome::Success));
    let limit = now + DAEMON_PATIENCE;
    while kernel.exit().is_none() {
        now = kernel.deadline().expect("a machine whose process has ended ends");
        assert!(now <= limit, "it ends in time");
        handle(&mut kernel, now, Input::Time);
    }
    (kernel, log)
}

proptest! {
    #[test]
    fn every_machine_whose_process_ends_has_one_end((reporter, history) in any_history()) {
        let (mut kernel, log) = play(reporter, history.clone());
        let first = kernel.exit().cloned();
        for (_, input) in history {
            prop_assert_eq!(kernel.handle(log.last().unwrap().0, input), []);
        }
        prop_assert_eq!(kernel.exit().cloned(), first);
    }

    #[test]
    fn a_guest_powers_off_only_by_itself((reporter, history) in any_history()) {
        let (kernel, log) = play(reporter, history);
        if kernel.exit() != Some(&Exit::PoweredOff) {
            return Ok(());
        }
        let first = |matches: fn(&Input) -> bool| log.iter().map(|(_, input, _)| input).find(|input| matches(input));
        let reported = first(|input| matches!(input, Input::Observed(Observation::Shutdown(_)))) == Some(&POWERED_OFF);
        let end = first(|input| matches!(input, Input::Observed(Observation::ProcessEnded(_))));
        let failed = end == Some(&process_ended(Outcome::Failure));
        let off = log.iter().any(|(_, input, _)| *input == off(true));
        prop_assert!(off || reported && (reporter == Reporter::Daemon || !failed));
    }

    #[test]
    fn the_first_failure_is_the_cause((reporter, history) in any_history()) {
        let (kernel, log) = play(reporter, history);
        let first = log.iter().position(|(_, input, _)| is_failure(input));
        // One that is reported after the end does not change it.
        if let Some(first) = first.filter(|first| play_until(reporter, &log[..*first]).exit().is_none()) {
            let expected = if log[first].1 == PANICKED { Death::GuestPanic } else { Death::HostDiskFull };
            let died = matches!(kernel.exit(), Some(Exit::Died { cause, .. }) if *cause == expected);
            prop_assert!(died, "expected {:?}, but found {:?}", expected, kernel.exit());
        }
    }

    #[test]
    fn a_machine_is_killed_only_on_request_or_after_the_limit((reporter, history) in any_history()) {
        let (kernel, log) = play(reporter, history);
        let killed_now = log.iter().any(|(_, input, _)| *input == Input::Stop(Stop::Kill));
        let mut limits = log.iter().filter_map(|(at, input, _)| match input {
            Input::Stop(Stop::Graceful { limit }) => Some(*at + *limit),
            _ => None,
        });
        let earliest = limits.next().map(|first| limits.fold(first, Duration::min));
        let expired = earliest.is_some_and(|limit| log.last().unwrap().0 >= limit);
        if let Some(Exit::Killed { .. }) = kernel.exit() {
            prop_assert!(killed_now || expired);
        }
        // Nothing but a request, a failure or a loss leads to an action that ends the machine.
        for (at, _, actions) in &log {
            let before = || log.iter().take_while(|(then, ..)| then <= at).map(|(_, input, _)| input);
            let limit = earliest.is_some_and(|limit| *at >= limit);
            if actions.contains(&Action::Quit) {
                prop_assert!(limit || before().any(|input| *input == Input::Stop(Stop::Kill)));
            }
            if actions.contains(&Action::Kill) && !limit {
                let explained = before().any(|input| {
                    let causes = [Input::Stop(Stop::Kill), DISCONNECTED, tpm_ended()];
                    is_failure(input) || causes.contains(input)
                });
                prop_assert!(explained, "killed at {:?} without a reason", at);
            }
        }
    }

    #[test]
    fn a_machine_that_is_requested_to_end_is_killed_within_the_limit((reporter, history) in any_history()) {
        let mut kernel = Kernel::new(reporter);
        let mut now = START;
        for (pause, input) in history {
            // A process that has ended needs no killing.
            if !matches!(input, Input::Observed(Observation::ProcessEnded(_))) {
                now += pause;
                let _ = kernel.handle(now, input);
            }
        }
        let (requested, mut killed) = (now, false);
        let mut actions = kernel.handle(now, Input::Stop(Stop::Kill));
        while kernel.exit().is_none() && !killed {
            killed = actions.contains(&Action::Kill);
            if !killed {
                now = kernel.deadline().expect("it is killed at some time");
                actions = kernel.handle(now, Input::Time);
            }
        }
        prop_assert!(now <= requested + QUIT_LIMIT.max(KILL_AGAIN), "killed {:?} later", now - requested);
    }
}

fn is_failure(input: &Input) -> bool {
    *input == PANICKED || *input == disk_full()
}

/// Returns the state of a kernel after this part of its history.
fn play_until(reporter: Reporter, log: &[Entry]) -> Kernel {
    let mut kernel = Kernel::new(reporter);
    for (at, input, _) in log {
        let _ = kernel.handle(*at, input.clone());
    }
    kernel
}
