//! Parses bytes to documents: determines the form of each document, and finds all mistakes in syntax, types and keys.

use super::{
    API_VERSION, BareBuild, BuildSpec, CloneSpec, Manifest, Resource,
    document::{Document, Parsed},
    keys,
    yaml::{Kind, MAX_FINDINGS, NodeId, Tree, de, read},
};
use crate::diagnostic::{self, Diagnostic};
use std::sync::Arc;

/// The `kind` of a build.
pub(super) const BUILD_KIND: &str = "VirtualMachineBuild";
/// The `kind` of a clone.
pub(super) const CLONE_KIND: &str = "VirtualMachineClone";

/// Parses all documents of a manifest file. Never fails and never stops at the first mistake: see
/// [`Parsed::diagnostics`].
///
/// Accepts YAML 1.2 in UTF-8 with the core schema, anchors, aliases and merge keys (`<<`), up to 16 MiB, 64 levels and
/// 1000 documents. Time and memory are bounded for any input.
///
/// ```
/// let parsed = rudder_core::manifest::parse(b"vms:\n- name: web\n  tmp: true\n");
/// assert_eq!(parsed.documents.len(), 1);
/// let finding = &parsed.diagnostics[0];
/// assert_eq!((finding.code.as_str(), finding.path.as_str()), ("unknown-key", "vms[0].tmp"));
/// assert_eq!(finding.help.as_deref(), Some("did you mean `tpm`?"));
/// assert!(finding.is_error(), "a machine without TPM is not what was meant");
/// ```
#[must_use]
pub fn parse(bytes: &[u8]) -> Parsed {
    parse_source(None, bytes, UnknownKeys::Warn)
}

/// Like [`parse`], with the name of the file, which names a build that has no name of its own.
#[must_use]
pub fn parse_named(source_name: &str, bytes: &[u8]) -> Parsed {
    parse_source(Some(source_name.into()), bytes, UnknownKeys::Warn)
}

/// Like [`parse_named`], and also selects how unknown keys are reported.
#[must_use]
pub fn parse_with(source_name: &str, bytes: &[u8], unknown: UnknownKeys) -> Parsed {
    parse_source(Some(source_name.into()), bytes, unknown)
}

/// How keys that Rudder does not know are reported.
///
/// A key that differs from a known one only by capitals or one letter is always an error: ignoring `secureboot` would
/// build a different machine.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum UnknownKeys {
    /// As warnings; the keys are ignored. A manifest may contain more than this version of Rudder reads.
    #[default]
    Warn,
    /// As errors.
    Refuse,
}

fn parse_source(source_name: Option<Arc<str>>, bytes: &[u8], unknown: UnknownKeys) -> Parsed {
    let read::Read { trees, mut diagnostics } = read::read(bytes);
    let mut documents = Vec::new();
    for mut tree in trees {
        // An empty document: `---` with nothing after it.
        if tree.is_null(tree.root) && !tree.is_pruned(tree.root) {
            continue;
        }
        if let Some(manifest) = manifest(&mut tree, &mut diagnostics) {
            keys::check(&tree, &manifest, unknown, &mut diagnostics);
            documents.push(Document::new(manifest, source_name.clone(), tree));
        }
    }
    if documents.is_empty() && diagnostics.is_empty() {
        diagnostics.push(
            Diagnostic::error("no-document", "", None, "expected a manifest, but found an empty file")
                .with_help("a manifest begins with `vms:`, or with `apiVersion:`, `kind:` and `spec:`"),
        );
    }
    diagnostic::sort(&mut diagnostics);
    if diagnostics.len() >= MAX_FINDINGS {
        // The part that was not checked may contain errors.
        let message = "there are more findings than are shown here";
        let more = Diagnostic::error("too-many", "", None, message);
        diagnostics.truncate(MAX_FINDINGS);
        diagnostics.push(more);
    }
    Parsed { documents, diagnostics }
}

fn manifest(tree: &mut Tree, diagnostics: &mut Vec<Diagnostic>) -> Option<Manifest> {
    let root = tree.root;
    if !matches!(tree.node(tree.follow(root)).kind, Kind::Mapping(_)) {
        if !tree.is_pruned(root) {
            let found = if matches!(tree.node(root).kind, Kind::Sequence(_)) { "a list" } else { "text" };
            let message = format!("expected a manifest, which is a mapping, but found {found}");
            diagnostics.push(
                Diagnostic::error("wrong-type", "", Some(tree.node(root).span), message)
                    .with_help("a manifest begins with `vms:`, or with `apiVersion:`, `kind:` and `spec:`"),
            );
        }
        return None;
    }
    let has = |name: &str| tree.entry(root, name).is_some();
    let lists_vms = tree.entry(root, "vms").is_some_and(
        |(_, vms)| matches!(&tree.node(tree.follow(vms)).kind, Kind::Sequence(items) if !items.is_empty()),
    );
    // A `spec` without `vms` beside it is a resource without its head: in the bare form it would mean nothing.
    if !(has("apiVersion") || has("kind") || has("spec") && !lists_vms) {
        let name = tree.entry(root, "name").map(|(_, node)| node);
        let name = name.and_then(|node| {
            let name = de::read(tree, &["name"], node, None, diagnostics);
            // A refused value was replaced by a placeholder.
            if tree.is_pruned(node) { None } else { name }
        });
        let spec = de::read::<BuildSpec>(tree, &[], root, Some("name"), diagnostics);
        return Some(Manifest::Bare(Box::new(BareBuild { name, spec })));
    }
    expect(tree, "apiVersion", &[API_VERSION], "unknown-api-version", diagnostics);
    expect(tree, "kind", &[BUILD_KIND, CLONE_KIND], "unknown-kind", diagnostics);
    let kind = tree.entry(root, "kind").and_then(|(_, node)| tree.scalar_text(node));
    if kind == Some(CLONE_KIND) {
        let resource = de::read::<Resource<CloneSpec>>(tree, &[], root, None, diagnostics);
        return Some(Manifest::Clone(Box::new(resource)));
    }
    let mut resource = de::read::<Resource<BuildSpec>>(tree, &[], root, None, diagnostics);
    if resource.api_version.is_none() && resource.kind.is_none() {
        // Only a key showed that this is a resource, and its value may have been refused. The manifest must be
        // recognised as a resource again after it was written.
        if lists_vms {
            resource.api_version = Some(API_VERSION.to_owned());
        } else {
            resource.spec.get_or_insert_default();
        }
    }
    Some(Manifest::Resource(Box::new(resource)))
}

/// Checks a field that identifies the form of the document.
fn expect(tree: &Tree, field: &str, known: &[&str], code: &str, diagnostics: &mut Vec<Diagnostic>) {
    let names: Vec<_> = known.iter().map(|name| format!("`{name}`")).collect();
    let names = names.join(" or ");
    let node: NodeId = match tree.entry(tree.root, field) {
        Some((_, node)) if !tree.is_null(node) => node,
        _ => {
            let span = tree
                .entry(tree.root, field)
                .map_or(tree.node(tree.root).span, |(key, _)| tree.node(key).span);
            let message = format!("expected `{field}: {}`, but found none", known[0]);
            diagnostics.push(Diagnostic::error("missing-field", field, Some(span), message));
            return;
        }
    };
    match tree.scalar_text(node) {
        Some(text) if !known.contains(&text) => {
            let found: String = text.chars().take(80).collect();
            let message = format!("expected {names}, but found `{found}`");
            diagnostics.push(Diagnostic::error(code, field, Some(tree.node(node).span), message));
        }
        // A list or mapping has the wrong type, and is reported with the other type errors.
        _ => {}
    }
}
