//! Connections to an in-memory machine other than SSH and its display: the serial console, an echo service, and a
//! silent service.

use super::{Counted, machine::MachineCore};
use std::{
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
use tokio_util::{
    io::{InspectReader, InspectWriter},
    sync::CancellationToken,
};

/// Serves a connection in a task, until it ends or is cut. The client notices an error when its stream ends.
pub(super) fn serve(cut: CancellationToken, connection: Counted, work: impl Future + Send + 'static) {
    tokio::spawn(async move {
        let _connection = connection;
        tokio::select! {
            () = cut.cancelled() => {}
            _ = work => {}
        }
    });
}

/// Connects a client to the serial console, from power-on until the power is off.
pub(super) fn console(core: Arc<MachineCore>, far: DuplexStream) {
    let connection = core.shared.connection();
    let mut log = core.serial_log(0).stream;
    tokio::spawn(async move {
        let _connection = connection;
        let (mut reader, mut writer) = tokio::io::split(far);
        let typing = async {
            // What is typed is echoed, as by a terminal, and discarded.
            let mut buffer = [0; 256];
            while let Ok(count @ 1..) = reader.read(&mut buffer).await {
                core.say(&buffer[..count]);
            }
        };
        tokio::select! {
            // A reader that is gone is not a failure.
            _ = tokio::io::copy(&mut log, &mut writer) => {}
            () = typing => {}
        }
    });
}

/// Sends back what arrives, until the other side ends.
pub(super) fn echo(far: DuplexStream, cut: CancellationToken, connection: Counted) {
    let (mut reader, mut writer) = tokio::io::split(far);
    serve(cut, connection, async move {
        let _ = tokio::io::copy(&mut reader, &mut writer).await;
        writer.shutdown().await
    });
}

/// Holds a connection open and sends nothing.
pub(super) fn hold(mut far: DuplexStream, cut: CancellationToken, connection: Counted) {
    serve(cut, connection, async move { tokio::io::copy(&mut far, &mut tokio::io::sink()).await });
}

/// Returns a stream that ends when it is cut, or when this many bytes have passed in either direction.
pub(super) fn cuttable(far: DuplexStream, cut: CancellationToken, limit: Option<u64>) -> DuplexStream {
    let (mut inner, outer) = tokio::io::duplex(64 << 10);
    let (passed, token) = (Arc::new(AtomicU64::new(0)), cut.clone());
    let count = move |bytes: &[u8]| {
        let bytes = bytes.len() as u64;
        let total = passed.fetch_add(bytes, Ordering::SeqCst) + bytes;
        if limit.is_some_and(|limit| total >= limit) {
            token.cancel();
        }
    };
    let (reader, writer) = tokio::io::split(far);
    let reader = InspectReader::new(reader, count.clone());
    let mut far = tokio::io::join(reader, InspectWriter::new(writer, count));
    tokio::spawn(async move {
        tokio::select! {
            () = cut.cancelled() => {}
            _ = tokio::io::copy_bidirectional(&mut far, &mut inner) => {}
        }
    });
    outer
}
