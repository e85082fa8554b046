//! The libvirt backend fulfils the contract: the suite of `rudder_core::testing`, with its own libvirtd and a real
//! guest, both with a session daemon and with a system daemon.
#![allow(clippy::print_stdout, clippy::unwrap_used, missing_docs)]

mod common;
#[path = "../../rudder-local/tests/common/suite.rs"]
mod suite;

use async_trait::async_trait;
use common::{
    command_line,
    daemon::{Daemon, Scope, in_namespaces},
    qemus_of,
};
use rudder_core::{
    Result,
    backend::{Backend, LabId},
    testing::{self, Adapter, BadImages, GuestImage, Options, Owners},
};
use rudder_libvirt::{Accelerator, LibvirtBackend};
use rudder_local::store::Store;
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
};

/// Set in a process that plays an owner: the directory of its store, and the URI of its libvirt.
const STORE: &str = "RUDDER_SUITE_STORE";
const URI: &str = "RUDDER_SUITE_URI";

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
        let builder = LibvirtBackend::builder(store).uri(&self.uri).accelerator(Accelerator::Tcg);
        Ok(builder.helper(suite::helper()).build())
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

#[async_trait]
impl Adapter for LibvirtAdapter {
    fn backend(&self) -> Arc<dyn Backend> {
        Arc::new(self.open().unwrap())
    }

    async fn another(&self) -> Result<Arc<dyn Backend>> {
        Ok(Arc::new(self.open()?))
    }

    async fn traces(&self) -> Result<Vec<String>> {
        let mut traces = suite::traces(&self.store, qemus_of(&self.store));
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
        suite::kill(self.process(lab, machine), machine)
    }

    fn guest(&self) -> Option<GuestImage> {
        Some(suite::tiny_guest(&self.guest))
    }

    fn bad_images(&self) -> Option<BadImages> {
        Some(suite::bad_images(&self.store))
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
        let adapter = LibvirtAdapter { test, store: store.into(), uri, guest: suite::tiny() };
        panic!("{:?}", testing::own(Arc::new(adapter)).await);
    }
}

async fn keeps_the_contract(test: &'static str, scope: Scope, only: Option<&str>) {
    let dir = tempfile::Builder::new().prefix("rudder-virt-").tempdir().unwrap();
    let daemon = Daemon::of(scope, &dir.path().join("libvirt"));
    let store = dir.path().join("store");
    fs::create_dir(&store).unwrap();
    let adapter = LibvirtAdapter { test, store, uri: daemon.uri(), guest: suite::tiny() };
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
        keeps_the_contract(
            TEST,
            Scope::System,
            Some("labs: |owners: |kept: a lab that stays|streams: |served: "),
        )
        .await;
    }
}
