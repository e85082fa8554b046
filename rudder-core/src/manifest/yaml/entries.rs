//! The entries of a mapping that was just read: merge keys and duplicate keys.

use super::{
    Kind, NodeId, Value,
    read::{Reader, Stop},
};
use crate::diagnostic::Span;
use std::collections::{HashMap, HashSet};

impl Reader {
    /// Appends the entries of `<<: *name` to the mapping's own, which take precedence
    /// (<https://yaml.org/type/merge.html>).
    pub(super) fn merged(&mut self, entries: Vec<(NodeId, NodeId)>) -> Result<Vec<(NodeId, NodeId)>, Stop> {
        let is_merge = |reader: &Self, key: NodeId| {
            matches!(reader.nodes[key as usize].kind, Kind::Scalar(_, Value::Merge))
        };
        if !entries.iter().any(|(key, _)| is_merge(self, *key)) {
            return Ok(entries);
        }
        let (merges, mut own): (Vec<_>, Vec<_>) =
            entries.into_iter().partition(|(key, _)| is_merge(self, *key));
        let mut from = Vec::new();
        for (key, value) in merges {
            let sources = match &self.follow(value).kind {
                Kind::Sequence(items) => items.to_vec(),
                _ => vec![value],
            };
            for source in sources {
                match &self.follow(source).kind {
                    Kind::Mapping(entries) => from.extend_from_slice(entries),
                    _ => {
                        let span = self.nodes[key as usize].span;
                        let message =
                            "expected a mapping or a list of mappings after the merge key `<<`, but found \
                             another value"
                                .to_owned();
                        self.report(
                            "yaml-merge",
                            span,
                            message,
                            Some("write `<<: *name`, or put the key in quotes"),
                        );
                    }
                }
            }
            // Merged entries count as entries: many small merges must not create a large manifest.
            self.nodes_before += from.len();
            self.check_size(self.nodes[key as usize].span)?;
        }
        let merged = {
            let mut seen: HashSet<Key<'_>> = own.iter().map(|(key, _)| self.key(*key)).collect();
            from.retain(|(key, _)| seen.insert(self.key(*key)));
            from
        };
        own.extend(merged);
        Ok(own)
    }

    /// Removes entries whose key occurred before, and reports each as an error.
    pub(super) fn unique(&mut self, entries: Vec<(NodeId, NodeId)>) -> Vec<(NodeId, NodeId)> {
        let mut repeated = Vec::new();
        if entries.len() <= 16 {
            for (position, (key, _)) in entries.iter().enumerate() {
                let first = entries[..position].iter().find(|(other, _)| self.key(*other) == self.key(*key));
                repeated.extend(first.map(|(first, _)| (position, *first)));
            }
        } else {
            let mut seen = HashMap::with_capacity(entries.len());
            for (position, (key, _)) in entries.iter().enumerate() {
                match seen.entry(self.key(*key)) {
                    std::collections::hash_map::Entry::Occupied(first) => {
                        repeated.push((position, *first.get()));
                    }
                    std::collections::hash_map::Entry::Vacant(free) => {
                        free.insert(*key);
                    }
                }
            }
        }
        if repeated.is_empty() {
            return entries;
        }
        for (position, first) in &repeated {
            let key = entries[*position].0;
            let name: String = self.key_text(key).chars().take(80).collect();
            let span = self.nodes[key as usize].span;
            let Span { line, column, .. } = self.nodes[*first as usize].span;
            let message = format!(
                "expected a unique key, but found `{name}` again; the first is at line \
                 {line}, column {column}"
            );
            self.report_key("duplicate-key", Some(key), span, message, Some("remove one of them"));
        }
        let duplicates: HashSet<usize> = repeated.into_iter().map(|(position, _)| position).collect();
        let keep = |(position, entry)| (!duplicates.contains(&position)).then_some(entry);
        entries.into_iter().enumerate().filter_map(keep).collect()
    }

    fn key(&self, id: NodeId) -> Key<'_> {
        match &self.follow(id).kind {
            Kind::Scalar(_, Value::Null) => Key::Null,
            Kind::Scalar(_, Value::Bool(value)) => Key::Bool(*value),
            Kind::Scalar(_, Value::Int(value)) => Key::Number(i128::from(*value)),
            Kind::Scalar(_, Value::Unsigned(value)) => Key::Number(i128::from(*value)),
            // Zero and negative zero are the same key.
            Kind::Scalar(_, Value::Float(value)) => Key::Float((value + 0.0).to_bits()),
            _ => Key::Text(self.key_text(id)),
        }
    }
}

/// The value of a key, for comparison with other keys.
#[derive(PartialEq, Eq, Hash)]
enum Key<'a> {
    Null,
    Bool(bool),
    Number(i128),
    Float(u64),
    Text(&'a str),
}
