//! Viewers of every version against a display that echoes.

#![allow(clippy::unwrap_used)]

use super::*;
use crate::ErrorKind;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};

/// Returns a display of RFB `version` without authentication, which sends "hello" first, and then echoes what it
/// receives.
async fn echo(version: &'static str) -> Result<BoxedStream> {
    let (ours, mut theirs) = duplex(1024);
    tokio::spawn(async move {
        theirs.write_all(format!("RFB {version}\n").as_bytes()).await?;
        let mut greeting = [0; 12];
        theirs.read_exact(&mut greeting).await?;
        assert_eq!(greeting.to_vec(), format!("RFB {version}\n").into_bytes());
        match version {
            "003.003" => theirs.write_u32(1).await?,
            _ => {
                theirs.write_all(&[2, 16, 1]).await?;
                assert_eq!(theirs.read_u8().await?, 1);
                if version == "003.008" {
                    theirs.write_u32(0).await?;
                }
            }
        }
        assert_eq!(theirs.read_u8().await?, 1, "the display is shared");
        theirs.write_all(b"hello").await?;
        let (mut from, mut to) = split(theirs);
        copy(&mut from, &mut to).await
    });
    Ok(Box::new(ours))
}

async fn viewer(version: &'static str) -> Viewer {
    Viewer::behind(Box::new(move || Box::pin(echo(version)))).await.unwrap()
}

/// The answer to a viewer.
#[derive(Debug)]
enum Answer {
    In(TcpStream),
    Refused(String),
    TurnedAway(String),
}

impl PartialEq<&str> for Answer {
    fn eq(&self, other: &&str) -> bool {
        matches!(self, Self::Refused(why) | Self::TurnedAway(why) if why == other)
    }
}

/// Connects as a viewer of this version, with this password.
async fn connect(viewer: &Viewer, version: &str, password: &str) -> Answer {
    let mut stream = TcpStream::connect(viewer.address()).await.unwrap();
    let mut greeting = [0; 12];
    stream.read_exact(&mut greeting).await.unwrap();
    assert_eq!(&greeting, b"RFB 003.008\n");
    stream.write_all(format!("RFB {version}\n").as_bytes()).await.unwrap();
    let old = !matches!(version, "003.007" | "003.008" | "003.889");
    let offered = if old { stream.read_u32().await.unwrap() } else { stream.read_u8().await.unwrap().into() };
    if offered == 0 {
        return Answer::TurnedAway(rest(stream).await);
    }
    if !old {
        assert_eq!((offered, stream.read_u8().await.unwrap()), (1, 2));
        stream.write_u8(2).await.unwrap();
    } else {
        assert_eq!(offered, 2);
    }
    let mut challenge = [0; 16];
    stream.read_exact(&mut challenge).await.unwrap();
    let mut key = [0; 8];
    key[..password.len()].copy_from_slice(password.as_bytes());
    stream.write_all(&Password::of(key).encrypt(&challenge)).await.unwrap();
    if stream.read_u32().await.unwrap() == 1 {
        return Answer::Refused(rest(stream).await);
    }
    stream.write_u8(0).await.unwrap();
    let mut hello = [0; 5];
    stream.read_exact(&mut hello).await.unwrap();
    assert_eq!(&hello, b"hello");
    stream.write_all(b"key").await.unwrap();
    let mut key = [0; 3];
    stream.read_exact(&mut key).await.unwrap();
    assert_eq!(&key, b"key");
    Answer::In(stream)
}

/// Returns the reason that the viewer receives, with its length before it, or nothing if the version has no field for
/// one.
async fn rest(mut stream: TcpStream) -> String {
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).await.unwrap();
    if rest.is_empty() {
        return String::new();
    }
    let (length, reason) = rest.split_at(4);
    assert_eq!(u32::from_be_bytes(length.try_into().unwrap()) as usize, reason.len());
    String::from_utf8(reason.to_vec()).unwrap()
}

#[tokio::test]
async fn viewers_of_every_version_work_with_displays_of_every_version() {
    for display in ["003.003", "003.007", "003.008"] {
        let viewer = viewer(display).await;
        for version in ["003.003", "003.005", "003.007", "003.008", "003.889"] {
            while viewer.password().is_none() {
                tokio::task::yield_now().await;
            }
            let answer = connect(&viewer, version, &viewer.password().unwrap()).await;
            assert!(matches!(answer, Answer::In(_)), "{version} on {display}: {answer:?}");
        }
    }
}

#[tokio::test]
async fn a_password_admits_one_viewer_once() {
    let mut viewer = viewer("003.008").await;
    let first = viewer.password().unwrap();
    assert_eq!(connect(&viewer, "003.008", "wrong").await, "the password is wrong, or was used before");
    assert_eq!(connect(&viewer, "003.003", "wrong").await, "");
    assert_eq!(viewer.password().as_ref(), Some(&first), "a wrong one spends nothing");

    let inside = connect(&viewer, "003.008", &first).await;
    assert!(matches!(inside, Answer::In(_)), "{inside:?}");
    viewer.changed().await;
    assert_eq!(viewer.password(), None);
    for version in ["003.003", "003.007", "003.008"] {
        assert_eq!(connect(&viewer, version, &first).await, "another viewer is connected to this display");
    }

    drop(inside);
    viewer.changed().await;
    let second = viewer.password().unwrap();
    assert_ne!(second, first);
    assert_eq!(connect(&viewer, "003.008", &first).await, "the password is wrong, or was used before");
    let answer = connect(&viewer, "003.007", &second).await;
    assert!(matches!(answer, Answer::In(_)), "{answer:?}");
}

#[tokio::test]
async fn closing_disconnects_the_viewer() {
    let viewer = viewer("003.008").await;
    let address = viewer.address();
    let answer = connect(&viewer, "003.008", &viewer.password().unwrap()).await;
    let Answer::In(mut inside) = answer else { panic!("{answer:?}") };
    drop(viewer);
    assert_eq!(inside.read(&mut [0; 1]).await.unwrap_or(0), 0);
    assert!(TcpStream::connect(address).await.is_err(), "the port is still open");
}

#[tokio::test]
async fn an_unreachable_display_is_reported_to_the_viewer() {
    let gone = || -> BoxFuture<'static, Result<BoxedStream>> {
        Box::pin(async { Err(Error::new(ErrorKind::Conflict, "the machine does not run")) })
    };
    let mut viewer = Viewer::behind(Box::new(gone)).await.unwrap();
    let answer = connect(&viewer, "003.008", &viewer.password().unwrap()).await;
    assert_eq!(answer, "the display cannot be reached: the machine does not run");
    viewer.changed().await;

    let password = || -> BoxFuture<'static, Result<BoxedStream>> {
        Box::pin(async {
            let (ours, mut theirs) = duplex(64);
            tokio::spawn(async move {
                theirs.write_all(b"RFB 003.008\n").await.unwrap();
                theirs.read_exact(&mut [0; 12]).await.unwrap();
                theirs.write_all(&[1, 2]).await.unwrap();
            });
            Ok(Box::new(ours) as BoxedStream)
        })
    };
    let viewer = Viewer::behind(Box::new(password)).await.unwrap();
    let answer = connect(&viewer, "003.008", &viewer.password().unwrap()).await;
    assert_eq!(
        answer,
        "the display cannot be reached: the display requires a password, or refuses all viewers"
    );
}

#[tokio::test]
async fn a_connection_that_does_not_speak_rfb_is_closed() {
    let viewer = viewer("003.008").await;
    let mut stream = TcpStream::connect(viewer.address()).await.unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    let mut said = Vec::new();
    // Data that the server had not read results in a reset.
    let _ = stream.read_to_end(&mut said).await;
    assert_eq!(said, b"RFB 003.008\n");
    assert!(viewer.password().is_some());
}
