//! A libvirtd for one test.
//!
//! A session daemon has all of its files below a directory of the test. For root, which would get the system's daemon,
//! it runs in a user namespace in which it is not root. A system daemon runs where the test is isolated: in its own
//! network, mount and PID namespaces.
#![allow(clippy::unwrap_used, dead_code, missing_docs, unreachable_pub)]

#[path = "orphans.rs"]
pub mod orphans;

use std::{
    fs,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

/// A libvirtd that belongs to a test.
pub struct Daemon {
    dir: PathBuf,
    scope: Scope,
    child: Child,
}

/// The kind of a daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// The daemon of a user's session.
    Session,
    /// The daemon of the system: only in [namespaces](in_namespaces).
    System,
}

/// Set in a process that runs in its own namespaces.
const IN_NAMESPACES: &str = "RUDDER_TEST_INSIDE";

/// Returns whether this process has its own network and mount namespaces, in which a test may start a system libvirtd.
/// If not, runs this one test again to completion in such a process, as root. Uses sudo if it is not root yet, because
/// in a user namespace libvirtd may not set the groups of a QEMU process.
pub fn in_namespaces(test: &str) -> bool {
    if std::env::var_os(IN_NAMESPACES).is_some() {
        prepare_namespaces();
        return true;
    }
    let path = format!("PATH={}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    // Sudo passes on no other variables.
    let ours = std::env::vars_os().filter(|(name, _)| name.as_encoded_bytes().starts_with(b"RUDDER_"));
    let ours = ours.map(|(mut name, value)| {
        name.push("=");
        name.push(value);
        name
    });
    let is_root = rustix::process::geteuid().is_root();
    let mut command = Command::new(if is_root { "env" } else { "sudo" });
    command.args((!is_root).then_some("env")).args([path, format!("{IN_NAMESPACES}=1")]).args(ours);
    command.args(["setpriv", "--pdeathsig", "KILL", "--"]);
    command.args(["unshare", "--net", "--mount", "--mount-proc", "--pid", "--fork", "--kill-child", "--"]);
    // Orphans become children of the first process of a PID namespace: a shell, which reaps them.
    command.args(["sh", "-c", "\"$@\"; exit $?", "sh"]);
    command.arg(std::env::current_exe().unwrap()).args(["--exact", test, "--nocapture"]);
    let status = command.stdin(Stdio::null()).status().unwrap();
    assert!(status.success(), "{test} in namespaces of its own: {status}");
    false
}

/// Mounts empty directories for what a system libvirtd writes, brings up loopback, and adds the user that Debian's
/// libvirt looks up, whether or not it uses it.
fn prepare_namespaces() {
    let run = |program: &str, args: &[&str]| {
        let output = Command::new(program).args(args).output().unwrap();
        assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    };
    for (file, user) in [
        ("/etc/passwd", "libvirt-qemu:x:64055:64055::/nonexistent:/bin/false\n"),
        ("/etc/group", "libvirt-qemu:x:64055:\n"),
    ] {
        let known = fs::read_to_string(file).unwrap();
        if !known.contains("libvirt-qemu:") {
            let copy = tempfile::NamedTempFile::new().unwrap();
            fs::write(copy.path(), known + user).unwrap();
            run("chmod", &["644", copy.path().to_str().unwrap()]);
            // The mount keeps the file alive.
            run("mount", &["--bind", copy.path().to_str().unwrap(), file]);
        }
    }
    for directory in ["/run", "/etc/libvirt", "/var/lib/libvirt", "/var/cache/libvirt", "/var/log/libvirt"] {
        // If a directory is missing, its closest existing ancestor is hidden: it cannot, or should not, be created on
        // the host.
        let directory = Path::new(directory).ancestors().find(|directory| directory.is_dir()).unwrap();
        assert_ne!(directory, Path::new("/etc"), "expected /etc/libvirt: apt-get install libvirt-clients");
        run("mount", &["-t", "tmpfs", "tmpfs", directory.to_str().unwrap()]);
    }
    run("ip", &["link", "set", "lo", "up"]);
}

impl Daemon {
    /// Starts a session daemon with its files in this directory, and waits until it listens.
    pub fn start(dir: &Path) -> Self {
        Self::of(Scope::Session, dir)
    }

    /// Starts a daemon of this scope.
    pub fn of(scope: Scope, dir: &Path) -> Self {
        let create = |name: &str| {
            let path = dir.join(name);
            fs::create_dir_all(&path).unwrap();
            path
        };
        let (sockets, config) = (create("sockets"), create("config"));
        for name in ["run", "cache", "data", "config/libvirt"] {
            create(name);
        }
        // Without a second daemon for logs (virtlogd), which would outlive this one.
        let conf = "stdio_handler = \"file\"\n";
        match scope {
            Scope::Session => fs::write(config.join("libvirt/qemu.conf"), conf).unwrap(),
            // Turns off what would require more of the host than a test should. As root, QEMU may use /dev/kvm: if it
            // may not, libvirt 9.0 probes QEMU again on every request.
            Scope::System => {
                let more = "security_driver = \"none\"\nuser = \"root\"\ngroup = \"root\"\nnamespaces = []\n\
                            cgroup_controllers = []\n";
                fs::write("/etc/libvirt/qemu.conf", format!("{conf}{more}")).unwrap();
            }
        }
        let settings = dir.join("libvirtd.conf");
        let text = format!(
            "unix_sock_dir = \"{}\"\nauth_unix_rw = \"none\"\nlog_outputs = \"2:file:{}\"\n",
            sockets.display(),
            dir.join("libvirtd.log").display()
        );
        fs::write(&settings, text).unwrap();
        if scope == Scope::Session {
            orphans::adopt();
        }
        let child = spawn(scope, dir, &settings);
        let mut daemon = Self { dir: dir.to_owned(), scope, child };
        daemon.wait();
        daemon
    }

    /// Restarts the daemon after it was killed.
    pub fn restart(&mut self) {
        self.child = spawn(self.scope, &self.dir, &self.dir.join("libvirtd.conf"));
        self.wait();
    }

    fn wait(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while UnixStream::connect(self.socket()).is_err() {
            let ended = self.child.try_wait().unwrap();
            let output = fs::read_to_string(self.dir.join("libvirtd.err")).unwrap();
            assert!(ended.is_none(), "libvirtd ended: {ended:?} {output}");
            assert!(Instant::now() < deadline, "libvirtd does not listen: {output}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn socket(&self) -> PathBuf {
        self.dir.join("sockets/libvirt-sock")
    }

    /// Returns the URI of the daemon.
    pub fn uri(&self) -> String {
        let scope = match self.scope {
            Scope::Session => "session",
            Scope::System => "system",
        };
        format!("qemu+unix:///{scope}?socket={}", self.socket().display())
    }

    /// Kills the daemon, as a crash would.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Runs virsh, and returns its output and exit status.
    pub fn try_virsh(&self, args: &[&str]) -> Output {
        Command::new("virsh").arg("-c").arg(self.uri()).args(args).stdin(Stdio::null()).output().unwrap()
    }

    /// Runs virsh, which must succeed, and returns its standard output.
    pub fn virsh(&self, args: &[&str]) -> String {
        let output = self.try_virsh(args);
        assert!(output.status.success(), "virsh {args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Returns the names of the active networks.
    pub fn networks(&self) -> Vec<String> {
        let list = self.virsh(&["net-list", "--name"]);
        list.lines().filter(|line| !line.is_empty()).map(str::to_owned).collect()
    }

    /// Returns the names of all domains.
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

fn spawn(scope: Scope, dir: &Path, settings: &Path) -> Child {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]);
    if scope == Scope::Session && rustix::process::geteuid().is_root() {
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
