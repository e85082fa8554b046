//! The web server of a lab: serves a few files, by exact names, to the machines that they are meant for (HTTP/1.0 and
//! 1.1; RFC 9110, RFC 9112).
//!
//! Its clients are installers, boot loaders and firmware, so it is strict in what it serves and lenient towards its
//! clients: `GET` and `HEAD`, single ranges, persistent connections. There is no listing, no default file, and no way
//! from a name to a path: a request names an entry of the [`Site`], or nothing.
//!
//! Everything is bounded: the number of connections, the size of a request, and how long a connection may be idle. A
//! file is read only as fast as its reader takes it.

mod peer;
mod range;

pub use peer::is_of_process;

use crate::{
    Error, Result,
    backend::{ByteStream, Site, SiteFile, SiteRequest},
};
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Body, Bytes, Frame, Incoming, SizeHint},
    header::{self, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use range::{Part, part};
use std::{
    convert::Infallible,
    fmt, io,
    net::{Ipv4Addr, SocketAddr},
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, Take},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task::JoinSet,
    time::{Instant, sleep, sleep_until},
};
use tokio_util::{io::ReaderStream, task::AbortOnDropHandle};

/// Maximum number of concurrent connections; further ones wait until one ends.
const CONNECTIONS: usize = 256;
/// Maximum size of the head of a request, in bytes.
const HEAD: usize = 16 * 1024;
/// How long a connection may go without a request, or without its reader taking a byte. It is long because GRUB takes
/// what it needs of a file, and shows a menu in between.
const IDLE: Duration = Duration::from_secs(300);
/// How much of a file is read at a time, in bytes.
const CHUNK: usize = 64 * 1024;
/// How much of a request's target is reported, in characters.
const MAX_REPORTED: usize = 256;

/// Both ends of a new connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Caller {
    /// The address of the caller.
    pub peer: SocketAddr,
    /// The local address that it connected to.
    pub local: SocketAddr,
}

/// Whether a caller is let in.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Admission {
    /// The caller is the machine with this name.
    Machine(String),
    /// The caller is one of those that the site is meant for; which one is unknown.
    Welcome,
    /// The caller is none of them, and its connection is closed.
    Refused,
}

/// A listening server. Dropping it stops it and closes all its connections.
pub struct Server {
    address: SocketAddr,
    _task: AbortOnDropHandle<()>,
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server").field("address", &self.address).finish_non_exhaustive()
    }
}

impl Server {
    /// Serves a site on a port of 127.0.0.1 that the kernel chooses, to callers that `admit` lets in. `admit` may
    /// block: it is called where it delays nothing else.
    ///
    /// # Errors
    /// `Io` when the server cannot listen there.
    pub async fn on_loopback(
        site: Site,
        admit: impl Fn(Caller) -> Admission + Send + Sync + 'static,
    ) -> Result<Self> {
        Self::on((Ipv4Addr::LOCALHOST, 0).into(), site, admit).await
    }

    /// Serves a site at an address of this host; with port 0, the kernel chooses one. Otherwise the same as
    /// [`on_loopback`](Self::on_loopback).
    ///
    /// # Errors
    /// `Io` when the server cannot listen there.
    pub async fn on(
        address: SocketAddr,
        site: Site,
        admit: impl Fn(Caller) -> Admission + Send + Sync + 'static,
    ) -> Result<Self> {
        crate::runtime::check()?;
        let failed =
            |error| Error::io(format_args!("listen on {address} for the files of httpDirectory"), error);
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let task = tokio::spawn(accept(listener, Arc::new(site), Arc::new(admit)));
        Ok(Self { address, _task: AbortOnDropHandle::new(task) })
    }

    /// Returns the port that the server listens on.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.address.port()
    }
}

/// Accepts connections forever. Dropping the future drops them.
async fn accept(
    listener: TcpListener,
    site: Arc<Site>,
    admit: Arc<impl Fn(Caller) -> Admission + Send + Sync + 'static>,
) {
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let Ok(place) = Arc::clone(&room).acquire_owned().await else { return };
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                // Caused by a single connection, or by a lack of file descriptors on the host: both are temporary.
                tracing::debug!(%error, "cannot accept a connection");
                sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let (site, admit) = (Arc::clone(&site), Arc::clone(&admit));
        connections.spawn(async move {
            let _place = place;
            if let Some((machine, stream)) = admitted(stream, peer, admit).await {
                answer(site, machine, stream).await;
            }
        });
    }
}

/// Returns the connection and the machine it comes from, if its caller is let in.
async fn admitted(
    stream: TcpStream,
    peer: SocketAddr,
    admit: Arc<impl Fn(Caller) -> Admission + Send + Sync + 'static>,
) -> Option<(Option<String>, TcpStream)> {
    let caller = Caller { peer, local: stream.local_addr().ok()? };
    let admission = tokio::task::spawn_blocking(move || admit(caller)).await;
    let machine = match admission.unwrap_or(Admission::Refused) {
        Admission::Machine(name) => Some(name),
        Admission::Welcome => None,
        Admission::Refused => {
            tracing::debug!(%peer, "closed a connection that is not from a machine of the lab");
            return None;
        }
    };
    let _ = stream.set_nodelay(true);
    Some((machine, stream))
}

/// Answers the requests on a connection, which comes from this machine, until it ends or is idle for five minutes. For
/// backends that accept connections themselves; [`Server`] does it for those of a port.
pub async fn answer(site: Arc<Site>, machine: Option<String>, stream: impl ByteStream) {
    let activity = Activity::default();
    let service = {
        let activity = activity.clone();
        service_fn(move |request: Request<Incoming>| {
            let (site, machine, activity) = (Arc::clone(&site), machine.clone(), activity.clone());
            async move { Ok::<_, Infallible>(respond(site, machine, activity, &request).await) }
        })
    };
    let connection = http1::Builder::new()
        .max_buf_size(HEAD)
        .half_close(true)
        .serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    loop {
        let last = activity.last();
        tokio::select! {
            ended = &mut connection => {
                if let Err(error) = ended {
                    tracing::debug!(%error, "a connection broke");
                }
                return;
            }
            () = sleep_until(last + IDLE) => if activity.last() == last { return },
        }
    }
}

/// The time of the last activity on a connection.
#[derive(Debug, Clone)]
struct Activity(Arc<Mutex<Instant>>);

impl Default for Activity {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(Instant::now())))
    }
}

impl Activity {
    fn last(&self) -> Instant {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn touch(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }
}

async fn respond(
    site: Arc<Site>,
    machine: Option<String>,
    activity: Activity,
    request: &Request<Incoming>,
) -> Response<Reply> {
    activity.touch();
    let target: String =
        request.uri().to_string().chars().filter(|c| !c.is_control()).take(MAX_REPORTED).collect();
    let reported = SiteRequest::new(machine, request.method().as_str(), target, 0, 0);
    let mut response = match find(&site, request) {
        Ok(file) => send(file, request).await.unwrap_or_else(|error| {
            tracing::warn!(%error, "cannot read a file that is served");
            refusal(StatusCode::INTERNAL_SERVER_ERROR, "the file cannot be read\n")
        }),
        Err(refused) => *refused,
    };
    let status = response.status().as_u16();
    response.body_mut().report =
        Some(RequestReport { site, activity, reported: SiteRequest { status, ..reported } });
    response
}

/// Returns the file that a request refers to, or the response to send instead.
fn find<'s>(site: &'s Site, request: &Request<Incoming>) -> Result<&'s SiteFile, Box<Response<Reply>>> {
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        let mut response = refusal(StatusCode::METHOD_NOT_ALLOWED, "files are read with GET and HEAD\n");
        response.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
        return Err(Box::new(response));
    }
    // A query string has no effect on a static file, so it is ignored.
    let Some(name) = decoded(request.uri().path()) else {
        let why = "the path has a % without two hexadecimal digits\n";
        return Err(Box::new(refusal(StatusCode::BAD_REQUEST, why)));
    };
    let name = name.strip_prefix(b"/").and_then(|name| std::str::from_utf8(name).ok());
    name.and_then(|name| site.files.get(name))
        .ok_or_else(|| Box::new(refusal(StatusCode::NOT_FOUND, "no file with this name is served\n")))
}

/// Responds with the file, or the requested part of it.
async fn send(file: &SiteFile, request: &Request<Incoming>) -> io::Result<Response<Reply>> {
    let size = file.size().await?;
    let mut response = Response::new(Reply::default());
    let part = part(request.method(), request.headers(), size);
    let headers = response.headers_mut();
    headers.insert(header::ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    let (start, length) = match part {
        Part::Whole => (0, size),
        Part::Range { start, length } => {
            let range = format!("bytes {start}-{}/{size}", start + length - 1);
            headers.extend(HeaderValue::from_str(&range).map(|range| (header::CONTENT_RANGE, range)));
            *response.status_mut() = StatusCode::PARTIAL_CONTENT;
            (start, length)
        }
        Part::Unsatisfiable => {
            let mut response = refusal(StatusCode::RANGE_NOT_SATISFIABLE, "the file ends before the range\n");
            let range = HeaderValue::from_str(&format!("bytes */{size}"));
            response.headers_mut().extend(range.map(|range| (header::CONTENT_RANGE, range)));
            return Ok(response);
        }
    };
    response.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from(length));
    if request.method() == Method::HEAD {
        return Ok(response);
    }
    let opened = file.open(start).await?;
    let source = Source::File(ReaderStream::with_capacity(opened.take(length), CHUNK));
    *response.body_mut() = Reply { source, left: length, is_file: true, report: None };
    Ok(response)
}

/// Returns a response that is not a file.
fn refusal(status: StatusCode, why: &'static str) -> Response<Reply> {
    let source = Source::Text(why);
    let mut response = Response::new(Reply { source, left: why.len() as u64, is_file: false, report: None });
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}

/// Decodes the percent-encoding of a path (RFC 3986, 2.1); `None` when it is malformed.
pub(crate) fn decoded(path: &str) -> Option<Vec<u8>> {
    let mut bytes = path.bytes();
    let mut decoded = Vec::with_capacity(path.len());
    while let Some(byte) = bytes.next() {
        decoded.push(match byte {
            b'%' => {
                let mut digit = || char::from(bytes.next()?).to_digit(16);
                u8::try_from(digit()? * 16 + digit()?).ok()?
            }
            other => other,
        });
    }
    Some(decoded)
}

/// The body of a response.
#[derive(Default)]
struct Reply {
    source: Source,
    /// Number of bytes still to send.
    left: u64,
    /// Whether the bytes are those of a file.
    is_file: bool,
    report: Option<RequestReport>,
}

/// Where the bytes of a response come from.
#[derive(Default)]
enum Source {
    #[default]
    Nothing,
    Text(&'static str),
    File(ReaderStream<Take<Box<dyn AsyncRead + Send + Unpin>>>),
}

/// Reports a request when its response is over, however it ends.
struct RequestReport {
    site: Arc<Site>,
    activity: Activity,
    reported: SiteRequest,
}

impl Drop for RequestReport {
    fn drop(&mut self) {
        self.activity.touch();
        self.site.answered(self.reported.clone());
    }
}

impl Reply {
    fn next(&mut self, cx: &mut Context<'_>) -> Poll<Option<io::Result<Bytes>>> {
        Poll::Ready(Some(Ok(match &mut self.source {
            Source::Nothing => return Poll::Ready(None),
            Source::Text(text) => Bytes::from_static(text.as_bytes()),
            Source::File(file) => return futures::Stream::poll_next(Pin::new(file), cx),
        })))
    }
}

impl Body for Reply {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        let reply = &mut *self;
        if reply.left == 0 {
            return Poll::Ready(None);
        }
        let Poll::Ready(chunk) = reply.next(cx) else { return Poll::Pending };
        let chunk = match chunk {
            Some(chunk) => chunk?,
            None => return Poll::Ready(Some(Err(io::ErrorKind::UnexpectedEof.into()))),
        };
        let count = chunk.len() as u64;
        reply.left = reply.left.saturating_sub(count);
        if let Some(report) = &mut reply.report {
            report.activity.touch();
            if reply.is_file {
                report.reported.bytes += count;
            }
        }
        Poll::Ready(Some(Ok(Frame::data(chunk))))
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}

#[cfg(test)]
mod tests;
