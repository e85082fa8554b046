//! A connection that can be made again after a restart.

use super::{Endpoint, Guest, Login};
use crate::Result;
use std::time::Duration;

/// A login, its endpoint, and the current connection.
#[derive(Debug)]
pub struct Session {
    endpoint: Endpoint,
    login: Login,
    guest: Guest,
}

impl Session {
    /// Waits for a working login.
    ///
    /// # Errors
    /// See [`Login::connect`].
    pub async fn open(endpoint: Endpoint, login: Login, timeout: Duration) -> Result<Self> {
        let guest = login.connect(&endpoint, timeout).await?;
        Ok(Self { endpoint, login, guest })
    }

    /// Returns the current connection.
    #[must_use]
    pub fn guest(&self) -> &Guest {
        &self.guest
    }

    /// Returns the login.
    #[must_use]
    pub fn login(&self) -> &Login {
        &self.login
    }

    /// Makes a new connection and drops the old one.
    ///
    /// # Errors
    /// See [`Login::connect`]; the old connection is then kept.
    pub async fn reconnect(&mut self, timeout: Duration) -> Result<()> {
        self.guest = self.login.connect(&self.endpoint, timeout).await?;
        Ok(())
    }
}
