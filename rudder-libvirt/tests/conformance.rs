//! The libvirt backend fulfils the contract: the suite of `rudder_core::testing`, with its own libvirtd and a real
//! guest, both with a session daemon and with a system daemon.
#![allow(clippy::print_stdout, clippy::unwrap_used, missing_docs)]

mod common;

use async_trait::async_trait;
use common::{
    daemon::{Daemon, Scope, in_namespaces},
    qemus_of,
};
use rudder_core::{
    Error, ErrorKind, Result,
    backend::{Backend, LabId},
    plan::PlannedUrl,
    testing::{self, Adapter, BadImages, Echo, GuestImage, Options, Owners},
};
use rudder_libvirt::{Accelerator, LibvirtBackend};
use rudder_local::store::Store;
use rustix::process::{Pid, Signal, kill_process};
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
};

/// Set in a process that plays an owner: the directory of its store, and the URI of its libvirt.
const STORE: &str = "RUDDER_SUITE_STORE";
const URI: &str = "RUDDER_SUITE_URI";
/// The port of the guest's echo service.
const ECHO: u16 = 7;

#[derive(Debug)]
struct LibvirtAdapter {
    /// The name of the test that uses the adapter.
    test: &'static str,
    store: PathBuf,
    uri: String,
    guest: PathBuf,
}

impl LibvirtAdapter {
    fn open(&self) -> Result<LibvirtBackend> {
        let store = Store::open(&self.store)?;
        Ok(LibvirtBackend::builder(store).uri(&self.uri).accelerator(Accelerator::Tcg).build())
    }

    /// Returns the QEMU process of a machine.
    fn process(&self, lab: &LabId, machine: &str) -> Option<i32> {
        let name = format!("guest=rudder.{lab}.{machine},");
        qemus_of(&self.store).into_iter().find(|pid| command_line(*pid).contains(&name))
    }

    /// Returns the lines of a list that virsh prints.
    fn list(&self, args: &[&str]) -> Vec<String> {
        let output = Command::new("virsh").args(["-c", &self.uri]).args(args).stdin(Stdio::null()).output();
        let output = output.unwrap();
        assert!(output.status.success(), "virsh {args:?}: {}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8(output.stdout).unwrap();
        text.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned).collect()
    }
}

/// Returns the path of the tiny guest, made by `make guests`.
fn tiny() -> PathBuf {
    let made = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/guests");
    let path = std::env::var_os("RUDDER_GUESTS").map_or_else(made, PathBuf::from).join("tiny.qcow2");
    assert!(path.is_file(), "{} is missing: run `make guests`", path.display());
    path.canonicalize().unwrap()
}

fn command_line(pid: i32) -> String {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&line).replace('\0', " ")
}

#[async_trait]
impl Adapter for LibvirtAdapter {
    fn backend(&self) -> Arc<dyn Backend> {
        Arc::new(self.open().unwrap())
    }

    async fn another(&self) -> Result<Arc<dyn Backend>> {
        Ok(Arc::new(self.open()?))
    }

    async fn traces(&self) -> Result<Vec<String>> {
        let mut traces: Vec<String> = qemus_of(&self.store)
            .into_iter()
            .map(|pid| format!("process {pid}: {}", command_line(pid)))
            .collect();
        for directory in ["labs", "modules"] {
            let entries = fs::read_dir(self.store.join(directory)).into_iter().flatten().flatten();
            traces.extend(entries.map(|entry| entry.path().display().to_string()));
        }
        let domains = self.list(&["list", "--all", "--name"]);
        // The domains of a module exist for as long as the module.
        let of_module = |name: &str| {
            name.split_once('.').is_some_and(|(module, _)| self.store.join("modules").join(module).is_dir())
        };
        let domains = domains.into_iter().filter(|name| !of_module(name));
        traces.extend(domains.map(|name| format!("domain {name}")));
        let networks = self.list(&["net-list", "--all", "--name"]);
        traces.extend(networks.into_iter().map(|name| format!("network {name}")));
        Ok(traces)
    }

    async fn is_running(&self, lab: &LabId, machine: &str) -> Result<bool> {
        Ok(self.process(lab, machine).is_some())
    }

    async fn kill(&self, lab: &LabId, machine: &str) -> Result<()> {
        let pid = self.process(lab, machine).and_then(Pid::from_raw).ok_or_else(|| {
            Error::new(ErrorKind::NotFound, format!("expected a process of {lab}/{machine}, but found none"))
        })?;
        kill_process(pid, Signal::KILL).map_err(|error| Error::io("kill QEMU", error.into()))
    }

    fn guest(&self) -> Option<GuestImage> {
        let url = url::Url::from_file_path(&self.guest).ok()?;
        let mut guest = GuestImage::new(PlannedUrl::new(url));
        guest.echo = Some(Echo::new(ECHO, Some(format!("nc -ll -p {ECHO} -e cat >/dev/null 2>&1 &"))));
        let command = [
            "<waitText 'login:' 3m>tester<enter>",
            "<waitText 'assword:' 1m>tester<enter>",
            "<waitText '$' 1m>echo typed on the screen >/tmp/typed<enter>",
        ];
        guest.boot_command = Some(command.map(str::to_owned).to_vec());
        // The guest is emulated.
        guest.large = 4 << 20;
        guest.serial_says = Some("login:".to_owned());
        Some(guest)
    }

    fn bad_images(&self) -> Option<BadImages> {
        let broken = self.store.join("broken.qcow2");
        // The magic number of qcow2 (docs/interop/qcow2.txt), followed by nothing valid.
        fs::write(&broken, [b"QFI\xfb".as_slice(), &[0xff; 4096]].concat()).unwrap();
        let url = |path: &Path| url::Url::from_file_path(path).unwrap();
        Some(BadImages::new(url(&self.store.join("missing.qcow2")), url(&broken)))
    }

    fn owners(&self) -> Owners {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", self.test, "--nocapture"]);
        command.env(STORE, &self.store).env(URI, &self.uri);
        Owners::Process(command)
    }
}

/// Plays an owner, if this process was started for that.
async fn owner(test: &'static str) {
    if let (Some(store), Ok(uri)) = (std::env::var_os(STORE), std::env::var(URI)) {
        let adapter = LibvirtAdapter { test, store: store.into(), uri, guest: tiny() };
        panic!("{:?}", testing::own(Arc::new(adapter)).await);
    }
}

async fn keeps_the_contract(test: &'static str, scope: Scope, only: Option<&str>) {
    let dir = tempfile::Builder::new().prefix("rudder-virt-").tempdir().unwrap();
    let daemon = Daemon::of(scope, &dir.path().join("libvirt"));
    let store = dir.path().join("store");
    fs::create_dir(&store).unwrap();
    let adapter = LibvirtAdapter { test, store, uri: daemon.uri(), guest: tiny() };
    let mut options = Options::new();
    options.only = std::env::var("RUDDER_SUITE_ONLY").ok().or_else(|| only.map(str::to_owned));
    let report = testing::run(Arc::new(adapter), &options).await;
    println!("{report}");
    report.assert_passed();
    report.assert_documented(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/backends.md"));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_libvirt_backend_fulfils_the_contract() {
    const TEST: &str = "the_libvirt_backend_fulfils_the_contract";
    owner(TEST).await;
    keeps_the_contract(TEST, Scope::Session, None).await;
}

/// Covers what is specific to the system's libvirt: networks, how guests are reached, and what owners leave behind.
#[tokio::test(flavor = "multi_thread")]
async fn the_libvirt_backend_fulfils_the_contract_on_a_system_daemon() {
    const TEST: &str = "the_libvirt_backend_fulfils_the_contract_on_a_system_daemon";
    owner(TEST).await;
    if in_namespaces(TEST) {
        keeps_the_contract(TEST, Scope::System, Some("labs: |owners: |streams: |served: ")).await;
    }
}
