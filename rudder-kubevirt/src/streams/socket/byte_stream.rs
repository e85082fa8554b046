//! A web socket of KubeVirt as a stream of bytes.
//!
//! # Keeping the connection alive
//! KubeVirt pings the client of a port every second and closes the connection after a minute without a pong. It also closes it
//! when a ping cannot be written for a minute, because the client reads nothing and all buffers are full. A client that answers
//! pings only while it is read would lose its connection whenever its reader pauses. So a task owns the socket, and
//!
//! - sends a pong every [`HEARTBEAT`], asked for or not (RFC 6455, 5.5.3). This also keeps proxies from closing connections on
//!   which nothing happens: KubeVirt does not ping clients of consoles and displays.
//! - takes one message every [`STALLED_INTERVAL`] while the reader is behind, so that the server's writes, pings among them, go on.
//!   What was taken waits in memory, at most [`STALLED_LIMIT`]. A reader that has paused for so long loses the connection to the
//!   server's limit, and no memory.
//!
//! # Closing
//! A web socket has no half-close, and KubeVirt drops both directions when one side closes. A reader whose sending half was shut
//! down still receives what the guest sends: the close is sent once nothing has arrived for [`QUIET`].

use bytes::Bytes;
use futures::{
    FutureExt as _, SinkExt as _, StreamExt as _,
    stream::{SplitSink, SplitStream},
};
use std::{
    collections::VecDeque,
    convert::Infallible,
    io,
    pin::Pin,
    sync::{Arc, OnceLock},
    task::{Context, Poll, ready},
    time::Duration,
};
use tokio::{
    io::{
        AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, DuplexStream, ReadBuf, ReadHalf,
        WriteHalf,
    },
    sync::watch,
    time::{Instant, MissedTickBehavior, interval_at, sleep, sleep_until},
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        Error as WsError, Message,
        error::ProtocolError,
        protocol::{CloseFrame, Role, WebSocketConfig, frame::coding::CloseCode},
    },
};
use tokio_util::sync::{CancellationToken, DropGuard};

/// Size of the buffers between the stream and its task, in bytes, in each direction.
const BUFFER: usize = 64 << 10;
/// Size of the largest message that is sent, in bytes.
const CHUNK: usize = 32 << 10;
/// Size of the largest message that is accepted, in bytes. KubeVirt sends at most 32 KiB.
const LARGEST_MESSAGE: usize = 1 << 20;
/// Interval between pongs that are sent without a ping.
pub(super) const HEARTBEAT: Duration = Duration::from_secs(15);
/// Interval between messages that are taken while the reader is behind.
const STALLED_INTERVAL: Duration = Duration::from_secs(5);
/// How much may wait for a reader that is behind, in bytes, before nothing more is taken.
pub(super) const STALLED_LIMIT: usize = 8 << 20;
/// How long nothing may arrive after the sending half was shut down, until the web socket is closed.
const QUIET: Duration = Duration::from_secs(1);
/// How long the server may take to answer a close, and to take what was written before the stream was dropped.
const CLOSE_LIMIT: Duration = Duration::from_secs(5);

/// A stream of bytes over a web socket. Dropping it sends what was written and closes the web socket, in the background.
#[derive(Debug)]
pub(crate) struct WebSocketByteStream {
    near: DuplexStream,
    failure: Arc<OnceLock<Failure>>,
    _dropped: DropGuard,
}

/// Why the connection broke, as an error that can be returned several times.
#[derive(Debug)]
struct Failure(io::ErrorKind, String);

impl Failure {
    fn to_error(&self) -> io::Error {
        io::Error::new(self.0, self.1.clone())
    }
}

impl WebSocketByteStream {
    /// Takes over a connection that was upgraded to a web socket.
    pub(super) async fn new<S>(upgraded: S) -> Self
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let config = WebSocketConfig::default()
            .read_buffer_size(CHUNK)
            .max_message_size(Some(LARGEST_MESSAGE))
            .max_frame_size(Some(LARGEST_MESSAGE));
        let socket = WebSocketStream::from_raw_socket(upgraded, Role::Client, Some(config)).await;
        let (near, far) = tokio::io::duplex(BUFFER);
        let (failure, dropped) = (Arc::default(), CancellationToken::new());
        tokio::spawn(drive(socket, far, Arc::clone(&failure), dropped.clone()));
        Self { near, failure, _dropped: dropped.drop_guard() }
    }
}

impl AsyncRead for WebSocketByteStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let (filled, room) = (buffer.filled().len(), buffer.remaining());
        ready!(Pin::new(&mut self.near).poll_read(context, buffer))?;
        if room > 0
            && buffer.filled().len() == filled
            && let Some(failure) = self.failure.get()
        {
            return Poll::Ready(Err(failure.to_error()));
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for WebSocketByteStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.near).poll_write(context, bytes));
        Poll::Ready(written.map_err(|error| self.failure.get().map_or(error, Failure::to_error)))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        // The task sends everything at once.
        Pin::new(&mut self.near).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.near).poll_shutdown(context)
    }
}

/// What the two directions tell each other.
struct Shared {
    /// Whether what was received waits for the reader. Notifies of every message.
    behind: watch::Sender<bool>,
    /// Cancelled once the close was sent.
    closing: CancellationToken,
    /// Cancelled when the server has had enough time to end the connection.
    abandoned: CancellationToken,
    /// Cancelled when the stream was dropped.
    dropped: CancellationToken,
}

/// Moves bytes in both directions until the server has ended the connection and everything was read, or the stream was dropped.
async fn drive<S>(
    socket: WebSocketStream<S>,
    far: DuplexStream,
    failure: Arc<OnceLock<Failure>>,
    dropped: CancellationToken,
) where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let (mut sink, mut stream) = socket.split();
    let (mut written, mut read) = tokio::io::split(far);
    let shared = Shared {
        behind: watch::Sender::new(false),
        closing: CancellationToken::new(),
        abandoned: CancellationToken::new(),
        dropped,
    };
    let linger = async {
        shared.dropped.cancelled().await;
        sleep(CLOSE_LIMIT).await;
    };
    let ended = tokio::select! {
        ended = receive(&mut stream, &mut read, &shared) => ended,
        never = send(&mut sink, &mut written, &shared) => match never {},
        () = linger => Ok(()),
    };
    // Set before the halves are dropped, which is what the reader sees as the end.
    if let Err(error) = ended {
        let _ = failure.set(error);
    }
}

/// Sends what was written, and pongs. Closes the web socket when everything was sent.
async fn send<S>(
    sink: &mut SplitSink<WebSocketStream<S>, Message>,
    written: &mut ReadHalf<DuplexStream>,
    shared: &Shared,
) -> Infallible
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let sending = async {
        let mut chunk = vec![0; CHUNK];
        let mut heartbeat = interval_at(Instant::now() + HEARTBEAT, HEARTBEAT);
        heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                count = written.read(&mut chunk) => match count {
                    Ok(count @ 1..) => sink.send(Message::binary(Bytes::copy_from_slice(&chunk[..count]))).await?,
                    Ok(0) | Err(_) => break,
                },
                _ = heartbeat.tick() => sink.send(Message::Pong(Bytes::new())).await?,
            }
        }
        quiet(shared).await;
        shared.closing.cancel();
        sink.send(Message::Close(None)).await
    };
    // An error is also received, together with what the server had sent before.
    let sent: Result<(), WsError> = sending.await;
    if let Err(error) = sent {
        tracing::debug!(%error, "cannot write to a web socket");
    }
    sleep(CLOSE_LIMIT).await;
    shared.abandoned.cancel();
    std::future::pending().await
}

/// Waits until nothing arrives any more, or nobody reads it.
async fn quiet(shared: &Shared) {
    let mut behind = shared.behind.subscribe();
    let silence = async {
        loop {
            let is_behind = *behind.borrow_and_update();
            tokio::select! {
                // The sender lives as long as this future.
                _ = behind.changed() => {}
                () = sleep(QUIET), if !is_behind => break,
            }
        }
    };
    tokio::select! {
        () = silence => {}
        () = shared.dropped.cancelled() => {}
    }
}

/// Receives messages and passes them to the reader, until the server has ended the connection and everything was read.
async fn receive<S>(
    stream: &mut SplitStream<WebSocketStream<S>>,
    read: &mut WriteHalf<DuplexStream>,
    shared: &Shared,
) -> Result<(), Failure>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut waiting = Waiting::default();
    let mut taken = Instant::now();
    let mut ended = None;
    loop {
        if waiting.pieces.is_empty()
            && let Some(ended) = ended
        {
            return ended;
        }
        let front = waiting.pieces.front().cloned().unwrap_or_default();
        let due = if waiting.pieces.is_empty() { taken } else { taken + STALLED_INTERVAL };
        let next = async {
            sleep_until(due).await;
            stream.next().await
        };
        tokio::select! {
            biased;
            count = read.write(&front), if !front.is_empty() => match count {
                Ok(count @ 1..) => waiting.advance(count),
                // The stream was dropped: the rest is read only to find the end.
                Ok(0) | Err(_) => waiting.discard(),
            },
            message = next, if ended.is_none() && waiting.length < STALLED_LIMIT => match message {
                Some(Ok(Message::Binary(bytes))) => {
                    taken = Instant::now();
                    waiting.push(bytes);
                }
                Some(Ok(Message::Close(frame))) => {
                    // Sends the answer, as far as the socket takes it now.
                    let _ = stream.next().now_or_never();
                    ended = Some(close_reason(frame));
                }
                // KubeVirt ignores text messages, and so does this.
                Some(Ok(_)) => {}
                Some(Err(_)) if shared.closing.is_cancelled() => ended = Some(Ok(())),
                Some(Err(error)) => ended = Some(end_reason(error)),
                None => ended = Some(Ok(())),
            },
            () = shared.abandoned.cancelled(), if ended.is_none() => ended = Some(Ok(())),
        }
        shared.behind.send_replace(!waiting.pieces.is_empty());
    }
}

/// What was received and not read yet.
#[derive(Debug, Default)]
struct Waiting {
    pieces: VecDeque<Bytes>,
    length: usize,
    discards: bool,
}

impl Waiting {
    fn push(&mut self, bytes: Bytes) {
        if !bytes.is_empty() && !self.discards {
            self.length += bytes.len();
            self.pieces.push_back(bytes);
        }
    }

    /// Removes bytes from the front piece.
    fn advance(&mut self, count: usize) {
        self.length -= count;
        if let Some(front) = self.pieces.front_mut() {
            let _ = front.split_to(count);
            if front.is_empty() {
                self.pieces.pop_front();
            }
        }
    }

    fn discard(&mut self) {
        *self = Self { discards: true, ..Self::default() };
    }
}

/// Returns what a close of the server means: the end, or an error that says why.
fn close_reason(frame: Option<CloseFrame>) -> Result<(), Failure> {
    match frame {
        Some(CloseFrame { code, reason })
            if !matches!(code, CloseCode::Normal | CloseCode::Away | CloseCode::Status) =>
        {
            let message = format!("the server closed the web socket with code {code}: {reason}");
            Err(Failure(io::ErrorKind::ConnectionAborted, message))
        }
        _ => Ok(()),
    }
}

/// Returns what an error of the web socket means.
fn end_reason(error: WsError) -> Result<(), Failure> {
    match error {
        // KubeVirt ends streams by closing the connection, without the closing handshake.
        WsError::ConnectionClosed
        | WsError::AlreadyClosed
        | WsError::Protocol(ProtocolError::ResetWithoutClosingHandshake) => Ok(()),
        WsError::Io(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(()),
        WsError::Io(error) => {
            Err(Failure(error.kind(), format!("the connection to the cluster broke: {error}")))
        }
        error => Err(Failure(io::ErrorKind::InvalidData, format!("the web socket is invalid: {error}"))),
    }
}

#[cfg(test)]
mod tests;
