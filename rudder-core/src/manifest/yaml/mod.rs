//! YAML with places: a tree of nodes that each know where they stand in the source.
//!
//! [`read`](read::read) turns bytes into one [`Tree`] per document and never fails: what is wrong becomes a diagnostic. [`de`] gives
//! trees to serde. Everything here is bounded by the limits below, and nothing recurses deeper than [`MAX_DEPTH`].

pub(super) mod de;
mod decode;
mod entries;
pub(super) mod read;
mod scalar;
mod trap;
pub(super) mod write;

pub(super) use scalar::Value;

pub(super) use crate::diagnostic::MAX_FINDINGS;

use super::path::{Path, PathSegment};
use crate::diagnostic::Span;
use std::{collections::HashMap, fmt, sync::Arc};

/// Levels of lists and mappings inside each other, aliases followed.
pub(super) const MAX_DEPTH: u8 = 64;
/// Nodes of a file as written.
pub(super) const MAX_NODES: usize = 400_000;
/// What the nodes of a file may weigh with aliases followed: roughly the bytes they take as a manifest.
pub(super) const MAX_WEIGHT: u64 = 128 * 1024 * 1024;
/// Documents of a file.
pub(super) const MAX_DOCUMENTS: usize = 1000;
/// Mappings of more entries than this are searched by an index.
const MAX_SEARCHED: usize = 16;

/// The place of a node in its tree.
pub(super) type NodeId = u32;

/// One document.
#[derive(Clone)]
pub(super) struct Tree {
    pub(super) source: Arc<str>,
    pub(super) nodes: Vec<Node>,
    pub(super) root: NodeId,
    /// The bytes of the source that belong to this document.
    pub(super) range: (usize, usize),
    /// Of large mappings, the place of each entry by its key.
    index: HashMap<NodeId, HashMap<Box<str>, usize>>,
}

impl fmt::Debug for Tree {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The source may hold secrets.
        write!(f, "Tree({} nodes)", self.nodes.len())
    }
}

/// A value and where it stands.
#[derive(Debug, Clone)]
pub(super) struct Node {
    pub(super) span: Span,
    pub(super) kind: Kind,
    /// How much of the limit it takes with aliases followed.
    weight: u64,
    /// Levels below it.
    height: u8,
    /// Something is wrong with it that was reported already: it counts as absent.
    pub(super) pruned: bool,
}

#[derive(Debug, Clone)]
pub(super) enum Kind {
    Scalar(Text, Value),
    Sequence(Box<[NodeId]>),
    Mapping(Box<[(NodeId, NodeId)]>),
    /// The same value as another node, which stands earlier.
    Alias(NodeId),
}

/// The text of a scalar: in the source as it stands, or unescaped and folded.
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
                let mut places = HashMap::with_capacity(entries.len());
                for (place, (key, _)) in entries.iter().enumerate() {
                    let key = tree.scalar_text(*key).unwrap_or_default();
                    places.entry(key.into()).or_insert(place);
                }
                tree.index.insert(number(id), places);
            }
        }
        tree
    }

    pub(super) fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id as usize]
    }

    /// The node behind an alias, or itself. An alias never names an alias.
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

    /// The text of a scalar as written, without quotes; `None` for a list or mapping.
    pub(super) fn scalar_text(&self, id: NodeId) -> Option<&str> {
        match &self.node(self.follow(id)).kind {
            Kind::Scalar(text, _) => Some(self.text(text)),
            _ => None,
        }
    }

    /// The entries of a mapping; nothing for other nodes.
    pub(super) fn entries(&self, id: NodeId) -> &[(NodeId, NodeId)] {
        match &self.node(self.follow(id)).kind {
            Kind::Mapping(entries) => entries,
            _ => &[],
        }
    }

    /// The key and the value of this name in a mapping.
    pub(super) fn entry(&self, id: NodeId, name: &str) -> Option<(NodeId, NodeId)> {
        let entries = self.entries(id);
        if let Some(places) = self.index.get(&self.follow(id)) {
            return entries.get(*places.get(name)?).copied();
        }
        entries.iter().copied().find(|(key, _)| self.scalar_text(*key) == Some(name))
    }

    pub(super) fn is_null(&self, id: NodeId) -> bool {
        matches!(self.node(self.follow(id)).kind, Kind::Scalar(_, Value::Null))
    }

    /// Whether a node or what it names was refused.
    pub(super) fn is_pruned(&self, id: NodeId) -> bool {
        self.node(id).pruned || self.node(self.follow(id)).pruned
    }

    /// The step from a node: the key, where there is one, and the value.
    fn step(&self, id: NodeId, segment: PathSegment<'_>) -> Option<(Option<NodeId>, NodeId)> {
        match (segment, &self.node(self.follow(id)).kind) {
            (PathSegment::Key(name), Kind::Mapping(_)) => {
                self.entry(id, name).map(|(key, value)| (Some(key), value))
            }
            (PathSegment::Index(index), Kind::Sequence(items)) => items.get(index).map(|item| (None, *item)),
            _ => None,
        }
    }

    /// The key and the value at a path.
    pub(super) fn find(&self, path: &Path<'_>) -> Option<(Option<NodeId>, NodeId)> {
        path.segments().into_iter().try_fold((None, self.root), |(_, id), segment| self.step(id, segment))
    }

    /// Whether anything was refused.
    pub(super) fn has_pruned(&self) -> bool {
        self.nodes.iter().any(|node| node.pruned)
    }

    /// Whether the value at a path, or anything that holds it, was refused.
    pub(super) fn is_pruned_at(&self, path: &Path<'_>) -> bool {
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

/// Lines, columns and places of nodes: the limits keep them far below this.
fn number(value: usize) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}
