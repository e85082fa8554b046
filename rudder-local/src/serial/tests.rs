#![allow(clippy::unwrap_used)]
use super::*;
use proptest::prelude::*;
use std::path::Path;

const LIMIT: usize = 1 << 10;

/// A console for which the test plays QEMU and the guest.
struct Bench {
    dir: tempfile::TempDir,
    console: SerialConsole,
    listener: UnixListener,
    guest: UnixStream,
}

impl Bench {
    async fn new(limit: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = |file: &str| dir.path().join(file);
        let listener = UnixListener::bind(path("serial")).unwrap();
        let paths =
            SerialPaths { socket: path("serial"), client_socket: path("console"), record: path("log") };
        let (console, accepted) =
            tokio::join!(SerialConsole::with_limit(paths, Attachment::First, limit), listener.accept());
        Self { console: console.unwrap(), listener, guest: accepted.unwrap().0, dir }
    }

    async fn say(&mut self, bytes: &[u8]) {
        self.guest.write_all(bytes).await.unwrap();
    }

    /// Ends the guest's machine.
    async fn end(self) -> (tempfile::TempDir, SerialConsole) {
        drop(self.guest);
        self.console.finished().await;
        (self.dir, self.console)
    }
}

/// Returns the content of the two files of a record, the older first.
fn recorded(dir: &Path) -> Vec<u8> {
    let read = |file: &str| std::fs::read(dir.join(file)).unwrap_or_default();
    [read("log.0"), read("log")].concat()
}

async fn until(stream: &mut BoxedStream, text: &str) -> Vec<u8> {
    let mut received = Vec::new();
    while !received.ends_with(text.as_bytes()) {
        received.push(stream.read_u8().await.unwrap());
    }
    received
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn output_takes_bounded_space_and_its_end_is_kept(
        pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..3 * LIMIT), 0..12),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut bench = Bench::new(LIMIT).await;
            for piece in &pieces {
                bench.say(piece).await;
            }
            let all = pieces.concat();
            let (dir, console) = bench.end().await;
            assert_eq!(console.tail(usize::MAX), &all[all.len().saturating_sub(LIMIT)..]);
            assert_eq!(console.tail(5), &all[all.len().saturating_sub(5)..]);
            let recorded = recorded(dir.path());
            assert!(recorded.len() <= 2 * LIMIT, "{} bytes on disk", recorded.len());
            assert!(recorded.len() >= LIMIT.min(all.len()));
            assert!(all.ends_with(&recorded));
        });
    }
}

#[tokio::test]
async fn a_reader_that_does_not_read_does_not_block_the_guest() {
    let mut bench = Bench::new(LIMIT).await;
    let mut idle = bench.console.connect().await.unwrap();
    let client = UnixStream::connect(bench.dir.path().join("console")).await.unwrap();
    // Far more than all buffers together hold.
    let flood = vec![b'x'; 4 << 20];
    bench.say(&flood).await;
    bench.say(b"the end").await;
    let (_dir, console) = bench.end().await;
    assert!(console.tail(100).ends_with(b"the end"));
    // It missed the middle, but receives the end.
    let mut received = Vec::new();
    idle.read_to_end(&mut received).await.unwrap();
    assert!(received.ends_with(b"the end") && received.len() < flood.len());
    drop(client);
}

#[tokio::test]
async fn several_clients_can_type_and_each_reads_everything() {
    let mut bench = Bench::new(LIMIT).await;
    let mut one = bench.console.connect().await.unwrap();
    let mut two = bench.console.connect().await.unwrap();
    bench.say(b"to both.").await;
    assert_eq!(until(&mut one, ".").await, b"to both.");
    assert_eq!(until(&mut two, ".").await, b"to both.");
    drop(one);
    // A late reader receives what is written from then on.
    let mut three = bench.console.connect().await.unwrap();
    bench.say(b"to the rest.").await;
    assert_eq!(until(&mut two, ".").await, b"to the rest.");
    assert_eq!(until(&mut three, ".").await, b"to the rest.");
    let mut client: BoxedStream =
        Box::new(UnixStream::connect(bench.dir.path().join("console")).await.unwrap());
    for (stream, text) in [(&mut two, "by two"), (&mut three, "by three"), (&mut client, "by a client")] {
        stream.write_all(text.as_bytes()).await.unwrap();
        let mut typed = vec![0; text.len()];
        bench.guest.read_exact(&mut typed).await.unwrap();
        assert_eq!(typed, text.as_bytes());
    }
    // They are connected by now.
    bench.say(b"bye.").await;
    assert_eq!(until(&mut client, ".").await, b"bye.");
    let (_dir, _console) = bench.end().await;
    let mut rest = Vec::new();
    two.read_to_end(&mut rest).await.unwrap();
    assert_eq!(rest, b"bye.");
}

#[tokio::test]
async fn a_guest_that_takes_no_input_blocks_no_reader() {
    let mut bench = Bench::new(LIMIT).await;
    let mut stream = bench.console.connect().await.unwrap();
    let flood = vec![b'k'; 4 << 20];
    let (mut reader, mut writer) = tokio::io::split(stream);
    let typing = tokio::spawn(async move { writer.write_all(&flood).await });
    bench.say(b"still here").await;
    let mut received = [0; 10];
    reader.read_exact(&mut received).await.unwrap();
    assert_eq!(&received, b"still here");
    typing.abort();
    stream = bench.console.connect().await.unwrap();
    bench.say(b"!").await;
    assert_eq!(stream.read_u8().await.unwrap(), b'!');
}

#[tokio::test]
async fn a_released_console_is_free_for_any_client() {
    let mut bench = Bench::new(LIMIT).await;
    let mut reader = bench.console.connect().await.unwrap();
    bench.say(b"before.").await;
    assert_eq!(until(&mut reader, ".").await, b"before.");
    bench.console.release();
    assert!(!bench.dir.path().join("console").exists());
    // Existing readers continue to read.
    bench.say(b"after.").await;
    assert_eq!(until(&mut reader, ".").await, b"after.");
    drop(reader);
    // The recorder disconnects, so that QEMU serves the next client.
    assert_eq!(bench.guest.read(&mut [0; 1]).await.unwrap(), 0);
    bench.console.finished().await;
    let (next, accepted) = tokio::join!(bench.console.connect(), bench.listener.accept());
    accepted.unwrap().0.write_all(b"hello").await.unwrap();
    let mut received = Vec::new();
    next.unwrap().read_to_end(&mut received).await.unwrap();
    assert_eq!(received, b"hello");
    assert_eq!(bench.console.tail(100), b"before.after.");
}

#[tokio::test]
async fn a_console_works_without_a_record_that_cannot_be_written() {
    let mut bench = Bench::new(LIMIT).await;
    let mut reader = bench.console.connect().await.unwrap();
    // Neither renamed nor recreated in a directory that is gone.
    std::fs::remove_dir_all(bench.dir.path()).unwrap();
    bench.say(&vec![b'x'; 3 * LIMIT]).await;
    bench.say(b"the end.").await;
    until(&mut reader, "the end.").await;
    assert!(bench.console.tail(LIMIT).ends_with(b"the end."));
}

#[tokio::test]
async fn dropping_a_console_disconnects_its_readers() {
    let mut bench = Bench::new(LIMIT).await;
    let mut reader = bench.console.connect().await.unwrap();
    drop(bench.console);
    assert_eq!(bench.guest.read(&mut [0; 1]).await.unwrap(), 0);
    let mut rest = Vec::new();
    reader.read_to_end(&mut rest).await.unwrap();
    assert!(rest.is_empty());
}
