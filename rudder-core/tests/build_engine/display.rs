//! A display for test machines: an RFB server (RFC 6143) with a prompt that answers lines as scripted.

use rudder_core::{
    Error, ErrorKind, Result,
    backend::BoxedStream,
    console::{Framebuffer, text},
};
use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream},
    sync::watch,
};

const ENTER: u32 = 0xff0d;
const SHIFT: u32 = 0xffe1;

/// A screen with a keyboard. Clones share their state.
#[derive(Debug, Clone, Default)]
pub struct Display(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: watch::Sender<()>,
}

#[derive(Debug, Default)]
struct State {
    lines: Vec<String>,
    prompt: String,
    answers: HashMap<String, String>,
    typed: Vec<String>,
    held: Vec<u32>,
    pressed: Vec<u32>,
    /// Number of keys after which the connection breaks, once.
    breaks_after: Option<usize>,
    /// Whether further connections fail.
    closed: bool,
    stays_closed: bool,
}

impl Display {
    /// Creates a screen that shows this line above an empty prompt.
    pub fn showing(line: &str) -> Self {
        let display = Self::default();
        display.with(|state| state.lines.push(line.to_owned()));
        display
    }

    /// Shows `answer` when `line` was typed.
    pub fn answers(self, line: &str, answer: &str) -> Self {
        self.with(|state| state.answers.insert(line.to_owned(), answer.to_owned()));
        self
    }

    /// Breaks the connection after this many keys.
    pub fn breaks_after(self, keys: usize) -> Self {
        self.with(|state| state.breaks_after = Some(keys));
        self
    }

    /// Refuses further connections after the break.
    pub fn permanently(self) -> Self {
        self.with(|state| state.stays_closed = true);
        self
    }

    /// Shows a further line.
    pub fn show(&self, line: &str) {
        self.with(|state| state.lines.push(line.to_owned()));
        self.0.changed.send_replace(());
    }

    /// Returns the lines that were typed; the last may be incomplete.
    pub fn typed(&self) -> Vec<String> {
        self.with(|state| state.typed.iter().chain([&state.prompt]).cloned().collect())
    }

    /// Returns the keys that are down, by keysym.
    pub fn held(&self) -> Vec<u32> {
        self.with(|state| state.held.clone())
    }

    /// Returns the keys that were pressed and are not characters.
    pub fn pressed(&self) -> Vec<u32> {
        self.with(|state| state.pressed.clone())
    }

    fn with<T>(&self, what: impl FnOnce(&mut State) -> T) -> T {
        what(&mut self.0.state.lock().unwrap())
    }

    /// Connects to the display.
    pub fn connect(&self) -> Result<BoxedStream> {
        if self.with(|state| state.closed) {
            return Err(Error::new(ErrorKind::NotFound, "the display is gone"));
        }
        let (near, far) = tokio::io::duplex(1 << 20);
        let display = self.clone();
        tokio::spawn(async move {
            // The viewer has disconnected, or the script breaks the connection.
            let _ = display.serve(far).await;
        });
        Ok(Box::new(near))
    }

    fn key(&self, down: bool, keysym: u32) -> bool {
        let broke = self.with(|state| {
            state.held.retain(|held| *held != keysym);
            if !down {
                return false;
            }
            state.held.push(keysym);
            match char::from_u32(keysym).filter(|_| keysym < 0x100) {
                Some(character) => state.prompt.push(character),
                None if keysym == ENTER => {
                    let line = std::mem::take(&mut state.prompt);
                    state.lines.push(format!("> {line}"));
                    state.lines.extend(state.answers.get(&line).cloned());
                    state.typed.push(line);
                }
                None if keysym == SHIFT => {}
                None => state.pressed.push(keysym),
            }
            let Some(left) = &mut state.breaks_after else { return false };
            *left -= 1;
            if *left > 0 {
                return false;
            }
            state.breaks_after = None;
            // As for any viewer that has disconnected.
            state.held.clear();
            state.closed = state.stays_closed;
            true
        });
        self.0.changed.send_replace(());
        broke
    }

    fn draw(&self) -> Framebuffer {
        let mut frame = Framebuffer::new(8 * 60, 16 * 12);
        self.with(|state| {
            let prompt = format!("> {}", state.prompt);
            for (row, line) in state.lines.iter().chain([&prompt]).enumerate() {
                text::draw(&mut frame, (0, 16 * row), line, [170; 3], [0; 3]);
            }
        });
        frame
    }

    async fn serve(&self, mut stream: DuplexStream) -> std::io::Result<()> {
        let mut changed = self.0.changed.subscribe();
        stream.write_all(b"RFB 003.008\n\x01\x01").await?;
        let (mut version, mut security) = ([0; 12], [0; 1]);
        stream.read_exact(&mut version).await?;
        stream.read_exact(&mut security).await?;
        stream.write_all(&[0; 4]).await?;
        stream.read_u8().await?;
        let frame = self.draw();
        stream.write_u16(u16::try_from(frame.width()).unwrap()).await?;
        stream.write_u16(u16::try_from(frame.height()).unwrap()).await?;
        stream.write_all(&[[0; 16].as_slice(), &[0, 0, 0, 1], b"x"].concat()).await?;
        let (mut reader, mut writer) = tokio::io::split(stream);
        let mut waiting = false;
        loop {
            tokio::select! {
                biased;
                kind = reader.read_u8() => {
                    let kind = kind?;
                    let mut rest = vec![0; match kind { 0 => 19, 2 => 3, 3 => 9, 4 => 7, 5 => 5, _ => panic!("message {kind}") }];
                    reader.read_exact(&mut rest).await?;
                    match kind {
                        2 => {
                            let more = 4 * usize::from(u16::from_be_bytes([rest[1], rest[2]]));
                            reader.read_exact(&mut vec![0; more]).await?;
                        }
                        3 if rest[0] == 1 => waiting = true,
                        3 => self.update(&mut writer).await?,
                        4 if self.key(rest[0] == 1, u32::from_be_bytes([rest[3], rest[4], rest[5], rest[6]])) => {
                            return Ok(());
                        }
                        _ => {}
                    }
                }
                _ = changed.changed(), if waiting => {
                    waiting = false;
                    self.update(&mut writer).await?;
                }
            }
        }
    }

    async fn update(&self, writer: &mut (impl tokio::io::AsyncWrite + Unpin)) -> std::io::Result<()> {
        let frame = self.draw();
        let mut bytes = vec![0, 0, 0, 1, 0, 0, 0, 0];
        bytes.extend(u16::try_from(frame.width()).unwrap().to_be_bytes());
        bytes.extend(u16::try_from(frame.height()).unwrap().to_be_bytes());
        bytes.extend([0; 4]);
        for y in 0..frame.height() {
            bytes.extend(frame.row(y).iter().flat_map(|[red, green, blue]| [*blue, *green, *red, 0]));
        }
        writer.write_all(&bytes).await
    }
}
