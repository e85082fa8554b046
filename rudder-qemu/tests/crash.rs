//! What happens to machines when their owner dies: nothing is left, unless the lab was kept.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use common::{Fixture, blank_machine, eventually, network, processes_below};
use rudder_core::{
    ErrorKind,
    backend::{Backend, LabSpec, LabState, Retention},
    hardware::Bus,
};
use rudder_local::{helper::HelperProgram, store::Store};
use rudder_qemu::{Accelerator, QemuBackend};
use std::{
    io::{BufRead, BufReader},
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use tokio::io::AsyncReadExt as _;

/// Set in the process that plays the builder: the directory of its store.
const BUILDER: &str = "RUDDER_TEST_BUILDER";
/// How long the machines of a killed builder may run.
const LIMIT: Duration = Duration::from_secs(5);

/// Runs one machine until this process is killed.
async fn run_builder(store: &Path, retention: Retention) {
    let backend = QemuBackend::builder(Store::open(store).unwrap()).accelerator(Accelerator::Tcg).build();
    let mut spec = LabSpec::new("killed", network());
    spec.retention = retention;
    let lab = backend.open_lab(&spec).await.unwrap();
    let machine = lab.create_machine(&blank_machine(&*lab, "web", &[Bus::Virtio]).await).await.unwrap();
    machine.start().await.unwrap();
    std::fs::write(store.join("ready"), "").unwrap();
    machine.wait().await.unwrap();
}

/// Runs this test again as the builder, and kills the builder once its machine runs.
async fn kill_a_builder(test: &str, store: &Path) {
    let mut builder = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test])
        .env(BUILDER, store)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let output = builder.stdout.take().unwrap();
    let reader =
        std::thread::spawn(move || BufReader::new(output).lines().map_while(Result::ok).for_each(drop));
    eventually("the builder's machine runs", || store.join("ready").exists()).await;
    assert_eq!(processes_below(store).len(), 1);
    builder.kill().unwrap();
    builder.wait().unwrap();
    reader.join().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_kernel_ends_the_machines_of_a_killed_builder() {
    if let Some(store) = std::env::var_os(BUILDER) {
        return run_builder(Path::new(&store), Retention::EndWithOwner).await;
    }
    let fixture = Fixture::new().await;
    kill_a_builder("the_kernel_ends_the_machines_of_a_killed_builder", fixture.dir.path()).await;
    let killed = Instant::now();
    eventually("QEMU has ended", || processes_below(fixture.dir.path()).is_empty()).await;
    assert!(killed.elapsed() < LIMIT, "{:?}", killed.elapsed());
    let report = fixture.backend.reap().await.unwrap();
    assert!(report.removed.iter().any(|what| what.starts_with("lab killed-")), "{report:?}");
    assert_eq!(report.failed, Vec::<String>::new());
    fixture.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lab_that_may_be_kept_but_was_not_is_reaped_by_the_next_start() {
    if let Some(store) = std::env::var_os(BUILDER) {
        return run_builder(Path::new(&store), Retention::MayBeKept).await;
    }
    let fixture = Fixture::new().await;
    kill_a_builder("a_lab_that_may_be_kept_but_was_not_is_reaped_by_the_next_start", fixture.dir.path())
        .await;
    let lab = fixture.lab().await;
    eventually("QEMU has ended", || processes_below(fixture.dir.path()).is_empty()).await;
    lab.destroy().await.unwrap();
    drop(lab);
    fixture.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lab_of_a_living_owner_is_never_reaped() {
    let fixture = Fixture::new().await;
    let lab = fixture.lab().await;
    let machine = lab.create_machine(&blank_machine(&*lab, "web", &[Bus::Virtio]).await).await.unwrap();
    machine.start().await.unwrap();
    let other = QemuBackend::builder(Store::open(fixture.dir.path()).unwrap()).build();
    assert_eq!(other.reap().await.unwrap().removed, Vec::<String>::new());
    assert_eq!(other.remove_lab(lab.id()).await.unwrap_err().kind(), ErrorKind::Conflict);
    assert_eq!(other.labs().await.unwrap()[0].state, LabState::Owned);
    assert_eq!(processes_below(fixture.dir.path()).len(), 1);
    assert!(machine.screenshot().await.is_ok());
    lab.destroy().await.unwrap();
    drop((machine, lab));
    fixture.assert_clean().await;
}

/// The name of the test that plays the helper process.
const HELPER: &str = "the_helper_process";

#[test]
fn the_helper_process() {
    // Only if this process was started as a helper; in a normal test run this does nothing.
    if std::env::var_os(rudder_local::helper::VARIABLE).is_some() {
        rudder_local::helper::run();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kept_lab_outlives_its_owner_until_it_is_removed() {
    let helper = HelperProgram::new(std::env::current_exe().unwrap()).arguments(["--exact", HELPER]);
    let fixture = Fixture::with(1, |builder| builder.helper(helper)).await;
    let mut spec = LabSpec::new("kept", network());
    spec.retention = Retention::MayBeKept;
    let lab = fixture.backend.open_lab(&spec).await.unwrap();
    let machine = lab.create_machine(&blank_machine(&*lab, "web", &[Bus::Virtio]).await).await.unwrap();
    machine.start().await.unwrap();
    assert_eq!(lab.keep(None).await.unwrap(), Vec::<String>::new());
    let access = machine.access();
    assert!(access[0].contains("ProxyCommand="), "{access:?}");
    // Its owner also reaches it through the helper process: the guest has no address.
    let mut stream = machine.dial(22).await.unwrap();
    assert_eq!(stream.read(&mut [0]).await.unwrap(), 0);
    drop((machine, lab));
    assert_eq!(fixture.backend.reap().await.unwrap().removed, Vec::<String>::new());
    // QEMU and the network helper.
    assert_eq!(processes_below(fixture.dir.path()).len(), 2);
    let socket = fixture.dir.path().join("labs").join(spec.id.as_str()).join("m0.p22");
    assert_eq!(std::fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
    tokio::net::UnixStream::connect(socket).await.unwrap();
    assert_eq!(fixture.backend.labs().await.unwrap()[0].state, LabState::Kept { expires: None });
    fixture.backend.remove_lab(&spec.id).await.unwrap();
    assert_eq!(fixture.backend.remove_lab(&spec.id).await.unwrap_err().kind(), ErrorKind::NotFound);
    fixture.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_helper_a_kept_lab_reports_that_its_network_ended() {
    let fixture = Fixture::with(1, |builder| builder.helper(HelperProgram::new("/nonexistent"))).await;
    let mut spec = LabSpec::new("kept", network());
    spec.retention = Retention::MayBeKept;
    let lab = fixture.backend.open_lab(&spec).await.unwrap();
    let machine = lab.create_machine(&blank_machine(&*lab, "web", &[Bus::Virtio]).await).await.unwrap();
    machine.start().await.unwrap();
    let notices = lab.keep(None).await.unwrap();
    assert_eq!(notices, ["the network of the lab has ended: cannot start /nonexistent"]);
    drop((machine, lab));
    assert_eq!(processes_below(fixture.dir.path()).len(), 1);
    fixture.backend.remove_lab(&spec.id).await.unwrap();
    fixture.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lab_that_ends_with_its_owner_cannot_be_kept() {
    let fixture = Fixture::new().await;
    let lab = fixture.lab().await;
    assert_eq!(lab.keep(None).await.unwrap_err().kind(), ErrorKind::InvalidInput);
    drop(lab);
    fixture.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lab_that_stays_is_refused_without_a_helper_and_leaves_nothing_behind() {
    let fixture = Fixture::new().await;
    let mut spec = LabSpec::new("stays", network());
    spec.retention = Retention::UntilRemoved { expires: None };
    let error = fixture.backend.open_lab(&spec).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::HostMissing, "{error:?}");
    assert!(error.to_string().contains("rudder-helper"), "{error}");
    assert_eq!(fixture.backend.labs().await.unwrap(), []);
    fixture.assert_clean().await;
}
