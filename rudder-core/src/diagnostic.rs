//! One finding about a manifest: what, where, how bad, and how to mend it. Returned, never printed.

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
            path: bounded(path.to_string()),
            span,
            message: bounded(redact_urls(&message.into()).into_owned()),
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

/// Characters of a message; what a message repeats is cut before, so that this is seldom reached.
const MAX_MESSAGE: usize = 2000;

fn bounded(text: String) -> String {
    match cut(&text, MAX_MESSAGE) {
        Some(start) => format!("{start}…"),
        None => text,
    }
}

/// How many findings are given about a file; behind them, one says how many more there are.
pub const MAX_FINDINGS: usize = 1000;

/// Leaves out what is beyond [`MAX_FINDINGS`] of findings in order, warnings first, and says so; `more` were left out before.
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
        0 => "there is more wrong than is shown here".to_owned(),
        1 => "and 1 more, which is not shown".to_owned(),
        more => format!("and {more} more, which are not shown"),
    };
    let severity = if errors > 0 { Severity::Error } else { Severity::Warning };
    diagnostics.push(Diagnostic::new(severity, CODE, "", None, message));
}

/// Puts findings into the order of the text, and leaves out what was said before.
pub fn sort(diagnostics: &mut Vec<Diagnostic>) {
    // Those without a place come first; the order of equal ones stays. That there are more comes last.
    diagnostics.sort_by_key(|diagnostic| {
        (diagnostic.code == "too-many", diagnostic.span.map(|span| (span.start, span.end)))
    });
    let mut seen = std::collections::HashSet::new();
    diagnostics.retain(|diagnostic| {
        let Diagnostic { code, path, span, message, .. } = diagnostic;
        // A value behind an alias is found at each place that uses it, but stands at one.
        let path = if span.is_some() { String::new() } else { path.clone() };
        seen.insert((span.map(|span| (span.start, span.end)), code.clone(), message.clone(), path))
    });
}
