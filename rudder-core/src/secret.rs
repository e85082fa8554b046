//! Secrets of a manifest: values that never show in `Debug`, and a [`Masker`] that takes them out of any text,
//! in escaped and encoded forms too.

use serde::{Deserialize, Serialize};
use std::fmt;

/// A value that `Debug` and `Display` do not show. Serialised as the value itself: plans are not public.
#[derive(Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// Marks a value as secret.
    pub fn new(value: impl Into<String>) -> Self {
        Self(value.into())
    }

    /// The value itself.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(***)")
    }
}
