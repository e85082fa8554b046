//! The serial console of a running machine: recorded within bounds, and shared by any number of readers and writers.
//!
//! KubeVirt serves one client of a console at a time, and what the guest writes while none is connected is lost. So the hub is that
//! one client from the start of the machine to its end. It connects again when the connection breaks, for example because the API
//! server restarts; what the guest wrote meanwhile is missing from the record.
//!
//! - **A guest that writes without end** costs [`KEPT`] bytes of memory.
//! - **A reader that does not read** loses the oldest bytes. Neither the guest nor another reader waits for it.
//! - **Another client** that connects to the console, such as `virtctl console`, takes it over until the hub connects again.

#[cfg(test)]
mod tests;

use super::{Connect, backoff::Backoff};
use bytes::Bytes;
use rudder_core::{
    Error, ErrorKind, Result,
    backend::{BoxedStream, SerialLog, SerialRecord},
};
use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, DuplexStream, ReadBuf},
    sync::{mpsc, watch},
    time::{Instant, sleep, timeout},
};
use tokio_util::{
    sync::{CancellationToken, DropGuard},
    task::AbortOnDropHandle,
};

/// Number of bytes at the end of a serial console that are kept.
const KEPT: usize = 256 << 10;
/// Number of bytes that are copied at once.
const CHUNK: usize = 16 << 10;
/// Number of pieces of input that wait for the guest. Beyond that, those who write wait.
const INPUT: usize = 16;
/// How long a reader waits until the console is connected.
const CONNECT_LIMIT: Duration = Duration::from_secs(15);
/// How long a console may stay open after the machine has ended, to deliver the last output.
const DRAIN_LIMIT: Duration = Duration::from_secs(1);

/// The serial console of one run of a machine. Dropping it closes everything.
#[derive(Debug)]
pub(crate) struct SerialHub {
    shared: Arc<Shared>,
    ended: CancellationToken,
    _task: AbortOnDropHandle<()>,
}

/// What the task and the readers share.
#[derive(Debug)]
struct Shared {
    output: SerialRecord,
    input: mpsc::Sender<Bytes>,
    link: watch::Sender<Link>,
}

/// The state of the only connection.
#[derive(Debug, Clone)]
enum Link {
    /// Not yet, or not any more; it is being opened.
    Opening,
    Open,
    /// The machine has ended, or the connection was given up for this reason.
    Over(Option<Arc<Error>>),
}

impl SerialHub {
    /// Starts to record the console of a machine that is running.
    pub(crate) fn start(connect: Connect) -> Self {
        Self::with_limit(connect, KEPT)
    }

    fn with_limit(connect: Connect, kept: usize) -> Self {
        let (input, typed) = mpsc::channel(INPUT);
        let link = watch::Sender::new(Link::Opening);
        let shared = Arc::new(Shared { output: SerialRecord::new(kept), input, link });
        let ended = CancellationToken::new();
        // Created here, and not in the task: a task that is aborted before it starts would not close the record.
        let recording = Recording(Arc::clone(&shared));
        let task = tokio::spawn(run(recording, connect, typed, ended.clone()));
        Self { shared, ended, _task: AbortOnDropHandle::new(task) }
    }

    /// Connects a reader, which receives what the guest writes from now on, and whose input reaches the guest. The stream ends with
    /// the machine.
    ///
    /// # Errors
    /// `Conflict` when the machine has ended; `GuestUnreachable` when the console is not connected and cannot be connected soon.
    pub(crate) async fn connect(&self) -> Result<BoxedStream> {
        let mut link = self.shared.link.subscribe();
        let settled = link.wait_for(|link| !matches!(link, Link::Opening));
        match timeout(CONNECT_LIMIT, settled).await.map(|settled| settled.map(|link| link.clone())) {
            Ok(Ok(Link::Open)) => Ok(Box::new(self.shared.attach())),
            Ok(Ok(Link::Over(Some(error)))) => {
                let lost =
                    Error::new(ErrorKind::GuestUnreachable, "the connection to the serial console was lost");
                Err(lost.with_source(error))
            }
            Ok(Ok(Link::Over(None))) | Ok(Err(_)) => {
                Err(Error::new(ErrorKind::Conflict, "expected a running machine, but it has ended"))
            }
            Ok(Ok(Link::Opening)) | Err(_) => {
                let limit = CONNECT_LIMIT.as_secs();
                let message =
                    format!("expected a connection to the serial console within {limit} s, but found none");
                Err(Error::new(ErrorKind::GuestUnreachable, message))
            }
        }
    }

    /// Returns what the guest wrote since it was powered on, starting at a position, as
    /// [`Machine::serial_log`](rudder_core::backend::Machine::serial_log) promises.
    pub(crate) fn log(&self, from: u64) -> SerialLog {
        self.shared.output.log(from)
    }

    /// Says that the machine has ended: what is still on its way is read, and the connection is not opened again.
    pub(crate) fn end(&self) {
        self.ended.cancel();
    }

    /// Waits until everything that will be recorded is recorded.
    #[cfg(test)]
    async fn finished(&self) {
        self.shared.output.closed().await;
    }
}

impl Shared {
    fn attach(self: &Arc<Self>) -> Attached {
        let (near, far) = tokio::io::duplex(CHUNK);
        let detached = CancellationToken::new();
        // Created here, and not in the task, so that nothing written from now on is missed.
        let (shared, log) = (Arc::clone(self), self.output.log(self.output.end()));
        let guard = detached.clone().drop_guard();
        tokio::spawn(serve_reader(shared, far, log, detached));
        Attached { stream: near, _guard: guard }
    }
}

/// Closes the record when recording ends, however it ends.
struct Recording(Arc<Shared>);

impl Drop for Recording {
    fn drop(&mut self) {
        self.0.link.send_if_modified(|link| {
            let is_open = !matches!(link, Link::Over(_));
            if is_open {
                *link = Link::Over(None);
            }
            is_open
        });
        self.0.output.close();
    }
}

/// Records until the machine has ended or its console cannot be reached for too long.
async fn run(
    recording: Recording,
    connect: Connect,
    mut typed: mpsc::Receiver<Bytes>,
    ended: CancellationToken,
) {
    let shared = &recording.0;
    let mut backoff = Backoff::new();
    loop {
        let opened = tokio::select! {
            opened = connect() => opened,
            () = ended.cancelled() => return,
        };
        let delay = match opened {
            Ok(stream) => {
                shared.link.send_replace(Link::Open);
                let began = Instant::now();
                tokio::select! {
                    () = exchange(stream, &shared.output, &mut typed) => {}
                    () = async { ended.cancelled().await; sleep(DRAIN_LIMIT).await } => {}
                }
                if ended.is_cancelled() {
                    return;
                }
                shared.link.send_replace(Link::Opening);
                let delay = backoff.after_connection(began.elapsed());
                tracing::debug!(?delay, "the serial console was disconnected");
                delay
            }
            Err(error) => match backoff.after_failure() {
                Some(delay) => {
                    tracing::debug!(%error, ?delay, "cannot connect to a serial console yet");
                    delay
                }
                None => {
                    tracing::warn!(%error, "a serial console is no longer recorded");
                    shared.link.send_replace(Link::Over(Some(Arc::new(error))));
                    return;
                }
            },
        };
        tokio::select! {
            () = sleep(delay) => {}
            () = ended.cancelled() => return,
        }
    }
}

/// Records and types until the connection ends. Input that is being sent when it breaks is lost rather than sent twice.
async fn exchange(stream: BoxedStream, output: &SerialRecord, typed: &mut mpsc::Receiver<Bytes>) {
    let (mut reader, mut writer) = tokio::io::split(stream);
    let recording = async {
        let mut chunk = vec![0; CHUNK];
        while let Ok(count @ 1..) = reader.read(&mut chunk).await {
            output.write(&chunk[..count]);
        }
    };
    let typing = async {
        while let Some(bytes) = typed.recv().await {
            // A guest that does not take its input blocks writers, but no reader.
            if writer.write_all(&bytes).await.is_err() {
                break;
            }
        }
        // What was received before the connection broke is still recorded.
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = recording => {}
        () = typing => {}
    }
}

/// Copies output to a reader and its input to the guest, until all output was delivered, or the reader has hung up and all its
/// input was passed on.
async fn serve_reader(
    shared: Arc<Shared>,
    far: DuplexStream,
    mut log: SerialLog,
    detached: CancellationToken,
) {
    let (mut input, mut output) = tokio::io::split(far);
    let typing = async {
        let mut chunk = vec![0; CHUNK];
        while let Ok(count @ 1..) = input.read(&mut chunk).await {
            if shared.input.send(Bytes::copy_from_slice(&chunk[..count])).await.is_err() {
                break;
            }
        }
        // A reader that has sent all its input may continue to read.
        detached.cancelled().await;
    };
    let delivering = async {
        match tokio::io::copy(&mut log.stream, &mut output).await {
            Ok(_) => output.shutdown().await.unwrap_or_default(),
            // The reader has hung up, but some of its input may be on its way.
            Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        () = delivering => {}
        () = typing => {}
    }
}

/// A reader's end of a console. Dropping it disconnects, also while nothing is written.
struct Attached {
    stream: DuplexStream,
    _guard: DropGuard,
}

impl AsyncRead for Attached {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Attached {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
