//! Redacts URLs: user information, and values of the query that sign or authorise.

use super::MASK;
use std::{borrow::Cow, ops::Range};
use url::Url;

/// Query keys whose values say what is fetched, and do not authorise.
const PUBLIC: [&str; 9] = ["version", "v", "arch", "format", "name", "file", "path", "release", "socket"];

/// Substrings of keys whose values authorise.
const SENSITIVE: [&str; 14] = [
    "sig", "token", "secret", "key", "pass", "pwd", "auth", "cred", "session", "jwt", "sas", "policy",
    "hmac", "ticket",
];

/// Values of at least this length count as tokens if their key does not say what they are.
const TOKEN: usize = 16;

/// Returns a URL as it may be shown and recorded: user information, the fragment, and all values of the query except
/// known harmless ones (`version`, `arch`…) are masked. Scheme, host, path and the names in the query are kept.
#[must_use]
pub fn public_url(url: &Url) -> String {
    let mut url = url.clone();
    // Both calls fail only for URLs that cannot have user information, and these have none.
    if url.password().is_some() {
        let _ = url.set_password(None);
        let _ = url.set_username(MASK);
    } else if !url.username().is_empty() {
        let _ = url.set_username(MASK);
    }
    if let Some(query) = url.query().map(public_query) {
        url.set_query(Some(&query));
    }
    if url.fragment().is_some() {
        url.set_fragment(None);
    }
    url.to_string()
}

/// Masks the values of a query.
fn public_query(query: &str) -> String {
    let pair = |pair: &str| match pair.split_once('=') {
        Some((key, value)) if value.is_empty() || is_public(key) => pair.to_owned(),
        Some((key, _)) => format!("{key}={MASK}"),
        None if pair.len() >= TOKEN => MASK.to_owned(),
        None => pair.to_owned(),
    };
    query.split('&').map(pair).collect::<Vec<_>>().join("&")
}

fn is_public(key: &str) -> bool {
    PUBLIC.iter().any(|public| public.eq_ignore_ascii_case(key))
}

fn is_sensitive(key: &str, value: &str) -> bool {
    let key = key.to_ascii_lowercase();
    !value.is_empty()
        && !PUBLIC.contains(&key.as_str())
        && (value.len() >= TOKEN || SENSITIVE.iter().any(|part| key.contains(part)))
}

/// Returns what must not be shown of a URL: passwords, tokens, and the whole of a query that has any.
pub(crate) fn secrets_of(url: &Url) -> Vec<String> {
    let mut found = Vec::new();
    let mut add = |text: &str| {
        let decoded = percent_decode(text);
        if decoded != text {
            found.push(decoded);
        }
        found.push(text.to_owned());
    };
    match url.password().filter(|password| !password.is_empty()) {
        Some(password) => add(password),
        // A token without a password.
        None if url.username().len() >= TOKEN / 2 => add(url.username()),
        None => {}
    }
    if let Some(query) = url.query().filter(|query| public_query(query) != *query) {
        add(query);
        for (key, value) in query.split('&').filter_map(|pair| pair.split_once('=')) {
            if value.len() >= TOKEN / 2 && is_sensitive(key, value) {
                add(value);
            }
        }
    }
    if let Some(fragment) = url.fragment().filter(|fragment| fragment.len() >= TOKEN / 2) {
        add(fragment);
    }
    found
}

/// Masks the user information and the tokens of the URLs in a text.
///
/// ```
/// use rudder_core::secret::redact_urls;
/// let text = "cannot fetch https://me:hunter2@example.org/x?arch=arm&sig=0123";
/// assert_eq!(redact_urls(text), "cannot fetch https://***@example.org/x?arch=arm&sig=***");
/// ```
#[must_use]
pub fn redact_urls(text: &str) -> Cow<'_, str> {
    let mut ranges = Vec::new();
    find(text, &mut ranges);
    if ranges.is_empty() { Cow::Borrowed(text) } else { super::replace(text, &ranges).into() }
}

/// Returns the ranges of a text that must not be shown because of URLs.
pub(crate) fn url_secrets(text: &str) -> Vec<Range<usize>> {
    let mut found = Vec::new();
    find(text, &mut found);
    found
}

/// Adds the ranges of a text that must not be shown because of URLs, in order and not touching.
pub(super) fn find(text: &str, found: &mut Vec<Range<usize>>) {
    let mut from = 0;
    while let Some(at) = text[from..].find("://") {
        let start = from + at + 3;
        let is_end = |c: char| c.is_whitespace() || c.is_control() || "\"'<>`\\|".contains(c);
        let end = text[start..].find(is_end).map_or(text.len(), |length| start + length);
        one(text, start..end, found);
        // A URL may contain another in its query.
        from = start;
    }
    found.sort_unstable_by_key(|range| (range.start, range.end));
    found.dedup_by(|next, last| {
        let inside = next.start < last.end;
        if inside {
            last.end = last.end.max(next.end);
        }
        inside
    });
}

/// Adds what must not be shown of one URL, whose authority begins where the range does.
fn one(text: &str, range: Range<usize>, found: &mut Vec<Range<usize>>) {
    let rest = &text[range.clone()];
    // A URL that follows is handled on its own.
    let rest = rest.find("://").map_or(rest, |next| &rest[..next]);
    let authority = &rest[..rest.find(['/', '?', '#']).unwrap_or(rest.len())];
    let port_is_none =
        authority.rsplit_once(':').is_some_and(|(_, port)| port.bytes().any(|c| !c.is_ascii_digit()));
    let user_end = authority.rfind('@').or_else(|| rest.rfind('@').filter(|_| port_is_none));
    if let Some(user) = user_end.filter(|end| *end > 0 && rest[..*end] != *MASK) {
        found.push(range.start..range.start + user);
    }
    let from = user_end.unwrap_or(0);
    let Some(query) = rest[from..].find('?').map(|at| from + at + 1) else { return };
    let query_end = rest[query..].find('#').map_or(rest.len(), |length| query + length);
    let mut at = query;
    for pair in rest[query..query_end].split(['&', ';']) {
        if let Some((key, value)) = pair.split_once('=')
            && value != MASK
            && is_sensitive(key, value)
        {
            let start = range.start + at + key.len() + 1;
            found.push(start..start + value.len());
        }
        at += pair.len() + 1;
    }
}

/// Redacts a URL as an author wrote it, which may not be valid: everything that could be a password or a token is
/// masked.
pub(crate) fn redact_written(text: &str) -> String {
    let (head, rest) = match text.find("//") {
        Some(at) => text.split_at(at + 2),
        None => match text.split_once(':') {
            Some((scheme, _)) if text.contains('@') && scheme.len() < 8 && !scheme.contains('@') => {
                text.split_at(scheme.len() + 1)
            }
            _ => ("", text),
        },
    };
    let before_query = &rest[..rest.find('?').unwrap_or(rest.len())];
    let rest = match before_query.rfind('@').or_else(|| rest.rfind('@')) {
        Some(at) => format!("{MASK}{}", &rest[at..]),
        None => rest.to_owned(),
    };
    let rest = match rest.split_once('?') {
        Some((path, query)) => {
            let query = query.split('#').next().unwrap_or_default();
            format!("{path}?{}", public_query(query))
        }
        None => rest,
    };
    format!("{head}{rest}")
}

/// Decodes percent-encoding (RFC 3986, 2.1); bytes that are not UTF-8 are replaced.
fn percent_decode(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let digit = |c: &u8| char::from(*c).to_digit(16);
        let decoded = match (first, tail) {
            (b'%', [high, low, ..]) => digit(high).zip(digit(low)),
            _ => None,
        };
        match decoded.and_then(|(high, low)| u8::try_from(high * 16 + low).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &tail[2..];
            }
            None => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_public_url_still_identifies_its_content() {
        let public = |url: &str| public_url(&url.parse().unwrap());
        assert_eq!(public("https://h/x.qcow2"), "https://h/x.qcow2");
        assert_eq!(
            public("https://u:geheim@h/x?v=1&X-Amz-Signature=abc&arch=arm64#f"),
            "https://***@h/x?v=1&X-Amz-Signature=***&arch=arm64"
        );
        assert_eq!(public("https://ghp_0123456789@h/x"), "https://***@h/x");
        assert_eq!(public("https://h/x?0123456789abcdef"), "https://h/x?***");
        assert_eq!(public("file:///srv/a.img"), "file:///srv/a.img");
    }

    #[test]
    fn secrets_are_removed_from_urls_in_text() {
        for (text, shown) in [
            ("see https://h:8080/x?arch=arm&page=2.", "see https://h:8080/x?arch=arm&page=2."),
            ("<ftp://u@h> 'https://a:b:c@h/p'", "<ftp://***@h> 'https://***@h/p'"),
            ("https://u:p/w@h/x", "https://***@h/x"),
            (
                "https://h/x?X-Amz-Credential=AK&sp=r&sig=a%2Bb end",
                "https://h/x?X-Amz-Credential=***&sp=r&sig=*** end",
            ),
            ("https://h/?next=https://u:p@i/", "https://h/?next=https://***@i/"),
            ("https://***@h/x?sig=***", "https://***@h/x?sig=***"),
            ("http://h/mail@x", "http://h/mail@x"),
        ] {
            assert_eq!(redact_urls(text), shown);
        }
    }

    #[test]
    fn an_invalid_url_shows_no_password() {
        for text in [
            "ftp://user:hunter2@example.org/x",
            "htps:/user:hunter2@h",
            "user:hunter2@h/x",
            "https://u:hun/hunter2@h",
            "https//u:hunter2@h",
            "x://h/?token=hunter2",
            "https://u:a?hunter2@h/",
            "https://u:hunter2#@h/",
        ] {
            assert!(!redact_written(text).contains("hunter2"), "{}", redact_written(text));
        }
        assert_eq!(redact_written("htps://h/x?v=1"), "htps://h/x?v=1");
    }

    #[test]
    fn the_secrets_of_a_url_are_its_credentials() {
        let of = |url: &str| secrets_of(&url.parse().unwrap());
        assert!(of("https://h/x?arch=arm64").is_empty());
        assert_eq!(of("https://u:p%40ss@h/x"), ["p@ss", "p%40ss"]);
        let found = of("https://h/x?X-Amz-Expires=3600&X-Amz-Signature=0123456789abcdef");
        assert!(found.contains(&"0123456789abcdef".to_owned()) && !found.contains(&"3600".to_owned()));
    }
}
