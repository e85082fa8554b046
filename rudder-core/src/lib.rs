//! The core of Rudder: what a build *is* (manifest, diagnostics, plan), what a hypervisor must provide (the [`backend`] traits),
//! and what a build *does* (engine, guest sessions, the contract of backends).
//!
//! A backend provides streams and disks; the core does everything else. See `docs/design.md` for the layers of this crate and for
//! the reasons behind its boundaries.

#[cfg(feature = "engine")]
pub mod backend;
mod both_ways;
#[cfg(feature = "engine")]
pub mod build;
pub mod capability;
pub mod check;
#[cfg(feature = "engine")]
pub mod console;
pub mod content;
pub mod diagnostic;
pub mod digest;
pub mod error;
pub mod event;
#[cfg(feature = "engine")]
pub mod fetch;
#[cfg(feature = "engine")]
pub mod files;
#[cfg(feature = "engine")]
pub mod guest;
pub mod hardware;
pub mod keys;
pub mod manifest;
#[cfg(feature = "engine")]
pub mod media;
#[cfg(feature = "memory")]
pub mod memory;
pub mod module;
pub mod plan;
#[cfg(feature = "engine")]
mod platform;
#[cfg(feature = "engine")]
pub mod progress;
pub mod record;
#[cfg(feature = "engine")]
pub mod runtime;
pub mod secret;
#[cfg(feature = "engine")]
mod shell_frame;
#[cfg(feature = "engine")]
pub mod step;
#[cfg(feature = "testing")]
pub mod testing;
pub mod timestamp;
pub mod units;
pub mod visible;

pub use error::{Error, ErrorKind, Result};

// The crates whose types appear in signatures of this crate. Using them through these re-exports guarantees matching versions.
#[cfg(feature = "engine")]
#[doc(no_inline)]
pub use {async_trait, futures, tokio};
#[doc(no_inline)]
pub use {serde_json, url};
