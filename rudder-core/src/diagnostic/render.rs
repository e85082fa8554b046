//! Renders findings as text: message, location, the source line with the value underlined, and help.

use super::{Diagnostic, Severity, Span, redact::hidden, sort};
use crate::visible::{visible_line, write_visible};
use std::{borrow::Cow, fmt::Write as _, ops::Range};
use unicode_width::UnicodeWidthChar as _;

/// Maximum number of source columns shown.
const MAX_COLUMNS: usize = 120;
/// Number of columns kept before the value when a line is cut.
const COLUMNS_BEFORE: usize = 50;

/// Renders findings as plain text, in source order and without duplicates; see [`Renderer`].
///
/// ```
/// let text = "vms:\n- name: web\n  tmp: true\n";
/// let parsed = rudder_core::manifest::parse(text.as_bytes());
/// let shown = rudder_core::diagnostic::render(&parsed.diagnostics, "web.yaml", text);
/// assert_eq!(shown, "\
/// error[unknown-key]: unknown key `tmp`
///  --> web.yaml:3:3 (vms[0].tmp)
///   |
/// 3 |   tmp: true
///   |   ^^^
///   = help: did you mean `tpm`?
/// ");
/// ```
#[must_use]
pub fn render(diagnostics: &[Diagnostic], source_name: &str, source_text: &str) -> String {
    Renderer::new().render(diagnostics, source_name, source_text)
}

/// Whether text contains ANSI colours (ECMA-48, SGR).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Colour {
    /// Plain text.
    #[default]
    Never,
    /// Colours, for a terminal.
    Always,
}

/// Renders findings as text. Whatever the source contains, the output consists of printable characters in lines of
/// bounded length, and shows neither values of keys whose names mark them as secret nor passwords and tokens in URLs.
#[derive(Debug, Clone, Default)]
pub struct Renderer {
    colour: Colour,
}

impl Renderer {
    /// Creates a renderer of plain text.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets whether the text contains colours.
    #[must_use]
    pub fn colour(mut self, colour: Colour) -> Self {
        self.colour = colour;
        self
    }

    /// Renders all findings about one source, in source order and without duplicates, separated by empty lines.
    #[must_use]
    pub fn render(&self, diagnostics: &[Diagnostic], source_name: &str, source_text: &str) -> String {
        let mut diagnostics = diagnostics.to_vec();
        sort(&mut diagnostics);
        let hidden = if diagnostics.is_empty() { Vec::new() } else { hidden(source_text) };
        let source = Source { name: source_name, text: source_text, hidden };
        let shown = diagnostics.iter().map(|diagnostic| self.one(diagnostic, &source));
        shown.collect::<Vec<_>>().join("\n")
    }

    fn one(&self, diagnostic: &Diagnostic, source: &Source<'_>) -> String {
        const BLUE: &str = "\x1b[1;34m";
        let (name, colour) = match diagnostic.severity {
            Severity::Error => ("error", "\x1b[1;31m"),
            Severity::Warning => ("warning", "\x1b[1;33m"),
        };
        let title = self.paint(colour, &format!("{name}[{}]", diagnostic.code));
        let mut out = format!("{title}: {}\n", clean(&diagnostic.message));
        let path = match diagnostic.path.as_str() {
            "" => String::new(),
            path => format!(" ({})", clean(path)),
        };
        let name = clean(source.name);
        // Writing to a `String` does not fail.
        let mut line = |text: String| {
            let _ = writeln!(out, "{}", text.trim_end());
        };
        let Some(span) = diagnostic.span else {
            line(format!(" {} {name}{path}", self.paint(BLUE, "-->")));
            if let Some(help) = &diagnostic.help {
                line(format!("  {} help: {}", self.paint(BLUE, "="), clean(help)));
            }
            return out;
        };
        let number = span.line.to_string();
        let indent = " ".repeat(number.len());
        let bar = self.paint(BLUE, "|");
        line(format!("{indent}{} {name}:{number}:{}{path}", self.paint(BLUE, "-->"), span.column));
        if let Some(snippet) = Snippet::of(span, source) {
            line(format!("{indent} {bar}"));
            line(format!("{} {bar} {}", self.paint(BLUE, &number), snippet.text));
            let carets = self.paint(colour, &"^".repeat(snippet.width));
            line(format!("{indent} {bar} {}{carets}", " ".repeat(snippet.before)));
        }
        if let Some(help) = &diagnostic.help {
            line(format!("{indent} {} help: {}", self.paint(BLUE, "="), clean(help)));
        }
        out
    }

    fn paint(&self, colour: &str, text: &str) -> String {
        match self.colour {
            Colour::Never => text.to_owned(),
            Colour::Always => format!("{colour}{text}\x1b[0m"),
        }
    }
}

/// The source that findings are about.
struct Source<'s> {
    name: &'s str,
    text: &'s str,
    /// Ranges that must not be shown, in order.
    hidden: Vec<Range<usize>>,
}

impl Source<'_> {
    fn is_hidden(&self, at: usize) -> bool {
        let index = self.hidden.partition_point(|range| range.end <= at);
        self.hidden.get(index).is_some_and(|range| range.contains(&at))
    }
}

/// The part of the first line of a span that is shown.
struct Snippet {
    text: String,
    /// Number of columns before the carets.
    before: usize,
    /// Number of underlined columns.
    width: usize,
}

impl Snippet {
    /// Returns the snippet of a span, or `None` if the span does not fit the text.
    fn of(span: Span, about: &Source<'_>) -> Option<Self> {
        let source = about.text;
        let start = floor(source, span.start);
        if span.start > source.len() {
            return None;
        }
        // A line may be as long as the file: nothing outside this window is examined.
        let window = MAX_COLUMNS * 4;
        let from = floor(source, start.saturating_sub(window));
        let to = floor(source, start.saturating_add(window));
        let is_break = ['\n', '\r'];
        let (before, cut_before) = match source[from..start].rfind(is_break) {
            Some(newline) => (&source[from + newline + 1..start], false),
            None => (&source[from..start], from > 0),
        };
        let (after, cut_after) = match source[start..to].find(is_break) {
            Some(newline) => (&source[start..start + newline], false),
            None => (&source[start..to], to < source.len()),
        };
        let before = if cut_before { before } else { before.trim_start_matches('\u{feff}') };
        let marked = floor(after, span.end.saturating_sub(start).min(after.len()));

        let cell = |(at, c): (usize, char)| if about.is_hidden(at) { "*".to_owned() } else { printable(c) };
        let first = start - before.len();
        let line = before.char_indices().map(|(at, c)| (first + at, c));
        let line = line.chain(after.char_indices().map(|(at, c)| (start + at, c)));
        let cells: Vec<String> = line.map(cell).collect();
        let front = before.chars().count();
        let marked = front + after[..marked].trim_end().chars().count();
        let widths: Vec<usize> = cells.iter().map(|cell| width(cell)).collect();
        let columns = |range: Range<usize>| widths[range].iter().sum::<usize>();
        let fits = columns(0..cells.len()) <= MAX_COLUMNS && !cut_before && !cut_after;
        let (mut first, mut last) = (0, cells.len());
        if !fits {
            let mut shown = columns(0..front);
            while shown > COLUMNS_BEFORE {
                shown -= widths[first];
                first += 1;
            }
            let mut shown = columns(first..last);
            while last > front && shown > MAX_COLUMNS {
                last -= 1;
                shown -= widths[last];
            }
        }
        let left = if first > 0 || cut_before { "…" } else { "" };
        let right = if last < cells.len() || cut_after { "…" } else { "" };
        let marked = marked.clamp(front, last);
        Some(Self {
            text: format!("{left}{}{right}", cells[first..last].concat()),
            before: columns(first..front) + left.chars().count(),
            width: columns(front..marked).max(1),
        })
    }
}

/// Returns the last character boundary at or before this offset.
fn floor(text: &str, at: usize) -> usize {
    let mut at = at.min(text.len());
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    at
}

fn width(cell: &str) -> usize {
    cell.chars().map(|c| c.width().unwrap_or(1)).sum()
}

/// Returns a character as it may be sent to a terminal.
fn printable(c: char) -> String {
    let mut cell = String::new();
    // Writing to a `String` does not fail.
    let _ = write_visible(c, &mut cell);
    cell
}

/// Joins a text of a finding into one line.
fn clean(text: &str) -> Cow<'_, str> {
    if text.contains('\n') {
        return Cow::Owned(visible_line(&text.replace('\n', " ")).into_owned());
    }
    visible_line(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mark(source: &str, value: &str) -> String {
        let start = source.find(value).unwrap_or(source.len());
        let before = &source[..start];
        let line = u32::try_from(before.matches('\n').count() + 1).unwrap_or(1);
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        let column = u32::try_from(before[line_start..].chars().count() + 1).unwrap_or(1);
        let span = Span { line, column, start, end: start + value.len() };
        render(&[Diagnostic::error("code", "a.b", Some(span), "wrong").with_help("fix it")], "f.yaml", source)
    }

    #[test]
    fn carets_are_below_the_value_whatever_precedes_it() {
        insta::assert_snapshot!(mark("a:\n\tb: 漢字é\u{7}x: VALUE # c\n", "VALUE"), @r#"
        error[code]: wrong
         --> f.yaml:2:12 (a.b)
          |
        2 |     b: 漢字é␇x: VALUE # c
          |                 ^^^^^
          = help: fix it
        "#);
    }

    #[test]
    fn only_the_first_line_of_a_span_is_underlined() {
        insta::assert_snapshot!(mark("a: |  \n  text\n  text\r\nb: 1\r\n", "|  \n  text"), @r#"
        error[code]: wrong
         --> f.yaml:1:4 (a.b)
          |
        1 | a: |
          |    ^
          = help: fix it
        "#);
        insta::assert_snapshot!(mark("a: 1\r\nb: [1\r\n]\r\n", "[1\r\n]"), @r#"
        error[code]: wrong
         --> f.yaml:2:4 (a.b)
          |
        2 | b: [1
          |    ^^
          = help: fix it
        "#);
    }

    #[test]
    fn a_long_line_is_cut_around_the_value() {
        let source = format!("{{a: {}, b: VALUE, c: {}}}", "x".repeat(5000), "y".repeat(5000));
        insta::assert_snapshot!(mark(&source, "VALUE"), @r#"
        error[code]: wrong
         --> f.yaml:1:5010 (a.b)
          |
        1 | …xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx, b: VALUE, c: yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy…
          |                                                    ^^^^^
          = help: fix it
        "#);
        insta::assert_snapshot!(mark(&source, &"x".repeat(5000)), @r#"
        error[code]: wrong
         --> f.yaml:1:5 (a.b)
          |
        1 | {a: xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx…
          |     ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
          = help: fix it
        "#);
    }

    #[test]
    fn a_span_at_or_beyond_the_end_of_the_text_is_rendered() {
        insta::assert_snapshot!(mark("a: 1\n", "nothing"), @r#"
        error[code]: wrong
         --> f.yaml:2:1 (a.b)
          |
        2 |
          | ^
          = help: fix it
        "#);
        let behind = Span { line: 9, column: 9, start: 900, end: 901 };
        let finding = Diagnostic::warning("code", "", Some(behind), "elsewhere");
        insta::assert_snapshot!(render(&[finding], "f.yaml", "é"), @r#"
        warning[code]: elsewhere
         --> f.yaml:9:9
        "#);
        let finding = Diagnostic::warning("code", "", None, "nowhere\nat all").with_help("none");
        insta::assert_snapshot!(render(&[finding], "f\x1b[2J.yaml", "é"), @r#"
        warning[code]: nowhere at all
         --> f␛[2J.yaml
          = help: none
        "#);
    }

    #[test]
    fn passwords_are_not_shown() {
        insta::assert_snapshot!(mark("{usr: me, sshPassword: hunter2, x: 1}", "usr"), @r#"
        error[code]: wrong
         --> f.yaml:1:2 (a.b)
          |
        1 | {usr: me, sshPassword: *******, x: 1}
          |  ^^^
          = help: fix it
        "#);
        insta::assert_snapshot!(mark("'rootPassword' : \"hun, ter2\" # x", "hun"), @r#"
        error[code]: wrong
         --> f.yaml:1:19 (a.b)
          |
        1 | 'rootPassword' : *********** # x
          |                   ^^^
          = help: fix it
        "#);
    }

    #[test]
    fn colours_do_not_change_the_text() {
        let span = Span { line: 1, column: 4, start: 3, end: 4 };
        let finding = Diagnostic::error("code", "a", Some(span), "wrong").with_help("fix it");
        let coloured =
            Renderer::new().colour(Colour::Always).render(std::slice::from_ref(&finding), "f", "a: 1");
        let mut plain = coloured.clone();
        for code in ["\x1b[0m", "\x1b[1;31m", "\x1b[1;34m"] {
            assert!(plain.contains(code));
            plain = plain.replace(code, "");
        }
        assert_eq!(plain, render(&[finding], "f", "a: 1"));
    }

    #[test]
    fn findings_are_sorted_by_location_and_deduplicated() {
        let at = |start| {
            Some(Span { line: 1, column: 1 + u32::try_from(start).unwrap_or(0), start, end: start + 1 })
        };
        let later = Diagnostic::error("b", "b", at(3), "second");
        let all = [later.clone(), Diagnostic::error("a", "a", at(0), "first"), later];
        insta::assert_snapshot!(render(&all, "f", "a: b"), @r#"
        error[a]: first
         --> f:1:1 (a)
          |
        1 | a: b
          | ^

        error[b]: second
         --> f:1:4 (b)
          |
        1 | a: b
          |    ^
        "#);
    }

    #[test]
    fn json_has_the_same_fields() {
        let span = Span { line: 1, column: 4, start: 3, end: 4 };
        let finding = Diagnostic::error("code", "a", Some(span), "wrong");
        let json = serde_json::to_string(&finding).unwrap_or_default();
        insta::assert_snapshot!(json, @r#"{"code":"code","severity":"error","path":"a","line":1,"column":4,"start":3,"end":4,"message":"wrong"}"#);
        assert_eq!(serde_json::from_str::<Diagnostic>(&json).ok(), Some(finding));
    }
}
