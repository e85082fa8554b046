//! Help for text that has a different meaning in YAML, and usually must be quoted.

use crate::{diagnostic::is_secret_key, visible::cut};

/// Longer text is not repeated in quotes.
const MAX_SHOWN: usize = 60;

/// Returns the line around a position; `None` if it is too long to be examined.
pub(super) fn line_at(source: &str, at: usize) -> Option<&str> {
    const FAR: usize = 2000;
    let at = source.floor_char_boundary(at.min(source.len()));
    let from = source.floor_char_boundary(at.saturating_sub(FAR));
    let to = source.floor_char_boundary(at.saturating_add(FAR));
    let start = source[from..at].rfind('\n').map(|newline| from + newline + 1);
    let start = start.or_else(|| (from == 0).then_some(0))?;
    let end = source[at..to].find('\n').map_or(to, |length| at + length);
    Some(&source[start..end])
}

/// Returns what the beginning of a text means in YAML.
fn meaning(text: &str) -> Option<&'static str> {
    Some(match text.chars().next()? {
        '"' | '\'' => "text in quotes ends at the closing quote",
        '[' | '{' => "text that begins with a bracket is a list or a mapping",
        '*' => "text that begins with `*` is an alias",
        '&' => "text that begins with `&` is an anchor",
        '!' => "text that begins with `!` is a tag",
        '|' | '>' => "text that begins with `|` or `>` is a block",
        '%' => "text cannot begin with `%`",
        '@' | '`' => "text cannot begin with `@` or a backtick",
        ',' | ']' | '}' => "text cannot begin with a comma or a closing bracket",
        _ => return None,
    })
}

/// Returns the text as a quoted scalar; `None` if it is too long.
fn quoted(text: &str) -> Option<String> {
    (!text.is_empty() && cut(text, MAX_SHOWN).is_none() && !text.contains(char::is_control))
        .then(|| format!("'{}'", text.replace('\'', "''")))
}

fn advice(why: &str, text: &str) -> String {
    match quoted(text) {
        Some(quoted) => format!("{why}: put the whole value in quotes, {quoted}"),
        None => format!("{why}: put the whole value in quotes, or write it as a block after `|`"),
    }
}

/// Returns the help for a value that should be text, but is a list or a mapping in YAML; `text` is its first line.
pub(super) fn about_value(text: &str) -> String {
    let text = text.trim_end();
    let why = meaning(text).unwrap_or("`: `, or a colon at the end, turns it into a mapping");
    advice(why, text)
}

/// Returns the help for a line that is not valid YAML.
pub(super) fn about_line(line: &str) -> Option<String> {
    // Directives begin at the beginning of a line.
    if line.starts_with("%YAML") || line.starts_with("%TAG") {
        return None;
    }
    let mut text = line.trim();
    while let Some(rest) = text.strip_prefix("- ") {
        text = rest.trim_start();
    }
    let mut key = "";
    if let Some((start, value)) = text.split_once(": ")
        && start.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'))
    {
        (key, text) = (start, value.trim_start());
    }
    if is_secret_key(key) {
        return Some("put the whole value in quotes".to_owned());
    }
    // For a field that holds a list, the bracket is intended.
    let is_list = text.starts_with(['[', '{'])
        && !["[ -", "[[", "{{", "{ "].iter().any(|start| text.starts_with(start));
    if is_list && !key.is_empty()
        || text.len() < 2 && !key.is_empty()
        || text.ends_with('[')
        || text.ends_with('{')
    {
        return None;
    }
    if let Some(why) = meaning(text) {
        return Some(advice(why, text));
    }
    if text.contains(": ") || text.ends_with(':') && !key.is_empty() {
        return Some(advice("`: ` in text turns it into a mapping", text));
    }
    add_missing_space(text)
}

/// Returns the help for `key:value`, which is text.
pub(super) fn add_missing_space(text: &str) -> Option<String> {
    let (key, value) = text.split_once(':')?;
    let is_key = !key.is_empty()
        && key.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'));
    let help = match quoted(value) {
        Some(_) if !is_secret_key(key) => format!("write a space after the colon: `{key}: {value}`"),
        _ => "write a space after the colon".to_owned(),
    };
    (is_key && !value.starts_with(['/', ' ']) && !value.is_empty()).then_some(help)
}
