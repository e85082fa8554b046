//! A stream that can be cut from outside, and that reports how much has arrived and what arrived first. The SSH library
//! moves the stream into a task of its own; cutting the stream ends that task at once when its connection is dropped.

use crate::backend::BoxedStream;
use std::{
    io,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::watch,
};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

/// The view of a stream from outside. Cuts the stream when dropped.
#[derive(Debug)]
pub(super) struct StreamWatch {
    cut: CancellationToken,
    received: Arc<watch::Sender<u64>>,
    beginning: Arc<Mutex<Vec<u8>>>,
}

/// How many of the first bytes are kept: a line from a server that refuses the connection.
const BEGINNING: usize = 200;

impl StreamWatch {
    /// Returns what a server sent that is not SSH, for people: `Exceeded MaxStartups`, for example.
    pub(super) fn text(&self) -> Option<String> {
        let bytes = self.beginning.lock().unwrap_or_else(PoisonError::into_inner);
        let text = String::from_utf8_lossy(&bytes);
        let line = text.lines().map(str::trim).find(|line| !line.is_empty())?;
        let shown: String = line.chars().filter(|c| !c.is_control()).collect();
        (!shown.starts_with("SSH-")).then_some(shown)
    }

    /// Returns a receiver of the number of bytes that have arrived from the guest.
    pub(super) fn received(&self) -> watch::Receiver<u64> {
        self.received.subscribe()
    }
}

impl Drop for StreamWatch {
    fn drop(&mut self) {
        self.cut.cancel();
    }
}

/// The stream itself.
pub(super) struct CuttableStream {
    inner: BoxedStream,
    cut: Pin<Box<WaitForCancellationFutureOwned>>,
    received: Arc<watch::Sender<u64>>,
    beginning: Arc<Mutex<Vec<u8>>>,
    count: AtomicU64,
}

/// Splits a stream into the stream to pass on and its watch.
pub(super) fn cuttable(inner: BoxedStream) -> (CuttableStream, StreamWatch) {
    let cut = CancellationToken::new();
    let received = Arc::new(watch::Sender::new(0));
    let beginning = Arc::default();
    let stream = CuttableStream {
        inner,
        cut: Box::pin(cut.clone().cancelled_owned()),
        received: Arc::clone(&received),
        beginning: Arc::clone(&beginning),
        count: AtomicU64::new(0),
    };
    (stream, StreamWatch { cut, received, beginning })
}

impl CuttableStream {
    fn poll_cut(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        match self.cut.as_mut().poll(cx) {
            Poll::Ready(()) => Err(io::Error::from(io::ErrorKind::ConnectionAborted)),
            Poll::Pending => Ok(()),
        }
    }
}

impl AsyncRead for CuttableStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.poll_cut(cx)?;
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.inner).poll_read(cx, buf);
        let came = buf.filled().len() - before;
        if came > 0 {
            let all = self.count.fetch_add(came as u64, Ordering::Relaxed) + came as u64;
            if all - (came as u64) < BEGINNING as u64 {
                let mut beginning = self.beginning.lock().unwrap_or_else(PoisonError::into_inner);
                let room = BEGINNING.saturating_sub(beginning.len()).min(came);
                beginning.extend_from_slice(&buf.filled()[before..before + room]);
            }
            self.received.send_replace(all);
        }
        polled
    }
}

impl AsyncWrite for CuttableStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_cut(cx)?;
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_cut(cx)?;
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}
