//! Steps against a real OpenSSH server whose "guest" restarts when its boot identity changes.

#![allow(clippy::unwrap_used)]

use super::*;
use crate::{
    guest::tests::sshd::{Sshd, runs},
    plan::PlannedStep,
};
use std::{os::unix::fs::PermissionsExt as _, path::Path, sync::Arc};
use tokio_util::sync::CancellationToken;

/// Starts a server whose `cat` prints the boot identity from a file.
async fn server() -> Arc<Sshd> {
    let server =
        Sshd::with(|dir| format!("SetEnv PATH={}/bin:/usr/sbin:/usr/bin:/sbin:/bin", dir.display())).await;
    let dir = server.dir.path();
    std::fs::create_dir(dir.join("bin")).unwrap();
    std::fs::write(dir.join("boot_id"), "first\n").unwrap();
    let cat = format!(
        "[ \"$*\" = /proc/sys/kernel/random/boot_id ] && exec /bin/cat {}/boot_id\nexec /bin/cat \"$@\"",
        dir.display()
    );
    program(&dir.join("bin/cat"), &cat);
    server
}

fn program(path: &Path, text: &str) {
    std::fs::write(path, format!("#!/bin/sh\n{text}\n")).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
}

fn step(action: StepAction, timeout: Option<u64>) -> PlannedStep {
    let mut plan = serde_json::json!({"name": "it", "timeout": null, "action": action});
    plan["timeout"] = timeout.map(|seconds| seconds * 1000).into();
    serde_json::from_value(plan).unwrap()
}

fn shell(script: &str) -> StepAction {
    StepAction::Shell {
        script: script.into(),
        env: [("SECRET".to_owned(), "s3cret!".to_owned())].into(),
        execute_command: None,
    }
}

async fn perform(
    server: &Arc<Sshd>,
    step: &PlannedStep,
    cancel: CancellationToken,
) -> (StepOutcome, Vec<String>) {
    let mut session =
        Session::open(server.endpoint(), server.login(), Duration::from_secs(60)).await.unwrap();
    let mut lines = Vec::new();
    let masker = Masker::new(&[crate::secret::Secret::new("s3cret!")]);
    let outcome = run(
        step,
        StepContext {
            session: &mut session,
            output: &mut |_, line| lines.push(line.to_owned()),
            masker: &masker,
            deadline: Box::pin(std::future::pending()),
            cancelled: Box::pin(cancel.cancelled_owned()),
            variables: [("SECRET", "other"), ("ADDRESS", "10.0.2.2:80")]
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .into(),
            fetched: None,
            person: None,
            stopped: &mut |_| {},
            settle: Duration::from_secs(10),
        },
    )
    .await;
    (outcome, lines)
}

#[tokio::test]
async fn a_failed_script_reports_its_exit_code_and_no_secret() {
    let server = server().await;
    let script = "echo \"it is $SECRET at $ADDRESS\"; exit 3";
    let (outcome, lines) = perform(&server, &step(shell(script), None), CancellationToken::new()).await;
    assert_eq!(outcome.exit, Some(CommandStatus::Code(3)));
    let error = outcome.result.unwrap_err();
    assert_eq!(error.to_string(), "expected the script to end with exit code 0, but found exit code 3");
    assert_eq!(lines, ["it is *** at 10.0.2.2:80"]);
}

#[tokio::test]
async fn a_step_and_its_processes_end_at_its_limit() {
    let server = server().await;
    let (outcome, lines) =
        perform(&server, &step(shell("echo $$; sleep 1000"), Some(2)), CancellationToken::new()).await;
    let error = outcome.result.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    assert_eq!(error.to_string(), "the step did not end within its limit of 2 s, and was stopped");
    assert!(!runs(&lines[0]));
}

#[tokio::test]
async fn a_cancelled_step_ends_its_processes_before_it_returns() {
    let server = server().await;
    let pid = server.dir.path().join("pid");
    let script = format!("echo $$ > {0}.new; mv {0}.new {0}; exec sleep 1000", pid.display());
    let (cancel, pid_file) = (CancellationToken::new(), pid.clone());
    let canceller = tokio::spawn({
        let cancel = cancel.clone();
        async move {
            while !pid_file.exists() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            cancel.cancel();
        }
    });
    let (outcome, _) = perform(&server, &step(shell(&script), None), cancel).await;
    canceller.await.unwrap();
    let error = outcome.result.unwrap_err();
    assert_eq!((error.kind(), error.to_string().as_str()), (ErrorKind::Cancelled, "the step was cancelled"));
    assert!(!runs(std::fs::read_to_string(pid).unwrap().trim()));
}

#[tokio::test]
async fn a_reboot_ends_when_the_guest_answers_with_another_boot_identity() {
    let server = server().await;
    let dir = server.dir.path().display();
    // The old server keeps answering for two seconds after its connection is cut.
    let command = format!("(sleep 2; echo second >{dir}/boot_id) >/dev/null 2>&1 & kill $PPID");
    let (outcome, _) =
        perform(&server, &step(StepAction::Reboot { command }, Some(60)), CancellationToken::new()).await;
    outcome.result.unwrap();
    assert_eq!(std::fs::read_to_string(server.dir.path().join("boot_id")).unwrap(), "second\n");
}

#[tokio::test]
async fn a_reboot_that_does_not_happen_is_an_error() {
    let server = server().await;
    let missing = StepAction::Reboot { command: "no-such-reboot".into() };
    let (outcome, lines) = perform(&server, &step(missing, Some(60)), CancellationToken::new()).await;
    assert_eq!(outcome.exit, Some(CommandStatus::Code(127)));
    assert!(lines[0].contains("no-such-reboot"), "{lines:?}");
    let error = outcome.result.unwrap_err().to_string();
    assert!(
        error.starts_with("`no-such-reboot` did not restart the guest: it ended with exit code 127"),
        "{error}"
    );

    let idle = StepAction::Reboot { command: "true".into() };
    let (outcome, _) = perform(&server, &step(idle, Some(3)), CancellationToken::new()).await;
    let error = outcome.result.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    assert!(error.to_string().contains("the boot identity of the guest has not changed"), "{error}");
}
