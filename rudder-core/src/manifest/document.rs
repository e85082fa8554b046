//! A parsed document: the manifest in it, and where each of its values stands.

use super::{Manifest, path::Path, yaml::Tree};
use crate::diagnostic::{Diagnostic, Span};
use std::{fmt, sync::Arc};

/// What a file holds, and what is wrong with it.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Parsed {
    /// The documents that could be read; a value that is wrong is left out of them.
    pub documents: Vec<Document>,
    /// What was found, in the order of the file.
    pub diagnostics: Vec<Diagnostic>,
}

impl Parsed {
    /// Whether a finding refuses the manifest.
    #[must_use]
    pub fn has_errors(&self) -> bool {
        self.diagnostics.iter().any(Diagnostic::is_error)
    }
}

/// One manifest, with the places of its values where it was read from text.
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

    /// A document of a manifest that a program made: nothing in it has a place.
    #[must_use]
    pub fn from_manifest(manifest: Manifest) -> Self {
        Self { manifest, source_name: None, tree: None }
    }

    /// The manifest, nothing filled in.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The manifest itself.
    #[must_use]
    pub fn into_manifest(self) -> Manifest {
        self.manifest
    }

    /// The name of the file or stream it came from.
    #[must_use]
    pub fn source_name(&self) -> Option<&str> {
        self.source_name.as_deref()
    }

    /// The text of this document as given, with its comments; `None` for a manifest that a program made.
    #[must_use]
    pub fn source(&self) -> Option<&str> {
        let tree = self.tree.as_ref()?;
        tree.source.get(tree.range.0..tree.range.1)
    }

    /// Where the fields of the spec hang: at the root in the bare form, under `spec` in the resource form.
    #[must_use]
    pub fn spec_path(&self) -> &'static Path<'static> {
        match self.manifest {
            Manifest::Bare(_) => Path::root(),
            Manifest::Resource(_) | Manifest::Clone(_) => Path::spec(),
        }
    }

    /// Where the value at this path stands.
    #[must_use]
    pub fn locate(&self, path: &Path<'_>) -> Option<Span> {
        let tree = self.tree.as_ref()?;
        tree.find(path).map(|(_, value)| tree.node(value).span)
    }

    /// Where the key of this path stands; `None` for an element of a list, too.
    #[must_use]
    pub fn locate_key(&self, path: &Path<'_>) -> Option<Span> {
        let tree = self.tree.as_ref()?;
        let (key, _) = tree.find(path)?;
        key.map(|key| tree.node(key).span)
    }

    /// The best place for a finding about this path: its value, or the nearest thing that holds it.
    #[must_use]
    pub fn locate_nearest(&self, path: &Path<'_>) -> Option<Span> {
        let mut rest = *path;
        loop {
            if let Some(span) = self.locate(&rest) {
                return Some(span);
            }
            rest = *rest.split_last()?.0;
        }
    }

    /// Whether something was written at this path that [`parse`](super::parse) refused and left out, or that lies in such a value:
    /// the finding is there already, and nobody needs to hear that the value is missing.
    #[must_use]
    pub fn is_pruned(&self, path: &Path<'_>) -> bool {
        self.tree.as_ref().is_some_and(|tree| tree.is_pruned_at(path))
    }

    /// Whether [`parse`](super::parse) refused something of this document and left it out.
    pub(crate) fn has_pruned(&self) -> bool {
        self.tree.as_ref().is_some_and(|tree| tree.has_pruned())
    }
}
