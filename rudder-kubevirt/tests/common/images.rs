//! A web server for images, as a cluster imports them: on loopback, with `Range` requests.

use http_body_util::Full;
use hyper::{
    Request, Response, StatusCode,
    body::{Bytes, Incoming},
    header,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use std::{
    collections::BTreeMap,
    convert::Infallible,
    net::Ipv4Addr,
    sync::{Arc, Mutex},
};
use tokio::net::TcpListener;
use url::Url;

type Files = Arc<Mutex<BTreeMap<String, Bytes>>>;

/// A web server with a few files.
pub struct Images {
    address: std::net::SocketAddr,
    files: Files,
    server: tokio::task::JoinHandle<()>,
}

impl Images {
    pub async fn serve(files: impl IntoIterator<Item = (&'static str, Vec<u8>)>) -> Self {
        let files = files.into_iter().map(|(name, bytes)| (format!("/{name}"), Bytes::from(bytes)));
        let files: Files = Arc::new(Mutex::new(files.collect()));
        let served = Arc::clone(&files);
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let files = Arc::clone(&served);
                tokio::spawn(async move {
                    let service = service_fn(move |request| {
                        let answer = answer(&files.lock().unwrap(), &request);
                        async move { Ok::<_, Infallible>(answer) }
                    });
                    let _ = hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), service)
                        .await;
                });
            }
        });
        Self { address, files, server }
    }

    /// Serves one more file, and returns its URL.
    pub fn add(&self, name: &str, bytes: Vec<u8>) -> Url {
        self.files.lock().unwrap().insert(format!("/{name}"), Bytes::from(bytes));
        self.url(name)
    }

    pub fn url(&self, name: &str) -> Url {
        format!("http://{}/{name}", self.address).parse().unwrap()
    }
}

impl Drop for Images {
    fn drop(&mut self) {
        self.server.abort();
    }
}

fn answer(files: &BTreeMap<String, Bytes>, request: &Request<Incoming>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::default());
    let Some(bytes) = files.get(request.uri().path()) else {
        *response.status_mut() = StatusCode::NOT_FOUND;
        return response;
    };
    let range = request.headers().get(header::RANGE).and_then(|range| range.to_str().ok());
    let range = range.and_then(|range| range.strip_prefix("bytes=")?.split_once('-'));
    let body = match range {
        Some((first, last)) => {
            let first: usize = first.parse().unwrap();
            let end = last.parse::<usize>().map_or(bytes.len(), |last| bytes.len().min(last + 1));
            if first >= end {
                *response.status_mut() = StatusCode::RANGE_NOT_SATISFIABLE;
                return response;
            }
            *response.status_mut() = StatusCode::PARTIAL_CONTENT;
            let range = format!("bytes {first}-{}/{}", end - 1, bytes.len());
            response.headers_mut().insert(header::CONTENT_RANGE, range.parse().unwrap());
            bytes.slice(first..end)
        }
        None => bytes.clone(),
    };
    *response.body_mut() = Full::new(body);
    response
}
