//! The serial console of a running machine: recorded within bounds, and shared by any number of readers and writers.
//!
//! QEMU's socket serves one client at a time and buffers nothing, and QEMU's own log of it grows for as long as the guest
//! writes. So this process is that one client: it reads what the guest writes as fast as it arrives, and keeps the end of it.
//!
//! ```text
//! guest ──▶ QEMU ──mN.serial──▶ SerialConsole ──▶ the last KEPT bytes in memory, for tails and readers
//!                                             ├─▶ mN.serial.log and mN.serial.log.0, for reading by hand and after a crash
//!                                             └─▶ mN.console: a socket on which any number of clients may read and type
//! ```
//!
//! - **A guest that writes without end** costs [`KEPT`] bytes of memory and twice as much disk space.
//! - **A reader that does not read** loses the oldest bytes. The guest never waits for it.
//! - **A dead owner**: its connection is closed, and QEMU drops what the guest writes while no client is connected.
//! - **A kept lab** is open to any client: once it is kept and the readers in this process have left, QEMU's socket is
//!   free. What the guest writes from then on reaches only the client that connects, and is not recorded.

mod record;

use self::record::Record;
use rudder_core::backend::{BoxedStream, SerialLog, SerialRecord};
use std::{
    io,
    path::PathBuf,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, ReadBuf},
    net::{UnixListener, UnixStream},
    sync::{mpsc, watch},
    task::JoinSet,
};
use tokio_util::{
    sync::{CancellationToken, DropGuard},
    task::AbortOnDropHandle,
};

/// Number of bytes at the end of a serial console that are kept.
pub const KEPT: usize = 256 << 10;
/// Number of bytes that are copied at once.
const CHUNK: usize = 16 << 10;
/// Maximum number of clients connected to the socket at a time.
const MAX_CLIENTS: usize = 16;
/// Pause after an error while accepting connections: the process may be out of file descriptors.
const ACCEPT_BACKOFF: Duration = Duration::from_secs(1);

/// The paths of a machine's serial console.
#[derive(Debug, Clone)]
pub struct SerialPaths {
    /// QEMU's socket.
    pub socket: PathBuf,
    /// The socket to create for clients on this host, which must not exist yet.
    pub client_socket: PathBuf,
    /// The file that records what the guest writes. A second file has the same name with `.0` appended. Both are newly
    /// created.
    pub record: PathBuf,
}

/// Whether the same run of the machine has been recorded before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attachment {
    /// No: the guest has not run yet.
    First,
    /// Yes, by a process that has ended or released the console. What it recorded precedes what is recorded from now on.
    Again,
}

/// The serial console of one run of a machine. Dropping it closes everything.
#[derive(Debug)]
pub struct SerialConsole {
    shared: Arc<Shared>,
    release: watch::Sender<bool>,
    /// QEMU's socket.
    socket: PathBuf,
    /// The socket for clients on this host.
    client_socket: PathBuf,
    _recorder: AbortOnDropHandle<()>,
    clients: Mutex<Option<AbortOnDropHandle<()>>>,
}

/// What the tasks and readers of a console share.
#[derive(Debug)]
struct Shared {
    output: SerialRecord,
    input: mpsc::Sender<Vec<u8>>,
}

impl Shared {
    /// Connects a reader, which receives what is written from now on.
    fn connect(self: &Arc<Self>) -> Attached {
        let (near, far) = tokio::io::duplex(CHUNK);
        let disconnect = CancellationToken::new();
        // Created here, and not in the task, so that nothing written from now on is missed.
        let (shared, log) = (Arc::clone(self), self.output.log(self.output.end()));
        let disconnected = disconnect.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = disconnected.cancelled() => {}
                // A reader that disconnects is not an error.
                _ = copy_both(shared, far, log) => {}
            }
        });
        Attached { stream: near, _disconnect: disconnect.drop_guard() }
    }
}

impl SerialConsole {
    /// Connects to the socket of a machine, and starts to record.
    ///
    /// # Errors
    /// QEMU cannot be reached, or a file or socket cannot be created.
    pub async fn attach(paths: SerialPaths, attachment: Attachment) -> io::Result<Self> {
        Self::with_limit(paths, attachment, KEPT).await
    }

    async fn with_limit(paths: SerialPaths, attachment: Attachment, kept: usize) -> io::Result<Self> {
        let earlier = match attachment {
            Attachment::First => Vec::new(),
            Attachment::Again => {
                record::remove(&paths.client_socket).await?;
                Record::read(&paths.record).await?
            }
        };
        let mut record = Record::create(paths.record, kept as u64).await?;
        record.append(&earlier).await;
        let stream = UnixStream::connect(&paths.socket).await?;
        let listener = UnixListener::bind(&paths.client_socket)?;
        let (input, keys) = mpsc::channel(16);
        let shared = Arc::new(Shared { output: SerialRecord::new(kept), input });
        shared.output.write(&earlier);
        let (release, released) = watch::channel(false);
        // Created here, and not in the task: a task that is aborted before it starts would not close the record.
        let recording = Recording(Arc::clone(&shared));
        let recorder = tokio::spawn(run(recording, stream, record, keys, released));
        let clients = tokio::spawn(serve_clients(Arc::clone(&shared), listener));
        Ok(Self {
            shared,
            release,
            socket: paths.socket,
            client_socket: paths.client_socket,
            _recorder: AbortOnDropHandle::new(recorder),
            clients: Mutex::new(Some(AbortOnDropHandle::new(clients))),
        })
    }

    /// Connects a reader, which receives what the guest writes from now on, and whose input reaches the guest. The stream ends with
    /// the machine.
    ///
    /// # Errors
    /// This process has released the console and QEMU cannot be reached.
    pub async fn connect(&self) -> io::Result<BoxedStream> {
        if self.is_released() && self.shared.output.is_closed() {
            return Ok(Box::new(UnixStream::connect(&self.socket).await?));
        }
        Ok(Box::new(self.shared.connect()))
    }

    /// Returns what the guest wrote since it was powered on, starting at a position, as
    /// [`Machine::serial_log`](rudder_core::backend::Machine::serial_log) promises.
    #[must_use]
    pub fn log(&self, from: u64) -> SerialLog {
        self.shared.output.log(from)
    }

    /// Returns at most the last `limit` bytes that the guest wrote.
    #[must_use]
    pub fn tail(&self, limit: usize) -> Vec<u8> {
        self.shared.output.tail(limit)
    }

    /// Waits until everything that the guest wrote before its end is recorded.
    pub async fn finished(&self) {
        self.shared.output.closed().await;
    }

    /// Returns whether [`release`](Self::release) was called.
    #[must_use]
    pub fn is_released(&self) -> bool {
        *self.release.borrow()
    }

    /// Frees QEMU's socket for others as soon as this process has no readers.
    pub fn release(&self) {
        if let Some(clients) = self.clients.lock().unwrap_or_else(PoisonError::into_inner).take() {
            drop(clients);
            // Nothing listens there any more; the lab may already be removed.
            let _ = std::fs::remove_file(&self.client_socket);
        }
        self.release.send_replace(true);
    }
}

/// Closes the record when recording ends, however it ends.
struct Recording(Arc<Shared>);

impl Drop for Recording {
    fn drop(&mut self) {
        self.0.output.close();
    }
}

/// Records until QEMU disconnects, or the console was released and has no readers.
async fn run(
    recording: Recording,
    stream: UnixStream,
    mut record: Record,
    mut keys: mpsc::Receiver<Vec<u8>>,
    mut released: watch::Receiver<bool>,
) {
    let shared = &recording.0;
    let (mut reader, mut writer) = stream.into_split();
    let recording = async {
        let mut chunk = vec![0; CHUNK];
        while let Ok(count @ 1..) = reader.read(&mut chunk).await {
            shared.output.write(&chunk[..count]);
            record.append(&chunk[..count]).await;
        }
    };
    let typing = async {
        while let Some(bytes) = keys.recv().await {
            // A guest that does not take its input blocks writers, but no reader.
            if writer.write_all(&bytes).await.is_err() {
                break;
            }
        }
        std::future::pending::<()>().await;
    };
    let released = async {
        // The value does not change any more once the sender is dropped.
        if released.wait_for(|released| *released).await.is_err() {
            std::future::pending::<()>().await;
        }
        shared.output.unread().await;
    };
    tokio::select! {
        () = recording => {}
        () = typing => {}
        () = released => {}
    }
}

/// Copies output and input, until the output has ended and all of it was delivered.
async fn copy_both(shared: Arc<Shared>, far: DuplexStream, mut log: SerialLog) -> io::Result<()> {
    let (mut input, mut output) = tokio::io::split(far);
    let typing = async {
        let mut chunk = vec![0; CHUNK];
        // A reader that has sent all its input may continue to read.
        while let Ok(count @ 1..) = input.read(&mut chunk).await {
            if shared.input.send(chunk[..count].to_vec()).await.is_err() {
                break;
            }
        }
        std::future::pending::<io::Result<()>>().await
    };
    let writing = async {
        tokio::io::copy(&mut log.stream, &mut output).await?;
        output.shutdown().await
    };
    tokio::select! {
        ended = writing => ended,
        ended = typing => ended,
    }
}

/// Lets clients on this host read and write, for example with `nc -U`.
async fn serve_clients(shared: Arc<Shared>, listener: UnixListener) {
    let mut clients = JoinSet::new();
    loop {
        while clients.len() >= MAX_CLIENTS {
            clients.join_next().await;
        }
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((mut client, _)) => {
                    let mut console = shared.connect();
                    clients.spawn(async move {
                        // A client that disconnects is not an error.
                        let _ = tokio::io::copy_bidirectional(&mut client, &mut console).await;
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection to a serial console");
                    tokio::time::sleep(ACCEPT_BACKOFF).await;
                }
            },
            Some(_) = clients.join_next(), if !clients.is_empty() => {}
        }
    }
}

/// A reader's end of a console. Dropping it disconnects.
struct Attached {
    stream: DuplexStream,
    _disconnect: DropGuard,
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

#[cfg(test)]
mod tests;
