//! Streams of a running machine: TCP ports of its guest, its serial console and its display.
//!
//! All of them are subresources of a `VirtualMachineInstance`, opened as web sockets ([`socket`]). KubeVirt allows one connection
//! to the serial console and one to the display, and a second one evicts the first. Rudder's contract allows any number of both,
//! so each machine has one hub for each, which holds the only connection and shares it:
//!
//! ```text
//! dial    ──────────────────▶ portforward/PORT   one connection each
//! serial  ─┬▶ SerialHub  ───▶ console            one connection, opened again when it breaks
//! log     ─┘
//! display ──▶ DisplayHub ───▶ vnc                one connection while there are viewers
//! ```

mod backoff;
pub(crate) mod display;
pub(crate) mod serial;
pub(crate) mod socket;
mod subresource;

pub(crate) use display::DisplayHub;
pub(crate) use serial::SerialHub;
pub(crate) use subresource::Subresource;

use futures::future::BoxFuture;
use rudder_core::{Result, backend::BoxedStream};
use std::sync::Arc;

/// Opens the connection that a hub shares. Called again when the connection breaks.
pub(crate) type Connect = Arc<dyn Fn() -> BoxFuture<'static, Result<BoxedStream>> + Send + Sync>;

/// Returns a [`Connect`] that opens a subresource of a `VirtualMachineInstance`.
pub(crate) fn connector(
    client: kube::Client,
    namespace: &str,
    instance: &str,
    subresource: Subresource,
) -> Connect {
    let path = subresource.path(namespace, instance);
    Arc::new(move || {
        let (client, path) = (client.clone(), path.clone());
        Box::pin(async move {
            match socket::open(&client, &path).await {
                Ok(stream) => Ok(Box::new(stream) as BoxedStream),
                Err(error) => Err(error.into_error(subresource.purpose())),
            }
        })
    })
}
