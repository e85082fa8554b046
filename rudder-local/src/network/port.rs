//! A port of a switch: the frames on their way to a NIC.

use std::sync::{
    Mutex, MutexGuard, PoisonError,
    atomic::{AtomicBool, Ordering},
};
use std::time::Duration;
use tokio::sync::Notify;

/// Bytes that may wait for a NIC that does not read; more is dropped, as a switch does.
const CAPACITY: usize = 4 << 20;
/// Bytes from which on its senders are held back.
const HIGH: usize = 512 << 10;
/// How long a sender is held back by a NIC that reads nothing at all; afterwards the NIC holds nobody back until it reads again.
const PATIENCE: Duration = Duration::from_millis(100);

/// A port of a switch.
#[derive(Debug, Default)]
pub(crate) struct Port {
    /// Frames, each behind its length as 32 bits (QEMU's stream netdev).
    queue: Mutex<Vec<u8>>,
    ready: Notify,
    room: Notify,
    connected: AtomicBool,
    stalled: AtomicBool,
}

impl Port {
    fn queue(&self) -> MutexGuard<'_, Vec<u8>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes note of whether a NIC is connected. Frames for a NIC that is not are dropped.
    pub(crate) fn set_connected(&self, connected: bool) {
        if !connected {
            self.queue().clear();
        }
        self.connected.store(connected, Ordering::Relaxed);
        self.stalled.store(false, Ordering::Relaxed);
        self.room.notify_waiters();
    }

    pub(crate) fn is_connected(&self) -> bool {
        self.connected.load(Ordering::Relaxed)
    }

    /// Puts a frame, in pieces, at the end of the queue; whether senders should wait.
    pub(crate) fn push(&self, pieces: &[&[u8]]) -> bool {
        let length: usize = pieces.iter().map(|piece| piece.len()).sum();
        let Ok(head) = u32::try_from(length) else { return false };
        if !self.is_connected() {
            return false;
        }
        let mut queue = self.queue();
        if queue.len() + length + 4 > CAPACITY {
            return true;
        }
        queue.extend(head.to_be_bytes());
        pieces.iter().for_each(|piece| queue.extend_from_slice(piece));
        queue.len() > HIGH
    }

    /// How many bytes wait.
    #[cfg(test)]
    pub(crate) fn queued(&self) -> usize {
        self.queue().len()
    }

    /// Lets the frames out.
    pub(crate) fn flush(&self) {
        self.ready.notify_one();
    }

    /// Waits for frames, and takes them all.
    pub(crate) async fn take(&self, batch: &mut Vec<u8>) {
        batch.clear();
        loop {
            std::mem::swap(&mut *self.queue(), batch);
            self.stalled.store(false, Ordering::Relaxed);
            self.room.notify_waiters();
            if !batch.is_empty() {
                return;
            }
            self.ready.notified().await;
        }
    }

    /// Holds a sender back while the queue is long.
    pub(crate) async fn drained(&self) {
        if self.stalled.load(Ordering::Relaxed) {
            return;
        }
        let drained = async {
            loop {
                let mut room = std::pin::pin!(self.room.notified());
                room.as_mut().enable();
                if self.queue().len() <= HIGH {
                    return;
                }
                room.await;
            }
        };
        if tokio::time::timeout(PATIENCE, drained).await.is_err() {
            self.stalled.store(true, Ordering::Relaxed);
        }
    }
}
