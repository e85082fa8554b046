//! The screen and the serial console, also with several readers.

use super::{
    NotPassed, Rig, Verdict,
    verdict::{During as _, ensure, fail, fails, refused, same},
};
use crate::{
    Error, ErrorKind,
    backend::{BoxedStream, DisplayEncoding, Machine, SERIAL_KEPT, Site, Stop},
    capability::Capability,
    console::Console,
};
use futures::future::join_all;
use std::{collections::BTreeMap, io, sync::Arc, time::Duration};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

/// How long something may take to pass through a console.
const PATIENCE: Duration = Duration::from_secs(30);

/// Encodings of rectangles (RFC 6143, 7.7).
const RAW: i32 = 0;
const ZRLE: i32 = 16;

fn broken(what: &str) -> impl FnOnce(io::Error) -> NotPassed {
    move |error| NotPassed::Failed(format!("{what}: expected it to work, but found {error}"))
}

/// Reads until a text has arrived, and returns everything read; fails when the stream ends before.
pub(super) async fn until(stream: &mut BoxedStream, text: &str, who: &str) -> Verdict<String> {
    let mut seen = Vec::new();
    let mut buffer = [0; 4096];
    let reading = async {
        loop {
            let read = stream.read(&mut buffer).await.map_err(broken("read the serial console"))?;
            ensure!(read > 0, "{who}: expected {text:?} on the serial console, but the stream ended");
            seen.extend_from_slice(&buffer[..read]);
            let said = String::from_utf8_lossy(&seen);
            if said.contains(text) {
                return Ok(said.into_owned());
            }
        }
    };
    match tokio::time::timeout(PATIENCE, reading).await {
        Ok(read) => read,
        Err(_) => fail!(
            "{who}: expected {text:?} on the serial console within {PATIENCE:?}, but found {:?}",
            String::from_utf8_lossy(&seen)
        ),
    }
}

/// What the guest wrote to its serial console is kept, and at most the requested amount is returned.
pub async fn the_last_words_on_the_serial_console_are_kept(rig: &Rig) -> Verdict {
    let booted = rig.shared().await?;
    let tail = booted.machine.serial_tail(1 << 20).await.during("read the end of the serial console")?;
    if let Some(says) = rig.image()?.serial_says {
        let text = String::from_utf8_lossy(&tail);
        ensure!(text.contains(&says), "expected {says:?} on the serial console, but found {text:?}");
    }
    let short = booted.machine.serial_tail(5).await.during("read less of it")?;
    ensure!(short.len() <= 5, "expected at most 5 bytes, but found {}", short.len());
    Ok(())
}

/// A client of the serial console that does not read delays neither the guest nor any other client, however much the
/// guest writes; the last output is kept, and as much of it as the contract requires.
pub async fn a_reader_that_does_not_read_stops_nobody(rig: &Rig) -> Verdict {
    const LINE: usize = 1000;
    let booted = rig.shared().await?;
    let open = || async { booted.machine.serial().await.during("connect to the serial console") };
    let (idle, mut reader) = (open().await?, open().await?);
    let line = "=".repeat(LINE - 1);
    let lines = SERIAL_KEPT / LINE + 2;
    let flood = format!("i=0; while [ $i -lt {lines} ]; do echo {line}; i=$((i+1)); done >/dev/ttyS0; sync");
    let (wrote, heard) = futures::join!(
        async {
            booted.run(&flood).await?;
            booted.run("echo after-the-flood >/dev/ttyS0").await
        },
        until(&mut reader, "after-the-flood", "who reads")
    );
    wrote?;
    heard?;
    let tail = booted.machine.serial_tail(SERIAL_KEPT).await.during("read the end of the serial console")?;
    same(&tail.len(), &SERIAL_KEPT, "how much of the end of the serial console is kept")?;
    ensure!(
        String::from_utf8_lossy(&tail).contains("after-the-flood"),
        "expected the last words to be kept, but found other ones"
    );
    drop(idle);
    Ok(())
}

/// Several clients read the serial console at once, and each gets everything; one that leaves, or that does not read,
/// disturbs no other.
pub async fn several_read_the_serial_console(rig: &Rig) -> Verdict {
    let booted = rig.shared().await?;
    let open = || async { booted.machine.serial().await.during("connect to the serial console") };
    let (mut one, mut two) = (open().await?, open().await?);
    let idle = open().await?;
    booted.run("echo to-both-of-you >/dev/ttyS0").await?;
    until(&mut one, "to-both-of-you", "the first reader").await?;
    until(&mut two, "to-both-of-you", "the second reader").await?;
    drop(one);
    booted.run("echo to-who-stayed >/dev/ttyS0").await?;
    until(&mut two, "to-who-stayed", "who stayed").await?;
    let mut three = open().await?;
    booted.run("echo to-who-came-late >/dev/ttyS0").await?;
    until(&mut two, "to-who-came-late", "who stayed").await?;
    until(&mut three, "to-who-came-late", "who came late").await?;
    drop(idle);
    let tail = booted.machine.serial_tail(4096).await.during("read the end of the serial console")?;
    let tail = String::from_utf8_lossy(&tail);
    ensure!(tail.contains("to-who-came-late"), "expected the last words to be kept, but found {tail:?}");
    Ok(())
}

/// What is typed on the serial console arrives: a terminal echoes it.
pub async fn what_is_typed_on_the_serial_console_arrives(rig: &Rig) -> Verdict {
    let booted = rig.shared().await?;
    let mut stream = booted.machine.serial().await.during("connect to the serial console")?;
    let typed = async {
        stream.write_all(b"typed-by-the-suite\n").await?;
        stream.flush().await
    };
    typed.await.map_err(broken("type on the serial console"))?;
    until(&mut stream, "typed-by-the-suite", "who typed").await.map(drop)
}

/// Several clients connect to the screen at once; each receives its size and an update, even after another has left.
pub async fn several_look_at_the_screen(rig: &Rig) -> Verdict {
    let booted = rig.shared().await?;
    let open = || async { booted.machine.display().await.during("connect to the display") };
    let (mut one, mut two) = (open().await?, open().await?);
    let sizes = [greet(&mut one).await?, greet(&mut two).await?];
    same(&sizes[0], &sizes[1], "the size of the screen that two were told")?;
    ensure!(sizes[0].0 > 0 && sizes[0].1 > 0, "expected a screen of a size, but found {:?}", sizes[0]);
    picture(&mut one, sizes[0], RAW).await?;
    picture(&mut two, sizes[1], RAW).await?;
    drop(one);
    picture(&mut two, sizes[1], RAW).await?;
    let mut three = open().await?;
    let size = greet(&mut three).await?;
    picture(&mut three, size, RAW).await?;
    picture(&mut two, sizes[1], RAW).await
}

/// The screen has the same pixels in every encoding, and a display that should be read compressed can be.
pub async fn a_compressed_screen_is_the_same(rig: &Rig) -> Verdict {
    let booted = rig.shared().await?;
    if booted.machine.display_encoding() == DisplayEncoding::Compressed {
        let mut stream = booted.machine.display().await.during("connect to the display")?;
        let size = greet(&mut stream).await?;
        picture(&mut stream, size, ZRLE).await?;
    }
    let console = |encoding| Console::new(Arc::clone(&booted.machine)).encoding(encoding);
    let (raw, compressed) = (console(DisplayEncoding::Raw), console(DisplayEncoding::Compressed));
    if let Some(screen) = rig.image()?.screen {
        booted.run(&format!("echo compressed >{screen}")).await?;
        let shown = compressed.wait_text("compressed", PATIENCE).await;
        shown.during("read a text from the compressed screen")?;
    }
    let compare = async {
        // A cursor may blink between the two.
        while raw.framebuffer().await? != compressed.framebuffer().await? {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok::<_, Error>(())
    };
    match tokio::time::timeout(PATIENCE, compare).await {
        Ok(compared) => compared.during("read the screen"),
        Err(_) => fail!("expected the same pixels raw and compressed within {PATIENCE:?}, but they differ"),
    }
}

/// Performs the handshake of RFB 3.8 without authentication, shared (RFC 6143, 7.1–7.3). Returns the size of the
/// screen.
async fn greet(stream: &mut BoxedStream) -> Verdict<(u16, u16)> {
    let talk = async {
        let mut version = [0; 12];
        stream.read_exact(&mut version).await?;
        if !version.starts_with(b"RFB 003.") {
            return Err(io::Error::other(format!(
                "expected RFB 3, but found {:?}",
                version.escape_ascii().to_string()
            )));
        }
        stream.write_all(b"RFB 003.008\n").await?;
        let count = stream.read_u8().await?;
        let mut kinds = vec![0; usize::from(count)];
        stream.read_exact(&mut kinds).await?;
        if !kinds.contains(&1) {
            return Err(io::Error::other(format!(
                "expected to be let in without authentication, but found {kinds:?}"
            )));
        }
        stream.write_all(&[1]).await?;
        let result = stream.read_u32().await?;
        if result != 0 {
            return Err(io::Error::other(format!("expected to be let in, but found result {result}")));
        }
        stream.write_all(&[1]).await?;
        let size = (stream.read_u16().await?, stream.read_u16().await?);
        let mut format = [0; 16];
        stream.read_exact(&mut format).await?;
        let name = stream.read_u32().await?;
        let mut name = vec![0; usize::try_from(name.min(4096)).unwrap_or_default()];
        stream.read_exact(&mut name).await?;
        Ok(size)
    };
    match tokio::time::timeout(PATIENCE, talk).await {
        Ok(size) => size.map_err(broken("shake hands with the display")),
        Err(_) => fail!("expected the display to shake hands within {PATIENCE:?}, but it did not"),
    }
}

/// Requests the whole screen in an encoding, and checks that an update in it arrives (RFC 6143, 7.5 and 7.6).
async fn picture(stream: &mut BoxedStream, (width, height): (u16, u16), wanted: i32) -> Verdict {
    let talk = async {
        // SetEncodings: this one only. FramebufferUpdateRequest: all of it, now.
        stream.write_all(&[&[2, 0, 0, 1], wanted.to_be_bytes().as_slice()].concat()).await?;
        let mut ask = vec![3, 0, 0, 0, 0, 0];
        ask.extend(width.to_be_bytes());
        ask.extend(height.to_be_bytes());
        stream.write_all(&ask).await?;
        stream.flush().await?;
        match stream.read_u8().await? {
            0 => {}
            other => {
                return Err(io::Error::other(format!(
                    "expected an update of the screen, but found message {other}"
                )));
            }
        }
        stream.read_u8().await?;
        let rectangles = stream.read_u16().await?;
        let mut pixels = 0;
        for _ in 0..rectangles {
            let mut place = [0; 4];
            stream.read_exact(&mut place).await?;
            let (wide, high) = (stream.read_u16().await?, stream.read_u16().await?);
            let encoding = stream.read_i32().await?;
            if encoding != wanted {
                return Err(io::Error::other(format!(
                    "expected pixels in encoding {wanted}, but found encoding {encoding}"
                )));
            }
            let size = usize::from(wide) * usize::from(high);
            let length = match encoding {
                ZRLE => u64::from(stream.read_u32().await?),
                // 32 bits per pixel, which every current server announces in its greeting.
                _ => size as u64 * 4,
            };
            let read = tokio::io::copy(&mut (&mut *stream).take(length), &mut tokio::io::sink()).await?;
            if read < length {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            pixels += size;
        }
        Ok(pixels)
    };
    match tokio::time::timeout(PATIENCE, talk).await {
        Ok(Ok(pixels)) if pixels >= usize::from(width) * usize::from(height) => Ok(()),
        Ok(Ok(pixels)) => fail!("expected {width}x{height} pixels, but found {pixels}"),
        Ok(Err(error)) => fail!("expected a picture from the display, but found {error}"),
        Err(_) => fail!("expected a picture from the display within {PATIENCE:?}, but none came"),
    }
}

/// Screenshots are PNG images with a size, even if two are taken at once.
pub async fn pictures_of_the_screen_are_taken(rig: &Rig) -> Verdict {
    let booted = rig.shared().await?;
    for picture in join_all([booted.machine.screenshot(), booted.machine.screenshot()]).await {
        let picture = picture.during("take a picture of the screen")?;
        ensure!(
            picture.starts_with(b"\x89PNG\r\n\x1a\n"),
            "expected a PNG image, but found {} bytes",
            picture.len()
        );
        // The header is the first chunk (PNG specification, 11.2.2).
        let size = picture.get(16..24).unwrap_or_default();
        ensure!(size.iter().any(|byte| *byte > 0), "expected a picture of a size, but found {size:?}");
    }
    Ok(())
}

/// What the backend does not claim is reported as unsupported; what it claims is refused for a machine that is off.
pub async fn consoles_say_what_they_cannot_do(rig: &Rig) -> Verdict {
    let lab = rig.lab("consoles").await?;
    let machine = rig.machine(&*lab, "web").await?;
    answers(rig, &*machine, Some(ErrorKind::Conflict)).await?;
    machine.start().await.during("start a machine")?;
    answers(rig, &*machine, None).await?;
    if !rig.backend().capabilities().has(Capability::HttpDirectory) {
        let served = lab.serve(Site::new(BTreeMap::new(), |_| {})).await;
        refused(served, ErrorKind::Unsupported, "serve files, which is not claimed")?;
    }
    machine.stop(Stop::Kill).await.during("stop a machine")?;
    // A last screenshot may still exist.
    for (capability, answer) in connect(&*machine).await {
        if let (Capability::Display | Capability::Serial, true) =
            (capability, rig.backend().capabilities().has(capability))
        {
            drop(refused(answer, ErrorKind::Conflict, &format!("{capability} of a machine that ended"))?);
        }
    }
    lab.destroy().await.during("destroy the lab")
}

async fn connect(machine: &dyn Machine) -> [(Capability, Result<(), Error>); 3] {
    [
        (Capability::Display, machine.display().await.map(drop)),
        (Capability::Serial, machine.serial().await.map(drop)),
        (Capability::Screenshot, machine.screenshot().await.map(drop)),
    ]
}

/// Makes every kind of connection: those that are claimed have this result, the others are unsupported.
async fn answers(rig: &Rig, machine: &dyn Machine, claimed: Option<ErrorKind>) -> Verdict {
    for (capability, answer) in connect(machine).await {
        match (rig.backend().capabilities().has(capability), claimed) {
            (true, Some(kind)) => {
                drop(refused(answer, kind, &format!("{capability} of a machine that is off"))?);
            }
            (true, None) => answer.during(&format!("{capability} of a running machine"))?,
            (false, _) => {
                let error = fails(answer, &format!("{capability}, which is not claimed"))?;
                let kinds = [ErrorKind::Unsupported, ErrorKind::Conflict];
                ensure!(
                    kinds.contains(&error.kind()),
                    "{capability}, which is not claimed: expected Unsupported, but found {:?}",
                    error.kind()
                );
            }
        }
    }
    Ok(())
}
