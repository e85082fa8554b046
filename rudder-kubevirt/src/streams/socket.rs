//! Opens stream subresources of KubeVirt as streams of bytes.
//!
//! They are web sockets with the subprotocol `plain.kubevirt.io`: binary messages hold the bytes, without a channel number.
//! `kube::Client::connect` offers and accepts Kubernetes' own subprotocols only, so the upgrade is requested here.

mod byte_stream;
#[cfg(test)]
mod tests;

pub(crate) use byte_stream::WebSocketByteStream;

use crate::errors;
use http::{HeaderMap, Request, StatusCode, header};
use http_body_util::{BodyExt as _, Limited};
use hyper_util::rt::TokioIo;
use kube::{Client, client::Body, core::Status};
use rudder_core::{Error, ErrorKind};
use std::time::Duration;
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::handshake;

/// The subprotocol of KubeVirt's streams.
const PROTOCOL: &str = "plain.kubevirt.io";
/// How long opening a stream may take. KubeVirt connects to the guest before it answers, and waits for as long as the kernel does
/// when nothing answers at its address.
const OPEN_LIMIT: Duration = Duration::from_secs(15);
/// The largest error that is read, in bytes.
const LARGEST_ERROR: usize = 64 << 10;

/// Why a stream was not opened.
#[derive(Debug)]
pub(crate) enum OpenError {
    /// The request failed, or the connection broke before the answer.
    Request(kube::Error),
    /// The API server or KubeVirt refused.
    Refused(Box<Status>),
    /// The answer was neither a refusal nor a web socket.
    NotAStream(String),
    /// There was no answer in time.
    Late,
}

/// What a refusal means for the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// There is no such instance, or it is not running, or it is paused.
    NotRunning,
    /// The guest, its node or KubeVirt cannot be reached at the moment.
    Unreachable,
    /// Trying again does not help: credentials, rights, a missing API.
    Permanent,
}

impl OpenError {
    /// Returns what the error means for the caller.
    pub(crate) fn refusal(&self) -> Refusal {
        match self {
            Self::Late | Self::NotAStream(_) => Refusal::Unreachable,
            Self::Request(kube::Error::Auth(_)) => Refusal::Permanent,
            Self::Request(_) => Refusal::Unreachable,
            Self::Refused(status) => match status.code {
                409 => Refusal::NotRunning,
                404 if is_missing_api(status) => Refusal::Permanent,
                404 => Refusal::NotRunning,
                // KubeVirt's words for an instance in another phase than Running.
                400 if status.message.contains("not running") => Refusal::NotRunning,
                // The instance has no address yet.
                400 if status.message.contains("interface") => Refusal::Unreachable,
                408 | 429 | 500.. => Refusal::Unreachable,
                _ => Refusal::Permanent,
            },
        }
    }

    /// Converts the error for a stream that was needed to do `what` ("connect to the display"): `Conflict` when the machine is not
    /// running, `GuestUnreachable` when it cannot be reached yet. A caller that sees it differently asks for the
    /// [refusal](Self::refusal) first.
    pub(crate) fn into_error(self, what: &str) -> Error {
        let refusal = self.refusal();
        match self {
            Self::Refused(status) => match refusal {
                Refusal::NotRunning => failed(ErrorKind::Conflict, what, &status.message),
                Refusal::Unreachable => failed(ErrorKind::GuestUnreachable, what, &status.message),
                Refusal::Permanent => errors::refused(&status, what),
            },
            // The API server may be restarting: the caller tries again, as it does when the guest is.
            Self::Request(error) if refusal == Refusal::Unreachable => {
                failed(ErrorKind::GuestUnreachable, what, "the cluster does not answer").with_source(error)
            }
            Self::Request(error) => errors::request_failed(error, what),
            Self::NotAStream(found) => failed(ErrorKind::Protocol, what, &found),
            Self::Late => {
                let late = format!("expected an answer within {} s, but found none", OPEN_LIMIT.as_secs());
                failed(ErrorKind::GuestUnreachable, what, &late)
            }
        }
    }
}

fn failed(kind: ErrorKind, what: &str, why: &str) -> Error {
    Error::new(kind, format!("cannot {what}: {why}"))
}

/// A resource that no API of the cluster has, rather than an instance that does not exist.
fn is_missing_api(status: &Status) -> bool {
    status.message.contains("could not find the requested resource")
        || status.message.contains("page not found")
}

/// Opens the stream subresource at a path.
pub(crate) async fn open(client: &Client, path: &str) -> Result<WebSocketByteStream, OpenError> {
    timeout(OPEN_LIMIT, upgrade(client, path)).await.unwrap_or(Err(OpenError::Late))
}

async fn upgrade(client: &Client, path: &str) -> Result<WebSocketByteStream, OpenError> {
    let key = handshake::client::generate_key();
    let request = Request::get(path)
        .header(header::CONNECTION, "Upgrade")
        .header(header::UPGRADE, "websocket")
        .header(header::SEC_WEBSOCKET_VERSION, "13")
        .header(header::SEC_WEBSOCKET_KEY, &key)
        .header(header::SEC_WEBSOCKET_PROTOCOL, PROTOCOL)
        .body(Body::empty())
        .map_err(|error| OpenError::Request(kube::Error::HttpError(error)))?;
    let response = client.send(request).await.map_err(OpenError::Request)?;
    if response.status() != StatusCode::SWITCHING_PROTOCOLS {
        let code = response.status();
        return Err(read_refusal(code, response.into_body()).await);
    }
    check_upgrade(response.headers(), &key)?;
    let upgraded = hyper::upgrade::on(response)
        .await
        .map_err(|error| OpenError::NotAStream(format!("the connection was not upgraded: {error}")))?;
    Ok(WebSocketByteStream::new(TokioIo::new(upgraded)).await)
}

/// Checks the answer to the handshake (RFC 6455, 4.1).
fn check_upgrade(headers: &HeaderMap, key: &str) -> Result<(), OpenError> {
    let expected = handshake::derive_accept_key(key.as_bytes());
    let accepted = headers.get(header::SEC_WEBSOCKET_ACCEPT);
    if accepted.is_none_or(|found| found.as_bytes() != expected.as_bytes()) {
        return Err(OpenError::NotAStream(format!(
            "expected the accept key {expected:?}, but found {accepted:?}"
        )));
    }
    // A proxy may leave the subprotocol out; another one has another framing.
    match headers.get(header::SEC_WEBSOCKET_PROTOCOL) {
        Some(found) if found.as_bytes() != PROTOCOL.as_bytes() => {
            Err(OpenError::NotAStream(format!("expected the subprotocol {PROTOCOL:?}, but found {found:?}")))
        }
        _ => Ok(()),
    }
}

/// Reads the body of an answer that is not an upgrade: a `Status`, or a text of a proxy.
async fn read_refusal(code: StatusCode, body: Body) -> OpenError {
    // The code alone says enough when the rest is too long or the connection breaks.
    let body = Limited::new(body, LARGEST_ERROR).collect().await;
    let bytes = body.map(http_body_util::Collected::to_bytes).unwrap_or_default();
    let mut status = serde_json::from_slice::<Status>(&bytes).unwrap_or_else(|_| {
        let text = String::from_utf8_lossy(&bytes);
        Status::failure(text.trim(), "")
    });
    status.code = code.as_u16();
    if status.message.is_empty() {
        status.message = format!("the answer was {code}");
    }
    OpenError::Refused(Box::new(status))
}
