//! From a machine that was just powered on to a working login.
//!
//! While a guest boots, its port refuses, drops or closes connections, depending on the hypervisor's network;
//! afterwards its server may answer before cloud-init has installed the key. So attempts overlap while the server is
//! silent, are left alone as soon as it has sent a byte, and are repeated until the timeout, at a [`Pace`] that a guest
//! under load can keep up with. The error of a timeout says what was last seen.

use super::{
    BuildKey, Guest,
    attempt::{AttemptEnd, Attempts, attempt, lock},
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

/// The location of a guest's SSH server: opens any number of streams to it.
#[derive(Clone)]
pub struct Endpoint(Arc<dyn Fn() -> BoxFuture<'static, Result<BoxedStream>> + Send + Sync>);

impl Endpoint {
    /// Returns an endpoint that calls this function for every stream.
    pub fn new(dial: impl Fn() -> BoxFuture<'static, Result<BoxedStream>> + Send + Sync + 'static) -> Self {
        Self(Arc::new(dial))
    }

    /// Opens a new stream.
    pub(super) fn dial(&self) -> BoxFuture<'static, Result<BoxedStream>> {
        (self.0)()
    }

    /// Returns the endpoint of a TCP port of a machine.
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

/// The host key that the guest presented at the first successful login. All connections of a build to one VM share it:
/// clones share the key.
#[derive(Debug, Clone, Default)]
pub struct HostKeyPin(Arc<Mutex<Option<Vec<u8>>>>);

impl HostKeyPin {
    /// Returns a pin without a key yet.
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

/// The user and the credentials of a login. The key is tried first, then the password in any way that the server
/// accepts.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Login {
    /// The user.
    pub username: String,
    /// The build's key.
    pub key: BuildKey,
    /// A password to try in addition to the key.
    pub password: Option<Secret>,
    /// The host key, once known.
    pub pin: HostKeyPin,
}

impl Login {
    /// Returns a login with this key.
    pub fn new(username: impl Into<String>, key: BuildKey) -> Self {
        Self { username: username.into(), key, password: None, pin: HostKeyPin::new() }
    }

    /// Also tries this password.
    #[must_use]
    pub fn password(mut self, password: Option<Secret>) -> Self {
        self.password = password;
        self
    }

    /// Connects until a login works or the timeout expires. Dropping the future ends every attempt.
    ///
    /// The host key is pinned only once the login has worked: cloud-init makes new host keys on the first boot, and a
    /// server that answered before that presents others.
    ///
    /// # Errors
    /// - `GuestUnreachable`: nothing spoke SSH before the timeout; the error says what was last seen.
    /// - `Authentication`: the guest answered, and refused the credentials until the timeout.
    /// - `Protocol`: the guest presents a host key other than the pinned one; fails at once.
    pub async fn connect(&self, endpoint: &Endpoint, timeout: Duration) -> Result<Guest> {
        crate::runtime::check()?;
        let start = Instant::now();
        let tries = Arc::new(Attempts::new(Pace::new(start)));
        match tokio::time::timeout(timeout, self.keep_trying(endpoint, &tries)).await {
            Ok(result) => result,
            Err(_) => Err(tries.error(&self.username, self.password.is_some(), start.elapsed())),
        }
    }

    async fn keep_trying(&self, endpoint: &Endpoint, tries: &Arc<Attempts>) -> Result<Guest> {
        let mut attempts: FuturesUnordered<BoxFuture<'static, (u64, AttemptEnd)>> = FuturesUnordered::new();
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
                    AttemptEnd::LoggedIn(guest) => return Ok(*guest),
                    AttemptEnd::Fatal(error) => return Err(error),
                    AttemptEnd::Failed(failure) => tries.end(number, failure),
                },
                // The time of the next attempt may have changed.
                () = changed => {}
            }
        }
    }
}
