//! The machines of a build, for programs that look into one while it runs or after it was kept.

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

/// A machine of a build that runs or whose lab was kept, and how the build logs in to it.
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

    /// Logs in with this from now on: for a kept lab whose manifest has a password or a key of its author's, which are not
    /// written down with it.
    #[must_use]
    pub fn with_login(mut self, login: Login) -> Self {
        self.login = Some(login);
        self
    }

    /// The name of the VM.
    #[must_use]
    pub fn name(&self) -> &str {
        self.machine.name()
    }

    /// The machine itself. It must keep running: a machine that ends fails the build.
    #[must_use]
    pub fn machine(&self) -> &Arc<dyn Machine> {
        &self.machine
    }

    /// Its screen, keyboard and serial line. What is typed here mixes with what a boot command types.
    #[must_use]
    pub fn console(&self) -> Console {
        Console::new(Arc::clone(&self.machine))
    }

    /// Logs in to the guest as the build does, over a connection of its own. Waits for a guest that still boots, at most
    /// `limit`. The host key is the one that the build pinned, if it logged in before.
    ///
    /// # Errors
    /// Those of [`Login::connect`]; `MachineDied` when the machine has ended or ends meanwhile; `InvalidInput` for a machine
    /// of a kept lab whose key its author has.
    pub async fn guest(&self, limit: Duration) -> Result<Guest> {
        let (login, endpoint) = (self.login()?, self.endpoint());
        tokio::select! {
            biased;
            exit = self.machine.wait() => Err(ended(&exit?, "a program logged in")),
            guest = login.connect(&endpoint, limit) => guest,
        }
    }

    /// Logs in, with a connection that can be made again.
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
            Error::new(ErrorKind::InvalidInput, message).with_help("give the author's key: `with_login`")
        })
    }
}

/// The machines that a build has defined, in the order in which it did.
#[derive(Debug, Default)]
pub(super) struct Machines(Mutex<Vec<BuildMachine>>);

impl Machines {
    pub(super) fn add(&self, machine: BuildMachine) {
        lock(&self.0).push(machine);
    }

    pub(super) fn list(&self) -> Vec<BuildMachine> {
        lock(&self.0).clone()
    }

    /// Forgets them all: their lab is gone, or is no longer the build's.
    pub(super) fn take(&self) -> Vec<BuildMachine> {
        std::mem::take(&mut *lock(&self.0))
    }
}
