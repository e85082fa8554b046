//! Opening streams at an API server on loopback, and what it answers otherwise.
#![allow(clippy::unwrap_used)]

use super::*;
use futures::{SinkExt as _, StreamExt as _};
use std::sync::{Arc, Mutex};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};
use tokio_tungstenite::{
    accept_hdr_async,
    tungstenite::{
        Message,
        handshake::server::{Request as Asked, Response as Answer},
    },
};

/// Returns a listener on loopback, and a client of it.
async fn listen() -> (TcpListener, Client) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let mut config = kube::Config::new(format!("http://{address}").parse().unwrap());
    config.proxy_url = None;
    // A request that is answered 503 would be sent again.
    config.default_retry = false;
    (listener, Client::try_from(config).unwrap())
}

/// Reads the head of a request and sends these bytes.
async fn answer(listener: &TcpListener, bytes: &[u8]) -> TcpStream {
    let (mut stream, _) = listener.accept().await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    stream.write_all(bytes).await.unwrap();
    stream
}

/// Opens a stream at a server that gives this answer.
async fn opened(answered: &str) -> Result<WebSocketByteStream, OpenError> {
    let (listener, client) = listen().await;
    let (opened, _stream) = tokio::join!(open(&client, "/x"), answer(&listener, answered.as_bytes()));
    opened
}

async fn refused(code: &str, body: &str) -> OpenError {
    let length = body.len();
    opened(&format!("HTTP/1.1 {code}\r\nContent-Length: {length}\r\n\r\n{body}")).await.unwrap_err()
}

#[tokio::test]
async fn a_stream_is_opened_with_the_subprotocol() {
    let (listener, client) = listen().await;
    let asked = Arc::new(Mutex::new(None));
    let seen = Arc::clone(&asked);
    let serving = async move {
        let (stream, _) = listener.accept().await.unwrap();
        #[allow(clippy::result_large_err)]
        let check = |request: &Asked, mut answer: Answer| {
            let protocol = request.headers()[header::SEC_WEBSOCKET_PROTOCOL].clone();
            *seen.lock().unwrap() = Some((request.uri().to_string(), protocol.to_str().unwrap().to_owned()));
            answer.headers_mut().insert(header::SEC_WEBSOCKET_PROTOCOL, protocol);
            Ok(answer)
        };
        let mut socket = accept_hdr_async(stream, check).await.unwrap();
        socket.send(Message::binary(&b"SSH-2.0-guest\r\n"[..])).await.unwrap();
        let said = socket.next().await.unwrap().unwrap().into_data();
        assert_eq!(&said[..], b"SSH-2.0-rudder\r\n");
    };
    let talking = async {
        let mut stream = open(&client, "/streams/portforward/22").await.unwrap();
        let mut greeting = [0; 15];
        stream.read_exact(&mut greeting).await.unwrap();
        assert_eq!(&greeting, b"SSH-2.0-guest\r\n");
        stream.write_all(b"SSH-2.0-rudder\r\n").await.unwrap();
        assert_eq!(stream.read(&mut greeting).await.unwrap(), 0, "the server has hung up");
    };
    tokio::join!(serving, talking);
    let expected = ("/streams/portforward/22".to_owned(), "plain.kubevirt.io".to_owned());
    assert_eq!(asked.lock().unwrap().take().unwrap(), expected);
}

#[tokio::test]
async fn a_refusal_says_what_it_means() {
    let status = |code: u16, reason: &str, message: &str| {
        let status = serde_json::json!({
            "kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason, "message": message,
        });
        status.to_string()
    };
    let dialling = "Internal error occurred: dialing VM: dial tcp 10.0.0.2:22: connect: connection refused";
    let forbidden = "virtualmachineinstances.subresources.kubevirt.io \"web\" is forbidden: User \"u\" cannot get resource \
                     \"virtualmachineinstances/vnc\" in API group \"subresources.kubevirt.io\" in the namespace \"lab\"";
    let rule = "{apiGroups: [\"subresources.kubevirt.io\"], resources: [\"virtualmachineinstances/vnc\"], verbs: [\"get\"]}";
    let paused = "Operation cannot be fulfilled on virtualmachineinstance \"web\": VMI is paused";
    let absent = "virtualmachineinstances.kubevirt.io \"web\" not found";
    let missing = "the server could not find the requested resource";
    use ErrorKind::{Conflict, GuestUnreachable, HostMissing};
    use Refusal::{NotRunning, Permanent, Unreachable};
    let cases = [
        (
            "500 Internal Server Error",
            status(500, "InternalError", dialling),
            Unreachable,
            GuestUnreachable,
            "connection refused",
        ),
        (
            "503 Service Unavailable",
            "no endpoints\n".to_owned(),
            Unreachable,
            GuestUnreachable,
            "no endpoints",
        ),
        ("409 Conflict", status(409, "Conflict", paused), NotRunning, Conflict, "paused"),
        ("404 Not Found", status(404, "NotFound", absent), NotRunning, Conflict, absent),
        ("404 Not Found", status(404, "NotFound", missing), Permanent, HostMissing, "KubeVirt"),
        (
            "400 Bad Request",
            status(400, "BadRequest", "VMI is not running"),
            NotRunning,
            Conflict,
            "not running",
        ),
        (
            "400 Bad Request",
            status(400, "BadRequest", "no network interfaces are present"),
            Unreachable,
            GuestUnreachable,
            "interfaces",
        ),
        ("403 Forbidden", status(403, "Forbidden", forbidden), Permanent, HostMissing, rule),
        (
            "401 Unauthorized",
            status(401, "Unauthorized", "Unauthorized"),
            Permanent,
            HostMissing,
            "log in again",
        ),
        ("502 Bad Gateway", String::new(), Unreachable, GuestUnreachable, "502"),
    ];
    for (code, body, refusal, kind, text) in cases {
        let error = refused(code, &body).await;
        assert_eq!(error.refusal(), refusal, "{code} {body}");
        let error = error.into_error("connect to the display");
        assert_eq!(error.kind(), kind, "{code} {body}: {error}");
        assert!(error.to_string().starts_with("cannot connect to the display: "), "{error}");
        assert!(error.report().contains(text), "{}", error.report());
    }
}

#[tokio::test]
async fn an_error_that_is_too_long_is_not_read() {
    let error = refused("500 Internal Server Error", &"x".repeat(LARGEST_ERROR + 1)).await;
    let text = error.into_error("dial").to_string();
    assert_eq!(text, "cannot dial: the answer was 500 Internal Server Error");
}

#[tokio::test]
async fn an_answer_that_is_no_web_socket_is_refused() {
    let upgrade = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n";
    let error = opened(&format!("{upgrade}\r\n")).await.unwrap_err();
    assert!(matches!(&error, OpenError::NotAStream(found) if found.contains("accept key")), "{error:?}");
    let error = opened(&format!("{upgrade}Sec-WebSocket-Accept: x\r\n\r\n")).await.unwrap_err();
    assert_eq!(
        (error.refusal(), error.into_error("dial").kind()),
        (Refusal::Unreachable, ErrorKind::Protocol)
    );

    let mut headers = HeaderMap::new();
    let accept = handshake::derive_accept_key(b"key");
    headers.insert(header::SEC_WEBSOCKET_ACCEPT, accept.parse().unwrap());
    check_upgrade(&headers, "key").unwrap();
    headers.insert(header::SEC_WEBSOCKET_PROTOCOL, "v5.channel.k8s.io".parse().unwrap());
    let error = check_upgrade(&headers, "key").unwrap_err();
    assert!(matches!(&error, OpenError::NotAStream(found) if found.contains("v5.channel")), "{error:?}");
}

#[tokio::test]
async fn an_api_server_that_is_gone_is_told_apart() {
    let (listener, client) = listen().await;
    drop(listener);
    let error = open(&client, "/x").await.unwrap_err();
    assert_eq!(error.refusal(), Refusal::Unreachable);
    let error = error.into_error("connect to the display");
    assert!(error.is_retryable() && error.kind() != ErrorKind::Conflict, "{error:?}");
}
