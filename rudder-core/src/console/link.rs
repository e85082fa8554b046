//! One connection to a display: a task that keeps a copy of the screen current and sends keys, and ends with the
//! connection.
//!
//! It reports exactly what happened to keys: not sent at all, handed to the connection, or unknown. A connection that
//! is dropped releases the keys that it pressed.

use super::{Framebuffer, rfb, scancode};
use crate::{
    Error, ErrorKind, Result,
    backend::{BoxedStream, DisplayEncoding},
};
use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokio::{
    io::{AsyncWrite, AsyncWriteExt as _, BufReader, ReadHalf, WriteHalf},
    sync::{mpsc, oneshot, watch},
    time::timeout,
};

/// How long a server may take for the handshake, and for its first update. Long enough for an emulated machine on a busy host.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(30);
/// How long a server may leave what is sent unread.
const SEND_LIMIT: Duration = Duration::from_secs(10);
/// How long releasing keys may delay the end of a connection.
const RELEASE_LIMIT: Duration = Duration::from_secs(1);

/// A key that is pressed or released.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct KeyEvent {
    pub(super) keysym: u32,
    pub(super) down: bool,
}

/// What happened to key events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sent {
    /// The connection has them. That says nothing yet about the server.
    Written,
    /// The connection was gone before the first was written.
    Not,
    /// The connection broke while they were being written.
    Unknown,
}

/// The progress of a connection.
#[derive(Debug, Clone, Default)]
pub(super) struct Progress {
    /// Number of updates received.
    pub(super) updates: u64,
    /// Number of updates that changed the screen.
    pub(super) changes: u64,
    /// Whether the whole screen was drawn once.
    pub(super) drawn: bool,
    /// Why the connection has ended, if it has.
    pub(super) ended: Option<Arc<Error>>,
}

#[derive(Debug)]
struct Shared {
    progress: watch::Sender<Progress>,
    frame: Mutex<Framebuffer>,
    extended_keys: AtomicBool,
}

impl Shared {
    fn frame(&self) -> MutexGuard<'_, Framebuffer> {
        self.frame.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection. When the last handle is dropped, it releases the keys that it pressed, and ends.
#[derive(Debug)]
pub(super) struct Link {
    number: u64,
    shared: Arc<Shared>,
    commands: mpsc::UnboundedSender<Command>,
}

/// What the task is asked to send.
#[derive(Debug)]
enum Command {
    Keys(Keys),
    /// Requests a pixel, whether it changed or not: the answer shows that the server has read everything sent before.
    Probe,
}

#[derive(Debug)]
struct Keys {
    events: Vec<KeyEvent>,
    done: Option<oneshot::Sender<Sent>>,
}

impl Drop for Keys {
    fn drop(&mut self) {
        // The task never took the order.
        if let Some(done) = self.done.take() {
            let _ = done.send(Sent::Not);
        }
    }
}

impl Link {
    /// Performs the handshake and waits for the first update.
    pub(super) async fn open(
        mut stream: BoxedStream,
        preferred: DisplayEncoding,
        number: u64,
    ) -> Result<Self> {
        let late = |_| {
            let limit = HANDSHAKE_LIMIT.as_secs();
            Error::new(ErrorKind::TimedOut, format!("the display did not answer within {limit} s"))
        };
        let size = timeout(HANDSHAKE_LIMIT, rfb::handshake(&mut stream)).await.map_err(late)??;
        let shared = Arc::new(Shared {
            progress: watch::Sender::default(),
            frame: Mutex::new(Framebuffer::new(size.0, size.1)),
            extended_keys: AtomicBool::new(false),
        });
        let (commands, received) = mpsc::unbounded_channel();
        tokio::spawn(serve(stream, preferred, shared.clone(), received));
        let link = Self { number, shared, commands };
        let mut progress = link.progress();
        let drawn = progress.wait_for(|progress| progress.drawn || progress.ended.is_some());
        timeout(HANDSHAKE_LIMIT, drawn).await.map_err(late)?.map_err(|_| closed())?;
        link.check()?;
        Ok(link)
    }

    /// Returns the number of this connection among those of its console.
    pub(super) fn number(&self) -> u64 {
        self.number
    }

    /// Fails with the reason if the connection has ended.
    pub(super) fn check(&self) -> Result<()> {
        match &self.shared.progress.borrow().ended {
            Some(error) => Err(repeated(error)),
            None => Ok(()),
        }
    }

    pub(super) fn progress(&self) -> watch::Receiver<Progress> {
        self.shared.progress.subscribe()
    }

    /// Returns a copy of what the screen shows now.
    pub(super) fn frame(&self) -> Framebuffer {
        self.shared.frame().clone()
    }

    /// Calls a function with what the screen shows now.
    pub(super) fn with_frame<T>(&self, inspect: impl FnOnce(&Framebuffer) -> T) -> T {
        inspect(&self.shared.frame())
    }

    /// Sends key events, each at most once.
    pub(super) async fn send(&self, events: Vec<KeyEvent>) -> Sent {
        let (done, sent) = oneshot::channel();
        // An order that cannot be handed over is dropped, and reports that itself.
        let _ = self.commands.send(Command::Keys(Keys { events, done: Some(done) }));
        match timeout(SEND_LIMIT, sent).await {
            Ok(Ok(sent)) => sent,
            Ok(Err(_)) | Err(_) => Sent::Unknown,
        }
    }

    /// Makes the server send an update.
    pub(super) fn probe(&self) {
        // If the connection is over, its end is the answer.
        let _ = self.commands.send(Command::Probe);
    }
}

fn closed() -> Error {
    rfb::mistake("the connection to the display has ended")
}

/// Wraps an error that is reported several times.
fn repeated(error: &Arc<Error>) -> Error {
    Error::new(error.kind(), error.to_string()).with_source(error.clone())
}

async fn serve(
    stream: BoxedStream,
    preferred: DisplayEncoding,
    shared: Arc<Shared>,
    commands: mpsc::UnboundedReceiver<Command>,
) {
    let (reader, writer) = tokio::io::split(stream);
    let (requests, requested) = mpsc::unbounded_channel();
    let ended = tokio::select! {
        error = read(reader, &shared, &requests) => error,
        error = write(writer, preferred, &shared, commands, requested) => error,
    };
    shared.progress.send_modify(|progress| progress.ended = Some(Arc::new(ended)));
}

/// Draws updates, and requests the next one, until the connection ends.
async fn read(
    stream: ReadHalf<BoxedStream>,
    shared: &Shared,
    requests: &mpsc::UnboundedSender<[u8; 10]>,
) -> Error {
    let mut stream = BufReader::with_capacity(64 << 10, stream);
    let mut frame = shared.frame().clone();
    let mut zrle = rfb::ZrleDecoder::default();
    let mut whole = false;
    loop {
        // Incremental requests return what has changed; after a change of size, that is everything.
        if requests.send(rfb::update_request(whole, frame.width(), frame.height())).is_err() {
            return closed();
        }
        let update = match rfb::read_update(&mut stream, &mut frame, &mut zrle).await {
            Ok(update) => update,
            Err(error) => return error,
        };
        if update.extended_keys {
            shared.extended_keys.store(true, Ordering::Relaxed);
        }
        // A change of size or an announcement may arrive on its own, before the requested update.
        let drew = !update.rows.is_empty();
        whole = !update.resized && (whole || drew);
        let changed = publish(&mut shared.frame(), &frame, &update);
        shared.progress.send_modify(|progress| {
            progress.updates += 1;
            progress.changes += u64::from(changed);
            progress.drawn |= drew;
        });
    }
}

/// Copies what an update drew to the shown screen. Returns whether anything changed.
fn publish(shown: &mut Framebuffer, drawn: &Framebuffer, update: &rfb::Update) -> bool {
    if update.resized {
        *shown = drawn.clone();
        return true;
    }
    let mut changed = false;
    for y in update.rows.clone() {
        if !shown.same_row(drawn, y) {
            shown.row_mut(y).copy_from_slice(drawn.row(y));
            changed = true;
        }
    }
    changed
}

/// Sends commands and requests, until no sender is left or the connection ends.
async fn write(
    mut stream: WriteHalf<BoxedStream>,
    preferred: DisplayEncoding,
    shared: &Shared,
    mut commands: mpsc::UnboundedReceiver<Command>,
    mut requests: mpsc::UnboundedReceiver<[u8; 10]>,
) -> Error {
    let mut pressed = Vec::new();
    if let Err(error) = put(&mut stream, &rfb::client_setup(preferred)).await {
        return error;
    }
    loop {
        let written = tokio::select! {
            biased;
            command = commands.recv() => match command {
                Some(Command::Probe) => put(&mut stream, &rfb::update_request(false, 1, 1)).await,
                Some(Command::Keys(mut keys)) => {
                    let done = keys.done.take();
                    let written = put(&mut stream, &bytes(&keys.events, shared, &mut pressed)).await;
                    if let (Some(done), Ok(())) = (done, &written) {
                        let _ = done.send(Sent::Written);
                    }
                    written
                }
                None => {
                    let events: Vec<_> = pressed.iter().rev().map(|&keysym| KeyEvent { keysym, down: false }).collect();
                    let farewell = bytes(&events, shared, &mut pressed);
                    let _ = timeout(RELEASE_LIMIT, async {
                        put(&mut stream, &farewell).await?;
                        stream.shutdown().await.map_err(|error| Error::io("end the connection to the display", error))
                    }).await;
                    return closed();
                }
            },
            Some(request) = requests.recv() => put(&mut stream, &request).await,
        };
        if let Err(error) = written {
            return error;
        }
    }
}

async fn put(stream: &mut (impl AsyncWrite + Unpin), bytes: &[u8]) -> Result<()> {
    stream.write_all(bytes).await.map_err(rfb::broken)?;
    stream.flush().await.map_err(rfb::broken)
}

/// Encodes key events, and keeps track of which keys are down.
fn bytes(events: &[KeyEvent], shared: &Shared, pressed: &mut Vec<u32>) -> Vec<u8> {
    let extended = shared.extended_keys.load(Ordering::Relaxed);
    let mut bytes = Vec::new();
    for &KeyEvent { keysym, down } in events {
        pressed.retain(|&other| other != keysym);
        if down {
            pressed.push(keysym);
        }
        match scancode::of_keysym(keysym).filter(|_| extended) {
            Some(scancode) => bytes.extend(rfb::extended_key_event(down, keysym, scancode)),
            None => bytes.extend(rfb::key_event(down, keysym)),
        }
    }
    bytes
}
