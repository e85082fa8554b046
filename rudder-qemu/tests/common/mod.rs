//! Shared by tests with real QEMU processes: a store per test, and checks that nothing is left behind.
#![allow(clippy::unwrap_used, dead_code, missing_docs, unreachable_pub)]

#[path = "../../../rudder-local/tests/common/machines.rs"]
mod machines;
#[path = "../../../rudder-local/tests/common/sector.rs"]
pub mod sector;

pub use machines::*;
use rudder_core::backend::{Backend, Lab, LabSpec};
use rudder_local::store::Store;
use rudder_qemu::{Accelerator, QemuBackend};
use std::{fs, path::Path, sync::Arc};
use tokio::sync::{Semaphore, SemaphorePermit};

/// Limits the number of machines that run at once to the cores of a small host.
static MACHINES: Semaphore = Semaphore::const_new(2);

/// A store in a temporary directory, and a backend on it.
pub struct Fixture {
    pub backend: QemuBackend,
    pub dir: tempfile::TempDir,
    _permit: SemaphorePermit<'static>,
}

impl Fixture {
    pub async fn new() -> Self {
        Self::with(1, |builder| builder).await
    }

    pub async fn with(
        machines: u32,
        change: impl FnOnce(rudder_qemu::QemuBackendBuilder) -> rudder_qemu::QemuBackendBuilder,
    ) -> Self {
        let permit = MACHINES.acquire_many(machines).await.unwrap();
        let dir = tempfile::Builder::new().prefix("rudder-test-").tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let backend = change(QemuBackend::builder(store).accelerator(Accelerator::Tcg)).build();
        let report = backend.diagnose().await.unwrap();
        assert!(report.is_ready(), "this test needs QEMU: {:#?}", report.findings);
        Self { backend, dir, _permit: permit }
    }

    pub async fn lab(&self) -> Arc<dyn Lab> {
        self.backend.open_lab(&LabSpec::new("test", network())).await.unwrap()
    }

    /// Asserts that no process and no file of a lab exists any more.
    pub async fn assert_clean(self) {
        let labs = self.dir.path().join("labs");
        eventually("the labs are removed", || fs::read_dir(&labs).unwrap().count() == 0).await;
        eventually("the processes have ended", || processes_below(self.dir.path()).is_empty()).await;
    }
}

/// Returns the only QEMU process of a lab.
pub fn qemu_of(directory: &Path) -> i32 {
    let pids = processes_below(directory);
    assert_eq!(pids.len(), 1, "expected one QEMU");
    pids[0]
}
