//! Connections: dialled, served, to the outside; half-closed, refused, many at once, and with slow readers.

use super::*;
use smoltcp::{
    iface::SocketSet,
    socket::tcp::{Socket, SocketBuffer, State},
    wire::IpAddress,
};
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

/// The port of the echo service.
const ECHO: u16 = 7;

fn socket() -> Socket<'static> {
    let buffer = || SocketBuffer::new(vec![0; 16 << 10]);
    Socket::new(buffer(), buffer())
}

/// Runs a guest that echoes on this many concurrent connections.
fn echo(guest: Guest, connections: usize) -> tokio::task::JoinHandle<()> {
    let mut sockets = SocketSet::new(Vec::new());
    for _ in 0..connections {
        sockets.add(socket());
    }
    tokio::spawn(guest.run(sockets, |_, sockets| {
        for (_, socket) in sockets.iter_mut() {
            let smoltcp::socket::Socket::Tcp(socket) = socket;
            if !socket.is_open() {
                socket.listen(ECHO).unwrap();
            }
            if socket.can_recv() && socket.can_send() {
                let room = socket.send_capacity() - socket.send_queue();
                let bytes = socket.recv(|bytes| {
                    let length = bytes.len().min(room);
                    (length, bytes[..length].to_vec())
                });
                socket.send_slice(&bytes.unwrap()).unwrap();
            }
            if socket.state() == State::CloseWait && socket.recv_queue() == 0 {
                socket.close();
            }
        }
        None
    }))
}

/// Runs a guest that opens a connection, sends something, and reads to the end; returns what it read, or `None` if refused.
fn call(guest: Guest, to: (Ipv4Addr, u16), sent: Vec<u8>) -> impl Future<Output = Option<Vec<u8>>> {
    let mut sockets = SocketSet::new(Vec::new());
    let handle = sockets.add(socket());
    let (mut begun, mut at, mut read) = (false, 0, Vec::new());
    guest.run(sockets, move |interface, sockets| {
        let socket = sockets.get_mut::<Socket<'_>>(handle);
        if !begun {
            socket.connect(interface.context(), (IpAddress::Ipv4(to.0), to.1), 50_000).unwrap();
            begun = true;
            return None;
        }
        if socket.can_send() && at < sent.len() {
            at += socket.send_slice(&sent[at..]).unwrap();
        }
        if socket.can_recv() {
            socket.recv(|bytes| (bytes.len(), read.extend_from_slice(bytes))).unwrap();
        }
        match socket.state() {
            State::Closed if read.is_empty() => Some(None),
            State::Closed | State::CloseWait if !socket.can_recv() => Some(Some(std::mem::take(&mut read))),
            _ => None,
        }
    })
}

async fn within<T>(what: &str, work: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, work).await.unwrap_or_else(|_| panic!("not in time: {what}"))
}

fn noise(length: usize) -> Vec<u8> {
    (0..length).map(|index| u8::try_from(index * 7 % 251).unwrap()).collect()
}

#[tokio::test]
async fn each_direction_of_a_dialled_stream_closes_separately_and_loses_nothing() {
    let network = network(&undeclared());
    let _echo = echo(join(&network, "web", &nic("default", 1, None)), 1);
    let mut stream = within("dial", network.dial("web", ECHO)).await.unwrap();
    let bytes = noise(1 << 20);
    let (mut reader, mut writer) = tokio::io::split(&mut stream);
    let sending = async {
        writer.write_all(&bytes).await.unwrap();
        writer.shutdown().await.unwrap();
    };
    let mut back = Vec::new();
    let ((), read) = within("echo", async { tokio::join!(sending, reader.read_to_end(&mut back)) }).await;
    read.unwrap();
    assert!(back == bytes, "{} bytes came back of {}", back.len(), bytes.len());
    let error = stream.write_all(b"after the end").await.unwrap_err();
    assert!(matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset), "{error}");
}

#[tokio::test]
async fn a_closed_port_refuses_at_once() {
    let network = network(&undeclared());
    let _echo = echo(join(&network, "web", &nic("default", 1, None)), 1);
    let error = within("dial", network.dial("web", 22)).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
}

#[tokio::test(start_paused = true)]
async fn a_guest_without_an_address_or_that_does_not_answer_is_unreachable() {
    let network = network(&undeclared());
    let _deaf = join(&network, "web", &nic("default", 1, None));
    let error = network.dial("web", 22).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::HostUnreachable);
    assert_eq!(network.dial("unknown", 22).await.unwrap_err().kind(), io::ErrorKind::NotConnected);
}

#[tokio::test]
async fn many_connections_at_once_keep_their_bytes_apart() {
    let network = network(&undeclared());
    let _echo = echo(join(&network, "web", &nic("default", 1, None)), 32);
    let mut connections = JoinSet::new();
    for number in 0..24_u8 {
        let network = Arc::clone(&network);
        connections.spawn(async move {
            let mut stream = network.dial("web", ECHO).await.unwrap();
            let bytes = vec![number; 20_000];
            stream.write_all(&bytes).await.unwrap();
            stream.shutdown().await.unwrap();
            let mut back = Vec::new();
            stream.read_to_end(&mut back).await.unwrap();
            assert!(back == bytes, "connection {number}");
        });
    }
    within("all", connections.join_all()).await;
}

#[tokio::test]
async fn writing_to_a_guest_that_does_not_read_waits() {
    let network = network(&undeclared());
    let guest = join(&network, "web", &nic("default", 1, None));
    let mut sockets = SocketSet::new(Vec::new());
    let handle = sockets.add(socket());
    let reads = Arc::new(AtomicBool::new(false));
    let may_read = Arc::clone(&reads);
    let total = 4 << 20;
    let mut count = 0;
    let guest = tokio::spawn(guest.run(sockets, move |_, sockets| {
        let socket = sockets.get_mut::<Socket<'_>>(handle);
        if !socket.is_open() {
            socket.listen(ECHO).unwrap();
        }
        if may_read.load(Ordering::Relaxed) && socket.can_recv() {
            count += socket.recv(|bytes| (bytes.len(), bytes.len())).unwrap();
        }
        (count == total).then_some(())
    }));
    let mut stream = within("dial", network.dial("web", ECHO)).await.unwrap();
    let bytes = vec![1; total];
    let mut sent = 0;
    // It accepts what fits into the buffers, and then nothing more.
    while let Ok(length) =
        tokio::time::timeout(Duration::from_millis(300), stream.write(&bytes[sent..])).await
    {
        sent += length.unwrap();
        assert!(sent < total / 2, "{sent} bytes were taken and not read");
    }
    reads.store(true, Ordering::Relaxed);
    within("the rest", stream.write_all(&bytes[sent..])).await.unwrap();
    within("the guest", guest).await.unwrap();
}

#[tokio::test]
async fn connections_end_with_their_guest() {
    let network = network(&undeclared());
    let guest = echo(join(&network, "web", &nic("default", 1, None)), 1);
    let mut stream = within("dial", network.dial("web", ECHO)).await.unwrap();
    stream.write_all(b"x").await.unwrap();
    stream.read_exact(&mut [0]).await.unwrap();
    guest.abort();
    let error = within("the end", stream.read(&mut [0])).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    // It reconnects, as after a restart.
    let _echo = echo(connect(&network, "web"), 1);
    within("dial again", network.dial("web", ECHO)).await.unwrap();
}

#[tokio::test]
async fn connections_end_with_their_network() {
    let network = network(&undeclared());
    let _echo = echo(join(&network, "web", &nic("default", 1, None)), 1);
    let mut stream = within("dial", network.dial("web", ECHO)).await.unwrap();
    drop(network);
    assert!(within("the end", stream.read(&mut [0])).await.is_err());
}

#[tokio::test]
async fn connections_to_the_outside_are_forwarded_and_so_are_refusals() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let open = listener.local_addr().unwrap().port();
    let network = network(&undeclared());
    let web = join(&network, "web", &nic("default", 1, None));
    let bytes = noise(300_000);
    let server = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut question = [0; 8];
        stream.read_exact(&mut question).await.unwrap();
        stream.write_all(&bytes).await.unwrap();
        question
    };
    let talk = async { tokio::join!(call(web, (Ipv4Addr::LOCALHOST, open), b"question".to_vec()), server) };
    let (got, question) = within("the answer", talk).await;
    assert_eq!(&question, b"question");
    assert!(got.is_some_and(|got| got == bytes));
    drop(listener);
    let db = join(&network, "db", &nic("default", 2, None));
    assert_eq!(within("a refusal", call(db, (Ipv4Addr::LOCALHOST, open), Vec::new())).await, None);
}

#[tokio::test]
async fn this_host_is_never_reached_and_without_internet_nothing_is() {
    // The real policy, and a listener that must receive nothing.
    let listener = tokio::net::TcpListener::bind("0.0.0.0:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut targets =
        vec![Ipv4Addr::LOCALHOST, Ipv4Addr::new(127, 0, 0, 53), Ipv4Addr::new(169, 254, 169, 254)];
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
    if socket.connect("198.51.100.7:9").is_ok()
        && let std::net::IpAddr::V4(own) = socket.local_addr().unwrap().ip()
    {
        targets.push(own);
    }
    for (number, target) in (1..).zip(targets) {
        let network = Arc::new(Network::new(&undeclared(), &NetworkOptions::new("lab")));
        let web = join(&network, "web", &nic("default", number, None));
        assert_eq!(within("a refusal", call(web, (target, port), b"x".to_vec())).await, None, "{target}");
    }
    let network = network(&two_vpcs());
    let web = join(&network, "web", &nic("web", 1, None));
    assert_eq!(within("no internet", call(web, (Ipv4Addr::LOCALHOST, port), b"x".to_vec())).await, None);
    let heard = tokio::time::timeout(Duration::from_millis(1), listener.accept()).await;
    assert!(heard.is_err(), "{heard:?}");
}

#[tokio::test]
async fn files_are_served_on_the_gateway_to_known_machines() {
    let network = network(&two_vpcs());
    let heard = Arc::new(Mutex::new(Vec::new()));
    let site = {
        let heard = Arc::clone(&heard);
        let files = [("x".to_owned(), rudder_core::backend::SiteFile::bytes(b"hello".as_slice()))];
        Site::new(files.into(), move |request| heard.lock().unwrap().push(request.machine))
    };
    let served = network.serve(site.clone());
    let second = network.serve(site);
    assert_ne!(served.port, second.port);
    let expected = [("web", [10, 0, 2, 1]), ("db", [10, 0, 3, 1]), ("same", [10, 0, 2, 1])];
    let expected = expected.map(|(name, address)| (name.to_owned(), Ipv4Addr::from(address)));
    assert_eq!(served.addresses, BTreeMap::from(expected));
    let request = b"GET /x HTTP/1.0\r\n\r\n";
    for (number, (name, on)) in (1..).zip([("web", "web"), ("db", "db"), ("attacker", "same")]) {
        let guest = join(&network, name, &nic(on, number, None));
        let to = (guest.gateway, served.port);
        let got = within("the file", call(guest, to, request.to_vec())).await.unwrap();
        assert!(got.ends_with(b"hello"), "{}", String::from_utf8_lossy(&got));
    }
    assert_eq!(*heard.lock().unwrap(), ["web", "db", "attacker"].map(|name| Some(name.to_owned())));
    let port = served.port;
    drop(served);
    let late = join(&network, "late", &nic("web", 9, None));
    let to = (late.gateway, port);
    assert_eq!(within("a refusal", call(late, to, request.to_vec())).await, None);
}

#[tokio::test]
async fn names_are_answered_over_tcp() {
    let network = network(&two_vpcs());
    let web = join(&network, "web", &nic("web", 1, None));
    let to = (web.gateway, 53);
    let mut question = vec![0, 21, 1, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 3, b'w', b'e', b'b', 0, 0, 1, 0, 1];
    // A malformed message ends the connection.
    question.extend([0, 3, 1, 2, 3]);
    let got = within("the answer", call(web, to, question)).await.unwrap();
    assert!(got.ends_with(&[10, 0, 2, 15]), "{got:?}");
}

#[tokio::test]
async fn a_forwarded_port_is_accessible_only_to_its_owner() {
    use std::os::unix::fs::PermissionsExt as _;
    let network = network(&undeclared());
    let _echo = echo(join(&network, "web", &nic("default", 1, None)), 1);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("door");
    std::fs::write(&path, "of the previous run").unwrap();
    let doors = network.forward_ports("web", [(ECHO, path.clone())]).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let mut stream = tokio::net::UnixStream::connect(&path).await.unwrap();
    stream.write_all(b"hello").await.unwrap();
    stream.shutdown().await.unwrap();
    let mut back = Vec::new();
    within("echo", stream.read_to_end(&mut back)).await.unwrap();
    assert_eq!(back, b"hello");
    drop(doors);
}
