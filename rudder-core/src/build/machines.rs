//! The machines of a build, for programs that inspect one while it runs or after it was kept.

use super::{guard::ended, log::lock};
use crate::{
    Error, ErrorKind, Result,
    backend::Machine,
    console::Console,
    guest::{Endpoint, Guest, Login, Session},
};
use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

/// A machine of a running build or of a kept lab, with the login that the build uses.
///
/// It does not keep the machine alive: when the build removes its lab, the console and the guest end with errors.
#[derive(Debug, Clone)]
pub struct BuildMachine {
    machine: Arc<dyn Machine>,
    port: u16,
    login: Option<Login>,
}

impl BuildMachine {
    pub(super) fn new(machine: Arc<dyn Machine>, port: u16, login: Option<Login>) -> Self {
        Self { machine, port, login }
    }

    /// Sets the login to use from now on: for a kept lab whose manifest has a password or the author's own key, which are not
    /// recorded with the lab.
    #[must_use]
    pub fn with_login(mut self, login: Login) -> Self {
        self.login = Some(login);
        self
    }

    /// Returns the name of the VM.
    #[must_use]
    pub fn name(&self) -> &str {
        self.machine.name()
    }

    /// Returns the machine itself. It must keep running: a machine that ends fails the build.
    #[must_use]
    pub fn machine(&self) -> &Arc<dyn Machine> {
        &self.machine
    }

    /// Opens its screen, keyboard and serial console. Keys typed here mix with those of a boot command.
    #[must_use]
    pub fn console(&self) -> Console {
        Console::new(Arc::clone(&self.machine))
    }

    /// Logs in to the guest as the build does, over a connection of its own. Waits at most `limit` for a guest that is still
    /// booting. If the build has logged in before, the host key that it pinned is required.
    ///
    /// # Errors
    /// Those of [`Login::connect`]; `MachineDied` when the machine has ended or ends meanwhile; `InvalidInput` for a machine of a
    /// kept lab whose key only its author has.
    pub async fn guest(&self, limit: Duration) -> Result<Guest> {
        let (login, endpoint) = (self.login()?, self.endpoint());
        tokio::select! {
            biased;
            exit = self.machine.wait() => Err(ended(&exit?, "a program logged in")),
            guest = login.connect(&endpoint, limit) => guest,
        }
    }

    /// Logs in, with a connection that can be re-established.
    pub(super) async fn session(&self, limit: Duration) -> Result<Session> {
        Session::open(self.endpoint(), self.login()?.clone(), limit).await
    }

    fn endpoint(&self) -> Endpoint {
        Endpoint::of(Arc::clone(&self.machine), self.port)
    }

    fn login(&self) -> Result<&Login> {
        self.login.as_ref().ok_or_else(|| {
            let message =
                format!("expected a login for VM {}, but its lab was kept without one", self.name());
            Error::new(ErrorKind::InvalidInput, message)
                .with_help("provide the author's key with `with_login`")
        })
    }
}

/// The machines that a build has defined, in the order of their definition.
#[derive(Debug, Default)]
pub(super) struct Machines(Mutex<Vec<BuildMachine>>);

impl Machines {
    pub(super) fn add(&self, machine: BuildMachine) {
        lock(&self.0).push(machine);
    }

    pub(super) fn list(&self) -> Vec<BuildMachine> {
        lock(&self.0).clone()
    }

    /// Removes and returns all machines: their lab is gone, or no longer belongs to the build.
    pub(super) fn take(&self) -> Vec<BuildMachine> {
        std::mem::take(&mut *lock(&self.0))
    }
}
