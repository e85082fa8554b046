#![doc = include_str!("../README.md")]
//!
//! # This package
//!
//! This is the only dependency that a program needs to embed Rudder.
//!
//! | task | module |
//! |---|---|
//! | reading and checking a manifest | [`plan::prepare`], [`diagnostic`] |
//! | building, following and cancelling a build | `build`, [`event`] |
//! | listing, showing and removing modules | `backend::Backend`, [`module`], `store` |
//! | using a guest, its screen and its keyboard | `guest`, `console` |
//! | testing without a hypervisor | `memory` |
//! | writing a backend | `backend`, `backend_api`, `testing` |
//!
//! | feature | what it adds |
//! |---|---|
//! | `engine` (default) | builds, and the contract of backends. Without it: manifests, diagnostics, plans, events and records, on any target, `wasm32-unknown-unknown` included |
//! | `qemu` (default) | `rudder::qemu`: builds on raw QEMU processes |
//! | `libvirt` | `rudder::libvirt`: builds on libvirt; needs its headers (`libvirt-dev`) |
//! | `memory` | `rudder::memory`: a backend in memory, for tests without a hypervisor |
//! | `testing` | `rudder::testing`: the conformance suite, for authors of backends; outside semantic versioning |

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

#[cfg(feature = "libvirt")]
#[doc(inline)]
pub use rudder_libvirt as libvirt;
#[cfg(any(feature = "libvirt", feature = "qemu"))]
#[doc(inline)]
pub use rudder_local::helper;
#[cfg(feature = "qemu")]
#[doc(inline)]
pub use rudder_qemu as qemu;

/// The doctests of the guide.
#[cfg(doctest)]
#[doc = include_str!("../docs/guide.md")]
mod guide {}
