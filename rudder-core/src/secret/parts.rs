//! Splits a secret into the parts to search for: its lines, and if it is a text that contains secrets, the values in
//! it.

use std::collections::BTreeSet;

/// Texts shorter than this are not masked: they occur everywhere by chance, and a mask would only reveal where.
pub(super) const MIN_CHARS: usize = 3;
/// A longer line of a secret is masked in parts of this many characters.
const MAX_PART: usize = 256;

/// Lines of scripts that are not secret, even if the script is.
const SYNTAX: [&str; 26] = [
    "fi",
    "done",
    "else",
    "then",
    "esac",
    "do",
    "{",
    "}",
    ";;",
    "set -e",
    "set -eu",
    "set -ex",
    "set -eux",
    "set -x",
    "set -euo pipefail",
    "exit",
    "exit 0",
    "exit 1",
    "true",
    "false",
    "return",
    "EOF",
    "---",
    "...",
    "#cloud-config",
    ")",
];

/// Returns the parts of a secret that are masked: the whole secret if it is short, and each of its lines, long ones in
/// pieces.
pub(super) fn parts(secret: &str) -> BTreeSet<String> {
    let mut parts = BTreeSet::new();
    let is_text = secret.trim().contains('\n');
    for line in secret.lines().map(str::trim).chain([secret, secret.trim()]) {
        if is_text && (SYNTAX.contains(&line) || line.starts_with("#!")) {
            continue;
        }
        let count = line.chars().count();
        if count < MIN_CHARS {
            continue;
        }
        // The whole of a text with several lines is needed only if its lines are too short.
        if is_text && line.contains('\n') && count > MAX_PART {
            continue;
        }
        if count <= MAX_PART {
            parts.insert(line.to_owned());
        } else {
            pieces(line, &mut parts);
        }
    }
    parts
}

/// Splits a line into pieces of equal length; the last overlaps the one before, so that none is short.
fn pieces(line: &str, parts: &mut BTreeSet<String>) {
    let boundaries: Vec<usize> = line.char_indices().map(|(at, _)| at).chain([line.len()]).collect();
    let count = boundaries.len() - 1;
    for first in (0..count).step_by(MAX_PART) {
        let first = first.min(count - MAX_PART);
        parts.insert(line[boundaries[first]..boundaries[first + MAX_PART]].to_owned());
    }
}

/// Words that occur in many scripts and files, and reveal nothing.
const COMMON: [&str; 24] = [
    "true",
    "false",
    "null",
    "none",
    "localhost",
    "root",
    "python3",
    "x86_64",
    "amd64",
    "arm64",
    "aarch64",
    "utf-8",
    "en_US",
    "en_US.UTF-8",
    "noninteractive",
    "https",
    "http",
    "bash",
    "/bin/sh",
    "/bin/bash",
    "default",
    "yes",
    "enabled",
    "latest",
];

/// Returns the values in a text that is secret as a whole (a script, a configuration file, user data): what follows
/// `=`, `:` or an option, quoted texts, user information of URLs, and words that look like tokens anywhere. These may
/// be output on their own, for example by a command that was given one.
pub(crate) fn values(text: &str) -> Vec<String> {
    let mut found = BTreeSet::new();
    for line in text.lines() {
        let line = line.trim();
        if line.starts_with("#!") {
            continue;
        }
        quoted(line, &mut found);
        let mut last = "";
        for word in line.split_whitespace() {
            let after_option = last.len() > 1 && last.starts_with('-')
                || matches!(last, "echo" | "printf" | "<<<")
                || last.ends_with(':')
                || last.ends_with('=');
            word_values(word, after_option, &mut found);
            last = word;
        }
    }
    found.into_iter().collect()
}

/// Adds the quoted texts of a line, without the quotes.
fn quoted(line: &str, found: &mut BTreeSet<String>) {
    for quote in ['"', '\''] {
        for value in line.split(quote).skip(1).step_by(2) {
            let value = value.trim();
            // A sentence is a message, not a value.
            if value.len() >= 4 && value.split_whitespace().count() <= 2 {
                add(value, found);
                word_values(value, true, found);
            }
        }
    }
}

fn word_values(word: &str, is_value: bool, found: &mut BTreeSet<String>) {
    let outer = |c: char| "\"'`;,()[]{}<>|&".contains(c);
    let word = word.trim_matches(outer);
    if is_value {
        add(word, found);
    }
    // NAME=value, name:password, user:password@host.
    for (at, separator) in word.match_indices(['=', ':']) {
        let value = word[at + separator.len()..].trim_matches(outer);
        add(value, found);
        if let Some((user, _)) = value.rsplit_once('@') {
            add(user.trim_start_matches('/'), found);
        }
    }
    for piece in word.split(|c: char| outer(c) || "=:/@?$".contains(c)) {
        if looks_like_token(piece) {
            add(piece, found);
        }
    }
}

/// Whether a word looks like a token: letters mixed with digits, capitals inside, or very long.
fn looks_like_token(word: &str) -> bool {
    let has = |test: fn(&u8) -> bool| word.bytes().any(|byte| test(&byte));
    let (letters, digits) = (has(u8::is_ascii_alphabetic), has(u8::is_ascii_digit));
    let inner_capital =
        word.as_bytes().windows(2).any(|pair| pair[0].is_ascii_lowercase() && pair[1].is_ascii_uppercase());
    let is_plain = word
        .bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'+' | b'~'));
    word.len() >= 6 && (letters && digits || inner_capital || !is_plain && letters) || word.len() >= 20
}

fn add(value: &str, found: &mut BTreeSet<String>) {
    let value = value.trim_matches(|c: char| "\"'`;,".contains(c));
    let is_variable = value.starts_with('$') || value.starts_with('-') || value.starts_with("{{");
    let is_path = value.starts_with('/') && !value[1..].chars().any(|c| c.is_ascii_digit());
    let is_syntax = SYNTAX.contains(&value);
    let is_number = value.len() < 6 && value.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
    if value.len() >= 4 && !is_variable && !is_path && !is_number && !is_syntax && !COMMON.contains(&value) {
        found.insert(value.to_owned());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_in_scripts_are_secret_but_commands_are_not() {
        let script = "#!/bin/sh\nset -e\nexport DB_PASSWORD=hunter2 MODE=\"night owl\"\ncurl -u me:s3cr3tpw https://tok3n99@h/x\n\
                      echo root:plainpw | chpasswd\nmysql --password=opensesame -p 'quoted!'\napt-get install -y nginx\n\
                      password: swordfish\n  \"api\": \"longvalue\"\necho swordless | passwd --stdin\nAKIA0123456789ABCDEF\nfi\n";
        let found = values(script);
        for value in [
            "hunter2",
            "night owl",
            "s3cr3tpw",
            "tok3n99",
            "plainpw",
            "opensesame",
            "quoted!",
            "swordfish",
            "longvalue",
            "swordless",
            "AKIA0123456789ABCDEF",
        ] {
            assert!(found.iter().any(|found| found == value), "{value}: {found:?}");
        }
        for word in ["export", "apt-get", "install", "chpasswd", "/bin/sh", "set", "https", "mysql"] {
            assert!(!found.iter().any(|found| found == word), "{word}: {found:?}");
        }
    }

    #[test]
    fn a_long_line_is_split_into_pieces_none_of_which_is_short() {
        let found = parts(&"ä".repeat(600));
        assert!(found.iter().all(|part| part.chars().count() == MAX_PART));
        assert_eq!(
            parts("ab\nfi\nabc\n#!/bin/sh\n"),
            ["abc", "ab\nfi\nabc\n#!/bin/sh", "ab\nfi\nabc\n#!/bin/sh\n"].map(String::from).into()
        );
    }
}
