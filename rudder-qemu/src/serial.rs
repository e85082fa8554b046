//! Readers of the serial console, any number at once.
//!
//! QEMU's socket serves one client at a time. So what the guest writes is read from the record that QEMU keeps of it, which
//! everybody may read, and the socket is only taken to type, for as long as somebody does: a person who holds it with
//! `nc -U` disturbs no reader, and is not disturbed.

use rudder_core::backend::BoxedStream;
use std::{io, path::PathBuf, time::Duration};
use tokio::{
    fs::File,
    io::{AsyncReadExt, AsyncSeekExt, AsyncWriteExt, DuplexStream, ReadHalf, WriteHalf},
    net::{UnixStream, unix::OwnedWriteHalf},
    sync::watch,
};
use tokio_util::task::AbortOnDropHandle;

/// How often is looked whether the guest has written something.
const LOOK: Duration = Duration::from_millis(20);
/// How much is carried at once, in bytes.
const PIECE: usize = 16 << 10;

/// Connects a new reader: it gets what the guest writes from now on, until the machine is in a phase in which it does not
/// run.
///
/// # Errors
/// File errors.
pub async fn connect_serial<P: Send + Sync + 'static>(
    record: PathBuf,
    socket: PathBuf,
    phase: watch::Receiver<P>,
    runs: fn(&P) -> bool,
) -> io::Result<BoxedStream> {
    let mut record = File::open(record).await?;
    record.seek(io::SeekFrom::End(0)).await?;
    let (near, far) = tokio::io::duplex(PIECE);
    let (typed, said) = tokio::io::split(far);
    tokio::spawn(async move {
        let mut ended = phase.clone();
        let typing = async {
            // Who cannot type any more may go on reading; only a side that is gone ends it.
            if carry_typed(typed, socket).await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            // A reader that is gone is no failure.
            _ = carry_said(record, said, phase, runs) => {}
            () = typing => {}
            // What it said last is carried on; a reader that does not take it does not keep it.
            () = async {
                let _ = ended.wait_for(|phase| !runs(phase)).await;
                tokio::time::sleep(Duration::from_secs(5)).await;
            } => {}
        }
    });
    Ok(Box::new(near))
}

/// Carries what the guest writes, until the machine has ended and everything was carried.
async fn carry_said<P>(
    mut record: File,
    mut said: WriteHalf<DuplexStream>,
    phase: watch::Receiver<P>,
    runs: fn(&P) -> bool,
) -> io::Result<()> {
    let mut piece = vec![0; PIECE];
    loop {
        // Before the look: what was written until then is found by it. A machine that is gone without a word has ended.
        let over = !runs(&phase.borrow()) || phase.has_changed().is_err();
        match record.read(&mut piece).await? {
            0 if over => return said.shutdown().await,
            0 => tokio::time::sleep(LOOK).await,
            count => said.write_all(&piece[..count]).await?,
        }
    }
}

/// Carries what is typed, over a connection that lasts while it is.
async fn carry_typed(mut typed: ReadHalf<DuplexStream>, socket: PathBuf) -> io::Result<()> {
    let mut line: Option<Line> = None;
    let mut piece = vec![0; PIECE];
    loop {
        let idle = tokio::time::sleep(Duration::from_secs(1));
        let count = tokio::select! {
            read = typed.read(&mut piece) => read?,
            // Another may want to type.
            () = idle, if line.is_some() => {
                line = None;
                continue;
            }
        };
        if count == 0 {
            return Ok(());
        }
        let open = match &mut line {
            Some(open) => open,
            None => line.insert(Line::open(&socket).await?),
        };
        open.writer.write_all(&piece[..count]).await?;
    }
}

/// A connection to QEMU's socket.
struct Line {
    writer: OwnedWriteHalf,
    /// What comes back is in the record, too; it is taken, so that QEMU does not wait.
    _drain: AbortOnDropHandle<()>,
}

impl Line {
    async fn open(socket: &std::path::Path) -> io::Result<Self> {
        let (mut reader, writer) = UnixStream::connect(socket).await?.into_split();
        let drain = tokio::spawn(async move {
            let _ = tokio::io::copy(&mut reader, &mut tokio::io::sink()).await;
        });
        Ok(Self { writer, _drain: AbortOnDropHandle::new(drain) })
    }
}
