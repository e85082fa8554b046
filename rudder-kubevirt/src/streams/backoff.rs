//! Delays between attempts to open a connection again.

use std::time::Duration;
use tokio::time::Instant;

/// The first delay.
const FIRST: Duration = Duration::from_millis(100);
/// The longest delay.
const LONGEST: Duration = Duration::from_secs(5);
/// A connection that lasted this long was a good one: the next delay is short again.
const STABLE: Duration = Duration::from_secs(10);
/// How long attempts may fail before the connection is given up: longer than an API server takes to restart.
const LIMIT: Duration = Duration::from_secs(120);

/// The state of a connection that is opened again and again. Delays double, and are random between a half and the whole of that,
/// so that the machines of a cluster do not all come back at the same moment.
#[derive(Debug)]
pub(super) struct Backoff {
    delay: Duration,
    failing_since: Option<Instant>,
}

impl Backoff {
    pub(super) fn new() -> Self {
        Self { delay: FIRST, failing_since: None }
    }

    /// Returns the delay after an attempt that failed; `None` when they have failed for too long.
    pub(super) fn after_failure(&mut self) -> Option<Duration> {
        let since = *self.failing_since.get_or_insert_with(Instant::now);
        (since.elapsed() < LIMIT).then(|| self.next())
    }

    /// Returns the delay after a connection that was open for some time. Short ones grow the delay: somebody else may use the
    /// console, and evicting each other in turn would serve no one.
    pub(super) fn after_connection(&mut self, lasted: Duration) -> Duration {
        self.failing_since = None;
        if lasted >= STABLE {
            self.delay = FIRST;
        }
        self.next()
    }

    fn next(&mut self) -> Duration {
        let delay = self.delay;
        self.delay = (2 * delay).min(LONGEST);
        delay.mul_f64(0.5 + rand::random::<f64>() / 2.0)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use tokio::time::sleep;

    #[tokio::test(start_paused = true)]
    async fn delays_grow_and_failures_end() {
        let mut backoff = Backoff::new();
        let mut delays = Vec::new();
        while let Some(delay) = backoff.after_failure() {
            delays.push(delay);
            sleep(delay).await;
        }
        assert!(delays[0] <= FIRST, "{delays:?}");
        assert!(delays.iter().all(|delay| *delay <= LONGEST));
        let total: Duration = delays.iter().sum();
        assert!(total >= LIMIT && total < LIMIT + LONGEST, "{total:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn only_a_connection_that_lasted_makes_delays_short_again() {
        let mut backoff = Backoff::new();
        for _ in 0..20 {
            backoff.after_connection(Duration::ZERO);
        }
        assert!(backoff.after_connection(Duration::ZERO) >= LONGEST / 2);
        assert!(backoff.after_connection(STABLE) <= FIRST);
        // Success counts for the limit, however short it was.
        backoff.after_failure().unwrap();
        sleep(LIMIT).await;
        backoff.after_connection(Duration::ZERO);
        assert!(backoff.after_failure().is_some());
    }
}
