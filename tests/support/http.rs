//! A file server on loopback that can be made to misbehave, and records its requests.
#![allow(dead_code, clippy::unwrap_used, unreachable_pub)]

use std::{
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

/// How the server answers a request.
#[derive(Clone)]
pub enum Answer {
    /// 200 or 206 with these bytes.
    Bytes(Arc<[u8]>),
    /// The same, but the first connection is cut after this many bytes.
    CutOnce(Arc<[u8]>, usize),
    /// A status and a short text.
    Status(u16, &'static str),
    /// Headers, then silence until the server is dropped.
    Stall(Arc<[u8]>, usize),
}

/// A request that was received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    pub path: String,
    pub range: Option<String>,
    /// Number of bytes of the body that were sent.
    pub sent: usize,
}

/// The server, which stops when dropped.
pub struct Server {
    address: std::net::SocketAddr,
    requests: Arc<Mutex<Vec<Request>>>,
    stopped: Arc<AtomicBool>,
}

impl Server {
    /// Serves this answer at every path.
    pub fn start(answer: Answer) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let stopped = Arc::new(AtomicBool::new(false));
        let (log, stop) = (requests.clone(), stopped.clone());
        let cut = Arc::new(AtomicBool::new(false));
        thread::spawn(move || {
            for connection in listener.incoming() {
                if stop.load(Ordering::SeqCst) {
                    break;
                }
                let (answer, log, stop, cut) = (answer.clone(), log.clone(), stop.clone(), cut.clone());
                thread::spawn(move || drop(serve(connection.unwrap(), &answer, &log, &stop, &cut)));
            }
        });
        Self { address, requests, stopped }
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}/{path}", self.address)
    }

    pub fn requests(&self) -> Vec<Request> {
        self.requests.lock().unwrap().clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.address);
    }
}

fn serve(
    mut connection: TcpStream,
    answer: &Answer,
    log: &Mutex<Vec<Request>>,
    stop: &AtomicBool,
    cut: &AtomicBool,
) -> std::io::Result<()> {
    let mut reader = BufReader::new(connection.try_clone()?);
    loop {
        let mut first = String::new();
        if reader.read_line(&mut first)? == 0 {
            return Ok(());
        }
        let mut words = first.split_whitespace();
        let (method, path) =
            (words.next().unwrap_or_default().to_owned(), words.next().unwrap_or_default().to_owned());
        let mut range = None;
        loop {
            let mut header = String::new();
            reader.read_line(&mut header)?;
            if header.trim().is_empty() {
                break;
            }
            if let Some((name, value)) = header.split_once(':')
                && name.eq_ignore_ascii_case("range")
            {
                range = Some(value.trim().to_owned());
            }
        }
        let index = {
            let mut log = log.lock().unwrap();
            log.push(Request { path, range: range.clone(), sent: 0 });
            log.len() - 1
        };
        let body = match answer {
            Answer::Status(code, text) => {
                write!(connection, "HTTP/1.1 {code} {text}\r\nContent-Length: {}\r\n\r\n{text}", text.len())?;
                continue;
            }
            Answer::Bytes(body) | Answer::CutOnce(body, _) | Answer::Stall(body, _) => body,
        };
        let start: usize = range
            .as_deref()
            .and_then(|range| range.strip_prefix("bytes="))
            .and_then(|range| range.split('-').next()?.parse().ok())
            .unwrap_or(0);
        let status = match range {
            Some(_) => format!(
                "206 Partial Content\r\nContent-Range: bytes {start}-{}/{}",
                body.len() - 1,
                body.len()
            ),
            None => "200 OK".to_owned(),
        };
        let rest = &body[start..];
        write!(
            connection,
            "HTTP/1.1 {status}\r\nContent-Length: {}\r\nETag: \"one\"\r\nAccept-Ranges: bytes\r\n\r\n",
            rest.len()
        )?;
        if method == "HEAD" {
            continue;
        }
        let limit = match answer {
            Answer::CutOnce(_, limit) if !cut.swap(true, Ordering::SeqCst) => *limit,
            Answer::Stall(_, limit) => *limit,
            _ => rest.len(),
        };
        let part = &rest[..limit.min(rest.len())];
        connection.write_all(part)?;
        connection.flush()?;
        log.lock().unwrap()[index].sent = part.len();
        if part.len() < rest.len() {
            while matches!(answer, Answer::Stall(..)) && !stop.load(Ordering::SeqCst) {
                thread::sleep(std::time::Duration::from_millis(50));
            }
            return Ok(());
        }
    }
}
