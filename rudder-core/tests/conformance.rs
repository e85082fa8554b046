//! The memory backend keeps the contract.
#![allow(clippy::print_stdout, missing_docs)]

use rudder_core::testing::{MemoryAdapter, Options, run};
use std::sync::Arc;

#[tokio::test(flavor = "multi_thread")]
async fn the_memory_backend_keeps_the_contract() {
    let report = run(Arc::new(MemoryAdapter::new()), &Options::new()).await;
    assert_eq!(report.failed().count(), 0, "{report}");
    println!("{report}");
}
