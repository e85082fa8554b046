//! Reads bytes to trees: encoding, syntax, anchors, tags, merge keys, duplicate keys, and the limits.

use super::{
    Kind, MAX_DEPTH, MAX_DOCUMENTS, MAX_FINDINGS, MAX_NODES, MAX_WEIGHT, Node, NodeId, Text, Tree, Value,
    decode::decode, number, scalar::resolve, trap,
};
use crate::{
    diagnostic::{Diagnostic, Span},
    manifest::path::{PathSegment, write_segments},
    visible::cut,
};
use granit_parser::{ErrorKind, Event, Parser, ScalarStyle, Tag};
use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

/// Weight of a mapping without its entries: about the size of the largest struct of a manifest.
const MAPPING_WEIGHT: u64 = 1024;
const NODE_WEIGHT: u64 = 64;

/// The result of reading a file.
pub(in crate::manifest) struct Read {
    pub(in crate::manifest) trees: Vec<Tree>,
    pub(in crate::manifest) diagnostics: Vec<Diagnostic>,
}

/// Reads all documents of a file.
pub(in crate::manifest) fn read(bytes: &[u8]) -> Read {
    let mut diagnostics = Vec::new();
    let trees = match decode(bytes) {
        Ok(source) => {
            let mut reader = Reader::new(Arc::from(source));
            reader.run();
            diagnostics = reader.diagnostics;
            reader.trees
        }
        Err(diagnostic) => {
            diagnostics.push(*diagnostic);
            Vec::new()
        }
    };
    Read { trees, diagnostics }
}

/// A list or mapping that is still open.
struct Frame {
    span: Span,
    anchor: usize,
    pruned: bool,
    open: Open,
}

enum Open {
    Sequence(Vec<NodeId>),
    Mapping { entries: Vec<(NodeId, NodeId)>, key: Option<NodeId> },
}

/// How much of the rest is skipped: the rest of the document or of the file.
pub(super) enum Stop {
    Document,
    File,
}

pub(super) struct Reader {
    source: Arc<str>,
    /// Length of the byte order mark in bytes.
    skip: usize,
    trees: Vec<Tree>,
    diagnostics: Vec<Diagnostic>,
    pub(super) nodes: Vec<Node>,
    stack: Vec<Frame>,
    root: Option<NodeId>,
    anchors: HashMap<usize, NodeId>,
    /// Scalars with an anchor that no alias has referred to so far, by anchor, with their paths.
    unused_anchors: BTreeMap<usize, (Span, String)>,
    document_start: usize,
    documents: usize,
    /// Nodes and weight of the previous documents.
    pub(super) nodes_before: usize,
    weight_before: u64,
}

impl Reader {
    fn new(source: Arc<str>) -> Self {
        let skip = if source.starts_with('\u{feff}') { '\u{feff}'.len_utf8() } else { 0 };
        Self {
            source,
            skip,
            trees: Vec::new(),
            diagnostics: Vec::new(),
            nodes: Vec::new(),
            stack: Vec::new(),
            root: None,
            anchors: HashMap::new(),
            unused_anchors: BTreeMap::new(),
            document_start: 0,
            documents: 0,
            nodes_before: 0,
            weight_before: 0,
        }
    }

    fn run(&mut self) {
        let source = Arc::clone(&self.source);
        // The scanner counts lists and mappings separately, and looks ahead; here both are counted together.
        let options = granit_parser::options! {
            emit_unresolved_aliases: true,
            flow_nesting_limit: usize::from(MAX_DEPTH),
            block_nesting_limit: usize::from(MAX_DEPTH),
        };
        let mut parser = Parser::new_from_str_with_options(&source[self.skip..], options);
        while let Some(event) = parser.next_event() {
            let stop = match event {
                Ok((Event::StreamEnd, _)) => return,
                Ok((event, span)) => self.event(event, &span),
                Err(error) => {
                    self.syntax(&error);
                    Err(Stop::Document)
                }
            };
            match stop {
                Ok(()) => {}
                Err(Stop::Document) if self.diagnostics.len() < MAX_FINDINGS => {
                    self.abandon();
                    if !matches!(parser.proceed_next_document(), Ok(true)) {
                        return;
                    }
                }
                Err(_) => return,
            }
        }
    }

    fn event(&mut self, event: Event<'_>, span: &granit_parser::Span) -> Result<(), Stop> {
        let tag_span = span.tag_span().map(|tag| self.span(tag.start, tag.end));
        let span = self.span(span.start, span.end);
        let tag_span = tag_span.unwrap_or(span);
        match event {
            Event::DocumentStart(..) => {
                self.documents += 1;
                if self.documents > MAX_DOCUMENTS {
                    let message = format!(
                        "expected at most {MAX_DOCUMENTS} documents in a file, but found \
                         more"
                    );
                    self.report("too-large", span, message, Some("split the file"));
                    return Err(Stop::File);
                }
                Ok(())
            }
            Event::DocumentEnd => {
                self.finish(span.end);
                Ok(())
            }
            Event::Alias(anchor) => match self.anchors.get(&anchor) {
                Some(target) => {
                    self.unused_anchors.remove(&anchor);
                    let target = match self.nodes[*target as usize].kind {
                        Kind::Alias(further) => further,
                        _ => *target,
                    };
                    let Node { weight, height, .. } = self.nodes[target as usize];
                    self.add(span, Kind::Alias(target), weight, height, false, 0)
                }
                None => {
                    let message =
                        "expected a value, but found an alias inside the value that it refers to".to_owned();
                    self.report("yaml-alias", span, message, None);
                    self.add_absent(span)
                }
            },
            Event::UnresolvedAlias(name) => {
                let name: String = name.chars().take(80).collect();
                let message = format!("expected an anchor `&{name}` before this alias, but found none");
                let help = format!("put text that begins with `*` in quotes: '*{name}…'");
                self.report("yaml-alias", span, message, Some(&help));
                self.add_absent(span)
            }
            Event::Scalar(text, style, anchor, tag) => {
                let (value, known) = self.scalar_value(&text, style, tag.as_deref(), tag_span);
                let weight = NODE_WEIGHT + text.len() as u64;
                let text = self.keep(text);
                if anchor != 0 && self.unused_anchors.len() < MAX_FINDINGS {
                    self.unused_anchors.insert(anchor, (span, self.path(None)));
                }
                self.add(span, Kind::Scalar(text, value), weight, 0, !known, anchor)
            }
            Event::SequenceStart(_, anchor, tag) => {
                let pruned = !self.knows_tag(tag.as_deref(), "seq", tag_span);
                self.open(Frame { span, anchor, pruned, open: Open::Sequence(Vec::new()) })
            }
            Event::MappingStart(_, anchor, tag) => {
                let pruned = !self.knows_tag(tag.as_deref(), "map", tag_span);
                let open = Open::Mapping { entries: Vec::new(), key: None };
                self.open(Frame { span, anchor, pruned, open })
            }
            Event::SequenceEnd | Event::MappingEnd => self.close(span),
            _ => Ok(()),
        }
    }

    fn span(&self, start: granit_parser::Marker, end: granit_parser::Marker) -> Span {
        let start_byte = start.byte_offset().unwrap_or_default() + self.skip;
        let end_byte = end.byte_offset().unwrap_or_default() + self.skip;
        Span {
            line: number(start.line()),
            column: number(start.col() + 1),
            start: start_byte,
            end: end_byte.max(start_byte),
        }
    }

    fn syntax(&mut self, error: &granit_parser::ScanError) {
        let span = self.span(*error.marker(), *error.marker());
        if matches!(error.kind(), ErrorKind::RecursionLimitExceeded) {
            // The document ends here in any case.
            let _ = self.too_deep(span);
            return;
        }
        let path = self.path(None);
        let info = error.info();
        let info = cut(&info, 200).unwrap_or(&info);
        let mut diagnostic =
            Diagnostic::error("yaml-syntax", path, Some(span), format!("invalid YAML: {info}"));
        diagnostic.help = if info.contains("tab") {
            Some("indent with spaces: YAML does not allow tabs here".to_owned())
        } else {
            // The mistake may only be detected in the following line.
            trap::line_at(&self.source, span.start).and_then(trap::about_line).or_else(|| {
                let line = self.source[..span.start.min(self.source.len())].rfind('\n')?;
                let before = self.source[..line].trim_end().len();
                trap::line_at(&self.source, before).and_then(trap::about_line)
            })
        };
        self.diagnostics.push(diagnostic);
    }

    pub(super) fn report(&mut self, code: &str, span: Span, message: String, help: Option<&str>) {
        self.report_key(code, None, span, message, help);
    }

    pub(super) fn report_key(
        &mut self,
        code: &str,
        key: Option<NodeId>,
        span: Span,
        message: String,
        help: Option<&str>,
    ) {
        if self.diagnostics.len() < MAX_FINDINGS {
            let mut diagnostic = Diagnostic::error(code, self.path(key), Some(span), message);
            diagnostic.help = help.map(str::to_owned);
            self.diagnostics.push(diagnostic);
        }
    }

    /// Returns the path of the next node, or of this key in the mapping that was just closed.
    fn path(&self, key: Option<NodeId>) -> String {
        let mut segments = Vec::new();
        for frame in &self.stack {
            match &frame.open {
                Open::Sequence(items) => segments.push(PathSegment::Index(items.len())),
                Open::Mapping { key: Some(key), .. } => {
                    segments.push(PathSegment::Key(self.key_text(*key)));
                }
                Open::Mapping { key: None, .. } => {}
            }
        }
        segments.extend(key.map(|key| PathSegment::Key(self.key_text(key))));
        let mut path = String::new();
        // Writing to a `String` does not fail.
        let _ = write_segments(&segments, &mut path);
        path
    }

    pub(super) fn follow(&self, id: NodeId) -> &Node {
        match &self.nodes[id as usize] {
            Node { kind: Kind::Alias(target), .. } => &self.nodes[*target as usize],
            node => node,
        }
    }

    pub(super) fn key_text(&self, key: NodeId) -> &str {
        match &self.follow(key).kind {
            Kind::Scalar(Text::Source(start, end), _) => &self.source[*start as usize..*end as usize],
            Kind::Scalar(Text::Owned(text), _) => text,
            _ => "?",
        }
    }

    fn keep(&self, text: Cow<'_, str>) -> Text {
        // Text that the scanner did not change is a slice of the source.
        if let Cow::Borrowed(text) = text {
            let start = (text.as_ptr() as usize).wrapping_sub(self.source.as_ptr() as usize);
            if self.source.get(start..start.wrapping_add(text.len())) == Some(text) {
                return Text::Source(number(start), number(start + text.len()));
            }
            return Text::Owned(text.into());
        }
        Text::Owned(text.into_owned().into_boxed_str())
    }

    /// Returns the value of a scalar, and whether its tag is known and fits the text.
    fn scalar_value(
        &mut self,
        text: &str,
        style: ScalarStyle,
        tag: Option<&Tag>,
        span: Span,
    ) -> (Value, bool) {
        let plain = style == ScalarStyle::Plain;
        let Some(tag) = tag else {
            return (if plain { resolve(text) } else { Value::Text }, true);
        };
        let wanted = tag.core_suffix();
        let value = match (wanted, resolve(text)) {
            (Some("str"), _) => Some(Value::Text),
            (None, _) if tag.original() == "!" => Some(Value::Text),
            (Some("null"), value @ Value::Null)
            | (Some("bool"), value @ Value::Bool(_))
            | (Some("int"), value @ (Value::Int(_) | Value::Unsigned(_)))
            | (Some("float"), value @ Value::Float(_)) => Some(value),
            #[allow(clippy::cast_precision_loss)]
            (Some("float"), Value::Int(value)) => Some(Value::Float(value as f64)),
            _ => None,
        };
        if value.is_none() {
            self.unknown_tag(tag, span);
        }
        (value.unwrap_or(Value::Text), value.is_some())
    }

    fn unknown_tag(&mut self, tag: &Tag, span: Span) {
        let name: String = tag.original().chars().take(80).collect();
        let message = format!("expected a value that needs no tag, but found the tag `{name}`");
        self.report(
            "yaml-tag",
            span,
            message,
            Some("leave the tag out; put text that begins with `!` or looks like a number in quotes"),
        );
    }

    /// Whether a list or mapping has no tag, or the one that it has by default.
    fn knows_tag(&mut self, tag: Option<&Tag>, wanted: &str, span: Span) -> bool {
        match tag {
            Some(tag) if tag.core_suffix() != Some(wanted) && tag.original() != "!" => {
                self.unknown_tag(tag, span);
                false
            }
            _ => true,
        }
    }

    fn open(&mut self, frame: Frame) -> Result<(), Stop> {
        if self.stack.len() >= usize::from(MAX_DEPTH) {
            return self.too_deep(frame.span);
        }
        self.stack.push(frame);
        Ok(())
    }

    fn too_deep(&mut self, span: Span) -> Result<(), Stop> {
        let message =
            format!("expected at most {MAX_DEPTH} levels of nested lists and mappings, but found more");
        self.report("too-deep", span, message, None);
        Err(Stop::Document)
    }

    fn close(&mut self, end: Span) -> Result<(), Stop> {
        let Some(Frame { mut span, anchor, pruned, open }) = self.stack.pop() else { return Ok(()) };
        let is_flow = self.source[span.start..].starts_with(['[', '{']);
        let mut weight = NODE_WEIGHT;
        let mut height = 0;
        let mut last_end = span.start;
        let mut measure = |node: &Node| {
            weight = weight.saturating_add(node.weight);
            height = height.max(node.height);
            last_end = last_end.max(node.span.end);
        };
        let kind = match open {
            Open::Sequence(items) => {
                items.iter().for_each(|item| measure(&self.nodes[*item as usize]));
                Kind::Sequence(items.into())
            }
            Open::Mapping { entries, .. } => {
                let entries = self.merged(entries)?;
                let entries = self.unique(entries);
                entries.iter().for_each(|(key, value)| {
                    measure(&self.nodes[*key as usize]);
                    measure(&self.nodes[*value as usize]);
                });
                weight = weight.saturating_add(MAPPING_WEIGHT);
                Kind::Mapping(entries.into())
            }
        };
        span.end = if is_flow { end.end } else { last_end };
        self.add(span, kind, weight, height.saturating_add(1), pruned, anchor)
    }

    /// Adds a placeholder for a node that was refused and reported.
    fn add_absent(&mut self, span: Span) -> Result<(), Stop> {
        self.add(span, Kind::Scalar(Text::Owned("".into()), Value::Null), NODE_WEIGHT, 0, true, 0)
    }

    pub(super) fn check_size(&mut self, span: Span) -> Result<(), Stop> {
        let count = self.nodes_before + self.nodes.len();
        let weight = self.nodes.last().map_or(0, |node| node.weight);
        let message = if count > MAX_NODES {
            format!("expected at most {MAX_NODES} values in a file, but found more")
        } else if self.weight_before.saturating_add(weight) > MAX_WEIGHT {
            format!(
                "expected a manifest that takes at most {} MiB with its aliases expanded, but found more",
                MAX_WEIGHT >> 20
            )
        } else {
            return Ok(());
        };
        self.report("too-large", span, message, None);
        Err(Stop::File)
    }

    fn add(
        &mut self,
        span: Span,
        kind: Kind,
        weight: u64,
        height: u8,
        pruned: bool,
        anchor: usize,
    ) -> Result<(), Stop> {
        let id = number(self.nodes.len());
        self.nodes.push(Node { span, kind, weight, height, pruned });
        self.check_size(span)?;
        if self.stack.len() + usize::from(height) > usize::from(MAX_DEPTH) {
            return self.too_deep(span);
        }
        if anchor != 0 {
            self.anchors.insert(anchor, id);
        }
        let is_scalar = matches!(self.follow(id).kind, Kind::Scalar(..));
        match self.stack.last_mut().map(|frame| &mut frame.open) {
            None => self.root = Some(id),
            Some(Open::Sequence(items)) => items.push(id),
            Some(Open::Mapping { entries, key }) => match key.take() {
                Some(key) => {
                    if matches!(self.nodes[key as usize].kind, Kind::Scalar(..) | Kind::Alias(_)) {
                        entries.push((key, id));
                    }
                }
                None => {
                    *key = Some(id);
                    if !is_scalar {
                        let message = "expected a scalar as the key, but found a list or mapping".to_owned();
                        // Reported after the borrow of the frame has ended.
                        self.nodes[id as usize].kind = Kind::Sequence(Box::default());
                        let help =
                            match self.source.get(span.start..).is_some_and(|rest| rest.starts_with('{')) {
                                true => "put text that begins with `{` in quotes: '{{ … }}'",
                                false => "use text as the key",
                            };
                        self.report("yaml-key", span, message, Some(help));
                    }
                }
            },
        }
        Ok(())
    }

    /// Discards what was read of a document that cannot be read to its end.
    fn abandon(&mut self) {
        self.root = None;
        self.finish(self.document_start);
    }

    fn finish(&mut self, end: usize) {
        let nodes = std::mem::take(&mut self.nodes);
        self.nodes_before += nodes.len();
        self.stack.clear();
        self.anchors.clear();
        for (span, path) in std::mem::take(&mut self.unused_anchors).into_values() {
            if self.diagnostics.len() < MAX_FINDINGS {
                let message = "expected an alias that refers to this anchor, but found none: `&…` is not part of the \
                     value";
                let finding = Diagnostic::warning("unused-anchor", path, Some(span), message);
                self.diagnostics.push(finding.with_help("put text that begins with `&` in quotes"));
            }
        }
        if let Some(root) = self.root.take() {
            self.weight_before = self.weight_before.saturating_add(nodes[root as usize].weight);
            let range = (self.document_start, end);
            self.trees.push(Tree::new(Arc::clone(&self.source), nodes, root, range));
        }
        self.document_start = end;
    }
}
