//! A libvirtd of a test's own.
//!
//! One of a user's session has all of its files below a directory of the test. For root, who would get the system's daemon, it
//! runs in a user namespace in which it is not root. One of the system runs where the test is alone: in namespaces with a
//! network and mounts of their own.
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

/// A libvirtd of a test.
pub struct Daemon {
    dir: PathBuf,
    scope: Scope,
    child: Child,
}

/// Whose daemon it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// A user's.
    Session,
    /// The system's: only in [namespaces](in_namespaces).
    System,
}

/// Set in a process that runs in namespaces of its own.
const INSIDE: &str = "RUDDER_TEST_INSIDE";

/// Whether this process is alone with a network and mounts of its own, in which a test may start a libvirtd of the system.
/// If not, runs this one test again in such a process, to its end, as root: through sudo where it is not root yet, because in
/// a namespace of users libvirtd may not choose the groups of a QEMU.
pub fn in_namespaces(test: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        furnish();
        return true;
    }
    let path = format!("PATH={}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    // Sudo hands on no others.
    let ours = std::env::vars_os().filter(|(name, _)| name.as_encoded_bytes().starts_with(b"RUDDER_"));
    let ours = ours.map(|(mut name, value)| {
        name.push("=");
        name.push(value);
        name
    });
    let is_root = rustix::process::geteuid().is_root();
    let mut command = Command::new(if is_root { "env" } else { "sudo" });
    command.args((!is_root).then_some("env")).args([path, format!("{INSIDE}=1")]).args(ours);
    command.args(["setpriv", "--pdeathsig", "KILL", "--"]);
    command.args(["unshare", "--net", "--mount", "--mount-proc", "--pid", "--fork", "--kill-child", "--"]);
    // The first process of a namespace is whose children orphans become: a shell takes note of their end.
    command.args(["sh", "-c", "\"$@\"; exit $?", "sh"]);
    command.arg(std::env::current_exe().unwrap()).args(["--exact", test, "--nocapture"]);
    let status = command.stdin(Stdio::null()).status().unwrap();
    assert!(status.success(), "{test} in namespaces of its own: {status}");
    false
}

/// Empty places for what a libvirtd of the system writes; loopback; the user that Debian's libvirt looks for, whether or not
/// it uses it.
fn furnish() {
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
            // The mount keeps the file.
            run("mount", &["--bind", copy.path().to_str().unwrap(), file]);
        }
    }
    for place in ["/run", "/etc/libvirt", "/var/lib/libvirt", "/var/cache/libvirt", "/var/log/libvirt"] {
        // Where a place is missing, all that is beside it is hidden: it cannot, or should not, be made on the host.
        let place = Path::new(place).ancestors().find(|place| place.is_dir()).unwrap();
        assert_ne!(place, Path::new("/etc"), "expected /etc/libvirt: apt-get install libvirt-clients");
        run("mount", &["-t", "tmpfs", "tmpfs", place.to_str().unwrap()]);
    }
    run("ip", &["link", "set", "lo", "up"]);
}

impl Daemon {
    /// Starts one of a user whose files are in this directory, and waits until it listens.
    pub fn start(dir: &Path) -> Self {
        Self::of(Scope::Session, dir)
    }

    /// Starts one of this scope.
    pub fn of(scope: Scope, dir: &Path) -> Self {
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
        let conf = "stdio_handler = \"file\"\n";
        match scope {
            Scope::Session => fs::write(config.join("libvirt/qemu.conf"), conf).unwrap(),
            // What it would need of a host that has more than a test should ask for. As root it may use /dev/kvm: where it
            // may not, libvirt 9.0 looks at QEMU anew whenever it is asked for anything.
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

    /// Starts it again, after it was killed.
    pub fn restart(&mut self) {
        self.child = spawn(self.scope, &self.dir, &self.dir.join("libvirtd.conf"));
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
        let scope = match self.scope {
            Scope::Session => "session",
            Scope::System => "system",
        };
        format!("qemu+unix:///{scope}?socket={}", self.socket().display())
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

    /// The names of its networks that are up.
    pub fn networks(&self) -> Vec<String> {
        let list = self.virsh(&["net-list", "--name"]);
        list.lines().filter(|line| !line.is_empty()).map(str::to_owned).collect()
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
