//! YAML with locations: a tree of nodes, each of which knows its location in the source.
//!
//! [`read`](read::read) turns bytes into one [`Tree`] per document and never fails: mistakes become diagnostics. [`de`]
//! deserialises trees with serde. Everything here is bounded by the limits below, and no recursion is deeper than
//! [`MAX_DEPTH`].

pub(super) mod de;
mod decode;
mod entries;
pub(super) mod read;
mod scalar;
mod trap;
pub(super) mod write;

pub(super) use scalar::Value;

pub(super) use crate::diagnostic::MAX_FINDINGS;

use super::path::{PathSegment, ValuePath};
use crate::diagnostic::Span;
use std::{collections::HashMap, fmt, sync::Arc};

/// Maximum nesting of lists and mappings, with aliases followed.
pub(super) const MAX_DEPTH: u8 = 64;
/// Maximum number of nodes in a file, as written.
pub(super) const MAX_NODES: usize = 400_000;
/// Maximum weight of the nodes in a file, with aliases followed: roughly their size in bytes as a manifest.
pub(super) const MAX_WEIGHT: u64 = 128 * 1024 * 1024;
/// Maximum number of documents in a file.
pub(super) const MAX_DOCUMENTS: usize = 1000;
/// Mappings with more entries than this have an index.
const MAX_SEARCHED: usize = 16;

/// The index of a node in its tree.
pub(super) type NodeId = u32;

/// A document.
#[derive(Clone)]
pub(super) struct Tree {
    pub(super) source: Arc<str>,
    pub(super) nodes: Vec<Node>,
    pub(super) root: NodeId,
    /// The byte range of the source that belongs to this document.
    pub(super) range: (usize, usize),
    /// Indices of the entries by key, for large mappings.
    index: HashMap<NodeId, HashMap<Box<str>, usize>>,
}

impl fmt::Debug for Tree {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The source may contain secrets.
        write!(f, "Tree({} nodes)", self.nodes.len())
    }
}

/// A value and its location.
#[derive(Debug, Clone)]
pub(super) struct Node {
    pub(super) span: Span,
    pub(super) kind: Kind,
    /// Share of `MAX_WEIGHT` that it takes, with aliases followed.
    weight: u64,
    /// Number of levels below the node.
    height: u8,
    /// Whether a mistake in it was reported already; it then counts as absent.
    pub(super) pruned: bool,
}

#[derive(Debug, Clone)]
pub(super) enum Kind {
    Scalar(Text, Value),
    Sequence(Box<[NodeId]>),
    Mapping(Box<[(NodeId, NodeId)]>),
    /// The same value as another node, which comes earlier.
    Alias(NodeId),
}

/// The text of a scalar: verbatim in the source, or unescaped and folded.
#[derive(Debug, Clone)]
pub(super) enum Text {
    Source(u32, u32),
    Owned(Box<str>),
}

impl Tree {
    fn new(source: Arc<str>, nodes: Vec<Node>, root: NodeId, range: (usize, usize)) -> Self {
        let mut tree = Self { source, nodes, root, range, index: HashMap::new() };
        for (id, node) in tree.nodes.iter().enumerate() {
            if let Kind::Mapping(entries) = &node.kind
                && entries.len() > MAX_SEARCHED
            {
                let mut positions = HashMap::with_capacity(entries.len());
                for (position, (key, _)) in entries.iter().enumerate() {
                    let key = tree.scalar_text(*key).unwrap_or_default();
                    positions.entry(key.into()).or_insert(position);
                }
                tree.index.insert(number(id), positions);
            }
        }
        tree
    }

    pub(super) fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id as usize]
    }

    /// Returns the target of an alias, or the node itself. An alias never refers to another alias.
    pub(super) fn follow(&self, id: NodeId) -> NodeId {
        match self.node(id).kind {
            Kind::Alias(target) => target,
            _ => id,
        }
    }

    pub(super) fn text<'t>(&'t self, text: &'t Text) -> &'t str {
        match text {
            Text::Source(start, end) => &self.source[*start as usize..*end as usize],
            Text::Owned(text) => text,
        }
    }

    /// Returns the text of a scalar as written, without quotes; `None` for a list or mapping.
    pub(super) fn scalar_text(&self, id: NodeId) -> Option<&str> {
        match &self.node(self.follow(id)).kind {
            Kind::Scalar(text, _) => Some(self.text(text)),
            _ => None,
        }
    }

    /// Returns the entries of a mapping; empty for other nodes.
    pub(super) fn entries(&self, id: NodeId) -> &[(NodeId, NodeId)] {
        match &self.node(self.follow(id)).kind {
            Kind::Mapping(entries) => entries,
            _ => &[],
        }
    }

    /// Returns the key and the value of the entry with this name in a mapping.
    pub(super) fn entry(&self, id: NodeId, name: &str) -> Option<(NodeId, NodeId)> {
        let entries = self.entries(id);
        if let Some(positions) = self.index.get(&self.follow(id)) {
            return entries.get(*positions.get(name)?).copied();
        }
        entries.iter().copied().find(|(key, _)| self.scalar_text(*key) == Some(name))
    }

    pub(super) fn is_null(&self, id: NodeId) -> bool {
        matches!(self.node(self.follow(id)).kind, Kind::Scalar(_, Value::Null))
    }

    /// Whether a node, or the one that it refers to, was refused.
    pub(super) fn is_pruned(&self, id: NodeId) -> bool {
        self.node(id).pruned || self.node(self.follow(id)).pruned
    }

    /// Resolves one segment from a node: returns the key, if there is one, and the value.
    fn step(&self, id: NodeId, segment: PathSegment<'_>) -> Option<(Option<NodeId>, NodeId)> {
        match (segment, &self.node(self.follow(id)).kind) {
            (PathSegment::Key(name), Kind::Mapping(_)) => {
                self.entry(id, name).map(|(key, value)| (Some(key), value))
            }
            (PathSegment::Index(index), Kind::Sequence(items)) => items.get(index).map(|item| (None, *item)),
            _ => None,
        }
    }

    /// Returns the key and the value at a path.
    pub(super) fn find(&self, path: &ValuePath<'_>) -> Option<(Option<NodeId>, NodeId)> {
        path.segments().into_iter().try_fold((None, self.root), |(_, id), segment| self.step(id, segment))
    }

    /// Whether any node was refused.
    pub(super) fn has_pruned(&self) -> bool {
        self.nodes.iter().any(|node| node.pruned)
    }

    /// Whether the value at a path, or anything that contains it, was refused.
    pub(super) fn is_pruned_at(&self, path: &ValuePath<'_>) -> bool {
        let mut id = self.root;
        for segment in path.segments() {
            if self.is_pruned(id) {
                return true;
            }
            match self.step(id, segment) {
                Some((_, value)) => id = value,
                None => return false,
            }
        }
        self.is_pruned(id)
    }
}

/// Converts a line, a column or a node index; the limits keep them far below `u32::MAX`.
fn number(value: usize) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}
