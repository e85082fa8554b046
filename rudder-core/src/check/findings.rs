//! Collects findings, and parses the scalars that several subjects share.

use super::codes::{self, Code};
use crate::{
    diagnostic::{self, Diagnostic},
    manifest::{Document, Manifest, Scalar, ValuePath},
    units::{ParseError, Quantity, is_name, parse_duration},
    visible::Quoted,
};
use std::{collections::HashMap, time::Duration};

/// The findings about one document.
#[derive(Debug)]
pub(crate) struct Findings<'d> {
    document: &'d Document,
    found: Vec<Diagnostic>,
    /// Number of findings beyond the limit, and the last of them.
    more: usize,
    last: Option<Diagnostic>,
    has_errors: bool,
    /// Number of comparisons left for suggestions.
    comparisons: usize,
}

/// Maximum number of comparisons for all suggestions about a document. Without it, a long list of names and as many
/// references to unknown names would take quadratic time.
const MAX_COMPARISONS: usize = 100_000;

impl<'d> Findings<'d> {
    pub(crate) fn new(document: &'d Document) -> Self {
        Self {
            document,
            found: Vec::new(),
            more: 0,
            last: None,
            has_errors: false,
            comparisons: MAX_COMPARISONS,
        }
    }

    pub(crate) fn document(&self) -> &'d Document {
        self.document
    }

    pub(crate) fn manifest(&self) -> &'d Manifest {
        self.document.manifest()
    }

    pub(crate) fn has_errors(&self) -> bool {
        self.has_errors
    }

    /// Returns all findings in source order, without duplicates.
    pub(crate) fn finish(mut self) -> Vec<Diagnostic> {
        diagnostic::sort(&mut self.found);
        diagnostic::limit(&mut self.found, self.more);
        self.found
    }

    /// Adds a finding at a value. If the value has no location, the nearest parent that has one is used.
    pub(crate) fn report(
        &mut self,
        code: &Code,
        at: &ValuePath<'_>,
        message: impl Into<String>,
    ) -> &mut Diagnostic {
        let is_error = code.severity == diagnostic::Severity::Error;
        // The first error is kept no matter how many warnings came before it.
        let is_first_error = is_error && !self.has_errors;
        self.has_errors |= is_error;
        if self.found.len() >= diagnostic::MAX_FINDINGS && !is_first_error {
            self.more += 1;
            return self.last.insert(Diagnostic::error(code.name, "", None, ""));
        }
        let span = self.document.locate_nearest(at);
        let make = match code.severity {
            diagnostic::Severity::Error => Diagnostic::error,
            diagnostic::Severity::Warning => Diagnostic::warning,
        };
        let index = self.found.len();
        self.found.push(make(code.name, at, span, message.into()));
        &mut self.found[index]
    }

    /// Returns the known name nearest to `found`, if one is near and the limit on comparisons has not been reached.
    pub(crate) fn suggestion<'k>(
        &mut self,
        found: &str,
        known: impl ExactSizeIterator<Item = &'k str>,
    ) -> Option<&'k str> {
        if self.found.len() >= diagnostic::MAX_FINDINGS {
            return None;
        }
        self.comparisons = self.comparisons.checked_sub(known.len())?;
        nearest(found, known)
    }

    /// Whether the author wrote a value at this path, even one of the wrong type, which was already reported.
    pub(crate) fn written(&self, value: bool, at: &ValuePath<'_>) -> bool {
        value || self.document.is_pruned(at)
    }

    /// Reports that a required field of `parent` is missing, unless it was present with the wrong type.
    pub(crate) fn missing(&mut self, parent: &ValuePath<'_>, field: &str, why: &str) {
        let at = parent.key(field);
        if !self.document.is_pruned(&at) && !self.document.is_pruned(parent) {
            self.report(
                &codes::MISSING_FIELD,
                parent,
                format!("expected the field `{field}`, but it is missing"),
            )
            .help = Some(why.to_owned());
        }
    }

    /// Reports that a scalar does not follow its grammar.
    pub(crate) fn invalid(&mut self, code: &Code, at: &ValuePath<'_>, error: &ParseError) -> &mut Diagnostic {
        self.report(code, at, error.to_string())
    }

    /// Checks the form of an optional name.
    pub(crate) fn optional_name(&mut self, name: Option<&str>, at: &ValuePath<'_>) {
        if let Some(name) = name
            && !is_name(name)
        {
            let message = format!(
                "expected a name of at most 63 lower-case letters, digits and inner hyphens, but found {:?}",
                Quoted(name)
            );
            let suggestion = valid_name_from(name);
            let finding = self.report(&codes::INVALID_NAME, at, message);
            finding.help = suggestion.map(|name| format!("for example `{name}`"));
        }
    }

    /// Checks a required name.
    pub(crate) fn required_name(&mut self, name: Option<&str>, parent: &ValuePath<'_>, why: &str) {
        match name {
            Some(_) => self.optional_name(name, &parent.key("name")),
            None => self.missing(parent, "name", why),
        }
    }

    /// Checks that the names in a list are unique; `what` is "VM", "disk"….
    pub(crate) fn unique<'n>(
        &mut self,
        what: &str,
        list: &ValuePath<'_>,
        names: impl IntoIterator<Item = Option<&'n str>>,
    ) {
        let mut seen = HashMap::new();
        for (index, name) in names.into_iter().enumerate() {
            let Some(name) = name.filter(|name| !name.is_empty()) else { continue };
            if let Some(first) = seen.get(name) {
                let element = list.index(index);
                let first = format!("the first is {}", list.index(*first));
                self.report(
                    &codes::DUPLICATE_NAME,
                    &element.key("name"),
                    format!("expected a unique {what} name, but found {name:?} again", name = Quoted(name)),
                )
                .help = Some(first);
            } else {
                seen.insert(name, index);
            }
        }
    }

    /// Reports a reference to an unknown name, and suggests the nearest known one.
    pub(crate) fn unknown_reference<'n>(
        &mut self,
        code: &Code,
        at: &ValuePath<'_>,
        what: &str,
        found: &str,
        known: impl IntoIterator<Item = &'n str>,
    ) {
        if self.found.len() >= diagnostic::MAX_FINDINGS && self.has_errors {
            self.more += 1;
            return;
        }
        let known: Vec<&str> = known.into_iter().filter(|name| !name.is_empty()).collect();
        let help = match self.suggestion(found, known.iter().copied()) {
            Some(similar) => format!("did you mean `{similar}`?"),
            None if known.is_empty() => "none exists".to_owned(),
            None if known.len() <= 8 && known.iter().all(|name| name.len() <= 80) => {
                format!("use one of: {}", known.join(", "))
            }
            None => format!("{} exist, none with a similar name", known.len()),
        };
        self.report(
            code,
            at,
            format!("expected the name of {what}, but found {found:?}", found = Quoted(found)),
        )
        .help = Some(help);
    }

    /// Reports a value that is not one of the possible ones.
    pub(crate) fn unknown_value(&mut self, at: &ValuePath<'_>, found: &str, possible: &[&str]) {
        let expected = match possible {
            [one] => (*one).to_owned(),
            [first @ .., last] => format!("{} or {last}", first.join(", ")),
            [] => "nothing".to_owned(),
        };
        let help =
            nearest(found, possible.iter().copied()).map(|similar| format!("did you mean `{similar}`?"));
        self.report(
            &codes::INVALID_VALUE,
            at,
            format!("expected {expected}, but found {found:?}", found = Quoted(found)),
        )
        .help = help;
    }

    /// Reports two mutually exclusive fields.
    pub(crate) fn exclusive(&mut self, parent: &ValuePath<'_>, first: &str, second: &str) {
        self.report(
            &codes::EXCLUSIVE_FIELDS,
            &parent.key(second),
            format!("expected one of `{first}` and `{second}`, but found both"),
        )
        .help = Some("keep one of them".to_owned());
    }

    /// Checks a duration.
    pub(crate) fn duration(&mut self, scalar: Option<&Scalar>, at: &ValuePath<'_>, zero: Zero) {
        let Some(scalar) = scalar else { return };
        match duration(scalar) {
            Err(error) => {
                let help = match scalar {
                    Scalar::Int(number) => format!("add a unit, as in `{number}s` or `{number}m`"),
                    _ => "use the units h, m, s and ms".to_owned(),
                };
                self.invalid(&codes::INVALID_DURATION, at, &error).help = Some(help);
            }
            Ok(Duration::ZERO) if matches!(zero, Zero::Refused) => {
                self.report(
                    &codes::INVALID_DURATION,
                    at,
                    format!("expected a duration of more than 0, but found {scalar}"),
                );
            }
            Ok(_) => {}
        }
    }
}

/// Whether a duration may be zero.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Zero {
    Allowed,
    Refused,
}

/// Parses a scalar as a quantity.
pub(crate) fn quantity(scalar: &Scalar) -> Result<Quantity, ParseError> {
    match scalar {
        Scalar::Text(text) => text.parse(),
        number => number.to_string().parse(),
    }
}

/// Parses a scalar as a duration.
pub(crate) fn duration(scalar: &Scalar) -> Result<Duration, ParseError> {
    match scalar {
        Scalar::Text(text) => parse_duration(text),
        number => parse_duration(&number.to_string()),
    }
}

/// Returns the known name nearest to `found`, if one is near.
pub(crate) fn nearest<'k>(found: &str, known: impl IntoIterator<Item = &'k str>) -> Option<&'k str> {
    // Anything longer is not a name, and the edit distance takes quadratic time.
    if found.len() > 128 {
        return None;
    }
    let found = found.to_lowercase();
    known
        .into_iter()
        .filter(|word| word.len().abs_diff(found.len()) <= 8)
        .map(|word| {
            let lower = word.to_lowercase();
            let mut distance = strsim::damerau_levenshtein(&found, &lower);
            // A prefix counts as near: `motd` suggests `motd.txt`.
            if found.len() >= 3 && lower.starts_with(&found) {
                distance = distance.min(1);
            }
            (distance, word)
        })
        .filter(|(distance, word)| *distance * 3 <= word.chars().count().max(3))
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, word)| word)
}

/// Returns a valid Name similar to this text.
fn valid_name_from(text: &str) -> Option<String> {
    let mut name = String::new();
    for character in text.chars().take(63) {
        let character = character.to_ascii_lowercase();
        if character.is_ascii_lowercase() || character.is_ascii_digit() {
            name.push(character);
        } else if !name.is_empty() && !name.ends_with('-') {
            name.push('-');
        }
    }
    let name = name.trim_end_matches('-').to_owned();
    is_name(&name).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_similar_names_are_suggested() {
        assert_eq!(nearest("motd", ["other", "motd.txt"]), Some("motd.txt"));
        assert_eq!(nearest("wbe", ["web", "db"]), Some("web"));
        assert_eq!(nearest("Shell", ["shell", "file"]), Some("shell"));
        assert_eq!(nearest("database", ["web"]), None);
        assert_eq!(valid_name_from("My Web_01!"), Some("my-web-01".to_owned()));
        assert_eq!(valid_name_from("…"), None);
    }
}
