//! Web sockets of the aggregated API: bytes in binary messages, without a channel byte (KubeVirt's protocol
//! `plain.kubevirt.io`). The server pings; either side ends both directions.

use super::{
    answers::{Body, Refusal, empty},
    conditions::Conditions,
    objects::{Key, phase, uid},
    requests::{self, INSTANCE},
    runs::Run,
    shared::Shared,
};
use futures::{SinkExt as _, StreamExt as _};
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, header};
use hyper::{body::Incoming, upgrade::Upgraded};
use hyper_util::rt::TokioIo;
use kube::core::DynamicObject;
use rudder_core::{Error, ErrorKind, backend::BoxedStream};
use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    time::Instant,
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{Message, handshake::derive_accept_key, protocol::Role},
};
use tokio_util::sync::CancellationToken;

/// The sub-protocol that KubeVirt's clients offer.
const PROTOCOL: &str = "plain.kubevirt.io";
/// Time between two pings.
const PING_INTERVAL: Duration = Duration::from_secs(1);
/// Time after which a client that answers no ping is dropped.
const PONG_LIMIT: Duration = Duration::from_secs(60);
/// Size of the largest message that is sent, in bytes.
const MESSAGE_SIZE: usize = 32 << 10;
/// Time that a connection may take to close.
const CLOSE_LIMIT: Duration = Duration::from_secs(1);

/// A stream of an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Channel {
    Console,
    Display {
        /// Whether to be refused instead of evicting an earlier session.
        preserve_session: bool,
    },
    Port(u16),
}

impl Channel {
    /// Returns what only one session at a time may use.
    fn exclusive(self) -> Option<&'static str> {
        match self {
            Self::Console => Some("console"),
            Self::Display { .. } => Some("vnc"),
            Self::Port(_) => None,
        }
    }
}

/// The open sessions.
#[derive(Debug, Default)]
pub(super) struct Sessions {
    open: Mutex<HashMap<u64, Session>>,
    next: AtomicU64,
}

#[derive(Debug)]
struct Session {
    namespace: String,
    /// The UID of the instance and the channel, if only one session may use that.
    exclusive: Option<(String, &'static str)>,
    cut: CancellationToken,
}

impl Sessions {
    fn locked(&self) -> MutexGuard<'_, HashMap<u64, Session>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the number of open sessions.
    pub(super) fn open(&self) -> usize {
        self.locked().len()
    }

    /// Cuts the sessions of all namespaces that `which` selects.
    pub(super) fn cut(&self, which: impl Fn(&str) -> bool) {
        self.locked()
            .values()
            .filter(|session| which(&session.namespace))
            .for_each(|session| session.cut.cancel());
    }

    /// Begins a session; evicts an earlier one from the same exclusive channel. Returns `None` if that one is to be preserved.
    fn begin(&self, namespace: &str, instance: &str, channel: Channel) -> Option<(u64, CancellationToken)> {
        let mut open = self.locked();
        let exclusive = channel.exclusive().map(|name| (instance.to_owned(), name));
        if exclusive.is_some() {
            for earlier in open.values().filter(|session| session.exclusive == exclusive) {
                if channel == (Channel::Display { preserve_session: true }) && !earlier.cut.is_cancelled() {
                    return None;
                }
                earlier.cut.cancel();
            }
        }
        let (id, cut) = (self.next.fetch_add(1, Ordering::Relaxed), CancellationToken::new());
        open.insert(id, Session { namespace: namespace.to_owned(), exclusive, cut: cut.clone() });
        Some((id, cut))
    }
}

/// Ends a session when it is dropped.
struct Ending {
    shared: Arc<Shared>,
    id: u64,
}

impl Drop for Ending {
    fn drop(&mut self) {
        self.shared.sessions.locked().remove(&self.id);
    }
}

/// Connects a request to a stream of an instance.
pub(super) async fn connect(
    shared: &Arc<Shared>,
    key: &Key,
    channel: Channel,
    mut request: Request<Incoming>,
) -> Result<Response<Body>, Refusal> {
    let instance = requests::instance(shared, key).await?;
    let run = check(shared, key, channel, &instance)?;
    let stream = dial(&run, channel).await.map_err(|error| refused(&run, channel, &error))?;
    let accepted = accept(request.headers())?;
    let Some((id, cut)) = shared.sessions.begin(&key.namespace, uid(&instance), channel) else {
        return Err(Refusal::internal("dialing virt-handler: websocket: bad handshake"));
    };
    let ending = Ending { shared: shared.clone(), id };
    let upgrade = hyper::upgrade::on(&mut request);
    let ended = run.ended.clone();
    shared.spawn(async move {
        let _ending = ending;
        tokio::select! {
            () = cut.cancelled() => {}
            upgraded = upgrade => {
                if let Ok(upgraded) = upgraded {
                    relay(upgraded, stream, &cut, &ended).await;
                }
            }
        }
    });
    Ok(accepted)
}

/// Checks whether an instance is in a state for this channel, as KubeVirt does.
fn check(
    shared: &Shared,
    key: &Key,
    channel: Channel,
    instance: &DynamicObject,
) -> Result<Arc<Run>, Refusal> {
    let name = &key.name;
    let run = shared.runs.get(uid(instance));
    match channel {
        Channel::Port(port) => {
            if Conditions::of(instance).holds("Paused") {
                return Err(Refusal::conflict(INSTANCE, name, "VMI is paused"));
            }
            if instance.data.pointer("/status/interfaces/0").is_none() {
                return Err(Refusal::bad_request("no network interfaces are present"));
            }
            run.ok_or_else(|| {
                Refusal::internal(format!("dialing VM: dial tcp: port {port}: connect: no route to host"))
            })
        }
        Channel::Console if phase(instance) == "Failed" => {
            Err(Refusal::conflict(INSTANCE, name, "VMI is in failed status"))
        }
        _ if phase(instance) != "Running" => Err(Refusal::bad_request("VMI is not running")),
        _ => run.ok_or_else(|| Refusal::bad_request("VMI is not running")),
    }
}

async fn dial(run: &Run, channel: Channel) -> Result<BoxedStream, Error> {
    match channel {
        Channel::Console => run.machine.serial().await,
        Channel::Display { .. } => run.machine.display().await,
        Channel::Port(port) => run.machine.dial(port).await,
    }
}

/// Words why a stream could not be opened.
fn refused(run: &Run, channel: Channel, error: &Error) -> Refusal {
    match channel {
        Channel::Port(port) => {
            let why = match error.kind() {
                ErrorKind::GuestUnreachable | ErrorKind::InvalidInput => "connection refused",
                _ => "no route to host",
            };
            Refusal::internal(format!("dialing VM: dial tcp {}:{port}: connect: {why}", run.address))
        }
        _ => Refusal::internal(format!("dialing virt-handler: {error}")),
    }
}

/// Answers the handshake of a web socket (RFC 6455, 4.2).
fn accept(headers: &HeaderMap) -> Result<Response<Body>, Refusal> {
    let has = |name: header::HeaderName, wanted: &str| {
        let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
        values.flat_map(|value| value.split(',')).any(|value| value.trim().eq_ignore_ascii_case(wanted))
    };
    let key = headers.get(header::SEC_WEBSOCKET_KEY);
    let key = key.filter(|_| has(header::UPGRADE, "websocket") && has(header::CONNECTION, "upgrade"));
    let key =
        key.ok_or_else(|| Refusal::bad_request("websocket: the client is not using the websocket protocol"))?;
    let mut response = empty(StatusCode::SWITCHING_PROTOCOLS);
    let answer = response.headers_mut();
    answer.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    answer.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    let proof = HeaderValue::from_str(&derive_accept_key(key.as_bytes())).map_err(Refusal::internal)?;
    answer.insert(header::SEC_WEBSOCKET_ACCEPT, proof);
    if has(header::SEC_WEBSOCKET_PROTOCOL, PROTOCOL) {
        answer.insert(header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(PROTOCOL));
    }
    Ok(response)
}

/// Copies in both directions until one ends, the client stops answering, or the session is cut.
async fn relay(upgraded: Upgraded, stream: BoxedStream, cut: &CancellationToken, ended: &CancellationToken) {
    let socket = WebSocketStream::from_raw_socket(TokioIo::new(upgraded), Role::Server, None).await;
    let (mut sink, mut source) = socket.split();
    let (mut from_guest, mut to_guest) = tokio::io::split(stream);
    let heard = Mutex::new(Instant::now());
    let to_client = async {
        let mut buffer = vec![0; MESSAGE_SIZE];
        let mut ping = tokio::time::interval(PING_INTERVAL);
        ping.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let message = tokio::select! {
                read = from_guest.read(&mut buffer) => match read {
                    Ok(0) | Err(_) => return,
                    Ok(size) => Message::binary(buffer[..size].to_vec()),
                },
                _ = ping.tick() => Message::Ping("keep alive".into()),
            };
            let silent = heard.lock().unwrap_or_else(PoisonError::into_inner).elapsed();
            if silent > PONG_LIMIT || sink.send(message).await.is_err() {
                return;
            }
        }
    };
    let to_machine = async {
        while let Some(Ok(message)) = source.next().await {
            match message {
                Message::Binary(bytes) => {
                    let written = match to_guest.write_all(&bytes).await {
                        Ok(()) => to_guest.flush().await,
                        failed => failed,
                    };
                    if written.is_err() {
                        return;
                    }
                }
                Message::Pong(_) => *heard.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now(),
                Message::Close(_) => return,
                _ => {}
            }
        }
    };
    tokio::select! {
        () = to_client => {}
        () = to_machine => {}
        () = cut.cancelled() => {}
        // What the guest wrote last is still on its way.
        () = async { ended.cancelled().await; tokio::time::sleep(CLOSE_LIMIT).await } => {}
    }
    // KubeVirt closes the connection without a closing handshake.
    if let Ok(mut socket) = sink.reunite(source) {
        let _ = tokio::time::timeout(CLOSE_LIMIT, socket.get_mut().shutdown()).await;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_second_display_evicts_the_first_unless_it_is_preserved() {
        let sessions = Sessions::default();
        let display = |preserve_session| Channel::Display { preserve_session };
        let (_, first) = sessions.begin("ns", "uid", display(false)).unwrap();
        assert!(sessions.begin("ns", "uid", display(true)).is_none());
        assert!(!first.is_cancelled());
        let (_, console) = sessions.begin("ns", "uid", Channel::Console).unwrap();
        sessions.begin("ns", "other", display(false)).unwrap();
        assert!(!first.is_cancelled());
        sessions.begin("ns", "uid", display(false)).unwrap();
        assert!(first.is_cancelled() && !console.is_cancelled());
        sessions.begin("ns", "uid", Channel::Port(22)).unwrap();
        sessions.begin("ns", "uid", Channel::Port(22)).unwrap();
        sessions.cut(|namespace| namespace == "ns");
        assert!(console.is_cancelled());
    }

    #[test]
    fn a_handshake_is_answered_as_rfc_6455_says() {
        let mut headers = HeaderMap::new();
        assert!(accept(&headers).is_err());
        // The example of RFC 6455, 1.3.
        for (name, value) in [
            (header::UPGRADE, "websocket"),
            (header::CONNECTION, "keep-alive, Upgrade"),
            (header::SEC_WEBSOCKET_KEY, "dGhlIHNhbXBsZSBub25jZQ=="),
            (header::SEC_WEBSOCKET_PROTOCOL, "plain.kubevirt.io"),
        ] {
            headers.insert(name, HeaderValue::from_static(value));
        }
        let answer = accept(&headers).unwrap();
        assert_eq!(answer.status(), StatusCode::SWITCHING_PROTOCOLS);
        assert_eq!(answer.headers()[header::SEC_WEBSOCKET_ACCEPT], "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
        assert_eq!(answer.headers()[header::SEC_WEBSOCKET_PROTOCOL], PROTOCOL);
    }
}
