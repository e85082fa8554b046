//! What connects to a machine in memory besides SSH and its display: its serial console, an echo, and somebody who says nothing.

use super::{Counted, machine::MachineCore};
use std::sync::Arc;
use tokio::io::{AsyncWriteExt as _, DuplexStream};
use tokio_util::sync::CancellationToken;

/// Says what is written on the serial console, from power-on until the power is off.
pub(super) fn console(core: Arc<MachineCore>, power: CancellationToken, mut far: DuplexStream) {
    let connection = core.shared.connection();
    tokio::spawn(async move {
        let _connection = connection;
        let mut changed = core.serial_changes();
        let mut position = 0;
        loop {
            // Before it is read: what was written until then is found.
            let gone = power.is_cancelled();
            let (fresh, end) = core.written_since(position);
            position = end;
            let write = async { far.write_all(&fresh).await.is_err() || far.flush().await.is_err() };
            if write.await || gone {
                break;
            }
            tokio::select! {
                () = power.cancelled() => {}
                ok = changed.changed() => if ok.is_err() { break },
                // What is typed on the console is shown, as a terminal does, and forgotten; its end is the end.
                typed = typed(&mut far) => match typed {
                    Some(typed) => core.say(&typed),
                    None => break,
                },
            }
        }
    });
}

/// What the other side sends; `None` when it is gone.
async fn typed(stream: &mut DuplexStream) -> Option<Vec<u8>> {
    use tokio::io::AsyncReadExt as _;
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
