//! The screen and the serial console, also with several readers.

use super::{
    NotPassed, Rig, TestResult,
    test_result::{During as _, ensure, expect_equal, fail, fails, refused},
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
const CONSOLE_LIMIT: Duration = Duration::from_secs(30);

/// Encodings of rectangles (RFC 6143, 7.7).
const RAW: i32 = 0;
const ZRLE: i32 = 16;

fn broken(what: &str) -> impl FnOnce(io::Error) -> NotPassed {
    move |error| NotPassed::Failed(format!("{what}: expected it to work, but found {error}"))
}

/// Reads until a text has arrived, and returns everything read; fails when the stream ends before.
pub(super) async fn until(stream: &mut BoxedStream, text: &str, who: &str) -> TestResult<String> {
    let mut received = Vec::new();
    let mut buffer = [0; 4096];
    let reading = async {
        loop {
            let read = stream.read(&mut buffer).await.map_err(broken("read the serial console"))?;
            ensure!(read > 0, "{who}: expected {text:?} on the serial console, but the stream ended");
            received.extend_from_slice(&buffer[..read]);
            let said = String::from_utf8_lossy(&received);
            if said.contains(text) {
                return Ok(said.into_owned());
            }
        }
    };
    match tokio::time::timeout(CONSOLE_LIMIT, reading).await {
        Ok(read) => read,
        Err(_) => fail!(
            "{who}: expected {text:?} on the serial console within {CONSOLE_LIMIT:?}, but found {:?}",
            String::from_utf8_lossy(&received)
        ),
    }
}

/// What the guest wrote to its serial console is kept, and at most the requested amount is returned.
pub async fn the_end_of_the_serial_output_is_kept(rig: &Rig) -> TestResult {
    let booted = rig.shared().await?;
    let tail = booted.machine.serial_tail(1 << 20).await.during("read the end of the serial console")?;
    if let Some(says) = rig.image()?.serial_says {
        let text = String::from_utf8_lossy(&tail);
        ensure!(text.contains(&says), "expected {says:?} on the serial console, but found {text:?}");
    }
    let short = booted.machine.serial_tail(5).await.during("read a part of it")?;
    ensure!(short.len() <= 5, "expected at most 5 bytes, but found {}", short.len());
    Ok(())
}

/// A client of the serial console that does not read delays neither the guest nor any other client, however much the
/// guest writes; the last output is kept, and as much of it as the contract requires.
pub async fn a_stalled_reader_blocks_no_one(rig: &Rig) -> TestResult {
    const LINE: usize = 1000;
    let booted = rig.shared().await?;
    let open = || async { booted.machine.serial().await.during("connect to the serial console") };
    let (idle, mut reader) = (open().await?, open().await?);
    let line = "=".repeat(LINE - 1);
    let lines = SERIAL_KEPT / LINE + 2;
    let flood = format!("i=0; while [ $i -lt {lines} ]; do echo {line}; i=$((i+1)); done >/dev/ttyS0; sync");
    let (wrote, log) = futures::join!(
        async {
            booted.run(&flood).await?;
            booted.run("echo after-the-flood >/dev/ttyS0").await
        },
        until(&mut reader, "after-the-flood", "the reader")
    );
    wrote?;
    log?;
    let tail = booted.machine.serial_tail(SERIAL_KEPT).await.during("read the end of the serial console")?;
    expect_equal(&tail.len(), &SERIAL_KEPT, "how much of the end of the serial console is kept")?;
    ensure!(
        String::from_utf8_lossy(&tail).contains("after-the-flood"),
        "expected the last output to be kept, but found other ones"
    );
    drop(idle);
    Ok(())
}

/// Several clients read the serial console at once, and each gets everything; one that leaves, or that does not read,
/// disturbs no other.
pub async fn several_readers_share_the_serial_console(rig: &Rig) -> TestResult {
    let booted = rig.shared().await?;
    let open = || async { booted.machine.serial().await.during("connect to the serial console") };
    let (mut one, mut two) = (open().await?, open().await?);
    let idle = open().await?;
    booted.run("echo to-both-of-you >/dev/ttyS0").await?;
    until(&mut one, "to-both-of-you", "the first reader").await?;
    until(&mut two, "to-both-of-you", "the second reader").await?;
    drop(one);
    booted.run("echo to-who-stayed >/dev/ttyS0").await?;
    until(&mut two, "to-who-stayed", "the remaining reader").await?;
    let mut three = open().await?;
    booted.run("echo to-who-came-late >/dev/ttyS0").await?;
    until(&mut two, "to-who-came-late", "the remaining reader").await?;
    until(&mut three, "to-who-came-late", "the late reader").await?;
    drop(idle);
    let tail = booted.machine.serial_tail(4096).await.during("read the end of the serial console")?;
    let tail = String::from_utf8_lossy(&tail);
    ensure!(tail.contains("to-who-came-late"), "expected the last output to be kept, but found {tail:?}");
    Ok(())
}

/// What is typed on the serial console arrives: a terminal echoes it.
pub async fn input_to_the_serial_console_arrives(rig: &Rig) -> TestResult {
    let booted = rig.shared().await?;
    let mut stream = booted.machine.serial().await.during("connect to the serial console")?;
    let typed = async {
        stream.write_all(b"typed-by-the-suite\n").await?;
        stream.flush().await
    };
    typed.await.map_err(broken("type on the serial console"))?;
    until(&mut stream, "typed-by-the-suite", "the writer").await.map(drop)
}

/// Several clients connect to the screen at once; each receives its size and an update, even after another has left.
pub async fn several_viewers_share_the_display(rig: &Rig) -> TestResult {
    let booted = rig.shared().await?;
    let open = || async { booted.machine.display().await.during("connect to the display") };
    let (mut one, mut two) = (open().await?, open().await?);
    let sizes = [rfb_handshake(&mut one).await?, rfb_handshake(&mut two).await?];
    expect_equal(&sizes[0], &sizes[1], "the size of the screen for two viewers")?;
    ensure!(sizes[0].0 > 0 && sizes[0].1 > 0, "expected a screen with a size, but found {:?}", sizes[0]);
    screenshot(&mut one, sizes[0], RAW).await?;
    screenshot(&mut two, sizes[1], RAW).await?;
    drop(one);
    screenshot(&mut two, sizes[1], RAW).await?;
    let mut three = open().await?;
    let size = rfb_handshake(&mut three).await?;
    screenshot(&mut three, size, RAW).await?;
    screenshot(&mut two, sizes[1], RAW).await
}

/// The screen has the same pixels in every encoding, and a display that should be read compressed can be.
pub async fn a_compressed_screen_is_the_same(rig: &Rig) -> TestResult {
    let booted = rig.shared().await?;
    if booted.machine.display_encoding() == DisplayEncoding::Compressed {
        let mut stream = booted.machine.display().await.during("connect to the display")?;
        let size = rfb_handshake(&mut stream).await?;
        screenshot(&mut stream, size, ZRLE).await?;
    }
    let console = |encoding| Console::new(Arc::clone(&booted.machine)).encoding(encoding);
    let (raw, compressed) = (console(DisplayEncoding::Raw), console(DisplayEncoding::Compressed));
    if let Some(screen) = rig.image()?.screen {
        booted.run(&format!("echo compressed >{screen}")).await?;
        let shown = compressed.wait_text("compressed", CONSOLE_LIMIT).await;
        shown.during("read a text from the compressed screen")?;
    }
    let compare = async {
        // A cursor may blink between the two.
        while raw.framebuffer().await? != compressed.framebuffer().await? {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok::<_, Error>(())
    };
    match tokio::time::timeout(CONSOLE_LIMIT, compare).await {
        Ok(compared) => compared.during("read the screen"),
        Err(_) => {
            fail!("expected the same pixels raw and compressed within {CONSOLE_LIMIT:?}, but they differ")
        }
    }
}

/// Performs the handshake of RFB 3.8 without authentication, shared (RFC 6143, 7.1–7.3). Returns the size of the
/// screen.
async fn rfb_handshake(stream: &mut BoxedStream) -> TestResult<(u16, u16)> {
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
                "expected access without authentication, but found {kinds:?}"
            )));
        }
        stream.write_all(&[1]).await?;
        let result = stream.read_u32().await?;
        if result != 0 {
            return Err(io::Error::other(format!("expected access, but found result {result}")));
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
    match tokio::time::timeout(CONSOLE_LIMIT, talk).await {
        Ok(size) => size.map_err(broken("shake hands with the display")),
        Err(_) => fail!("expected the display to shake hands within {CONSOLE_LIMIT:?}, but it did not"),
    }
}

/// Requests the whole screen in an encoding, and checks that an update in it arrives (RFC 6143, 7.5 and 7.6).
async fn screenshot(stream: &mut BoxedStream, (width, height): (u16, u16), wanted: i32) -> TestResult {
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
    match tokio::time::timeout(CONSOLE_LIMIT, talk).await {
        Ok(Ok(pixels)) if pixels >= usize::from(width) * usize::from(height) => Ok(()),
        Ok(Ok(pixels)) => fail!("expected {width}x{height} pixels, but found {pixels}"),
        Ok(Err(error)) => fail!("expected an image from the display, but found {error}"),
        Err(_) => fail!("expected an image from the display within {CONSOLE_LIMIT:?}, but found none"),
    }
}

/// Screenshots are PNG images with a size, even if two are taken at once.
pub async fn screenshots_are_taken(rig: &Rig) -> TestResult {
    let booted = rig.shared().await?;
    for screenshot in join_all([booted.machine.screenshot(), booted.machine.screenshot()]).await {
        let screenshot = screenshot.during("take a screenshot")?;
        ensure!(
            screenshot.starts_with(b"\x89PNG\r\n\x1a\n"),
            "expected a PNG image, but found {} bytes",
            screenshot.len()
        );
        // The header is the first chunk (PNG specification, 11.2.2).
        let size = screenshot.get(16..24).unwrap_or_default();
        ensure!(size.iter().any(|byte| *byte > 0), "expected a screenshot with a size, but found {size:?}");
    }
    Ok(())
}

/// What the backend does not claim is reported as unsupported; what it claims is refused for a machine that is off.
pub async fn consoles_refuse_what_they_cannot_do(rig: &Rig) -> TestResult {
    let lab = rig.lab("consoles").await?;
    let machine = rig.machine(&*lab, "web").await?;
    connections_return(rig, &*machine, Some(ErrorKind::Conflict)).await?;
    machine.start().await.during("start a machine")?;
    connections_return(rig, &*machine, None).await?;
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
async fn connections_return(rig: &Rig, machine: &dyn Machine, claimed: Option<ErrorKind>) -> TestResult {
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
