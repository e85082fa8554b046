//! What a guest does for us, against OpenSSH.

use super::sshd::Sshd;
use crate::{
    event::{ExitStatus, OutputStream},
    guest::{Content, Guest, Script},
};
use std::{collections::BTreeMap, time::Duration};

async fn run(guest: &Guest, script: &Script) -> (ExitStatus, Vec<String>, Vec<String>) {
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

/// Directories of ours anywhere a script may be put. Tests run side by side: only the guest's own count.
fn leftovers(marker: &str) -> Vec<String> {
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

/// The directory that a script ran in, as it said itself with `echo "dir $0"`.
fn directory(out: &[String]) -> String {
    let path = out.iter().find_map(|line| line.strip_prefix("dir ")).unwrap();
    let name = path.split('/').find(|part| part.starts_with("rudder-")).unwrap();
    name.trim_start_matches("rudder-").to_owned()
}

#[tokio::test]
async fn a_script_runs_as_a_file_and_leaves_nothing() {
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
    let (status, out, err) = run(&guest, &Script::new(text).with_env(env)).await;
    assert_eq!(status, ExitStatus::Code(1));
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
async fn a_dropped_run_ends_in_the_guest_too() {
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
        assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists(), "{pid} lives");
    }
    assert_eq!(leftovers(&directory(&lines)), [""; 0]);
}
