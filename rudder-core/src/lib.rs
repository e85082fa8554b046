//! The core of Rudder: what a build *is* (manifest, diagnostics, plan), what a hypervisor must give
//! (the [`backend`] traits), and what a build *does* (engine, guest conversation, store).
//!
//! A backend gives streams and disks; the core does the talking. See `docs/design.md` for the floors of this
//! crate and for the reasons behind its borders.

pub mod backend;
pub mod build;
pub mod capability;
pub mod check;
pub mod console;
pub mod diagnostic;
pub mod digest;
pub mod error;
pub mod event;
pub mod fetch;
pub mod files;
pub mod guest;
pub mod hardware;
pub mod keys;
pub mod manifest;
pub mod media;
#[cfg(feature = "memory")]
pub mod memory;
pub mod module;
pub mod plan;
pub mod progress;
pub mod record;
pub mod runtime;
pub mod secret;
mod shell_frame;
pub mod step;
#[cfg(feature = "testing")]
pub mod testing;
pub mod units;
pub mod visible;

pub use error::{Error, ErrorKind, Result};

// The crates whose types appear in the signatures of this one: who names them through here has the same versions.
#[doc(no_inline)]
pub use {async_trait, futures, jiff, serde_json, tokio, tokio_util, url};
