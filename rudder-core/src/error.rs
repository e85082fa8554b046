//! The one public error type of the crate: its kind, the failed operation, what it was applied to, and how to fix it.
//!
//! An error describes its own layer only. The chain of causes is in [`source`](std::error::Error::source) and is printed once, at
//! the edge, by [`Error::report`]. No type of a dependency appears in it.

use crate::visible::{visible, visible_line};
use std::{any::Any, borrow::Cow, error::Error as StdError, fmt};

/// Result type with Rudder's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

type BoxError = Box<dyn StdError + Send + Sync + 'static>;

/// Kind of an error, for programs to match on.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ErrorKind {
    /// Input from the caller (manifest, argument, file name) is invalid.
    InvalidInput,
    /// The backend or this version of Rudder does not support the request.
    Unsupported,
    /// A program, device or permission that the host must provide is missing.
    HostMissing,
    /// A file system of the host is full.
    HostDiskFull,
    /// A URL, a module, a file or another named resource does not exist.
    NotFound,
    /// Something already exists, or is in use by another process.
    Conflict,
    /// A download failed: connection, HTTP status, or an interrupted transfer that could not be resumed.
    Download,
    /// The bytes do not have the expected digest.
    ChecksumMismatch,
    /// The bytes are not a disk image, or not a usable one.
    InvalidImage,
    /// The hypervisor refused to start a machine.
    LaunchFailed,
    /// A machine died, panicked, or stopped when it should have been running.
    MachineDied,
    /// A guest did not answer in time.
    GuestUnreachable,
    /// A guest answered but rejected the credentials.
    Authentication,
    /// A provisioning step failed in the guest.
    StepFailed,
    /// A deadline passed.
    TimedOut,
    /// The caller cancelled the operation.
    Cancelled,
    /// A peer (guest, hypervisor, server) violated its protocol or closed the connection.
    Protocol,
    /// The operating system rejected a file or process operation.
    Io,
    /// An invariant inside Rudder was violated: a bug.
    Internal,
}

impl ErrorKind {
    /// Returns whether retrying could help, unless the error says otherwise.
    #[must_use]
    pub fn is_retryable(self) -> bool {
        use ErrorKind::{
            Download, GuestUnreachable, LaunchFailed, MachineDied, Protocol, StepFailed, TimedOut,
        };
        matches!(
            self,
            Download | GuestUnreachable | LaunchFailed | MachineDied | Protocol | StepFailed | TimedOut
        )
    }
}

/// The error of a failed Rudder operation.
///
/// `Display` writes one sentence about this layer; [`report`](Self::report) returns everything a person needs. `Debug` (`{:?}`)
/// writes the report as well, because Rust prints it for an error returned from `main`; `{:#?}` writes the fields.
pub struct Error(Box<Inner>);

struct Inner {
    kind: ErrorKind,
    message: Cow<'static, str>,
    context: Vec<(&'static str, String)>,
    help: Option<Cow<'static, str>>,
    retryable: Option<bool>,
    source: Option<BoxError>,
    detail: Option<Box<dyn Detail>>,
}

/// What an error carries for programs beyond its texts: the report of a failed build, the findings about a manifest. Modules above
/// this one define it, and the methods of [`Error`] that return it.
pub(crate) trait Detail: Any + fmt::Debug + Send + Sync {
    /// Returns what is reported to a person instead of the texts of the error, if it is more than they are.
    fn report(&self) -> Option<String> {
        None
    }
}

impl Error {
    /// Creates an error. The message says what happened, with the relevant values: "expected X, but found Y".
    pub fn new(kind: ErrorKind, message: impl Into<Cow<'static, str>>) -> Self {
        Self(Box::new(Inner {
            kind,
            message: message.into(),
            context: Vec::new(),
            help: None,
            retryable: None,
            source: None,
            detail: None,
        }))
    }

    /// Creates an error for an operating system error while doing `what` ("read /a/b"); a full disk has its own kind.
    pub fn io(what: impl fmt::Display, source: std::io::Error) -> Self {
        let kind = match source.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => ErrorKind::HostDiskFull,
            std::io::ErrorKind::NotFound => ErrorKind::NotFound,
            _ => ErrorKind::Io,
        };
        Self::new(kind, format!("cannot {what}")).with_source(source)
    }

    /// Adds context about where the error happened: ("vm", "web"), ("step", "2 (install)"), ("url", …). The innermost is added
    /// first.
    #[must_use]
    pub fn with_context(mut self, key: &'static str, value: impl fmt::Display) -> Self {
        if !self.0.context.iter().any(|(k, _)| *k == key) {
            self.0.context.push((key, value.to_string()));
        }
        self
    }

    /// Sets the help text: what the reader can do about the error.
    #[must_use]
    pub fn with_help(mut self, help: impl Into<Cow<'static, str>>) -> Self {
        self.0.help = Some(help.into());
        self
    }

    /// Overrides whether retrying could help.
    #[must_use]
    pub fn with_retryable(mut self, retryable: bool) -> Self {
        self.0.retryable = Some(retryable);
        self
    }

    /// Sets the underlying error.
    #[must_use]
    pub fn with_source(mut self, source: impl Into<BoxError>) -> Self {
        self.0.source = Some(source.into());
        self
    }

    pub(crate) fn with_detail(mut self, detail: impl Detail) -> Self {
        self.0.detail = Some(Box::new(detail));
        self
    }

    /// Returns the detail of this type, of this error or of one of its causes.
    pub(crate) fn detail<T: Detail>(&self) -> Option<&T> {
        let own = self.0.detail.as_deref().and_then(|detail| (detail as &dyn Any).downcast_ref());
        own.or_else(|| {
            let mut cause = self.source();
            while let Some(error) = cause {
                match error.downcast_ref::<Self>() {
                    Some(error) => return error.detail(),
                    None => cause = error.source(),
                }
            }
            None
        })
    }

    /// Returns the kind of the error, for programs.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// Returns the help text: what the reader can do about the error.
    #[must_use]
    pub fn help(&self) -> Option<&str> {
        self.0.help.as_deref()
    }

    /// Returns the context, innermost first.
    pub fn context(&self) -> impl Iterator<Item = (&'static str, &str)> {
        self.0.context.iter().map(|(k, v)| (*k, v.as_str()))
    }

    /// Returns whether retrying could help.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        self.0.retryable.unwrap_or_else(|| self.0.kind.is_retryable())
    }

    /// Applies `map` to every text of the error: message, context, help and causes. Only text changes; causes become opaque if one
    /// of them changed. What the error carries besides text is removed. Used to remove secrets from an error.
    #[must_use]
    pub fn map_text(mut self, map: impl Fn(&str) -> String) -> Self {
        self.0.detail = None;
        self.0.message = map(&self.0.message).into();
        for (_, value) in &mut self.0.context {
            *value = map(value);
        }
        self.0.help = self.0.help.map(|help| map(&help).into());
        let mut texts = Vec::new();
        let mut changed = false;
        let mut cause = self.source();
        while let Some(error) = cause {
            let (shown, debugged) = (error.to_string(), format!("{error:?}"));
            let text = map(&shown);
            changed |= text != shown || map(&debugged) != debugged;
            texts.push(text);
            cause = error.source();
        }
        if changed {
            let chain =
                texts.into_iter().rev().fold(None, |source, text| Some(Box::new(Cause { text, source })));
            self.0.source = chain.map(|cause| cause as BoxError);
        }
        self
    }

    /// Returns the full error for a person: context, message, causes and help, on several lines without a trailing newline; for a
    /// failed build, its whole report. Control characters are made visible rather than emitted: see [`visible`](crate::visible).
    #[must_use]
    pub fn report(&self) -> String {
        let report = self.0.detail.as_ref().and_then(|detail| detail.report());
        visible(&report.unwrap_or_else(|| self.story())).into_owned()
    }

    /// Returns context, message, causes and help with control characters unchanged, for programs.
    pub(crate) fn story(&self) -> String {
        let mut out = String::new();
        for (key, value) in self.0.context.iter().rev() {
            out.push_str(&format!("{key} {}: ", visible_line(value)));
        }
        out.push_str(&self.0.message);
        let mut cause = self.source();
        while let Some(error) = cause {
            out.push_str(&format!("\n  because: {error}"));
            cause = error.source();
        }
        if let Some(help) = self.help() {
            out.push_str(&format!("\n  help: {help}"));
        }
        out
    }
}

/// A cause reduced to its text.
#[derive(Debug)]
struct Cause {
    text: String,
    source: Option<Box<Cause>>,
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl StdError for Cause {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&visible(&self.0.message))
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !f.alternate() {
            return f.write_str(&self.report());
        }
        f.debug_struct("Error")
            .field("kind", &self.0.kind)
            .field("message", &self.0.message)
            .field("context", &self.0.context)
            .field("help", &self.0.help)
            .field("source", &self.0.source)
            .field("detail", &self.0.detail)
            .finish()
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source.as_deref().map(|source| source as _)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_says_where_what_why_and_how_to_fix_it() {
        let error = Error::io("write /x", std::io::Error::from(std::io::ErrorKind::StorageFull))
            .with_context("disk", "rootdisk")
            .with_context("vm", "web")
            .with_help("free some space");
        assert_eq!(error.kind(), ErrorKind::HostDiskFull);
        assert_eq!(
            error.report(),
            "vm web: disk rootdisk: cannot write /x\n  because: no storage space\n  help: free some space"
        );
        assert_eq!(error.to_string(), "cannot write /x");
    }

    #[test]
    fn control_characters_in_an_error_are_made_visible() {
        let inner = std::io::Error::other("in\x1b[2Jner");
        let error = Error::new(ErrorKind::Io, "a\x1b]52;c;eA==\x07b").with_context("file", "x\ny\u{202e}");
        let error = error.with_help("h\u{9b}elp").with_source(inner);
        assert_eq!(error.to_string(), "a␛]52;c;eA==␇b");
        assert_eq!(
            error.report(),
            "file x␊y<U+202E>: a␛]52;c;eA==␇b\n  because: in␛[2Jner\n  help: h<U+009B>elp"
        );
    }

    #[test]
    fn a_secret_is_masked_in_every_text_of_an_error() {
        let inner = Error::new(ErrorKind::Protocol, "no s3cret here").with_context("url", "http://s3cret@x");
        let error = Error::new(ErrorKind::Download, "s3cret: cannot download")
            .with_context("url", "http://s3cret@x")
            .with_help("do not write s3cret")
            .with_source(inner);
        let masked = error.map_text(|text| text.replace("s3cret", "***"));
        assert_eq!(
            masked.report(),
            "url http://***@x: ***: cannot download\n  because: no *** here\n  help: do not write ***"
        );
        assert!(!format!("{masked:?}{masked:#?}").contains("s3cret"));
    }

    #[derive(Debug)]
    struct Lines(u32);

    impl Detail for Lines {
        fn report(&self) -> Option<String> {
            (self.0 > 0).then(|| format!("{} lines\x07", self.0))
        }
    }

    #[test]
    fn the_detail_of_an_error_is_found_in_its_causes_and_lost_with_its_secrets() {
        let error = || Error::new(ErrorKind::StepFailed, "it failed").with_help("try again");
        assert!(error().detail::<Lines>().is_none());
        assert_eq!(error().with_detail(Lines(3)).report(), "3 lines␇");
        assert_eq!(error().with_detail(Lines(0)).report(), error().report(), "nothing to add");
        let cause = error().with_detail(Lines(3));
        let outer = Error::new(ErrorKind::Io, "no").with_source(cause);
        let wrapped = Error::new(ErrorKind::Io, "outermost").with_source(outer);
        assert!(matches!(wrapped.detail(), Some(Lines(3))));
        assert!(wrapped.report().starts_with("outermost\n  because: no"), "{wrapped:?}");
        assert!(error().with_detail(Lines(3)).map_text(str::to_owned).detail::<Lines>().is_none());
    }

    #[test]
    fn an_error_that_main_returns_reads_like_its_report() {
        let error = Error::new(ErrorKind::NotFound, "expected \"a\",\nbut found \"b\"")
            .with_context("vm", "web")
            .with_help("look for \"a\"");
        // The output of the standard library for `fn main() -> Result<(), Box<dyn Error>>`.
        let boxed: Box<dyn StdError> = error.into();
        let expected = "vm web: expected \"a\",\nbut found \"b\"\n  help: look for \"a\"";
        assert_eq!(format!("{boxed:?}"), expected);
        assert!(format!("{boxed:#?}").starts_with("Error {\n    kind: NotFound,"));
    }
}
