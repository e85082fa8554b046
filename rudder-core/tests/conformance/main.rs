//! The suite on the memory backend, and on backends that are wrong in one way each: it finds nothing wrong with the one,
//! and what is wrong with each of the others.
#![allow(clippy::print_stdout, missing_docs)]

mod broken;
// The example of the guide.
#[path = "../../examples/backend/processes/mod.rs"]
mod processes;

use broken::{BrokenAdapter, Wrong};
use futures::{StreamExt as _, stream};
use processes::ProcessesAdapter;
use rudder_core::testing::{MemoryAdapter, OWNER_VARIABLE, Options, Report, own, run};
use std::{path::Path, process::Command, sync::Arc, time::Duration};

/// The page with the table of results.
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
async fn the_backend_of_the_guide_keeps_the_contract() {
    let mut owner = Command::new(std::env::current_exe().expect("this program has a path"));
    owner.args(["--exact", "the_backend_of_the_guide_keeps_the_contract", "--nocapture"]);
    if std::env::var_os(OWNER_VARIABLE).is_some() {
        let adapter = ProcessesAdapter::another(owner).expect("whoever starts an owner gives it a store");
        panic!("{:?}", own(Arc::new(adapter)).await);
    }
    let adapter = ProcessesAdapter::new(owner).expect("a store can be made");
    let report = run(Arc::new(adapter), &Options::new()).await;
    println!("{report}");
    report.assert_passed();
}

/// Each way of being wrong, and the checks that must find it; no other may.
const FOUND_BY: [(Wrong, &[&str]); 15] = [
    (Wrong::SeesDeathLate, &["death is seen in time"]),
    (Wrong::ReapsTheLiving, &["a living owner is never reaped"]),
    (Wrong::DestroysOnce, &["a lab is opened and destroyed twice", "a lab is destroyed from every state"]),
    (Wrong::LeaksWhenDropped, &["opening a lab may be dropped"]),
    (Wrong::ClosesBothHalves, &["half of a connection may be closed"]),
    (Wrong::FlipsABit, &["large transfers arrive whole"]),
    (Wrong::BelievesAnyDigest, &["a promised digest is verified"]),
    (Wrong::SharesVolumes, &["an image is imported by several at once"]),
    (Wrong::MixesSeeds, &["machines that are created at once do not meet"]),
    (Wrong::MixesLabsUp, &["labs with the same names do not meet"]),
    (Wrong::StartsTwice, &["start wait and stop come in every order"]),
    (Wrong::PublishesParts, &["what a guest wrote is captured and inherited"]),
    (Wrong::HasOneReader, &["several read the serial console"]),
    (Wrong::CannotSayRefused, &["a closed port refuses"]),
    (Wrong::CleansNames, &["odd names work or are refused"]),
];

async fn report(wrong: Wrong) -> Report {
    let mut options = Options::new().reaction(Duration::from_secs(5));
    options.settle = Duration::from_secs(5);
    options.limit = Duration::from_secs(60);
    run(Arc::new(BrokenAdapter::new(wrong)), &options).await
}

#[tokio::test(flavor = "multi_thread")]
async fn every_way_of_being_wrong_is_found_by_the_right_check() {
    let reports = stream::iter(FOUND_BY).map(|(wrong, checks)| async move {
        let report = report(wrong).await;
        (wrong, checks, report)
    });
    let mut reports = reports.buffered(4);
    let mut missed = Vec::new();
    while let Some((wrong, checks, report)) = reports.next().await {
        let failed: Vec<&str> = report.failed().collect();
        println!("{wrong:?}: found by {failed:?}");
        if report.is_passed() || !checks.iter().all(|check| failed.contains(check)) {
            missed.push(format!("{wrong:?}: expected {checks:?} to fail, but found {failed:?}\n{report}"));
        }
    }
    assert!(missed.is_empty(), "{}", missed.join("\n"));
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
