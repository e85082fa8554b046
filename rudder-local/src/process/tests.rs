#![allow(clippy::unwrap_used)]
use super::*;

fn sh(script: &str, lifetime: Lifetime) -> Invocation {
    Invocation::new(Path::new("/bin/sh"), lifetime).args(["-c", script])
}

#[tokio::test]
async fn input_output_and_status_are_passed() {
    let invocation = sh("cat; echo bad >&2; exit 3", Lifetime::Kept);
    let finished = invocation.run(Some(b"hello")).await.unwrap();
    assert_eq!(finished.stdout, b"hello");
    assert_eq!(describe(finished.status), "exited with code 3");
    assert_eq!(finished.success("try").unwrap_err().to_string(), "cannot try: sh: bad");
}

#[tokio::test]
async fn a_full_disk_is_distinguished_from_other_failures() {
    let finished = sh("echo 'error while writing: No space left on device' >&2; exit 1", Lifetime::Kept);
    let error = finished.run(None).await.unwrap().success("convert").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::HostDiskFull);
    let error = sh("kill -9 $$", Lifetime::Kept).run(None).await.unwrap().success("convert").unwrap_err();
    assert_eq!(error.to_string(), "cannot convert: sh: was ended by signal 9 (SIGKILL)");
}

#[test]
fn advice_to_repair_files_of_the_store_is_removed() {
    let output = "qemu-img: Could not open 'a.vhdx': VHDX image file 'a.vhdx' opened read-only, but contains a log that needs \
                to be replayed\nTo replay the log, run:\nqemu-img check -r all 'a.vhdx'\n";
    let left = without_advice(output);
    assert!(left.ends_with("needs to be replayed"), "{left}");
    assert_eq!(without_advice("one\ntwo\n"), "one\ntwo");
}

#[tokio::test]
async fn a_dropped_run_kills_the_program() {
    let dir = tempfile::tempdir().unwrap();
    let script = "echo $$ > pid.new && mv pid.new pid && exec sleep 1000";
    let setpriv = find(None, "setpriv");
    let run = tokio::spawn(sh(script, Lifetime::WithOwner(setpriv)).directory(dir.path()).run(None));
    let pid_file = dir.path().join("pid");
    while !pid_file.exists() {
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    let pid = std::fs::read_to_string(pid_file).unwrap();
    run.abort();
    let stat = format!("/proc/{}/stat", pid.trim());
    while std::fs::read_to_string(&stat).is_ok_and(|stat| !stat.contains(") Z ")) {
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
}

/// Starts a process that is not a child of this one, and returns its ID.
async fn spawn_unrelated(script: &str) -> u32 {
    let script = format!("({script}) </dev/null >/dev/null 2>&1 & echo $!");
    let finished = sh(&script, Lifetime::Kept).run(None).await.unwrap();
    String::from_utf8(finished.stdout).unwrap().trim().parse().unwrap()
}

#[tokio::test]
async fn the_end_of_an_adopted_process_is_noticed_and_it_can_be_killed() {
    let pid = spawn_unrelated("exec sleep 1000").await;
    let mut adopted = OwnedChild::adopt(pid, || true).unwrap().unwrap();
    assert_eq!(adopted.pid(), Some(pid));
    drop(OwnedChild::adopt(pid, || true).unwrap().unwrap());
    assert!(OwnedChild::adopt(pid, || false).unwrap().is_none(), "it is another process by now");
    adopted.kill();
    for _ in 0..2 {
        // Whether its parent has waited for it is a race.
        if let Ok(status) = adopted.wait().await {
            assert_eq!(describe(status), "was ended by signal 9 (SIGKILL)");
        }
    }
    assert!(OwnedChild::adopt(u32::MAX, || true).unwrap().is_none());
}

#[tokio::test]
async fn dropping_an_adopted_process_leaves_it_alone() {
    let dir = tempfile::tempdir().unwrap();
    let (go, done) = (dir.path().join("go"), dir.path().join("done"));
    let script =
        format!("mkfifo {0}; read x <{0}; echo > {1}.new; mv {1}.new {1}", go.display(), done.display());
    let pid = spawn_unrelated(&script).await;
    drop(OwnedChild::adopt(pid, || true).unwrap().unwrap());
    while !go.exists() {
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    let released = go.clone();
    tokio::task::spawn_blocking(move || std::fs::write(released, "x\n")).await.unwrap().unwrap();
    while !done.exists() {
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_missing_program_is_reported_as_missing() {
    let error = Invocation::new(Path::new("/nonexistent/qemu"), Lifetime::Kept).run(None).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::HostMissing);
    assert_eq!(error.to_string(), "cannot start /nonexistent/qemu");
    assert_eq!(find(None, "a-program-that-does-not-exist"), None);
}
