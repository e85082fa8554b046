//! Secrets of a manifest: values that never show in `Debug`, and a [`Masker`] that takes them out of any text,
//! in escaped and encoded forms too.

use base64::{
    Engine as _,
    prelude::{BASE64_STANDARD_NO_PAD, BASE64_URL_SAFE_NO_PAD},
};
use regex::{Regex, RegexBuilder};
use serde::{Deserialize, Serialize};
use std::{borrow::Cow, collections::BTreeSet, fmt, fmt::Write as _, ops::Range};

/// A value that `Debug` and `Display` do not show. Serialised as the value itself: plans are not public.
#[derive(Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// Marks a value as secret.
    pub fn new(value: impl Into<String>) -> Self {
        Self(value.into())
    }

    /// The value itself.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(***)")
    }
}

/// What stands where a secret stood.
const MASK: &str = "***";
/// Texts shorter than this are not masked: they stand everywhere by chance, and a mask would only tell where.
const MIN_CHARS: usize = 3;
/// Encoded forms are masked for texts of at least so many bytes: the encoding of less stands elsewhere by chance.
const MIN_ENCODED: usize = 4;
/// A longer line of a secret is masked in parts of this many characters.
const MAX_PART: usize = 256;

/// Takes secrets out of any text.
///
/// Found are a secret, and each of its lines, as they are, and
/// - with any of their characters escaped, however often: by backslashes (JSON, YAML, shells, `Debug`), as `\u00e9`, `\xe9`,
///   `\351`, `%E9`, `+`, `&quot;`, or in the quotes of shells and YAML (`'\''`, `''`);
/// - inside base64 of something larger, in each of the three alignments, in both alphabets, and as lines of 64 or 76;
/// - in hexadecimal.
///
/// Secrets, and lines of secrets, of fewer than 3 characters are not masked; encoded forms need 4 bytes.
#[derive(Clone, Default)]
pub struct Masker {
    forms: Vec<Regex>,
    // No form of a secret is longer than this, in bytes.
    longest: usize,
}

impl Masker {
    /// A masker of these secrets.
    pub fn new<'a>(secrets: impl IntoIterator<Item = &'a Secret>) -> Self {
        let mut parts = BTreeSet::new();
        let mut encoded = BTreeSet::new();
        for secret in secrets {
            let whole = secret.expose();
            for line in whole.lines().map(str::trim).chain([whole, whole.trim()]) {
                let characters: Vec<char> = line.chars().collect();
                if characters.len() < MIN_CHARS {
                    continue;
                }
                if characters.len() <= MAX_PART {
                    parts.insert(line.to_owned());
                } else {
                    parts.extend(characters.chunks(MAX_PART).map(|part| part.iter().collect()));
                }
                if line.len() >= MIN_ENCODED {
                    encode(line.as_bytes(), &mut encoded);
                }
            }
        }
        let longest_part = parts.iter().map(|part| part.chars().count() * 16).max().unwrap_or(0);
        let longest = encoded.iter().map(String::len).max().unwrap_or(0).max(longest_part).min(16 * 1024);
        let mut forms: Vec<Regex> = Vec::new();
        for part in &parts {
            forms.extend(compile(&part.chars().map(escaped).collect::<String>()));
        }
        for form in &encoded {
            // The neighbours hold bits of the secret too.
            forms
                .extend(compile(&format!("[A-Za-z0-9+/_-]?{}[A-Za-z0-9+/_-]?={{0,2}}", regex::escape(form))));
        }
        for part in parts.iter().filter(|part| part.len() >= MIN_ENCODED) {
            let hex = part.bytes().fold(String::new(), |mut hex, byte| {
                let _ = write!(hex, "{byte:02x}");
                hex
            });
            forms.extend(compile(&format!("(?i:{hex})")));
        }
        Self { forms, longest }
    }

    /// The text without secrets: each is replaced by `***`.
    #[must_use]
    pub fn mask<'t>(&self, text: &'t str) -> Cow<'t, str> {
        let ranges = self.find(text);
        if ranges.is_empty() { Cow::Borrowed(text) } else { replace(text, &ranges).into() }
    }

    /// A masker for one line that comes in pieces, then the next.
    #[must_use]
    pub fn pieces(&self) -> PieceMasker<'_> {
        PieceMasker { masker: self, held: String::new() }
    }

    /// Where secrets stand: in order, not touching.
    fn find(&self, text: &str) -> Vec<Range<usize>> {
        let mut found = Vec::new();
        for form in &self.forms {
            let mut from = 0;
            // One may begin inside another: `aba` in `ababa`.
            while let Some(hit) = form.find_at(text, from) {
                found.push(hit.range());
                from = hit.start() + text[hit.start()..].chars().next().map_or(1, char::len_utf8);
            }
        }
        found.sort_unstable_by_key(|range| range.start);
        let mut merged: Vec<Range<usize>> = Vec::new();
        for range in found {
            match merged.last_mut() {
                Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
                _ => merged.push(range),
            }
        }
        merged
    }
}

impl fmt::Debug for Masker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Masker")
    }
}

/// Masks a line whose pieces come one after the other: a secret that was cut in two is found. The end of a piece is
/// held back until what follows is known.
#[derive(Debug)]
pub struct PieceMasker<'m> {
    masker: &'m Masker,
    held: String,
}

impl PieceMasker<'_> {
    /// The next piece, masked; `more`: the line goes on in the next call, which has to come.
    pub fn mask(&mut self, piece: &str, more: bool) -> String {
        let mut text = std::mem::take(&mut self.held);
        text.push_str(piece);
        let ranges = self.masker.find(&text);
        let mut end = text.len();
        if more {
            end = end.saturating_sub(self.masker.longest);
            while !text.is_char_boundary(end) {
                end -= 1;
            }
            if let Some(spanning) = ranges.iter().find(|range| range.start < end && end < range.end) {
                end = spanning.start;
            }
            self.held = text[end..].to_owned();
        }
        let known: Vec<_> = ranges.into_iter().take_while(|range| range.end <= end).collect();
        replace(&text[..end], &known)
    }
}

fn replace(text: &str, ranges: &[Range<usize>]) -> String {
    let mut out = String::with_capacity(text.len());
    let mut from = 0;
    for range in ranges {
        out.push_str(&text[from..range.start]);
        out.push_str(MASK);
        from = range.end;
    }
    out.push_str(&text[from..]);
    out
}

fn compile(pattern: &str) -> Option<Regex> {
    RegexBuilder::new(pattern).size_limit(64 << 20).dfa_size_limit(16 << 20).build().ok()
}

/// A character in every escaped form, as a regular expression.
fn escaped(c: char) -> String {
    let mut out = format!(r"(?:\\*{}", regex::escape(&c.to_string()));
    let code = u32::from(c);
    let mut utf16 = [0; 2];
    let units = c.encode_utf16(&mut utf16).iter().fold(String::new(), |mut units, unit| {
        let _ = write!(units, r"\\+u(?i:{unit:04x})");
        units
    });
    let _ = write!(out, r"|{units}|\\+u\{{(?i:{code:x})\}}|\\+U(?i:{code:08x})|&#{code};|&#x(?i:{code:x});");
    let (mut percent, mut hex, mut octal) = (String::new(), String::new(), String::new());
    let mut utf8 = [0; 4];
    for byte in c.encode_utf8(&mut utf8).bytes() {
        // A percent sign may be encoded itself.
        let _ = write!(percent, "%(?:25)*(?i:{byte:02x})");
        let _ = write!(hex, r"\\+x(?i:{byte:02x})");
        let _ = write!(octal, r"\\+{byte:03o}");
    }
    let _ = write!(out, "|{percent}|{hex}|{octal}");
    out.push_str(match c {
        ' ' => r"|\+",
        '\n' => r"|\\*\r\n|\\+n|(?:\\+r)\\+n|%0[Dd]%0[Aa]",
        '\r' => r"|\\+r",
        '\t' => r"|\\+t",
        '\'' => r#"|''|'\\+''|'"'"'|&apos;"#,
        '"' => "|&quot;|\"\"",
        '&' => "|&amp;",
        '<' => "|&lt;",
        '>' => "|&gt;",
        _ => "",
    });
    out.push(')');
    out
}

/// Base64 of whatever has these bytes in it: the characters that depend on them alone.
fn encode(bytes: &[u8], into: &mut BTreeSet<String>) {
    for before in 0..3usize {
        let mut padded = vec![0; before];
        padded.extend_from_slice(bytes);
        let (first, last) = ((before * 8).div_ceil(6), padded.len() * 8 / 6);
        for encoded in [BASE64_STANDARD_NO_PAD.encode(&padded), BASE64_URL_SAFE_NO_PAD.encode(&padded)] {
            let core = &encoded[first.min(last)..last];
            if core.len() >= 4 {
                into.insert(core.to_owned());
            }
            if before == 0 {
                // As `base64` and PEM break lines.
                for width in [64, 76] {
                    if encoded.len() > width {
                        let lines = encoded.as_bytes().chunks(width).filter(|line| line.len() >= 8);
                        into.extend(lines.map(|line| String::from_utf8_lossy(line).into_owned()));
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn masker(secrets: &[&str]) -> Masker {
        Masker::new(&secrets.iter().map(|text| Secret::new(*text)).collect::<Vec<_>>())
    }

    #[test]
    fn a_secret_is_masked_in_every_form() {
        let secret = "p@ss \"wörd'$\\";
        let masker = masker(&[secret]);
        let forms = [
            secret.to_owned(),
            format!("{secret:?}"),
            serde_json::to_string(secret).expect("JSON"),
            serde_json::to_string(&serde_json::to_string(secret).expect("JSON")).expect("JSON"),
            format!("'{}'", secret.replace('\'', r"'\''")),
            format!("'{}'", secret.replace('\'', "''")),
            r#"p@ss\ \"wörd\'\$\\"#.to_owned(),
            r#"p@ss \"w\u00f6rd'$\\"#.to_owned(),
            r#"p@ss \"w\303\266rd'$\\"#.to_owned(),
            "p%40ss+%22w%C3%B6rd%27%24%5C".to_owned(),
            "p@ss%20%22w%c3%b6rd'$%5c".to_owned(),
            "p%2540ss%2520%2522w%25C3%25B6rd'$%255C".to_owned(),
            "p@ss &quot;wörd&#39;$\\".to_owned(),
            "704073732022 77c3b6726427245c".replace(' ', ""),
        ];
        for form in forms {
            let masked = masker.mask(&form).into_owned();
            let rest: String = masked.replace(MASK, "");
            assert!(
                masked.contains(MASK) && rest.trim_matches(['"', '\'', '\\']).is_empty(),
                "{form} -> {masked}"
            );
        }
    }

    #[test]
    fn lines_overlaps_and_short_ones() {
        let key = "-----BEGIN-----\nabcdefgh\nijklmnop\n-----END-----\n";
        let masker = masker(&[key, "aba", "abX", "no"]);
        assert_eq!(masker.mask("  ijklmnop"), "  ***");
        assert_eq!(masker.mask("-abababX-"), "-***-");
        assert_eq!(masker.mask("no"), "no");
        assert_eq!(Masker::new(&[]).mask("x"), "x");
    }

    proptest! {
        #[test]
        fn nothing_leaks(secret in "[!-~äß🚀 ]{4,40}", before in "[a-z ]{0,9}", after in "[a-z ]{0,9}", cut in 0usize..60) {
            prop_assume!(secret.trim().len() >= 4 && !secret.contains("***"));
            let secret = secret.trim();
            prop_assume!(!before.contains(secret) && !after.contains(secret));
            let masker = masker(&[secret]);
            let text = format!("{before}{secret}{after}");
            prop_assert!(!masker.mask(&text).contains(secret));
            let json = serde_json::to_string(&text).expect("JSON");
            let escaped = serde_json::to_string(secret).expect("JSON");
            prop_assert!(!masker.mask(&json).contains(escaped.trim_matches('"')));
            let encoded = BASE64_STANDARD_NO_PAD.encode(&text);
            let masked = masker.mask(&encoded);
            prop_assert!(masked.contains(MASK), "{encoded} {masked}");
            // What is left of it decodes to nothing of the secret but at most two bytes at each end.
            prop_assert!(masked.len() <= MASK.len() + (before.len() + after.len()) * 4 / 3 + 4);
            // Cut in two anywhere.
            let mut cut = cut.min(text.len());
            while !text.is_char_boundary(cut) { cut -= 1; }
            let mut pieces = masker.pieces();
            let joined = pieces.mask(&text[..cut], true) + &pieces.mask(&text[cut..], false);
            prop_assert_eq!(joined, masker.mask(&text).into_owned());
        }
    }
}
