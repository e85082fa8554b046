//! The QEMU backend fulfils the contract: the suite of `rudder_core::testing`, with real processes and a real guest.
#![allow(clippy::print_stdout, clippy::unwrap_used, missing_docs)]

mod common;

use async_trait::async_trait;
use common::processes_below;
use rudder_core::{
    Error, ErrorKind, Result,
    backend::{Backend, LabId},
    plan::PlannedUrl,
    testing::{self, Adapter, BadImages, Echo, GuestImage, Options, Owners},
};
use rudder_local::store::Store;
use rudder_qemu::{Accelerator, QemuBackend};
use rustix::process::{Pid, Signal, kill_process};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
};

/// Set in a process that plays an owner: the directory of its store.
const STORE: &str = "RUDDER_SUITE_STORE";
/// The port of the guest's echo service.
const ECHO: u16 = 7;

#[derive(Debug)]
struct QemuAdapter {
    store: PathBuf,
    guest: PathBuf,
}

impl QemuAdapter {
    fn open(&self) -> Result<QemuBackend> {
        Ok(QemuBackend::builder(Store::open(&self.store)?).accelerator(Accelerator::Tcg).build())
    }

    /// Returns the QEMU process of a machine.
    fn process(&self, lab: &LabId, machine: &str) -> Option<i32> {
        let name = format!("{lab}/{machine},");
        processes_below(&self.store).into_iter().find(|pid| command_line(*pid).contains(&name))
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
impl Adapter for QemuAdapter {
    fn backend(&self) -> Arc<dyn Backend> {
        Arc::new(self.open().unwrap())
    }

    async fn another(&self) -> Result<Arc<dyn Backend>> {
        Ok(Arc::new(self.open()?))
    }

    async fn traces(&self) -> Result<Vec<String>> {
        let processes = processes_below(&self.store);
        let mut traces: Vec<String> =
            processes.into_iter().map(|pid| format!("process {pid}: {}", command_line(pid))).collect();
        for directory in ["labs", "modules"] {
            let entries = fs::read_dir(self.store.join(directory)).into_iter().flatten().flatten();
            traces.extend(entries.map(|entry| entry.path().display().to_string()));
        }
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
        command.args(["--exact", "the_qemu_backend_fulfils_the_contract", "--nocapture"]);
        command.env(STORE, &self.store);
        Owners::Process(command)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_qemu_backend_fulfils_the_contract() {
    if let Some(store) = std::env::var_os(STORE) {
        let adapter = QemuAdapter { store: store.into(), guest: tiny() };
        panic!("{:?}", testing::own(Arc::new(adapter)).await);
    }
    let dir = tempfile::Builder::new().prefix("rudder-test-").tempdir().unwrap();
    // A path with characters that are special to a shell, to QEMU's options and in a URL.
    let store = dir.path().join("a \"store\", isn't it = é 🦀 %20");
    fs::create_dir(&store).unwrap();
    let adapter = QemuAdapter { store, guest: tiny() };
    let mut options = Options::new();
    options.only = std::env::var("RUDDER_SUITE_ONLY").ok();
    let report = testing::run(Arc::new(adapter), &options).await;
    println!("{report}");
    report.assert_passed();
    report.assert_documented(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/backends.md"));
}
