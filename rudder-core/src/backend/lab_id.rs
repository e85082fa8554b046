//! Lab ids.

use serde::{Deserialize, Serialize};
use std::fmt;

/// The id of a lab: unique, and safe as the name of a file or an object and as the value of a label. At most 63 lower-case letters,
/// digits and `-`, where the first and last characters are not `-` (RFC 1123 labels, as Kubernetes requires for names and label
/// values).
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct LabId(String);

impl LabId {
    /// Creates a new id from the name of the build and 48 random bits.
    #[must_use]
    pub fn new(build: &str) -> Self {
        let name: String = build
            .chars()
            .filter(|c| c.is_ascii_alphanumeric() || *c == '-')
            .map(|c| c.to_ascii_lowercase())
            .skip_while(|c| *c == '-')
            .take(40)
            .collect();
        let name = if name.is_empty() { "lab" } else { &name };
        Self(format!("{name}-{:012x}", rand::random::<u64>() & 0xffff_ffff_ffff))
    }

    /// Parses an existing id.
    ///
    /// # Errors
    /// `InvalidInput` when the text is not a valid id.
    pub fn parse(text: &str) -> crate::Result<Self> {
        let is_plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
        let is_id = !text.is_empty()
            && text.len() <= 63
            && text.chars().all(|c| is_plain(c) || c == '-')
            && text.starts_with(is_plain)
            && text.ends_with(is_plain);
        if !is_id {
            let message = format!("expected a lab id such as web-0123456789ab, but found {text:?}");
            return Err(crate::Error::new(crate::ErrorKind::InvalidInput, message));
        }
        Ok(Self(text.to_owned()))
    }

    /// Returns the id as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for LabId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_new_id_is_valid_for_any_build_name(name in any::<String>()) {
            let id = LabId::new(&name);
            prop_assert_eq!(LabId::parse(id.as_str()).unwrap(), id);
        }
    }

    #[test]
    fn an_id_is_a_valid_label() {
        for text in ["a", "0", "web-0123456789ab", &"a".repeat(63)] {
            assert_eq!(LabId::parse(text).unwrap().as_str(), text);
        }
        for text in ["", "-a", "a-", "A", "a_b", "a.b", "a/b", "ä", &"a".repeat(64)] {
            assert!(LabId::parse(text).is_err(), "{text}");
        }
        assert!(LabId::new("My Build").as_str().starts_with("mybuild-"));
        assert_ne!(LabId::new("web"), LabId::new("web"));
    }
}
