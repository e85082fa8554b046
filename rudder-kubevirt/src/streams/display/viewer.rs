//! The RFB server (RFC 6143) that one viewer talks to.
//!
//! A viewer that reads slowly is sent fewer updates, each with the latest pixels, and holds up nobody else. Keys and buttons that
//! it holds are released when it leaves.

use super::{
    held::Held,
    messages::{self, Encodings, ViewerMessage},
    pixels::{Encoder, PixelFormat, encoding},
    screen::{Area, grid, tile_area},
    session::{Session, Shared},
};
use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, BufReader, BufWriter},
    sync::Notify,
    time::timeout,
};

/// How long a viewer may take for the handshake.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(30);
/// The name of the display.
const NAME: &[u8] = b"rudder";

/// Serves a viewer until it hangs up or the display ends.
///
/// # Errors
/// The viewer violates the protocol, or its connection breaks.
pub(super) async fn serve(
    mut stream: impl AsyncRead + AsyncWrite + Send + Unpin,
    session: Arc<Session>,
) -> io::Result<()> {
    let size = session.shared().screen().size();
    timeout(HANDSHAKE_LIMIT, handshake(&mut stream, size)).await??;
    let (reader, writer) = tokio::io::split(stream);
    let wishes = Wishes::default();
    let mut held = Held::default();
    let mut state = session.shared().state();
    let ended = tokio::select! {
        ended = receive(BufReader::new(reader), &session, &wishes, &mut held) => ended,
        ended = send(BufWriter::new(writer), session.shared(), &wishes, size) => ended,
        // The sender lives as long as the session.
        _ = state.wait_for(|state| state.ended) => Ok(()),
    };
    for input in held.releases() {
        session.send(input).await;
    }
    ended
}

/// Performs the handshake of version 3.3, 3.7 or 3.8, without authentication (7.1 to 7.3).
async fn handshake(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    (width, height): (usize, usize),
) -> io::Result<()> {
    stream.write_all(b"RFB 003.008\n").await?;
    stream.flush().await?;
    let mut version = [0; 12];
    stream.read_exact(&mut version).await?;
    match &version {
        b"RFB 003.007\n" | b"RFB 003.008\n" => {
            stream.write_all(&[1, 1]).await?;
            stream.flush().await?;
            let chosen = stream.read_u8().await?;
            if chosen != 1 {
                let message = format!("expected the security type 1, but found {chosen}");
                return Err(io::Error::new(io::ErrorKind::InvalidData, message));
            }
            if &version == b"RFB 003.008\n" {
                stream.write_u32(0).await?;
            }
        }
        // Other versions mean 3.3 (7.1.1).
        version if version.starts_with(b"RFB 003.") => stream.write_u32(1).await?,
        other => {
            let message =
                format!("expected the version of a viewer, but found {:?}", other.escape_ascii().to_string());
            return Err(io::Error::new(io::ErrorKind::InvalidData, message));
        }
    }
    stream.flush().await?;
    // Every viewer shares the display, whether it asks for that or not.
    stream.read_u8().await?;
    let mut init = [width, height].map(short).concat();
    init.extend(PixelFormat::DEFAULT.to_bytes());
    init.extend((NAME.len() as u32).to_be_bytes());
    init.extend(NAME);
    stream.write_all(&init).await?;
    stream.flush().await
}

fn short(number: usize) -> [u8; 2] {
    u16::try_from(number).unwrap_or(u16::MAX).to_be_bytes()
}

/// What a viewer wants and has not been sent yet.
#[derive(Debug, Clone, Copy)]
struct Wish {
    format: PixelFormat,
    encodings: Encodings,
    /// Pixels wanted now, changed or not.
    whole: Option<Area>,
    /// Pixels wanted once they have changed.
    changes: Option<Area>,
}

/// Requests are merged, so that a viewer can send any number of them while it is behind.
#[derive(Debug)]
struct Wishes {
    wish: Mutex<Wish>,
    changed: Notify,
}

impl Default for Wishes {
    fn default() -> Self {
        let (format, encodings) = (PixelFormat::DEFAULT, Encodings::default());
        let wish = Wish { format, encodings, whole: None, changes: None };
        Self { wish: Mutex::new(wish), changed: Notify::new() }
    }
}

impl Wishes {
    fn update<T>(&self, change: impl FnOnce(&mut Wish) -> T) -> T {
        change(&mut self.wish.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Handles what a viewer sends, until it hangs up.
async fn receive(
    mut reader: impl AsyncRead + Unpin,
    session: &Session,
    wishes: &Wishes,
    held: &mut Held,
) -> io::Result<()> {
    while let Some(message) = messages::read(&mut reader).await? {
        match message {
            ViewerMessage::Format(format) => wishes.update(|wish| wish.format = format),
            ViewerMessage::Encodings(encodings) => wishes.update(|wish| wish.encodings = encodings),
            ViewerMessage::UpdateRequest { incremental, area } => wishes.update(|wish| {
                let wanted = if incremental { &mut wish.changes } else { &mut wish.whole };
                *wanted = Some(wanted.map_or(area, |earlier| earlier.union(area)));
            }),
            ViewerMessage::Input(input) => {
                held.note(input);
                session.send(input).await;
            }
            ViewerMessage::CutText => {}
        }
        wishes.changed.notify_one();
    }
    Ok(())
}

/// Sends updates as they are wanted, until the connection breaks.
async fn send(
    mut writer: impl AsyncWrite + Unpin,
    shared: &Shared,
    wishes: &Wishes,
    size: (usize, usize),
) -> io::Result<()> {
    let mut sent = Sent::new(size);
    let mut state = shared.state();
    loop {
        // Before the first update there is nothing to show but black.
        let drawn = state.borrow_and_update().drawn;
        if drawn && let Some(update) = sent.plan(shared, wishes) {
            sent.write(&mut writer, shared, &update).await?;
            continue;
        }
        tokio::select! {
            () = wishes.changed.notified() => {}
            changed = state.changed() => changed.map_err(|_| io::ErrorKind::BrokenPipe)?,
        }
    }
}

/// An update that was decided on.
struct Update {
    /// The new size of the screen, sent on its own: rectangles of the old one may be on their way.
    resized: Option<(usize, usize)>,
    /// Whether to say that extended key events are understood.
    extended_keys: bool,
    areas: Vec<Area>,
    format: PixelFormat,
    compressed: bool,
}

/// What a viewer was sent.
struct Sent {
    /// The size of the screen as the viewer knows it. One that cannot be told a new size sees a part of a larger screen, and black
    /// beyond a smaller one.
    size: (usize, usize),
    /// The number of the change that each tile was sent with, row by row.
    tiles: Vec<u64>,
    /// Whether extended key events were announced.
    extended_keys: bool,
    encoder: Encoder,
}

impl Sent {
    fn new(size: (usize, usize)) -> Self {
        let mut sent = Self { size, tiles: Vec::new(), extended_keys: false, encoder: Encoder::default() };
        sent.resize(size);
        sent
    }

    fn resize(&mut self, size: (usize, usize)) {
        let (columns, rows) = grid(size);
        self.size = size;
        self.tiles = vec![0; columns * rows];
    }

    /// Decides on the next update; `None` when there is nothing to send, or it is not wanted yet.
    fn plan(&mut self, shared: &Shared, wishes: &Wishes) -> Option<Update> {
        let wish = wishes.update(|wish| *wish);
        if wish.whole.is_none() && wish.changes.is_none() {
            return None;
        }
        let mut update = Update {
            resized: None,
            extended_keys: wish.encodings.extended_keys && !self.extended_keys && shared.extended_keys(),
            areas: Vec::new(),
            format: wish.format,
            compressed: wish.encodings.compressed,
        };
        let size = shared.screen().size();
        if size != self.size && wish.encodings.desktop_size {
            // Requests were made for the old size. The viewer makes new ones.
            wishes.update(|wish| (wish.whole, wish.changes) = (None, None));
            self.resize(size);
            return Some(Update { resized: Some(size), ..update });
        }
        let changed = wish.changes.map_or_else(Vec::new, |area| self.changed(shared, area));
        if !changed.is_empty() {
            wishes.update(|wish| wish.changes = None);
        }
        if let Some(area) = wish.whole {
            wishes.update(|wish| wish.whole = None);
            update.areas = self.strips(area);
        }
        // An area that is sent as a whole is not sent a second time.
        let whole = wish.whole.map(|area| area.intersection(Area::of_size(self.size)));
        update.areas.extend(
            changed.into_iter().filter(|area| whole.is_none_or(|whole| area.intersection(whole) != *area)),
        );
        (update.extended_keys || !update.areas.is_empty()).then_some(update)
    }

    /// Divides an area into rows of tiles, which are encoded one at a time.
    fn strips(&self, area: Area) -> Vec<Area> {
        let area = area.intersection(Area::of_size(self.size));
        let (columns, rows) = grid(self.size);
        let row = |row| (0..columns).map(move |column| (column, row));
        let strips = (0..rows).map(|at| self.merge(row(at), area));
        strips.filter(|strip| !strip.is_empty()).collect()
    }

    /// Returns what has changed in an area since it was sent: neighbouring tiles of a row as one rectangle.
    fn changed(&self, shared: &Shared, area: Area) -> Vec<Area> {
        let screen = shared.screen();
        let (columns, rows) = grid(self.size);
        let mut areas = Vec::new();
        for row in 0..rows {
            let is_new =
                |column: &usize| screen.tile_change((*column, row)) > self.tiles[row * columns + column];
            let tiles: Vec<_> = (0..columns).collect();
            for run in tiles.chunk_by(|one, two| is_new(one) == is_new(two)).filter(|run| is_new(&run[0])) {
                areas.push(self.merge(run.iter().map(|column| (*column, row)), area));
            }
        }
        areas.retain(|area| !area.is_empty());
        areas
    }

    /// Returns the part of an area that tiles cover which lie beside each other.
    fn merge(&self, tiles: impl Iterator<Item = (usize, usize)>, area: Area) -> Area {
        let nothing = Area::of_size((0, 0));
        tiles.map(|tile| tile_area(tile, self.size)).fold(nothing, Area::union).intersection(area)
    }

    /// Writes an update (7.6.1).
    async fn write(
        &mut self,
        writer: &mut (impl AsyncWrite + Unpin),
        shared: &Shared,
        update: &Update,
    ) -> io::Result<()> {
        let count =
            update.areas.len() + usize::from(update.extended_keys) + usize::from(update.resized.is_some());
        writer.write_all(&[[0, 0], short(count)].concat()).await?;
        if update.extended_keys {
            self.extended_keys = true;
            writer.write_all(&rectangle(Area::of_size((0, 0)), encoding::QEMU_EXTENDED_KEY)).await?;
        }
        if let Some(size) = update.resized {
            writer.write_all(&rectangle(Area::of_size(size), encoding::DESKTOP_SIZE)).await?;
        }
        for area in &update.areas {
            let pixels = {
                let screen = shared.screen();
                self.mark(*area, screen.change());
                screen.copy(*area)
            };
            let (encoding, data) = self.encoder.encode(&pixels, update.format, update.compressed);
            writer.write_all(&rectangle(*area, encoding)).await?;
            writer.write_all(&data).await?;
        }
        writer.flush().await
    }

    /// Notes that the tiles in an area are sent as of a change. A tile that is only partly in the area stays due.
    fn mark(&mut self, area: Area, change: u64) {
        let (columns, rows) = grid(self.size);
        for (row, column) in (0..rows).flat_map(|row| (0..columns).map(move |column| (row, column))) {
            let tile = tile_area((column, row), self.size);
            if tile.intersection(area) == tile {
                self.tiles[row * columns + column] = change;
            }
        }
    }
}

/// Returns the header of a rectangle.
fn rectangle(area: Area, encoding: i32) -> [u8; 12] {
    let mut header = [0; 12];
    let numbers = [area.x, area.y, area.width, area.height].map(short).concat();
    header[..8].copy_from_slice(&numbers);
    header[8..].copy_from_slice(&encoding.to_be_bytes());
    header
}
