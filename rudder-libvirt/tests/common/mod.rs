//! Shared by tests with a real libvirt: a daemon and a store per test, and checks that nothing is left behind.
#![allow(clippy::unwrap_used, dead_code, missing_docs, unreachable_pub)]

pub mod daemon;
#[path = "../../../rudder-local/tests/common/machines.rs"]
mod machines;
#[path = "../../../rudder-local/tests/common/sector.rs"]
pub mod sector;

pub use daemon::Daemon;
pub use machines::*;
use rudder_core::backend::{Backend, Lab, LabSpec};
use rudder_libvirt::{Accelerator, LibvirtBackend};
use rudder_local::store::Store;
use std::{fs, path::Path, sync::Arc};
use tokio::sync::{Semaphore, SemaphorePermit};

/// Limits the number of tests that run at once to the cores of a small host.
static FIXTURES: Semaphore = Semaphore::const_new(2);

/// A daemon, a store in a temporary directory, and a backend on both.
pub struct Fixture {
    pub backend: LibvirtBackend,
    pub daemon: Daemon,
    pub dir: tempfile::TempDir,
    pub permit: SemaphorePermit<'static>,
}

impl Fixture {
    pub async fn new() -> Self {
        let permit = FIXTURES.acquire().await.unwrap();
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

    /// Asserts that no domain, no process and no file of a lab exists any more.
    pub async fn assert_clean(self) {
        let labs = self.dir.path().join("store/labs");
        eventually("the domains are removed", || {
            self.daemon.domains().iter().all(|name| !name.starts_with("rudder."))
        })
        .await;
        eventually("the labs are removed", || fs::read_dir(&labs).unwrap().count() == 0).await;
        eventually("the processes have ended", || qemus_of(self.dir.path()).is_empty()).await;
    }
}

/// Returns another backend on the same store and daemon.
pub fn backend(dir: &Path, daemon: &Daemon) -> LibvirtBackend {
    let store = Store::open(dir.join("store")).unwrap();
    LibvirtBackend::builder(store).uri(daemon.uri()).accelerator(Accelerator::Tcg).build()
}

/// Returns the QEMU processes whose command line names this directory.
pub fn qemus_of(directory: &Path) -> Vec<i32> {
    let mark = directory.to_str().unwrap();
    let is_qemu = |pid: &i32| {
        let line = command_line(*pid);
        line.split(' ').next().is_some_and(|program| program.contains("qemu-system")) && line.contains(mark)
    };
    processes().filter(is_qemu).collect()
}
