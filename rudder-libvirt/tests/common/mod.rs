//! What tests with a real libvirt share: a daemon of their own, a store of their own, and the proof that nothing is left.
//!
//! The daemon is one of a user's session, with all of its files below a temporary directory. For root, who would get the
//! system's daemon, it runs in a user namespace in which it is not root.
#![allow(clippy::unwrap_used, dead_code, missing_docs, unreachable_pub)]

use rudder_core::{
    backend::{Backend, ImportRequest, Lab, LabSpec, MachineDisk, MachineSpec, Progress},
    plan::{Bus, NicModel, PlannedNetwork, PlannedNic, PlannedSource, PlannedSubnet, PlannedUrl, PlannedVpc},
    store::Store,
};
use rudder_libvirt::{Accelerator, LibvirtBackend};
use std::{
    fs,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::{Semaphore, SemaphorePermit};

/// As many tests at a time as a small host has cores.
static PLACES: Semaphore = Semaphore::const_new(2);

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
        let (sockets, run, config) = (make("sockets"), make("run"), make("config"));
        make("config/libvirt");
        // Without a second daemon (virtlogd) for logs, which would outlive this one.
        fs::write(config.join("libvirt/qemu.conf"), "stdio_handler = \"file\"\n").unwrap();
        let settings = dir.join("libvirtd.conf");
        let text = format!(
            "unix_sock_dir = \"{}\"\nauth_unix_rw = \"none\"\nlog_outputs = \"2:file:{}\"\n",
            sockets.display(),
            dir.join("libvirtd.log").display()
        );
        fs::write(&settings, text).unwrap();
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]);
        if rustix::process::geteuid().is_root() {
            command.args(["unshare", "--user", "--map-user=1000", "--map-group=1000", "--"]);
        }
        let child = command
            .arg("libvirtd")
            .arg("--config")
            .arg(&settings)
            .arg("--pid-file")
            .arg(dir.join("libvirtd.pid"))
            .env("HOME", dir)
            .env("XDG_RUNTIME_DIR", &run)
            .env("XDG_CONFIG_HOME", &config)
            .env("XDG_CACHE_HOME", make("cache"))
            .env("XDG_DATA_HOME", make("data"))
            .env("PATH", format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(dir.join("libvirtd.err")).unwrap())
            .spawn()
            .unwrap();
        let mut daemon = Self { dir: dir.to_owned(), child };
        let deadline = Instant::now() + Duration::from_secs(60);
        while UnixStream::connect(daemon.socket()).is_err() {
            let ended = daemon.child.try_wait().unwrap();
            let said = fs::read_to_string(dir.join("libvirtd.err")).unwrap();
            assert!(ended.is_none(), "libvirtd ended: {ended:?} {said}");
            assert!(Instant::now() < deadline, "libvirtd does not listen: {said}");
            std::thread::sleep(Duration::from_millis(20));
        }
        daemon
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

    /// What virsh says.
    pub fn virsh(&self, args: &[&str]) -> String {
        let output = Command::new("virsh").arg("-c").arg(self.uri()).args(args).output().unwrap();
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

/// A daemon, a store in a temporary directory, and a backend on both.
pub struct Place {
    pub backend: LibvirtBackend,
    pub daemon: Daemon,
    pub dir: tempfile::TempDir,
    pub permit: SemaphorePermit<'static>,
}

impl Place {
    pub async fn new() -> Self {
        let permit = PLACES.acquire().await.unwrap();
        let dir = tempfile::Builder::new().prefix("rudder-virt-").tempdir().unwrap();
        let daemon = Daemon::start(&dir.path().join("libvirt"));
        let backend = backend(dir.path(), &daemon);
        let report = backend.diagnose().await.unwrap();
        assert!(report.is_ready(), "this test needs libvirt and QEMU: {:#?}", report.findings);
        Self { backend, daemon, dir, permit }
    }

    pub async fn lab(&self) -> Arc<dyn Lab> {
        self.backend.open_lab(&LabSpec::new("test", network())).await.unwrap()
    }

    /// Proves that no domain, no process and no file of a lab is there any more.
    pub async fn assert_clean(self) {
        let labs = self.dir.path().join("store/labs");
        eventually("the domains are gone", || {
            self.daemon.domains().iter().all(|name| !name.starts_with("rudder."))
        })
        .await;
        eventually("the labs are gone", || fs::read_dir(&labs).unwrap().count() == 0).await;
        eventually("the processes are gone", || qemus_of(self.dir.path()).is_empty()).await;
    }
}

/// Another backend on the same store and daemon.
pub fn backend(dir: &Path, daemon: &Daemon) -> LibvirtBackend {
    let store = Store::open(dir.join("store")).unwrap();
    LibvirtBackend::builder(store).uri(daemon.uri()).accelerator(Accelerator::Tcg).build()
}

/// Waits for something that comes about by itself.
pub async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(tokio::time::Instant::now() < deadline, "not within 30 s: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// The QEMUs whose command line names this directory.
pub fn qemus_of(directory: &Path) -> Vec<i32> {
    let mark = directory.to_str().unwrap();
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|pid| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line);
        line.split('\0').next().is_some_and(|program| program.contains("qemu-system")) && line.contains(mark)
    })
    .collect()
}

/// The network of a manifest that declares none.
pub fn network() -> PlannedNetwork {
    PlannedNetwork {
        declared: false,
        vpcs: vec![PlannedVpc { name: "default".to_owned(), internet: true }],
        subnets: vec![PlannedSubnet {
            name: "default".to_owned(),
            vpc: "default".to_owned(),
            cidr: "10.0.2.0/24".parse().unwrap(),
            dhcp: true,
            dns: Vec::new(),
            unmanaged: false,
        }],
    }
}

/// A card in that network.
pub fn nic(slot: u8, model: NicModel) -> PlannedNic {
    PlannedNic {
        name: format!("nic{slot}"),
        subnet: "default".to_owned(),
        slot,
        slot_pinned: false,
        ip: None,
        mac: format!("52:54:00:12:34:{slot:02x}").parse().unwrap(),
        model,
    }
}

/// A small machine with blank disks: it stays at the firmware's "No bootable device".
pub async fn blank_machine(lab: &dyn Lab, name: &str, buses: &[Bus]) -> MachineSpec {
    let mut spec = MachineSpec::new(name, 1, 64 << 20);
    for (index, bus) in buses.iter().enumerate() {
        let disk = format!("disk{index}");
        let request = ImportRequest::new(name, &disk, PlannedSource::Blank, Some(64 << 20));
        let volume = lab.import(&request, &Progress::none()).await.unwrap().volume;
        spec.disks.push(MachineDisk { name: disk, bus: *bus, volume });
    }
    spec.nics.push(nic(1, NicModel::E1000));
    spec.ports = vec![22];
    spec
}

/// A machine that boots this disk, of this size, on this bus.
pub async fn sector_machine(lab: &dyn Lab, disk: &[u8], bus: Bus, size: u64) -> MachineSpec {
    let file = tempfile::Builder::new().suffix(".img").tempfile().unwrap();
    fs::write(file.path(), disk).unwrap();
    let url = url::Url::from_file_path(file.path()).unwrap();
    let source = PlannedSource::Url(PlannedUrl { url, sha256: None });
    let request = ImportRequest::new("guest", "root", source, Some(size));
    let volume = lab.import(&request, &Progress::none()).await.unwrap().volume;
    let mut spec = MachineSpec::new("guest", 1, 64 << 20);
    spec.disks.push(MachineDisk { name: "root".to_owned(), bus, volume });
    spec
}
