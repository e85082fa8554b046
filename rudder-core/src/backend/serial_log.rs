//! The serial console as a log: what a guest has written since it was powered on, from any position, and what it writes from now
//! on.

use super::SerialRing;
use crate::{Error, Result};
use bytes::Bytes;
use futures::{StreamExt as _, stream};
use std::{
    fmt, io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _},
    sync::watch,
};
use tokio_util::io::StreamReader;

/// Output of a guest on its serial console, from a given position. The stream ends with the power-on that it belongs to.
///
/// Positions count the bytes that were written since the machine was powered on.
#[non_exhaustive]
pub struct SerialLog {
    /// Identifies the power-on: two logs of one machine with the same number belong to the same power-on.
    pub power_on: u64,
    /// The position of the first byte of the stream.
    pub start: u64,
    /// The position after the last byte that had been written when the log was opened.
    pub end: u64,
    /// The bytes. A reader that falls too far behind loses the oldest bytes that are no longer kept.
    pub stream: Box<dyn AsyncRead + Send + Unpin>,
}

impl SerialLog {
    /// Creates a log whose stream yields `end - start` bytes at once, followed by what is written later.
    pub fn new(power_on: u64, start: u64, end: u64, stream: impl AsyncRead + Send + Unpin + 'static) -> Self {
        Self { power_on, start, end, stream: Box::new(stream) }
    }

    /// Creates the log of a machine that was never powered on.
    #[must_use]
    pub fn empty() -> Self {
        Self::new(0, 0, 0, tokio::io::empty())
    }

    /// Reads at most the last `limit` bytes that had been written when the log was opened.
    ///
    /// # Errors
    /// The error of the stream.
    pub async fn tail(self, limit: usize) -> Result<Vec<u8>> {
        let mut ring = SerialRing::new(limit);
        let mut written = self.stream.take(self.end.saturating_sub(self.start));
        let mut piece = [0; 4096];
        loop {
            match written.read(&mut piece).await {
                Ok(0) => return Ok(ring.tail(limit)),
                Ok(count) => ring.push(&piece[..count]),
                Err(error) => return Err(Error::io("read the serial console", error)),
            }
        }
    }
}

impl fmt::Debug for SerialLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { power_on, start, end, .. } = self;
        f.debug_struct("SerialLog")
            .field("power_on", power_on)
            .field("start", start)
            .field("end", end)
            .finish_non_exhaustive()
    }
}

/// The record of one power-on, for backends: one side appends what the guest writes, and any number of readers follow. Keeps only
/// the last bytes, in bounded memory. Clones share the same record.
#[derive(Debug, Clone)]
pub struct SerialRecord(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    power_on: u64,
    ring: Mutex<SerialRing>,
    /// Notifies readers of every write; true once no more bytes will arrive.
    over: watch::Sender<bool>,
}

impl SerialRecord {
    /// Creates the record of a new power-on, which keeps at most `limit` bytes.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        static POWER_ONS: AtomicU64 = AtomicU64::new(1);
        Self(Arc::new(Inner {
            power_on: POWER_ONS.fetch_add(1, Ordering::Relaxed),
            ring: Mutex::new(SerialRing::new(limit)),
            over: watch::Sender::new(false),
        }))
    }

    fn ring(&self) -> MutexGuard<'_, SerialRing> {
        self.0.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Appends what the guest wrote.
    pub fn write(&self, bytes: &[u8]) {
        self.ring().push(bytes);
        self.0.over.send_modify(|_| {});
    }

    /// Marks the record as complete: each log ends once it has been read to the end.
    pub fn close(&self) {
        self.0.over.send_replace(true);
    }

    /// Returns whether the record is complete.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        *self.0.over.borrow()
    }

    /// Waits until the record is complete.
    pub async fn closed(&self) {
        // The sender lives as long as `self`.
        let _ = self.0.over.subscribe().wait_for(|over| *over).await;
    }

    /// Waits until the record has no readers.
    pub async fn unread(&self) {
        self.0.over.closed().await;
    }

    /// Returns the position after the last byte.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.ring().end()
    }

    /// Returns at most the last `limit` bytes.
    #[must_use]
    pub fn tail(&self, limit: usize) -> Vec<u8> {
        self.ring().tail(limit)
    }

    /// Returns the log from a position, or from the oldest byte that is still kept.
    #[must_use]
    pub fn log(&self, from: u64) -> SerialLog {
        let over = self.0.over.subscribe();
        let (start, end) = {
            let ring = self.ring();
            (from.clamp(ring.start(), ring.end()), ring.end())
        };
        let next = |(record, mut over, position): (Self, watch::Receiver<bool>, u64)| async move {
            loop {
                // Checked before the ring is read, so that everything written up to this point is found in it.
                let is_over = *over.borrow_and_update();
                let (fresh, end) = {
                    let ring = record.ring();
                    (ring.since(position), ring.end())
                };
                if !fresh.is_empty() {
                    return Some((io::Result::Ok(Bytes::from(fresh)), (record, over, end)));
                }
                if is_over || over.changed().await.is_err() {
                    return None;
                }
            }
        };
        let pieces = stream::unfold((self.clone(), over, start), next).boxed();
        SerialLog::new(self.0.power_on, start, end, StreamReader::new(pieces))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[tokio::test]
    async fn a_log_starts_at_its_position_and_ends_with_its_record() {
        let record = SerialRecord::new(4);
        record.write(b"hello");
        let log = record.log(2);
        assert_eq!((log.start, log.end), (2, 5));
        let oldest = record.log(0);
        assert_eq!((oldest.start, oldest.end), (1, 5));
        assert_eq!(oldest.tail(3).await.unwrap(), b"llo");
        assert_eq!(record.log(9).start, 5);
        let read = async {
            let (mut stream, mut all) = (log.stream, Vec::new());
            stream.read_to_end(&mut all).await.unwrap();
            all
        };
        let write = async {
            record.write(b"!");
            tokio::task::yield_now().await;
            record.write(b"?");
            record.close();
            record.closed().await;
        };
        let (read, ()) = tokio::join!(read, write);
        assert_eq!(read, b"llo!?");
        record.unread().await;
        assert_ne!(SerialRecord::new(4).log(0).power_on, record.log(0).power_on);
    }
}
