#![doc = include_str!("../README.md")]
//!
//! # This package
//!
//! This is the only dependency that a program needs to embed Rudder. It re-exports all of [`rudder_core`], and the
//! backends by feature.
//!
//! | feature | what it adds |
//! |---|---|
//! | `engine` (default) | builds, and the contract of backends. Without it: manifests, diagnostics, plans, events and records, on any target, `wasm32-unknown-unknown` included |
//! | `qemu` (default) | `rudder::qemu`: builds on raw QEMU processes |
//! | `libvirt` | `rudder::libvirt`: builds on libvirt; needs its headers (`libvirt-dev`) |
//! | `memory` | `rudder::memory`: a backend in memory, for tests without a hypervisor |
//! | `testing` | `rudder::testing`: the conformance suite, for authors of backends; outside semantic versioning |

#[doc(inline)]
pub use rudder_core::*;

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
