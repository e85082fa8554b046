//! Secrets of a manifest: values that `Debug` never shows, and a [`Masker`] that removes them from any text, in escaped
//! and encoded forms as well.
//!
//! - `parts`: splits a secret into the parts to search for.
//! - `view`, `dump`: transform a text before the search: without colours, unescaped, decoded from a dump of bytes.
//! - `masker`: finds the parts in the views.
//! - `url`: finds what must not be shown of URLs, whether or not it is known to be secret.

mod dump;
mod masker;
mod matcher;
mod parts;
mod pieces;
mod url;
mod view;

pub use masker::Masker;
pub(crate) use parts::values;
pub use pieces::PieceMasker;
pub use url::{public_url, redact_urls};
pub(crate) use url::{redact_written, secrets_of, url_secrets};

use serde::{Deserialize, Serialize};
use std::{fmt, ops::Range};

/// A value that `Debug` and `Display` do not show. It is serialised as the value itself: plans are not public.
#[derive(Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// Marks a value as secret.
    pub fn new(value: impl Into<String>) -> Self {
        Self(value.into())
    }

    /// Returns the value itself.
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

impl From<&str> for Secret {
    fn from(value: &str) -> Self {
        Self::new(value)
    }
}

/// Replacement for a secret.
const MASK: &str = "***";

/// Replaces each range of a text with the mask.
fn replace(text: &str, ranges: &[Range<usize>]) -> String {
    let mut out = String::with_capacity(text.len());
    let mut from = 0;
    for range in ranges {
        out.push_str(&text[from..range.start]);
        out.push_str(MASK);
        from = range.end;
    }
    out.push_str(&text[from..]);
    out
}

/// Sorts ranges, and joins those that touch.
pub(crate) fn merge(mut found: Vec<Range<usize>>) -> Vec<Range<usize>> {
    found.sort_unstable_by_key(|range| range.start);
    let mut merged: Vec<Range<usize>> = Vec::new();
    for range in found {
        match merged.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    merged
}

#[cfg(test)]
mod tests;
