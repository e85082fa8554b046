//! A port of a switch: the queue of frames to a NIC.

use std::sync::{
    Mutex, MutexGuard, PoisonError,
    atomic::{AtomicBool, Ordering},
};
use std::time::Duration;
use tokio::sync::Notify;

/// Number of bytes that may wait for a NIC that does not read; further frames are dropped, as by a switch.
const CAPACITY: usize = 4 << 20;
/// Number of queued bytes above which senders are held back.
const HIGH_WATER_MARK: usize = 512 << 10;
/// How long a NIC that reads nothing at all holds back a sender; afterwards it holds back none until it reads again.
const STALL_LIMIT: Duration = Duration::from_millis(100);

/// A port of a switch.
#[derive(Debug, Default)]
pub(crate) struct Port {
    /// Frames, each preceded by its length in 32 bits (QEMU's stream netdev).
    queue: Mutex<Vec<u8>>,
    ready: Notify,
    space: Notify,
    connected: AtomicBool,
    stalled: AtomicBool,
}

impl Port {
    fn queue(&self) -> MutexGuard<'_, Vec<u8>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets whether a NIC is connected. Frames for a NIC that is not connected are dropped.
    pub(crate) fn set_connected(&self, connected: bool) {
        if !connected {
            self.queue().clear();
        }
        self.connected.store(connected, Ordering::Relaxed);
        self.stalled.store(false, Ordering::Relaxed);
        self.space.notify_waiters();
    }

    pub(crate) fn is_connected(&self) -> bool {
        self.connected.load(Ordering::Relaxed)
    }

    /// Appends a frame, given in pieces, to the queue; returns whether senders should wait.
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
        queue.len() > HIGH_WATER_MARK
    }

    /// Returns the number of queued bytes.
    #[cfg(test)]
    pub(crate) fn queued(&self) -> usize {
        self.queue().len()
    }

    /// Signals that frames can be taken.
    pub(crate) fn flush(&self) {
        self.ready.notify_one();
    }

    /// Waits for frames, and takes all of them.
    pub(crate) async fn take(&self, batch: &mut Vec<u8>) {
        batch.clear();
        loop {
            std::mem::swap(&mut *self.queue(), batch);
            self.stalled.store(false, Ordering::Relaxed);
            self.space.notify_waiters();
            if !batch.is_empty() {
                return;
            }
            self.ready.notified().await;
        }
    }

    /// Waits while the queue is long, to hold a sender back.
    pub(crate) async fn wait_for_space(&self) {
        if self.stalled.load(Ordering::Relaxed) {
            return;
        }
        let drained = async {
            loop {
                let mut space = std::pin::pin!(self.space.notified());
                space.as_mut().enable();
                if self.queue().len() <= HIGH_WATER_MARK {
                    return;
                }
                space.await;
            }
        };
        if tokio::time::timeout(STALL_LIMIT, drained).await.is_err() {
            self.stalled.store(true, Ordering::Relaxed);
        }
    }
}
