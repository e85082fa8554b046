//! A small HTTP server on loopback that answers as a test specifies, and records the requests.

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::{ServerConfig, crypto::ring, pki_types::PrivatePkcs8KeyDer};
use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, Mutex},
};
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpStream},
    sync::watch,
};
use tokio_rustls::TlsAcceptor;

/// A certificate authority that nothing else knows.
pub(super) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    /// Its certificate, in the format of `SSL_CERT_FILE`.
    pub(super) pem: String,
}

impl Authority {
    pub(super) fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let pem = params.self_signed(&key).unwrap().pem();
        Self { issuer: Issuer::new(params, key), pem }
    }

    /// Returns an acceptor for a server of this name or address.
    fn acceptor(&self, name: &str) -> TlsAcceptor {
        let key = KeyPair::generate().unwrap();
        let certificate =
            CertificateParams::new([name.to_owned()]).unwrap().signed_by(&key, &self.issuer).unwrap();
        let key = PrivatePkcs8KeyDer::from(key.serialize_der()).into();
        let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.into()], key)
            .unwrap();
        Arc::new(config).into()
    }
}

/// A request.
#[derive(Debug, Clone)]
pub(super) struct Request {
    pub(super) path: String,
    pub(super) headers: BTreeMap<String, String>,
}

impl Request {
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }
}

/// A response.
#[derive(Debug, Clone, Default)]
pub(super) struct Reply {
    pub(super) status: u16,
    pub(super) headers: Vec<(&'static str, String)>,
    pub(super) body: Vec<u8>,
    /// Number of additional times that the body is sent.
    pub(super) repeats: u64,
    /// Number of bytes of the body after which to stop.
    pub(super) stop_after: Option<usize>,
    /// Whether to pause there until the gate opens, and then send the rest; otherwise the connection is closed.
    pub(super) hold: bool,
    /// The length to announce instead of the real one.
    pub(super) length: Option<u64>,
}

impl Reply {
    pub(super) fn status(status: u16) -> Self {
        Self { status, ..Self::default() }
    }

    pub(super) fn ok(body: &[u8]) -> Self {
        Self { status: 200, body: body.to_vec(), ..Self::default() }
    }

    pub(super) fn with(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    pub(super) fn stop_after(mut self, count: usize) -> Self {
        self.stop_after = Some(count);
        self
    }

    pub(super) fn hold_after(mut self, count: usize) -> Self {
        self.hold = true;
        self.stop_after(count)
    }

    /// Returns the response of a proper server for a file with this `ETag`.
    pub(super) fn file(request: &Request, body: &[u8], etag: &str) -> Self {
        if request.header("if-none-match") == Some(etag) {
            return Self::status(304).with("ETag", etag);
        }
        let from = request.header("range").and_then(|range| {
            let same = request.header("if-range") == Some(etag);
            range.strip_prefix("bytes=")?.strip_suffix('-')?.parse::<usize>().ok().filter(|_| same)
        });
        match from {
            None => Self::ok(body).with("ETag", etag),
            Some(from) if from >= body.len() => {
                Self::status(416).with("Content-Range", format!("bytes */{}", body.len()))
            }
            Some(from) => {
                let range = format!("bytes {from}-{}/{}", body.len() - 1, body.len());
                Self { status: 206, body: body[from..].to_vec(), ..Self::default() }
                    .with("ETag", etag)
                    .with("Content-Range", range)
            }
        }
    }
}

type Answer = dyn Fn(&Request, usize) -> Reply + Send + Sync;

/// The server; it ends when dropped.
pub(super) struct Server {
    scheme: &'static str,
    address: SocketAddr,
    requests: Arc<Mutex<Vec<Request>>>,
    gate: watch::Sender<bool>,
    runtime: Option<tokio::runtime::Runtime>,
}

impl Server {
    /// Starts a server that answers the n-th request, from 0, with the result of this function.
    pub(super) fn start(answer: impl Fn(&Request, usize) -> Reply + Send + Sync + 'static) -> Self {
        Self::start_as(None, answer)
    }

    /// Starts a server over TLS, with a certificate of this authority.
    pub(super) fn start_tls(
        authority: &Authority,
        answer: impl Fn(&Request, usize) -> Reply + Send + Sync + 'static,
    ) -> Self {
        Self::start_as(Some(authority.acceptor("127.0.0.1")), answer)
    }

    fn start_as(
        tls: Option<TlsAcceptor>,
        answer: impl Fn(&Request, usize) -> Reply + Send + Sync + 'static,
    ) -> Self {
        let scheme = if tls.is_some() { "https" } else { "http" };
        // A separate runtime, so that it serves while a test blocks, and other processes as well.
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let (gate, opened) = watch::channel(false);
        let (answer, log): (Arc<Answer>, _) = (Arc::new(answer), requests.clone());
        runtime.spawn(async move {
            let listener = TcpListener::from_std(listener).unwrap();
            while let Ok((stream, _)) = listener.accept().await {
                let (answer, log, opened) = (answer.clone(), log.clone(), opened.clone());
                let tls = tls.clone();
                tokio::spawn(async move {
                    match tls {
                        None => serve(stream, &*answer, &log, opened).await,
                        Some(tls) => serve(tls.accept(stream).await?, &*answer, &log, opened).await,
                    }
                });
            }
        });
        Self { scheme, address, requests, gate, runtime: Some(runtime) }
    }

    pub(super) fn url(&self, path: &str) -> url::Url {
        format!("{}://{}/{path}", self.scheme, self.address).parse().unwrap()
    }

    pub(super) fn requests(&self) -> Vec<Request> {
        self.requests.lock().unwrap().clone()
    }

    pub(super) fn count(&self) -> usize {
        self.requests().len()
    }

    pub(super) fn open_gate(&self) {
        self.gate.send_replace(true);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Tests are asynchronous themselves, and must not block on it.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

async fn serve(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    answer: &Answer,
    log: &Mutex<Vec<Request>>,
    mut opened: watch::Receiver<bool>,
) -> std::io::Result<()> {
    let mut stream = BufReader::new(stream);
    let mut first = String::new();
    stream.read_line(&mut first).await?;
    let mut request =
        Request { path: first.split(' ').nth(1).unwrap_or_default().to_owned(), headers: BTreeMap::new() };
    loop {
        let mut line = String::new();
        stream.read_line(&mut line).await?;
        match line.trim().split_once(':') {
            Some((name, value)) => {
                request.headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
            }
            None => break,
        }
    }
    // The client asks a proxy for a tunnel to a server (RFC 9110, 9.3.6).
    if first.starts_with("CONNECT ") {
        log.lock().unwrap().push(request.clone());
        stream.write_all(b"HTTP/1.1 200 Connected\r\n\r\n").await?;
        stream.flush().await?;
        let mut server = TcpStream::connect(&request.path).await?;
        tokio::io::copy_bidirectional(&mut stream, &mut server).await?;
        return Ok(());
    }
    let number = {
        let mut log = log.lock().unwrap();
        log.push(request.clone());
        log.len() - 1
    };
    let reply = answer(&request, number);
    let mut head = format!("HTTP/1.1 {} Answer\r\nConnection: close\r\n", reply.status);
    if reply.status != 304 {
        let length = reply.length.unwrap_or(reply.body.len() as u64 * (reply.repeats + 1));
        head.push_str(&format!("Content-Length: {length}\r\n"));
    }
    for (name, value) in &reply.headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str("\r\n");
    stream.write_all(head.as_bytes()).await?;
    let (now, later) = reply.body.split_at(reply.stop_after.unwrap_or(reply.body.len()));
    stream.write_all(now).await?;
    for _ in 0..reply.repeats {
        stream.write_all(&reply.body).await?;
    }
    stream.flush().await?;
    if reply.hold {
        // Waits until the gate opens or the client disconnects.
        let mut byte = [0];
        let open = tokio::select! {
            opened = opened.wait_for(|open| *open) => opened.is_ok(),
            _ = stream.read(&mut byte) => false,
        };
        if open {
            stream.write_all(later).await?;
        }
    }
    stream.shutdown().await
}
