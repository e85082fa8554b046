//! A machine's display for a person with an ordinary VNC viewer: a port on loopback, protected by a password.
//!
//! Backends provide displays without authentication ([`Machine::display`]), over channels that only this process has. A
//! port of the host is open to every user of it, so it requires a password (RFC 6143, 7.2.2: "VNC Authentication"),
//! which works once: it is spent by the viewer that it lets in, and a new one is generated when that viewer has left.

mod gate;
mod password;
#[cfg(test)]
mod tests;

use crate::{
    Error, Result,
    backend::{BoxedStream, Machine},
};
use futures::future::BoxFuture;
use password::{Challenge, Password};
use std::{
    fmt, io,
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};
use tokio::{
    io::{copy, split},
    net::{TcpListener, TcpStream},
    sync::{Mutex, OwnedMutexGuard, watch},
    task::{JoinHandle, JoinSet},
    time::{sleep, timeout},
};

/// How long a person may take to type the password.
const PASSWORD_LIMIT: Duration = Duration::from_secs(180);
/// How long the display may take to answer.
const DISPLAY_LIMIT: Duration = Duration::from_secs(10);
/// Delay after a wrong password, so that guessing one of 2⁴⁶ is not feasible.
const PENALTY: Duration = Duration::from_secs(1);
/// Maximum number of concurrent connections.
const MAX_CONNECTIONS: usize = 16;

/// A display behind a password, for VNC viewers on this host. Dropping it closes it and disconnects its viewer.
pub struct Viewer {
    address: SocketAddr,
    password: watch::Receiver<Option<Password>>,
    task: JoinHandle<()>,
}

/// Connects to the display.
type Dial = Box<dyn Fn() -> BoxFuture<'static, Result<BoxedStream>> + Send + Sync>;

/// State shared by the connections.
struct Shared {
    dial: Dial,
    /// The only seat, held by the connected viewer.
    seat: Arc<Mutex<()>>,
    /// The password of the next viewer; `None` while one is connected.
    password: watch::Sender<Option<Password>>,
}

/// The taken seat. When it is dropped, a new password is generated.
struct Seat {
    shared: Arc<Shared>,
    _taken: OwnedMutexGuard<()>,
}

impl Viewer {
    /// Opens a port for the display of a machine, as a task of the current Tokio runtime.
    ///
    /// Viewers see what the machine shows when they connect; the machine need not run yet.
    ///
    /// # Errors
    /// `Io` when no port can be opened.
    pub async fn open(machine: Arc<dyn Machine>) -> Result<Self> {
        Self::behind(Box::new(move || {
            let machine = Arc::clone(&machine);
            Box::pin(async move { machine.display().await })
        }))
        .await
    }

    async fn behind(dial: Dial) -> Result<Self> {
        crate::runtime::check()?;
        let failed = |error| Error::io("open a port for VNC viewers", error);
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let (password, known) = watch::channel(Some(Password::new()));
        let shared = Arc::new(Shared { dial, seat: Arc::default(), password });
        let task = tokio::spawn(keep_open(listener, shared));
        Ok(Self { address, password: known, task })
    }

    /// Returns the address that viewers connect to. Viewers that want two colons are given them: `127.0.0.1::5901`.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Returns the password that lets the next viewer in, once; `None` while a viewer is connected. It is a secret
    /// until it is spent.
    #[must_use]
    pub fn password(&self) -> Option<String> {
        self.password.borrow().as_ref().map(Password::as_text)
    }

    /// Waits until a viewer was let in or has left: [`password`](Self::password) then returns another value.
    pub async fn changed(&mut self) {
        if self.password.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

impl fmt::Debug for Viewer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Viewer").field("address", &self.address).finish_non_exhaustive()
    }
}

impl Drop for Viewer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.shared.password.send_replace(Some(Password::new()));
    }
}

/// Accepts viewers. Dropping the future disconnects them.
async fn keep_open(listener: TcpListener, shared: Arc<Shared>) {
    let mut visitors = JoinSet::new();
    loop {
        tokio::select! {
            Some(_) = visitors.join_next() => {}
            accepted = listener.accept(), if visitors.len() < MAX_CONNECTIONS => match accepted {
                Ok((stream, from)) => {
                    let shared = Arc::clone(&shared);
                    visitors.spawn(async move {
                        if let Err(error) = receive(&shared, stream).await {
                            tracing::debug!(%from, %error, "a VNC viewer disconnected");
                        }
                    });
                }
                // Usually temporary, such as a lack of file descriptors.
                Err(_) => sleep(Duration::from_millis(100)).await,
            }
        }
    }
}

async fn receive(shared: &Arc<Shared>, mut viewer: TcpStream) -> io::Result<()> {
    viewer.set_nodelay(true)?;
    let entering = async {
        if shared.seat.try_lock().is_err() {
            gate::turn_away(&mut viewer, "another viewer is connected to this display").await?;
            return Ok(None);
        }
        let challenge: Challenge = rand::random();
        let pending = gate::ask(&mut viewer, &challenge).await?;
        let Some(seat) = take_seat(shared, &challenge, &pending.response) else {
            sleep(PENALTY).await;
            pending.refuse(&mut viewer, "the password is wrong, or was used before").await?;
            return Ok(None);
        };
        match timeout(DISPLAY_LIMIT, display(shared)).await {
            Ok(Ok(display)) => {
                pending.admit(&mut viewer).await?;
                Ok(Some((seat, display)))
            }
            Ok(Err(error)) => {
                pending.refuse(&mut viewer, &format!("the display cannot be reached: {error}")).await?;
                Err(error)
            }
            Err(late) => {
                pending.refuse(&mut viewer, "the display did not answer").await?;
                Err(late.into())
            }
        }
    };
    let Some((_seat, display)) = timeout(PASSWORD_LIMIT, entering).await?? else { return Ok(()) };
    // When either side ends, both end.
    let ((mut from_viewer, mut to_viewer), (mut from_display, mut to_display)) =
        (split(viewer), split(display));
    tokio::select! {
        ended = copy(&mut from_viewer, &mut to_display) => ended?,
        ended = copy(&mut from_display, &mut to_viewer) => ended?,
    };
    Ok(())
}

/// Spends the password, if the response proves knowledge of it and the seat is still free.
fn take_seat(shared: &Arc<Shared>, challenge: &Challenge, response: &Challenge) -> Option<Seat> {
    let taken = Arc::clone(&shared.seat).try_lock_owned().ok()?;
    let mut is_proof = false;
    shared.password.send_if_modified(|password| {
        is_proof = password.as_ref().is_some_and(|password| password.is_proof(challenge, response));
        if is_proof {
            *password = None;
        }
        is_proof
    });
    is_proof.then(|| Seat { shared: Arc::clone(shared), _taken: taken })
}

async fn display(shared: &Shared) -> io::Result<BoxedStream> {
    let mut display = (shared.dial)().await.map_err(io::Error::other)?;
    gate::enter(&mut display).await?;
    Ok(display)
}
