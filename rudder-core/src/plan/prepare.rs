//! Turns the bytes of a manifest file into plans, in one call.

use super::{Plan, PlanContext, plan};
use crate::{
    Error, ErrorKind, Result,
    check::codes,
    diagnostic::{self, Diagnostic, MAX_FINDINGS, Severity, limit},
    error::Detail,
    manifest::{ValuePath, parse_with},
    visible::Quoted,
};
use std::{collections::HashSet, fmt};

/// The plans of a manifest file, and all findings about it.
#[derive(Clone)]
#[non_exhaustive]
pub struct Prepared {
    /// A plan for each document, in order; empty when any diagnostic is an error.
    pub plans: Vec<Plan>,
    /// All findings, in source order.
    pub diagnostics: Vec<Diagnostic>,
    source_name: String,
    text: String,
}

/// Parses, checks and plans every document of a manifest file. `source_name` is the name of the file; it provides the
/// name of a build that has none of its own, and is shown with the findings. The file itself is not read.
#[must_use]
pub fn prepare(source_name: &str, bytes: &[u8], context: &PlanContext) -> Prepared {
    let parsed = parse_with(source_name, bytes, context.unknown_keys);
    let mut diagnostics = parsed.diagnostics;
    let mut plans = Vec::with_capacity(parsed.documents.len());
    let mut names = HashSet::new();
    for document in &parsed.documents {
        let planned = plan(document, context);
        diagnostics.extend(planned.diagnostics);
        if diagnostics.len() > 4 * MAX_FINDINGS {
            limit(&mut diagnostics, 0);
        }
        let Some(plan) = planned.plan else { continue };
        if !names.insert(plan.name.clone()) {
            let code = codes::DUPLICATE_NAME;
            let root = ValuePath::root();
            let message = format!(
                "expected a unique name for each build in a file, but found {:?} again",
                Quoted(&plan.name)
            );
            let finding = Diagnostic::error(code.name, root, document.locate(root), message);
            diagnostics.push(finding.with_help("write `name:`, or `metadata.name` in the resource form"));
        }
        plans.push(plan);
    }
    diagnostic::sort(&mut diagnostics);
    limit(&mut diagnostics, 0);
    if diagnostics.iter().any(Diagnostic::is_error) {
        plans.clear();
    }
    let text = String::from_utf8_lossy(bytes).into_owned();
    Prepared { plans, diagnostics, source_name: source_name.to_owned(), text }
}

impl fmt::Debug for Prepared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Prepared")
            .field("plans", &self.plans)
            .field("diagnostics", &self.diagnostics)
            .field("source_name", &self.source_name)
            .finish_non_exhaustive()
    }
}

impl Prepared {
    /// Whether any finding is an error, which refuses the manifest.
    #[must_use]
    pub fn has_errors(&self) -> bool {
        self.diagnostics.iter().any(Diagnostic::is_error)
    }

    /// Returns the findings that do not refuse the manifest.
    pub fn warnings(&self) -> impl Iterator<Item = &Diagnostic> {
        self.diagnostics.iter().filter(|diagnostic| diagnostic.severity == Severity::Warning)
    }

    /// Renders all findings as text, each with its excerpt of the source.
    #[must_use]
    pub fn render(&self) -> String {
        diagnostic::render(&self.diagnostics, &self.source_name, &self.text)
    }

    /// Renders the warnings about a manifest that is not refused; empty if there are none. Warnings about a refused
    /// manifest are reported with its errors: see [`into_plans`](Self::into_plans).
    #[must_use]
    pub fn render_warnings(&self) -> String {
        if self.has_errors() { String::new() } else { self.render() }
    }

    /// Returns the plans.
    ///
    /// # Errors
    /// `InvalidInput`, with all findings rendered, when one of them refuses the manifest. [`Error::diagnostics`] returns
    /// them.
    pub fn into_plans(self) -> Result<Vec<Plan>> {
        if self.has_errors() {
            let count = self.diagnostics.iter().filter(|diagnostic| diagnostic.is_error()).count();
            let what = if count == 1 { "1 error" } else { &format!("{count} errors") };
            let message = format!("{} has {what}\n{}", self.source_name, self.render());
            let error = Error::new(ErrorKind::InvalidInput, message.trim_end().to_owned());
            return Err(error.with_detail(Findings(self.diagnostics)));
        }
        Ok(self.plans)
    }
}

/// What the error of a refused manifest carries.
#[derive(Debug)]
struct Findings(Vec<Diagnostic>);

impl Detail for Findings {}

impl Error {
    /// Returns the findings about the manifest, in source order, if this is the error of a refused manifest
    /// ([`Prepared::into_plans`]) or was caused by one; otherwise none.
    #[must_use]
    pub fn diagnostics(&self) -> &[Diagnostic] {
        self.detail().map_or(&[], |Findings(diagnostics)| diagnostics)
    }
}
