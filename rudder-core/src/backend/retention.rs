//! How long labs live, and the list of those that exist.

use super::LabId;
use std::time::SystemTime;

/// How long a lab lives.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Retention {
    /// As long as its owner: when the owner ends for any reason, the backend ends the machines as soon as it can.
    #[default]
    EndWithOwner,
    /// As long as its owner, unless the owner [keeps](super::Lab::keep) it.
    MayBeKept,
    /// Until it is removed, whatever happens to the process that opened it: the lab is kept from the start.
    UntilRemoved {
        /// When [`Backend::reap`](super::Backend::reap) removes the lab; `None` for never.
        expires: Option<SystemTime>,
    },
}

/// A lab, as [`Backend::labs`](super::Backend::labs) lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct LabInfo {
    /// The id of the lab.
    pub id: LabId,
    /// The name of the build or clone; empty when it cannot be read.
    pub name: String,
    /// Whether the lab is in use.
    pub state: LabState,
}

/// Whether a lab is in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum LabState {
    /// It belongs to a living owner.
    Owned,
    /// Its owner is dead, or it was kept and has expired: the next [`Backend::reap`](super::Backend::reap) removes it.
    Abandoned,
    /// It is kept until it is removed or has expired.
    Kept {
        /// When it expires; `None` for never.
        expires: Option<SystemTime>,
    },
    /// Its record is missing or cannot be read: nothing of it is touched.
    Damaged,
}

impl LabInfo {
    /// Creates the description of a lab.
    pub fn new(id: LabId, name: impl Into<String>, state: LabState) -> Self {
        Self { id, name: name.into(), state }
    }

    /// Returns whether the lab is kept and has not expired.
    #[must_use]
    pub fn is_kept(&self) -> bool {
        matches!(self.state, LabState::Kept { .. })
    }
}

impl LabState {
    /// Returns the state, at this moment, of a kept lab that expires at `expires`.
    #[must_use]
    pub fn of_kept(expires: Option<SystemTime>) -> Self {
        match expires {
            Some(expires) if expires <= SystemTime::now() => Self::Abandoned,
            expires => Self::Kept { expires },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_kept_lab_is_abandoned_once_it_has_expired() {
        let now = SystemTime::now();
        let later = Some(now + Duration::from_secs(3600));
        assert_eq!(LabState::of_kept(None), LabState::Kept { expires: None });
        assert_eq!(LabState::of_kept(later), LabState::Kept { expires: later });
        assert_eq!(LabState::of_kept(Some(now)), LabState::Abandoned);
    }
}
