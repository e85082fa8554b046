#![doc = include_str!("../README.md")]
//!
//! # This package
//!
//! It is the one dependency of a program that embeds Rudder: everything of [`rudder_core`], and the backends by feature.
//!
//! | feature | what it adds |
//! |---|---|
//! | `qemu` (default) | `rudder::qemu`: builds on raw QEMU processes |

#[doc(inline)]
pub use rudder_core::*;

#[cfg(feature = "qemu")]
#[doc(inline)]
pub use rudder_qemu as qemu;
