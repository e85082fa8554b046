//! Builds virtual machines from a YAML manifest: boots them, provisions them over SSH, shuts them down, and captures their disks as
//! a *module*, from which the next manifest can start.
//!
//! ```no_run
//! use rudder::{backend::Backend, build::Build, plan::{PlanContext, prepare}, qemu::QemuBackend, store::Store};
//! use std::sync::Arc;
//!
//! #[tokio::main]
//! async fn main() -> rudder::Result<()> {
//!     let backend = Arc::new(QemuBackend::builder(Store::open(Store::default_root())?).build());
//!     let context = PlanContext::new(backend.capabilities()).modules(backend.modules().await?);
//!     let manifest = rudder::manifest::read_file("site.yaml".as_ref())?;
//!     for plan in prepare("site.yaml", &manifest, &context).into_plans()? {
//!         let build = Build::new(plan, backend.clone()).start();
//!         let mut events = build.events();
//!         while let Some(event) = events.next().await {
//!             println!("{event}");
//!         }
//!         println!("{}", build.outcome().await?.name);
//!     }
//!     Ok(())
//! }
//! ```
//!
//! | to | use |
//! |---|---|
//! | read, check and plan a manifest | [`plan::prepare`], [`plan::PlanContext`], [`diagnostic`] |
//! | build, follow, cancel | [`build::Build`], [`build::BuildHandle`], [`event`] |
//! | learn why something failed | [`Error`]: `kind`, `report`, `diagnostics`, `build_failure` |
//! | list, show and remove modules | [`backend::Backend`], [`module::Module`] |
//! | use a guest, its screen and its keyboard | [`guest::Guest`], [`console::Console`] |
//! | choose a hypervisor | `rudder::qemu`, `rudder::libvirt`, on a `rudder::store`; `rudder::kubevirt` |
//! | keep the network of a kept lab running | `rudder::helper::run`, first in `main` |
//! | test without a hypervisor | `rudder::memory` |
//! | write a backend | [`backend`], [`backend_api`], `rudder::testing` |
//!
//! | feature | adds |
//! |---|---|
//! | `engine` (default) | builds, and the contract of backends. Without it: manifests, diagnostics, plans, events and records, also on `wasm32-unknown-unknown` |
//! | `qemu` (default) | builds on raw QEMU processes |
//! | `libvirt` | builds on libvirt; needs its headers (`libvirt-dev`) |
//! | `kubevirt` | builds on a Kubernetes cluster with KubeVirt |
//! | `memory` | a backend in memory, for tests |
//! | `testing` | the conformance suite for authors of backends; outside semantic versioning |
//!
//! The [guide](https://github.com/rudder-vm/rudder/blob/main/docs/guide.md) explains manifests and programs step by step.

// Without the engine: manifests, plans and results.
#[doc(inline)]
pub use rudder_core::{
    Error, ErrorKind, Result, capability, check, content, diagnostic, digest, event, hardware, keys,
    manifest, module, plan, secret, timestamp, units, visible,
};
// Builds.
#[cfg(feature = "memory")]
#[doc(inline)]
pub use rudder_core::memory;
#[cfg(feature = "testing")]
#[doc(inline)]
pub use rudder_core::testing;
#[cfg(feature = "engine")]
#[doc(inline)]
pub use rudder_core::{backend, build, console, fetch, guest, progress};

/// What authors of backends need besides the traits in [`crate::backend`].
#[cfg(feature = "engine")]
pub mod backend_api {
    #[doc(no_inline)]
    pub use rudder_core::{async_trait, futures, tokio};
    #[doc(inline)]
    pub use rudder_core::{files, media, record, runtime, step};
}

// Crates whose types appear in signatures, so that programs can use the same versions.
#[cfg(feature = "engine")]
#[doc(no_inline)]
pub use rudder_core::tokio;
#[doc(no_inline)]
pub use rudder_core::{serde_json, url};

#[cfg(any(feature = "qemu", feature = "libvirt"))]
#[doc(inline)]
pub use rudder_local::store;

#[cfg(feature = "kubevirt")]
#[doc(inline)]
pub use rudder_kubevirt as kubevirt;
#[cfg(feature = "libvirt")]
#[doc(inline)]
pub use rudder_libvirt as libvirt;
#[cfg(any(feature = "libvirt", feature = "qemu"))]
#[doc(inline)]
pub use rudder_local::helper;
#[cfg(feature = "qemu")]
#[doc(inline)]
pub use rudder_qemu as qemu;

/// The doctests of the pages.
#[cfg(doctest)]
mod pages {
    #[doc = include_str!("../README.md")]
    mod readme {}
    #[doc = include_str!("../docs/guide.md")]
    mod guide {}
}
