//! One finding about a manifest: what, where, how bad, and how to mend it. Returned, never printed.

mod render;

pub use render::{Colour, Renderer, render};

use serde::{Deserialize, Serialize};
use std::fmt;

/// Whether a finding stops the build.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// The manifest builds, but its author should know.
    Warning,
    /// The manifest is refused.
    Error,
}

/// A place in the source text. Lines and columns count from 1, columns in characters; offsets in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Span {
    /// Line of the first character.
    pub line: u32,
    /// Column of the first character.
    pub column: u32,
    /// Byte offset of the first character.
    pub start: usize,
    /// Byte offset behind the last character.
    pub end: usize,
}

/// One finding about a manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Diagnostic {
    /// A stable name of the rule, in kebab-case: `duplicate-name`.
    pub code: String,
    /// Whether it stops the build.
    pub severity: Severity,
    /// The path of the value: `spec.vms[0].disks[1].size`; empty for the document.
    pub path: String,
    /// Where it stands; `None` for a manifest that was made by a program.
    #[serde(flatten)]
    pub span: Option<Span>,
    /// What is wrong, with the values that matter.
    pub message: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub help: Option<String>,
}

impl Diagnostic {
    /// A finding that refuses the manifest.
    pub fn error(
        code: &str,
        path: impl fmt::Display,
        span: Option<Span>,
        message: impl Into<String>,
    ) -> Self {
        Self::new(Severity::Error, code, path, span, message)
    }

    /// A finding that the author should know.
    pub fn warning(
        code: &str,
        path: impl fmt::Display,
        span: Option<Span>,
        message: impl Into<String>,
    ) -> Self {
        Self::new(Severity::Warning, code, path, span, message)
    }

    fn new(
        severity: Severity,
        code: &str,
        path: impl fmt::Display,
        span: Option<Span>,
        message: impl Into<String>,
    ) -> Self {
        Self {
            code: code.to_owned(),
            severity,
            path: path.to_string(),
            span,
            message: message.into(),
            help: None,
        }
    }

    /// Says what to do about it.
    #[must_use]
    pub fn with_help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    /// Whether it stops the build.
    #[must_use]
    pub fn is_error(&self) -> bool {
        self.severity == Severity::Error
    }
}

/// Puts findings into the order of the text, and leaves out what was said before.
pub fn sort(diagnostics: &mut Vec<Diagnostic>) {
    // Those without a place come first; the order of equal ones stays.
    diagnostics.sort_by_key(|diagnostic| diagnostic.span.map(|span| (span.start, span.end)));
    let mut seen = std::collections::HashSet::new();
    diagnostics.retain(|diagnostic| {
        let Diagnostic { code, path, span, message, .. } = diagnostic;
        // A value behind an alias is found at each place that uses it, but stands at one.
        let path = if span.is_some() { String::new() } else { path.clone() };
        seen.insert((span.map(|span| (span.start, span.end)), code.clone(), message.clone(), path))
    });
}
