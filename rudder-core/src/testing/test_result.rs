//! The result of a test, and the assertions that tests use.

use crate::{Error, ErrorKind, Result};
use std::fmt::Debug;

/// The result of a test: `Ok` if the backend behaved correctly.
pub type TestResult<T = ()> = std::result::Result<T, NotPassed>;

/// Why a test did not pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NotPassed {
    /// The backend broke its contract; contains what was expected and what was found.
    Failed(String),
    /// The test could not be run, for this reason.
    Skipped(String),
}

impl From<Error> for NotPassed {
    fn from(error: Error) -> Self {
        Self::Failed(error.report())
    }
}

/// Fails the test when a condition is false.
macro_rules! ensure {
    ($condition:expr, $($message:tt)+) => {
        if !$condition {
            return Err($crate::testing::NotPassed::Failed(format!($($message)+)));
        }
    };
}
pub(super) use ensure;

/// Fails the test.
macro_rules! fail {
    ($($message:tt)+) => {
        return Err($crate::testing::NotPassed::Failed(format!($($message)+)))
    };
}
pub(super) use fail;

/// Turns an error into a failure of the test.
pub(super) trait During<T> {
    /// Returns the value; an error fails the test, with what was being done.
    fn during(self, what: &str) -> TestResult<T>;
}

impl<T> During<T> for Result<T> {
    fn during(self, what: &str) -> TestResult<T> {
        self.map_err(|error| {
            NotPassed::Failed(format!(
                "{what}: expected success, but found {:?}: {}",
                error.kind(),
                error.report()
            ))
        })
    }
}

/// Returns the error if it is of the expected kind; otherwise the test fails.
pub(super) fn refused<T>(result: Result<T>, kind: ErrorKind, what: &str) -> TestResult<Error> {
    match result {
        Ok(_) => fail!("{what}: expected it to be refused ({kind:?}), but it succeeded"),
        Err(error) if error.kind() == kind => Ok(error),
        Err(error) => {
            fail!("{what}: expected {kind:?}, but found {:?}: {}", error.kind(), error.report())
        }
    }
}

/// Returns the error, which may be of any kind except bugs; otherwise the test fails.
pub(super) fn fails<T>(result: Result<T>, what: &str) -> TestResult<Error> {
    match result {
        Ok(_) => fail!("{what}: expected it to be refused, but it succeeded"),
        Err(error) if error.kind() == ErrorKind::Internal => {
            fail!("{what}: expected an error that explains the failure, but found a bug: {}", error.report())
        }
        Err(error) => Ok(error),
    }
}

/// Fails the test unless both values are equal.
pub(super) fn expect_equal<T: PartialEq + Debug>(found: &T, expected: &T, what: &str) -> TestResult {
    ensure!(found == expected, "{what}: expected {expected:?}, but found {found:?}");
    Ok(())
}
