//! What connects to a machine in memory besides SSH and its display: its serial console, an echo, and somebody who says nothing.

use super::{Counted, machine::MachineCore};
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
use tokio_util::sync::CancellationToken;

/// Carries what is written on the serial console, from power-on until the power is off, and what is typed there.
pub(super) fn console(core: Arc<MachineCore>, far: DuplexStream) {
    let connection = core.shared.connection();
    let mut log = core.serial_log(0).stream;
    tokio::spawn(async move {
        let _connection = connection;
        let (mut reader, mut writer) = tokio::io::split(far);
        let typing = async {
            // What is typed is shown, as a terminal does, and forgotten.
            while let Some(typed) = typed(&mut reader).await {
                core.say(&typed);
            }
        };
        tokio::select! {
            // A reader that is gone is no failure.
            _ = tokio::io::copy(&mut log, &mut writer) => {}
            () = typing => {}
        }
    });
}

/// What the other side sends; `None` when it is gone.
async fn typed(stream: &mut (impl AsyncRead + Unpin)) -> Option<Vec<u8>> {
    let mut buffer = [0; 256];
    match stream.read(&mut buffer).await {
        Ok(count @ 1..) => Some(buffer[..count].to_vec()),
        _ => None,
    }
}

/// Sends back what comes, until that ends.
pub(super) fn echo(far: DuplexStream, token: CancellationToken, connection: Counted) {
    tokio::spawn(async move {
        let _connection = connection;
        let (mut reader, mut writer) = tokio::io::split(far);
        let echoing = async {
            // A side that is gone ends it; there is nobody to tell.
            let _ = tokio::io::copy(&mut reader, &mut writer).await;
            let _ = writer.shutdown().await;
        };
        tokio::select! {
            () = token.cancelled() => {}
            () = echoing => {}
        }
    });
}

/// Holds a connection open and says nothing.
pub(super) fn hold(mut far: DuplexStream, token: CancellationToken, connection: Counted) {
    tokio::spawn(async move {
        let _connection = connection;
        loop {
            tokio::select! {
                () = token.cancelled() => break,
                typed = typed(&mut far) => if typed.is_none() { break },
            }
        }
    });
}
