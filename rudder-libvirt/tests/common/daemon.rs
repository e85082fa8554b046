//! A libvirtd of a test's own.
//!
//! It is one of a user's session, with all of its files below a directory of the test. For root, who would get the system's
//! daemon, it runs in a user namespace in which it is not root.
#![allow(clippy::unwrap_used, dead_code, missing_docs, unreachable_pub)]

use std::{
    fs,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

/// A libvirtd of a test.
pub struct Daemon {
    dir: PathBuf,
    child: Child,
}

impl Daemon {
    /// Starts one whose files are in this directory, and waits until it listens.
    pub fn start(dir: &Path) -> Self {
        let make = |name: &str| {
            let path = dir.join(name);
            fs::create_dir_all(&path).unwrap();
            path
        };
        let (sockets, config) = (make("sockets"), make("config"));
        for name in ["run", "cache", "data", "config/libvirt"] {
            make(name);
        }
        // Without a second daemon (virtlogd) for logs, which would outlive this one.
        fs::write(config.join("libvirt/qemu.conf"), "stdio_handler = \"file\"\n").unwrap();
        let settings = dir.join("libvirtd.conf");
        let text = format!(
            "unix_sock_dir = \"{}\"\nauth_unix_rw = \"none\"\nlog_outputs = \"2:file:{}\"\n",
            sockets.display(),
            dir.join("libvirtd.log").display()
        );
        fs::write(&settings, text).unwrap();
        let child = spawn(dir, &settings);
        let mut daemon = Self { dir: dir.to_owned(), child };
        daemon.wait();
        daemon
    }

    /// Starts it again, after it was killed.
    pub fn restart(&mut self) {
        self.child = spawn(&self.dir, &self.dir.join("libvirtd.conf"));
        self.wait();
    }

    fn wait(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while UnixStream::connect(self.socket()).is_err() {
            let ended = self.child.try_wait().unwrap();
            let said = fs::read_to_string(self.dir.join("libvirtd.err")).unwrap();
            assert!(ended.is_none(), "libvirtd ended: {ended:?} {said}");
            assert!(Instant::now() < deadline, "libvirtd does not listen: {said}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn socket(&self) -> PathBuf {
        self.dir.join("sockets/libvirt-sock")
    }

    /// How it is reached.
    pub fn uri(&self) -> String {
        format!("qemu+unix:///session?socket={}", self.socket().display())
    }

    /// Kills it, as a crash would.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// What virsh says, and whether it is content.
    pub fn try_virsh(&self, args: &[&str]) -> Output {
        Command::new("virsh").arg("-c").arg(self.uri()).args(args).stdin(Stdio::null()).output().unwrap()
    }

    /// What virsh says.
    pub fn virsh(&self, args: &[&str]) -> String {
        let output = self.try_virsh(args);
        assert!(output.status.success(), "virsh {args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// The names of all its domains.
    pub fn domains(&self) -> Vec<String> {
        let list = self.virsh(&["list", "--all", "--name"]);
        list.lines().filter(|line| !line.is_empty()).map(str::to_owned).collect()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let _ = self.child.wait();
    }
}

fn spawn(dir: &Path, settings: &Path) -> Child {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]);
    if rustix::process::geteuid().is_root() {
        command.args(["unshare", "--user", "--map-user=1000", "--map-group=1000", "--"]);
    }
    command.arg("libvirtd").arg("--config").arg(settings);
    command.arg("--pid-file").arg(dir.join("libvirtd.pid"));
    for (variable, name) in
        [("RUNTIME_DIR", "run"), ("CONFIG_HOME", "config"), ("CACHE_HOME", "cache"), ("DATA_HOME", "data")]
    {
        command.env(format!("XDG_{variable}"), dir.join(name));
    }
    command
        .env("HOME", dir)
        .env("PATH", format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default()))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(fs::File::create(dir.join("libvirtd.err")).unwrap())
        .spawn()
        .unwrap()
}
