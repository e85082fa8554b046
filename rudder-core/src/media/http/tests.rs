#![allow(clippy::unwrap_used)]

use super::*;
use std::collections::BTreeMap;
use tokio::io::{AsyncWriteExt as _, DuplexStream};

/// A server of `a b.txt` (10 digits, in memory) and `big.img` (a file), and the requests that it reports.
struct Bench {
    site: Arc<Site>,
    requests: Arc<Mutex<Vec<SiteRequest>>>,
    big: Vec<u8>,
    _directory: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let big: Vec<u8> = (0..300_000u32).flat_map(u32::to_le_bytes).collect();
        let path = directory.path().join("stored");
        std::fs::write(&path, &big).unwrap();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let files = BTreeMap::from([
            ("a b.txt".to_owned(), SiteFile::bytes(b"0123456789".as_slice())),
            ("big.img".to_owned(), SiteFile::path(path)),
            ("gone".to_owned(), SiteFile::path(directory.path().join("never"))),
            ("empty".to_owned(), SiteFile::bytes(b"".as_slice())),
        ]);
        let site = Site::new(files, {
            let requests = Arc::clone(&requests);
            move |request| requests.lock().unwrap().push(request)
        });
        Self { site: Arc::new(site), requests, big, _directory: directory }
    }

    fn connect(&self) -> (DuplexStream, tokio::task::JoinHandle<()>) {
        let (client, server) = tokio::io::duplex(4096);
        (client, tokio::spawn(answer(Arc::clone(&self.site), Some("web".into()), server)))
    }

    /// Sends these bytes on a separate connection, and returns the whole response.
    async fn raw(&self, request: &[u8]) -> Vec<u8> {
        let (mut client, server) = self.connect();
        client.write_all(request).await.unwrap();
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).await.unwrap();
        server.await.unwrap();
        answer
    }

    /// Returns the status, the head in lower case, and the body.
    async fn ask(&self, method: &str, target: &str, headers: &str) -> (u16, String, Vec<u8>) {
        let request = format!("{method} {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{headers}\r\n");
        let answer = self.raw(request.as_bytes()).await;
        let end = answer.windows(4).position(|four| four == b"\r\n\r\n").unwrap();
        let head = String::from_utf8(answer[..end].to_vec()).unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        (status, head.to_ascii_lowercase(), answer[end + 4..].to_vec())
    }

    fn requests(&self) -> Vec<(String, String, u16, u64)> {
        let requests = std::mem::take(&mut *self.requests.lock().unwrap());
        assert!(requests.iter().all(|request| request.machine.as_deref() == Some("web")));
        requests.into_iter().map(|r| (r.method, r.path, r.status, r.bytes)).collect()
    }
}

#[tokio::test]
async fn files_are_served_by_their_exact_names() {
    let bench = Bench::new();
    let (status, head, body) = bench.ask("GET", "/a%20b.txt?from=ipxe", "").await;
    assert_eq!((status, body.as_slice()), (200, b"0123456789".as_slice()));
    assert!(head.contains("content-length: 10") && head.contains("accept-ranges: bytes"), "{head}");
    let (status, _, body) = bench.ask("GET", "/big.img", "").await;
    assert_eq!((status, body == bench.big), (200, true));
    let (status, _, body) = bench.ask("GET", "/empty", "").await;
    assert_eq!((status, body.len()), (200, 0));
    for target in [
        "/",
        "/A%20b.txt",
        "/a%20b.txt/",
        "//big.img",
        "/./big.img",
        "/..%2fbig.img",
        "/../stored",
        "/%00",
        "/x",
    ] {
        let (status, head, body) = bench.ask("GET", target, "").await;
        assert_eq!(status, 404, "{target}: {head}");
        assert_eq!(body, b"no file with this name is served\n");
    }
    assert_eq!(bench.ask("GET", "/%zz", "").await.0, 400);
    assert_eq!(bench.ask("GET", "/gone", "").await.0, 500);
    // A request as sent to a proxy, and one in the style of old clients.
    assert_eq!(bench.ask("GET", "http://10.0.2.2:80/big.img", "").await.0, 200);
    let old = bench.raw(b"GET /a%20b.txt HTTP/1.0\r\n\r\n").await;
    assert!(old.starts_with(b"HTTP/1.0 200") && old.ends_with(b"0123456789"));
}

#[tokio::test]
async fn only_get_and_head_read_files() {
    let bench = Bench::new();
    let (status, head, body) = bench.ask("HEAD", "/big.img", "").await;
    assert_eq!((status, body.len()), (200, 0));
    assert!(head.contains(&format!("content-length: {}", bench.big.len())), "{head}");
    for method in ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "BREW"] {
        let (status, head, _) = bench.ask(method, "/big.img", "").await;
        assert_eq!(status, 405, "{method}");
        assert!(head.contains("allow: get, head"), "{head}");
    }
}

#[tokio::test]
async fn parts_of_files_are_served() {
    let bench = Bench::new();
    for (range, start, end) in [("bytes=100000-100009", 100_000, 100_010), ("bytes=-5", 1_199_995, 1_200_000)]
    {
        let (status, head, body) = bench.ask("GET", "/big.img", &format!("Range: {range}\r\n")).await;
        assert_eq!((status, body.as_slice()), (206, &bench.big[start..end]), "{head}");
        assert!(head.contains(&format!("content-range: bytes {start}-{}/1200000", end - 1)), "{head}");
    }
    let (status, _, body) = bench.ask("GET", "/a%20b.txt", "Range: bytes=8-\r\n").await;
    assert_eq!((status, body.as_slice()), (206, b"89".as_slice()));
    let (status, head, _) = bench.ask("GET", "/a%20b.txt", "Range: bytes=10-\r\n").await;
    assert_eq!(status, 416);
    assert!(head.contains("content-range: bytes */10"), "{head}");
}

#[tokio::test]
async fn a_connection_carries_many_requests() {
    let bench = Bench::new();
    let (mut client, server) = bench.connect();
    for _ in 0..3 {
        client.write_all(b"GET /a%20b.txt HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        let mut answer = Vec::new();
        while !answer.ends_with(b"0123456789") {
            assert_ne!(client.read_buf(&mut answer).await.unwrap(), 0);
        }
    }
    drop(client);
    server.await.unwrap();
    assert_eq!(bench.requests(), vec![("GET".into(), "/a%20b.txt".into(), 200, 10); 3]);
}

#[tokio::test]
async fn requests_are_reported_after_they_are_answered() {
    let bench = Bench::new();
    bench.ask("GET", "/a%20b.txt", "Range: bytes=2-4\r\n").await;
    bench.ask("HEAD", "/big.img", "").await;
    bench.ask("GET", &format!("/{}", "x".repeat(1000)), "").await;
    let long = format!("/{}", "x".repeat(MAX_REPORTED - 1));
    assert_eq!(
        bench.requests(),
        [
            ("GET".into(), "/a%20b.txt".into(), 206, 3),
            ("HEAD".into(), "/big.img".into(), 200, 0),
            ("GET".into(), long, 404, 0),
        ]
    );
    // A guest that resets in the middle has received a part.
    let (mut client, server) = bench.connect();
    client.write_all(b"GET /big.img HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    let mut some = vec![0; 10_000];
    client.read_exact(&mut some).await.unwrap();
    drop(client);
    server.await.unwrap();
    let requests = bench.requests();
    assert_eq!((requests.len(), requests[0].2), (1, 200));
    assert!((10_000 - 512..bench.big.len() as u64).contains(&requests[0].3), "{requests:?}");
}

#[tokio::test]
async fn a_connection_without_a_valid_request_is_closed() {
    let bench = Bench::new();
    let answer = bench.raw(b"\x16\x03\x01 hello\r\n\r\n").await;
    assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 400"), "{answer:?}");
    let mut large = b"GET /a%20b.txt HTTP/1.1\r\nX: ".to_vec();
    large.resize(HEAD + 10, b'x');
    let (mut client, server) = bench.connect();
    // The server may hang up before it has read everything.
    let _ = client.write_all(&large).await;
    let mut answer = Vec::new();
    client.read_to_end(&mut answer).await.unwrap();
    server.await.unwrap();
    assert!(answer.starts_with(b"HTTP/1.1 431"), "{}", String::from_utf8_lossy(&answer));
    assert_eq!(bench.requests(), []);
}

#[tokio::test(start_paused = true)]
async fn an_idle_connection_is_closed() {
    let bench = Bench::new();
    let start = Instant::now();
    let (mut client, server) = bench.connect();
    assert_eq!(client.read(&mut [0]).await.unwrap(), 0);
    server.await.unwrap();
    assert_eq!(start.elapsed().as_secs(), IDLE.as_secs());
}

#[tokio::test]
async fn only_admitted_callers_are_answered() {
    let bench = Bench::new();
    let open = Arc::new(Mutex::new(Admission::Refused));
    let site = Site::clone(&bench.site);
    let server = Server::on_loopback(site, {
        let open = Arc::clone(&open);
        move |caller| match is_of_process(caller, std::process::id()) {
            true => open.lock().unwrap().clone(),
            false => Admission::Refused,
        }
    })
    .await
    .unwrap();
    let get = async || {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, server.port())).await.unwrap();
        let mut answer = Vec::new();
        // A reset is equivalent to an end.
        let _ = stream.write_all(b"GET /a%20b.txt HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await;
        let _ = stream.read_to_end(&mut answer).await;
        answer
    };
    assert!(get().await.is_empty());
    assert_eq!(bench.requests(), []);
    *open.lock().unwrap() = Admission::Machine("web".into());
    assert!(get().await.ends_with(b"0123456789"));
    assert_eq!(bench.requests(), [("GET".into(), "/a%20b.txt".into(), 200, 10)]);
    let port = server.port();
    drop(server);
    // Its task ends at its next wait.
    while TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.is_ok() {
        tokio::task::yield_now().await;
    }
}
