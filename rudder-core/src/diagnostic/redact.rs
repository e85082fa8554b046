//! Finds the parts of a source that must not be shown when a line of it is quoted: values of keys whose names mark them
//! as secret, and credentials in URLs.
//!
//! The source may not even be valid YAML, since that may be what the finding is about. So it is scanned for keys and
//! the values after them, in every form that a value can have, and in doubt more is hidden.

use crate::secret::url_secrets;
use regex::Regex;
use std::{collections::HashSet, ops::Range, sync::LazyLock};

/// Words in keys whose values are secret, in lower case and without `-` and `_`.
const WORDS: [&str; 10] = [
    "password",
    "passwd",
    "passphrase",
    "token",
    "secret",
    "apikey",
    "accesskey",
    "privatekey",
    "credential",
    "passwort",
];

/// Keys of the manifest that refer to a secret but do not contain it.
const REFERENCES: [&str; 2] = ["sshprivatekeysecret", "secretref"];

/// Matches a key and the separator before its value, in YAML, JSON, shells and configuration files.
#[expect(clippy::unwrap_used, reason = "a constant, which every test of this file compiles")]
static KEY: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(r#"["']?([A-Za-z_][A-Za-z0-9_.-]{0,63})["']?[ \t]*(?:\n[ \t]*)?([:=])"#).unwrap()
});

/// Whether the value of a key must not be shown: its name marks it as secret, or is a misspelling of one that does.
pub(crate) fn is_secret_key(key: &str) -> bool {
    if key.len() > 64 {
        return false;
    }
    let plain: String =
        key.chars().filter(char::is_ascii_alphanumeric).collect::<String>().to_ascii_lowercase();
    if REFERENCES.contains(&plain.as_str()) {
        return false;
    }
    let is_near = |known: &str| {
        plain.len().abs_diff(known.len()) <= 2 && strsim::damerau_levenshtein(&plain, known) <= 2
    };
    WORDS.iter().any(|word| plain.contains(word)) || is_near("sshpassword") || is_near("password")
}

/// Returns the ranges of a source that must not be shown, in order and not touching.
pub(super) fn hidden(source: &str) -> Vec<Range<usize>> {
    let mut found = url_secrets(source);
    let mut aliases = HashSet::new();
    for captures in KEY.captures_iter(source) {
        let (Some(key), Some(separator)) = (captures.get(1), captures.get(2)) else { continue };
        let reader = Reader { source, key: key.start() };
        if key.as_str().eq_ignore_ascii_case("url") {
            found.extend(user_information(source, reader.value(separator.end()).0));
        }
        if !is_secret_key(key.as_str()) {
            continue;
        }
        if separator.as_str() == "=" {
            found.push(separator.end()..reader.word(separator.end()));
        } else {
            let (value, alias) = reader.value(separator.end());
            aliases.extend(alias);
            found.push(value);
        }
    }
    // Hide the anchored values that hidden aliases refer to.
    if !aliases.is_empty() {
        for (at, _) in source.match_indices('&') {
            let name = anchor_name(&source[at + 1..]);
            if aliases.contains(name) {
                let line = source[..at].rfind('\n').map_or(0, |end| end + 1);
                let reader = Reader { source, key: line + indent(&source[line..]) };
                found.push(reader.value(at + 1 + name.len()).0);
            }
        }
    }
    crate::secret::merge(found)
}

/// Returns what may be a password in a value that should be a URL, but is not one.
fn user_information(source: &str, value: Range<usize>) -> Option<Range<usize>> {
    let text = &source[value.clone()];
    let end = text.rfind('@').filter(|_| !text.contains("://"))?;
    let start = text.find(|c: char| !c.is_whitespace() && c != '"' && c != '\'')?;
    (start < end).then(|| value.start + start..value.start + end)
}

fn anchor_name(text: &str) -> &str {
    &text[..text.find(|c: char| c.is_whitespace() || ",[]{}".contains(c)).unwrap_or(text.len())]
}

fn indent(line: &str) -> usize {
    line.len() - line.trim_start_matches([' ', '-', '?']).len()
}

/// Finds the value of a key.
struct Reader<'s> {
    source: &'s str,
    /// Where the key begins.
    key: usize,
}

impl<'s> Reader<'s> {
    /// Returns the column of the key, in bytes.
    fn column(&self) -> usize {
        self.key - self.source[..self.key].rfind('\n').map_or(0, |end| end + 1)
    }

    fn line_end(&self, from: usize) -> usize {
        self.source[from..].find('\n').map_or(self.source.len(), |length| from + length)
    }

    /// Returns the end of the shell word that begins here.
    fn word(&self, from: usize) -> usize {
        let rest = &self.source[from..];
        match rest.chars().next() {
            Some(quote @ ('"' | '\'')) => self.quoted(from, quote),
            _ => rest
                .find(|c: char| c.is_whitespace() || ";\"'".contains(c))
                .map_or(self.source.len(), |end| from + end),
        }
    }

    /// Returns the range of the value that follows this position, and the name of the alias if it is one.
    fn value(&self, from: usize) -> (Range<usize>, Option<&'s str>) {
        let skip = |at: usize| {
            at + self.source[at..].len() - self.source[at..].trim_start_matches([' ', '\t', '\r']).len()
        };
        let mut start = skip(from);
        // Skip anchors and tags before the value.
        while self.source[start..].starts_with(['&', '!']) {
            let length = anchor_name(&self.source[start..]).len();
            start = skip(start + length.max(1));
        }
        let rest = &self.source[start..];
        let end = match rest.chars().next() {
            Some('*') => {
                let name = anchor_name(&rest[1..]);
                return (start..self.rest_of_line(start + 1 + name.len()), Some(name));
            }
            Some(quote @ ('"' | '\'')) => self.rest_of_line(self.quoted(start, quote)),
            Some('[' | '{') => self.flow(start),
            Some('|' | '>' | '#' | '\n') | None => self.block(self.line_end(start)),
            Some(_) => self.plain(start),
        };
        (start..end.max(start), None)
    }

    /// Returns the end of a value; that is the end of the line if the value is followed by anything but a comment or
    /// the next value, since that may be a part of it.
    fn rest_of_line(&self, end: usize) -> usize {
        let line_end = self.line_end(end);
        let rest = self.source[end..line_end].trim_start();
        if rest.is_empty() || rest.starts_with([',', '}', ']', '#', ':']) { end } else { line_end }
    }

    /// Returns the end of a quoted text, or the end of the source if the quotes are not closed.
    fn quoted(&self, start: usize, quote: char) -> usize {
        let bytes = self.source.as_bytes();
        let mut at = start + 1;
        while at < bytes.len() {
            match bytes[at] {
                b'\\' if quote == '"' => at += 1,
                byte if byte == quote as u8 => {
                    if quote == '"' || bytes.get(at + 1) != Some(&b'\'') {
                        return at + 1;
                    }
                    at += 1;
                }
                _ => {}
            }
            at += 1;
        }
        self.source.len()
    }

    /// Returns the end of a list or mapping in brackets.
    fn flow(&self, start: usize) -> usize {
        let bytes = self.source.as_bytes();
        let (mut at, mut depth) = (start, 0usize);
        while at < bytes.len() {
            match bytes[at] {
                b'[' | b'{' => depth += 1,
                b']' | b'}' => {
                    depth -= 1;
                    if depth == 0 {
                        return at + 1;
                    }
                }
                quote @ (b'"' | b'\'') => {
                    at = self.quoted(at, char::from(quote));
                    continue;
                }
                _ => {}
            }
            at += 1;
        }
        self.source.len()
    }

    /// Returns the end of an unquoted text.
    fn plain(&self, start: usize) -> usize {
        let line_end = self.line_end(start);
        let line = self.source[..self.key].rfind('\n').map_or(0, |end| end + 1);
        let in_flow = self.source[line..self.key].contains(['{', '[', ',']);
        if in_flow {
            let end = self.source[start..line_end].find([',', '}', ']']);
            return end.map_or(line_end, |end| start + end);
        }
        // The text may continue in lines with deeper indentation.
        self.block(line_end)
    }

    /// Returns the end of the following lines that belong to the value: lines indented deeper than the key, and
    /// elements of a list below it.
    fn block(&self, mut end: usize) -> usize {
        let column = self.column();
        while end < self.source.len() {
            let next = self.line_end(end + 1);
            let line = &self.source[end + 1..next];
            let depth = line.len() - line.trim_start_matches([' ', '\t']).len();
            let belongs = line.trim().is_empty()
                || depth > column
                || depth == column && line[depth..].starts_with("- ");
            if !belongs {
                break;
            }
            end = next;
        }
        end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns a source without its hidden parts.
    fn shown(source: &str) -> String {
        let mut shown = source.to_owned();
        for range in hidden(source).into_iter().rev() {
            shown.replace_range(range, "***");
        }
        shown
    }

    #[test]
    fn every_form_of_a_secret_value_is_hidden_but_not_the_text_after_it() {
        for (source, expected) in [
            ("sshPassword: hunter2 # hunter2\nx: 1\n", "sshPassword: ***\nx: 1\n"),
            ("sshPassword: \"a\\\"hunter2\\\\\" # c", "sshPassword: *** # c"),
            ("sshPassword: 'a''hunter2' # c", "sshPassword: *** # c"),
            ("{sshPassword: hunter2, x: 1}", "{sshPassword: ***, x: 1}"),
            ("{\"sshPassword\": \"hun, }ter2\", x: 1}", "{\"sshPassword\": ***, x: 1}"),
            ("sshPassword: |\n  hunter2\n\n  hunter2\nx: 1", "sshPassword: ***\nx: 1"),
            ("- sshPassword: >-\n    hunter2\n  x: 1", "- sshPassword: ***\n  x: 1"),
            ("sshPassword: hunter2\n  hunter2\nx: 1", "sshPassword: ***\nx: 1"),
            ("sshPassword:\n  hunter2\nx: 1", "sshPassword: ***\nx: 1"),
            ("sshPassword: [hunter2, \"]\", hunter2]\nx: 1", "sshPassword: ***\nx: 1"),
            ("passwords:\n- hunter2\n- hunter2\nx: 1", "passwords: ***\nx: 1"),
            ("a: &p hunter2\nsshPassword: *p\nb: 1", "a: &p ***\nsshPassword: ***\nb: 1"),
            ("a: {x: &p \"hunter2\", y: 1}\nsshPassword: *p", "a: {x: &p ***, y: 1}\nsshPassword: ***"),
            ("sshPassword: &p !!str hunter2\nb: 1", "sshPassword: &p !!str ***\nb: 1"),
            ("? sshPassword\n: hunter2\nb: 1", "? sshPassword\n: ***\nb: 1"),
            ("sshPasswrod: hunter2\nx: 1", "sshPasswrod: ***\nx: 1"),
            ("export DB_PASSWORD=hunter2 X=1", "export DB_PASSWORD=*** X=1"),
            ("GITHUB_TOKEN='hunter2 x' y", "GITHUB_TOKEN=*** y"),
            ("url: https://me:hunter2@h/x?sig=hunter2&arch=a", "url: https://***@h/x?sig=***&arch=a"),
            ("sshPrivateKeySecret: {name: keys, key: id}", "sshPrivateKeySecret: {name: keys, key: id}"),
            ("secretRef:\n  name: x\n", "secretRef:\n  name: x\n"),
            ("sshPassword: \"hunter2\nhunter2", "sshPassword: ***"),
            ("sshUsername: me\nsshPort: 22\n", "sshUsername: me\nsshPort: 22\n"),
        ] {
            let shown = shown(source);
            assert!(!shown.contains("hunter2") && !shown.contains("ter2"), "{shown}");
            let tight = |text: &str| text.replace(' ', "");
            assert_eq!(tight(&shown), tight(expected));
        }
    }
}
