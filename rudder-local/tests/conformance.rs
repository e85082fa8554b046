//! The conformance suite on the backend of the guide "Write a backend".
#![allow(clippy::print_stdout, missing_docs)]

#[path = "../examples/backend/processes/mod.rs"]
mod processes;

use processes::ProcessesAdapter;
use rudder_core::testing::{OWNER_VARIABLE, Options, own, run};
use std::{process::Command, sync::Arc};

#[tokio::test(flavor = "multi_thread")]
async fn the_example_backend_fulfils_the_contract() {
    let mut owner = Command::new(std::env::current_exe().expect("this program has a path"));
    owner.args(["--exact", "the_example_backend_fulfils_the_contract", "--nocapture"]);
    if std::env::var_os(OWNER_VARIABLE).is_some() {
        let adapter =
            ProcessesAdapter::another(owner).expect("the process that starts an owner names its store");
        panic!("{:?}", own(Arc::new(adapter)).await);
    }
    let adapter = ProcessesAdapter::new(owner).expect("a store can be made");
    let report = run(Arc::new(adapter), &Options::new()).await;
    println!("{report}");
    report.assert_passed();
}
