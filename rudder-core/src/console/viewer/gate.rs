//! Both sides of the beginning of an RFB session (RFC 6143, 7.1): letting in a viewer that knows the password, and
//! connecting to a display that requires none. Afterwards all versions are alike.

use super::password::Challenge;
use std::io::{Error, ErrorKind, Result};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

/// Security types (RFC 6143, 7.1.2).
const NONE: u8 = 1;
const VNC_AUTHENTICATION: u8 = 2;

/// The versions that differ (RFC 6143, 7.1.1); any other counts as one of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Version {
    V3_3,
    V3_7,
    V3_8,
}

impl Version {
    const GREETINGS: [(Self, &'static [u8; 12]); 3] =
        [(Self::V3_3, b"RFB 003.003\n"), (Self::V3_7, b"RFB 003.007\n"), (Self::V3_8, b"RFB 003.008\n")];

    async fn read<S: AsyncRead + Unpin>(stream: &mut S) -> Result<Self> {
        let mut greeting = [0; 12];
        stream.read_exact(&mut greeting).await?;
        let number = |range: std::ops::Range<usize>| -> Option<u32> {
            std::str::from_utf8(&greeting[range]).ok()?.parse().ok()
        };
        let framed = greeting.starts_with(b"RFB ") && greeting[7] == b'.' && greeting[11] == b'\n';
        match (framed, number(4..7), number(8..11)) {
            (true, Some(3), Some(7)) => Ok(Self::V3_7),
            (true, Some(3), Some(..7)) => Ok(Self::V3_3),
            (true, Some(3..), Some(_)) => Ok(Self::V3_8),
            _ => Err(Error::new(ErrorKind::InvalidData, "the peer does not speak RFB")),
        }
    }

    async fn write<S: AsyncWrite + Unpin>(self, stream: &mut S) -> Result<()> {
        let (_, greeting) = Self::GREETINGS[self as usize];
        stream.write_all(greeting).await?;
        stream.flush().await
    }
}

/// A viewer that has answered the challenge and waits for the result.
#[derive(Debug)]
pub(super) struct PendingViewer {
    version: Version,
    pub(super) response: Challenge,
}

/// Asks a viewer to prove that it knows the password.
pub(super) async fn ask<S>(viewer: &mut S, challenge: &Challenge) -> Result<PendingViewer>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    Version::V3_8.write(viewer).await?;
    let version = Version::read(viewer).await?;
    if version == Version::V3_3 {
        viewer.write_u32(u32::from(VNC_AUTHENTICATION)).await?;
    } else {
        viewer.write_all(&[1, VNC_AUTHENTICATION]).await?;
        viewer.flush().await?;
        let chosen = viewer.read_u8().await?;
        if chosen != VNC_AUTHENTICATION {
            return Err(Error::new(
                ErrorKind::InvalidData,
                "the viewer chose a security type that was not offered",
            ));
        }
    }
    viewer.write_all(challenge).await?;
    viewer.flush().await?;
    let mut response = [0; 16];
    viewer.read_exact(&mut response).await?;
    Ok(PendingViewer { version, response })
}

impl PendingViewer {
    /// Lets the viewer in, up to and including its first message (ClientInit).
    pub(super) async fn admit<S: AsyncRead + AsyncWrite + Unpin>(self, viewer: &mut S) -> Result<()> {
        viewer.write_u32(0).await?;
        viewer.flush().await?;
        // Whether the viewer wants exclusive access, which is ignored.
        viewer.read_u8().await?;
        Ok(())
    }

    /// Refuses the viewer, with a reason if the version can transmit one.
    pub(super) async fn refuse<S: AsyncWrite + Unpin>(self, viewer: &mut S, why: &str) -> Result<()> {
        viewer.write_u32(1).await?;
        if self.version == Version::V3_8 {
            reason(viewer, why).await?;
        }
        viewer.flush().await?;
        viewer.shutdown().await
    }
}

/// Refuses a viewer before it is asked for a password.
pub(super) async fn turn_away<S>(viewer: &mut S, why: &str) -> Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    Version::V3_8.write(viewer).await?;
    // Without any security type, a reason follows.
    match Version::read(viewer).await? {
        Version::V3_3 => viewer.write_u32(0).await?,
        _ => viewer.write_u8(0).await?,
    }
    reason(viewer, why).await?;
    viewer.flush().await?;
    viewer.shutdown().await
}

async fn reason<S: AsyncWrite + Unpin>(stream: &mut S, why: &str) -> Result<()> {
    stream.write_u32(u32::try_from(why.len()).unwrap_or_default()).await?;
    stream.write_all(why.as_bytes()).await
}

/// Begins a session that requires no password, as a shared one (ClientInit).
pub(super) async fn enter<S: AsyncRead + AsyncWrite + Unpin>(display: &mut S) -> Result<()> {
    let version = Version::read(display).await?;
    version.write(display).await?;
    let closed =
        || Error::new(ErrorKind::PermissionDenied, "the display requires a password, or refuses all viewers");
    if version == Version::V3_3 {
        if display.read_u32().await? != u32::from(NONE) {
            return Err(closed());
        }
    } else {
        let mut types = vec![0; usize::from(display.read_u8().await?)];
        display.read_exact(&mut types).await?;
        if !types.contains(&NONE) {
            return Err(closed());
        }
        display.write_u8(NONE).await?;
        display.flush().await?;
        if version == Version::V3_8 && display.read_u32().await? != 0 {
            return Err(closed());
        }
    }
    // An exclusive one would disconnect Rudder's own console.
    display.write_u8(1).await?;
    display.flush().await
}
