//! The display of a running machine, shared by any number of viewers.
//!
//! KubeVirt serves one client of a display at a time, and a second one evicts the first. So the hub is that one client while there
//! are viewers. It keeps a copy of the screen, and serves each viewer as an RFB server of its own:
//!
//! ```text
//! viewer ─┐  raw or ZRLE                            ZRLE
//! viewer ─┼─ viewer::serve ──▶ session::Session ──────▶ KubeVirt ──▶ QEMU
//! viewer ─┘    what changed      the screen, input
//! ```

mod held;
mod messages;
mod pixels;
mod screen;
mod session;
#[cfg(test)]
mod tests;
mod viewer;

use super::Connect;
use rudder_core::{Error, ErrorKind, Result, backend::BoxedStream};
use session::{Session, Shared};
use std::{
    fmt,
    sync::{Arc, PoisonError, Weak},
    time::Duration,
};
use tokio::{sync::Mutex, time::timeout};
use tokio_util::sync::CancellationToken;

/// Size of the buffer between a viewer and its server, in bytes, in each direction.
const BUFFER: usize = 64 << 10;
/// How long the display may take to draw its screen for a screenshot.
const DRAW_LIMIT: Duration = Duration::from_secs(30);

/// The display of one run of a machine. Dropping it disconnects no viewer.
pub(crate) struct DisplayHub {
    connect: Connect,
    session: Mutex<Weak<Session>>,
    /// The screen of the last session, for screenshots of a machine that has ended.
    last: std::sync::Mutex<Option<Arc<Shared>>>,
    ended: CancellationToken,
}

impl DisplayHub {
    /// Returns a display that is not connected yet.
    pub(crate) fn new(connect: Connect) -> Self {
        Self {
            connect,
            session: Mutex::default(),
            last: std::sync::Mutex::default(),
            ended: CancellationToken::new(),
        }
    }

    /// Connects a viewer, which speaks RFB (RFC 6143) without authentication.
    ///
    /// # Errors
    /// `Conflict` when the machine has ended; the errors of the connection when there is none yet and none can be made.
    pub(crate) async fn connect(&self) -> Result<BoxedStream> {
        let session = self.session().await?;
        let (near, far) = tokio::io::duplex(BUFFER);
        tokio::spawn(async move {
            if let Err(error) = viewer::serve(far, session).await {
                tracing::debug!(%error, "a viewer was disconnected");
            }
        });
        Ok(Box::new(near))
    }

    /// Takes a screenshot, as PNG. For a machine that has ended, returns what its screen showed when it was last connected.
    ///
    /// # Errors
    /// `Conflict` when the machine has ended and its screen was never connected; `TimedOut` when the screen is not drawn; otherwise
    /// those of [`connect`](Self::connect).
    pub(crate) async fn screenshot(&self) -> Result<Vec<u8>> {
        let session = self.session().await;
        if let Ok(session) = &session {
            let mut state = session.shared().state();
            let drawn = state.wait_for(|state| state.drawn || state.ended);
            if timeout(DRAW_LIMIT, drawn).await.is_err() {
                let message =
                    format!("expected the display to draw its screen within {} s", DRAW_LIMIT.as_secs());
                return Err(Error::new(ErrorKind::TimedOut, message));
            }
        }
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner).clone();
        match (session, last) {
            (Err(error), _) if !self.ended.is_cancelled() => Err(error),
            (_, Some(shared)) if shared.state().borrow().drawn => {
                // Copied, so that the screen is not locked while it is compressed.
                let frame = shared.screen().frame().clone();
                frame.to_png()
            }
            (Err(error), _) => Err(error),
            (Ok(_), _) => Err(Error::new(
                ErrorKind::Protocol,
                "the connection to the display broke before its screen was drawn",
            )),
        }
    }

    /// Says that the machine has ended: its viewers are disconnected, and the connection is not opened again.
    pub(crate) fn end(&self) {
        self.ended.cancel();
    }

    /// Returns the working session, or opens a new one. Several viewers at once share the attempt.
    async fn session(&self) -> Result<Arc<Session>> {
        let mut slot = self.session.lock().await;
        if self.ended.is_cancelled() {
            return Err(Error::new(ErrorKind::Conflict, "expected a running machine, but it has ended"));
        }
        if let Some(session) = slot.upgrade().filter(|session| !session.is_over()) {
            return Ok(session);
        }
        let session = Session::open(Arc::clone(&self.connect), self.ended.clone()).await?;
        *slot = Arc::downgrade(&session);
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(session.shared()));
        Ok(session)
    }
}

impl fmt::Debug for DisplayHub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DisplayHub").field("ended", &self.ended.is_cancelled()).finish_non_exhaustive()
    }
}
