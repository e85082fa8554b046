//! Names, labels and annotations of the objects that Rudder creates.
//!
//! Names of a manifest may be longer than an object's name may be, or contain what a label must not. Objects therefore have names
//! that end in a digest of the exact names, and the exact names are annotations.

use rudder_core::{backend::LabId, digest::Digest};
use std::collections::BTreeMap;

/// The field manager of everything that Rudder applies, and the value of [`MANAGED_BY`].
pub(crate) const MANAGER: &str = "rudder";
/// Says that Rudder manages an object (Kubernetes, "Recommended Labels").
pub(crate) const MANAGED_BY: &str = "app.kubernetes.io/managed-by";
/// The kind of an object: one of [`Kind`].
pub(crate) const KIND: &str = "rudder-vm.github.io/kind";
/// The lab that an object belongs to.
pub(crate) const LAB: &str = "rudder-vm.github.io/lab";
/// The VM that an object belongs to, or a digest of its name.
pub(crate) const VM: &str = "rudder-vm.github.io/vm";
/// The build or clone that an object belongs to, or the module that it is a part of, or a digest of that name.
pub(crate) const BUILD: &str = "rudder-vm.github.io/build";

/// Annotation: the exact name of what an object is for.
pub(crate) const NAME: &str = "rudder-vm.github.io/name";
/// Annotation of a lease: how long the lab lives, as JSON.
pub(crate) const RETENTION: &str = "rudder-vm.github.io/retention";
/// Annotation of a lease: the modules that the lab builds on, as JSON.
pub(crate) const PARENTS: &str = "rudder-vm.github.io/parents";
/// Annotation of a VirtualMachine: what a process that attaches needs to know, as JSON.
pub(crate) const MACHINE: &str = "rudder-vm.github.io/machine";
/// Annotation of a cached import: its source, with secrets masked.
pub(crate) const SOURCE: &str = "rudder-vm.github.io/source";
/// Annotation of a cached import: until when it is kept (RFC 3339).
pub(crate) const KEEP_UNTIL: &str = "rudder-vm.github.io/keep-until";

/// The kinds of objects, as values of the label [`KIND`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The lease of a lab, which owns everything in it.
    Lab,
    /// A machine of a lab, and what is attached to it.
    Machine,
    /// A volume of a lab.
    Volume,
    /// A disk that was captured and is not part of a module.
    Captured,
    /// A small file that was stored with a lab.
    File,
    /// An import that labs share.
    Cache,
    /// A version of a module, which owns the module's volumes.
    Module,
}

impl Kind {
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Lab => "lab",
            Self::Machine => "machine",
            Self::Volume => "volume",
            Self::Captured => "captured",
            Self::File => "file",
            Self::Cache => "cache",
            Self::Module => "module",
        }
    }
}

/// Returns the labels of an object of this kind.
pub(crate) fn labels(kind: Kind) -> BTreeMap<String, String> {
    [(MANAGED_BY, MANAGER), (KIND, kind.label())]
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .into()
}

/// Returns the labels of an object of a lab.
pub(crate) fn lab_labels(kind: Kind, lab: &LabId, build: &str) -> BTreeMap<String, String> {
    let mut labels = labels(kind);
    labels.insert(LAB.to_owned(), lab.as_str().to_owned());
    labels.insert(BUILD.to_owned(), label_value(build));
    labels
}

/// Returns the selector of all objects of this kind.
pub(crate) fn selector(kind: Kind) -> String {
    format!("{MANAGED_BY}={MANAGER},{KIND}={}", kind.label())
}

/// Returns the selector of all objects of a lab.
pub(crate) fn lab_selector(lab: &LabId) -> String {
    format!("{MANAGED_BY}={MANAGER},{LAB}={lab}")
}

/// Returns the name of an object for these names: a readable part, and a digest that keeps different names apart. A label value,
/// an object's name and the name of a host all allow it (RFC 1123, 63 characters).
pub(crate) fn object_name(parts: &[&str]) -> String {
    const READABLE: usize = 48;
    let exact = parts.join("\0");
    let mut readable = String::new();
    for c in parts.join("-").chars() {
        match c {
            'a'..='z' | '0'..='9' => readable.push(c),
            'A'..='Z' => readable.push(c.to_ascii_lowercase()),
            _ if !readable.ends_with('-') => readable.push('-'),
            _ => {}
        }
    }
    let readable: String = readable.trim_matches('-').chars().take(READABLE).collect();
    let digest = short_digest(&exact);
    match readable.trim_matches('-') {
        "" => format!("rudder-{digest}"),
        readable => format!("{readable}-{digest}"),
    }
}

/// Returns the value of a label for a name: the name itself where a label allows it, otherwise a digest.
pub(crate) fn label_value(name: &str) -> String {
    let alphanumeric = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let valid = name.len() <= 63
        && alphanumeric(name.chars().next())
        && alphanumeric(name.chars().next_back())
        && name.chars().all(allowed);
    if valid { name.to_owned() } else { format!("sha256.{}", short_digest(name)) }
}

fn short_digest(text: &str) -> String {
    Digest::of(text.as_bytes()).to_string().chars().take(12).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_label(name: &str) -> bool {
        let inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        name.len() <= 63
            && name.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
            && !name.ends_with('-')
            && name.chars().all(inner)
    }

    #[test]
    fn names_of_objects_are_valid_and_distinct() {
        let long = "x".repeat(63);
        let other = format!("{}y", "x".repeat(62));
        let names: [&[&str]; 8] = [
            &["web", "root"],
            &["web-root"],
            &["We b", "root"],
            &["-", "-"],
            &["ü"],
            &[&long, &long],
            &[&long, &other],
            &["web", "root", ""],
        ];
        let mut found: Vec<String> = names.iter().map(|parts| object_name(parts)).collect();
        assert!(found.iter().all(|name| is_label(name)), "{found:?}");
        assert!(found[0].starts_with("web-root-"), "{found:?}");
        found.sort();
        found.dedup();
        assert_eq!(found.len(), names.len());
    }

    #[test]
    fn a_label_has_the_name_itself_if_it_can() {
        assert_eq!(label_value("Web_1.base"), "Web_1.base");
        for name in ["", "-web", "we b", &"x".repeat(64)] {
            let value = label_value(name);
            assert!(value.starts_with("sha256.") && value.len() <= 63, "{value}");
        }
    }
}
