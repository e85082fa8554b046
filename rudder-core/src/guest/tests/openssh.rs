//! Access to a guest, against OpenSSH.

use super::sshd::{Sshd, ends, runs};
use crate::{
    event::{CommandStatus, OutputStream},
    guest::{Content, Guest, Script},
};
use std::{collections::BTreeMap, time::Duration};

pub(super) async fn run(guest: &Guest, script: &Script) -> (CommandStatus, Vec<String>, Vec<String>) {
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let status = guest
        .run(script, |stream, line| match stream {
            OutputStream::Stdout => out.push(line.to_owned()),
            OutputStream::Stderr => err.push(line.to_owned()),
        })
        .await
        .unwrap();
    (status, out, err)
}

/// Returns Rudder's directories anywhere a script may be put. Tests run concurrently, so only those of the test's guest
/// count.
pub(super) fn leftovers(marker: &str) -> Vec<String> {
    let mut found = Vec::new();
    for place in ["/tmp", "/var/tmp", "/dev/shm"] {
        for entry in std::fs::read_dir(place).unwrap().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with("rudder-") && name.contains(marker) {
                found.push(format!("{place}/{name}"));
            }
        }
    }
    found
}

/// Returns the directory that a script ran in, as printed by `echo "dir $0"`.
fn directory(out: &[String]) -> String {
    let path = out.iter().find_map(|line| line.strip_prefix("dir ")).unwrap();
    let name = path.split('/').find(|part| part.starts_with("rudder-")).unwrap();
    name.trim_start_matches("rudder-").to_owned()
}

#[tokio::test]
async fn a_script_runs_as_a_file_and_leaves_nothing_behind() {
    let server = Sshd::new("").await;
    let guest = server.guest().await;
    let env = BTreeMap::from([
        ("QUOTES".to_owned(), "it's \"so\" `now` $HOME \\ !".to_owned()),
        ("LINES".to_owned(), "one\ntwo\n".to_owned()),
        ("OTHER".to_owned(), "Grüße, 世界 🚀".to_owned()),
        ("EMPTY".to_owned(), String::new()),
    ]);
    let text = "echo \"dir $0\"\nprintf '%s|' \"$QUOTES\" \"$LINES\" \"$OTHER\" \"${EMPTY-unset}\"\necho\necho fails >&2\n\
                [ -n \"$BASH_VERSION\" ] && echo bash\numask\nfalse\necho never";
    let (status, out, err) = run(&guest, &Script::new(text).env(env)).await;
    assert_eq!(status, CommandStatus::Code(1));
    assert_eq!(out[1..], ["it's \"so\" `now` $HOME \\ !|one", "two", "|Grüße, 世界 🚀||", "bash", "0022"]);
    assert_eq!(err, ["fails"]);
    assert_eq!(leftovers(&directory(&out)), [""; 0]);
}

#[tokio::test]
async fn a_file_is_uploaded_and_verified() {
    let server = Sshd::new("").await;
    let guest = server.guest().await;
    let bytes: Vec<u8> = (0..3_000_001u32).map(|i| (i * 7 % 251) as u8).collect();
    let path = server.dir.path().join("deep/er/it's a file");
    guest.upload(Content::Bytes(&bytes), path.to_str().unwrap()).await.unwrap();
    assert!(std::fs::read(&path).unwrap() == bytes);
    guest.upload(Content::File(&path), server.dir.path().join("copy").to_str().unwrap()).await.unwrap();
    assert!(std::fs::read(server.dir.path().join("copy")).unwrap() == bytes);
    let error = guest.upload(Content::Bytes(b""), server.dir.path().to_str().unwrap()).await.unwrap_err();
    assert!(error.to_string().contains("found a directory"), "{error}");
}

#[tokio::test]
async fn dropping_a_run_ends_it_in_the_guest() {
    let server = Sshd::new("").await;
    let guest = server.guest().await;
    let (said, mut heard) = tokio::sync::mpsc::unbounded_channel();
    let script = Script::new("echo \"dir $0\"; echo $$; sleep 1000 & echo $!; trap '' TERM; sleep 1000");
    let running = guest.run(&script, |_, line| said.send(line.to_owned()).unwrap());
    let lines = tokio::select! {
        ended = running => panic!("{ended:?}"),
        lines = async { [heard.recv().await.unwrap(), heard.recv().await.unwrap(), heard.recv().await.unwrap()] } => lines,
    };
    guest.settle(Duration::from_secs(30)).await;
    for pid in &lines[1..] {
        assert!(ends(pid).await, "{pid} lives");
    }
    assert_eq!(leftovers(&directory(&lines)), [""; 0]);
}

#[tokio::test]
async fn the_first_line_and_the_execute_command_select_the_interpreter() {
    let server = Sshd::new("").await;
    let guest = server.guest().await;
    let (status, out, _) =
        run(&guest, &Script::new("#!/bin/sh -u\r\necho \"$0\"\r\necho $-\r\nexit 3\r\n")).await;
    assert_eq!(status, CommandStatus::Code(3));
    assert!(out[0].ends_with("/script") && out[1].contains('u') && !out[1].contains('e'), "{out:?}");

    let script = Script::new("#!/usr/bin/awk -f\nBEGIN { print \"awk\", ENVIRON[\"A\"] }\n")
        .env(BTreeMap::from([("A".to_owned(), "b c".to_owned())]))
        .execute_command(Some(
            "echo \"dir {{ .Command }}\"; env -i PATH=$PATH '{{.Command}}'; echo $?".to_owned(),
        ));
    let (status, out, err) = run(&guest, &script).await;
    assert_eq!(status, CommandStatus::Code(0), "{err:?}");
    assert_eq!(out[1..], ["awk b c", "0"]);
    assert_eq!(leftovers(&directory(&out)), [""; 0]);

    let script = Script::new("echo \"$1\"").execute_command(Some("{{ .Command }} argument".to_owned()));
    assert_eq!(run(&guest, &script).await.1, ["argument"]);
}

#[tokio::test]
async fn signals_background_processes_and_binary_output_are_handled() {
    let server = Sshd::new("").await;
    let guest = server.guest().await;
    let (status, ..) = run(&guest, &Script::new("kill -KILL $$")).await;
    // As reported by /bin/sh.
    let killed = [CommandStatus::Signal("KILL".into()), CommandStatus::Code(137)];
    assert!(killed.contains(&status), "{status:?}");

    let (status, out, _) = run(&guest, &Script::new("sleep 1000 & echo $!\nexit 4")).await;
    assert_eq!(status, CommandStatus::Code(4));
    assert!(runs(&out[0]), "what a script leaves running stays");
    let _ = run(&guest, &Script::new(format!("kill {}", out[0]))).await;

    let text =
        "head -c 300000 /dev/urandom; echo; head -c 100000 /dev/zero | tr '\\0' x; echo; printf 'no newline'";
    let (status, out, _) = run(&guest, &Script::new(text)).await;
    assert_eq!(status, CommandStatus::Code(0));
    assert_eq!(out.last().unwrap(), "no newline");
    assert_eq!(out.iter().map(|line| line.matches('x').count()).filter(|count| *count > 8000).count(), 12);
    assert!(out.iter().all(|line| line.len() < crate::guest::MAX_LINE + 4));
}

#[tokio::test]
async fn a_large_script_arrives_complete() {
    let server = Sshd::new("").await;
    let guest = server.guest().await;
    let script = format!("{}\necho end\n", ": 'it is long'\n".repeat(200_000));
    assert_eq!(run(&guest, &Script::new(script)).await.1, ["end"]);
}

#[tokio::test]
async fn files_are_uploaded_without_sftp() {
    let server = Sshd::new("Subsystem sftp /nonexistent").await;
    let guest = server.guest().await;
    let path = server.dir.path().join("new/file");
    guest.upload(Content::Bytes(&[7; 200_000]), path.to_str().unwrap()).await.unwrap();
    assert!(std::fs::read(&path).unwrap() == [7; 200_000]);
}

#[tokio::test]
async fn wrong_credentials_are_distinguished_from_silence() {
    let server = Sshd::new("").await;
    std::fs::write(server.dir.path().join("authorized"), "").unwrap();
    let error = server.login().connect(&server.endpoint(), Duration::from_secs(4)).await.unwrap_err();
    assert_eq!(error.kind(), crate::ErrorKind::Authentication);
    assert!(error.to_string().contains("the server offers publickey"), "{error}");

    let silent = crate::guest::Endpoint::new(|| {
        Box::pin(async {
            let (ours, theirs) = tokio::io::duplex(64);
            tokio::spawn(async move {
                let _theirs = theirs;
                std::future::pending::<()>().await;
            });
            Ok(Box::new(ours) as crate::backend::BoxedStream)
        })
    });
    let error = server.login().connect(&silent, Duration::from_secs(1)).await.unwrap_err();
    assert_eq!(error.kind(), crate::ErrorKind::GuestUnreachable);
    let closed = crate::guest::Endpoint::new(|| {
        Box::pin(async { Ok(Box::new(tokio::io::duplex(64).0) as crate::backend::BoxedStream) })
    });
    let error = server.login().connect(&closed, Duration::from_secs(1)).await.unwrap_err();
    assert!(error.to_string().contains("last seen: the connection was closed before"), "{error}");
}

/// A guest under load needs longer for its first byte than most attempts wait for it.
#[tokio::test]
async fn a_server_that_is_slow_to_send_its_banner_is_waited_for() {
    let server = Sshd::new("").await;
    let inner = server.endpoint();
    let slow = crate::guest::Endpoint::new(move || {
        let dialled = inner.dial();
        Box::pin(async move {
            let mut far = dialled.await?;
            let (ours, mut theirs) = tokio::io::duplex(1 << 16);
            tokio::spawn(async move {
                tokio::time::sleep(Duration::from_secs(6)).await;
                tokio::io::copy_bidirectional(&mut theirs, &mut far).await
            });
            Ok(Box::new(ours) as crate::backend::BoxedStream)
        })
    });
    let guest = server.login().connect(&slow, Duration::from_secs(60)).await.unwrap();
    guest.close().await;
}

#[tokio::test]
async fn the_key_may_be_authorised_late_but_the_host_key_may_not_change() {
    let server = Sshd::new("").await;
    let authorized = server.dir.path().join("authorized");
    let line = std::fs::read_to_string(&authorized).unwrap();
    std::fs::write(&authorized, "").unwrap();
    let login = server.login();
    let endpoint = server.endpoint();
    let late = async {
        tokio::time::sleep(Duration::from_millis(1500)).await;
        std::fs::write(&authorized, line).unwrap();
    };
    let (guest, ()) = tokio::join!(login.connect(&endpoint, Duration::from_secs(60)), late);
    guest.unwrap().close().await;

    std::fs::remove_file(server.dir.path().join("host")).unwrap();
    crate::guest::BuildKey::generate().write(&server.dir.path().join("host")).await.unwrap();
    let error = login.connect(&endpoint, Duration::from_secs(60)).await.unwrap_err();
    assert!(error.to_string().contains("expected the host key that the guest presented before"), "{error}");
}
