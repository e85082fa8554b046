//! The input of decoders: a blocking reader whose next bytes can be peeked at before a decoder consumes them.

use super::{CHUNK, Stop, read_error};
use rudder_core::Result;
use std::{
    io::{self, Read},
    pin::Pin,
    task::{Context, Poll},
};
use tokio::io::{AsyncBufRead, AsyncRead, ReadBuf};

/// A reader for use on a thread that may block.
pub(super) struct Source<R> {
    reader: R,
    buffer: Vec<u8>,
    /// Number of bytes of the buffer that were consumed.
    consumed: usize,
}

impl<R: Read> Source<R> {
    pub(super) fn new(reader: R) -> Self {
        Self { reader, buffer: Vec::with_capacity(CHUNK), consumed: 0 }
    }

    /// Returns at least this many of the next bytes, or fewer at the end.
    pub(super) fn peek(&mut self, count: usize) -> io::Result<&[u8]> {
        while self.buffer.len() - self.consumed < count {
            self.buffer.drain(..self.consumed);
            self.consumed = 0;
            let filled = self.buffer.len();
            self.buffer.resize(CHUNK, 0);
            let read = self.reader.read(&mut self.buffer[filled..]);
            self.buffer.truncate(filled + *read.as_ref().unwrap_or(&0));
            match read {
                Ok(0) => break,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(&self.buffer[self.consumed..])
    }

    /// Consumes zeros, up to the next nonzero byte.
    pub(super) fn skip_zeros(&mut self) -> io::Result<()> {
        loop {
            let next = self.peek(1)?;
            let zeros = next.iter().take_while(|byte| **byte == 0).count();
            let more = !next.is_empty() && zeros == next.len();
            self.consumed += zeros;
            if !more {
                return Ok(());
            }
        }
    }

    /// Consumes the rest, and returns its length; 0 if it was only zeros.
    pub(super) fn count_rest(&mut self, stop: &Stop) -> Result<u64> {
        let (mut count, mut zeros) = (0, true);
        loop {
            stop.check()?;
            let next = self.peek(1).map_err(read_error)?;
            if next.is_empty() {
                return Ok(if zeros { 0 } else { count });
            }
            count += next.len() as u64;
            zeros &= next.iter().all(|byte| *byte == 0);
            self.consumed = self.buffer.len();
        }
    }
}

impl<R: Read + Unpin> AsyncBufRead for Source<R> {
    fn poll_fill_buf(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<&[u8]>> {
        Poll::Ready(self.get_mut().peek(1))
    }

    fn consume(mut self: Pin<&mut Self>, count: usize) {
        self.consumed += count;
    }
}

impl<R: Read + Unpin> AsyncRead for Source<R> {
    fn poll_read(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let next = this.peek(1)?;
        let count = next.len().min(buffer.remaining());
        buffer.put_slice(&next[..count]);
        this.consumed += count;
        Poll::Ready(Ok(()))
    }
}
