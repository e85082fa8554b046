//! What will be done: defaults filled, overrides applied, references resolved, digest computed.

mod types;

pub use types::*;
