//! Writes values as YAML, in block style.
//!
//! Written by hand, because the output of serde_yaml follows YAML 1.1, where NEL, LS and PS are line breaks: text that
//! contains them would be read back changed. Text is left unquoted only if every reader, including those of YAML 1.1,
//! reads it as text.

use super::{Value as Scalar, scalar::resolve};
use serde_yaml::{Mapping, Value};
use std::fmt::Write as _;

/// A longer key needs the explicit form; the scanner looks 1024 characters ahead (YAML 1.2.2, 7.4.2).
const MAX_SIMPLE_KEY: usize = 1000;

/// Writes one document. `None` for what a manifest cannot contain: tags, and lists or mappings as keys.
pub(in crate::manifest) fn write(value: &Value) -> Option<String> {
    let mut out = String::new();
    node(value, 0, Position::Line, &mut out)?;
    Some(out)
}

/// Where a node begins.
#[derive(Clone, Copy, PartialEq)]
enum Position {
    /// At the beginning of a line.
    Line,
    /// After `- `, on the same line.
    Dash,
    /// After `key:`.
    Colon,
}

fn node(value: &Value, indent: usize, position: Position, out: &mut String) -> Option<()> {
    match value {
        Value::Mapping(entries) if !entries.is_empty() => mapping(entries, indent, position, out),
        Value::Sequence(items) if !items.is_empty() => {
            // Lists start at the column of their key, as is common.
            let indent = if position == Position::Colon { indent - 2 } else { indent };
            for (index, item) in items.iter().enumerate() {
                begin(index == 0, position, indent, out);
                out.push_str("- ");
                node(item, indent + 2, Position::Dash, out)?;
            }
            Some(())
        }
        _ => {
            if position == Position::Colon {
                out.push(' ');
            }
            match value {
                Value::String(text) if is_block(text) => block(text, indent.max(2), out),
                value => {
                    out.push_str(&scalar(value)?);
                    out.push('\n');
                }
            }
            Some(())
        }
    }
}

fn mapping(entries: &Mapping, indent: usize, position: Position, out: &mut String) -> Option<()> {
    for (index, (key, value)) in entries.iter().enumerate() {
        begin(index == 0, position, indent, out);
        let key = match key {
            Value::Mapping(_) | Value::Sequence(_) => return None,
            key => scalar(key)?,
        };
        if key.len() > MAX_SIMPLE_KEY {
            let _ = write!(out, "? {key}\n{:indent$}:", "");
        } else {
            let _ = write!(out, "{key}:");
        }
        node(value, indent + 2, Position::Colon, out)?;
    }
    Some(())
}

/// Writes what precedes an entry: a line break after `key:`, and the indentation, unless it follows `- ` on the same line.
fn begin(is_first: bool, position: Position, indent: usize, out: &mut String) {
    if is_first && position == Position::Colon {
        out.push('\n');
    }
    if !(is_first && position == Position::Dash) {
        // Writing to a `String` does not fail.
        let _ = write!(out, "{:indent$}", "");
    }
}

fn scalar(value: &Value) -> Option<String> {
    Some(match value {
        Value::Null => "null".to_owned(),
        Value::Bool(value) => value.to_string(),
        Value::Number(value) => value.to_string(),
        Value::String(text) if is_plain(text) => text.clone(),
        Value::String(text) => quoted(text),
        Value::Sequence(_) => "[]".to_owned(),
        Value::Mapping(_) => "{}".to_owned(),
        Value::Tagged(_) => return None,
    })
}

/// Whether text may be written without quotes.
fn is_plain(text: &str) -> bool {
    let is_word = |c: char| c.is_ascii_graphic() || c == ' ' || c.is_alphanumeric();
    let begins_safely =
        text.starts_with(|c: char| c.is_alphanumeric() || matches!(c, '/' | '.' | '_' | '(' | '$' | '<'));
    // YAML 1.1 numbers with `_`, base-60 times and dates.
    let is_old_number = text.starts_with(|c: char| c.is_ascii_digit() || c == '.')
        && text.bytes().all(|c| {
            c.is_ascii_digit() || matches!(c, b'_' | b':' | b'-' | b'.' | b' ' | b'T' | b'Z' | b'+')
        })
        && text.bytes().any(|c| matches!(c, b'_' | b':' | b'-'));
    // Numbers too large for 64 bits are text in Rudder, but perhaps not for other readers.
    let is_number =
        text.parse::<f64>().is_ok() || ["0x", "0o", "0b"].iter().any(|start| text.starts_with(start));
    let is_old_bool = ["y", "n", "yes", "no", "on", "off", "true", "false", "null"]
        .iter()
        .any(|old| text.eq_ignore_ascii_case(old));
    begins_safely
        && !is_old_number
        && !is_old_bool
        && !is_number
        && text.chars().all(is_word)
        && !text.contains(": ")
        && !text.contains(" #")
        && !text.ends_with([':', ' '])
        && !text.starts_with("...")
        && resolve(text) == Scalar::Text
}

/// Returns a double-quoted scalar with JSON escapes, which are valid YAML.
fn quoted(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if is_hidden(c) => {
                let code = u32::from(c);
                // Writing to a `String` does not fail.
                let _ =
                    if code > 0xffff { write!(out, "\\U{code:08x}") } else { write!(out, "\\u{code:04x}") };
            }
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

/// Whether YAML does not allow a character unescaped, or some readers treat it as a line break.
fn is_hidden(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{a0}' | '\u{2028}' | '\u{2029}' | '\u{feff}' | '\u{fffe}' | '\u{ffff}')
        || matches!(c, '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{206f}')
        || u32::from(c) & 0xfffe == 0xfffe
}

/// Whether a text of several lines can be written as a literal block without losing anything.
fn is_block(text: &str) -> bool {
    let lines = text.strip_suffix('\n').unwrap_or(text);
    lines.contains('\n')
        && !lines.starts_with([' ', '\t', '\n'])
        && !lines.ends_with([' ', '\t', '\n'])
        && !text.chars().any(|c| is_hidden(c) && c != '\n' && c != '\t')
}

/// Writes a literal block after its key or dash.
fn block(text: &str, indent: usize, out: &mut String) {
    out.push_str(if text.ends_with('\n') { "|\n" } else { "|-\n" });
    for line in text.lines() {
        if line.is_empty() {
            out.push('\n');
        } else {
            // Writing to a `String` does not fail.
            let _ = writeln!(out, "{:indent$}{line}", "");
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn yaml_is_written_as_people_write_it() {
        let text = "\
vms:
- name: web
  disks:
  - name: rootdisk
    size: 20Gi
  bootCommand:
  - <wait5s><enter>
  - \"\"
  provisioners:
  - type: shell
    shell:
      inline: |
        #!/bin/sh
        set -e

        \techo hi
  nested:
  - - 1
    - a: 1.5
      b: []
    - {}
  quoted: \"yes\"
  time: \"12:30\"
  mac: \"52:54:00:12:34:56\"
  cidr: 10.0.0.0/24
  url: https://a.b/c?d=e#f
  empty: null
  separator: \"\\u2028\"
1: \"1\"
";
        let value: Value = serde_yaml::from_str(text).unwrap();
        assert_eq!(write(&value).unwrap(), text);
        assert_eq!(write(&Value::Mapping(Mapping::new())).unwrap(), "{}\n");
    }

    #[test]
    fn a_long_key_is_written_in_the_explicit_form() {
        let key = "k".repeat(2000);
        let entries = [(Value::from(key.clone()), Value::from(vec![1]))];
        let value = Value::Mapping(
            [(Value::from("a"), Value::Mapping(entries.into_iter().collect()))].into_iter().collect(),
        );
        let text = write(&value).unwrap();
        assert_eq!(text, format!("a:\n  ? {key}\n  :\n  - 1\n"));
        assert_eq!(serde_yaml::from_str::<Value>(&text).unwrap(), value);
    }
}
