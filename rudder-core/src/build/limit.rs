//! Deciding without doing: when a build must have ended, what it says when it has not, and whether it is tried again.

use crate::{Error, ErrorKind, units::human_duration};
use std::time::Duration;
use tokio::time::Instant;

/// When the whole build must have ended, all its attempts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Deadline {
    pub(super) at: Instant,
    span: Duration,
}

/// Longer than any build; what is over it is as good as no limit.
const FOREVER: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

impl Deadline {
    /// `span` from `start`.
    pub(super) fn new(start: Instant, span: Duration) -> Self {
        Self { at: start + span.min(FOREVER), span }
    }

    /// What is left of it.
    pub(super) fn left(self, now: Instant) -> Duration {
        self.at.saturating_duration_since(now)
    }

    /// Whether it has passed.
    pub(super) fn has_passed(self) -> bool {
        self.left(Instant::now()).is_zero()
    }

    /// What it says when it has passed.
    pub(super) fn error(self) -> Error {
        let message = format!("the build did not end within {}", human_duration(self.span));
        Error::new(ErrorKind::TimedOut, message)
            .with_help("raise `timeout` of the manifest (it spans all attempts), or see in the timings what took so long")
            .with_retryable(false)
    }
}

/// Whether a build that failed is started again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// With this attempt, counted from 1.
    Again(u32),
    /// That was all.
    GiveUp,
}

/// Decides after attempt number `attempt` (from 1) failed, when up to `retries` may follow the first.
pub(super) fn after_failure(attempt: u32, retries: u32, error: &Error, left: Duration) -> Verdict {
    let may = error.is_retryable() && error.kind() != ErrorKind::Cancelled && !left.is_zero();
    if may && attempt <= retries { Verdict::Again(attempt.saturating_add(1)) } else { Verdict::GiveUp }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_limit_names_itself_and_the_field_to_raise() {
        let error = Deadline::new(Instant::now(), Duration::from_secs(1800)).error();
        assert_eq!(error.to_string(), "the build did not end within 30m");
        assert!(!error.is_retryable() && error.help().is_some_and(|help| help.contains("`timeout`")));
    }

    proptest! {
        #[test]
        fn a_deadline_never_overflows(seconds in any::<u64>(), later in 0u64..1 << 40) {
            let now = Instant::now();
            let deadline = Deadline::new(now, Duration::from_secs(seconds));
            prop_assert!(deadline.at >= now);
            prop_assert!(deadline.left(deadline.at + Duration::from_secs(later)).is_zero());
            prop_assert_eq!(deadline.left(now), Duration::from_secs(seconds).min(FOREVER));
        }

        #[test]
        fn a_build_is_tried_once_and_then_as_often_as_it_may(retries in 0u32..1000) {
            let error = Error::new(ErrorKind::MachineDied, "x");
            let mut attempt = 1;
            while let Verdict::Again(next) = after_failure(attempt, retries, &error, Duration::from_secs(1)) {
                prop_assert_eq!(next, attempt + 1);
                attempt = next;
            }
            prop_assert_eq!(attempt, retries + 1);
        }
    }

    #[test]
    fn what_a_retry_cannot_help_is_not_retried() {
        let give_up = |error: Error, left| {
            assert_eq!(after_failure(1, 9, &error, Duration::from_secs(left)), Verdict::GiveUp, "{error:?}");
        };
        give_up(Error::new(ErrorKind::ChecksumMismatch, "x"), 1);
        give_up(Error::new(ErrorKind::Cancelled, "x").with_retryable(true), 1);
        give_up(Error::new(ErrorKind::MachineDied, "x"), 0);
        give_up(Deadline::new(Instant::now(), Duration::ZERO).error(), 1);
    }
}
