//! Access to a machine's screen, keyboard and serial console.
//!
//! Everything here needs only [`Machine::display`] and [`Machine::serial_log`], so it works with every backend.
//!
//! # Example
//! ```no_run
//! # use rudder_core::{backend::Machine, console::Console, keys};
//! # use std::{error::Error, sync::Arc, time::Duration};
//! # async fn log_in(machine: Arc<dyn Machine>) -> Result<(), Box<dyn Error>> {
//! let console = Console::new(machine);
//! console.wait_text("login:", Duration::from_secs(60)).await?;
//! console.type_text("root\n").await?;
//! console.press(keys::named_key("f2").ok_or("no such key")?).await?;
//! std::fs::write("screen.png", console.screenshot().await?)?;
//! # Ok(())
//! # }
//! ```

mod echo;
mod framebuffer;
mod keyboard;
mod link;
pub mod rfb;
mod scancode;
mod screenshot;
mod serial;
pub mod text;
mod viewer;

pub use framebuffer::Framebuffer;
pub use viewer::Viewer;

use crate::{
    Error, ErrorKind, Result,
    backend::{DisplayEncoding, Machine},
};
use link::Link;
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use text::ScreenText;
use tokio::{
    sync::Mutex,
    time::{Instant, sleep, timeout_at},
};

/// Pauses between attempts to connect; after the last one, connecting fails.
const PAUSES: [Duration; 6] = [
    Duration::from_millis(20),
    Duration::from_millis(80),
    Duration::from_millis(200),
    Duration::from_millis(500),
    Duration::from_secs(1),
    Duration::from_secs(1),
];

/// The screen, keyboard and serial console of a machine.
///
/// It connects to the display when first used, keeps its copy of the screen current from then on, and connects again
/// when the connection breaks. Keys that are held are released when it is dropped, and after every error of the
/// keyboard.
#[derive(Debug)]
pub struct Console {
    machine: Arc<dyn Machine>,
    encoding: DisplayEncoding,
    link: Mutex<Option<Arc<Link>>>,
    links: AtomicU64,
    keyboard: Mutex<keyboard::Keyboard>,
    serial: Mutex<serial::SerialLine>,
}

impl Console {
    /// Returns a console that is not connected yet.
    #[must_use]
    pub fn new(machine: Arc<dyn Machine>) -> Self {
        Self {
            encoding: machine.display_encoding(),
            machine,
            link: Mutex::default(),
            links: AtomicU64::new(0),
            keyboard: Mutex::default(),
            serial: Mutex::default(),
        }
    }

    /// Prefers this encoding of pixels. The default is [`Machine::display_encoding`].
    #[must_use]
    pub fn encoding(mut self, encoding: DisplayEncoding) -> Self {
        self.encoding = encoding;
        self
    }

    /// Returns what the screen shows, as pixels.
    ///
    /// # Errors
    /// If there is no connection to the display and none can be made: the error of [`Machine::display`], `Protocol`
    /// when the display violates RFB, `Authentication` when it requires a password, `TimedOut` when it does not answer.
    pub async fn framebuffer(&self) -> Result<Framebuffer> {
        Ok(self.link().await?.frame())
    }

    /// Returns what the screen shows, read as text. See [`text`] for what can be read.
    ///
    /// # Errors
    /// The same errors as [`framebuffer`](Self::framebuffer).
    pub async fn text(&self) -> Result<ScreenText> {
        let link = self.link().await?;
        Ok(link.with_frame(text::read))
    }

    /// Waits until the screen shows a text. Returns what it then shows.
    ///
    /// # Errors
    /// `TimedOut` after the limit, with the screen as text; otherwise those of [`framebuffer`](Self::framebuffer).
    pub async fn wait_text(&self, text: &str, limit: Duration) -> Result<ScreenText> {
        crate::runtime::check()?;
        let deadline = Instant::now() + limit;
        let mut shown: Option<ScreenText> = None;
        let mut seen = None;
        loop {
            let Ok(link) = timeout_at(deadline, self.link()).await else { break };
            let link = link?;
            let mut progress = link.progress();
            // A new connection counts from zero.
            let changes = (link.number(), progress.borrow_and_update().changes);
            if seen.replace(changes) != Some(changes) {
                let screen = link.with_frame(text::read);
                if screen.contains(text) {
                    return Ok(screen);
                }
                shown = Some(screen);
            }
            // A link that is gone has already reported its end, and the next round connects again.
            if timeout_at(deadline, progress.changed()).await.is_err() {
                break;
            }
        }
        let shown = match shown.map(|screen| screen.to_string()) {
            Some(screen) if !screen.trim().is_empty() => format!("it shows:\n{}", screen.trim_end()),
            Some(_) => "it shows no text that can be read".to_owned(),
            None => "it could not be read".to_owned(),
        };
        let message =
            format!("expected {text:?} on the screen within {} s, but {shown}", limit.as_secs_f32());
        Err(Error::new(ErrorKind::TimedOut, message))
    }

    /// Takes a screenshot, as PNG.
    ///
    /// # Errors
    /// The same errors as [`framebuffer`](Self::framebuffer).
    pub async fn screenshot(&self) -> Result<Vec<u8>> {
        self.framebuffer().await?.to_png()
    }

    /// Returns the working connection, or makes a new one.
    async fn link(&self) -> Result<Arc<Link>> {
        crate::runtime::check()?;
        let mut slot = self.link.lock().await;
        if let Some(link) = slot.as_ref().filter(|link| link.check().is_ok()) {
            return Ok(link.clone());
        }
        *slot = None;
        let mut pauses = PAUSES.iter();
        let link = loop {
            let number = self.links.fetch_add(1, Ordering::Relaxed);
            let opened = match self.machine.display().await {
                Ok(stream) => Link::open(stream, self.encoding, number).await,
                Err(error) => Err(error),
            };
            let again = |kind| matches!(kind, ErrorKind::Protocol | ErrorKind::Io | ErrorKind::NotFound);
            match (opened, pauses.next()) {
                (Ok(link), _) => break Arc::new(link),
                (Err(error), Some(pause)) if again(error.kind()) => {
                    tracing::debug!(machine = self.machine.name(), %error, "no display yet");
                    sleep(*pause).await;
                }
                (Err(error), _) => return Err(error.with_context("display of vm", self.machine.name())),
            }
        };
        *slot = Some(link.clone());
        Ok(link)
    }

    /// Returns the connection, if there is one that works.
    async fn living_link(&self) -> Option<Arc<Link>> {
        self.link.lock().await.clone().filter(|link| link.check().is_ok())
    }
}
