//! Users with all kinds of login shells, whose start-up files write arbitrary output, on a real OpenSSH server.

use super::{
    openssh::{leftovers, run},
    sshd::{Sshd, ends},
};
use crate::{
    ErrorKind,
    event::CommandStatus,
    guest::{Content, Guest, Script},
};
use std::{collections::BTreeMap, os::unix::fs::PermissionsExt as _, path::Path, sync::Arc, time::Duration};

/// Login shells, and the package that contains each.
const SHELLS: [(&str, &str); 8] = [
    ("dash", "dash"),
    ("bash", "bash"),
    ("zsh", "zsh"),
    ("fish", "fish"),
    ("tcsh", "tcsh"),
    ("bsd-csh", "csh"),
    ("busybox sh", "busybox"),
    // An administrator's wrapper of a shell, with an exit status of its own.
    ("{dir}/wrapper", "coreutils"),
];

const SFTP_SERVER: &str = "/usr/lib/openssh/sftp-server";

/// Starts a server that runs every command, and the SFTP server, as `SHELL -c COMMAND`, like sshd does with the user's
/// shell.
async fn server(shell: &str, limits: &str, sftp: &str) -> Arc<Sshd> {
    let server = Sshd::with(|dir| {
        let dir = dir.display();
        let shell = shell.replace("{dir}", &dir.to_string());
        // Which files bash reads by itself depends on how it was built.
        let bash =
            if shell == "bash" { format!("BASH_ENV={dir}/.bashrc; export BASH_ENV;") } else { String::new() };
        format!(
            "Subsystem sftp {sftp}\nForceCommand {limits} HOME={dir}; {bash} export HOME; \
             exec {shell} -c \"$SSH_ORIGINAL_COMMAND\""
        )
    })
    .await;
    let dir = server.dir.path();
    let write = |name: &str, text: &str| {
        std::fs::create_dir_all(dir.join(name).parent().unwrap()).unwrap();
        std::fs::write(dir.join(name), text).unwrap();
    };
    write(".bashrc", "unset BASH_ENV\necho Welcome\nprintf 'no end of a line' >&2; printf '\\001\\002'\n");
    write(".zshenv", "echo Welcome; printf 'no end' >&2; printf 'no end'; zshexit() { echo bye }\n");
    write(".cshrc", "echo Welcome\necho -n 'no end'\nset verbose\nset echo\n");
    write(
        ".config/fish/config.fish",
        "echo Welcome; printf 'no end' >&2; printf 'no end'; function bye --on-event fish_exit; echo bye; end\n",
    );
    write(
        "wrapper",
        "#!/bin/sh\nset -x\nprintf 'no end'; printf 'no end' >&2\n/bin/sh \"$@\"\necho bye; echo bye >&2; exit 0\n",
    );
    std::fs::set_permissions(dir.join("wrapper"), std::fs::Permissions::from_mode(0o755)).unwrap();
    server
}

/// Does everything that a build does with a guest.
async fn use_it(guest: &Guest, dir: &Path, name: &str) {
    let output = guest
        .command("echo one\nif true; then\n  printf 'it'\"'\"'s! %s' '$HOME \\n'\nfi\necho err >&2\nexit 3")
        .await;
    let output = output.unwrap_or_else(|error| panic!("{name}: {}", error.report()));
    let (out, err) = ("one\nit's! $HOME \\n\n", "err\n");
    assert_eq!(
        (&*output.stdout, &*output.stderr, output.status),
        (out, err, CommandStatus::Code(3)),
        "{name}"
    );

    let env = BTreeMap::from([("VALUE".to_owned(), "it's\n\"so\" !".to_owned())]);
    let text = "echo \"dir $0\"\nprintf '%s' \"$VALUE\"\necho err >&2\nexit 4";
    let (status, out, err) = run(guest, &Script::new(text).env(env)).await;
    assert_eq!(
        (&status, &out[1..], &*err),
        (&CommandStatus::Code(4), &["it's".into(), "\"so\" !".into()][..], &["err".to_owned()][..]),
        "{name}"
    );
    assert_eq!(leftovers(out[0].rsplit('/').nth(1).unwrap()), [""; 0], "{name}");

    let script =
        Script::new("echo \"$1\"; exit 5").execute_command(Some("{{ .Command }} argument".to_owned()));
    let (status, out, _) = run(guest, &script).await;
    assert_eq!((status, out), (CommandStatus::Code(5), vec!["argument".to_owned()]), "{name}");

    let known = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    assert_eq!(guest.boot_id().await.unwrap(), known.trim(), "{name}");

    let bytes: Vec<u8> = (0..100_000u32).map(|i| (i * 7 % 251) as u8).collect();
    let path = dir.join("a directory/it's a file");
    guest
        .upload(Content::Bytes(&bytes), path.to_str().unwrap())
        .await
        .unwrap_or_else(|error| panic!("{name}: {}", error.report()));
    assert!(std::fs::read(&path).unwrap() == bytes, "{name}");
    std::fs::remove_dir_all(path.parent().unwrap()).unwrap();
}

#[tokio::test]
async fn nothing_depends_on_the_login_shell_or_its_output() {
    assert!(
        Path::new(SFTP_SERVER).exists(),
        "this test needs {SFTP_SERVER}: apt-get install openssh-sftp-server"
    );
    for (shell, package) in SHELLS {
        let program = shell.split(' ').next().unwrap();
        let found = program.starts_with('{')
            || ["/bin", "/usr/bin"].iter().any(|dir| Path::new(dir).join(program).exists());
        assert!(found, "this test needs {program}: apt-get install {package}");
        for sftp in [SFTP_SERVER, "/nonexistent"] {
            let server = server(shell, "", sftp).await;
            let guest = server.guest().await;
            use_it(&guest, server.dir.path(), &format!("{shell}, {sftp}")).await;
            guest.close().await;
        }
    }
}

#[tokio::test]
async fn dropping_a_run_ends_it_under_any_login_shell() {
    for shell in ["fish", "tcsh", "{dir}/wrapper"] {
        let server = server(shell, "", SFTP_SERVER).await;
        let guest = server.guest().await;
        let (said, mut heard) = tokio::sync::mpsc::unbounded_channel();
        let script = Script::new("echo $$; echo \"dir $0\"; sleep 1000");
        let running = guest.run(&script, |_, line| said.send(line.to_owned()).unwrap());
        let (pid, dir) = tokio::select! {
            ended = running => panic!("{ended:?}"),
            lines = async { (heard.recv().await.unwrap(), heard.recv().await.unwrap()) } => lines,
        };
        guest.settle(Duration::from_secs(60)).await;
        assert!(ends(&pid).await, "{shell}: {pid} lives");
        assert_eq!(leftovers(dir.rsplit('/').nth(1).unwrap()), [""; 0], "{shell}");
    }
}

#[tokio::test]
async fn a_login_shell_that_runs_nothing_is_reported() {
    for (shell, says) in [
        ("/usr/sbin/nologin", "not available"),
        ("bash -r", "restricted"),
        ("/bin/false", "it wrote nothing"),
    ] {
        let server = server(shell, "", "/nonexistent").await;
        let guest = server.guest().await;
        let errors = [
            guest.command("true").await.unwrap_err(),
            guest.run(&Script::new("true"), |_, _| {}).await.unwrap_err(),
            guest.upload(Content::Bytes(b"x"), "/tmp/rudder-test-never").await.unwrap_err(),
        ];
        for error in errors {
            assert_eq!(error.kind(), ErrorKind::Protocol, "{error}");
            let text = error.report();
            assert!(text.contains("the login shell of user") && text.contains(says), "{text}");
        }
        assert!(!Path::new("/tmp/rudder-test-never").exists());
    }
}

#[tokio::test]
async fn a_failed_upload_leaves_nothing_behind() {
    for sftp in [SFTP_SERVER, "/nonexistent"] {
        // No file may become larger than this, which is equivalent to a full disk.
        let server = server("sh", "ulimit -f 64;", sftp).await;
        let guest = server.guest().await;
        let path = server.dir.path().join("new/er/file");
        let error = guest.upload(Content::Bytes(&[7; 1 << 20]), path.to_str().unwrap()).await.unwrap_err();
        assert!(error.to_string().contains("could not write"), "{sftp}: {error}");
        assert!(!server.dir.path().join("new").exists(), "{sftp}: it was made for the file");

        let old = server.dir.path().join("old");
        std::fs::write(&old, "it was there").unwrap();
        guest.upload(Content::Bytes(&[7; 1 << 20]), old.to_str().unwrap()).await.unwrap_err();
        assert!(old.exists(), "{sftp}: what stood there is not ours to remove");
    }
}
