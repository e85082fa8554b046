//! Bounded waits for what the cluster offers no event for.

use super::error::{Error, Result};
use std::{
    fmt::Display,
    time::{Duration, Instant},
};

/// How long anything may take before a wait for it fails. A start takes seconds; this is for hosts that run other
/// tests at once.
const LIMIT: Duration = Duration::from_secs(120);

/// Interval between attempts.
const INTERVAL: Duration = Duration::from_millis(50);

/// A wait with an end.
pub(super) struct Deadline {
    what: String,
    until: Instant,
}

impl Deadline {
    /// Starts waiting for `what` ("the API server is ready").
    pub(super) fn new(what: impl Into<String>) -> Self {
        Self { what: what.into(), until: Instant::now() + LIMIT }
    }

    /// Waits until the next attempt. `found` is the result of the last one.
    ///
    /// # Errors
    ///
    /// The time is over.
    pub(super) async fn pause(&self, found: impl Display) -> Result<()> {
        if Instant::now() > self.until {
            let limit = LIMIT.as_secs();
            return Err(Error::new(format!(
                "expected that {} within {limit} s, but found: {found}",
                self.what
            )));
        }
        tokio::time::sleep(INTERVAL).await;
        Ok(())
    }
}
