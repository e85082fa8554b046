//! The conformance suite on the memory backend, and on backends with one fault each: it finds no fault in the former,
//! and the planted fault in each of the latter.
#![allow(clippy::print_stdout, missing_docs)]

mod broken;
use broken::{BrokenAdapter, Defect};
use futures::{StreamExt as _, stream};
use rudder_core::testing::{MemoryAdapter, Options, Report, run};
use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

/// Returns the path of the page with the table of results.
fn page() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/backends.md")
}

#[tokio::test(flavor = "multi_thread")]
async fn the_memory_backend_satisfies_the_contract() {
    let report = run(Arc::new(MemoryAdapter::new()), &Options::new()).await;
    println!("{report}");
    report.assert_passed();
    report.assert_documented(&page());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backend_without_paths_sizes_and_digests_satisfies_the_contract() {
    let report = run(Arc::new(MemoryAdapter::remote()), &Options::new()).await;
    println!("{report}");
    report.assert_passed();
    report.assert_documented(&page());
}

/// Each fault, and the checks that must find it.
#[rustfmt::skip]
const FOUND_BY: &[(Defect, &[&str])] = &[
    (Defect::ReportsDeathLate, &["a death is reported in time"]),
    (Defect::ReportsPowerOffLate, &["a power off is reported in time"]),
    (Defect::NotifiesOneWaiter, &["any number of callers can wait"]),
    (Defect::SwapsExits, &["start wait and stop work in every order", "a power off is reported in time"]),
    (Defect::SwapsDeaths, &["a death is reported in time"]),
    (Defect::KillsAtOnce, &["a power off is reported in time", "what a guest wrote is captured and inherited"]),
    (Defect::NeverKills, &["a graceful stop ends after its limit"]),
    (Defect::StopsUnstartedMachines, &["start wait and stop work in every order"]),
    (Defect::StartsTwice, &["start wait and stop work in every order"]),
    (Defect::IgnoresHardware, &["processors and memory are as requested"]),
    (Defect::CopiesHardware, &["processors and memory are as requested"]),
    (Defect::ReordersNics, &["nics are in the order of their slots"]),
    (Defect::InventsAddresses, &["nics of every model are detected"]),
    (Defect::MixesSeeds, &["machines created concurrently are separate"]),
    (Defect::MixesLabs, &["labs with the same names are separate"]),
    (Defect::MixesSerials, &["each machine has its own consoles"]),
    (Defect::MixesDisplays, &["each machine has its own consoles"]),
    (Defect::PromisesCompression, &["a compressed screen is the same"]),
    (Defect::LosesSerialOutputAtTheEnd, &["a power off is reported in time"]),
    (Defect::KeepsOldSerialOutput, &["a power off is reported in time"]),
    (Defect::KeepsLittleSerialOutput, &["a stalled reader blocks no one"]),
    (Defect::HasOneReader, &["several readers share the serial console"]),
    (Defect::ClosesBothHalves, &["one half of a connection can be closed"]),
    (Defect::LosesHalfClose, &["one half of a connection can be closed"]),
    (Defect::FlipsABit, &["large transfers arrive complete"]),
    (Defect::DialsTheHost, &["dialling does not reach ports of the host"]),
    (Defect::ReportsRefusedAsUnknown, &["a closed port refuses connections"]),
    (Defect::ReportsOffAsRetryable, &["operations in the wrong state are refused"]),
    (Defect::ServesEveryProcess, &["files are served only to machines of the lab while it exists"]),
    (Defect::ServesWithoutItsLab, &["files are served only to machines of the lab while it exists"]),
    (Defect::SkipsDigestCheck, &["an expected digest is verified"]),
    (Defect::SharesVolumes, &["an image can be imported concurrently"]),
    (Defect::IgnoresSizes, &["a disk has the requested size"]),
    (Defect::ImportsTheFirstDisk, &["a module in use is not removed", "what a guest wrote is captured and inherited"]),
    (Defect::RewritesWhatOthersRead, &["a fetched file is not changed"]),
    (Defect::CollectsWhatIsRead, &["a fetched file is not changed"]),
    (Defect::ProgressGoesBack, &["an image can be imported concurrently", "a captured disk is described"]),
    (Defect::ForgetsLastProgress, &["an image can be imported concurrently", "a captured disk is described"]),
    (Defect::ProgressExceedsItsTotal, &["an image can be imported concurrently", "a captured disk is described"]),
    (Defect::CapturesOnce, &["what a guest wrote is captured and inherited"]),
    (Defect::CapturesTheFirstDisk, &["what a guest wrote is captured and inherited"]),
    (Defect::PublishesParts, &["what a guest wrote is captured and inherited"]),
    (Defect::ReplacesTooEarly, &["a module is kept if its successor cannot be published"]),
    (Defect::LeavesFilesOfModules, &["a module is published listed and removed"]),
    (Defect::ShufflesModules, &["a module replaces another"]),
    (Defect::DropsState, &["a machine with uefi keeps its variables"]),
    (Defect::ForgetsInheritedState, &["a machine with uefi keeps its variables"]),
    (Defect::DestroysOnce, &["a lab is opened and destroyed twice", "a lab can be destroyed in every state"]),
    (Defect::ForgetsAVolume, &["a lab can be destroyed in every state"]),
    (Defect::LeaksWhenDropped, &["opening a lab may be dropped"]),
    (Defect::ReusesIds, &["an id is in use while its lab is open", "a kept lab stays until it is removed"]),
    (Defect::HidesVersions, &["a lab is opened and destroyed twice"]),
    (Defect::KeepsAnyLab, &["a kept lab stays until it is removed"]),
    (Defect::ReapsTheLiving, &["a living owner is never reaped"]),
    (Defect::ReapsTheKept, &["a kept lab stays until it is removed", "an expired lab is reaped and no other"]),
    (Defect::ReapsBeforeExpiry, &["an expired lab is reaped and no other"]),
    (Defect::NeverReapsExpiredLabs, &["an expired lab is reaped and no other"]),
    (Defect::ListsNoOwnedLabs, &["a living owner is never reaped", "a kept lab stays until it is removed"]),
    (Defect::ListsNoKeptLabs, &["a lab that stays is attached by another process", "a kept lab stays until it is removed"]),
    (Defect::ForgetsExpiry, &["an expired lab is reaped and no other"]),
    (Defect::AttachesToOwnedLabs, &["a living owner is never reaped"]),
    (Defect::EndsWhatItAttachesTo, &["a lab that stays is attached by another process", "a guest is reached in an attached lab"]),
    (Defect::EndsWhatItDetachesFrom, &["a lab that stays is attached by another process"]),
    (Defect::HidesMachinesOfAttachedLabs, &["a lab that stays is attached by another process", "a guest is reached in an attached lab"]),
    (Defect::LosesFilesOfLabs, &["files are stored with a lab", "a guest is reached in an attached lab"]),
    (Defect::CutsFilesOfLabs, &["files are stored with a lab"]),
    (Defect::CleansNames, &["unusual names work or are refused"]),
    (Defect::CutsNames, &["long names remain distinct"]),
    (Defect::CutsNamesOfModules, &["long names remain distinct"]),
];

fn options() -> Options {
    let mut options = Options::new().reaction(Duration::from_secs(5));
    options.settle = Duration::from_secs(2);
    options.limit = Duration::from_secs(60);
    options.patience = Duration::from_secs(5);
    options
}

async fn report(defect: Defect) -> Report {
    run(Arc::new(BrokenAdapter::new(defect)), &options()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrapped_backend_without_defects_satisfies_the_contract() {
    report(Defect::Nothing).await.assert_passed();
}

#[tokio::test(flavor = "multi_thread")]
async fn every_defect_is_found_by_the_expected_test() {
    let reports = stream::iter(FOUND_BY).map(|(defect, checks)| async move {
        let adapter = Arc::new(BrokenAdapter::new(*defect));
        let began = Instant::now();
        let report = run(adapter, &options().only(checks.join("|"))).await;
        (defect, checks, report, began.elapsed())
    });
    let mut reports = reports.buffer_unordered(8);
    let mut missed = Vec::new();
    while let Some((defect, checks, report, took)) = reports.next().await {
        let failed: Vec<&str> = report.failed().collect();
        println!("{defect:?}: found by {failed:?} in {took:?}");
        if !checks.iter().all(|check| failed.contains(check)) {
            missed.push(format!("{defect:?}: expected {checks:?} to fail, but found {failed:?}\n{report}"));
        }
    }
    assert!(missed.is_empty(), "{}", missed.join("\n"));
}

/// A fault that keeps a connection open is found as soon as the guest shows that it had enough time, and by one test
/// only.
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_half_close_is_found_by_one_test() {
    let report =
        run(Arc::new(BrokenAdapter::new(Defect::LosesHalfClose)), &options().only("streams: ")).await;
    assert_eq!(report.failed().collect::<Vec<_>>(), ["one half of a connection can be closed"], "{report}");
    let problem = report.problems().concat();
    assert!(problem.contains("stays open while the guest answered"), "{problem}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_capability_that_no_test_proves_is_a_failure() {
    let report = report(Defect::ClaimsTooMuch).await;
    assert_eq!(report.failed().count(), 0, "{report}");
    assert_eq!(report.problems(), ["source-pvc is claimed, and no test proved it"]);
}

#[tokio::test]
async fn a_required_backend_that_is_not_ready_is_a_failure() {
    let report = report(Defect::IsNotReady).await;
    assert!(report.tests.is_empty());
    assert_eq!(
        report.problems(),
        ["expected memory to be ready on this host, but it is not: memory: it is broken"]
    );
}
