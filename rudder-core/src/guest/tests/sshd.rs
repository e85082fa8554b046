//! A real OpenSSH server without a port: every dial starts `sshd -i` on one end of a socket pair.

use crate::{
    backend::BoxedStream,
    guest::{BuildKey, Endpoint, Guest, Login},
};
use std::{
    path::{Path, PathBuf},
    process::Stdio,
    sync::Arc,
    time::Duration,
};

/// Whether a process is running. One that has ended may remain as a zombie until the system's init reaps it.
pub(crate) fn runs(pid: &str) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, state)| !state.starts_with('Z'))
}

/// Whether a process ends. A killed process may take a moment on a busy host; this waits for up to a minute.
pub(crate) async fn ends(pid: &str) -> bool {
    let gone = async {
        while runs(pid) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), gone).await.is_ok()
}

pub(crate) struct Sshd {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) key: BuildKey,
    config: PathBuf,
}

impl Sshd {
    /// Starts a server that accepts the user of this process with its key. `extra` lines come first: the first value
    /// counts.
    pub(crate) async fn new(extra: &str) -> Arc<Self> {
        Self::with(|_| extra.to_owned()).await
    }

    /// Starts such a server, with lines that depend on the server's own directory.
    pub(crate) async fn with(extra: impl FnOnce(&Path) -> String) -> Arc<Self> {
        let program = Path::new("/usr/sbin/sshd");
        assert!(program.exists(), "this test needs {}: apt-get install openssh-server", program.display());
        // The directory in which sshd confines its unprivileged half; the package's service makes it.
        if rustix::process::getuid().is_root() {
            std::fs::create_dir_all("/run/sshd").unwrap();
        }
        let dir = tempfile::tempdir().unwrap();
        let extra = extra(dir.path());
        let key = BuildKey::generate();
        BuildKey::generate().write(&dir.path().join("host")).await.unwrap();
        std::fs::write(dir.path().join("authorized"), key.authorized_key() + "\n").unwrap();
        let sftp = if extra.contains("Subsystem") { "" } else { "Subsystem sftp internal-sftp\n" };
        let config = dir.path().join("sshd_config");
        std::fs::write(
            &config,
            format!(
                "{extra}\nHostKey {0}/host\nAuthorizedKeysFile {0}/authorized\nStrictModes no\nUsePAM no\n\
                 PidFile none\nPasswordAuthentication no\nPrintMotd no\n{sftp}\n",
                dir.path().display()
            ),
        )
        .unwrap();
        Arc::new(Self { dir, key, config })
    }

    pub(crate) fn user() -> String {
        let output = std::process::Command::new("id").arg("-un").output().unwrap();
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    pub(crate) fn dial(&self) -> BoxedStream {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let input = std::os::fd::OwnedFd::from(theirs.try_clone().unwrap());
        let mut child = tokio::process::Command::new("/usr/sbin/sshd")
            .arg("-i")
            .arg("-f")
            .arg(&self.config)
            .arg("-E")
            .arg(self.dir.path().join("log"))
            .stdin(Stdio::from(input))
            .stdout(Stdio::from(std::os::fd::OwnedFd::from(theirs)))
            .stderr(Stdio::null())
            .env_clear()
            .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
            .spawn()
            .unwrap();
        // The server ends when its connection does.
        tokio::spawn(async move { child.wait().await });
        ours.set_nonblocking(true).unwrap();
        Box::new(tokio::net::UnixStream::from_std(ours).unwrap())
    }

    pub(crate) fn endpoint(self: &Arc<Self>) -> Endpoint {
        let server = Arc::clone(self);
        Endpoint::new(move || {
            let server = Arc::clone(&server);
            Box::pin(async move { Ok(server.dial()) })
        })
    }

    pub(crate) fn login(&self) -> Login {
        Login::new(Self::user(), self.key.clone())
    }

    pub(crate) async fn guest(self: &Arc<Self>) -> Guest {
        match self.login().connect(&self.endpoint(), Duration::from_secs(60)).await {
            Ok(guest) => guest,
            Err(error) => {
                let log = std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
                panic!("{}\n{log}", error.report());
            }
        }
    }
}
