//! The masker transforms secrets into every view, and searches for them in the same views of a text.

use super::{
    PieceMasker, Secret,
    dump::dumps,
    matcher::Matcher,
    merge,
    parts::parts,
    replace, url,
    view::{Lines, Quotes, View, bare, has_escapes, one_alphabet, plain, unescaped},
};
use base64::{Engine as _, prelude::BASE64_STANDARD_NO_PAD};
use std::{borrow::Cow, collections::BTreeSet, fmt, fmt::Write as _, ops::Range};

/// Encoded forms are masked only for texts of at least this many bytes: shorter encodings occur by chance.
const MIN_ENCODED: usize = 4;
/// A secret with fewer bytes than this outside its quotes is searched for with its quotes.
const MIN_UNQUOTED: usize = 4;
/// A secret that contains spaces is also masked without them, if at least this many bytes are left.
const MIN_SQUEEZED: usize = 6;
/// Limit in bytes for the secrets that have encoded forms, all together; beyond it they are masked only verbatim and
/// escaped.
const MAX_ENCODED: usize = 256 * 1024;
/// Upper bound for the length of any form of a secret, in bytes.
const MAX_FORM: usize = 16 * 1024;

/// Removes secrets from any text.
///
/// Matches a secret, and each of its lines, verbatim and
/// - with any of their characters escaped, any number of times: by backslashes (JSON, YAML, C, shells, `Debug`), as
///   `\u00e9`, `\xe9`, `\351`, `%E9`, `+`, `&quot;`, or in the quotes of shells and YAML (`'\''`, `''`);
/// - with colours, cursor movements and zero-width characters inside, and wrapped over several lines;
/// - inside the base64 of a larger text, in each of the three alignments, in both alphabets, in lines of any length,
///   and of UTF-16 as PowerShell takes it;
/// - in dumps: hexadecimal in either case and with any separators, in the layouts of `xxd`, `hexdump` and `od` in any
///   base, with offsets and text columns, and characters one by one.
///
/// User information and tokens in the queries of URLs are masked whether or not they are known to be secret.
///
/// Secrets, and lines of secrets, of fewer than 3 characters are not masked; encoded forms need 4 bytes. Masking takes
/// time linear in the length of the text, regardless of the number of secrets.
#[derive(Clone, Default)]
pub struct Masker {
    /// Finds secrets in plain text, and in the bytes that a dump decodes to.
    plain: Option<Matcher>,
    unescaped: Option<Matcher>,
    /// Finds secrets that contain what looks like an escape.
    bare: Option<Matcher>,
    /// Finds secrets that consist of little more than quotes.
    quoted: Option<Matcher>,
    base64: Option<Matcher>,
    hex: Option<Matcher>,
}

impl Masker {
    /// Creates a masker of these secrets.
    pub fn new<'a>(secrets: impl IntoIterator<Item = &'a Secret>) -> Self {
        let mut all = BTreeSet::new();
        for secret in secrets {
            all.extend(parts(secret.expose()));
        }
        let (mut as_is, mut unquoted, mut quoted) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
        let mut bare_parts = BTreeSet::new();
        let (mut base64, mut hex) = (BTreeSet::new(), BTreeSet::new());
        let mut encoded = 0;
        for part in &all {
            let view = plain(part, Lines::Join);
            let bytes: Vec<u8> = view.bytes().collect();
            if part.contains(['\\', '%', '&', '+']) {
                bare_parts.insert(bare(&view).bytes().collect());
            }
            let without_quotes: Vec<u8> = unescaped(&view, Quotes::Drop).bytes().collect();
            if without_quotes.len() < MIN_UNQUOTED {
                quoted.insert(unescaped(&view, Quotes::Keep).bytes().collect());
            } else {
                unquoted.insert(without_quotes);
            }
            let squeezed: Vec<u8> = bytes.iter().copied().filter(|byte| *byte != b' ').collect();
            if squeezed.len() >= MIN_SQUEEZED {
                as_is.insert(squeezed);
            }
            encoded += part.len();
            if part.len() >= MIN_ENCODED && encoded <= MAX_ENCODED {
                for line in [part.as_bytes(), &bytes] {
                    let digits = line.iter().fold(String::new(), |mut digits, byte| {
                        // Writing to a `String` does not fail.
                        let _ = write!(digits, "{byte:02x}");
                        digits
                    });
                    hex.insert(digits.into_bytes());
                    base64_cores(line, &mut base64);
                }
                let utf16: Vec<u8> = part.encode_utf16().flat_map(u16::to_le_bytes).collect();
                base64_cores(&utf16, &mut base64);
            }
            as_is.insert(bytes);
        }
        Self {
            plain: Matcher::new(as_is),
            unescaped: Matcher::new(unquoted),
            bare: Matcher::new(bare_parts),
            quoted: Matcher::new(quoted),
            base64: Matcher::new(base64),
            hex: Matcher::new(hex),
        }
    }

    /// Returns the text with each secret replaced by `***`.
    #[must_use]
    pub fn mask<'t>(&self, text: &'t str) -> Cow<'t, str> {
        let ranges = self.find(text);
        if ranges.is_empty() { Cow::Borrowed(text) } else { replace(text, &ranges).into() }
    }

    /// Masks consecutive lines, including secrets that span several of them.
    #[must_use]
    pub fn mask_lines(&self, lines: Vec<String>) -> Vec<String> {
        let mut masked = Vec::with_capacity(lines.len());
        let mut pieces = self.pieces();
        for line in lines {
            pieces.push(&line.replace('\n', " "), false, &mut |line| masked.push(line.to_owned()));
        }
        pieces.finish(&mut |line| masked.push(line.to_owned()));
        masked
    }

    /// Returns a masker for lines that arrive one after the other, long ones in pieces.
    #[must_use]
    pub fn pieces(&self) -> PieceMasker<'_> {
        PieceMasker::new(self)
    }

    /// Returns an upper bound for the length of any form of a secret, in bytes.
    pub(super) fn longest(&self) -> usize {
        // No form uses more than about a dozen characters for a byte.
        let longest = self.plain.as_ref().map_or(0, Matcher::longest);
        (longest * 16).min(MAX_FORM)
    }

    /// Returns the ranges of secrets, in order and not touching.
    pub(super) fn find(&self, text: &str) -> Vec<Range<usize>> {
        self.scan(text, None)
    }

    /// Like [`find`](Self::find), and also returns where secrets begin that may continue past the end.
    pub(super) fn find_open(&self, text: &str) -> (Vec<Range<usize>>, Open) {
        let mut open = Open::default();
        (self.scan(text, Some(&mut open)), open)
    }

    fn scan(&self, text: &str, mut open: Option<&mut Open>) -> Vec<Range<usize>> {
        let mut found = Vec::new();
        url::find(text, &mut found);
        self.views(text, &mut |matcher, view, form| {
            matcher.find(view.bytes(), |range| {
                let range = if form == Form::Base64 { with_neighbours(view, range) } else { range };
                found.push(view.source(&range));
            });
            if let Some(open) = open.as_deref_mut() {
                open.find_in(matcher, view, form);
            }
        });
        merge(found)
    }

    /// Calls `see` with each view of a text in which secrets may be found, and the matcher for that view.
    fn views(&self, text: &str, see: &mut dyn FnMut(&Matcher, &View, Form)) {
        let Some(as_is) = &self.plain else { return };
        let view = plain(text, Lines::Join);
        see(as_is, &view, Form::Plain);
        if text.contains(['\x1b', '\u{9b}']) {
            // What a terminal reads as the end of a control sequence may be the beginning of a secret.
            let without = text.replace('\x1b', "\0").replace('\u{9b}', "\0\0");
            see(as_is, &plain(&without, Lines::Join), Form::Plain);
        }
        let mut encoded = vec![one_alphabet(&view, b'\n')];
        if let Some(matcher) = &self.unescaped
            && has_escapes(&view)
        {
            let view = unescaped(&view, Quotes::Drop);
            see(matcher, &view, Form::Plain);
            if self.base64.is_some() {
                // A plus may have been decoded as a space.
                encoded.push(one_alphabet(&view, b' '));
            }
        }
        if let Some(matcher) = &self.bare
            && has_escapes(&view)
        {
            see(matcher, &bare(&view), Form::Plain);
        }
        if let Some(matcher) = &self.quoted
            && has_escapes(&view)
        {
            see(matcher, &unescaped(&view, Quotes::Keep), Form::Plain);
        }
        if let Some(matcher) = &self.base64 {
            encoded.iter().for_each(|view| see(matcher, view, Form::Base64));
        }
        if let Some(matcher) = &self.hex {
            let dumps = if text.contains('\n') { dumps(&plain(text, Lines::Keep)) } else { dumps(&view) };
            dumps.hex.iter().for_each(|view| see(matcher, view, Form::Hex));
            dumps.bytes.iter().for_each(|view| see(as_is, view, Form::Dump));
        }
    }
}

impl fmt::Debug for Masker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Masker")
    }
}

/// Where secrets begin that may continue past the end of a text.
#[derive(Debug, Default)]
pub(super) struct Open {
    /// The first of them.
    pub(super) any: Option<usize>,
    /// The first of those that match too many bytes to be a coincidence.
    pub(super) hold: Option<usize>,
}

impl Open {
    fn find_in(&mut self, matcher: &Matcher, view: &View, form: Form) {
        let first = view.0.len().saturating_sub(matcher.longest());
        let tail: Vec<u8> = view.0[first..].iter().map(|unit| unit.byte).collect();
        let Some(at) = matcher.open_at(&tail) else { return };
        let start = view.0[first + at].start as usize;
        let earlier = |known: Option<usize>| Some(known.map_or(start, |known| known.min(start)));
        self.any = earlier(self.any);
        if tail.len() - at >= form.min_length() {
            self.hold = earlier(self.hold);
        }
    }
}

/// The form in which a view shows secrets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Plain,
    Base64,
    Hex,
    Dump,
}

impl Form {
    /// Number of matching bytes from which the end of a line is treated as the beginning of a secret.
    fn min_length(self) -> usize {
        match self {
            Self::Plain | Self::Dump => 3,
            Self::Base64 | Self::Hex => 4,
        }
    }
}

/// Extends a match in base64 by the adjacent characters, which also contain bits of the secret.
fn with_neighbours(view: &View, range: Range<usize>) -> Range<usize> {
    let is_digit = |at: usize| {
        view.0
            .get(at)
            .is_some_and(|unit| unit.byte.is_ascii_alphanumeric() || matches!(unit.byte, b'+' | b'/'))
    };
    let Range { mut start, mut end } = range;
    if start > 0 && is_digit(start - 1) {
        start -= 1;
    }
    if is_digit(end) {
        end += 1;
    }
    while end < range.end + 3 && view.0.get(end).is_some_and(|unit| unit.byte == b'=') {
        end += 1;
    }
    start..end
}

/// Adds the base64 of any text that contains these bytes, reduced to the characters that depend on them alone; one for
/// each alignment.
fn base64_cores(bytes: &[u8], into: &mut BTreeSet<Vec<u8>>) {
    for before in 0..3usize {
        let mut padded = vec![0; before];
        padded.extend_from_slice(bytes);
        let (first, last) = ((before * 8).div_ceil(6), padded.len() * 8 / 6);
        let encoded = BASE64_STANDARD_NO_PAD.encode(&padded);
        let core = &encoded.as_bytes()[first.min(last)..last];
        if core.len() >= 4 {
            into.insert(core.to_vec());
        }
    }
}
