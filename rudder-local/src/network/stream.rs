//! A TCP connection with a guest, as a Tokio stream.

use super::vpc::Vpc;
use smoltcp::{
    iface::SocketHandle,
    socket::tcp::{RecvError, State},
};
use std::{
    fmt, io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// A TCP connection with a guest. Each side can be shut down separately; dropping it closes the rest gracefully.
pub struct GuestStream {
    vpc: Arc<Vpc>,
    handle: SocketHandle,
}

impl fmt::Debug for GuestStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestStream").field("vpc", &self.vpc.name()).field("handle", &self.handle).finish()
    }
}

impl GuestStream {
    pub(crate) fn new(vpc: Arc<Vpc>, handle: SocketHandle) -> Self {
        Self { vpc, handle }
    }

    /// Waits until the guest has accepted or refused the connection.
    pub(crate) async fn connected(&self) -> io::Result<()> {
        std::future::poll_fn(|cx| {
            let mut inner = self.vpc.lock();
            let socket = inner.stack.socket(self.handle);
            match socket.state() {
                State::SynSent | State::SynReceived => {
                    socket.register_send_waker(cx.waker());
                    Poll::Pending
                }
                State::Closed => Poll::Ready(Err(io::ErrorKind::ConnectionRefused.into())),
                _ => Poll::Ready(Ok(())),
            }
        })
        .await
    }

    /// Resets the connection.
    pub(crate) fn abort(&self) {
        let mut inner = self.vpc.lock();
        inner.stack.socket(self.handle).abort();
        inner.poll();
    }
}

impl AsyncRead for GuestStream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if buffer.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        let mut inner = self.vpc.lock();
        let socket = inner.stack.socket(self.handle);
        match socket.recv_slice(buffer.initialize_unfilled()) {
            Ok(0) => {}
            Ok(length) => {
                buffer.advance(length);
                // The guest may send more.
                inner.poll();
                return Poll::Ready(Ok(()));
            }
            Err(RecvError::Finished) => return Poll::Ready(Ok(())),
            Err(RecvError::InvalidState) if socket.is_active() => {}
            Err(RecvError::InvalidState) => return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into())),
        }
        socket.register_recv_waker(cx.waker());
        Poll::Pending
    }
}

impl AsyncWrite for GuestStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        if data.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let mut inner = self.vpc.lock();
        let socket = inner.stack.socket(self.handle);
        let opening = matches!(socket.state(), State::Listen | State::SynSent | State::SynReceived);
        match socket.send_slice(data) {
            Ok(0) => {}
            Ok(length) => {
                inner.poll();
                return Poll::Ready(Ok(length));
            }
            Err(_) if opening => {}
            Err(_) if socket.state() == State::Closed => {
                return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
            }
            Err(_) => return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
        }
        socket.register_send_waker(cx.waker());
        Poll::Pending
    }

    /// Returns at once: written data is sent immediately.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut inner = self.vpc.lock();
        inner.stack.socket(self.handle).close();
        inner.poll();
        Poll::Ready(Ok(()))
    }
}

impl Drop for GuestStream {
    fn drop(&mut self) {
        let mut inner = self.vpc.lock();
        inner.stack.close(self.handle);
        inner.poll();
    }
}
