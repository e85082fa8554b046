//! What a viewer sends (RFC 6143, 7.5), and the input that is passed on to the display.

use super::{
    pixels::{PixelFormat, encoding},
    screen::Area,
};
use std::io;
use tokio::io::{AsyncRead, AsyncReadExt as _};

/// A key or a pointer event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Input {
    /// `KeyEvent` (7.5.4).
    Key { down: bool, keysym: u32 },
    /// The extended key event of QEMU (rfbproto, "QEMU Client Message"), which also has the scancode.
    ExtendedKey { down: bool, keysym: u32, scancode: u32 },
    /// `PointerEvent` (7.5.5): the buttons that are down, and the position.
    Pointer { buttons: u8, x: u16, y: u16 },
}

impl Input {
    /// Returns the message. A server without extended key events gets the plain one.
    pub(super) fn to_bytes(self, extended_keys: bool) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(12);
        match self {
            Self::ExtendedKey { down, keysym, scancode } if extended_keys => {
                bytes.extend([255, 0, 0, u8::from(down)]);
                bytes.extend(keysym.to_be_bytes());
                bytes.extend(scancode.to_be_bytes());
            }
            Self::Key { down, keysym } | Self::ExtendedKey { down, keysym, .. } => {
                bytes.extend([4, u8::from(down), 0, 0]);
                bytes.extend(keysym.to_be_bytes());
            }
            Self::Pointer { buttons, x, y } => {
                bytes.extend([5, buttons]);
                bytes.extend([x, y].into_iter().flat_map(u16::to_be_bytes));
            }
        }
        bytes
    }
}

/// The encodings that a viewer asks for, as far as they are known here.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Encodings {
    /// Whether compressed pixels are preferred to raw ones.
    pub(super) compressed: bool,
    /// Whether the viewer can be told that the size of the screen has changed.
    pub(super) desktop_size: bool,
    /// Whether the viewer can send extended key events.
    pub(super) extended_keys: bool,
}

/// A message of a viewer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum ViewerMessage {
    /// `SetPixelFormat`.
    Format(PixelFormat),
    /// `SetEncodings`.
    Encodings(Encodings),
    /// `FramebufferUpdateRequest`.
    UpdateRequest { incremental: bool, area: Area },
    /// An input event.
    Input(Input),
    /// The viewer's clipboard, which QEMU's display does not take.
    CutText,
}

/// Reads the next message; `None` when the viewer has hung up.
///
/// # Errors
/// `InvalidData` for a message that was not negotiated.
pub(super) async fn read(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<ViewerMessage>> {
    let kind = match stream.read_u8().await {
        Ok(kind) => kind,
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    };
    let message = match kind {
        0 => {
            let mut bytes = [0; 19];
            stream.read_exact(&mut bytes).await?;
            let mut format = [0; 16];
            format.copy_from_slice(&bytes[3..]);
            ViewerMessage::Format(PixelFormat::parse(format)?)
        }
        2 => ViewerMessage::Encodings(encodings(stream).await?),
        3 => {
            let incremental = stream.read_u8().await? != 0;
            let mut area = [0; 4];
            for number in &mut area {
                *number = usize::from(stream.read_u16().await?);
            }
            let [x, y, width, height] = area;
            ViewerMessage::UpdateRequest { incremental, area: Area { x, y, width, height } }
        }
        4 => {
            let down = stream.read_u8().await? != 0;
            stream.read_u16().await?;
            ViewerMessage::Input(Input::Key { down, keysym: stream.read_u32().await? })
        }
        5 => {
            let buttons = stream.read_u8().await?;
            let (x, y) = (stream.read_u16().await?, stream.read_u16().await?);
            ViewerMessage::Input(Input::Pointer { buttons, x, y })
        }
        6 => {
            stream.read_exact(&mut [0; 3]).await?;
            let length = u64::from(stream.read_u32().await?);
            let skipped = tokio::io::copy(&mut stream.take(length), &mut tokio::io::sink()).await?;
            if skipped < length {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            ViewerMessage::CutText
        }
        255 if stream.read_u8().await? == 0 => {
            let down = stream.read_u16().await? != 0;
            let (keysym, scancode) = (stream.read_u32().await?, stream.read_u32().await?);
            ViewerMessage::Input(Input::ExtendedKey { down, keysym, scancode })
        }
        other => {
            let message = format!("expected a message that was negotiated, but found one of type {other}");
            return Err(io::Error::new(io::ErrorKind::InvalidData, message));
        }
    };
    Ok(Some(message))
}

async fn encodings(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Encodings> {
    stream.read_u8().await?;
    let count = stream.read_u16().await?;
    let mut encodings = Encodings::default();
    let mut preferred = None;
    for _ in 0..count {
        match stream.read_i32().await? {
            pixels @ (encoding::RAW | encoding::ZRLE) => {
                preferred.get_or_insert(pixels);
            }
            encoding::DESKTOP_SIZE => encodings.desktop_size = true,
            encoding::QEMU_EXTENDED_KEY => encodings.extended_keys = true,
            _ => {}
        }
    }
    encodings.compressed = preferred == Some(encoding::ZRLE);
    Ok(encodings)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use rudder_core::{backend::DisplayEncoding, console::rfb};

    async fn all(mut bytes: &[u8]) -> io::Result<Vec<ViewerMessage>> {
        let mut messages = Vec::new();
        while let Some(message) = read(&mut bytes).await? {
            messages.push(message);
        }
        Ok(messages)
    }

    #[tokio::test]
    async fn the_messages_of_our_own_client_are_read() {
        let mut bytes = rfb::client_setup(DisplayEncoding::Compressed);
        bytes.extend(rfb::update_request(true, 720, 400));
        let encodings = Encodings { compressed: true, desktop_size: true, extended_keys: true };
        let area = Area { x: 0, y: 0, width: 720, height: 400 };
        let expected = [
            ViewerMessage::Format(PixelFormat::DEFAULT),
            ViewerMessage::Encodings(encodings),
            ViewerMessage::UpdateRequest { incremental: true, area },
        ];
        assert_eq!(all(&bytes).await.unwrap(), expected);
        let raw = rfb::client_setup(DisplayEncoding::Raw);
        let expected = ViewerMessage::Encodings(Encodings { compressed: false, ..encodings });
        assert_eq!(all(&raw).await.unwrap()[1], expected);
    }

    #[tokio::test]
    async fn input_is_read_as_it_is_written() {
        let inputs = [
            Input::Key { down: true, keysym: 0xff0d },
            Input::ExtendedKey { down: false, keysym: 0x61, scancode: 0x1e },
            Input::Pointer { buttons: 5, x: 1000, y: 2 },
        ];
        let bytes: Vec<u8> = inputs.iter().flat_map(|input| input.to_bytes(true)).collect();
        assert_eq!(all(&bytes).await.unwrap(), inputs.map(ViewerMessage::Input));
        let plain = Input::Key { down: false, keysym: 0x61 };
        assert_eq!(inputs[1].to_bytes(false), plain.to_bytes(true));
        assert_eq!(all(b"\x06\0\0\0\0\0\0\x02hi").await.unwrap(), [ViewerMessage::CutText]);
    }

    #[tokio::test]
    async fn what_was_not_negotiated_is_refused() {
        for bytes in [[99].as_slice(), &[255, 1, 0, 0], &[251, 0]] {
            assert_eq!(all(bytes).await.unwrap_err().kind(), io::ErrorKind::InvalidData, "{bytes:?}");
        }
        assert_eq!(all(&[5, 0]).await.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        assert_eq!(all(&[6, 0, 0, 0, 0, 0, 0, 2, 1]).await.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
