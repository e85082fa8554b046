//! Checks of the files of a build and the references to them, and of everything that is downloaded: URLs and checksums.

use super::{
    codes,
    findings::{Findings, nearest},
};
use crate::{
    digest::Digest,
    manifest::{BuildSpec, File, FileNames, Iso, ValuePath},
    secret::redact_written,
    visible::{Quoted, cut},
};
use std::{
    cell::RefCell,
    collections::{HashMap, HashSet},
};
use url::Url;

/// The names in `files`, and which of them are used.
#[derive(Debug)]
pub(super) struct Names<'m> {
    files: HashMap<&'m str, &'m File>,
    sorted: Vec<&'m str>,
    used: RefCell<HashSet<&'m str>>,
}

impl<'m> Names<'m> {
    pub(super) fn of(spec: &'m BuildSpec) -> Self {
        let files = spec.files.iter().rev();
        let files: HashMap<_, _> = files.filter_map(|file| Some((file.name.as_deref()?, file))).collect();
        let mut sorted: Vec<&str> = files.keys().copied().collect();
        sorted.sort_unstable();
        Self { files, sorted, used: RefCell::default() }
    }

    /// Records that a file is used; reports it if `files` does not have it.
    pub(super) fn refer(
        &self,
        findings: &mut Findings<'_>,
        name: &str,
        at: &ValuePath<'_>,
    ) -> Option<&'m File> {
        match self.files.get_key_value(name) {
            Some((name, file)) => {
                self.used.borrow_mut().insert(name);
                Some(file)
            }
            None => {
                let names = self.sorted.iter().copied();
                findings.unknown_reference(&codes::UNKNOWN_FILE, at, "an entry in `files`", name, names);
                None
            }
        }
    }
}

/// Checks the entries of `files`.
pub(super) fn declared(findings: &mut Findings<'_>, spec: &BuildSpec, at: &ValuePath<'_>) {
    let files = at.key("files");
    findings.unique("file", &files, spec.files.iter().map(|file| file.name.as_deref()));
    for (index, file) in spec.files.iter().enumerate() {
        let at = files.index(index);
        match file.name.as_deref() {
            None => findings.missing(
                &at,
                "name",
                "name the file, so that steps, the floppy and the HTTP server can refer to it",
            ),
            Some(name) => file_name(findings, name, &at.key("name")),
        }
        match (&file.inline, &file.url) {
            (Some(_), Some(_)) => findings.exclusive(&at, "inline", "url"),
            (None, None) if !findings.written(false, &at.key("url")) => {
                findings.missing(&at, "inline", "give the content of the file, or use `url`");
            }
            _ => {}
        }
        match file.url.as_deref() {
            Some(url) => download(findings, "the file", url, file.checksum.as_deref(), &at),
            None if file.checksum.is_some() => checksum_of_nothing(findings, &at),
            None => {}
        }
    }
}

/// Warns about entries of `files` that nothing uses.
pub(super) fn unused(findings: &mut Findings<'_>, spec: &BuildSpec, at: &ValuePath<'_>, names: &Names<'_>) {
    let files = at.key("files");
    for (index, file) in spec.files.iter().enumerate() {
        if let Some(name) = file.name.as_deref()
            && !names.used.borrow().contains(name)
        {
            findings
                .report(
                    &codes::UNUSED_FILE,
                    &files.index(index).key("name"),
                    format!("the file {name:?} is not used", name = Quoted(name)),
                )
                .help = Some("name it in a file step, `floppy` or `httpDirectory`, or remove it".to_owned());
        }
    }
}

fn file_name(findings: &mut Findings<'_>, name: &str, at: &ValuePath<'_>) {
    let is_invalid = name.is_empty()
        || name.len() > 255
        || name == "."
        || name.contains("..")
        || name.contains('/')
        || name.chars().any(char::is_control);
    if is_invalid {
        let short: String = name.chars().take(80).collect();
        findings
            .report(
                &codes::INVALID_FILE_NAME,
                at,
                format!("expected a file name without `/`, `..` and control characters, but found {short:?}"),
            )
            .help =
            Some("use a plain name; the `destination` of a file step is the path in the guest".to_owned());
    }
}

/// Checks each `files[].name` of `httpDirectory` or `floppy` against `files`.
pub(super) fn references<'m>(
    findings: &mut Findings<'_>,
    list: &FileNames,
    at: &ValuePath<'_>,
    names: &Names<'m>,
) -> Vec<&'m File> {
    let list_at = at.key("files");
    let mut files = Vec::new();
    for (index, reference) in list.files.iter().enumerate() {
        let at = list_at.index(index);
        match reference.name.as_deref() {
            None => findings.missing(&at, "name", "name an entry in `files`"),
            Some(name) => files.extend(names.refer(findings, name, &at.key("name"))),
        }
    }
    files
}

/// Checks CD-ROMs.
pub(super) fn isos(findings: &mut Findings<'_>, isos: &[Iso], at: &ValuePath<'_>) {
    for (index, iso) in isos.iter().enumerate() {
        let at = at.index(index);
        match iso.url.as_deref() {
            Some(url) => download(findings, "the ISO", url, iso.checksum.as_deref(), &at),
            None => findings.missing(&at, "url", "give the URL of the ISO"),
        }
    }
}

/// Checks a `url` and its `checksum`, both fields of `parent`.
pub(super) fn download(
    findings: &mut Findings<'_>,
    what: &str,
    written: &str,
    checksum: Option<&str>,
    parent: &ValuePath<'_>,
) {
    let at = parent.key("url");
    match checked_url(written) {
        Err(problem) => {
            findings.report(&codes::INVALID_URL, &at, problem).help = Some(url_help(written).to_owned());
        }
        Ok(url) => {
            if let Some(unpinned) = unpinned(&url) {
                findings.report(&codes::UNPINNED_URL, &at, format!("the URL {unpinned}")).help =
                    Some("use the address of a dated or numbered release".to_owned());
            }
        }
    }
    let field = parent.key("checksum");
    match checksum {
        None => {
            if !findings.written(false, &field) {
                findings
                    .report(
                        &codes::MISSING_CHECKSUM,
                        &at,
                        format!(
                            "{what} has no `checksum`: a change of the content at the URL would go \
                             unnoticed"
                        ),
                    )
                    .help = Some("add `checksum:` with the sha256 that the publisher states".to_owned());
            }
        }
        Some(checksum) => {
            if let Err(error) = checksum.parse::<Digest>() {
                let finding = findings.report(&codes::INVALID_CHECKSUM, &field, error.to_string());
                finding.help = match checksum.len() {
                    32 => Some("use a sha256; this looks like an md5".to_owned()),
                    40 => Some("use a sha256; this looks like a sha1".to_owned()),
                    128 => Some("use a sha256; this looks like a sha512".to_owned()),
                    _ => None,
                };
            }
        }
    }
}

/// Reports a `checksum` without a `url` beside it.
pub(super) fn checksum_of_nothing(findings: &mut Findings<'_>, parent: &ValuePath<'_>) {
    if !findings.written(false, &parent.key("url")) {
        findings
            .report(
                &codes::INVALID_CHECKSUM,
                &parent.key("checksum"),
                "expected a `url` beside the checksum, but found none",
            )
            .help = Some("remove the field".to_owned());
    }
}

/// Parses a URL that can be fetched; the error says why it cannot. Never shows a password in the URL.
pub(crate) fn checked_url(written: &str) -> Result<Url, String> {
    let shown = || format!("{:?}", Quoted(&redact_written(cut(written, 2000).unwrap_or(written))));
    let is_break = |c: char| matches!(c, '\t' | '\n' | '\r');
    if written.contains(is_break) || written.trim() != written {
        return Err(format!(
            "expected a URL without surrounding spaces and without line breaks, but found {}",
            shown()
        ));
    }
    let url = Url::parse(written)
        .map_err(|_| format!("expected an http, https or file URL, but found {}", shown()))?;
    match url.scheme() {
        "http" | "https" => Ok(url),
        "file" => match written.find(['#', '?', '\\']) {
            // These would end the path, or be read as a slash.
            Some(at) => {
                let found = &written[at..=at];
                Err(format!(
                    "expected a path in the file URL, but found `{found}`, which {}",
                    MEANING[usize::from(found == "\\")]
                ))
            }
            None if url.host_str().is_some_and(|host| !host.is_empty()) => {
                Err(format!("expected file:/// and an absolute path, but found {}", shown()))
            }
            None => Ok(url),
        },
        other => {
            let near = nearest(other, ["http", "https", "file"]);
            let near = near.map(|near| format!(" (did you mean {near}?)")).unwrap_or_default();
            Err(format!("expected an http, https or file URL, but found {}{near}", shown()))
        }
    }
}

/// Meaning of `#` and `?`, and of a backslash, in a URL.
const MEANING: [&str; 2] = ["ends the path", "is read as a slash"];

/// Returns the help for a URL that cannot be fetched.
fn url_help(written: &str) -> &'static str {
    if written.get(..5).is_some_and(|start| start.eq_ignore_ascii_case("file:"))
        && written.contains(['#', '?', '\\'])
    {
        "in a URL, write `%23` for `#`, `%3F` for `?` and `%5C` for a backslash"
    } else {
        "write http://, https:// or file:/// and the location"
    }
}

/// Why the content of a URL or an image may change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unpinned<'u> {
    /// A path segment that means "the newest".
    Moving(&'u str),
    /// An image reference without a tag.
    Untagged,
}

impl std::fmt::Display for Unpinned<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Moving(word) => {
                write!(f, "refers to `{word}`, which changes over time: the build cannot be repeated")
            }
            Self::Untagged => f.write_str("has no tag, which means `latest`: the build cannot be repeated"),
        }
    }
}

/// Path segments that mark content as changing over time.
const MOVING: &[&str] = &["latest", "current", "nightly", "daily", "rolling", "head", "main", "master"];

/// Returns why the content of a URL may change, if it may: a directory named `latest`, `current`…, or a file name that
/// contains `latest`.
pub(crate) fn unpinned(url: &Url) -> Option<Unpinned<'_>> {
    url.path().split('/').find_map(|segment| {
        let lower = segment.to_ascii_lowercase();
        let moving = MOVING.contains(&lower.as_str())
            || lower.split(|c: char| !c.is_ascii_alphanumeric()).any(|word| word == "latest");
        moving.then_some(Unpinned::Moving(segment))
    })
}

/// Returns why the content of an OCI reference may change, if it may.
pub(crate) fn unpinned_image(image: &str) -> Option<Unpinned<'_>> {
    if image.contains("@sha256:") {
        return None;
    }
    let name = image.rsplit('/').next().unwrap_or(image);
    match name.split_once(':') {
        None => Some(Unpinned::Untagged),
        Some((_, tag)) => {
            MOVING.contains(&tag.to_ascii_lowercase().as_str()).then_some(Unpinned::Moving(tag))
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn moving_urls_are_distinguished_from_pinned_urls() {
        let moving = |url: &str| unpinned(&url.parse().unwrap()).is_some();
        assert!(moving("https://cloud.debian.org/images/cloud/bookworm/latest/debian-12.qcow2"));
        assert!(moving("https://cloud-images.ubuntu.com/noble/current/noble.img"));
        assert!(moving("https://example.org/Fedora-Cloud-Latest.x86_64.qcow2"));
        assert!(!moving("https://cloud.debian.org/images/cloud/bookworm/20250214-2056/debian-12.qcow2"));
        assert!(!moving("https://example.org/currents/mainland.img"));
    }

    #[test]
    fn images_are_pinned_by_digest_or_tag() {
        assert_eq!(unpinned_image("quay.io/x/debian"), Some(Unpinned::Untagged));
        assert_eq!(unpinned_image("localhost:5000/x:latest"), Some(Unpinned::Moving("latest")));
        assert_eq!(unpinned_image("localhost:5000/x:12"), None);
        assert_eq!(unpinned_image("x@sha256:00"), None);
    }

    #[test]
    fn a_password_in_an_invalid_url_is_not_shown() {
        let problem = checked_url("ftp://user:hunter2@example.org/x").unwrap_err();
        assert_eq!(problem, "expected an http, https or file URL, but found \"ftp://***@example.org/x\"");
        assert!(checked_url("file://server/share").is_err());
        assert!(checked_url("file:///srv/image.qcow2").is_ok());
        for url in ["file:///srv/a#b.img", "file:a?b", "FILE:///a\\b", " https://h/x", "https://h/\tx"] {
            assert!(checked_url(url).is_err(), "{url}");
        }
        assert!(checked_url("file:///srv/a%23b%3F.img").is_ok());
        assert!(checked_url("htps://x").unwrap_err().ends_with("(did you mean https?)"));
    }
}
