//! From a machine that was just powered on to a working login.
//!
//! While a guest boots, its port refuses, swallows or drops connections, in whatever way the hypervisor's network does
//! that; then its server may answer before cloud-init has put the key in place. So attempts are cheap, overlap while
//! they are silent, are left in peace as soon as the server has said a byte, and are repeated until the time is over.
//! What was last seen is part of the error then.

use super::{BuildKey, Guest, wire};
use crate::{
    Error, ErrorKind, Result,
    backend::{BoxedStream, Machine},
    secret::Secret,
};
use futures::{StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use russh::{
    MethodKind, MethodSet,
    client::{self, AuthResult, KeyboardInteractiveAuthResponse},
    keys::{PrivateKeyWithHashAlg, PublicKeyOrCertificate},
};
use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::time::Instant;

/// After an attempt that failed at once, the next one starts so much later.
const PAUSE: Duration = Duration::from_millis(100);
/// An attempt on which nothing came for so long gets company.
const SILENCE: Duration = Duration::from_millis(500);
/// So many attempts may be silent side by side. Fewer than the 10 unauthenticated connections at which OpenSSH starts to
/// refuse (sshd_config, MaxStartups).
const MAX_SILENT: usize = 8;
/// A silent attempt is given up when it is this old…
const GIVE_UP_SILENT: Duration = Duration::from_secs(5);
/// …and an attempt on which something came when nothing more has come for so long: emulated guests take seconds for a
/// key exchange.
const GIVE_UP_STALLED: Duration = Duration::from_secs(30);
/// One of so many attempts, the first among them, has that much time from the start: to a guest under load, every
/// connection is a process to start, and if all of them were given up early it would do nothing but start them.
const PATIENT: u64 = 8;
/// After a refusal of the credentials, they are tried again so much later, on the same connection while the server
/// bears it: new connections would earn penalties (sshd_config, PerSourcePenalties).
const REFUSAL_PAUSE: Duration = Duration::from_secs(1);
/// OpenSSH hangs up after 6 failures (sshd_config, MaxAuthTries).
const MAX_TRIES: u32 = 5;

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

    fn allows(&self, key: &[u8]) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).as_deref().is_none_or(|pinned| pinned == key)
    }

    fn pin(&self, key: &[u8]) {
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
        let sight = Arc::new(Mutex::new(Sight::default()));
        match tokio::time::timeout(timeout, self.keep_trying(endpoint, &sight)).await {
            Ok(result) => result,
            Err(_) => Err(sight.lock().unwrap_or_else(PoisonError::into_inner).error(
                &self.username,
                self.password.is_some(),
                start.elapsed(),
            )),
        }
    }

    async fn keep_trying(&self, endpoint: &Endpoint, sight: &Arc<Mutex<Sight>>) -> Result<Guest> {
        let mut attempts: FuturesUnordered<BoxFuture<'static, Ended>> = FuturesUnordered::new();
        let crowd = Arc::new(Crowd::default());
        let mut next = Instant::now();
        let mut number = 0u64;
        loop {
            let spoken = crowd.spoken.notified();
            tokio::select! {
                () = tokio::time::sleep_until(next), if attempts.len() < MAX_SILENT && !crowd.somebody_spoke() => {
                    number += 1;
                    lock(sight).attempts = number;
                    attempts.push(Box::pin(attempt(
                        self.clone(), endpoint.clone(), Arc::clone(sight), Arc::clone(&crowd), number,
                    )));
                    next = Instant::now() + SILENCE;
                }
                Some(ended) = attempts.next() => {
                    match ended {
                        Ended::LoggedIn(guest) => return Ok(*guest),
                        Ended::Fatal(error) => return Err(error),
                        Ended::Failed => next = next.min(Instant::now() + PAUSE),
                        Ended::Refused => next = Instant::now() + REFUSAL_PAUSE,
                    }
                }
                // The guest began to speak on one: the silent ones end themselves, and the guest has one to work on.
                () = spoken => {}
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the attempts of one wait know of each other.
#[derive(Default)]
struct Crowd {
    // The number of the attempt that the guest speaks on; 0: none.
    speaker: std::sync::atomic::AtomicU64,
    spoken: tokio::sync::Notify,
}

impl Crowd {
    fn somebody_spoke(&self) -> bool {
        self.speaker.load(std::sync::atomic::Ordering::SeqCst) != 0
    }

    fn speak(&self, number: u64) {
        use std::sync::atomic::Ordering::SeqCst;
        let _ = self.speaker.compare_exchange(0, number, SeqCst, SeqCst);
        self.spoken.notify_waiters();
    }

    fn fall_silent(&self, number: u64) {
        use std::sync::atomic::Ordering::SeqCst;
        let _ = self.speaker.compare_exchange(number, 0, SeqCst, SeqCst);
        self.spoken.notify_waiters();
    }
}

enum Ended {
    LoggedIn(Box<Guest>),
    Failed,
    Refused,
    Fatal(Error),
}

/// What was seen of a guest that did not let us in.
#[derive(Debug, Default)]
struct Sight {
    attempts: u64,
    // In words, after "last seen: ".
    last: Option<String>,
    refused: Option<MethodSet>,
}

impl Sight {
    fn error(&self, user: &str, password: bool, waited: Duration) -> Error {
        let seconds = waited.as_secs_f64();
        if let Some(methods) = &self.refused {
            let tried = if password { "the build's key and the password" } else { "the build's key" };
            let offered: Vec<&str> = methods.iter().map(<&str>::from).collect();
            let offered = if offered.is_empty() { "nothing more".to_owned() } else { offered.join(", ") };
            return Error::new(
                ErrorKind::Authentication,
                format!(
                    "the guest answered, but refused user {user:?} for {seconds:.0} s: tried {tried}; the server offers {offered}"
                ),
            )
            .with_help(
                "let cloud-init authorise the key (`cloudInit: {}` and the right `sshUsername`), \
                 or give `sshPassword` or `sshPrivateKeySecret` that the image knows",
            );
        }
        let last = self.last.as_deref().unwrap_or("no connection could be made");
        let times =
            if self.attempts == 1 { "1 attempt".to_owned() } else { format!("{} attempts", self.attempts) };
        Error::new(
            ErrorKind::GuestUnreachable,
            format!("expected an SSH login within {seconds:.0} s, but the guest did not answer ({times}; last seen: {last})"),
        )
        .with_help(
            "look at the serial console and the screenshot; does the image start an SSH server on `sshPort`, and is `sshTimeout` long enough?",
        )
    }
}

/// Ends with the attempt, however it ends.
struct Turn {
    crowd: Arc<Crowd>,
    number: u64,
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.crowd.fall_silent(self.number);
    }
}

async fn attempt(
    login: Login,
    endpoint: Endpoint,
    sight: Arc<Mutex<Sight>>,
    crowd: Arc<Crowd>,
    number: u64,
) -> Ended {
    let failed = |what: String| {
        lock(&sight).last = Some(what);
        Ended::Failed
    };
    let turn = Turn { crowd, number };
    let stream = match endpoint.dial().await {
        Ok(stream) => stream,
        Err(error) if error.kind() == ErrorKind::GuestUnreachable || error.is_retryable() => {
            return failed(first_cause(&error));
        }
        Err(error) => return Ended::Fatal(error),
    };
    let (wire, watch) = wire::wire(stream);
    let received = watch.received();
    let seen = Arc::new(Seen::default());
    let handler = Handler { pin: login.pin.clone(), seen: Arc::clone(&seen) };
    let connecting = client::connect_stream(Arc::new(config()), wire, handler);
    let mut handle = tokio::select! {
        connected = connecting => match connected {
            Ok(handle) => handle,
            Err(_) if lock(&seen.changed).is_some() => return Ended::Fatal(changed_key(&seen)),
            Err(error) => {
                let spoke = *received.borrow() > 0;
                return failed(match error {
                    russh::Error::Disconnect | russh::Error::HUP | russh::Error::IO(_) if !spoke => {
                        "the connection was closed before the server said anything".to_owned()
                    }
                    error if spoke => format!("the server answered, but the key exchange failed: {error}"),
                    error => format!("the connection failed before the server said anything: {error}"),
                });
            }
        },
        why = stalled(received.clone(), &turn) => return failed(why),
    };
    lock(&sight).last = Some("the SSH server answered, but the login was not finished".to_owned());
    let mut tries = 0;
    loop {
        let authenticating = authenticate(&mut handle, &login, &mut tries);
        let refused = tokio::select! {
            outcome = authenticating => match outcome {
                Ok(None) => break,
                Ok(Some(methods)) => methods,
                Err(error) => return failed(format!("the connection broke during the login: {error}")),
            },
            why = stalled(received.clone(), &turn) => return failed(why),
        };
        {
            let mut sight = lock(&sight);
            // A server that hangs up says nothing of its methods: what it said before counts.
            if !refused.is_empty() || sight.refused.is_none() {
                sight.refused = Some(refused);
            }
        }
        if tries >= MAX_TRIES || handle.is_closed() {
            return Ended::Refused;
        }
        tokio::time::sleep(REFUSAL_PAUSE).await;
    }
    if let Some(key) = lock(&seen.key).as_deref() {
        login.pin.pin(key);
    }
    Ended::LoggedIn(Box::new(Guest::new(handle, watch, seen, login.username.clone())))
}

/// Ends when the attempt should: it is silent and old, or it is silent and another is spoken to, or it stalled.
async fn stalled(mut received: tokio::sync::watch::Receiver<u64>, turn: &Turn) -> String {
    use std::sync::atomic::Ordering::SeqCst;
    let patience = if turn.number % PATIENT == 1 { GIVE_UP_STALLED } else { GIVE_UP_SILENT };
    let end = Instant::now() + patience;
    loop {
        let spoken = turn.crowd.spoken.notified();
        let bytes = *received.borrow_and_update();
        if bytes > 0 {
            turn.crowd.speak(turn.number);
            if let Ok(changed) = tokio::time::timeout(GIVE_UP_SILENT, received.changed()).await {
                if changed.is_err() {
                    std::future::pending::<()>().await;
                }
                continue;
            }
            // It may still come; but others may try meanwhile: perhaps the guest restarted.
            turn.crowd.fall_silent(turn.number);
            match tokio::time::timeout(GIVE_UP_STALLED, received.changed()).await {
                Ok(Ok(())) => continue,
                Ok(Err(_)) => std::future::pending().await,
                Err(_) => return "the server answered, then nothing more came".to_owned(),
            }
        }
        let speaker = turn.crowd.speaker.load(SeqCst);
        if speaker != 0 && speaker != turn.number {
            return "the server answered on another connection".to_owned();
        }
        tokio::select! {
            changed = received.changed() => if changed.is_err() { std::future::pending::<()>().await },
            () = spoken => {}
            () = tokio::time::sleep_until(end) => {
                return "the connection was accepted, but the server said nothing".to_owned();
            }
        }
    }
}

/// One round of everything we have; `None`: let in, else what the server would still take.
async fn authenticate(
    handle: &mut client::Handle<Handler>,
    login: &Login,
    tries: &mut u32,
) -> Result<Option<MethodSet>, russh::Error> {
    let hash = if login.key.is_rsa() { handle.best_supported_rsa_hash().await?.flatten() } else { None };
    let key = PrivateKeyWithHashAlg::new(login.key.private(), hash);
    *tries += 1;
    let mut methods = match handle.authenticate_publickey(&login.username, key).await? {
        AuthResult::Success => return Ok(None),
        AuthResult::Failure { remaining_methods, .. } => remaining_methods,
    };
    let Some(password) = &login.password else { return Ok(Some(methods)) };
    if methods.contains(&MethodKind::Password) {
        *tries += 1;
        match handle.authenticate_password(&login.username, password.expose()).await? {
            AuthResult::Success => return Ok(None),
            AuthResult::Failure { remaining_methods, .. } => methods = remaining_methods,
        }
    }
    if methods.contains(&MethodKind::KeyboardInteractive) {
        *tries += 1;
        let mut answer = handle.authenticate_keyboard_interactive_start(&login.username, None).await?;
        // Any number of rounds is allowed, also with no prompts (RFC 4256, 3.2): more than a few are not for us.
        for _ in 0..8 {
            match answer {
                KeyboardInteractiveAuthResponse::Success => return Ok(None),
                KeyboardInteractiveAuthResponse::Failure { remaining_methods, .. } => {
                    methods = remaining_methods;
                    break;
                }
                KeyboardInteractiveAuthResponse::InfoRequest { prompts, .. } => {
                    let answers = prompts.iter().map(|_| password.expose().to_owned()).collect();
                    answer = handle.authenticate_keyboard_interactive_respond(answers).await?;
                }
            }
        }
    }
    Ok(Some(methods))
}

fn config() -> client::Config {
    client::Config {
        client_id: russh::SshId::Standard(concat!("SSH-2.0-rudder_", env!("CARGO_PKG_VERSION")).into()),
        // A guest that says nothing for over a minute is gone; one under load answers late.
        keepalive_interval: Some(Duration::from_secs(15)),
        keepalive_max: 4,
        nodelay: true,
        ..client::Config::default()
    }
}

/// What a connection learned: shared between its handler, which the SSH library owns, and its guest.
#[derive(Debug, Default)]
pub(super) struct Seen {
    // The host key, as on the wire.
    key: Mutex<Option<Vec<u8>>>,
    // Set when it is not the pinned one: its fingerprint.
    changed: Mutex<Option<String>>,
    // Why the connection ended.
    pub(super) ended: Mutex<Option<String>>,
}

fn changed_key(seen: &Seen) -> Error {
    let fingerprint = lock(&seen.changed).clone().unwrap_or_default();
    Error::new(
        ErrorKind::Protocol,
        format!("expected the host key that the guest showed before, but found another ({fingerprint})"),
    )
    .with_help(
        "did a step make new host keys, or does another machine answer? Make host keys before the first login, or not at all",
    )
    .with_retryable(false)
}

/// The client's side of a connection.
pub(super) struct Handler {
    pin: HostKeyPin,
    seen: Arc<Seen>,
}

impl client::Handler for Handler {
    type Error = russh::Error;

    async fn check_server_key(&mut self, key: &PublicKeyOrCertificate) -> Result<bool, Self::Error> {
        let key = match key {
            PublicKeyOrCertificate::PublicKey { key, .. } => key.clone(),
            PublicKeyOrCertificate::Certificate(certificate) => certificate.public_key().clone().into(),
        };
        let bytes = key.to_bytes()?;
        if !self.pin.allows(&bytes) {
            *lock(&self.seen.changed) = Some(key.fingerprint(russh::keys::HashAlg::Sha256).to_string());
            return Ok(false);
        }
        *lock(&self.seen.key) = Some(bytes);
        Ok(true)
    }

    async fn disconnected(
        &mut self,
        reason: client::DisconnectReason<Self::Error>,
    ) -> Result<(), Self::Error> {
        let (words, result) = match reason {
            client::DisconnectReason::ReceivedDisconnect(info) => {
                (format!("the server hung up: {}", info.message), Ok(()))
            }
            client::DisconnectReason::Error(error) => (error.to_string(), Err(error)),
        };
        *lock(&self.seen.ended) = Some(words);
        result
    }
}

/// The innermost cause, which says what the operating system said.
fn first_cause(error: &Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    if std::ptr::eq(cause, error as &dyn std::error::Error) {
        error.to_string()
    } else {
        format!("{error}: {cause}")
    }
}
