//! The only connection to a display: it keeps a copy of the screen current and passes input on, and ends with its last viewer.
//!
//! When it breaks while there are viewers, it is opened again. They see the last screen until then.

use super::{
    super::{Connect, backoff::Backoff},
    messages::Input,
    screen::Screen,
};
use rudder_core::{
    Error, ErrorKind, Result,
    backend::{BoxedStream, DisplayEncoding},
    console::{Framebuffer, rfb},
};
use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::{
    io::{AsyncWriteExt as _, BufReader, ReadHalf, WriteHalf},
    sync::{mpsc, watch},
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::{CancellationToken, DropGuard};

/// How long the display may take for the handshake.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(30);
/// How long sending the last input may delay the end of the connection.
const FAREWELL_LIMIT: Duration = Duration::from_secs(1);
/// Number of input events that wait for the display. Beyond that, viewers wait.
const INPUTS: usize = 256;

/// A connection, held by its viewers. It ends when the last of them drops it.
#[derive(Debug)]
pub(super) struct Session {
    shared: Arc<Shared>,
    input: mpsc::Sender<Input>,
    _unused: DropGuard,
}

/// What the connection and its viewers share. It outlives both, for the last screenshot.
#[derive(Debug)]
pub(super) struct Shared {
    screen: Mutex<Screen>,
    state: watch::Sender<State>,
}

/// The progress of a connection.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct State {
    /// The number of the last change of the screen.
    pub(super) change: u64,
    /// Whether the screen was drawn at all.
    pub(super) drawn: bool,
    /// Whether the display understands extended key events.
    pub(super) extended_keys: bool,
    /// Whether the connection has ended for good.
    pub(super) ended: bool,
}

impl Shared {
    /// The shown screen. Locked only while pixels are copied.
    pub(super) fn screen(&self) -> MutexGuard<'_, Screen> {
        self.screen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn state(&self) -> watch::Receiver<State> {
        self.state.subscribe()
    }

    /// Whether the display understands extended key events.
    pub(super) fn extended_keys(&self) -> bool {
        self.state.borrow().extended_keys
    }

    /// Shows what an update drew to a copy of the screen.
    fn show(&self, drawn: &Framebuffer, update: &rfb::Update) {
        let mut screen = self.screen();
        if screen.size() != (drawn.width(), drawn.height()) {
            screen.replace(drawn.clone());
        } else {
            screen.draw(drawn, update.rows.clone());
        }
        let change = screen.change();
        drop(screen);
        self.state.send_if_modified(|state| {
            let before = *state;
            // A change of size or an announcement may arrive on its own, before the requested update.
            state.change = change;
            state.drawn |= !update.rows.is_empty();
            state.extended_keys |= update.extended_keys;
            *state != before
        });
    }
}

impl Session {
    /// Connects and performs the handshake.
    ///
    /// # Errors
    /// Those of `connect`; `Protocol` when the other side is no RFB server; `TimedOut` when it does not answer.
    pub(super) async fn open(connect: Connect, ended: CancellationToken) -> Result<Arc<Self>> {
        let (stream, size) = dial(&connect).await?;
        let shared =
            Arc::new(Shared { screen: Mutex::new(Screen::new(size)), state: watch::Sender::default() });
        let (input, inputs) = mpsc::channel(INPUTS);
        let unused = CancellationToken::new();
        let guard = unused.clone().drop_guard();
        let upstream = Upstream { shared: Arc::clone(&shared), connect, inputs, unused, ended };
        tokio::spawn(upstream.run(stream, size));
        Ok(Arc::new(Self { shared, input, _unused: guard }))
    }

    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Whether the connection has ended for good.
    pub(super) fn is_over(&self) -> bool {
        self.shared.state.borrow().ended
    }

    /// Passes input on. Waits while the display takes none.
    pub(super) async fn send(&self, input: Input) {
        // A display that is gone takes no input.
        let _ = self.input.send(input).await;
    }
}

/// Connects to the display. Returns the size of its screen.
async fn dial(connect: &Connect) -> Result<(BoxedStream, (usize, usize))> {
    let mut stream = connect().await?;
    match timeout(HANDSHAKE_LIMIT, rfb::handshake(&mut stream)).await {
        Ok(size) => Ok((stream, size?)),
        Err(_) => {
            let message = format!("the display did not answer within {} s", HANDSHAKE_LIMIT.as_secs());
            Err(Error::new(ErrorKind::TimedOut, message))
        }
    }
}

/// The task of a session.
struct Upstream {
    shared: Arc<Shared>,
    connect: Connect,
    inputs: mpsc::Receiver<Input>,
    /// Cancelled when the last viewer has gone.
    unused: CancellationToken,
    /// Cancelled when the machine has ended.
    ended: CancellationToken,
}

/// Tells viewers about the end, however the task ends.
struct Ending(Arc<Shared>);

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.state.send_modify(|state| state.ended = true);
    }
}

impl Upstream {
    async fn run(mut self, mut stream: BoxedStream, mut size: (usize, usize)) {
        let _ending = Ending(Arc::clone(&self.shared));
        let mut backoff = Backoff::new();
        loop {
            let began = Instant::now();
            let ended = self.ended.clone();
            let broken = tokio::select! {
                broken = self.follow(stream, size) => broken,
                () = ended.cancelled() => return,
            };
            let Some(error) = broken else { return };
            tracing::debug!(%error, "the connection to a display broke");
            let delay = backoff.after_connection(began.elapsed());
            let Some(opened) = self.reopen(&mut backoff, delay).await else { return };
            (stream, size) = opened;
        }
    }

    /// Connects again. `None` when nobody needs that any more, or it is hopeless.
    async fn reopen(&self, backoff: &mut Backoff, first: Duration) -> Option<(BoxedStream, (usize, usize))> {
        let mut delay = first;
        let dialling = async {
            loop {
                sleep(delay).await;
                let error = match dial(&self.connect).await {
                    Ok(opened) => return Some(opened),
                    Err(error) => error,
                };
                tracing::debug!(%error, "cannot connect to a display again yet");
                // The machine is not running any more.
                if error.kind() == ErrorKind::Conflict {
                    return None;
                }
                delay = backoff.after_failure()?;
            }
        };
        tokio::select! {
            opened = dialling => opened,
            () = self.unused.cancelled() => None,
            () = self.ended.cancelled() => None,
        }
    }

    /// Keeps the screen current and passes input on. Returns why the connection broke; `None` when the last viewer has gone.
    async fn follow(&mut self, stream: BoxedStream, size: (usize, usize)) -> Option<Error> {
        let (reader, writer) = tokio::io::split(stream);
        let (requests, requested) = mpsc::unbounded_channel();
        tokio::select! {
            error = read(reader, &self.shared, size, &requests) => Some(error),
            error = write(writer, &self.shared, &mut self.inputs, requested) => error,
        }
    }
}

/// Draws updates, and requests the next one after each, until the connection ends.
async fn read(
    stream: ReadHalf<BoxedStream>,
    shared: &Shared,
    size: (usize, usize),
    requests: &mpsc::UnboundedSender<[u8; 10]>,
) -> Error {
    let mut stream = BufReader::with_capacity(64 << 10, stream);
    // After a reconnection, what is shown stays until it is drawn again.
    let shown = shared.screen().frame().clone();
    let mut frame =
        if (shown.width(), shown.height()) == size { shown } else { Framebuffer::new(size.0, size.1) };
    let mut zrle = rfb::ZrleDecoder::default();
    let mut whole = false;
    loop {
        // Incremental requests return what has changed; after a change of size, that is everything.
        if requests.send(rfb::update_request(whole, frame.width(), frame.height())).is_err() {
            return Error::new(ErrorKind::Protocol, "the connection to the display has ended");
        }
        let update = match rfb::read_update(&mut stream, &mut frame, &mut zrle).await {
            Ok(update) => update,
            Err(error) => return error,
        };
        whole = !update.resized && (whole || !update.rows.is_empty());
        shared.show(&frame, &update);
    }
}

/// Sends requests and input. Returns why the connection broke; `None` after the last viewer has gone and its input was sent.
async fn write(
    mut stream: WriteHalf<BoxedStream>,
    shared: &Shared,
    inputs: &mut mpsc::Receiver<Input>,
    mut requests: mpsc::UnboundedReceiver<[u8; 10]>,
) -> Option<Error> {
    let mut message = rfb::client_setup(DisplayEncoding::Compressed);
    loop {
        let written = async {
            stream.write_all(&message).await?;
            stream.flush().await
        };
        if let Err(error) = written.await {
            return Some(Error::io("write to the display", error));
        }
        message = tokio::select! {
            biased;
            input = inputs.recv() => match input {
                Some(input) => input.to_bytes(shared.extended_keys()),
                None => {
                    let _ = timeout(FAREWELL_LIMIT, stream.shutdown()).await;
                    return None;
                }
            },
            Some(request) = requests.recv() => request.to_vec(),
        };
    }
}
