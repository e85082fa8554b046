//! The cable between a port and a NIC: QEMU's stream netdev over a unix socket on which QEMU listens. It reconnects
//! whenever either end was away.

use super::{
    port::Port,
    stack::Place,
    vpc::{LONGEST_FRAME, Vpc},
};
use std::{io, path::PathBuf, sync::Arc, time::Duration};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::UnixStream,
    sync::mpsc,
};

/// Number of bytes that are read at a time: several frames.
const READ: usize = 256 << 10;
const _: () = assert!(READ > LONGEST_FRAME + 4);
/// Pause before another attempt to connect to a socket on which nothing listens.
const RETRY: Duration = Duration::from_millis(20);

/// Connects a NIC's socket to its port, again and again; signals `first` when connected for the first time.
pub(crate) async fn keep_plugged(
    vpc: Arc<Vpc>,
    place: Place,
    port: Arc<Port>,
    socket: PathBuf,
    first: mpsc::Sender<()>,
) {
    let _disconnect = Disconnect { vpc: Arc::clone(&vpc), place };
    let mut first = Some(first);
    loop {
        if let Ok(stream) = UnixStream::connect(&socket).await {
            if let Some(first) = first.take() {
                // The channel has room for each NIC.
                let _ = first.try_send(());
            }
            carry(&vpc, place, &port, stream).await;
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Copies frames between a NIC and its port until one of them is gone.
pub(crate) async fn carry(
    vpc: &Arc<Vpc>,
    place: Place,
    port: &Arc<Port>,
    stream: impl AsyncRead + AsyncWrite,
) {
    let (reader, writer) = tokio::io::split(stream);
    port.set_connected(true);
    let _disconnect = Disconnect { vpc: Arc::clone(vpc), place };
    let ended = tokio::select! {
        ended = read(vpc, place, reader) => ended,
        ended = write(port, writer) => ended,
    };
    if let Err(error) = ended {
        tracing::debug!(%error, ?place, "a NIC was disconnected");
    }
}

struct Disconnect {
    vpc: Arc<Vpc>,
    place: Place,
}

impl Drop for Disconnect {
    fn drop(&mut self) {
        self.vpc.disconnected(self.place);
    }
}

async fn read(vpc: &Arc<Vpc>, place: Place, mut reader: impl AsyncRead + Unpin) -> io::Result<()> {
    let mut buffer = vec![0; READ];
    let mut held = 0;
    loop {
        let count = reader.read(&mut buffer[held..]).await?;
        if count == 0 {
            return Ok(());
        }
        held += count;
        let (taken, full) = vpc.frames(place, &buffer[..held])?;
        buffer.copy_within(taken..held, 0);
        held -= taken;
        for port in full {
            port.drained().await;
        }
        // Lets other tasks run during a flood.
        tokio::task::consume_budget().await;
    }
}

async fn write(port: &Port, mut writer: impl AsyncWrite + Unpin) -> io::Result<()> {
    let mut batch = Vec::new();
    loop {
        port.take(&mut batch).await;
        writer.write_all(&batch).await?;
    }
}
