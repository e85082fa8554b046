//! Deserialises a tree with serde, without stopping at the first mistake.
//!
//! If a value does not have the expected type, the mistake is recorded and a placeholder of the correct type is passed
//! on, so that one pass finds all mistakes. If there were any, further passes leave the refused values out. Elements of
//! lists keep their placeholder, so that the indices of the others do not change.

use super::{Kind, MAX_FINDINGS, NodeId, Tree, Value, trap};
use crate::{
    diagnostic::{Diagnostic, is_secret_key},
    manifest::{
        path::{PathSegment, write_segments},
        scalar::SCALAR,
        step::LINES,
    },
    visible::cut,
};
use serde::de::{self, DeserializeSeed, MapAccess, SeqAccess, Visitor};
use std::{cell::RefCell, fmt};

/// Maximum number of passes, since mistakes that only the type itself detects are found one per pass.
const MAX_PASSES: usize = 16;

/// Deserialises a node, without the entry `skip` if it is a mapping. What cannot be read is reported and pruned in the
/// tree.
pub(in crate::manifest) fn read<T: Default + for<'de> de::Deserialize<'de>>(
    tree: &mut Tree,
    prefix: &[&str],
    node: NodeId,
    skip: Option<&str>,
    diagnostics: &mut Vec<Diagnostic>,
) -> T {
    for _ in 0..MAX_PASSES {
        let context = Context {
            tree,
            skip: skip.map(|key| (node, key)),
            path: RefCell::new(prefix.iter().map(|key| Step::Name(key)).collect()),
            refused: RefCell::default(),
        };
        let result = T::deserialize(Reader { context: &context, node });
        let mut refused = context.refused.into_inner();
        let value = result.map_err(|DeError { node: failed, path, message }| {
            refused.push(Refused { node: failed.unwrap_or(node), path, message, help: None });
        });
        let mut is_new = false;
        for Refused { node, path, message, help } in refused {
            // An element of a list is seen again in the next pass, and a value behind an alias at each use.
            if tree.is_pruned(node) {
                continue;
            }
            is_new = true;
            if diagnostics.len() < MAX_FINDINGS {
                let span = tree.node(node).span;
                let mut diagnostic = Diagnostic::error("wrong-type", path, Some(span), message);
                diagnostic.help = help;
                diagnostics.push(diagnostic);
            }
            tree.nodes[node as usize].pruned = true;
        }
        match value {
            Ok(value) if !is_new => return value,
            Err(()) if !is_new => break,
            _ => {}
        }
    }
    T::default()
}

struct Context<'t> {
    tree: &'t Tree,
    /// An entry of a mapping that is read separately.
    skip: Option<(NodeId, &'t str)>,
    path: RefCell<Vec<Step<'t>>>,
    refused: RefCell<Vec<Refused>>,
}

#[derive(Clone, Copy)]
enum Step<'t> {
    Name(&'t str),
    Index(usize),
}

struct Refused {
    node: NodeId,
    path: String,
    message: String,
    help: Option<String>,
}

impl Context<'_> {
    fn path(&self) -> String {
        let segments: Vec<_> = self
            .path
            .borrow()
            .iter()
            .map(|step| match step {
                Step::Name(key) => PathSegment::Key(key),
                Step::Index(index) => PathSegment::Index(*index),
            })
            .collect();
        let mut path = String::new();
        // Writing to a `String` does not fail.
        let _ = write_segments(&segments, &mut path);
        path
    }
}

/// A mistake detected by the type itself, which ends the pass. Any other mistake is recorded, and the pass continues.
#[derive(Debug)]
pub(super) struct DeError {
    node: Option<NodeId>,
    path: String,
    message: String,
}

impl fmt::Display for DeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for DeError {}

impl de::Error for DeError {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self { node: None, path: String::new(), message: message.to_string() }
    }
}

#[derive(Clone, Copy)]
struct Reader<'c, 't> {
    context: &'c Context<'t>,
    node: NodeId,
}

impl<'t> Reader<'_, 't> {
    fn kind(&self) -> &'t Kind {
        let tree = self.context.tree;
        &tree.node(tree.follow(self.node)).kind
    }

    fn found(&self) -> String {
        // Values of fields that hold secrets are not quoted.
        let is_secret = self.is_secret();
        let what = match self.kind() {
            Kind::Scalar(_, Value::Null) => return "nothing".to_owned(),
            Kind::Scalar(_, Value::Bool(value)) => return value.to_string(),
            Kind::Scalar(_, Value::Int(_) | Value::Unsigned(_)) => "the integer",
            Kind::Scalar(_, Value::Float(_)) => "the number",
            Kind::Scalar(_, Value::Text | Value::Merge) => "the text",
            Kind::Sequence(_) => return "a list".to_owned(),
            Kind::Mapping(_) | Kind::Alias(_) => return "a mapping".to_owned(),
        };
        let text = self.context.tree.scalar_text(self.node).unwrap_or_default();
        // `sshPassword:hunter2` without a space is text.
        if is_secret || text.split_once(':').is_some_and(|(key, _)| is_secret_key(key)) {
            what.replace("the ", if what.ends_with("integer") { "an " } else { "a " })
        } else if matches!(self.kind(), Kind::Scalar(_, Value::Text | Value::Merge)) {
            format!("{what} {}", quoted(text))
        } else {
            format!("{what} {}", cut(text, 60).unwrap_or(text))
        }
    }

    /// Whether the value, or one that contains it, must not be shown.
    fn is_secret(&self) -> bool {
        let path = self.context.path.borrow();
        path.iter().any(|step| matches!(step, Step::Name(key) if is_secret_key(key)))
    }

    /// Returns the first line of the value as written.
    fn written(&self) -> &'t str {
        let tree = self.context.tree;
        let span = tree.node(tree.follow(self.node)).span;
        // If this is a block mapping, the line may end with a colon that belongs to the text the author meant.
        let is_flow = tree.source[span.start..].starts_with(['[', '{']);
        let end = if is_flow { span.end } else { tree.source.len() };
        let rest = tree.source.get(span.start..end).unwrap_or_default();
        let rest = cut(rest, 500).unwrap_or(rest);
        rest.lines().next().unwrap_or_default()
    }

    /// Records that another type was expected here.
    fn refuse(&self, expected: &str) {
        let text = self.context.tree.scalar_text(self.node).unwrap_or_default();
        let short = text.len() <= 60 && !text.contains('\n');
        let help = match (expected, self.kind()) {
            ("text", Kind::Scalar(_, Value::Null)) => {
                Some("write empty text as `\"\"`; put text that begins with `#` in quotes".to_owned())
            }
            ("text" | "text or a list of lines", Kind::Mapping(_) | Kind::Sequence(_)) => {
                match self.is_secret() {
                    true => Some("put the whole value in quotes".to_owned()),
                    false => Some(trap::about_value(self.written())),
                }
            }
            ("a mapping", Kind::Scalar(_, Value::Text)) => trap::add_missing_space(text),
            ("an integer", Kind::Scalar(_, Value::Text))
                if text.starts_with('0')
                    && text.len() <= 20
                    && text.bytes().all(|byte| byte.is_ascii_digit()) =>
            {
                let number = text.trim_start_matches('0');
                Some(format!(
                    "write it without leading zeros: {}",
                    if number.is_empty() { "0" } else { number }
                ))
            }
            ("text", Kind::Scalar(..)) => Some("write it in quotes: ".to_owned()),
            ("an integer", Kind::Scalar(_, Value::Text))
                if matches!(super::scalar::resolve(text), Value::Int(_)) =>
            {
                Some(format!("write it without quotes: {text}"))
            }
            ("`true` or `false`", Kind::Scalar(_, Value::Text)) => match text.to_ascii_lowercase().as_str() {
                "true" | "yes" | "on" | "y" => Some("write `true`, without quotes".to_owned()),
                "false" | "no" | "off" | "n" => Some("write `false`, without quotes".to_owned()),
                _ => None,
            },
            ("a list", Kind::Mapping(_)) => Some("begin each element with `- `".to_owned()),
            ("a list", Kind::Scalar(..)) if short => {
                Some("write it as a list, even if it has only one element: `- …`".to_owned())
            }
            _ => None,
        };
        let is_secret = self.is_secret();
        let help = help.map(|help| match help.strip_suffix("quotes: ") {
            Some(start) if is_secret || !short => format!("{start}quotes"),
            Some(_) => format!("{help}\"{text}\""),
            None => help,
        });
        let message = format!("expected {expected}, but found {}", self.found());
        let (node, path) = (self.node, self.context.path());
        self.context.refused.borrow_mut().push(Refused { node, path, message, help });
    }
}

fn quoted(text: &str) -> String {
    let short: String = text.chars().take(60).collect();
    format!("{short:?}{}", if short.len() < text.len() { "…" } else { "" })
}

struct Nothing;

impl<'de> SeqAccess<'de> for Nothing {
    type Error = DeError;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, _: T) -> Result<Option<T::Value>, DeError> {
        Ok(None)
    }
}

impl<'de> MapAccess<'de> for Nothing {
    type Error = DeError;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, _: K) -> Result<Option<K::Value>, DeError> {
        Ok(None)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, _: V) -> Result<V::Value, DeError> {
        Err(de::Error::custom("a value without a key"))
    }
}

struct Items<'c, 't> {
    context: &'c Context<'t>,
    items: std::iter::Enumerate<std::slice::Iter<'t, NodeId>>,
}

impl<'de> SeqAccess<'de> for Items<'_, 'de> {
    type Error = DeError;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, DeError> {
        let Some((index, node)) = self.items.next() else { return Ok(None) };
        self.context.value(Step::Index(index), *node, seed).map(Some)
    }

    fn size_hint(&self) -> Option<usize> {
        // The size of the elements is not known here, and there may be many, all of them wrong.
        Some(self.items.len().min(64))
    }
}

struct Entries<'c, 't> {
    context: &'c Context<'t>,
    skip: Option<&'t str>,
    entries: std::slice::Iter<'t, (NodeId, NodeId)>,
    value: Option<(NodeId, NodeId)>,
}

impl<'de> MapAccess<'de> for Entries<'_, 'de> {
    type Error = DeError;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, DeError> {
        let tree = self.context.tree;
        let entry = self.entries.by_ref().find(|(key, value)| {
            !tree.is_pruned(*value) && (self.skip.is_none() || self.skip != tree.scalar_text(*key))
        });
        self.value = entry.copied();
        let Some((node, _)) = self.value else { return Ok(None) };
        seed.deserialize(Reader { context: self.context, node }).map(Some)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, DeError> {
        let Some((key, value)) = self.value.take() else {
            return Err(de::Error::custom("a value without a key"));
        };
        let name = self.context.tree.scalar_text(key).unwrap_or("?");
        self.context.value(Step::Name(name), value, seed)
    }
}

impl<'t> Context<'t> {
    fn value<V: DeserializeSeed<'t>>(
        &self,
        step: Step<'t>,
        node: NodeId,
        seed: V,
    ) -> Result<V::Value, DeError> {
        self.path.borrow_mut().push(step);
        let result = seed.deserialize(Reader { context: self, node }).map_err(|mut error| {
            if error.node.is_none() {
                error.node = Some(node);
                error.path = self.path();
            }
            error
        });
        self.path.borrow_mut().pop();
        result
    }
}

/// All integer widths behave the same, and serde checks the range.
macro_rules! integers {
    ($($method:ident)*) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DeError> {
            match self.kind() {
                Kind::Scalar(_, Value::Int(value)) => visitor.visit_i64(*value),
                _ => {
                    self.refuse("an integer");
                    visitor.visit_i64(0)
                }
            }
        }
    )*};
}

impl<'de> de::Deserializer<'de> for Reader<'_, 'de> {
    type Error = DeError;

    integers! { deserialize_i8 deserialize_i16 deserialize_i32 deserialize_i64 deserialize_u8 deserialize_u16 deserialize_u32 deserialize_u64 }

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DeError> {
        let tree = self.context.tree;
        let context = self.context;
        match self.kind() {
            Kind::Scalar(_, Value::Null) => visitor.visit_unit(),
            Kind::Scalar(_, Value::Bool(value)) => visitor.visit_bool(*value),
            Kind::Scalar(_, Value::Int(value)) => visitor.visit_i64(*value),
            Kind::Scalar(_, Value::Unsigned(value)) => visitor.visit_u64(*value),
            Kind::Scalar(_, Value::Float(value)) => visitor.visit_f64(*value),
            Kind::Scalar(text, Value::Text | Value::Merge) => visitor.visit_borrowed_str(tree.text(text)),
            Kind::Sequence(items) => visitor.visit_seq(Items { context, items: items.iter().enumerate() }),
            Kind::Mapping(entries) => {
                let skip = context.skip.filter(|(node, _)| *node == self.node).map(|(_, key)| key);
                visitor.visit_map(Entries { context, skip, entries: entries.iter(), value: None })
            }
            // `kind` follows aliases, and an alias never refers to another alias.
            Kind::Alias(_) => visitor.visit_unit(),
        }
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DeError> {
        if let Kind::Scalar(_, Value::Bool(value)) = self.kind() {
            return visitor.visit_bool(*value);
        }
        self.refuse("`true` or `false`");
        visitor.visit_bool(false)
    }

    fn deserialize_f32<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DeError> {
        self.deserialize_f64(visitor)
    }

    fn deserialize_f64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DeError> {
        if let Kind::Scalar(_, Value::Int(_) | Value::Unsigned(_) | Value::Float(_)) = self.kind() {
            return self.deserialize_any(visitor);
        }
        self.refuse("a number");
        visitor.visit_f64(0.0)
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DeError> {
        if let Kind::Scalar(text, Value::Text | Value::Merge) = self.kind() {
            return visitor.visit_borrowed_str(self.context.tree.text(text));
        }
        self.refuse("text");
        visitor.visit_str("")
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DeError> {
        self.deserialize_str(visitor)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DeError> {
        if self.context.tree.is_null(self.node) { visitor.visit_none() } else { visitor.visit_some(self) }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        visitor: V,
    ) -> Result<V::Value, DeError> {
        let (expected, fits) = match name {
            SCALAR => (
                "text or a number",
                matches!(
                    self.kind(),
                    Kind::Scalar(_, Value::Text | Value::Merge | Value::Int(_) | Value::Float(_))
                ),
            ),
            LINES => (
                "text or a list of lines",
                matches!(self.kind(), Kind::Scalar(_, Value::Text | Value::Merge) | Kind::Sequence(_)),
            ),
            _ => return visitor.visit_newtype_struct(self),
        };
        match self.kind() {
            // The number as written is more precise than the nearest float.
            Kind::Scalar(text, Value::Unsigned(_)) if name == SCALAR => {
                visitor.visit_borrowed_str(self.context.tree.text(text))
            }
            _ if fits => self.deserialize_any(visitor),
            _ => {
                self.refuse(expected);
                visitor.visit_str("")
            }
        }
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DeError> {
        match self.kind() {
            Kind::Sequence(_) => self.deserialize_any(visitor),
            // An empty key, for example before a list that was commented out.
            Kind::Scalar(_, Value::Null) => visitor.visit_seq(Nothing),
            _ => {
                self.refuse("a list");
                visitor.visit_seq(Nothing)
            }
        }
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DeError> {
        if let Kind::Mapping(_) = self.kind() {
            return self.deserialize_any(visitor);
        }
        self.refuse("a mapping");
        visitor.visit_map(Nothing)
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, DeError> {
        self.deserialize_map(visitor)
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DeError> {
        visitor.visit_unit()
    }

    serde::forward_to_deserialize_any! {
        i128 u128 char bytes byte_buf unit unit_struct tuple tuple_struct enum identifier
    }
}
