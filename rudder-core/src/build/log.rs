//! The log of a build's events: bounded, never blocking the engine, with any number of readers.
//!
//! A reader holds only the number of the event it wants next, so a slow one costs nothing and stalls no one. Events that describe
//! the course of the build (phases, steps, inputs, warnings, the outcome) stay for the life of the log: the plan bounds their
//! number. Transient events (progress, output, notices) share a ring; a reader that was too slow for some of them learns how many
//! it missed ([`EventKind::Lagged`]).

use crate::{
    event::{BuildId, Event, EventKind},
    timestamp::Timestamp,
};
use futures::{Stream, stream::BoxStream};
use std::{
    collections::VecDeque,
    fmt,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
};
use tokio::sync::watch;

/// The events so far that are still kept.
#[derive(Debug)]
pub(super) struct Log {
    build_id: BuildId,
    next: u64,
    lasting: Vec<Arc<Event>>,
    passing: VecDeque<Arc<Event>>,
    capacity: usize,
}

/// The result of reading event `n`.
#[derive(Debug, PartialEq)]
pub(super) enum Read {
    /// The event; the reader wants the next one after it.
    Event(Arc<Event>),
    /// There is no such event yet.
    Later,
}

impl Log {
    /// Creates the empty log of a build, which keeps this many transient events.
    pub(super) fn new(build_id: BuildId, capacity: usize) -> Self {
        Self { build_id, next: 0, lasting: Vec::new(), passing: VecDeque::new(), capacity }
    }

    /// Adds an event, and drops the oldest transient one if there are too many.
    pub(super) fn push(&mut self, time: Timestamp, vm: Option<String>, kind: EventKind) {
        let lasting = is_lasting(&kind);
        let event = Arc::new(Event { build_id: self.build_id.clone(), seq: self.next, time, vm, kind });
        self.next += 1;
        if lasting {
            self.lasting.push(event);
        } else {
            self.passing.push_back(event);
            if self.passing.len() > self.capacity {
                self.passing.pop_front();
            }
        }
    }

    /// Returns the first event that is kept from `seq` on, preceded by an [`EventKind::Lagged`] if some before it are gone.
    pub(super) fn read(&self, seq: u64) -> Read {
        let lasting = self.lasting.get(self.lasting.partition_point(|event| event.seq < seq));
        let passing = self.passing.get(self.passing.partition_point(|event| event.seq < seq));
        let Some(event) = lasting.into_iter().chain(passing).min_by_key(|event| event.seq) else {
            return Read::Later;
        };
        if event.seq == seq {
            return Read::Event(Arc::clone(event));
        }
        let kind = EventKind::Lagged { missed: event.seq - seq };
        let build_id = self.build_id.clone();
        Read::Event(Arc::new(Event { build_id, seq: event.seq - 1, time: event.time, vm: None, kind }))
    }
}

/// Returns whether an event must reach every reader, however slow.
fn is_lasting(kind: &EventKind) -> bool {
    !matches!(kind, EventKind::Progress { .. } | EventKind::StepOutput { .. } | EventKind::Notice { .. })
}

/// The events of a build, from the first one on, as a stream that ends after [`EventKind::Finished`].
///
/// A reader that is too slow misses progress, output and notices, and learns how many from [`EventKind::Lagged`]; it never stalls
/// the build. Dropping the stream does not affect the build.
pub struct Events(BoxStream<'static, Event>);

impl Events {
    pub(super) fn new(log: Arc<Mutex<Log>>, pulse: watch::Receiver<()>) -> Self {
        let start = (log, pulse, Some(0u64));
        Self(Box::pin(futures::stream::unfold(start, |(log, mut pulse, seq)| async move {
            let seq = seq?;
            loop {
                // Marked as seen before reading, so that an event pushed in between wakes this reader again.
                pulse.mark_unchanged();
                let read = lock(&log).read(seq);
                if let Read::Event(event) = read {
                    let last = matches!(event.kind, EventKind::Finished { .. });
                    let next = (!last).then_some(event.seq + 1);
                    return Some(((*event).clone(), (log, pulse, next)));
                }
                // The engine is gone without a last event: its runtime was shut down.
                if pulse.changed().await.is_err() && lock(&log).read(seq) == Read::Later {
                    return None;
                }
            }
        })))
    }

    /// Waits for the next event; `None` after the last.
    pub async fn next(&mut self) -> Option<Event> {
        futures::StreamExt::next(&mut self.0).await
    }
}

impl Stream for Events {
    type Item = Event;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Event>> {
        self.0.as_mut().poll_next(cx)
    }
}

impl fmt::Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Events")
    }
}

/// Locks the mutex, even after a panic elsewhere: the contents are never left half-changed.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::event::BuildPhase;
    use proptest::prelude::*;

    fn passing(n: u64) -> EventKind {
        EventKind::Progress { task: "t".into(), done: n, total: None }
    }

    fn drain(log: &Log, mut seq: u64) -> Vec<Event> {
        let mut events = Vec::new();
        while let Read::Event(event) = log.read(seq) {
            seq = event.seq + 1;
            events.push((*event).clone());
        }
        events
    }

    proptest! {
        /// Whatever is pushed, every reader sees every lasting event, in order, and knows exactly how many others it missed.
        #[test]
        fn readers_get_lasting_events_and_count_missed_ones(
            lasting in prop::collection::vec(any::<bool>(), 0..200),
            capacity in 1usize..20,
            from in 0u64..50,
        ) {
            let mut log = Log::new(BuildId::random(), capacity);
            for (n, lasting) in lasting.iter().enumerate() {
                let kind = if *lasting { EventKind::BuildPhase { phase: BuildPhase::Building } } else { passing(n as u64) };
                log.push(Timestamp::UNIX_EPOCH, None, kind);
            }
            prop_assert!(log.passing.len() <= capacity);
            let events = drain(&log, from);
            let mut next = from;
            for event in &events {
                match event.kind {
                    EventKind::Lagged { missed } => {
                        for seq in next..next + missed {
                            prop_assert!(!lasting[usize::try_from(seq).unwrap()], "lost event {}", seq);
                        }
                        next += missed;
                        prop_assert_eq!(event.seq, next - 1);
                    }
                    _ => {
                        prop_assert_eq!(event.seq, next);
                        next += 1;
                    }
                }
            }
            let wanted = lasting.iter().enumerate().filter(|(n, l)| **l && *n as u64 >= from).count();
            prop_assert_eq!(events.iter().filter(|e| matches!(e.kind, EventKind::BuildPhase { .. })).count(), wanted);
        }
    }

    #[tokio::test]
    async fn a_stream_ends_with_the_last_event_or_with_its_engine() {
        let log = Arc::new(Mutex::new(Log::new(BuildId::random(), 4)));
        let (pulse, receiver) = watch::channel(());
        lock(&log).push(Timestamp::UNIX_EPOCH, None, passing(0));
        let mut first = Events::new(Arc::clone(&log), receiver.clone());
        let mut second = Events::new(Arc::clone(&log), receiver);
        assert_eq!(first.next().await.unwrap().seq, 0);
        let outcome = crate::event::Outcome::Cancelled;
        lock(&log).push(Timestamp::UNIX_EPOCH, None, EventKind::Finished { outcome, timings: vec![] });
        pulse.send_replace(());
        assert_eq!(first.next().await.unwrap().seq, 1);
        assert_eq!(first.next().await, None);
        drop(pulse);
        assert_eq!(second.next().await.unwrap().seq, 0);
        assert_eq!(second.next().await.unwrap().seq, 1);
        assert_eq!(second.next().await, None);
    }
}
