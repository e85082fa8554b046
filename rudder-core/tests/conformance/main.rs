//! The conformance suite on the memory backend, and on backends with one fault each: it finds no fault in the former,
//! and the planted fault in each of the latter.
#![allow(clippy::print_stdout, missing_docs)]

mod broken;
use broken::{BrokenAdapter, Wrong};
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
async fn the_memory_backend_keeps_the_contract() {
    let report = run(Arc::new(MemoryAdapter::new()), &Options::new()).await;
    println!("{report}");
    report.assert_passed();
    report.assert_documented(&page());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backend_without_paths_sizes_and_digests_keeps_the_contract() {
    let report = run(Arc::new(MemoryAdapter::remote()), &Options::new()).await;
    println!("{report}");
    report.assert_passed();
    report.assert_documented(&page());
}

/// Each fault, and the checks that must find it.
#[rustfmt::skip]
const FOUND_BY: &[(Wrong, &[&str])] = &[
    (Wrong::SeesDeathLate, &["death is seen in time"]),
    (Wrong::TellsPowerOffLate, &["a power off is told in time"]),
    (Wrong::TellsOneWaiter, &["any number may wait"]),
    (Wrong::SwapsExits, &["start wait and stop come in every order", "a power off is told in time"]),
    (Wrong::SwapsDeaths, &["death is seen in time"]),
    (Wrong::KillsAtOnce, &["a power off is told in time", "what a guest wrote is captured and inherited"]),
    (Wrong::NeverKills, &["a graceful stop ends after its limit"]),
    (Wrong::StopsWhatNeverRan, &["start wait and stop come in every order"]),
    (Wrong::StartsTwice, &["start wait and stop come in every order"]),
    (Wrong::IgnoresHardware, &["processors and memory are as asked for"]),
    (Wrong::CopiesHardware, &["processors and memory are as asked for"]),
    (Wrong::ReordersCards, &["cards sit in the order of their slots"]),
    (Wrong::InventsAddresses, &["cards of every model are seen"]),
    (Wrong::MixesSeeds, &["machines that are created at once do not meet"]),
    (Wrong::MixesLabsUp, &["labs with the same names do not meet"]),
    (Wrong::MixesSerials, &["consoles are those of their own machine"]),
    (Wrong::MixesDisplays, &["consoles are those of their own machine"]),
    (Wrong::PromisesCompression, &["a compressed screen is the same"]),
    (Wrong::ForgetsLastWords, &["a power off is told in time"]),
    (Wrong::KeepsOldWords, &["a power off is told in time"]),
    (Wrong::KeepsFewWords, &["a reader that does not read stops nobody"]),
    (Wrong::HasOneReader, &["several read the serial console"]),
    (Wrong::ClosesBothHalves, &["half of a connection may be closed"]),
    (Wrong::LosesHalfClose, &["half of a connection may be closed"]),
    (Wrong::FlipsABit, &["large transfers arrive whole"]),
    (Wrong::DialsTheHost, &["a port of the host is not the guests"]),
    (Wrong::CannotSayRefused, &["a closed port refuses"]),
    (Wrong::CannotSayOff, &["what a machine cannot do now is refused"]),
    (Wrong::ServesAnybody, &["what is served is for machines of its lab and ends with it"]),
    (Wrong::ServesWithoutItsLab, &["what is served is for machines of its lab and ends with it"]),
    (Wrong::BelievesAnyDigest, &["a promised digest is verified"]),
    (Wrong::SharesVolumes, &["an image is imported by several at once"]),
    (Wrong::IgnoresSizes, &["a disk is as large as asked for"]),
    (Wrong::ImportsTheFirstDisk, &["a module in use stays", "what a guest wrote is captured and inherited"]),
    (Wrong::RewritesWhatOthersRead, &["a fetched file stays as it is"]),
    (Wrong::CollectsWhatIsRead, &["a fetched file stays as it is"]),
    (Wrong::ProgressGoesBack, &["an image is imported by several at once", "a capture says what it is"]),
    (Wrong::ForgetsLastProgress, &["an image is imported by several at once", "a capture says what it is"]),
    (Wrong::ProgressExceedsItsTotal, &["an image is imported by several at once", "a capture says what it is"]),
    (Wrong::CapturesOnce, &["what a guest wrote is captured and inherited"]),
    (Wrong::CapturesTheFirstDisk, &["what a guest wrote is captured and inherited"]),
    (Wrong::PublishesParts, &["what a guest wrote is captured and inherited"]),
    (Wrong::ReplacesTooEarly, &["a module stays when its successor cannot be published"]),
    (Wrong::LeavesFilesOfModules, &["a module is published seen and removed"]),
    (Wrong::ShufflesModules, &["a module takes the place of another"]),
    (Wrong::DropsState, &["a machine with uefi starts and its variables are kept"]),
    (Wrong::ForgetsInheritedState, &["a machine with uefi starts and its variables are kept"]),
    (Wrong::DestroysOnce, &["a lab is opened and destroyed twice", "a lab is destroyed from every state"]),
    (Wrong::ForgetsAVolume, &["a lab is destroyed from every state"]),
    (Wrong::LeaksWhenDropped, &["opening a lab may be dropped"]),
    (Wrong::ReusesIds, &["an id is taken while its lab is open", "a kept lab stays until it is removed"]),
    (Wrong::HidesVersions, &["a lab is opened and destroyed twice"]),
    (Wrong::KeepsAnyLab, &["a kept lab stays until it is removed"]),
    (Wrong::ReapsTheLiving, &["a living owner is never reaped"]),
    (Wrong::ReapsTheKept, &["a kept lab stays until it is removed", "an expired lab is reaped and no other"]),
    (Wrong::ReapsBeforeExpiry, &["an expired lab is reaped and no other"]),
    (Wrong::NeverReapsExpiredLabs, &["an expired lab is reaped and no other"]),
    (Wrong::ListsNoOwnedLabs, &["a living owner is never reaped", "a kept lab stays until it is removed"]),
    (Wrong::ListsNoKeptLabs, &["a lab that stays is attached by another process", "a kept lab stays until it is removed"]),
    (Wrong::ForgetsExpiry, &["an expired lab is reaped and no other"]),
    (Wrong::AttachesToOwnedLabs, &["a living owner is never reaped"]),
    (Wrong::EndsWhatItAttachesTo, &["a lab that stays is attached by another process", "a guest is reached in an attached lab"]),
    (Wrong::EndsWhatItDetachesFrom, &["a lab that stays is attached by another process"]),
    (Wrong::HidesMachinesOfAttachedLabs, &["a lab that stays is attached by another process", "a guest is reached in an attached lab"]),
    (Wrong::LosesFilesOfLabs, &["files are stored with a lab", "a guest is reached in an attached lab"]),
    (Wrong::CutsFilesOfLabs, &["files are stored with a lab"]),
    (Wrong::CleansNames, &["odd names work or are refused"]),
    (Wrong::CutsNames, &["long names stay apart"]),
    (Wrong::CutsNamesOfModules, &["long names stay apart"]),
];

fn options() -> Options {
    let mut options = Options::new().reaction(Duration::from_secs(5));
    options.settle = Duration::from_secs(2);
    options.limit = Duration::from_secs(60);
    options.patience = Duration::from_secs(5);
    options
}

async fn report(wrong: Wrong) -> Report {
    run(Arc::new(BrokenAdapter::new(wrong)), &options()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_wrapper_of_the_broken_backends_keeps_the_contract() {
    report(Wrong::Nothing).await.assert_passed();
}

#[tokio::test(flavor = "multi_thread")]
async fn every_way_of_being_wrong_is_found_by_the_right_check() {
    let reports = stream::iter(FOUND_BY).map(|(wrong, checks)| async move {
        let adapter = Arc::new(BrokenAdapter::new(*wrong));
        let began = Instant::now();
        let report = run(adapter, &options().only(checks.join("|"))).await;
        (wrong, checks, report, began.elapsed())
    });
    let mut reports = reports.buffer_unordered(8);
    let mut missed = Vec::new();
    while let Some((wrong, checks, report, took)) = reports.next().await {
        let failed: Vec<&str> = report.failed().collect();
        println!("{wrong:?}: found by {failed:?} in {took:?}");
        if !checks.iter().all(|check| failed.contains(check)) {
            missed.push(format!("{wrong:?}: expected {checks:?} to fail, but found {failed:?}\n{report}"));
        }
    }
    assert!(missed.is_empty(), "{}", missed.join("\n"));
}

/// A fault that keeps a connection open is found as soon as the guest shows that it had enough time, and by one test
/// only.
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_half_close_is_found_by_one_test() {
    let report = run(Arc::new(BrokenAdapter::new(Wrong::LosesHalfClose)), &options().only("streams: ")).await;
    assert_eq!(report.failed().collect::<Vec<_>>(), ["half of a connection may be closed"], "{report}");
    let problem = report.problems().concat();
    assert!(problem.contains("stands while the guest answered"), "{problem}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_claim_that_nothing_proves_fails() {
    let report = report(Wrong::ClaimsTooMuch).await;
    assert_eq!(report.failed().count(), 0, "{report}");
    assert_eq!(report.problems(), ["source-pvc is claimed, and no test proved it"]);
}

#[tokio::test]
async fn a_required_backend_that_is_not_ready_fails() {
    let report = report(Wrong::IsNotReady).await;
    assert!(report.tests.is_empty());
    assert_eq!(
        report.problems(),
        ["expected memory to be ready on this host, but it is not: memory: it is broken"]
    );
}
