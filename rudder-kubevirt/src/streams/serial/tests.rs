//! The hub between a scripted console and its readers. The clock is paused: it advances when nothing else can happen.
#![allow(clippy::unwrap_used)]

use super::*;
use std::sync::Mutex;
use tokio::io::DuplexStream;

/// What stands where KubeVirt's console is: connections arrive in `opened`, or are refused.
struct Console {
    opened: mpsc::UnboundedReceiver<DuplexStream>,
    refuses: Arc<Mutex<bool>>,
}

impl Console {
    fn new() -> (Connect, Self) {
        let (sender, opened) = mpsc::unbounded_channel();
        let refuses = Arc::new(Mutex::new(false));
        let refused = Arc::clone(&refuses);
        let connect: Connect = Arc::new(move || {
            let (near, far) = tokio::io::duplex(1024);
            let result = match *refused.lock().unwrap() {
                true => Err(Error::new(ErrorKind::GuestUnreachable, "no console")),
                false => Ok(Box::new(near) as BoxedStream),
            };
            if result.is_ok() {
                sender.send(far).unwrap();
            }
            Box::pin(async move { result })
        });
        (connect, Self { opened, refuses })
    }

    async fn accept(&mut self) -> DuplexStream {
        self.opened.recv().await.unwrap()
    }

    fn refuse(&self, refuses: bool) {
        *self.refuses.lock().unwrap() = refuses;
    }
}

async fn read(stream: &mut (impl AsyncRead + Unpin), expected: &str) {
    let mut bytes = vec![0; expected.len()];
    stream.read_exact(&mut bytes).await.unwrap();
    assert_eq!(String::from_utf8_lossy(&bytes), expected);
}

async fn rest(stream: &mut (impl AsyncRead + Unpin)) -> Vec<u8> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).await.unwrap();
    bytes
}

#[tokio::test(start_paused = true)]
async fn readers_share_one_connection_in_both_directions() {
    let (connect, mut console) = Console::new();
    let hub = SerialHub::start(connect);
    let (mut one, mut two) = (hub.connect().await.unwrap(), hub.connect().await.unwrap());
    let mut guest = console.accept().await;
    guest.write_all(b"login: ").await.unwrap();
    read(&mut one, "login: ").await;
    read(&mut two, "login: ").await;
    one.write_all(b"root\n").await.unwrap();
    read(&mut guest, "root\n").await;
    two.write_all(b"id\n").await.unwrap();
    read(&mut guest, "id\n").await;
    drop(one);
    let mut late = hub.connect().await.unwrap();
    guest.write_all(b"uid=0\n").await.unwrap();
    read(&mut two, "uid=0\n").await;
    read(&mut late, "uid=0\n").await;
    assert_eq!(hub.log(0).tail(100).await.unwrap(), b"login: uid=0\n");
    assert_eq!(hub.log(7).start, 7);
    assert!(console.opened.try_recv().is_err(), "no second connection");
}

#[tokio::test(start_paused = true)]
async fn a_reader_that_does_not_read_loses_the_oldest_bytes() {
    const LIMIT: usize = 4096;
    let (connect, mut console) = Console::new();
    let hub = SerialHub::with_limit(connect, LIMIT);
    let (mut idle, mut reader) = (hub.connect().await.unwrap(), hub.connect().await.unwrap());
    let mut guest = console.accept().await;
    let lines: Vec<String> = (0..10_000).map(|number| format!("line {number}\n")).collect();
    let all = lines.concat();
    let writing = async {
        for line in &lines {
            guest.write_all(line.as_bytes()).await.unwrap();
        }
    };
    let reading = async {
        let mut bytes = Vec::new();
        while !bytes.ends_with(b"line 9999\n") {
            let mut piece = [0; 512];
            let count = reader.read(&mut piece).await.unwrap();
            bytes.extend_from_slice(&piece[..count]);
        }
    };
    tokio::join!(writing, reading);
    hub.end();
    drop(guest);
    hub.finished().await;
    assert_eq!(hub.log(0).tail(usize::MAX).await.unwrap(), &all.as_bytes()[all.len() - LIMIT..]);
    let found = rest(&mut idle).await;
    assert!(found.ends_with(&all.as_bytes()[all.len() - LIMIT..]), "the last bytes are there");
    assert!(found.len() < all.len(), "{} bytes were kept for it", found.len());
}

#[tokio::test(start_paused = true)]
async fn a_broken_connection_is_opened_again() {
    let (connect, mut console) = Console::new();
    let hub = SerialHub::start(connect);
    let mut reader = hub.connect().await.unwrap();
    let mut guest = console.accept().await;
    guest.write_all(b"before ").await.unwrap();
    read(&mut reader, "before ").await;
    console.refuse(true);
    drop(guest);
    sleep(Duration::from_secs(30)).await;
    // What is typed in the meantime arrives; a reader that comes in the meantime waits, for a time.
    reader.write_all(b"typed").await.unwrap();
    assert_eq!(hub.connect().await.err().unwrap().kind(), ErrorKind::GuestUnreachable);
    console.refuse(false);
    let mut late = hub.connect().await.unwrap();
    let mut guest = console.accept().await;
    read(&mut guest, "typed").await;
    guest.write_all(b"after").await.unwrap();
    read(&mut reader, "after").await;
    read(&mut late, "after").await;
    let log = hub.log(0);
    assert_eq!(log.tail(100).await.unwrap(), b"before after");
}

#[tokio::test(start_paused = true)]
async fn a_console_that_stays_unreachable_is_given_up() {
    let (connect, console) = Console::new();
    console.refuse(true);
    let hub = SerialHub::start(connect);
    timeout(Duration::from_secs(300), hub.finished()).await.unwrap();
    let error = hub.connect().await.err().unwrap();
    assert_eq!(error.kind(), ErrorKind::GuestUnreachable);
    assert!(error.report().contains("no console"), "{}", error.report());
    assert!(hub.log(0).tail(100).await.unwrap().is_empty());
}

#[tokio::test(start_paused = true)]
async fn the_last_output_is_recorded_and_streams_end() {
    let (connect, mut console) = Console::new();
    let hub = SerialHub::start(connect);
    let mut reader = hub.connect().await.unwrap();
    let mut guest = console.accept().await;
    hub.end();
    guest.write_all(b"Power down").await.unwrap();
    drop(guest);
    hub.finished().await;
    assert_eq!(rest(&mut reader).await, b"Power down");
    assert_eq!(rest(&mut hub.log(0).stream).await, b"Power down");
    assert_eq!(hub.connect().await.err().unwrap().kind(), ErrorKind::Conflict);
    assert!(console.opened.try_recv().is_err(), "not opened again");
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_outlives_the_machine_is_left() {
    let (connect, mut console) = Console::new();
    let hub = SerialHub::start(connect);
    let mut guest = console.accept().await;
    guest.write_all(b"hangs").await.unwrap();
    hub.end();
    timeout(DRAIN_LIMIT * 2, hub.finished()).await.unwrap();
    assert_eq!(hub.log(0).tail(100).await.unwrap(), b"hangs");
    assert_eq!(rest(&mut guest).await, b"");
}

#[tokio::test(start_paused = true)]
async fn what_was_typed_before_hanging_up_arrives() {
    let (connect, mut console) = Console::new();
    let hub = SerialHub::start(connect);
    let mut reader = hub.connect().await.unwrap();
    let mut guest = console.accept().await;
    let typed = "x".repeat(8000);
    reader.write_all(typed.as_bytes()).await.unwrap();
    drop(reader);
    read(&mut guest, &typed).await;
    // A reader that has sent everything still reads.
    let mut reader = hub.connect().await.unwrap();
    reader.write_all(b"bye").await.unwrap();
    reader.shutdown().await.unwrap();
    read(&mut guest, "bye").await;
    guest.write_all(b"answer").await.unwrap();
    read(&mut reader, "answer").await;
}

#[tokio::test(start_paused = true)]
async fn dropping_the_hub_closes_everything() {
    let (connect, mut console) = Console::new();
    let hub = SerialHub::start(connect);
    let mut reader = hub.connect().await.unwrap();
    let mut guest = console.accept().await;
    drop(hub);
    assert_eq!(rest(&mut reader).await, b"");
    assert_eq!(rest(&mut guest).await, b"");
}
