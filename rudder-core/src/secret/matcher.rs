//! Finds any of many byte strings in one pass (Aho and Corasick, 1975).

use aho_corasick::{
    Anchored,
    automaton::Automaton,
    nfa::contiguous::{Builder, NFA},
};
use std::{
    collections::{BTreeSet, HashSet},
    fmt,
    ops::Range,
};

/// Number of bytes that count as the beginning of a pattern.
const HEAD: usize = 3;

/// Finds patterns in a text, and the beginning of a pattern at its end.
#[derive(Clone)]
pub(super) struct Matcher {
    automaton: NFA,
    /// Sorted, so that patterns with a common prefix are neighbours.
    patterns: Vec<Box<[u8]>>,
    heads: HashSet<[u8; HEAD]>,
    longest: usize,
}

impl Matcher {
    /// Creates a matcher of these patterns; `None` if there are none.
    pub(super) fn new(patterns: BTreeSet<Vec<u8>>) -> Option<Self> {
        let patterns: Vec<Box<[u8]>> =
            patterns.into_iter().filter(|pattern| pattern.len() >= HEAD).map(Into::into).collect();
        if patterns.is_empty() {
            return None;
        }
        // This fails for more than two billion states, which no manifest can require.
        let automaton = Builder::new().prefilter(false).build(&patterns).ok()?;
        let heads = patterns.iter().filter_map(|pattern| pattern.first_chunk().copied()).collect();
        let longest = patterns.iter().map(|pattern| pattern.len()).max().unwrap_or(0);
        Some(Self { automaton, patterns, heads, longest })
    }

    /// Returns the length of the longest pattern.
    pub(super) fn longest(&self) -> usize {
        self.longest
    }

    /// Finds all patterns; of those that end at the same position, only the longest.
    pub(super) fn find(&self, bytes: impl Iterator<Item = u8>, mut found: impl FnMut(Range<usize>)) {
        let Ok(mut state) = self.automaton.start_state(Anchored::No) else { return };
        for (at, byte) in bytes.enumerate() {
            state = self.automaton.next_state(Anchored::No, state, byte);
            if self.automaton.is_special(state) && self.automaton.is_match(state) {
                // The longest match comes first, before the patterns that are suffixes of it.
                let length = self.automaton.pattern_len(self.automaton.match_pattern(state, 0));
                found(at + 1 - length..at + 1);
            }
        }
    }

    /// Returns where the first pattern begins that continues past the end.
    pub(super) fn open_at(&self, bytes: &[u8]) -> Option<usize> {
        let from = (bytes.len() + 1).saturating_sub(self.longest);
        (from..bytes.len()).find(|at| {
            let rest = &bytes[*at..];
            rest.first_chunk().is_none_or(|head: &[u8; HEAD]| self.heads.contains(head)) && {
                let next = self.patterns.partition_point(|pattern| **pattern <= *rest);
                self.patterns.get(next).is_some_and(|pattern| pattern.starts_with(rest))
            }
        })
    }
}

impl fmt::Debug for Matcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Matcher({} patterns)", self.patterns.len())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn matcher(patterns: &[&str]) -> Matcher {
        Matcher::new(patterns.iter().map(|text| text.as_bytes().to_vec()).collect()).unwrap()
    }

    #[test]
    fn the_longest_of_the_patterns_that_end_together_is_found() {
        let all: Vec<String> = (3..40).map(|length| "a".repeat(length)).collect();
        let all: Vec<&str> = all.iter().map(String::as_str).collect();
        let mut found = Vec::new();
        matcher(&all).find("a".repeat(50).bytes(), |range| found.push(range));
        assert_eq!(found.len(), 48, "one for each end");
        assert!(found.iter().all(|range| range.len() == range.end.min(39)));
    }

    #[test]
    fn an_incomplete_pattern_at_the_end_is_recognised() {
        let matcher = matcher(&["hunter2", "hunt", "abcdefgh"]);
        assert_eq!(matcher.open_at(b"xx hunt"), Some(3));
        assert_eq!(matcher.open_at(b"xx hu"), Some(3));
        assert_eq!(matcher.open_at(b"hunter2"), None);
        assert_eq!(matcher.open_at(b"hunter2 abcdef"), Some(8));
        assert_eq!(matcher.open_at(b""), None);
    }
}
