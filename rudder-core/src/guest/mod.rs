//! Access to the operating system inside a machine: SSH and SFTP over [`Machine::dial`](crate::backend::Machine::dial).
//!
//! [`Login::connect`] waits for a guest that is booting, [`Session`] reconnects after restarts, and a [`Guest`] runs
//! scripts and commands, uploads files, and powers the guest off. Everything is cancel-safe: dropping a future that
//! runs something in the guest ends it there as well, and [`Guest::settle`] waits until that is done.

mod attempt;
mod channel_close;
#[cfg(feature = "memory")]
mod core_script;
mod cuttable_stream;
mod exec;
mod key;
mod lines;
mod login;
mod pace;
mod power;
mod script;
mod session;
mod upload;

#[cfg(test)]
pub(crate) mod tests;

#[cfg(feature = "memory")]
pub(crate) use core_script::CoreScript;
pub use exec::CommandOutput;
pub use key::BuildKey;
pub use lines::MAX_LINE;
pub use login::{Endpoint, HostKeyPin, Login};
pub use script::Script;
pub use session::Session;
pub use upload::Content;
#[cfg(feature = "memory")]
pub(crate) use upload::{DENIED, IS_DIRECTORY, NOT_WRITTEN};

use crate::{Error, ErrorKind};
use attempt::{ConnectionState, Handler};
use channel_close::ClosingChannels;
use cuttable_stream::StreamWatch;
use russh::client::Handle;
use std::{
    fmt,
    sync::{Arc, PoisonError},
    time::Duration,
};
use tokio_util::task::TaskTracker;

/// A logged-in connection to a guest. Clones share it; it ends when the last is dropped.
#[derive(Clone)]
pub struct Guest {
    shared: Arc<Shared>,
}

struct Shared {
    handle: Handle<Handler>,
    state: Arc<ConnectionState>,
    user: String,
    cleanups: TaskTracker,
    closing: ClosingChannels,
    // Cuts the stream when dropped, which is after the handle.
    _watch: StreamWatch,
}

impl Guest {
    fn new(handle: Handle<Handler>, watch: StreamWatch, state: Arc<ConnectionState>, user: String) -> Self {
        Self {
            shared: Arc::new(Shared {
                handle,
                state,
                user,
                cleanups: TaskTracker::new(),
                closing: ClosingChannels::default(),
                _watch: watch,
            }),
        }
    }

    /// Returns the user that is logged in.
    #[must_use]
    pub fn user(&self) -> &str {
        &self.shared.user
    }

    /// Whether the connection is gone.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.shared.handle.is_closed()
    }

    /// Waits until the connection is gone. Checks every second whether the guest still answers; without an answer for
    /// `patience`, the connection is considered gone.
    pub async fn closed(&self, patience: Duration) {
        loop {
            let closed = async {
                while !self.is_closed() {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            };
            let ping = tokio::time::timeout(patience, self.shared.handle.send_ping());
            tokio::select! {
                () = closed => return,
                answered = ping => if !matches!(answered, Ok(Ok(()))) {
                    return;
                }
            }
            tokio::select! {
                () = async {
                    while !self.is_closed() {
                        tokio::time::sleep(Duration::from_millis(50)).await;
                    }
                } => return,
                () = tokio::time::sleep(Duration::from_secs(1)) => {}
            }
        }
    }

    /// Waits until what dropped operations left in the guest was removed, for at most `limit`.
    pub async fn settle(&self, limit: Duration) {
        let cleanups = &self.shared.cleanups;
        cleanups.close();
        let _ = tokio::time::timeout(limit, cleanups.wait()).await;
        cleanups.reopen();
    }

    /// Disconnects. Operations of other clones end with an error.
    pub async fn close(self) {
        let bye = self.shared.handle.disconnect(russh::Disconnect::ByApplication, "", "");
        let _ = tokio::time::timeout(Duration::from_secs(1), bye).await;
    }

    /// Returns the error of a connection that broke during `what`.
    fn broken(&self, what: &str, cause: Option<russh::Error>) -> Error {
        let ended = self.shared.state.ended.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let why = ended
            .or_else(|| cause.map(|cause| cause.to_string()))
            .unwrap_or_else(|| "the connection was closed".to_owned());
        Error::new(
            ErrorKind::GuestUnreachable,
            format!("the connection to the guest broke while {what}: {why}"),
        )
        .with_help(
            "check whether the step restarted the guest, its network or its SSH server; use a `reboot` step \
             for restarts",
        )
    }
}

impl fmt::Debug for Guest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Guest").field("user", &self.shared.user).field("closed", &self.is_closed()).finish()
    }
}
