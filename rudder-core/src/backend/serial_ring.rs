//! The last bytes of an endless stream in bounded memory, for backends that keep what guests write to their serial consoles.

use std::collections::VecDeque;

/// A ring buffer of the last bytes of a serial console. Its limit bounds memory use, however much and however fast is written.
///
/// Positions count every byte that was ever written, so that several readers can follow at their own pace. A reader that falls
/// behind by more than the limit loses the oldest bytes and affects no other reader.
///
/// ```
/// use rudder_core::backend::SerialRing;
///
/// let mut ring = SerialRing::new(4);
/// ring.push(b"hello");
/// assert_eq!(ring.tail(3), b"llo");
/// assert_eq!(ring.since(0), b"ello");
/// assert_eq!(ring.since(4), b"o");
/// assert_eq!(ring.end(), 5);
/// ```
#[derive(Debug, Clone)]
pub struct SerialRing {
    bytes: VecDeque<u8>,
    end: u64,
    limit: usize,
}

impl SerialRing {
    /// Creates an empty ring that keeps at most `limit` bytes.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self { bytes: VecDeque::new(), end: 0, limit }
    }

    /// Appends bytes, dropping the oldest to make room.
    pub fn push(&mut self, bytes: &[u8]) {
        self.end += bytes.len() as u64;
        let kept = &bytes[bytes.len().saturating_sub(self.limit)..];
        let over = (self.bytes.len() + kept.len()).saturating_sub(self.limit);
        self.bytes.drain(..over);
        self.bytes.extend(kept);
    }

    /// Returns the position after the last byte: the number of bytes ever written.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.end
    }

    /// Returns the position of the oldest byte that is kept.
    #[must_use]
    pub fn start(&self) -> u64 {
        self.end - self.bytes.len() as u64
    }

    /// Returns at most the last `limit` bytes.
    #[must_use]
    pub fn tail(&self, limit: usize) -> Vec<u8> {
        self.bytes.iter().skip(self.bytes.len().saturating_sub(limit)).copied().collect()
    }

    /// Returns the bytes from a position to the end, or from the oldest byte that is still kept.
    #[must_use]
    pub fn since(&self, position: u64) -> Vec<u8> {
        let from_position = self.end.saturating_sub(position);
        self.tail(usize::try_from(from_position).unwrap_or(usize::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_ring_keeps_the_last_bytes(
            pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..20),
            limit in 0usize..64,
            asked in 0usize..80,
        ) {
            let mut ring = SerialRing::new(limit);
            let mut all = Vec::new();
            for piece in &pieces {
                let before = ring.end();
                ring.push(piece);
                all.extend_from_slice(piece);
                prop_assert_eq!(ring.since(before), &piece[piece.len().saturating_sub(limit)..]);
                prop_assert!(ring.bytes.len() <= limit);
            }
            prop_assert_eq!(ring.end(), all.len() as u64);
            prop_assert_eq!(ring.tail(asked), &all[all.len().saturating_sub(asked.min(limit))..]);
            prop_assert_eq!(ring.since(0), &all[all.len().saturating_sub(limit)..]);
        }
    }
}
