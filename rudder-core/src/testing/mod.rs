//! The conformance suite: what every backend must do, as tests that can be run on any backend.
//!
//! An [`Adapter`] provides the backend, lists what exists of it as seen from outside (processes, files, networks),
//! kills machines, and provides a guest that boots. [`run`] then runs every test that the backend's capabilities claim,
//! and the [`Report`] says what passed, what failed and what was skipped, and why. **A capability that is claimed and
//! that no test proved is a failure**, and so is a host on which a required backend is not ready: nothing passes
//! without having been tested.
//!
//! Each test is also a public function that takes a [`Rig`], in the module of its group. No test may leave anything
//! behind.
//!
//! ```
//! use rudder_core::testing::{MemoryAdapter, Options, run};
//! use std::sync::Arc;
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() {
//! let report = run(Arc::new(MemoryAdapter::new()), &Options::new().only("labs")).await;
//! println!("{report}");
//! report.assert_passed();
//! # }
//! ```
//!
//! This module is for authors of backends. It requires the feature `testing`, and is exempt from semantic versioning: a
//! newer suite may require more.

mod adapter;
pub mod builds;
pub mod consoles;
pub mod dropped;
pub mod firmware;
mod guest;
pub mod hardware;
pub mod imports;
pub mod kept;
pub mod labs;
pub mod machines;
mod memory;
pub mod modules;
pub mod owners;
pub mod pairs;
mod report;
mod rig;
mod run;
pub mod served;
pub mod streams;
mod table;
mod test_result;
pub mod texts;

pub use self::{
    adapter::{Adapter, BadImages, Echo, GuestImage, Owners},
    memory::MemoryAdapter,
    owners::{OWNER_VARIABLE, own},
    report::{Outcome, Report, TestReport},
    rig::Rig,
    run::{Options, Test, run, tests},
    test_result::{NotPassed, TestResult},
};
