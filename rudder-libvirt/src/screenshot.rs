//! Screenshots of domains.

use crate::connection::{Connection, domain};
use rudder_core::{Error, ErrorKind, Result};
use std::sync::Arc;
use virt::{connect::Connect, stream::Stream};

/// Takes a screenshot of a running domain, as PNG.
pub(crate) async fn screenshot(connection: &Arc<Connection>, name: &str) -> Result<Vec<u8>> {
    let name = name.to_owned();
    let take = move |connect: &Connect| {
        let stream = Stream::new(connect, 0)?;
        let kind = domain(connect, &name)?.screenshot(&stream, 0, 0)?;
        let (mut bytes, mut buffer) = (Vec::new(), vec![0; 1 << 16]);
        loop {
            match stream.recv(&mut buffer)? {
                0 => break,
                count => bytes.extend_from_slice(&buffer[..count]),
            }
        }
        stream.finish()?;
        Ok((kind, bytes))
    };
    let taken = connection.query(take).await;
    let (kind, bytes) =
        taken.map_err(|failure| failure.into_error(ErrorKind::Protocol, "take a screenshot"))?;
    if kind != "image/png" {
        let message = format!("expected a screenshot in image/png from libvirt, but found {kind}");
        return Err(
            Error::new(ErrorKind::Unsupported, message).with_help("use QEMU 7.1 and libvirt 8.9, or later")
        );
    }
    Ok(bytes)
}
