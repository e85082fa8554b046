//! Decisions without side effects: the deadline of a build, its error, and whether a failed build is retried.

use crate::{Error, ErrorKind, units::human_duration};
use std::{future::pending, sync::Arc, time::Duration};
use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};

/// The deadline of the whole build with all its attempts. It can be suspended. Clones share the same deadline.
#[derive(Debug, Clone)]
pub(super) struct Deadline {
    clock: Arc<watch::Sender<Clock>>,
    span: Duration,
}

#[derive(Debug, Clone, Copy)]
struct Clock {
    /// When the deadline passes if it runs on from now or, while it is suspended, from `since`.
    at: Instant,
    since: Instant,
    /// The number of holders that suspend it.
    holds: usize,
}

/// Suspends a deadline as long as it exists.
#[derive(Debug)]
pub(super) struct Hold(Deadline);

/// Longer than any build; a longer limit is as good as none.
const FOREVER: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

impl Deadline {
    /// Creates a deadline `span` after `start`.
    pub(super) fn new(start: Instant, span: Duration) -> Self {
        let clock = Clock { at: start + span.min(FOREVER), since: start, holds: 0 };
        Self { clock: Arc::new(watch::Sender::new(clock)), span }
    }

    /// Returns the remaining time.
    pub(super) fn left(&self, now: Instant) -> Duration {
        let clock = self.clock.borrow();
        let now = if clock.holds > 0 { clock.since } else { now };
        clock.at.saturating_duration_since(now)
    }

    /// Returns whether the deadline has passed.
    pub(super) fn has_passed(&self) -> bool {
        self.left(Instant::now()).is_zero()
    }

    /// Waits until the deadline has passed.
    pub(super) async fn passed(&self) {
        let mut changes = self.clock.subscribe();
        loop {
            let clock = *changes.borrow_and_update();
            let passing =
                async { if clock.holds > 0 { pending().await } else { sleep_until(clock.at).await } };
            tokio::select! {
                biased;
                () = passing => return,
                // `self` holds the sender, so this cannot be an error.
                _ = changes.changed() => {}
            }
        }
    }

    /// Suspends the deadline until the returned value is dropped.
    pub(super) fn hold(&self) -> Hold {
        self.clock.send_modify(|clock| {
            if clock.holds == 0 {
                clock.since = Instant::now();
            }
            clock.holds += 1;
        });
        Hold(self.clone())
    }

    /// Returns the error for a deadline that has passed.
    pub(super) fn error(&self) -> Error {
        let message = format!("the build did not end within {}", human_duration(self.span));
        Error::new(ErrorKind::TimedOut, message)
            .with_help("raise `timeout` in the manifest (it covers all attempts), or check the timings for what took so long")
            .with_retryable(false)
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.0.clock.send_modify(|clock| {
            clock.holds -= 1;
            if clock.holds == 0 {
                clock.at += clock.since.elapsed();
            }
        });
    }
}

/// Whether a failed build is started again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RetryDecision {
    /// Start this attempt, counted from 1.
    Again(u32),
    /// No further attempt.
    GiveUp,
}

/// Decides what follows after attempt number `attempt` (from 1) failed, when up to `retries` may follow the first.
pub(super) fn after_failure(attempt: u32, retries: u32, error: &Error, left: Duration) -> RetryDecision {
    let may = error.is_retryable() && error.kind() != ErrorKind::Cancelled && !left.is_zero();
    if may && attempt <= retries {
        RetryDecision::Again(attempt.saturating_add(1))
    } else {
        RetryDecision::GiveUp
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_error_names_the_limit_and_the_field_to_raise() {
        let error = Deadline::new(Instant::now(), Duration::from_secs(1800)).error();
        assert_eq!(error.to_string(), "the build did not end within 30m");
        assert!(!error.is_retryable() && error.help().is_some_and(|help| help.contains("`timeout`")));
    }

    proptest! {
        #[test]
        fn a_deadline_never_overflows(seconds in any::<u64>(), later in 0u64..1 << 40) {
            let now = Instant::now();
            let deadline = Deadline::new(now, Duration::from_secs(seconds));
            let left = deadline.left(now);
            prop_assert_eq!(left, Duration::from_secs(seconds).min(FOREVER));
            prop_assert!(deadline.left(now + left + Duration::from_secs(later)).is_zero());
        }

        #[test]
        fn a_build_is_retried_as_often_as_allowed(retries in 0u32..1000) {
            let error = Error::new(ErrorKind::MachineDied, "x");
            let mut attempt = 1;
            while let RetryDecision::Again(next) = after_failure(attempt, retries, &error, Duration::from_secs(1)) {
                prop_assert_eq!(next, attempt + 1);
                attempt = next;
            }
            prop_assert_eq!(attempt, retries + 1);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_held_deadline_is_suspended() {
        let start = Instant::now();
        let deadline = Deadline::new(start, Duration::from_secs(100));
        let waiting = tokio::spawn({
            let deadline = deadline.clone();
            async move { deadline.passed().await }
        });
        sleep_until(start + Duration::from_secs(60)).await;
        let (one, two) = (deadline.hold(), deadline.hold());
        sleep_until(start + Duration::from_secs(500)).await;
        drop(one);
        sleep_until(start + Duration::from_secs(1060)).await;
        assert_eq!(deadline.left(Instant::now()), Duration::from_secs(40));
        assert!(!deadline.has_passed() && !waiting.is_finished());
        drop(two);
        assert_eq!(deadline.left(Instant::now()), Duration::from_secs(40));
        waiting.await.expect("no panic");
        assert_eq!(start.elapsed(), Duration::from_secs(1100));
        assert!(deadline.has_passed());
    }

    #[test]
    fn failures_that_a_retry_cannot_help_are_not_retried() {
        let give_up = |error: Error, left| {
            assert_eq!(
                after_failure(1, 9, &error, Duration::from_secs(left)),
                RetryDecision::GiveUp,
                "{error:?}"
            );
        };
        give_up(Error::new(ErrorKind::ChecksumMismatch, "x"), 1);
        give_up(Error::new(ErrorKind::Cancelled, "x").with_retryable(true), 1);
        give_up(Error::new(ErrorKind::MachineDied, "x"), 0);
        give_up(Deadline::new(Instant::now(), Duration::ZERO).error(), 1);
    }
}
