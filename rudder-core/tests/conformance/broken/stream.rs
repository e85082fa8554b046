//! A connection with one fault.

use super::{Defect, Shared};
use rudder_core::backend::BoxedStream;
use std::{
    borrow::Cow,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// A connection that may have a fault.
pub(super) struct DefectiveStream {
    /// `None` once closed.
    inner: Option<BoxedStream>,
    shared: Arc<Shared>,
    /// Number of bytes read.
    read: usize,
    _hold: Option<Arc<()>>,
}

impl DefectiveStream {
    pub(super) fn new(inner: BoxedStream, shared: Arc<Shared>, hold: Option<Arc<()>>) -> Self {
        Self { inner: Some(inner), shared, read: 0, _hold: hold }
    }
}

/// Offset of the wrong byte.
const WRONG_BYTE: usize = (1 << 20) + 7;

/// Changes the request for an encoding in messages to a display (RFC 6143, 7.5.2).
fn raw_instead_of_zrle(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    if let [2, _, _, _, encodings @ ..] = bytes.as_mut_slice() {
        let zrle = encodings.chunks_exact_mut(4).filter(|encoding| *encoding == [0, 0, 0, 16]);
        zrle.for_each(|encoding| encoding.fill(0));
    }
    bytes
}

fn closed() -> io::Error {
    io::ErrorKind::BrokenPipe.into()
}

impl AsyncRead for DefectiveStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let Some(inner) = &mut self.inner else { return Poll::Ready(Ok(())) };
        let before = buffer.filled().len();
        ready!(Pin::new(inner).poll_read(context, buffer))?;
        let bytes = &mut buffer.filled_mut()[before..];
        let count = bytes.len();
        if let (Some(place), true) = (WRONG_BYTE.checked_sub(self.read), self.shared.is(Defect::FlipsABit))
            && let Some(byte) = bytes.get_mut(place)
        {
            *byte ^= 1;
        }
        self.read += count;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for DefectiveStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let bytes = match self.shared.is(Defect::PromisesCompression) {
            true => Cow::Owned(raw_instead_of_zrle(bytes)),
            false => Cow::Borrowed(bytes),
        };
        match &mut self.inner {
            Some(inner) => Pin::new(inner).poll_write(context, &bytes),
            None => Poll::Ready(Err(closed())),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.inner {
            Some(inner) => Pin::new(inner).poll_flush(context),
            None => Poll::Ready(Ok(())),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.shared.is(Defect::ClosesBothHalves) {
            self.inner = None;
        }
        if self.shared.is(Defect::LosesHalfClose) {
            return Poll::Ready(Ok(()));
        }
        match &mut self.inner {
            Some(inner) => Pin::new(inner).poll_shutdown(context),
            None => Poll::Ready(Ok(())),
        }
    }
}
