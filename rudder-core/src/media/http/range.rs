//! Which part of a file a request asks for (RFC 9110, 14).

use http_range_header::{RangeUnsatisfiableError, parse_range_header};
use hyper::{
    Method,
    header::{HeaderMap, IF_RANGE, RANGE},
};

/// The part of a file to send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    /// The whole file.
    Whole,
    /// A part of the file: never empty, and within the file.
    Range {
        /// The offset of the first byte.
        start: u64,
        /// Number of bytes.
        length: u64,
    },
    /// No part of the file is within the range.
    Unsatisfiable,
}

/// Returns the part that a request with these headers asks for, of a file of this size.
///
/// The whole file is sent, as allowed (14.2), for several ranges of the file, other units, a header that cannot be
/// parsed, and a range with a condition, since files have no validator that it could name.
pub(super) fn part(method: &Method, headers: &HeaderMap, size: u64) -> Part {
    if *method != Method::GET || headers.contains_key(IF_RANGE) {
        return Part::Whole;
    }
    let mut ranges = headers.get_all(RANGE).iter();
    let (Some(range), None) = (ranges.next(), ranges.next()) else { return Part::Whole };
    let Some(ranges) = range.to_str().ok().and_then(|range| parse_range_header(range).ok()) else {
        return Part::Whole;
    };
    match ranges.validate(size).as_deref() {
        Ok([range]) => Part::Range { start: *range.start(), length: range.end() - range.start() + 1 },
        // No range of an empty file can be satisfied.
        Ok([]) | Err(RangeUnsatisfiableError::Unsatisfiable) => Part::Unsatisfiable,
        Ok(_) | Err(_) => Part::Whole,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn of(range: &str, size: u64) -> Part {
        let mut headers = HeaderMap::new();
        headers.insert(RANGE, range.parse().unwrap());
        part(&Method::GET, &headers, size)
    }

    #[test]
    fn single_ranges_are_cut_to_the_file() {
        assert_eq!(of("bytes=0-0", 10), Part::Range { start: 0, length: 1 });
        assert_eq!(of("bytes=2-", 10), Part::Range { start: 2, length: 8 });
        assert_eq!(of("bytes=2-99", 10), Part::Range { start: 2, length: 8 });
        assert_eq!(of("bytes=-3", 10), Part::Range { start: 7, length: 3 });
        assert_eq!(of("bytes=-99999999999999999999999", 10), Part::Range { start: 0, length: 10 });
        assert_eq!(of("Bytes=9-9", 10), Part::Range { start: 9, length: 1 });
        assert_eq!(of("bytes=0-18446744073709551615", u64::MAX), Part::Range { start: 0, length: u64::MAX });
    }

    #[test]
    fn a_range_beyond_the_end_is_unsatisfiable() {
        for range in ["bytes=10-", "bytes=10-20", "bytes=-0", "bytes=99999999999999999999999-"] {
            assert_eq!(of(range, 10), Part::Unsatisfiable, "{range}");
        }
        assert_eq!(of("bytes=0-", 0), Part::Unsatisfiable);
        assert_eq!(of("bytes=-1", 0), Part::Unsatisfiable);
    }

    #[test]
    fn ranges_beyond_the_end_are_ignored_among_several() {
        assert_eq!(of("bytes=0-1,99-", 10), Part::Range { start: 0, length: 2 });
        assert_eq!(of("bytes=10-,20-30", 10), Part::Unsatisfiable);
    }

    #[test]
    fn unsupported_ranges_return_the_whole_file() {
        for range in [
            "bytes=0-1,3-4",
            "bytes=5-2",
            "bytes=a-b",
            "bytes=+1-2",
            "bytes=-",
            "bytes",
            "lines=1-2",
            "bytes=1",
        ] {
            assert_eq!(of(range, 10), Part::Whole, "{range}");
        }
        let mut headers = HeaderMap::new();
        headers.insert(RANGE, "bytes=1-2".parse().unwrap());
        assert_eq!(part(&Method::HEAD, &headers, 10), Part::Whole);
        headers.insert(IF_RANGE, "\"etag\"".parse().unwrap());
        assert_eq!(part(&Method::GET, &headers, 10), Part::Whole);
    }
}
