//! Reports all errors in manifests, without building anything.
//!
//! ```sh
//! cargo run --example validate -- [--json] [--strict] FILE...
//! ```
//!
//! Diagnostics go to standard error for people, or as JSON lines to standard output; `-` reads standard input.
//!
//! Exit codes: 0 no errors · 1 errors · 2 a file could not be read, diagnostics could not be written, or wrong usage ·
//! 141 standard output has no reader any more.

#[path = "build/output.rs"]
mod output;

use clap::{ColorChoice, Parser};
use output::{Unwritten, print, report};
use rudder::{
    Error, Result,
    check::check,
    diagnostic::{self, Colour, Diagnostic, Renderer},
    manifest::{MAX_BYTES, UnknownKeys, parse_with, read_file},
};
use std::{
    io::{self, IsTerminal as _, Read as _, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
};

/// Maximum number of bytes read from standard input: the parser refuses more.
const MAX_READ: u64 = MAX_BYTES as u64 + 1;

/// Check manifests and report all errors in them.
#[derive(Debug, Parser)]
#[command(version, after_help = "Exit code 0: no errors; 1: errors; 2: a file could not be read.")]
struct Arguments {
    /// Write diagnostics to standard output, one JSON object per line.
    #[arg(long)]
    json: bool,
    /// Treat unknown keys as errors.
    #[arg(long)]
    strict: bool,
    /// Colour the diagnostics.
    #[arg(long, value_name = "WHEN", default_value = "auto")]
    color: ColorChoice,
    /// Manifest files; `-` is standard input.
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
}

/// The number of diagnostics in all files.
#[derive(Default)]
struct Totals {
    errors: usize,
    warnings: usize,
    documents: usize,
    unreadable: usize,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let mut totals = Totals::default();
    for file in &arguments.files {
        let name = if is_stdin(file) { "<stdin>".to_owned() } else { file.display().to_string() };
        match read(file) {
            Ok(bytes) => {
                if let Err(unwritten) = validate(&arguments, &name, &bytes, &mut totals) {
                    return unwritten.report(2).into();
                }
            }
            Err(error) => {
                report(format_args!("error: {}", error.report()));
                totals.unreadable += 1;
            }
        }
    }
    report(summary(&totals, arguments.files.len()));
    match totals {
        Totals { unreadable: 1.., .. } => ExitCode::from(2),
        Totals { errors: 1.., .. } => ExitCode::FAILURE,
        _ => ExitCode::SUCCESS,
    }
}

fn is_stdin(file: &Path) -> bool {
    file.as_os_str() == "-"
}

fn read(file: &Path) -> Result<Vec<u8>> {
    if !is_stdin(file) {
        return read_file(file);
    }
    let mut bytes = Vec::new();
    let read = io::stdin().lock().take(MAX_READ).read_to_end(&mut bytes);
    read.map(|_| bytes).map_err(|error| Error::io("read standard input", error))
}

/// Parses and checks one file, and shows the diagnostics.
fn validate(arguments: &Arguments, name: &str, bytes: &[u8], totals: &mut Totals) -> Result<(), Unwritten> {
    let unknown_keys = if arguments.strict { UnknownKeys::Refuse } else { UnknownKeys::Warn };
    let parsed = parse_with(name, bytes, unknown_keys);
    let mut findings = parsed.diagnostics;
    for document in &parsed.documents {
        findings.extend(check(document));
    }
    diagnostic::sort(&mut findings);
    totals.documents += parsed.documents.len();
    totals.errors += findings.iter().filter(|finding| finding.is_error()).count();
    totals.warnings += findings.iter().filter(|finding| !finding.is_error()).count();
    if arguments.json {
        return print_json(name, &findings);
    }
    if findings.is_empty() {
        return Ok(());
    }
    let colour = match arguments.color {
        ColorChoice::Always => Colour::Always,
        ColorChoice::Auto if io::stderr().is_terminal() => Colour::Always,
        _ => Colour::Never,
    };
    let text = String::from_utf8_lossy(bytes);
    writeln!(io::stderr(), "{}", Renderer::new().colour(colour).render(&findings, name, &text))
        .map_err(Unwritten)
}

/// Prints each diagnostic as one line: the file, and the fields of a [`Diagnostic`].
fn print_json(name: &str, findings: &[Diagnostic]) -> Result<(), Unwritten> {
    for finding in findings {
        let mut line = serde_json::Map::from_iter([("file".to_owned(), name.into())]);
        if let Ok(serde_json::Value::Object(fields)) = serde_json::to_value(finding) {
            line.extend(fields);
        }
        print(serde_json::Value::Object(line))?;
    }
    Ok(())
}

fn summary(totals: &Totals, files: usize) -> String {
    let count = |number: usize, what: &str| format!("{number} {what}{}", if number == 1 { "" } else { "s" });
    let mut line = format!(
        "{} in {}: {}, {}",
        count(totals.documents, "document"),
        count(files, "file"),
        count(totals.errors, "error"),
        count(totals.warnings, "warning")
    );
    if totals.unreadable > 0 {
        line += &format!(", {} not read", totals.unreadable);
    }
    line
}
