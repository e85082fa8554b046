//! The screen and the keyboard of a guest: an RFB server (RFC 6143) that shows lines of text with a prompt below them,
//! and records what was typed.

use super::{Counted, script::Guest, streams};
use crate::console::{Framebuffer, rfb::ZrleEncoder, text};
use std::{
    collections::VecDeque,
    io,
    ops::{Range, RangeInclusive},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _, DuplexStream},
    sync::{mpsc, watch},
};
use tokio_util::sync::CancellationToken;

/// Cells of the screen, and their size in pixels.
const COLUMNS: usize = 80;
const ROWS: usize = 25;
const CELL: (usize, usize) = (8, 16);
/// Number of events that a keyboard queues for a slow guest, like the bytes in the queue of a PS/2 keyboard.
const QUEUE: usize = 16;

/// Keysyms of X11.
const BACKSPACE: u32 = 0xff08;
const ENTER: u32 = 0xff0d;
const SHIFTS: RangeInclusive<u32> = 0xffe1..=0xffe2;
const MODIFIERS: RangeInclusive<u32> = 0xffe3..=0xffee;

/// What was typed on the keyboard of a guest since it was powered on.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Typed {
    /// The lines that were ended by Enter.
    pub lines: Vec<String>,
    /// What was typed since the last line.
    pub prompt: String,
    /// The keys that were pressed and typed nothing, by their X11 keysyms: function keys, modifiers other than Shift,
    /// and characters while such a modifier was down.
    pub keys: Vec<u32>,
    /// The keys that are down now, by their X11 keysyms.
    pub held: Vec<u32>,
}

/// A screen and a keyboard, from power-on to power-off.
#[derive(Debug)]
pub(super) struct Terminal {
    guest: Arc<Guest>,
    state: Mutex<State>,
    changed: watch::Sender<()>,
}

#[derive(Debug, Default)]
struct State {
    screen: Vec<String>,
    typed: Typed,
    /// Events that the guest has not taken yet.
    queue: VecDeque<(bool, u32)>,
    /// Whether a task is taking them.
    taking: bool,
    /// Number of keys that were pressed.
    presses: u32,
}

impl Terminal {
    pub(super) fn new(guest: Arc<Guest>) -> Self {
        let terminal = Self { guest, state: Mutex::default(), changed: watch::Sender::new(()) };
        terminal.boot();
        terminal
    }

    /// Shows what a guest shows at boot.
    pub(super) fn boot(&self) {
        let mut state = self.state();
        state.screen = self.guest.screen.lines().map(str::to_owned).collect();
        state.typed.prompt.clear();
        drop(state);
        self.changed.send_replace(());
    }

    /// Shows lines below the existing ones.
    pub(super) fn show(&self, text: &str) {
        self.state().screen.extend(text.lines().map(str::to_owned));
        self.changed.send_replace(());
    }

    pub(super) fn typed(&self) -> Typed {
        self.state().typed.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Handles a key that went down or up. Returns whether the connection breaks now.
    fn key(self: &Arc<Self>, down: bool, keysym: u32, power: &CancellationToken) -> bool {
        let mut state = self.state();
        match self.guest.key_interval {
            Duration::ZERO => state.take(&self.guest, down, keysym),
            // Events that arrive when the queue is full are lost.
            _ if state.queue.len() >= QUEUE => {}
            interval => {
                state.queue.push_back((down, keysym));
                if !state.taking {
                    state.taking = true;
                    tokio::spawn(self.clone().process_keys(interval, power.clone()));
                }
            }
        }
        state.presses += u32::from(down);
        let breaks =
            down && self.guest.faults.display_breaks.is_some_and(|(after, _)| after == state.presses);
        drop(state);
        self.changed.send_replace(());
        breaks
    }

    async fn process_keys(self: Arc<Self>, interval: Duration, power: CancellationToken) {
        loop {
            tokio::select! {
                () = tokio::time::sleep(interval) => {}
                () = power.cancelled() => break,
            }
            let mut state = self.state();
            match state.queue.pop_front() {
                Some((down, keysym)) => state.take(&self.guest, down, keysym),
                None => {
                    state.taking = false;
                    break;
                }
            }
            drop(state);
            self.changed.send_replace(());
        }
    }

    /// Whether the display still exists.
    pub(super) fn is_there(&self) -> bool {
        let gone = |(after, stays)| stays && self.state().presses >= after;
        !self.guest.faults.display_breaks.is_some_and(gone)
    }

    fn draw(&self) -> Framebuffer {
        let mut frame = Framebuffer::new(COLUMNS * CELL.0, ROWS * CELL.1);
        let state = self.state();
        let prompt = format!("> {}", if self.guest.hides_typing { "" } else { &state.typed.prompt });
        let mut rows = Vec::new();
        for line in state.screen.iter().chain([&prompt]) {
            let cells: Vec<char> = line.chars().collect();
            rows.extend(cells.chunks(COLUMNS).map(String::from_iter));
            if cells.is_empty() {
                rows.push(String::new());
            }
        }
        let over = rows.len().saturating_sub(ROWS);
        for (row, line) in rows[over..].iter().enumerate() {
            text::draw(&mut frame, (0, row * CELL.1), line, [170; 3], [0; 3]);
        }
        frame
    }

    /// Serves one connection, until either side hangs up or the power is off.
    pub(super) fn serve(self: Arc<Self>, far: DuplexStream, power: CancellationToken, counted: Counted) {
        streams::serve(power.clone(), counted, async move { self.talk(far, &power).await });
    }

    async fn talk(self: &Arc<Self>, mut stream: DuplexStream, power: &CancellationToken) -> io::Result<()> {
        let mut changed = self.changed.subscribe();
        // Version 3.8, and no authentication.
        stream.write_all(b"RFB 003.008\n").await?;
        stream.read_exact(&mut [0; 12]).await?;
        stream.write_all(&[1, 1]).await?;
        stream.read_u8().await?;
        stream.write_all(&[0; 4]).await?;
        stream.read_u8().await?;
        let mut shown = self.draw();
        let name = b"memory";
        let size = [shown.width(), shown.height()].map(short);
        stream.write_all(&size.concat()).await?;
        stream.write_all(&FORMAT).await?;
        stream.write_u32(name.len() as u32).await?;
        stream.write_all(name).await?;
        stream.flush().await?;

        let (mut reader, mut writer) = tokio::io::split(stream);
        let (mut zrle, mut compressed) = (ZrleEncoder::default(), false);
        let (requests, mut requested) = mpsc::channel(64);
        let reading = async move {
            while let Ok(request) = read_request(&mut reader).await {
                if requests.send(request).await.is_err() {
                    break;
                }
            }
            // What arrived before the end is handled before the end.
            drop(requests);
            std::future::pending::<()>().await;
        };
        let answering = async {
            let mut asked = false;
            loop {
                let request = tokio::select! {
                    request = requested.recv() => match request {
                        Some(request) => request,
                        None => break,
                    },
                    _ = changed.changed(), if asked => Request::None,
                };
                let mut answer = Vec::new();
                match request {
                    Request::Key { down, keysym } if self.key(down, keysym, power) => break,
                    Request::Key { .. } | Request::None => {}
                    Request::Encodings { compressed: preferred } => compressed = preferred,
                    Request::Changes => asked = true,
                    Request::Everything => {
                        shown = self.draw();
                        answer = update(&shown, 0..shown.height(), compressed.then_some(&mut zrle));
                    }
                }
                if asked {
                    let now = self.draw();
                    let differs = |y: &usize| !now.same_row(&shown, *y);
                    let mut rows = (0..now.height()).filter(differs);
                    if let Some(top) = rows.next() {
                        asked = false;
                        let bottom = rows.next_back().unwrap_or(top) + 1;
                        answer.extend(update(&now, top..bottom, compressed.then_some(&mut zrle)));
                        shown = now;
                    }
                }
                // A client that no longer reads may have sent something before.
                let _ = writer.write_all(&answer).await;
            }
        };
        tokio::select! {
            () = answering => {}
            () = reading => {}
        }
        Ok(())
    }
}

impl State {
    /// Takes an event of the keyboard.
    fn take(&mut self, guest: &Guest, down: bool, keysym: u32) {
        let typed = &mut self.typed;
        typed.held.retain(|held| *held != keysym);
        if !down {
            return;
        }
        let commands = typed.held.iter().any(|held| MODIFIERS.contains(held));
        typed.held.push(keysym);
        match char::from_u32(keysym).filter(|_| (0x20..0x100).contains(&keysym) && !commands) {
            Some(character) => typed.prompt.push(character),
            None if keysym == ENTER => {
                let line = std::mem::take(&mut typed.prompt);
                self.screen.push(format!("> {}", if guest.hides_typing { "" } else { &line }));
                let answer = guest.answers.iter().find(|(to, _)| *to == line);
                self.screen.extend(answer.iter().flat_map(|(_, answer)| answer.lines()).map(str::to_owned));
                typed.lines.push(line);
            }
            None if keysym == BACKSPACE => {
                typed.prompt.pop();
            }
            None if SHIFTS.contains(&keysym) => {}
            None => typed.keys.push(keysym),
        }
    }
}

/// The pixel format (7.4): 32 bits, blue in the lowest byte.
const FORMAT: [u8; 16] = [32, 24, 0, 1, 0, 255, 0, 255, 0, 255, 16, 8, 0, 0, 0, 0];

/// Encodings of rectangles (7.7).
const RAW: i32 = 0;
const ZRLE: i32 = 16;

/// The client messages (7.5) that matter here.
enum Request {
    Key {
        down: bool,
        keysym: u32,
    },
    /// Whether ZRLE is preferred to raw pixels.
    Encodings {
        compressed: bool,
    },
    Changes,
    Everything,
    None,
}

async fn read_request(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Request> {
    Ok(match stream.read_u8().await? {
        0 => {
            let mut format = [0; 19];
            stream.read_exact(&mut format).await?;
            // The padding at the end is ignored.
            if format[3..16] != FORMAT[..13] {
                return Err(io::Error::new(io::ErrorKind::Unsupported, "another format of pixels"));
            }
            Request::None
        }
        2 => {
            stream.read_u8().await?;
            let count = stream.read_u16().await?;
            let mut preferred = None;
            for _ in 0..count {
                let encoding = stream.read_i32().await?;
                preferred = preferred.or(Some(encoding).filter(|encoding| [RAW, ZRLE].contains(encoding)));
            }
            Request::Encodings { compressed: preferred == Some(ZRLE) }
        }
        3 => {
            // The requested area is ignored: more than was requested may be sent.
            let incremental = stream.read_u8().await? != 0;
            stream.read_exact(&mut [0; 8]).await?;
            if incremental { Request::Changes } else { Request::Everything }
        }
        4 => {
            let down = stream.read_u8().await? != 0;
            stream.read_u16().await?;
            Request::Key { down, keysym: stream.read_u32().await? }
        }
        5 => skip(stream, 5).await?,
        6 => {
            stream.read_exact(&mut [0; 3]).await?;
            let length = stream.read_u32().await?;
            skip(stream, u64::from(length)).await?
        }
        _ => return Err(io::ErrorKind::InvalidData.into()),
    })
}

async fn skip(stream: &mut (impl AsyncRead + Unpin), bytes: u64) -> io::Result<Request> {
    tokio::io::copy(&mut stream.take(bytes), &mut tokio::io::sink()).await?;
    Ok(Request::None)
}

/// Encodes rows of the screen as an update with one rectangle (7.6.1), which is raw (7.7.1) or ZRLE (7.7.6).
fn update(frame: &Framebuffer, rows: Range<usize>, zrle: Option<&mut ZrleEncoder>) -> Vec<u8> {
    let mut bytes = vec![0, 0, 0, 1];
    bytes.extend([0, rows.start, frame.width(), rows.len()].map(short).concat());
    match zrle {
        Some(zrle) => {
            bytes.extend(ZRLE.to_be_bytes());
            bytes.extend(zrle.encode(frame, (0, rows.start), (frame.width(), rows.len())));
        }
        None => {
            bytes.extend(RAW.to_be_bytes());
            for y in rows {
                bytes.extend(frame.row(y).iter().flat_map(|[red, green, blue]| [*blue, *green, *red, 0]));
            }
        }
    }
    bytes
}

fn short(number: usize) -> [u8; 2] {
    u16::try_from(number).unwrap_or(u16::MAX).to_be_bytes()
}
