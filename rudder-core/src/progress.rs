//! Progress of long operations, and notices for the user.

use std::{fmt, sync::Arc};

/// Where an operation tells how far it is, and what the user should know. Cheap to call often: readers thin out.
#[derive(Clone)]
pub struct Progress(Arc<dyn Fn(ProgressEvent) + Send + Sync>);

/// What a [`Progress`] hears.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ProgressEvent {
    /// So many bytes of so many are done.
    Bytes {
        /// What: `download URL`, `convert DISK`.
        task: String,
        /// Bytes done.
        done: u64,
        /// Bytes in all, where known.
        total: Option<u64>,
    },
    /// Something the user should know.
    Notice(String),
}

impl Progress {
    /// Progress that calls this.
    pub fn new(listener: impl Fn(ProgressEvent) + Send + Sync + 'static) -> Self {
        Self(Arc::new(listener))
    }

    /// Progress that nobody hears.
    #[must_use]
    pub fn none() -> Self {
        Self::new(|_| {})
    }

    /// So many bytes of so many are done.
    pub fn bytes(&self, task: &str, done: u64, total: Option<u64>) {
        (self.0)(ProgressEvent::Bytes { task: task.to_owned(), done, total });
    }

    /// Something the user should know.
    pub fn notice(&self, message: impl Into<String>) {
        (self.0)(ProgressEvent::Notice(message.into()));
    }
}

impl fmt::Debug for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Progress")
    }
}
