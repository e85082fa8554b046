//! The QEMU backend fulfils the contract: the suite of `rudder_core::testing`, with real processes and a real guest.
#![allow(clippy::print_stdout, clippy::unwrap_used, missing_docs)]

mod common;
#[path = "../../rudder-local/tests/common/suite.rs"]
mod suite;

use async_trait::async_trait;
use common::{command_line, processes_below};
use rudder_core::{
    Result,
    backend::{Backend, LabId},
    testing::{self, Adapter, BadImages, GuestImage, Options, Owners},
};
use rudder_local::store::Store;
use rudder_qemu::{Accelerator, QemuBackend};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
};

/// Set in a process that plays an owner: the directory of its store.
const STORE: &str = "RUDDER_SUITE_STORE";

#[derive(Debug)]
struct QemuAdapter {
    store: PathBuf,
    guest: PathBuf,
}

impl QemuAdapter {
    fn open(&self) -> Result<QemuBackend> {
        let builder = QemuBackend::builder(Store::open(&self.store)?).accelerator(Accelerator::Tcg);
        Ok(builder.helper(suite::helper()).build())
    }

    /// Returns the QEMU process of a machine.
    fn process(&self, lab: &LabId, machine: &str) -> Option<i32> {
        let name = format!("{lab}/{machine},");
        processes_below(&self.store).into_iter().find(|pid| command_line(*pid).contains(&name))
    }
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
        Ok(suite::traces(&self.store, processes_below(&self.store)))
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
        command.args(["--exact", "the_qemu_backend_fulfils_the_contract", "--nocapture"]);
        command.env(STORE, &self.store);
        Owners::Process(command)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_qemu_backend_fulfils_the_contract() {
    if let Some(store) = std::env::var_os(STORE) {
        let adapter = QemuAdapter { store: store.into(), guest: suite::tiny() };
        panic!("{:?}", testing::own(Arc::new(adapter)).await);
    }
    let dir = tempfile::Builder::new().prefix("rudder-test-").tempdir().unwrap();
    // A path with characters that are special to a shell, to QEMU's options and in a URL.
    let store = dir.path().join("a \"store\", isn't it = é 🦀 %20");
    fs::create_dir(&store).unwrap();
    let adapter = QemuAdapter { store, guest: suite::tiny() };
    let mut options = Options::new();
    options.only = std::env::var("RUDDER_SUITE_ONLY").ok();
    let report = testing::run(Arc::new(adapter), &options).await;
    println!("{report}");
    report.assert_passed();
    report.assert_documented(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/backends.md"));
}
