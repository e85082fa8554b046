//! One attempt at a login: dialling, the greeting, the key exchange, the credentials. Each stage has its own time
//! limit.

use super::{
    Guest, cuttable_stream,
    login::{Endpoint, HostKeyPin, Login},
    pace::{AttemptFailure, Pace},
};
use crate::{Error, ErrorKind};
use russh::{
    MethodKind, MethodSet,
    client::{self, AuthResult, KeyboardInteractiveAuthResponse},
    keys::{PrivateKeyWithHashAlg, PublicKeyOrCertificate},
};
use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::{
    sync::{Notify, watch},
    time::{Instant, timeout},
};

/// How long a server that has sent a byte may take for the key exchange, and then for each round of credentials.
/// Emulated guests under load take a minute; OpenSSH hangs up after two (sshd_config, `LoginGraceTime`).
const STAGE_LIMIT: Duration = Duration::from_secs(150);
/// A server that is silent for this long may be gone: other attempts are made beside this one.
const STALLED_AFTER: Duration = Duration::from_secs(20);
/// How often credentials are tried on one connection: OpenSSH hangs up after 6 failures (sshd_config, `MaxAuthTries`),
/// and new connections would earn penalties (sshd_config, `PerSourcePenalties`).
const MAX_TRIES: u32 = 5;

/// How an attempt ended.
pub(super) enum AttemptEnd {
    LoggedIn(Box<Guest>),
    Failed(AttemptFailure),
    Fatal(Error),
}

/// State shared by the attempts of one wait.
#[derive(Debug)]
pub(super) struct Attempts {
    pub(super) pace: Mutex<Pace>,
    /// Notified when an attempt receives something, falls silent or ends.
    pub(super) changed: Notify,
    observations: Mutex<Observations>,
}

/// What was seen of a guest that has not let the build in.
#[derive(Debug, Default)]
struct Observations {
    /// A description that follows "last seen: ".
    last: Option<String>,
    refused: Option<MethodSet>,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Attempts {
    pub(super) fn new(pace: Pace) -> Self {
        Self { pace: Mutex::new(pace), changed: Notify::new(), observations: Mutex::default() }
    }

    pub(super) fn end(&self, number: u64, failure: AttemptFailure) {
        lock(&self.pace).end(number, failure, Instant::now());
        self.changed.notify_waiters();
    }

    fn data_arrived(&self, number: u64) {
        lock(&self.pace).data_arrived(number, Instant::now());
        self.changed.notify_waiters();
    }

    fn stalls(&self, number: u64) {
        lock(&self.pace).stalls(number);
        self.changed.notify_waiters();
    }

    fn observed(&self, what: impl Into<String>) {
        lock(&self.observations).last = Some(what.into());
    }

    /// Returns the error of a wait that timed out.
    pub(super) fn error(&self, user: &str, password: bool, waited: Duration) -> Error {
        let (seconds, observations) = (waited.as_secs_f64(), lock(&self.observations));
        if let Some(methods) = &observations.refused {
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
                 or set `sshPassword` or `sshPrivateKeySecret` to credentials that the image accepts",
            );
        }
        let last = observations.last.as_deref().unwrap_or("no connection could be made");
        let times = match lock(&self.pace).attempts() {
            1 => "1 attempt".to_owned(),
            attempts => format!("{attempts} attempts"),
        };
        Error::new(
            ErrorKind::GuestUnreachable,
            format!("expected an SSH login within {seconds:.0} s, but the guest did not answer ({times}; last seen: {last})"),
        )
        .with_help(
            "check the serial console and the screenshot, whether the image starts an SSH server on \
             `sshPort`, and whether `sshTimeout` is long enough",
        )
    }
}

/// Makes one attempt. `patience` is the time limit for the first byte.
pub(super) async fn attempt(
    login: Login,
    endpoint: Endpoint,
    tries: Arc<Attempts>,
    number: u64,
    patience: Duration,
) -> AttemptEnd {
    let failed = |failure: AttemptFailure, what: String| {
        tries.observed(what);
        AttemptEnd::Failed(failure)
    };
    let given_up_for = |why: Option<String>| {
        why.into_iter().for_each(|why| tries.observed(why));
        AttemptEnd::Failed(AttemptFailure::GivenUp)
    };
    let end = Instant::now() + patience;
    let dialled = tokio::select! {
        dialled = endpoint.dial() => dialled,
        why = given_up(&tries, number, end) => return given_up_for(why),
    };
    let stream = match dialled {
        Ok(stream) => stream,
        Err(error) if error.kind() == ErrorKind::GuestUnreachable || error.is_retryable() => {
            return failed(AttemptFailure::Closed, first_cause(&error));
        }
        Err(error) => return AttemptEnd::Fatal(error),
    };
    let (stream, watch) = cuttable_stream::cuttable(stream);
    let received = watch.received();
    let state = Arc::new(ConnectionState::default());
    let handler = Handler { pin: login.pin.clone(), state: Arc::clone(&state) };
    let connecting = client::connect_stream(Arc::new(config()), stream, handler);
    let mut handle = tokio::select! {
        connected = connecting => match connected {
            Ok(handle) => handle,
            Err(_) if lock(&state.changed).is_some() => return AttemptEnd::Fatal(changed_key(&state)),
            Err(error) => {
                let silent = *received.borrow() == 0;
                return match (error, watch.text()) {
                    (russh::Error::Disconnect | russh::Error::HUP | russh::Error::IO(_), _) if silent => {
                        failed(AttemptFailure::Closed, "the connection was closed before the server sent \
                             anything".to_owned())
                    }
                    (error, _) if silent => {
                        failed(AttemptFailure::Closed, format!("the connection failed before the server sent \
                             anything: {error}"))
                    }
                    (_, Some(text)) => failed(AttemptFailure::Broke, format!("the server closed the \
                         connection and sent: {text}")),
                    (error, None) => {
                        failed(AttemptFailure::Broke, format!("the server answered, but the key exchange \
                             failed: {error}"))
                    }
                };
            }
        },
        why = silence(received.clone(), &tries, number, end, "the key exchange") => return given_up_for(why),
    };
    lock(&tries.pace).key_exchange_ended();
    tries.observed("the SSH server answered, but the login did not complete");
    let mut count = 0;
    loop {
        let authenticating = authenticate(&mut handle, &login, &mut count);
        let refused = tokio::select! {
            outcome = authenticating => match outcome {
                Ok(None) => break,
                Ok(Some(methods)) => methods,
                Err(error) => {
                    return failed(AttemptFailure::Broke, format!("the connection broke during the login: \
                         {error}"));
                }
            },
            why = silence(received.clone(), &tries, number, end, "the login") => return given_up_for(why),
        };
        {
            let mut observations = lock(&tries.observations);
            // A server that hangs up does not list its methods: those it listed before are kept.
            if !refused.is_empty() || observations.refused.is_none() {
                observations.refused = Some(refused);
            }
        }
        if count >= MAX_TRIES || handle.is_closed() {
            return AttemptEnd::Failed(AttemptFailure::Refused);
        }
        let pause = lock(&tries.pace).refused(Instant::now());
        tokio::time::sleep(pause).await;
    }
    if let Some(key) = lock(&state.key).as_deref() {
        login.pin.pin(key);
    }
    AttemptEnd::LoggedIn(Box::new(Guest::new(handle, watch, state, login.username.clone())))
}

/// Completes when an attempt on which nothing arrived should end: its time is over, which is reported, or the server
/// answers on another attempt.
async fn given_up(tries: &Attempts, number: u64, end: Instant) -> Option<String> {
    loop {
        let changed = tries.changed.notified();
        if lock(&tries.pace).is_overtaken(number) {
            return None;
        }
        tokio::select! {
            () = changed => {}
            () = tokio::time::sleep_until(end) => {
                return Some("the connection was accepted, but the server sent nothing".to_owned());
            }
        }
    }
}

/// Completes when an attempt should end: nothing has arrived until `end`, or a stage takes longer than it may.
async fn silence(
    mut received: watch::Receiver<u64>,
    tries: &Attempts,
    number: u64,
    end: Instant,
    stage: &str,
) -> Option<String> {
    if *received.borrow_and_update() == 0 {
        tokio::select! {
            changed = received.changed() => if changed.is_err() {
                // The connection is over, which the future that uses it reports.
                std::future::pending::<()>().await;
            },
            why = given_up(tries, number, end) => return why,
        }
    }
    let talk = async {
        loop {
            tries.data_arrived(number);
            match timeout(STALLED_AFTER, received.changed()).await {
                Ok(Ok(())) => continue,
                Ok(Err(_)) => {}
                Err(_) => {
                    tries.stalls(number);
                    if received.changed().await.is_ok() {
                        continue;
                    }
                }
            }
            std::future::pending::<()>().await;
        }
    };
    let _ = timeout(STAGE_LIMIT, talk).await;
    Some(format!("the server answered, but {stage} did not end within {} s", STAGE_LIMIT.as_secs()))
}

/// Tries all credentials once. Returns `None` if they were accepted, else the methods that the server would still
/// accept.
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
        // Any number of rounds is allowed, even without prompts (RFC 4256, 3.2); more than a few are not meant for this
        // client.
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
        // A guest that is silent for over a minute is gone; one under load answers late.
        keepalive_interval: Some(Duration::from_secs(15)),
        keepalive_max: 4,
        nodelay: true,
        ..client::Config::default()
    }
}

/// What is known of a connection: shared between its handler, which the SSH library owns, and its guest.
#[derive(Debug, Default)]
pub(super) struct ConnectionState {
    // The host key, in wire format.
    key: Mutex<Option<Vec<u8>>>,
    // The fingerprint of the host key, if it is not the pinned one.
    changed: Mutex<Option<String>>,
    // Why the connection ended.
    pub(super) ended: Mutex<Option<String>>,
}

fn changed_key(state: &ConnectionState) -> Error {
    let fingerprint = lock(&state.changed).clone().unwrap_or_default();
    Error::new(
        ErrorKind::Protocol,
        format!("expected the host key that the guest presented before, but found another ({fingerprint})"),
    )
    .with_help(
        "generate host keys before the first login, or not at all; otherwise another machine may be \
         answering",
    )
    .with_retryable(false)
}

/// The client side of a connection.
pub(super) struct Handler {
    pin: HostKeyPin,
    state: Arc<ConnectionState>,
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
            *lock(&self.state.changed) = Some(key.fingerprint(russh::keys::HashAlg::Sha256).to_string());
            return Ok(false);
        }
        *lock(&self.state.key) = Some(bytes);
        Ok(true)
    }

    async fn disconnected(
        &mut self,
        reason: client::DisconnectReason<Self::Error>,
    ) -> Result<(), Self::Error> {
        let (reason, result) = match reason {
            client::DisconnectReason::ReceivedDisconnect(info) => {
                (format!("the server closed the connection: {}", info.message), Ok(()))
            }
            client::DisconnectReason::Error(error) => (error.to_string(), Err(error)),
        };
        *lock(&self.state.ended) = Some(reason);
        result
    }
}

/// Returns the innermost cause, which contains the message of the operating system.
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
