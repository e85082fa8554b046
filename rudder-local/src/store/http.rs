//! HTTP requests for downloads: the client, the requests, and the meaning of responses (RFC 9110).

use super::{StoreOptions, partial_download::Origin};
use reqwest::{
    Client, Response, StatusCode,
    header::{self, HeaderMap, HeaderName},
};
use rudder_core::{Error, ErrorKind, Result};
use rustls::{ClientConfig, RootCertStore, crypto::ring};
use std::{sync::Arc, time::Duration};

/// Maximum number of redirects.
const MAX_REDIRECTS: usize = 10;
/// The longest wait that a server may ask for.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(30);

/// Returns a client with its own TLS configuration: no global state of the process is changed.
///
/// It trusts the certificates of the host, or those that `SSL_CERT_FILE` and `SSL_CERT_DIR` name. Proxies are taken from the
/// environment (`HTTPS_PROXY`…).
pub(super) fn client(options: &StoreOptions) -> Result<Client> {
    let failed = |error: Box<dyn std::error::Error + Send + Sync>| {
        Error::new(ErrorKind::Internal, "cannot set up an HTTP client").with_source(error)
    };
    let found = rustls_native_certs::load_native_certs();
    for error in &found.errors {
        tracing::debug!(%error, "ignoring certificates that cannot be read");
    }
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(found.certs);
    let tls = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|error| failed(error.into()))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Client::builder()
        .tls_backend_preconfigured(tls)
        .user_agent(concat!("rudder/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(options.connect_timeout)
        .dns_resolver(super::resolve::Resolver::system())
        .redirect(reqwest::redirect::Policy::limited(MAX_REDIRECTS))
        // Downloads are few and long. A pooled connection would outlive the runtime that made it.
        .pool_max_idle_per_host(0)
        .build()
        .map_err(|error| failed(error.without_url().into()))
}

/// What to request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RequestKind<'a> {
    /// The whole content.
    All,
    /// The whole content, unless it still matches these validators.
    IfChanged { etag: Option<&'a str>, last_modified: Option<&'a str> },
    /// What follows the first `from` bytes, if the content has not changed.
    Rest { from: u64, if_range: &'a str },
}

/// The outcome of a request.
#[derive(Debug)]
pub(super) enum ServerReply {
    /// The content has not changed.
    NotModified,
    /// There is no rest: the first bytes are the whole content, which has not changed.
    NoRest,
    /// The rest follows.
    Rest(Response),
    /// The whole content follows, whatever was requested.
    All(Response, Box<Origin>),
}

/// A failed attempt.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) error: Error,
    /// How long the server asks us to wait.
    pub(super) retry_after: Option<Duration>,
    /// Whether the bytes received so far are not the beginning of the server's current content.
    pub(super) start_over: bool,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self { error, retry_after: None, start_over: false }
    }
}

/// Sends a request. `origin` describes the bytes received so far.
pub(super) async fn request(
    client: &Client,
    url: &url::Url,
    kind: RequestKind<'_>,
    origin: Option<&Origin>,
    options: &StoreOptions,
    boot_id: &str,
) -> Result<ServerReply, Failure> {
    // The bytes as served are hashed and stored, so no content encoding is accepted.
    let mut request = client.get(url.clone()).header(header::ACCEPT_ENCODING, "identity");
    match kind {
        RequestKind::All => {}
        RequestKind::IfChanged { etag, last_modified } => {
            if let Some(etag) = etag {
                request = request.header(header::IF_NONE_MATCH, etag);
            }
            if let Some(last_modified) = last_modified {
                request = request.header(header::IF_MODIFIED_SINCE, last_modified);
            }
        }
        RequestKind::Rest { from, if_range } => {
            request =
                request.header(header::RANGE, format!("bytes={from}-")).header(header::IF_RANGE, if_range);
        }
    }
    let limit = options.connect_timeout + options.stall_timeout;
    let response = match tokio::time::timeout(limit, request.send()).await {
        Ok(Ok(response)) => response,
        Ok(Err(error)) => return Err(request_error(error).into()),
        Err(_) => {
            let what = format!("the server did not answer within {} s", limit.as_secs_f64());
            return Err(Error::new(ErrorKind::Download, what).into());
        }
    };
    let start_over = |what: &str| Failure {
        error: Error::new(ErrorKind::Download, what.to_owned()),
        retry_after: None,
        start_over: true,
    };
    match (response.status(), kind) {
        (StatusCode::NOT_MODIFIED, RequestKind::IfChanged { .. }) => Ok(ServerReply::NotModified),
        (StatusCode::OK, _) => {
            let origin = Box::new(origin_of(url, &response, boot_id));
            Ok(ServerReply::All(response, origin))
        }
        (StatusCode::PARTIAL_CONTENT, RequestKind::Rest { from, .. }) => {
            let (start, total) = content_range(response.headers());
            let same = |name: HeaderName, then: Option<&str>| match (text(response.headers(), name), then) {
                (Some(now), Some(then)) => now == then,
                _ => true,
            };
            let known = origin.and_then(|origin| origin.total);
            if start != Some(from)
                || total.zip(known).is_some_and(|(now, then)| now != then)
                || !same(header::ETAG, origin.and_then(|origin| origin.etag.as_deref()))
            {
                return Err(start_over("the server sent a different range than requested"));
            }
            Ok(ServerReply::Rest(response))
        }
        (StatusCode::RANGE_NOT_SATISFIABLE, RequestKind::Rest { from, .. }) => {
            match content_range(response.headers()).1 {
                Some(total) if total == from => Ok(ServerReply::NoRest),
                _ => Err(start_over(
                    "the file on the server is shorter than the part that was received before",
                )),
            }
        }
        (status, _) => Err(status_error(status, response.headers())),
    }
}

/// Returns the error for an interrupted transfer.
pub(super) fn transfer_error(error: reqwest::Error) -> Error {
    Error::new(ErrorKind::Download, "the transfer was interrupted").with_source(error.without_url())
}

fn request_error(error: reqwest::Error) -> Error {
    if error.is_redirect() {
        return Error::new(
            ErrorKind::Download,
            format!("expected at most {MAX_REDIRECTS} redirects to http or https"),
        )
        .with_retryable(false)
        .with_source(error.without_url());
    }
    if error.is_builder() {
        return Error::new(ErrorKind::InvalidInput, "expected a URL that can be requested")
            .with_source(error.without_url());
    }
    if is_about_certificates(&error) {
        return Error::new(ErrorKind::Download, "the certificate of the server is not trusted")
            .with_retryable(false)
            .with_help(
                "install the certificate of its authority (Debian: ca-certificates, update-ca-certificates), or name it in \
                 SSL_CERT_FILE",
            )
            .with_source(error.without_url());
    }
    let connect = error.is_connect();
    let what = if connect {
        "cannot connect to the server"
    } else {
        "the server closed the connection before it answered"
    };
    let failed = Error::new(ErrorKind::Download, what).with_source(error.without_url());
    if connect {
        return failed
            .with_help("check the host name, the network, and the proxy settings in the environment");
    }
    failed
}

/// Returns whether TLS failed because of the server's certificate, which further attempts do not change.
fn is_about_certificates(error: &reqwest::Error) -> bool {
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        if let Some(rustls::Error::InvalidCertificate(_)) = error.downcast_ref() {
            return true;
        }
        // The error wrapped in an `io::Error` is not its `source`.
        let inner = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
        cause = inner.map(|inner| inner as _).or_else(|| error.source());
    }
    false
}

fn status_error(status: StatusCode, headers: &HeaderMap) -> Failure {
    let what = format!("expected the file, but the server answered {status}");
    let error = match status {
        StatusCode::NOT_FOUND | StatusCode::GONE => {
            Error::new(ErrorKind::NotFound, what).with_help("check the URL: the server has no such file")
        }
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN | StatusCode::PROXY_AUTHENTICATION_REQUIRED => {
            Error::new(ErrorKind::Download, what)
                .with_retryable(false)
                .with_help("check the credentials in the URL")
        }
        StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_EARLY | StatusCode::TOO_MANY_REQUESTS => {
            Error::new(ErrorKind::Download, what)
        }
        _ if status.is_server_error() => Error::new(ErrorKind::Download, what),
        _ => Error::new(ErrorKind::Download, what).with_retryable(false),
    };
    let retry_after = text(headers, header::RETRY_AFTER)
        .and_then(|value| value.parse().ok())
        .map(|seconds| Duration::from_secs(seconds).min(MAX_RETRY_AFTER));
    Failure { error, retry_after, start_over: false }
}

fn origin_of(url: &url::Url, response: &Response, boot_id: &str) -> Origin {
    let headers = response.headers();
    let etag = text(headers, header::ETAG);
    let last_modified = text(headers, header::LAST_MODIFIED);
    Origin {
        url: super::masked(url),
        etag: etag.map(str::to_owned),
        last_modified: last_modified.map(str::to_owned),
        if_range: strong_validator(etag, last_modified, text(headers, header::DATE)).map(str::to_owned),
        total: text(headers, header::CONTENT_LENGTH).and_then(|value| value.parse().ok()),
        boot_id: boot_id.to_owned(),
    }
}

/// Returns a validator that distinguishes any two contents (RFC 9110, 8.8): an `ETag` that is not weak, or a date that was at
/// least a second old when it was sent.
fn strong_validator<'a>(
    etag: Option<&'a str>,
    last_modified: Option<&'a str>,
    date: Option<&str>,
) -> Option<&'a str> {
    match (etag, last_modified) {
        (Some(etag), _) if etag.starts_with('"') => Some(etag),
        (None, Some(modified)) => {
            let seconds =
                |text: &str| jiff::fmt::rfc2822::parse(text).ok().map(|time| time.timestamp().as_second());
            (seconds(modified)? < seconds(date?)?).then_some(modified)
        }
        _ => None,
    }
}

/// Returns the first byte and the total of `Content-Range` (RFC 9110, 14.4).
fn content_range(headers: &HeaderMap) -> (Option<u64>, Option<u64>) {
    let parse = || {
        let (range, total) = text(headers, header::CONTENT_RANGE)?.strip_prefix("bytes ")?.split_once('/')?;
        let start = range.split_once('-').and_then(|(start, _)| start.trim().parse().ok());
        Some((start, total.trim().parse().ok()))
    };
    parse().unwrap_or_default()
}

fn text(headers: &HeaderMap, name: HeaderName) -> Option<&str> {
    headers.get(name)?.to_str().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_strong_validator_allows_resuming() {
        let (then, later) = ("Wed, 21 Oct 2015 07:28:00 GMT", "Wed, 21 Oct 2015 07:28:01 GMT");
        assert_eq!(strong_validator(Some("\"a\""), Some(then), None), Some("\"a\""));
        assert_eq!(strong_validator(Some("W/\"a\""), Some(then), Some(later)), None);
        assert_eq!(strong_validator(None, Some(then), Some(later)), Some(then));
        assert_eq!(strong_validator(None, Some(then), Some(then)), None);
        assert_eq!(strong_validator(None, Some(then), None), None);
        assert_eq!(strong_validator(None, None, Some(later)), None);
    }

    #[test]
    fn content_range_headers_are_parsed() {
        let range = |value: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::CONTENT_RANGE, header::HeaderValue::from_static(value));
            content_range(&headers)
        };
        assert_eq!(range("bytes 5-9/10"), (Some(5), Some(10)));
        assert_eq!(range("bytes 5-9/*"), (Some(5), None));
        assert_eq!(range("bytes */10"), (None, Some(10)));
        assert_eq!(range("lines 1-2/3"), (None, None));
    }
}
