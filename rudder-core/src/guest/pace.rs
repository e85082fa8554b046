//! Decides when to try a login again. It has no side effects: the time is passed in.
//!
//! A port that refuses connections costs a booting guest nothing, so it is tried often. Every connection that a server
//! may have accepted costs the guest a process, which a guest under load takes seconds to start, and OpenSSH drops
//! connections at random when 10 of them have not logged in (sshd_config, `MaxStartups`). So few of them are open at a
//! time, each is given time, and one that was given up still counts for a while.

use std::{
    collections::{BTreeSet, VecDeque},
    time::Duration,
};
use tokio::time::Instant;

/// Maximum number of connections to a guest without a login, including those given up a moment ago.
const MAX_UNAUTHENTICATED: usize = 6;
/// Number of first attempts that follow each other at once: the guest may be up already, and have lost the first
/// packets.
const BURST: u64 = 4;
/// How long one attempt, the oldest, may wait for its first byte; OpenSSH itself hangs up after that time (sshd_config,
/// `LoginGraceTime`).
const FIRST_BYTE_LIMIT: Duration = Duration::from_secs(120);
/// The pause before another attempt beside one that the guest may still be working on.
const CONCURRENT_PAUSE: Duration = Duration::from_secs(20);

/// Why an attempt ended without a login.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum AttemptFailure {
    /// No connection, or one that was closed before the server sent anything: no process listens yet.
    Closed,
    /// The attempt was given up here.
    GivenUp,
    /// The server answered, and hung up before the credentials were tried.
    Broke,
    /// The server did not accept the credentials.
    Refused,
}

/// The attempts of one wait for a login.
#[derive(Debug)]
pub(super) struct Pace {
    start: Instant,
    not_before: Instant,
    /// No attempt begins before this: the server hung up or refused.
    held_until: Instant,
    attempts: u64,
    open: usize,
    /// Until when attempts that were given up may still occupy the guest.
    given_up: VecDeque<Instant>,
    oldest: Option<u64>,
    /// The attempt on which the server is answering.
    answering: Option<u64>,
    /// Attempts on which the server answered, and then fell silent.
    stalled: BTreeSet<u64>,
    last_data: Option<Instant>,
    breaking_since: Option<Instant>,
    refused_since: Option<Instant>,
}

/// Returns a pause proportional to the time waited so far.
fn proportional(waited: Duration, divisor: u32, lower: Duration, upper: Duration) -> Duration {
    (waited / divisor).clamp(lower, upper)
}

const fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

impl Pace {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            start: now,
            not_before: now,
            held_until: now,
            attempts: 0,
            open: 0,
            given_up: VecDeque::new(),
            oldest: None,
            answering: None,
            stalled: BTreeSet::new(),
            last_data: None,
            breaking_since: None,
            refused_since: None,
        }
    }

    /// Returns the number of attempts that began.
    pub(super) fn attempts(&self) -> u64 {
        self.attempts
    }

    /// Returns when the next attempt may begin; `None` if not before something changes.
    pub(super) fn next(&self, now: Instant) -> Option<Instant> {
        if self.answering.is_some() || self.open >= MAX_UNAUTHENTICATED {
            return None;
        }
        let mut lingering = self.given_up.iter().copied().filter(|end| *end > now);
        let over = (self.open + lingering.clone().count() + 1).saturating_sub(MAX_UNAUTHENTICATED);
        // This many of those that were given up must be gone first.
        let free = if over == 0 { Some(now) } else { lingering.nth(over - 1) };
        free.map(|free| free.max(self.not_before).max(self.held_until))
    }

    /// Begins an attempt. Returns its number, and how long it may wait for the first byte.
    pub(super) fn begin(&mut self, now: Instant) -> (u64, Duration) {
        self.attempts += 1;
        self.open += 1;
        self.given_up.retain(|end| *end > now);
        let patience = self.patience(now);
        let pause = match self.attempts {
            _ if !self.stalled.is_empty() => CONCURRENT_PAUSE,
            ..=BURST => millis(500),
            // As often as there is capacity for another, so that attempts are evenly spaced.
            _ => (patience + self.linger(now)) / MAX_UNAUTHENTICATED as u32,
        };
        self.not_before = now + pause;
        if self.oldest.is_none() {
            self.oldest = Some(self.attempts);
            return (self.attempts, FIRST_BYTE_LIMIT);
        }
        (self.attempts, patience)
    }

    /// Returns how long an attempt may wait for its first byte: a guest that is slow to boot is slow to answer.
    fn patience(&self, now: Instant) -> Duration {
        proportional(now - self.start, 2, millis(5000), millis(60_000))
    }

    /// Returns how long the guest may take to notice that an attempt was given up.
    fn linger(&self, now: Instant) -> Duration {
        proportional(now - self.start, 4, millis(2000), millis(20_000))
    }

    /// Records that data arrived on this attempt.
    pub(super) fn data_arrived(&mut self, number: u64, now: Instant) {
        self.stalled.remove(&number);
        self.answering.get_or_insert(number);
        self.last_data = Some(now);
    }

    /// Records that nothing arrived on this attempt for a while: the guest may have restarted, so others may be tried
    /// beside it.
    pub(super) fn stalls(&mut self, number: u64) {
        if self.answering == Some(number) {
            self.answering = None;
        }
        self.stalled.insert(number);
    }

    /// Whether the server is answering on another attempt than this.
    pub(super) fn is_overtaken(&self, number: u64) -> bool {
        self.answering.is_some_and(|answering| answering != number)
    }

    /// Records that the key exchange of an attempt has ended.
    pub(super) fn key_exchange_ended(&mut self) {
        self.breaking_since = None;
    }

    /// Returns how long to wait after credentials were refused.
    pub(super) fn refused(&mut self, now: Instant) -> Duration {
        let since = *self.refused_since.get_or_insert(now);
        proportional(now - since, 4, millis(1000), millis(20_000))
    }

    /// Records that an attempt ended without a login.
    pub(super) fn end(&mut self, number: u64, failure: AttemptFailure, now: Instant) {
        self.open -= 1;
        self.stalled.remove(&number);
        if self.answering == Some(number) {
            self.answering = None;
        }
        if self.oldest == Some(number) {
            self.oldest = None;
        }
        match failure {
            AttemptFailure::Closed => {
                let pause = match self.last_data {
                    // The guest is booting: the usual case, which must not cost time.
                    None => proportional(now - self.start, 100, millis(100), millis(1000)),
                    // The guest is restarting, or refuses connections for a while.
                    Some(last) => proportional(now - last, 20, millis(100), millis(5000)),
                };
                self.not_before = self.not_before.min(now + pause);
            }
            AttemptFailure::GivenUp => self.given_up.push_back(now + self.linger(now)),
            AttemptFailure::Broke => {
                let since = *self.breaking_since.get_or_insert(now);
                let pause = proportional(now - since, 4, millis(1000), millis(20_000));
                self.held_until = self.held_until.max(now + pause);
            }
            AttemptFailure::Refused => {
                let pause = self.refused(now);
                self.held_until = self.held_until.max(now + pause);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Returns how many attempts there are in this many seconds, if all end in one way after a while.
    fn attempts(failure: AttemptFailure, takes: Duration, seconds: u64) -> u64 {
        let start = Instant::now();
        let (mut pace, mut now) = (Pace::new(start), start);
        while let Some(next) = pace.next(now)
            && next < start + Duration::from_secs(seconds)
        {
            now = next;
            let (number, _) = pace.begin(now);
            now += takes;
            if failure != AttemptFailure::Closed {
                pace.data_arrived(number, now);
            }
            pace.end(number, failure, now);
        }
        pace.attempts()
    }

    #[test]
    fn attempts_are_few_if_each_costs_the_guest_a_process() {
        let moment = millis(1);
        assert!((15..30).contains(&attempts(AttemptFailure::Broke, moment, 300)));
        assert!((15..30).contains(&attempts(AttemptFailure::Refused, moment, 300)));
        let closed = attempts(AttemptFailure::Closed, moment, 30);
        assert!(closed > 150, "a port that refuses is tried often: {closed} times");
    }

    proptest! {
        /// Holds for any sequence of results.
        #[test]
        fn a_guest_never_has_many_unauthenticated_connections(
            steps in prop::collection::vec((0u64..4000, 0usize..8, 0u8..6), 1..400),
        ) {
            let start = Instant::now();
            let (mut pace, mut now) = (Pace::new(start), start);
            let mut open = Vec::new();
            let mut given_up: Vec<Instant> = Vec::new();
            for (wait, which, what) in steps {
                now += millis(wait);
                if pace.next(now).is_some_and(|next| next <= now) {
                    open.push(pace.begin(now).0);
                }
                given_up.retain(|at| *at + millis(2000) > now);
                prop_assert!(open.len() + given_up.len() <= MAX_UNAUTHENTICATED);
                if open.is_empty() { continue }
                let place = which % open.len();
                let number = open[place];
                match what {
                    0 => pace.data_arrived(number, now),
                    1 => pace.stalls(number),
                    what => {
                        open.remove(place);
                        let failure = [AttemptFailure::Closed, AttemptFailure::GivenUp, AttemptFailure::Broke, AttemptFailure::Refused];
                        let failure = failure[usize::from(what - 2)];
                        if failure == AttemptFailure::GivenUp { given_up.push(now) }
                        pace.end(number, failure, now);
                    }
                }
                // Progress is always possible: an attempt is open, or the next one has a time.
                prop_assert!(!open.is_empty() || pace.next(now).is_some());
            }
        }
    }
}
