//! Sessions that are closing. Some servers (dropbear 2022.82 to 2024.86) close a new session when the process of an old
//! one ends while it is being opened, so a new one waits until the old ones have ended.

use std::{sync::Arc, time::Duration};
use tokio::sync::watch;

/// Maximum wait for a server that does not end a session.
pub(super) const LIMIT: Duration = Duration::from_secs(5);

/// The number of sessions that are closing.
#[derive(Debug, Clone, Default)]
pub(super) struct ClosingChannels(Arc<watch::Sender<usize>>);

/// A closing session, until it is dropped.
#[derive(Debug)]
pub(super) struct ClosingChannel(ClosingChannels);

impl ClosingChannels {
    pub(super) fn begin(&self) -> ClosingChannel {
        self.0.send_modify(|count| *count += 1);
        ClosingChannel(self.clone())
    }

    /// Waits until none is left, for not much longer than [`LIMIT`].
    pub(super) async fn all_closed(&self) {
        let mut count = self.0.subscribe();
        let _ = tokio::time::timeout(2 * LIMIT, count.wait_for(|count| *count == 0)).await;
    }
}

impl Drop for ClosingChannel {
    fn drop(&mut self) {
        self.0.0.send_modify(|count| *count -= 1);
    }
}
