//! A parsed document: its manifest, and the location of each value.

use super::{Manifest, path::ValuePath, yaml::Tree};
use crate::diagnostic::{Diagnostic, Span};
use std::{fmt, sync::Arc};

/// The contents of a file, and what is wrong with it.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Parsed {
    /// The documents that could be read, without invalid values.
    pub documents: Vec<Document>,
    /// All findings, in source order.
    pub diagnostics: Vec<Diagnostic>,
}

impl Parsed {
    /// Whether any finding is an error, which refuses the manifest.
    #[must_use]
    pub fn has_errors(&self) -> bool {
        self.diagnostics.iter().any(Diagnostic::is_error)
    }
}

/// A manifest, with the locations of its values if it was parsed from text.
#[derive(Clone)]
pub struct Document {
    manifest: Manifest,
    source_name: Option<Arc<str>>,
    tree: Option<Arc<Tree>>,
}

impl fmt::Debug for Document {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Document")
            .field("manifest", &self.manifest)
            .field("source_name", &self.source_name)
            .finish_non_exhaustive()
    }
}

impl Document {
    pub(super) fn new(manifest: Manifest, source_name: Option<Arc<str>>, tree: Tree) -> Self {
        Self { manifest, source_name, tree: Some(Arc::new(tree)) }
    }

    /// Creates a document from a manifest that was made by a program; its values have no location.
    #[must_use]
    pub fn from_manifest(manifest: Manifest) -> Self {
        Self { manifest, source_name: None, tree: None }
    }

    /// Returns the manifest, without defaults filled in.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Returns the manifest.
    #[must_use]
    pub fn into_manifest(self) -> Manifest {
        self.manifest
    }

    /// Returns the name of the file or stream that it was read from.
    #[must_use]
    pub fn source_name(&self) -> Option<&str> {
        self.source_name.as_deref()
    }

    /// Returns the text of this document as given, including comments; `None` for a manifest that was made by a
    /// program.
    #[must_use]
    pub fn source(&self) -> Option<&str> {
        let tree = self.tree.as_ref()?;
        tree.source.get(tree.range.0..tree.range.1)
    }

    /// Returns the path of the spec: the root in the bare form, `spec` in the resource form.
    #[must_use]
    pub fn spec_path(&self) -> &'static ValuePath<'static> {
        match self.manifest {
            Manifest::Bare(_) => ValuePath::root(),
            Manifest::Resource(_) | Manifest::Clone(_) => ValuePath::spec(),
        }
    }

    /// Returns the location of the value at this path.
    #[must_use]
    pub fn locate(&self, path: &ValuePath<'_>) -> Option<Span> {
        let tree = self.tree.as_ref()?;
        tree.find(path).map(|(_, value)| tree.node(value).span)
    }

    /// Returns the location of the key of this path; `None` if it is an element of a list.
    #[must_use]
    pub fn locate_key(&self, path: &ValuePath<'_>) -> Option<Span> {
        let tree = self.tree.as_ref()?;
        let (key, _) = tree.find(path)?;
        key.map(|key| tree.node(key).span)
    }

    /// Returns the best location for a finding about this path: that of its value, or of the nearest parent that has
    /// one.
    #[must_use]
    pub fn locate_nearest(&self, path: &ValuePath<'_>) -> Option<Span> {
        let mut rest = *path;
        loop {
            if let Some(span) = self.locate(&rest) {
                return Some(span);
            }
            rest = *rest.split_last()?.0;
        }
    }

    /// Whether the value at this path, or one that contains it, was refused by [`parse`](super::parse) and left out.
    /// That was already reported, so the value should not be reported as missing.
    #[must_use]
    pub fn is_pruned(&self, path: &ValuePath<'_>) -> bool {
        self.tree.as_ref().is_some_and(|tree| tree.is_pruned_at(path))
    }

    /// Whether [`parse`](super::parse) refused any value of this document and left it out.
    pub(crate) fn has_pruned(&self) -> bool {
        self.tree.as_ref().is_some_and(|tree| tree.has_pruned())
    }
}
