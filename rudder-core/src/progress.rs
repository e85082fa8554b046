//! Progress of long operations, and notices for the user.

use std::{fmt, sync::Arc};

/// Receiver of the progress of an operation and of notices for the user. Cheap to call often: receivers thin out the reports.
#[derive(Clone)]
pub struct Progress(Arc<dyn Fn(ProgressEvent) + Send + Sync>);

/// A report to a [`Progress`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ProgressEvent {
    /// A number of bytes is done.
    Bytes {
        /// The operation: `download URL`, `convert DISK`.
        task: String,
        /// Bytes done.
        done: u64,
        /// Total bytes, where known.
        total: Option<u64>,
    },
    /// Something the user should know.
    Notice(String),
}

impl Progress {
    /// Creates a receiver that calls this function.
    pub fn new(listener: impl Fn(ProgressEvent) + Send + Sync + 'static) -> Self {
        Self(Arc::new(listener))
    }

    /// Creates a receiver that discards everything.
    #[must_use]
    pub fn none() -> Self {
        Self::new(|_| {})
    }

    /// Reports that `done` of `total` bytes of a task are done.
    pub fn bytes(&self, task: &str, done: u64, total: Option<u64>) {
        (self.0)(ProgressEvent::Bytes { task: task.to_owned(), done, total });
    }

    /// Reports something the user should know.
    pub fn notice(&self, message: impl Into<String>) {
        (self.0)(ProgressEvent::Notice(message.into()));
    }
}

impl fmt::Debug for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Progress")
    }
}
