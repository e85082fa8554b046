//! The client side of RFB (RFC 6143): the handshake, the messages of the client, and updates, which are decoded into a
//! framebuffer.
//!
//! [`Console`](super::Console) is built on it. It is public for backends whose hypervisor allows one client per display: they
//! are that client, and serve its screen to any number of viewers.
//!
//! The server is not trusted: every length is checked, pixels are read a row at a time, and skipped data is never
//! buffered.
//!
//! ```
//! use rudder_core::{backend::DisplayEncoding, console::{Framebuffer, rfb}};
//! use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _};
//!
//! async fn screen(mut stream: impl AsyncRead + AsyncWrite + Unpin) -> rudder_core::Result<Framebuffer> {
//!     let (width, height) = rfb::handshake(&mut stream).await?;
//!     let mut frame = Framebuffer::new(width, height);
//!     let mut request = rfb::client_setup(DisplayEncoding::Compressed);
//!     request.extend(rfb::update_request(false, width, height));
//!     stream.write_all(&request).await.map_err(|error| rudder_core::Error::io("request the screen", error))?;
//!     let mut zrle = rfb::ZrleDecoder::default();
//!     while rfb::read_update(&mut stream, &mut frame, &mut zrle).await?.rows.is_empty() {}
//!     Ok(frame)
//! }
//! ```

mod zrle;

pub use zrle::{Decoder as ZrleDecoder, encode::Encoder as ZrleEncoder};

use super::Framebuffer;
use crate::{Error, ErrorKind, Result, backend::DisplayEncoding};
use std::ops::Range;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

/// The largest screen that is accepted, in pixels: 8K.
const MOST_PIXELS: usize = 7680 * 4320;
/// The longest name and the longest reason that are read, in bytes.
const LONGEST_TEXT: u32 = 64 * 1024;

/// Numbers of encodings and pseudo-encodings (RFC 6143, 7.7 and 7.8; the registry of rfbproto).
mod encoding {
    pub(super) const RAW: i32 = 0;
    pub(super) const COPY_RECT: i32 = 1;
    pub(super) const ZRLE: i32 = 16;
    pub(super) const DESKTOP_SIZE: i32 = -223;
    pub(super) const QEMU_EXTENDED_KEY: i32 = -258;
    pub(super) const EXTENDED_DESKTOP_SIZE: i32 = -308;
}

/// Returns the error of a server that violates the protocol.
pub(super) fn mistake(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Protocol, message.into())
}

/// Returns the error of a broken connection.
pub(super) fn broken(error: std::io::Error) -> Error {
    mistake("the connection to the display broke").with_source(error)
}

/// Performs the handshake, without authentication. Returns the width and the height of the screen, in pixels.
///
/// # Errors
/// `Protocol` when the other side is not an RFB server or violates the protocol, `Authentication` when it requires a
/// password.
pub async fn handshake<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S) -> Result<(usize, usize)> {
    let mut greeting = [0; 12];
    stream.read_exact(&mut greeting).await.map_err(broken)?;
    let minor = minor_version(&greeting)?;
    let ours: &[u8; 12] = match minor {
        ..7 => b"RFB 003.003\n",
        7 => b"RFB 003.007\n",
        8.. => b"RFB 003.008\n",
    };
    stream.write_all(ours).await.map_err(broken)?;
    stream.flush().await.map_err(broken)?;

    if minor < 7 {
        match stream.read_u32().await.map_err(broken)? {
            0 => return Err(refused(stream).await),
            1 => {}
            other => return Err(no_free_entry(&[u8::try_from(other).unwrap_or(u8::MAX)])),
        }
    } else {
        let count = stream.read_u8().await.map_err(broken)?;
        if count == 0 {
            return Err(refused(stream).await);
        }
        let mut types = vec![0; usize::from(count)];
        stream.read_exact(&mut types).await.map_err(broken)?;
        if !types.contains(&1) {
            return Err(no_free_entry(&types));
        }
        stream.write_all(&[1]).await.map_err(broken)?;
        stream.flush().await.map_err(broken)?;
        if minor >= 8 && stream.read_u32().await.map_err(broken)? != 0 {
            return Err(refused(stream).await);
        }
    }

    // Shared: other clients may stay connected.
    stream.write_all(&[1]).await.map_err(broken)?;
    stream.flush().await.map_err(broken)?;
    let width = usize::from(stream.read_u16().await.map_err(broken)?);
    let height = usize::from(stream.read_u16().await.map_err(broken)?);
    check_size(width, height)?;
    skip(stream, 16).await?;
    let name = stream.read_u32().await.map_err(broken)?;
    if name > LONGEST_TEXT {
        return Err(mistake(format!("expected a name of the display, but found one of {name} bytes")));
    }
    skip(stream, u64::from(name)).await?;
    Ok((width, height))
}

fn minor_version(greeting: &[u8; 12]) -> Result<u16> {
    let strange = || {
        let found = String::from_utf8_lossy(greeting).escape_debug().to_string();
        mistake(format!("expected the greeting of an RFB server, but found {found:?}"))
    };
    let text = std::str::from_utf8(greeting).map_err(|_| strange())?;
    let version = text.strip_prefix("RFB ").and_then(|rest| rest.strip_suffix('\n')).ok_or_else(strange)?;
    let (major, minor) = version.split_once('.').ok_or_else(strange)?;
    let (major, minor): (u16, u16) =
        (major.parse().map_err(|_| strange())?, minor.parse().map_err(|_| strange())?);
    match major {
        ..3 => Err(strange()),
        3 => Ok(minor),
        // A later version falls back to the last one that both support (7.1.1).
        _ => Ok(8),
    }
}

async fn refused<S: AsyncRead + Unpin>(stream: &mut S) -> Error {
    let mut reason = Vec::new();
    if let Ok(length @ ..=LONGEST_TEXT) = stream.read_u32().await {
        // Shows as much of the reason as arrived.
        let _ = stream.take(u64::from(length)).read_to_end(&mut reason).await;
    }
    let reason = String::from_utf8_lossy(&reason);
    mistake(format!("the display refused the connection: {}", reason.escape_debug()))
}

fn no_free_entry(types: &[u8]) -> Error {
    let message =
        format!("expected a display without authentication, but it only offers the types {types:?}");
    Error::new(ErrorKind::Authentication, message)
}

fn check_size(width: usize, height: usize) -> Result<()> {
    if width * height > MOST_PIXELS {
        let message =
            format!("expected a screen of at most {MOST_PIXELS} pixels, but found {width}×{height}");
        return Err(mistake(message));
    }
    Ok(())
}

async fn skip<R: AsyncRead + Unpin>(stream: &mut R, bytes: u64) -> Result<()> {
    let mut rest = stream.take(bytes);
    let skipped = tokio::io::copy(&mut rest, &mut tokio::io::sink()).await.map_err(broken)?;
    if skipped < bytes {
        return Err(broken(std::io::ErrorKind::UnexpectedEof.into()));
    }
    Ok(())
}

/// Returns the first messages of a client: pixels of 32 bits, blue in the lowest byte, and the requested encodings, the
/// preferred ones first.
#[must_use]
pub fn client_setup(preferred: DisplayEncoding) -> Vec<u8> {
    // SetPixelFormat (7.5.1): bits per pixel, depth, big-endian, true colour, three maxima, three shifts, padding.
    let mut bytes = vec![0, 0, 0, 0, 32, 24, 0, 1, 0, 255, 0, 255, 0, 255, 16, 8, 0, 0, 0, 0];
    let pixels: &[i32] = match preferred {
        DisplayEncoding::Raw => &[encoding::COPY_RECT, encoding::RAW],
        DisplayEncoding::Compressed => &[encoding::COPY_RECT, encoding::ZRLE, encoding::RAW],
    };
    let extensions = [encoding::DESKTOP_SIZE, encoding::EXTENDED_DESKTOP_SIZE, encoding::QEMU_EXTENDED_KEY];
    let encodings = [pixels, &extensions].concat();
    // SetEncodings (7.5.2).
    bytes.extend([2, 0, 0, encodings.len() as u8]);
    bytes.extend(encodings.iter().flat_map(|encoding| encoding.to_be_bytes()));
    bytes
}

/// Returns a `FramebufferUpdateRequest` (7.5.3) for the area of this size at the upper left of the screen. An incremental one is
/// answered once something has changed.
#[must_use]
pub fn update_request(incremental: bool, width: usize, height: usize) -> [u8; 10] {
    let [w, h] = [width, height].map(|size| u16::try_from(size).unwrap_or(u16::MAX).to_be_bytes());
    [3, u8::from(incremental), 0, 0, 0, 0, w[0], w[1], h[0], h[1]]
}

/// Returns a `KeyEvent` (7.5.4).
pub(super) fn key_event(down: bool, keysym: u32) -> [u8; 8] {
    let sym = keysym.to_be_bytes();
    [4, u8::from(down), 0, 0, sym[0], sym[1], sym[2], sym[3]]
}

/// Returns a QEMU Extended Key Event (rfbproto, "QEMU Client Message"): it contains the scancode of the key in addition
/// to its keysym, so that it does not depend on a keymap.
pub(super) fn extended_key_event(down: bool, keysym: u32, scancode: u8) -> [u8; 12] {
    let sym = keysym.to_be_bytes();
    [255, 0, 0, u8::from(down), sym[0], sym[1], sym[2], sym[3], 0, 0, 0, scancode]
}

/// The content of an update.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Update {
    /// Whether the size of the screen has changed. The new screen is black until it is drawn.
    pub resized: bool,
    /// Whether the server announced that it understands QEMU's Extended Key Event.
    pub extended_keys: bool,
    /// The rows that were drawn.
    pub rows: Range<usize>,
}

impl Update {
    fn drew(&mut self, y: usize, height: usize) {
        self.rows = if self.rows.is_empty() {
            y..y + height
        } else {
            self.rows.start.min(y)..self.rows.end.max(y + height)
        };
    }
}

/// Reads messages until the end of an update, and draws it. The pixels must be those that [`client_setup`] requests, and the
/// decoder the same for the whole connection.
///
/// Not cancel safe: a dropped future may have read a part of a message.
///
/// # Errors
/// `Protocol` when the server violates the protocol or hangs up. The framebuffer may then be partly drawn.
pub async fn read_update<R: AsyncRead + Unpin>(
    stream: &mut R,
    frame: &mut Framebuffer,
    zrle: &mut zrle::Decoder,
) -> Result<Update> {
    loop {
        match stream.read_u8().await.map_err(broken)? {
            0 => {
                skip(stream, 1).await?;
                let rectangles = stream.read_u16().await.map_err(broken)?;
                let mut update = Update::default();
                for _ in 0..rectangles {
                    rectangle(stream, frame, zrle, &mut update).await?;
                }
                return Ok(update);
            }
            // SetColourMapEntries: unused in true colour, but some servers send it.
            1 => {
                skip(stream, 3).await?;
                let colours = stream.read_u16().await.map_err(broken)?;
                skip(stream, 6 * u64::from(colours)).await?;
            }
            // Bell.
            2 => {}
            // ServerCutText.
            3 => {
                skip(stream, 3).await?;
                let length = stream.read_u32().await.map_err(broken)?;
                skip(stream, u64::from(length)).await?;
            }
            other => {
                return Err(mistake(format!(
                    "expected a message of an RFB server, but found one of type {other}"
                )));
            }
        }
    }
}

async fn rectangle<R: AsyncRead + Unpin>(
    stream: &mut R,
    frame: &mut Framebuffer,
    zrle: &mut zrle::Decoder,
    update: &mut Update,
) -> Result<()> {
    let mut header = [0; 12];
    stream.read_exact(&mut header).await.map_err(broken)?;
    let number = |at: usize| usize::from(u16::from_be_bytes([header[at], header[at + 1]]));
    let (x, y, width, height) = (number(0), number(2), number(4), number(6));
    let encoding = i32::from_be_bytes([header[8], header[9], header[10], header[11]]);
    match encoding {
        encoding::RAW => {
            check_inside(frame, x, y, width, height)?;
            let mut row = vec![0; 4 * width];
            for y in y..y + height {
                stream.read_exact(&mut row).await.map_err(broken)?;
                let pixels = frame.row_mut(y)[x..x + width].iter_mut();
                for (pixel, bytes) in pixels.zip(row.chunks_exact(4)) {
                    *pixel = [bytes[2], bytes[1], bytes[0]];
                }
            }
            update.drew(y, height);
        }
        encoding::COPY_RECT => {
            let from_x = usize::from(stream.read_u16().await.map_err(broken)?);
            let from_y = usize::from(stream.read_u16().await.map_err(broken)?);
            check_inside(frame, x, y, width, height)?;
            check_inside(frame, from_x, from_y, width, height)?;
            copy(frame, (from_x, from_y), (x, y), width, height);
            update.drew(y, height);
        }
        encoding::ZRLE => {
            check_inside(frame, x, y, width, height)?;
            zrle.draw(stream, frame, (x, y), (width, height)).await?;
            update.drew(y, height);
        }
        encoding::DESKTOP_SIZE => resize(frame, update, width, height)?,
        encoding::EXTENDED_DESKTOP_SIZE => {
            let screens = stream.read_u8().await.map_err(broken)?;
            skip(stream, 3 + 16 * u64::from(screens)).await?;
            // y is the status of a resize request; on an error the size is unchanged.
            if y == 0 {
                resize(frame, update, width, height)?;
            }
        }
        encoding::QEMU_EXTENDED_KEY => update.extended_keys = true,
        other => {
            return Err(mistake(format!(
                "expected an encoding that was asked for, but found the encoding {other}"
            )));
        }
    }
    Ok(())
}

fn check_inside(frame: &Framebuffer, x: usize, y: usize, width: usize, height: usize) -> Result<()> {
    if x + width > frame.width() || y + height > frame.height() {
        return Err(mistake(format!(
            "expected a rectangle on a screen of {}×{}, but found {width}×{height} at {x},{y}",
            frame.width(),
            frame.height()
        )));
    }
    Ok(())
}

fn resize(frame: &mut Framebuffer, update: &mut Update, width: usize, height: usize) -> Result<()> {
    check_size(width, height)?;
    if (width, height) != (frame.width(), frame.height()) {
        *frame = Framebuffer::new(width, height);
        update.resized = true;
        update.rows = 0..0;
    }
    Ok(())
}

fn copy(frame: &mut Framebuffer, from: (usize, usize), to: (usize, usize), width: usize, height: usize) {
    let mut row = Vec::with_capacity(width);
    for step in 0..height {
        // Overlapping areas are copied starting from the side that they move towards.
        let step = if from.1 < to.1 { height - 1 - step } else { step };
        row.clear();
        row.extend_from_slice(&frame.row(from.1 + step)[from.0..from.0 + width]);
        frame.row_mut(to.1 + step)[to.0..to.0 + width].copy_from_slice(&row);
    }
}

#[cfg(test)]
mod tests;
