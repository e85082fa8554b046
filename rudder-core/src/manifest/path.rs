//! The path of a value in a manifest: `spec.vms[0].disks[1].size`.

use std::{fmt, ptr};

/// A path from the root of a document to a value. Extending a path borrows it and costs nothing.
///
/// ```
/// use rudder_core::manifest::ValuePath;
/// let vms = ValuePath::root().key("vms");
/// let vm = vms.index(0);
/// assert_eq!(vm.key("name").to_string(), "vms[0].name");
/// ```
#[derive(Debug, Clone, Copy)]
pub struct ValuePath<'a> {
    parent: Option<&'a ValuePath<'a>>,
    segment: PathSegment<'a>,
}

/// A segment of a [`ValuePath`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PathSegment<'a> {
    /// The value of this key in a mapping.
    Key(&'a str),
    /// The element of a list with this index, from 0.
    Index(usize),
}

static ROOT: ValuePath<'static> = ValuePath { parent: None, segment: PathSegment::Key("") };
static SPEC: ValuePath<'static> = ValuePath { parent: Some(&ROOT), segment: PathSegment::Key("spec") };

impl<'a> ValuePath<'a> {
    /// Returns the path of the document itself, which is displayed as an empty string.
    #[must_use]
    pub fn root() -> &'static ValuePath<'static> {
        &ROOT
    }

    /// Returns the path of the `spec` of the resource form.
    #[must_use]
    pub fn spec() -> &'static ValuePath<'static> {
        &SPEC
    }

    /// Extends the path by a key.
    #[must_use]
    pub fn key<'b>(&'b self, key: &'b str) -> ValuePath<'b> {
        ValuePath { parent: Some(self), segment: PathSegment::Key(key) }
    }

    /// Extends the path by an index, from 0.
    #[must_use]
    pub fn index(&self, index: usize) -> ValuePath<'_> {
        ValuePath { parent: Some(self), segment: PathSegment::Index(index) }
    }

    /// Returns the parent and the last segment; `None` for the root.
    #[must_use]
    pub fn split_last(&self) -> Option<(&'a ValuePath<'a>, PathSegment<'a>)> {
        self.parent.map(|parent| (parent, self.segment))
    }

    /// Whether this is the document itself.
    #[must_use]
    pub fn is_root(&self) -> bool {
        self.parent.is_none()
    }

    /// Returns the segments from the root.
    #[must_use]
    pub fn segments(&self) -> Vec<PathSegment<'a>> {
        let mut segments = Vec::new();
        let mut rest = self.split_last();
        while let Some((parent, segment)) = rest {
            segments.push(segment);
            rest = parent.split_last();
        }
        segments.reverse();
        segments
    }
}

impl PartialEq for ValuePath<'_> {
    fn eq(&self, other: &Self) -> bool {
        ptr::eq(self, other) || self.segments() == other.segments()
    }
}

impl Eq for ValuePath<'_> {}

impl fmt::Display for ValuePath<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_segments(&self.segments(), f)
    }
}

/// Writes segments as `a.b[0]`; a key that is not a simple word is quoted in brackets.
pub(super) fn write_segments(segments: &[PathSegment<'_>], f: &mut impl fmt::Write) -> fmt::Result {
    for (position, segment) in segments.iter().enumerate() {
        match segment {
            PathSegment::Index(index) => write!(f, "[{index}]")?,
            PathSegment::Key(key) if is_word(key) => {
                write!(f, "{}{key}", if position == 0 { "" } else { "." })?;
            }
            PathSegment::Key(key) => {
                let short: String = key.chars().take(64).collect();
                write!(f, "[{short:?}{}]", if short.len() < key.len() { "…" } else { "" })?;
            }
        }
    }
    Ok(())
}

fn is_word(key: &str) -> bool {
    (1..=64).contains(&key.len()) && key.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'_' || c == b'-')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_shown_as_people_write_it() {
        assert_eq!(ValuePath::root().to_string(), "");
        let vms = ValuePath::spec().key("vms");
        let vm = vms.index(0);
        assert_eq!(vm.key("disks").index(1).key("size").to_string(), "spec.vms[0].disks[1].size");
        assert_eq!(ValuePath::root().key("labels").key("a.b/c").to_string(), "labels[\"a.b/c\"]");
        assert_eq!(vm.split_last(), Some((&vms, PathSegment::Index(0))));
        assert!(ValuePath::root().is_root() && !vm.is_root());
    }
}
