//! From a machine that was just powered on to a working login.
//!
//! While a guest boots, its port refuses, swallows or drops connections, in whatever way the hypervisor's network does
//! that; then its server may answer before cloud-init has put the key in place. So attempts overlap while they are silent,
//! are left in peace as soon as the server has said a byte, and are repeated until the time is over, at a [`Pace`] that a
//! guest under load can keep up with. What was last seen is part of the error then.

use super::{
    BuildKey, Guest,
    attempt::{Ended, Tries, attempt, lock},
    pace::Pace,
};
use crate::{
    Result,
    backend::{BoxedStream, Machine},
    secret::Secret,
};
use futures::{StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::time::Instant;

/// Where a guest's SSH server is: something that gives a new stream to it, as often as asked.
#[derive(Clone)]
pub struct Endpoint(Arc<dyn Fn() -> BoxFuture<'static, Result<BoxedStream>> + Send + Sync>);

impl Endpoint {
    /// An endpoint that calls this for every stream.
    pub fn new(dial: impl Fn() -> BoxFuture<'static, Result<BoxedStream>> + Send + Sync + 'static) -> Self {
        Self(Arc::new(dial))
    }

    /// A new stream.
    pub(super) fn dial(&self) -> BoxFuture<'static, Result<BoxedStream>> {
        (self.0)()
    }

    /// A TCP port of a machine.
    #[must_use]
    pub fn of(machine: Arc<dyn Machine>, port: u16) -> Self {
        Self::new(move || {
            let machine = Arc::clone(&machine);
            Box::pin(async move { machine.dial(port).await })
        })
    }
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Endpoint")
    }
}

/// The host key that the guest showed when the first login worked. Shared by all connections of a build to one VM: clones
/// share it.
#[derive(Debug, Clone, Default)]
pub struct HostKeyPin(Arc<Mutex<Option<Vec<u8>>>>);

impl HostKeyPin {
    /// No key yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    pub(super) fn allows(&self, key: &[u8]) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).as_deref().is_none_or(|pinned| pinned == key)
    }

    pub(super) fn pin(&self, key: &[u8]) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(|| key.to_vec());
    }
}

/// Who logs in, and with what. The key is tried first, then the password in whatever way the server takes it.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Login {
    /// The user.
    pub username: String,
    /// The build's key.
    pub key: BuildKey,
    /// Tried beside the key.
    pub password: Option<Secret>,
    /// The host key, once known.
    pub pin: HostKeyPin,
}

impl Login {
    /// A login with this key.
    pub fn new(username: impl Into<String>, key: BuildKey) -> Self {
        Self { username: username.into(), key, password: None, pin: HostKeyPin::new() }
    }

    /// Tries this password too.
    #[must_use]
    pub fn with_password(mut self, password: Option<Secret>) -> Self {
        self.password = password;
        self
    }

    /// Connects until a login works or the time is over. Dropping the future ends every attempt.
    ///
    /// The host key is pinned when the login worked, not before: cloud-init makes new host keys on the first boot, and
    /// a server that answered before that shows others.
    ///
    /// # Errors
    /// - `GuestUnreachable`: nothing spoke SSH in time; says what was last seen.
    /// - `Authentication`: the guest answered, and refused the credentials to the end.
    /// - `Protocol`: it shows another host key than the pinned one; at once.
    pub async fn connect(&self, endpoint: &Endpoint, timeout: Duration) -> Result<Guest> {
        crate::runtime::check()?;
        let start = Instant::now();
        let tries = Arc::new(Tries::new(Pace::new(start)));
        match tokio::time::timeout(timeout, self.keep_trying(endpoint, &tries)).await {
            Ok(result) => result,
            Err(_) => Err(tries.error(&self.username, self.password.is_some(), start.elapsed())),
        }
    }

    async fn keep_trying(&self, endpoint: &Endpoint, tries: &Arc<Tries>) -> Result<Guest> {
        let mut attempts: FuturesUnordered<BoxFuture<'static, (u64, Ended)>> = FuturesUnordered::new();
        loop {
            let changed = tries.changed.notified();
            let next = lock(&tries.pace).next(Instant::now());
            let due = async {
                match next {
                    Some(next) => tokio::time::sleep_until(next).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = due => {
                    let (number, patience) = lock(&tries.pace).begin(Instant::now());
                    let (login, endpoint, tries) = (self.clone(), endpoint.clone(), Arc::clone(tries));
                    attempts.push(Box::pin(async move {
                        (number, attempt(login, endpoint, tries, number, patience).await)
                    }));
                }
                Some((number, ended)) = attempts.next() => match ended {
                    Ended::LoggedIn(guest) => return Ok(*guest),
                    Ended::Fatal(error) => return Err(error),
                    Ended::Failed(setback) => tries.end(number, setback),
                },
                // Another may be due earlier or later now.
                () = changed => {}
            }
        }
    }
}
