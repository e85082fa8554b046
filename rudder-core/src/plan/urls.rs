//! URLs of a manifest. `file:` URLs may be relative to a base directory.

use super::PlanContext;
use crate::{
    check::{Findings, checked_url, codes},
    manifest::{BuildSpec, ValuePath},
    visible::Quoted,
};
use url::Url;

/// Converts an absolute directory of this operating system to a URL.
#[cfg(any(unix, windows))]
fn directory_url(directory: &std::path::Path) -> Option<Url> {
    Url::from_directory_path(directory).ok()
}

#[cfg(not(any(unix, windows)))]
use portable_directory_url as directory_url;

/// Converts an absolute Unix directory to a URL, on targets without an operating system that defines paths.
#[cfg(any(test, not(any(unix, windows))))]
fn portable_directory_url(directory: &std::path::Path) -> Option<Url> {
    let segments = directory.to_str()?.strip_prefix('/')?.split('/').filter(|segment| !segment.is_empty());
    let mut url = Url::parse("file:///").ok()?;
    url.path_segments_mut().ok()?.clear().extend(segments).push("");
    Some(url)
}

/// Parses a URL; a `file:` URL with a relative path is resolved against the base directory.
pub(super) fn resolve_url(written: &str, context: &PlanContext) -> Result<Url, String> {
    let Some(path) = relative_file(written) else { return checked_url(written) };
    let Some(base) = &context.base_directory else {
        return Err(format!(
            "expected file:/// and an absolute path, but found {written:?}",
            written = Quoted(written)
        ));
    };
    let base = directory_url(base)
        .ok_or_else(|| format!("expected an absolute base directory, but found {}", base.display()))?;
    // Resolved like any reference (RFC 3986, section 5.2); `./` keeps `a:b` from being parsed as a scheme.
    base.join(&format!("./{path}"))
        .map_err(|error| format!("expected a path, but found {path:?}: {error}", path = Quoted(path)))
}

/// Returns the path of a relative `file:` URL.
fn relative_file(written: &str) -> Option<&str> {
    written.strip_prefix("file:").filter(|path| !path.is_empty() && !path.starts_with('/'))
}

/// Reports relative `file:` URLs for which no base directory is set.
pub(super) fn relative_urls(
    findings: &mut Findings<'_>,
    spec: &BuildSpec,
    at: &ValuePath<'_>,
    context: &PlanContext,
) {
    let mut check = |url: Option<&str>, parent: &ValuePath<'_>| {
        if let Some(url) = url.filter(|url| relative_file(url).is_some())
            && let Err(message) = resolve_url(url, context)
        {
            findings.report(&codes::INVALID_URL, &parent.key("url"), message).help = Some(
                "write an absolute path; relative paths need a base directory, which this program does not \
                 set"
                .to_owned(),
            );
        }
    };
    let files = at.key("files");
    for (index, file) in spec.files.iter().enumerate() {
        check(file.url.as_deref(), &files.index(index));
    }
    let vms = at.key("vms");
    for (index, vm) in spec.vms.iter().enumerate() {
        let at = vms.index(index);
        check(vm.source.as_ref().and_then(|source| source.url.as_deref()), &at.key("source"));
        let isos = at.key("isos");
        for (index, iso) in vm.isos.iter().enumerate() {
            check(iso.url.as_deref(), &isos.index(index));
        }
    }
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    #[test]
    fn a_directory_has_the_same_url_without_an_operating_system() {
        for path in ["/", "/a", "/a/b/", "/a//b", "/with space/%41/\u{e4}?#", "/c:/x", "relative", ""] {
            let path = std::path::Path::new(path);
            assert_eq!(portable_directory_url(path), directory_url(path), "{}", path.display());
        }
    }
}
