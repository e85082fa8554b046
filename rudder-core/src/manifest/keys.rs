//! Finds unknown keys. The known ones are taken from the JSON Schema, which is generated from the types.

use super::{
    Manifest, UnknownKeys,
    path::{PathSegment, write_segments},
    schema,
    yaml::{Kind, MAX_FINDINGS, NodeId, Tree},
};
use crate::diagnostic::Diagnostic;
use serde_json::Value;
use std::{collections::HashMap, sync::LazyLock};

/// The keys that are allowed in a value.
#[derive(Debug)]
enum Shape {
    /// A struct, with its fields.
    Fields(HashMap<String, usize>),
    /// A list whose elements have one shape.
    List(usize),
    /// Anything.
    Any,
}

/// The shapes of all structs, taken from the schema.
#[derive(Debug, Default)]
struct Shapes {
    shapes: Vec<Shape>,
    named: HashMap<String, usize>,
    build: usize,
    bare: usize,
    clone: usize,
}

static SHAPES: LazyLock<Shapes> = LazyLock::new(|| {
    let mut shapes = Shapes::default();
    let schema = schema::types();
    shapes.build = shapes.add(&schema.build, &schema.definitions);
    shapes.bare = shapes.add(&schema.bare, &schema.definitions);
    shapes.clone = shapes.add(&schema.clone, &schema.definitions);
    shapes
});

impl Shapes {
    fn add(&mut self, schema: &Value, definitions: &serde_json::Map<String, Value>) -> usize {
        if let Some(name) = schema["$ref"].as_str().and_then(|path| path.rsplit('/').next()) {
            if let Some(known) = self.named.get(name) {
                return *known;
            }
            let index = self.push(Shape::Any);
            self.named.insert(name.to_owned(), index);
            let target = definitions.get(name).map_or(index, |schema| self.add(schema, definitions));
            self.named.insert(name.to_owned(), target);
            return target;
        }
        if let Some(properties) = schema["properties"].as_object() {
            let fields = properties.iter().map(|(key, schema)| (key.clone(), self.add(schema, definitions)));
            let fields = fields.collect();
            return self.push(Shape::Fields(fields));
        }
        if schema["items"].is_object() {
            let items = self.add(&schema["items"], definitions);
            return self.push(Shape::List(items));
        }
        for choice in ["anyOf", "oneOf", "allOf"] {
            let some = schema[choice].as_array().into_iter().flatten();
            let shapes: Vec<_> = some.map(|schema| self.add(schema, definitions)).collect();
            if let Some(found) = shapes.into_iter().find(|shape| !matches!(self.shapes[*shape], Shape::Any)) {
                return found;
            }
        }
        self.push(Shape::Any)
    }

    fn push(&mut self, shape: Shape) -> usize {
        self.shapes.push(shape);
        self.shapes.len() - 1
    }
}

/// Reports every unknown key, in source order. A misspelt key is an error; any other is a warning, unless unknown keys
/// are refused.
pub(super) fn check(
    tree: &Tree,
    manifest: &Manifest,
    unknown: UnknownKeys,
    diagnostics: &mut Vec<Diagnostic>,
) {
    let shape = match manifest {
        Manifest::Resource(_) => SHAPES.build,
        Manifest::Bare(_) => SHAPES.bare,
        Manifest::Clone(_) => SHAPES.clone,
    };
    let mut walk = Walk { tree, diagnostics, unknown, path: Vec::new() };
    walk.visit(tree.root, shape);
}

struct Walk<'t> {
    tree: &'t Tree,
    diagnostics: &'t mut Vec<Diagnostic>,
    unknown: UnknownKeys,
    path: Vec<PathSegment<'t>>,
}

impl Walk<'_> {
    /// Visits a node; the recursion is no deeper than the schema, which is not recursive.
    fn visit(&mut self, node: NodeId, shape: usize) {
        let tree = self.tree;
        if self.diagnostics.len() >= MAX_FINDINGS || tree.is_pruned(node) {
            return;
        }
        match (&SHAPES.shapes[shape], &tree.node(tree.follow(node)).kind) {
            (Shape::List(items), Kind::Sequence(nodes)) => {
                for (index, node) in nodes.iter().enumerate() {
                    self.path.push(PathSegment::Index(index));
                    self.visit(*node, *items);
                    self.path.pop();
                }
            }
            (Shape::Fields(fields), Kind::Mapping(entries)) => {
                for (key, value) in entries {
                    let name = tree.scalar_text(*key).unwrap_or("?");
                    self.path.push(PathSegment::Key(name));
                    match fields.get(name) {
                        Some(field) => self.visit(*value, *field),
                        None => self.unknown(*key, name, fields),
                    }
                    self.path.pop();
                }
            }
            _ => {}
        }
    }

    fn unknown(&mut self, key: NodeId, name: &str, fields: &HashMap<String, usize>) {
        let mut path = String::new();
        // Writing to a `String` does not fail.
        let _ = write_segments(&self.path, &mut path);
        let short: String = name.chars().take(80).collect();
        let span = Some(self.tree.node(key).span);
        let similar = nearest(name, fields);
        // The intent of a misspelt key is clear: ignoring it would build a different machine.
        let is_misspelt = similar.is_some_and(|similar| is_misspelling(name, similar));
        let mut diagnostic = if is_misspelt || self.unknown == UnknownKeys::Refuse {
            Diagnostic::error("unknown-key", path, span, format!("unknown key `{short}`"))
        } else {
            let message = format!("unknown key `{short}`, which is ignored");
            Diagnostic::warning("unknown-key", path, span, message)
        };
        diagnostic.help = similar.map(|similar| format!("did you mean `{similar}`?"));
        self.diagnostics.push(diagnostic);
    }
}

/// Whether a key equals a field except for capitals, `-` and `_`, or for one letter that is missing, wrong, superfluous
/// or transposed.
fn is_misspelling(name: &str, field: &str) -> bool {
    let (name, field) = (plain(name), plain(field));
    // In a field of two letters, a single letter is too much of a difference.
    name == field || field.len() > 2 && strsim::damerau_levenshtein(&name, &field) <= 1
}

fn plain(text: &str) -> String {
    text.replace(['-', '_'], "").to_lowercase()
}

/// Returns the field that the author most likely meant: the same except for capitals, `-` and `_`, or a few letters
/// away.
fn nearest<'f>(name: &str, fields: &'f HashMap<String, usize>) -> Option<&'f str> {
    if name.len() > 64 {
        return None;
    }
    let wanted = plain(name);
    let similar = |field: &'f String| {
        let field_plain = plain(field);
        let distance = strsim::damerau_levenshtein(&wanted, &field_plain);
        let is_part = field_plain.len() >= 4
            && wanted.len() >= 3
            && (wanted.strip_suffix('s') == Some(&field_plain)
                || field_plain.strip_suffix('s') == Some(&wanted));
        let limit = wanted.chars().count().max(field_plain.chars().count()) / 3;
        (distance <= limit.max(1) && distance < wanted.chars().count() || is_part)
            .then_some((distance, field.as_str()))
    };
    fields.keys().filter_map(similar).min().map(|(_, field)| field)
}
