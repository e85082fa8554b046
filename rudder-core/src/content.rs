//! What is known about content: its size, and what identifies it.

use crate::{digest::Digest, units::human_bytes};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

/// Identity of content, wherever it is stored. Two contents with the same identity are the same.
///
/// As text: `sha256:HEX`, `oci:DIGEST`, `cluster:NAME`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String", extend("pattern" = "^(sha256|oci|cluster):.+$"))]
#[non_exhaustive]
pub enum ContentId {
    /// The sha256 of its bytes.
    Sha256(Digest),
    /// The digest of the content in a registry: algorithm and value, as in `sha256:…` (OCI image specification, "Digests").
    Oci(String),
    /// The name that a cluster gives to this content and to nothing else, such as the UID of a snapshot. Only that cluster can
    /// resolve it.
    Cluster(String),
}

/// Error for a text that is not a valid content id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected sha256:HEX, oci:DIGEST or cluster:NAME, but found {0:?}")]
pub struct ParseContentIdError(String);

impl FromStr for ContentId {
    type Err = ParseContentIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || ParseContentIdError(text.to_owned());
        match text.split_once(':').filter(|(_, value)| !value.is_empty()).ok_or_else(error)? {
            ("sha256", hex) => hex.parse().map(Self::Sha256).map_err(|_| error()),
            ("oci", digest) => Ok(Self::Oci(digest.to_owned())),
            ("cluster", name) => Ok(Self::Cluster(name.to_owned())),
            _ => Err(error()),
        }
    }
}

impl TryFrom<String> for ContentId {
    type Error = ParseContentIdError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<ContentId> for String {
    fn from(id: ContentId) -> Self {
        id.to_string()
    }
}

impl fmt::Display for ContentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sha256(digest) => write!(f, "sha256:{digest}"),
            Self::Oci(digest) => write!(f, "oci:{digest}"),
            Self::Cluster(name) => write!(f, "cluster:{name}"),
        }
    }
}

/// What is known about content.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[non_exhaustive]
pub struct Content {
    /// Size in bytes; absent: unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
    /// Identity of the content; absent: unknown.
    #[serde(default, rename = "content", skip_serializing_if = "Option::is_none")]
    pub id: Option<ContentId>,
}

impl Content {
    /// Content of `size` bytes with this sha256.
    #[must_use]
    pub fn of_bytes(size: u64, sha256: Digest) -> Self {
        Self { size: Some(size), id: Some(ContentId::Sha256(sha256)) }
    }

    /// Content with these bytes.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self::of_bytes(bytes.len() as u64, Digest::of(bytes))
    }

    /// Content about which nothing is known.
    #[must_use]
    pub fn unknown() -> Self {
        Self::default()
    }

    /// Content with this identity, of unknown size.
    #[must_use]
    pub fn identified(id: ContentId) -> Self {
        Self { size: None, id: Some(id) }
    }

    /// Returns the sha256 of the bytes, if that is what identifies them.
    #[must_use]
    pub fn sha256(&self) -> Option<Digest> {
        match self.id {
            Some(ContentId::Sha256(digest)) => Some(digest),
            _ => None,
        }
    }

    /// Returns size and sha256, if both are known: what is needed to verify a file.
    #[must_use]
    pub fn verifiable(&self) -> Option<(u64, Digest)> {
        self.size.zip(self.sha256())
    }
}

/// Formats the content for people: `20 MiB, sha256:…`.
impl fmt::Display for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.size {
            Some(size) => write!(f, "{}, ", human_bytes(size))?,
            None => f.write_str("size unknown, ")?,
        }
        match &self.id {
            Some(id) => id.fmt(f),
            None => f.write_str("content unknown"),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn an_identity_is_parsed_from_its_text() {
        let ids = [
            ContentId::Sha256(Digest::of(b"x")),
            ContentId::Oci(format!("sha512:{}", "0".repeat(128))),
            ContentId::Cluster("snapshot/3f2a".to_owned()),
        ];
        for id in ids {
            assert_eq!(id.to_string().parse(), Ok(id.clone()));
            let json = serde_json::to_string(&Content::identified(id.clone())).unwrap();
            assert_eq!(serde_json::from_str::<Content>(&json).unwrap(), Content::identified(id));
        }
        for text in ["", "sha256:", "sha256:00", "oci:", "md5:00", "cluster"] {
            assert!(text.parse::<ContentId>().is_err(), "{text}");
        }
    }

    #[test]
    fn unknown_facts_are_reported_as_unknown() {
        assert_eq!(Content::unknown().to_string(), "size unknown, content unknown");
        assert_eq!(Content::unknown().verifiable(), None);
        assert_eq!(Content::of(b"x").verifiable(), Some((1, Digest::of(b"x"))));
    }
}
