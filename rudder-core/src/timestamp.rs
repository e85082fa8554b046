//! Moments, as events and records have them.

use crate::{Error, ErrorKind};
use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr, time::SystemTime};

/// A moment. `Display`, [`FromStr`] and serde use RFC 3339, in UTC: `2026-11-27T12:56:00Z`.
///
/// ```
/// use rudder_core::timestamp::Timestamp;
/// use std::time::{Duration, SystemTime};
///
/// let moment: Timestamp = "1970-01-01T01:00:02+01:00".parse()?;
/// assert_eq!(SystemTime::from(moment), SystemTime::UNIX_EPOCH + Duration::from_secs(2));
/// assert_eq!(moment.to_string(), "1970-01-01T00:00:02Z");
/// # Ok::<_, rudder_core::timestamp::ParseTimestampError>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Timestamp(jiff::Timestamp);

/// The error for a text that is not a moment in RFC 3339.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected a time such as 2026-11-27T12:56:00Z, but found {0:?}")]
pub struct ParseTimestampError(String);

impl Timestamp {
    /// The beginning of 1970, in UTC.
    pub const UNIX_EPOCH: Self = Self(jiff::Timestamp::UNIX_EPOCH);

    /// Returns the current time of the host.
    #[cfg(feature = "engine")]
    #[must_use]
    pub fn now() -> Self {
        Self(jiff::Timestamp::now())
    }
}

impl FromStr for Timestamp {
    type Err = ParseTimestampError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse().map(Self).map_err(|_| ParseTimestampError(text.to_owned()))
    }
}

impl From<Timestamp> for SystemTime {
    fn from(moment: Timestamp) -> Self {
        moment.0.into()
    }
}

impl TryFrom<SystemTime> for Timestamp {
    type Error = Error;

    /// `InvalidInput` for a time that RFC 3339 cannot express.
    fn try_from(time: SystemTime) -> Result<Self, Error> {
        jiff::Timestamp::try_from(time).map(Self).map_err(|error| {
            Error::new(ErrorKind::InvalidInput, "expected a time before the year 10000").with_source(error)
        })
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl fmt::Debug for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_timestamp_is_written_as_it_was_before_it_had_a_type_of_its_own() {
        for text in ["2026-11-27T12:56:00.123456789Z", "2026-11-27T12:56:00Z", "1969-12-31T23:59:59.5Z"] {
            let moment: Timestamp = text.parse().unwrap();
            assert_eq!((moment.to_string().as_str(), format!("{moment:?}").as_str()), (text, text));
            let json = serde_json::to_string(&moment).unwrap();
            assert_eq!(json, serde_json::to_string(&text.parse::<jiff::Timestamp>().unwrap()).unwrap());
            assert_eq!(serde_json::from_str::<Timestamp>(&json).unwrap(), moment);
        }
    }

    #[test]
    fn a_system_time_that_cannot_be_written_is_refused() {
        let time = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1 << 30);
        assert_eq!(SystemTime::from(Timestamp::try_from(time).unwrap()), time);
        let late = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1 << 40);
        assert_eq!(Timestamp::try_from(late).unwrap_err().kind(), ErrorKind::InvalidInput);
    }

    #[test]
    fn a_text_that_is_no_timestamp_is_refused() {
        let error = "yesterday".parse::<Timestamp>().unwrap_err();
        assert_eq!(
            error.to_string(),
            "expected a time such as 2026-11-27T12:56:00Z, but found \"yesterday\""
        );
    }
}
