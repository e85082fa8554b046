//! The cable between a port and a NIC: QEMU's stream netdev over a unix socket on which QEMU listens. It reconnects
//! whenever either end was away.

use super::{
    port::Port,
    stack::PortId,
    vpc::{MAX_FRAME, Vpc},
};
use std::{io, path::PathBuf, sync::Arc, time::Duration};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::UnixStream,
    sync::mpsc,
};

/// Number of bytes that are read at a time: several frames.
const READ_SIZE: usize = 256 << 10;
const _: () = assert!(READ_SIZE > MAX_FRAME + 4);
/// Pause before another attempt to connect to a socket on which nothing listens.
const RETRY_INTERVAL: Duration = Duration::from_millis(20);

/// Connects a NIC's socket to its port, again and again; signals `first` when connected for the first time.
pub(crate) async fn keep_connected(
    vpc: Arc<Vpc>,
    port_id: PortId,
    port: Arc<Port>,
    socket: PathBuf,
    first: mpsc::Sender<()>,
) {
    let _disconnect = Disconnect { vpc: Arc::clone(&vpc), port_id };
    let mut first = Some(first);
    loop {
        if let Ok(stream) = UnixStream::connect(&socket).await {
            if let Some(first) = first.take() {
                // The channel has room for each NIC.
                let _ = first.try_send(());
            }
            copy_frames(&vpc, port_id, &port, stream).await;
        }
        tokio::time::sleep(RETRY_INTERVAL).await;
    }
}

/// Copies frames between a NIC and its port until one of them is gone.
pub(crate) async fn copy_frames(
    vpc: &Arc<Vpc>,
    port_id: PortId,
    port: &Arc<Port>,
    stream: impl AsyncRead + AsyncWrite,
) {
    let (reader, writer) = tokio::io::split(stream);
    port.set_connected(true);
    let _disconnect = Disconnect { vpc: Arc::clone(vpc), port_id };
    let result = tokio::select! {
        result = read(vpc, port_id, reader) => result,
        result = write(port, writer) => result,
    };
    if let Err(error) = result {
        tracing::debug!(%error, ?port_id, "a NIC was disconnected");
    }
}

struct Disconnect {
    vpc: Arc<Vpc>,
    port_id: PortId,
}

impl Drop for Disconnect {
    fn drop(&mut self) {
        self.vpc.disconnected(self.port_id);
    }
}

async fn read(vpc: &Arc<Vpc>, port_id: PortId, mut reader: impl AsyncRead + Unpin) -> io::Result<()> {
    let mut buffer = vec![0; READ_SIZE];
    let mut buffered = 0;
    loop {
        let count = reader.read(&mut buffer[buffered..]).await?;
        if count == 0 {
            return Ok(());
        }
        buffered += count;
        let (consumed, full) = vpc.frames(port_id, &buffer[..buffered])?;
        buffer.copy_within(consumed..buffered, 0);
        buffered -= consumed;
        for port in full {
            port.wait_for_space().await;
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
