//! Slow, overloaded or strict servers, each of which lets in a patient client. Time is paused: it passes only when
//! nothing else can happen.

use super::unusual_servers::UnusualServer;
use crate::{
    Error, ErrorKind, Result,
    backend::BoxedStream,
    guest::{BuildKey, Endpoint, Guest},
};
use futures::future::BoxFuture;
use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, ReadHalf, WriteHalf, duplex, split},
    time::{Instant, sleep, sleep_until},
};

const MINUTE: Duration = Duration::from_secs(60);

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// A server whose connections are handled by the test, with the counts that a guest would keep.
struct Server {
    odd: UnusualServer,
    key: BuildKey,
    dials: AtomicUsize,
    open: AtomicUsize,
    most: AtomicUsize,
}

impl Server {
    fn new() -> Arc<Self> {
        let (odd, key) = (UnusualServer::default(), BuildKey::generate());
        let counts = || AtomicUsize::new(0);
        Arc::new(Self { odd, key, dials: counts(), open: counts(), most: counts() })
    }

    /// Returns an endpoint whose connections are handled by this function.
    fn endpoint<F>(
        self: &Arc<Self>,
        handle: impl Fn(Arc<Self>, DuplexStream) -> F + Send + Sync + 'static,
    ) -> Endpoint
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let server = Arc::clone(self);
        Endpoint::new(move || {
            let (ours, theirs) = duplex(1 << 16);
            server.dials.fetch_add(1, SeqCst);
            let open = server.open.fetch_add(1, SeqCst) + 1;
            server.most.fetch_max(open, SeqCst);
            let (handled, server) = (handle(Arc::clone(&server), theirs), Arc::clone(&server));
            tokio::spawn(async move {
                handled.await;
                server.open.fetch_sub(1, SeqCst);
            });
            Box::pin(async { Ok(Box::new(ours) as BoxedStream) })
        })
    }

    /// Opens a connection to the real server behind it.
    fn inner(&self) -> DuplexStream {
        let (near, far) = duplex(1 << 16);
        self.odd.clone().serve(&self.key, far);
        near
    }

    async fn log_in(&self, endpoint: &Endpoint, limit: Duration) -> Result<Guest> {
        self.odd.login().connect(endpoint, limit).await
    }

    fn dials(&self) -> usize {
        self.dials.load(SeqCst)
    }
}

/// Copies bytes; before each chunk is written, `before` is awaited. Ends when either side does.
async fn carry<F: Future<Output = ()>>(
    mut from: ReadHalf<DuplexStream>,
    mut to: WriteHalf<DuplexStream>,
    piece: usize,
    before: impl Fn() -> F,
) {
    let mut bytes = vec![0; piece];
    while let Ok(count @ 1..) = from.read(&mut bytes).await {
        before().await;
        if to.write_all(&bytes[..count]).await.is_err() {
            return;
        }
    }
}

/// Relays a connection both ways; what the server sends is split into chunks that each take time.
async fn relay<F: Future<Output = ()>>(
    client: DuplexStream,
    server: DuplexStream,
    piece: usize,
    before: impl Fn() -> F,
) {
    let ((client_out, client_in), (server_out, server_in)) = (split(client), split(server));
    tokio::select! {
        () = carry(client_out, server_in, 1 << 15, || async {}) => {}
        () = carry(server_out, client_in, piece, before) => {}
    }
}

/// Waits until the client hangs up.
async fn hang_on(mut stream: DuplexStream) {
    let mut bytes = [0; 1024];
    while let Ok(1..) = stream.read(&mut bytes).await {}
}

#[tokio::test(start_paused = true)]
async fn a_server_that_is_slow_in_the_key_exchange_is_waited_for() {
    let server = Server::new();
    // OpenSSH allows two minutes in total.
    let endpoint = server.endpoint(|server, stream| async move {
        relay(stream, server.inner(), 1 << 15, || sleep(seconds(14))).await;
    });
    server.log_in(&endpoint, 5 * MINUTE).await.unwrap();
    assert!(server.dials() <= 12, "{} connections", server.dials());
    assert!(server.most.load(SeqCst) <= 6);
}

#[tokio::test(start_paused = true)]
async fn a_banner_that_arrives_byte_by_byte_is_waited_for() {
    let server = Server::new();
    let sent = Arc::new(AtomicUsize::new(0));
    let endpoint = server.endpoint(move |server, stream| {
        let sent = Arc::clone(&sent);
        async move {
            let mut inner = server.inner();
            let (mut out, mut banner) = (stream, [0; 20]);
            inner.read_exact(&mut banner).await.unwrap();
            for letter in banner {
                sleep(seconds(3)).await;
                if out.write_all(&[letter]).await.is_err() {
                    return;
                }
                sent.fetch_add(1, SeqCst);
            }
            relay(out, inner, 1 << 15, || async {}).await;
        }
    });
    let begin = Instant::now();
    server.log_in(&endpoint, 5 * MINUTE).await.unwrap();
    assert!(begin.elapsed() < seconds(70), "the first connection is the one that gets in");
    assert!(server.dials() <= 8, "{} connections", server.dials());
}

#[tokio::test(start_paused = true)]
async fn a_silent_server_gets_few_connections() {
    let server = Server::new();
    let endpoint = server.endpoint(|_, stream| hang_on(stream));
    let error = server.log_in(&endpoint, 5 * MINUTE).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::GuestUnreachable);
    assert!(error.to_string().contains("the server sent nothing"), "{error}");
    assert!(server.dials() <= 60, "{} connections", server.dials());
    assert!(server.most.load(SeqCst) <= 6, "fewer than `MaxStartups` at once");
}

/// A guest that listens after a minute, with a processor that executes one operation at a time, in order. Starting a connection
/// and handling a message take time, and a client that has hung up is noticed only when its turn comes.
#[tokio::test(start_paused = true)]
async fn a_guest_under_load_is_logged_in_to_without_adding_to_the_load() {
    let (server, listens) = (Server::new(), Instant::now() + MINUTE);
    let processor = Arc::new(tokio::sync::Mutex::new(()));
    let (unauthenticated, dropped) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let count = Arc::clone(&dropped);
    let endpoint = server.endpoint(move |server, mut stream| {
        let (processor, unauthenticated) = (Arc::clone(&processor), Arc::clone(&unauthenticated));
        let dropped = Arc::clone(&count);
        async move {
            if Instant::now() < listens {
                let mut nothing = [0; 1];
                tokio::select! {
                    () = sleep_until(listens) => {}
                    // Its first packet never arrived, and it hung up.
                    () = async { while let Ok(1..) = stream.read(&mut nothing).await {} } => return,
                }
                // What the client sent until now is lost with those packets; it would be sent again.
                drop(stream);
                return;
            }
            if unauthenticated.fetch_add(1, SeqCst) >= 10 {
                dropped.fetch_add(1, SeqCst);
                let _ = stream.write_all(b"Exceeded MaxStartups\r\n").await;
            } else {
                let work = |time| {
                    let processor = Arc::clone(&processor);
                    async move {
                        let _busy = processor.lock().await;
                        sleep(time).await;
                    }
                };
                work(seconds(4)).await;
                relay(stream, server.inner(), 1 << 15, || work(seconds(3))).await;
            }
            unauthenticated.fetch_sub(1, SeqCst);
        }
    });
    server.log_in(&endpoint, 5 * MINUTE).await.unwrap();
    assert_eq!(dropped.load(SeqCst), 0, "`MaxStartups` is never reached");
    let late = Instant::now() - listens;
    assert!(server.dials() <= 40 && late < 2 * MINUTE, "{} connections, {late:?}", server.dials());
}

/// Checks logins to a server that sends this text and hangs up: for two minutes, and forever.
async fn refusing(text: &'static [u8]) {
    let (server, begin) = (Server::new(), Instant::now());
    let ready = begin + 2 * MINUTE;
    let endpoint = server.endpoint(move |server, mut stream| async move {
        if Instant::now() < ready {
            let _ = stream.write_all(text).await;
            return;
        }
        relay(stream, server.inner(), 1 << 15, || async {}).await;
    });
    server.log_in(&endpoint, 5 * MINUTE).await.unwrap();
    let (dials, took) = (server.dials(), begin.elapsed());
    assert!(dials <= 25 && took <= 2 * MINUTE + seconds(21), "{dials} connections in {took:?}");

    let never = Server::new();
    let endpoint = never.endpoint(move |_, mut stream| async move {
        let _ = stream.write_all(text).await;
    });
    let error = never.log_in(&endpoint, MINUTE).await.unwrap_err().to_string();
    let said = String::from_utf8_lossy(text);
    assert!(said.starts_with("SSH-") || error.contains(said.trim()), "{error}");
}

#[tokio::test(start_paused = true)]
async fn pauses_grow_while_the_server_refuses() {
    // MaxStartups, PerSourcePenalties of OpenSSH 9.8, and a server whose host keys do not exist yet.
    refusing(b"Exceeded MaxStartups\r\n").await;
    refusing(b"Not allowed at this time\r\n").await;
    refusing(b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n").await;
}

#[tokio::test(start_paused = true)]
async fn a_port_is_reached_soon_after_it_opens() {
    let (server, opens) = (Server::new(), Instant::now() + seconds(25));
    let open = server.endpoint(|server, stream| async move {
        relay(stream, server.inner(), 1 << 15, || async {}).await;
    });
    let dial = open.clone();
    let refusing = Endpoint::new(move || -> BoxFuture<'static, Result<BoxedStream>> {
        let dial = dial.clone();
        Box::pin(async move {
            match Instant::now() < opens {
                true => Err(Error::new(ErrorKind::GuestUnreachable, "connection refused")),
                false => dial.dial().await,
            }
        })
    });
    server.log_in(&refusing, MINUTE).await.unwrap();
    assert!(Instant::now() <= opens + Duration::from_millis(300), "{:?} late", Instant::now() - opens);

    // A network that does not exist yet: connections made before it does are never answered.
    let (server, opens) = (Server::new(), Instant::now() + seconds(25));
    let swallowing = server.endpoint(move |server, stream| async move {
        if Instant::now() < opens {
            return hang_on(stream).await;
        }
        relay(stream, server.inner(), 1 << 15, || async {}).await;
    });
    server.log_in(&swallowing, MINUTE).await.unwrap();
    assert!(Instant::now() <= opens + seconds(4), "{:?} late", Instant::now() - opens);
}

/// OpenSSH 9.8: a client that leaves without a login is penalised for one second, one that fails to log in for five; a
/// client with more than 15 is dropped until they have passed. fail2ban: after five failures, the port refuses for ten
/// minutes.
#[tokio::test(start_paused = true)]
async fn a_key_that_is_authorised_late_causes_no_penalty() {
    let server = Server::new();
    server.odd.shut.store(true, SeqCst);
    let penalty = Arc::new(Mutex::new(Instant::now()));
    let banned = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&banned);
    let endpoint = server.endpoint(move |server, mut stream| {
        let (penalty, banned) = (Arc::clone(&penalty), Arc::clone(&count));
        async move {
            if *penalty.lock().unwrap() > Instant::now() + seconds(15) {
                banned.fetch_add(1, SeqCst);
                let _ = stream.write_all(b"Not allowed at this time\r\n").await;
                return;
            }
            relay(stream, server.inner(), 1 << 15, || async {}).await;
            let mut penalty = penalty.lock().unwrap();
            *penalty = (*penalty).max(Instant::now()) + seconds(5);
        }
    });
    let (begin, shut) = (Instant::now(), Arc::clone(&server.odd.shut));
    let opening = async {
        sleep_until(begin + MINUTE).await;
        shut.store(false, SeqCst);
    };
    let (guest, ()) = tokio::join!(server.log_in(&endpoint, 5 * MINUTE), opening);
    guest.unwrap();
    assert!(begin.elapsed() <= MINUTE + seconds(21), "{:?}", begin.elapsed());
    assert_eq!(banned.load(SeqCst), 0);
    assert!(server.dials() <= 5, "{} connections", server.dials());
}
