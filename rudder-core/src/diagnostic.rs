//! Findings about a manifest: what is wrong, where, how serious it is, and how to fix it. They are returned, never
//! printed.

mod redact;
mod render;

pub(crate) use redact::is_secret_key;
pub use render::{Colour, Renderer, render};

use crate::{secret::redact_urls, visible::cut};
use serde::{Deserialize, Serialize};
use std::fmt;

/// Whether a finding stops the build.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// The manifest can be built, but its author should know about this.
    Warning,
    /// The manifest is refused.
    Error,
}

/// A span of the source text. Lines and columns are counted from 1, columns in characters; offsets are in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Span {
    /// Line of the first character.
    pub line: u32,
    /// Column of the first character.
    pub column: u32,
    /// Byte offset of the first character.
    pub start: usize,
    /// Byte offset just past the last character.
    pub end: usize,
}

/// A finding about a manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Diagnostic {
    /// Stable name of the rule, in kebab-case: `duplicate-name`.
    pub code: String,
    /// Whether the finding stops the build.
    pub severity: Severity,
    /// Path of the value: `spec.vms[0].disks[1].size`; empty for the document.
    pub path: String,
    /// Location in the source; `None` for a manifest that was made by a program.
    #[serde(flatten)]
    pub span: Option<Span>,
    /// What is wrong, with the relevant values.
    pub message: String,
    /// How to fix it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub help: Option<String>,
}

impl Diagnostic {
    /// Creates a finding that refuses the manifest.
    pub fn error(
        code: &str,
        path: impl fmt::Display,
        span: Option<Span>,
        message: impl Into<String>,
    ) -> Self {
        Self::new(Severity::Error, code, path, span, message)
    }

    /// Creates a finding that does not refuse the manifest.
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
            path: bounded(path.to_string()),
            span,
            message: bounded(redact_urls(&message.into()).into_owned()),
            help: None,
        }
    }

    /// Sets the help, which says how to fix the problem.
    #[must_use]
    pub fn with_help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    /// Whether the finding stops the build.
    #[must_use]
    pub fn is_error(&self) -> bool {
        self.severity == Severity::Error
    }
}

/// Maximum length of a message, in characters. Quoted values are shortened before, so this is seldom reached.
const MAX_MESSAGE: usize = 2000;

fn bounded(text: String) -> String {
    match cut(&text, MAX_MESSAGE) {
        Some(start) => format!("{start}…"),
        None => text,
    }
}

/// Maximum number of findings reported about a file; one more at the end counts the rest.
pub const MAX_FINDINGS: usize = 1000;

/// Cuts findings to [`MAX_FINDINGS`], removing warnings first, and adds one that counts those removed; `more` were
/// removed before.
pub(crate) fn limit(diagnostics: &mut Vec<Diagnostic>, more: usize) {
    const CODE: &str = "too-many";
    let said = diagnostics.iter().any(|diagnostic| diagnostic.code == CODE);
    if diagnostics.len() <= MAX_FINDINGS + usize::from(said) && more == 0 {
        return;
    }
    let errors = diagnostics.iter().filter(|diagnostic| diagnostic.is_error()).count();
    diagnostics.retain(|diagnostic| diagnostic.code != CODE);
    let (mut errors_left, mut warnings_left) = (MAX_FINDINGS, MAX_FINDINGS.saturating_sub(errors));
    let before = diagnostics.len();
    diagnostics.retain(|diagnostic| {
        let left = if diagnostic.is_error() { &mut errors_left } else { &mut warnings_left };
        let keep = *left > 0;
        *left = left.saturating_sub(1);
        keep
    });
    let more = more + before - diagnostics.len();
    let message = match more {
        0 => "there are more findings than are shown here".to_owned(),
        1 => "and 1 more, which is not shown".to_owned(),
        more => format!("and {more} more, which are not shown"),
    };
    let severity = if errors > 0 { Severity::Error } else { Severity::Warning };
    diagnostics.push(Diagnostic::new(severity, CODE, "", None, message));
}

/// Sorts findings into source order, and removes duplicates.
pub fn sort(diagnostics: &mut Vec<Diagnostic>) {
    // Findings without a location come first, and the count of omitted findings last; equal ones keep their order.
    diagnostics.sort_by_key(|diagnostic| {
        (diagnostic.code == "too-many", diagnostic.span.map(|span| (span.start, span.end)))
    });
    let mut seen = std::collections::HashSet::new();
    diagnostics.retain(|diagnostic| {
        let Diagnostic { code, path, span, message, .. } = diagnostic;
        // A finding about a value behind an alias is made for each use of the alias, but all have the same location.
        let path = if span.is_some() { String::new() } else { path.clone() };
        seen.insert((span.map(|span| (span.start, span.end)), code.clone(), message.clone(), path))
    });
}
