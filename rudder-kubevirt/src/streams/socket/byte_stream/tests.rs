//! The stream of bytes against a scripted server. The clock is paused: it advances when nothing else can happen.
#![allow(clippy::unwrap_used)]

use super::*;
use proptest::prelude::*;
use std::future::poll_fn;
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::protocol::frame::{
    Frame,
    coding::{Data, OpCode},
};

type Server = WebSocketStream<DuplexStream>;

/// Size of the buffers of the connection, in bytes, in each direction.
const CONNECTION: usize = 4096;

/// Returns a stream and the server at its other end.
async fn pair() -> (WebSocketByteStream, Server) {
    let (near, far) = tokio::io::duplex(CONNECTION);
    (WebSocketByteStream::new(near).await, WebSocketStream::from_raw_socket(far, Role::Server, None).await)
}

/// Receives messages until one is not a pong.
async fn received(server: &mut Server) -> Option<Message> {
    loop {
        match server.next().await {
            Some(Ok(Message::Pong(_))) => {}
            message => return message.and_then(Result::ok),
        }
    }
}

/// Sends a message in several frames, as servers do whose buffers are small.
async fn send_in_frames(server: &mut Server, bytes: &[u8], size: usize) {
    let count = bytes.len().div_ceil(size).max(1);
    for number in 0..count {
        let piece = Bytes::copy_from_slice(
            &bytes[(number * size).min(bytes.len())..((number + 1) * size).min(bytes.len())],
        );
        let kind = if number == 0 { Data::Binary } else { Data::Continue };
        let frame = Frame::message(piece, OpCode::Data(kind), number + 1 == count);
        server.send(Message::Frame(frame)).await.unwrap();
    }
}

/// Runs a future on a clock that is paused.
fn run<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    runtime.unwrap().block_on(future)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// However bytes are divided into writes, messages and frames, they arrive complete and in order, in both directions at once.
    #[test]
    fn bytes_arrive_complete_and_in_order(
        writes in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..9000), 0..12),
        messages in prop::collection::vec((prop::collection::vec(any::<u8>(), 0..9000), 1..5000usize), 0..12),
        read_size in 1..7000usize,
    ) {
        run(async {
            let (stream, server) = pair().await;
            let (mut reader, mut writer) = tokio::io::split(stream);
            let expected: Vec<u8> = messages.iter().flat_map(|(bytes, _)| bytes).copied().collect();
            let written = writes.concat();
            let writing = async {
                for bytes in &writes {
                    writer.write_all(bytes).await.unwrap();
                }
            };
            let reading = async {
                let (mut all, mut piece) = (Vec::new(), vec![0; read_size]);
                while all.len() < expected.len() {
                    let count = reader.read(&mut piece).await.unwrap();
                    assert!(count > 0, "ended after {} bytes", all.len());
                    all.extend_from_slice(&piece[..count]);
                }
                all
            };
            let (mut sink, mut source) = server.split();
            let sending = async {
                for (bytes, frame) in &messages {
                    let count = bytes.len().div_ceil(*frame).max(1);
                    for number in 0..count {
                        let piece = bytes.chunks(*frame).nth(number).unwrap_or_default();
                        let kind = if number == 0 { Data::Binary } else { Data::Continue };
                        let piece = Bytes::copy_from_slice(piece);
                        let frame = Frame::message(piece, OpCode::Data(kind), number + 1 == count);
                        sink.send(Message::Frame(frame)).await.unwrap();
                    }
                }
            };
            let receiving = async {
                let mut all = Vec::new();
                while all.len() < written.len() {
                    if let Message::Binary(bytes) = source.next().await.unwrap().unwrap() {
                        all.extend_from_slice(&bytes);
                    }
                }
                all
            };
            let ((), read, (), received) = tokio::join!(writing, reading, sending, receiving);
            prop_assert!(read == expected, "what was read");
            prop_assert!(received == written, "what was received");
            Ok(())
        })?;
    }
}

#[tokio::test(start_paused = true)]
async fn only_binary_messages_are_data() {
    let (mut stream, mut server) = pair().await;
    for message in
        [Message::text("no"), Message::binary(Bytes::new()), Message::Ping(Bytes::from_static(b"keep alive"))]
    {
        server.send(message).await.unwrap();
    }
    send_in_frames(&mut server, b"yes", 2).await;
    let mut read = [0; 3];
    stream.read_exact(&mut read).await.unwrap();
    assert_eq!(&read, b"yes");
    let pong = server.next().await.unwrap().unwrap();
    assert_eq!(pong, Message::Pong(Bytes::from_static(b"keep alive")));
}

#[tokio::test(start_paused = true)]
async fn pongs_are_sent_while_nobody_reads_or_writes() {
    let (_stream, mut server) = pair().await;
    let began = Instant::now();
    for number in 1..=4 {
        let pong = timeout(2 * HEARTBEAT, server.next()).await.expect("a pong without a ping");
        assert!(pong.unwrap().unwrap().is_pong());
        assert_eq!(began.elapsed().as_secs(), (HEARTBEAT * number).as_secs());
    }
}

#[tokio::test(start_paused = true)]
async fn a_reader_that_pauses_delays_no_write_of_the_server_for_a_minute() {
    const MESSAGE: usize = 32 << 10;
    let (mut stream, server) = pair().await;
    let (mut sink, mut source) = server.split();
    let sent = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let count = Arc::clone(&sent);
    let flooding = tokio::spawn(async move {
        let message = Bytes::from(vec![7; MESSAGE]);
        loop {
            let began = Instant::now();
            if sink.send(Message::Binary(message.clone())).await.is_err() {
                return;
            }
            let number = count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            // Until the limit, KubeVirt could always have written its next ping in time.
            if (number + 4) * MESSAGE < STALLED_LIMIT {
                assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
            }
        }
    });
    let watching = tokio::spawn(async move {
        let mut last = Instant::now();
        while let Some(Ok(message)) = source.next().await {
            if message.is_pong() {
                assert!(last.elapsed() < Duration::from_secs(60), "{:?}", last.elapsed());
                last = Instant::now();
            }
        }
    });
    // Long after the limit: what waits in memory stays bounded.
    sleep(Duration::from_secs(6 * 60 * 60)).await;
    let taken = sent.load(std::sync::atomic::Ordering::Relaxed) * MESSAGE;
    assert!(
        (STALLED_LIMIT / 2..STALLED_LIMIT + BUFFER + CONNECTION + 2 * MESSAGE).contains(&taken),
        "{taken}"
    );
    // A reader that goes on finds everything, and the server goes on.
    let mut rest = taken + (1 << 20);
    let mut piece = vec![0; 1 << 16];
    while rest > 0 {
        let count = stream.read(&mut piece).await.unwrap();
        assert!(count > 0 && piece[..count].iter().all(|byte| *byte == 7));
        rest = rest.saturating_sub(count);
    }
    assert!(!flooding.is_finished() && !watching.is_finished());
    drop(stream);
    flooding.await.unwrap();
    watching.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_server_that_does_not_read_holds_up_the_writer() {
    let (mut stream, mut server) = pair().await;
    let mut written = 0;
    while let Ok(count) = timeout(Duration::from_secs(5), stream.write(&[1; 1000])).await {
        written += count.unwrap();
        assert!(written <= BUFFER + 2 * CHUNK + CONNECTION, "{written} bytes without backpressure");
    }
    let mut arrived = 0;
    while arrived < written {
        if let Some(Message::Binary(bytes)) = received(&mut server).await {
            arrived += bytes.len();
        }
    }
    // Now there is room again.
    stream.write_all(b"more").await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn every_end_is_an_end_or_an_error() {
    let close = |code, reason: &'static str| Message::Close(Some(CloseFrame { code, reason: reason.into() }));
    let cases = [
        (Some(Message::Close(None)), None),
        (Some(close(CloseCode::Normal, "")), None),
        (Some(close(CloseCode::Away, "restart")), None),
        // KubeVirt ends streams by closing the connection.
        (None, None),
        (Some(close(CloseCode::Error, "the node is gone")), Some("the node is gone")),
    ];
    for (message, error) in cases {
        let (mut stream, mut server) = pair().await;
        server.send(Message::binary(&b"the last words"[..])).await.unwrap();
        if let Some(message) = message {
            server.send(message).await.unwrap();
        }
        drop(server);
        let mut all = Vec::new();
        let ended = stream.read_to_end(&mut all).await;
        assert_eq!(all, b"the last words");
        match error {
            None => assert_eq!(ended.unwrap(), 14),
            Some(text) => {
                let error = ended.unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted);
                assert!(error.to_string().contains(text), "{error}");
            }
        }
        assert!(stream.write_all(b"too late").await.is_err());
        assert_eq!(stream.read(&mut [0]).await.is_err(), error.is_some(), "asked again");
    }
}

#[tokio::test(start_paused = true)]
async fn a_server_that_violates_the_protocol_is_an_error() {
    let (near, mut far) = tokio::io::duplex(64);
    let mut stream = WebSocketByteStream::new(near).await;
    // A reserved opcode.
    far.write_all(&[0x8b, 0]).await.unwrap();
    let error = stream.read(&mut [0; 8]).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{error}");
}

#[tokio::test(start_paused = true)]
async fn what_is_answered_after_a_shutdown_arrives() {
    let (mut stream, mut server) = pair().await;
    stream.write_all(b"ping").await.unwrap();
    stream.shutdown().await.unwrap();
    assert!(stream.write_all(b"x").await.is_err());
    let serving = async {
        assert_eq!(received(&mut server).await.unwrap().into_data(), Bytes::from_static(b"ping"));
        for _ in 0..4 {
            sleep(QUIET / 2).await;
            server.send(Message::binary(&b"pong"[..])).await.unwrap();
        }
        let last = Instant::now();
        assert!(received(&mut server).await.unwrap().is_close());
        assert!((QUIET..QUIET * 2).contains(&last.elapsed()), "{:?}", last.elapsed());
    };
    let mut all = Vec::new();
    let ((), read) = tokio::join!(serving, stream.read_to_end(&mut all));
    read.unwrap();
    assert_eq!(all, b"pongpongpongpong");
}

#[tokio::test(start_paused = true)]
async fn a_slow_reader_after_a_shutdown_still_gets_everything() {
    let (mut stream, mut server) = pair().await;
    stream.shutdown().await.unwrap();
    let answer = vec![5; 2 * BUFFER];
    let sending = async {
        for piece in answer.chunks(1000) {
            server.send(Message::binary(piece.to_vec())).await.unwrap();
        }
        assert!(received(&mut server).await.unwrap().is_close());
    };
    let reading = async {
        sleep(Duration::from_secs(100)).await;
        let mut all = Vec::new();
        stream.read_to_end(&mut all).await.unwrap();
        all
    };
    let ((), all) = tokio::join!(sending, reading);
    assert!(all == answer, "{} of {} bytes", all.len(), answer.len());
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_is_dropped_sends_what_was_written_and_closes() {
    let (mut stream, mut server) = pair().await;
    let bytes = vec![3; BUFFER];
    stream.write_all(&bytes).await.unwrap();
    drop(stream);
    let mut all = Vec::new();
    let closed = loop {
        match received(&mut server).await {
            Some(Message::Binary(bytes)) => all.extend_from_slice(&bytes),
            other => break other,
        }
    };
    assert!(all == bytes, "{} bytes", all.len());
    assert!(closed.unwrap().is_close());
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_is_dropped_is_left_though_the_server_hangs() {
    let (mut stream, server) = pair().await;
    // The server reads nothing, so that the close cannot be sent.
    stream.write_all(&[3; BUFFER]).await.unwrap();
    let mut far = server.into_inner();
    let began = Instant::now();
    drop(stream);
    sleep(CLOSE_LIMIT * 2).await;
    let mut rest = Vec::new();
    far.read_to_end(&mut rest).await.unwrap();
    assert!(began.elapsed() < CLOSE_LIMIT * 3, "the connection is closed");
    assert!(rest.len() <= CONNECTION, "{} bytes were buffered", rest.len());
}

#[tokio::test(start_paused = true)]
async fn a_reader_is_woken_by_what_arrives() {
    let (mut stream, mut server) = pair().await;
    let mut read = [0; 4];
    let mut buffer = ReadBuf::new(&mut read);
    let first = poll_fn(|context| Poll::Ready(Pin::new(&mut stream).poll_read(context, &mut buffer))).await;
    assert!(first.is_pending());
    server.send(Message::binary(&b"late"[..])).await.unwrap();
    poll_fn(|context| Pin::new(&mut stream).poll_read(context, &mut buffer)).await.unwrap();
    assert_eq!(buffer.filled(), b"late");
}
