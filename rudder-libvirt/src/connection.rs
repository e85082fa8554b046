//! The connection to libvirt: calls that do not block the runtime and are bounded in time, and reconnecting after a
//! loss.
//!
//! A libvirt call blocks until the daemon replies. Each call runs on a thread for blocking work and is abandoned after
//! [`CALL_LIMIT`]. A lost connection is reopened before each call. A query changes nothing, so it is repeated once if
//! the connection breaks during it. A command is not repeated: it may have been executed.

use rudder_core::{Error, ErrorKind, Result};
use rudder_local::process::without_advice;
use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, Once, PoisonError},
    time::Duration,
};
use virt::{
    connect::Connect,
    domain::Domain,
    error::{ErrorNumber, clear_error_callback},
    sys,
};

/// How long libvirt may take to reply.
const CALL_LIMIT: Duration = Duration::from_secs(60);

/// The error that libvirt returns when a call fails.
pub(crate) type Refusal = virt::error::Error;

/// Why a call failed.
#[derive(Debug)]
pub(crate) enum Failure {
    /// There is no connection, or it broke during the call.
    Lost(Error),
    /// Libvirt returned an error.
    Refused(Refusal),
}

impl Failure {
    /// Converts this failure to an error of the given kind, unless the connection is what failed.
    pub(crate) fn into_error(self, kind: ErrorKind, what: &str) -> Error {
        match self {
            Self::Lost(error) => error,
            Self::Refused(refusal) => {
                let kind = match refusal.code() {
                    ErrorNumber::AccessDenied | ErrorNumber::AuthFailed | ErrorNumber::OperationDenied => {
                        ErrorKind::HostMissing
                    }
                    ErrorNumber::NoSupport | ErrorNumber::OperationUnsupported => ErrorKind::Unsupported,
                    _ => kind,
                };
                let output = without_advice(refusal.message());
                let output = output.trim();
                let full = output.contains("No space left on device");
                let kind = if full { ErrorKind::HostDiskFull } else { kind };
                Error::new(kind, format!("cannot {what}: libvirt: {output}"))
            }
        }
    }

    /// Returns whether libvirt knows no such domain.
    pub(crate) fn is_no_domain(&self) -> bool {
        matches!(self, Self::Refused(refusal) if refusal.code() == ErrorNumber::NoDomain)
    }
}

/// An open connection. Closing it waits for the daemon, so a separate thread does that.
struct Link(Option<Connect>);

impl Drop for Link {
    fn drop(&mut self) {
        if let Some(mut connect) = self.0.take() {
            let close = move || {
                // Nothing is left to do if the connection is broken already.
                let _ = connect.close();
            };
            if let Err(error) =
                std::thread::Builder::new().name("rudder-libvirt-close".to_owned()).spawn(close)
            {
                tracing::warn!(%error, "cannot close a connection to libvirt");
            }
        }
    }
}

/// A connection that is opened when it is first needed, and reopened after a loss.
pub(crate) struct Connection {
    uri: String,
    link: Mutex<Option<Arc<Link>>>,
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("uri", &self.uri).finish_non_exhaustive()
    }
}

impl Connection {
    pub(crate) fn new(uri: String) -> Self {
        // Otherwise libvirt writes every error to the standard error of the embedding program.
        static SILENT: Once = Once::new();
        SILENT.call_once(clear_error_callback);
        Self { uri, link: Mutex::default() }
    }

    pub(crate) fn uri(&self) -> &str {
        &self.uri
    }

    /// Runs a query, and repeats it once if the connection breaks.
    pub(crate) async fn query<T: Send + 'static>(
        self: &Arc<Self>,
        query: impl Fn(&Connect) -> Result<T, Refusal> + Send + 'static,
    ) -> Result<T, Failure> {
        let this = Arc::clone(self);
        this.clone().bounded(move || this.query_blocking(query)).await
    }

    /// Runs a command, on a connection that was just verified to work.
    pub(crate) async fn command<T: Send + 'static>(
        self: &Arc<Self>,
        command: impl FnOnce(&Connect) -> Result<T, Refusal> + Send + 'static,
    ) -> Result<T, Failure> {
        let this = Arc::clone(self);
        this.clone().bounded(move || this.command_blocking(command)).await
    }

    /// A blocking [`query`](Self::query).
    pub(crate) fn query_blocking<T>(
        &self,
        query: impl Fn(&Connect) -> Result<T, Refusal>,
    ) -> Result<T, Failure> {
        match self.with_link(&query) {
            Err(Failure::Lost(_)) => self.with_link(&query),
            other => other,
        }
    }

    /// A blocking [`command`](Self::command).
    pub(crate) fn command_blocking<T>(
        &self,
        command: impl FnOnce(&Connect) -> Result<T, Refusal>,
    ) -> Result<T, Failure> {
        self.query_blocking(Connect::get_lib_version)?;
        self.with_link(command)
    }

    async fn bounded<T: Send + 'static>(
        self: Arc<Self>,
        work: impl FnOnce() -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, Failure> {
        let failed = |kind, message: String| Failure::Lost(self.with_uri(Error::new(kind, message)));
        match tokio::time::timeout(CALL_LIMIT, tokio::task::spawn_blocking(work)).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(error)) => {
                Err(failed(ErrorKind::Internal, format!("a call to libvirt was interrupted: {error}")))
            }
            Err(_) => {
                self.discard_link();
                let limit = CALL_LIMIT.as_secs();
                Err(failed(ErrorKind::TimedOut, format!("libvirt did not answer within {limit} s")))
            }
        }
    }

    fn with_link<T>(&self, work: impl FnOnce(&Connect) -> Result<T, Refusal>) -> Result<T, Failure> {
        let link = self.open()?;
        let Some(connect) = &link.0 else {
            return Err(Failure::Lost(
                self.with_uri(Error::new(ErrorKind::Internal, "the connection was closed")),
            ));
        };
        work(connect).map_err(|refusal| {
            // Checks the socket, without a request to the daemon.
            if connect.is_alive().unwrap_or(false) {
                return Failure::Refused(refusal);
            }
            self.discard_link();
            let message = format!("the connection to libvirt was lost: {}", refusal.message().trim());
            Failure::Lost(self.with_uri(Error::new(ErrorKind::Protocol, message)))
        })
    }

    fn open(&self) -> Result<Arc<Link>, Failure> {
        let mut current = self.link();
        if let Some(link) = &*current {
            return Ok(Arc::clone(link));
        }
        let connect = Connect::open(Some(&self.uri)).map_err(|refusal| {
            let message = format!("cannot connect to libvirt: {}", refusal.message().trim());
            let error = Error::new(ErrorKind::HostMissing, message).with_help(
                "start libvirtd (systemctl start libvirtd, or apt-get install libvirt-daemon-system), add the user to the \
                 group libvirt, or use the URI qemu:///session",
            );
            Failure::Lost(self.with_uri(error))
        })?;
        let link = Arc::new(Link(Some(connect)));
        *current = Some(Arc::clone(&link));
        Ok(link)
    }

    fn with_uri(&self, error: Error) -> Error {
        error.with_context("uri", &self.uri)
    }

    fn discard_link(&self) {
        *self.link() = None;
    }

    fn link(&self) -> MutexGuard<'_, Option<Arc<Link>>> {
        self.link.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Looks up the domain with this name.
pub(crate) fn domain(connect: &Connect, name: &str) -> Result<Domain, Refusal> {
    Domain::lookup_by_name(connect, name)
}

/// Ends a domain if it runs, and removes it along with everything that libvirt keeps of it. A domain that does not
/// exist is not an error.
pub(crate) fn remove_domain(domain: &Domain) -> Result<(), Refusal> {
    let ignore_missing = |result: Result<(), Refusal>, ignored: ErrorNumber| match result {
        Err(refusal) if refusal.code() == ErrorNumber::NoDomain || refusal.code() == ignored => Ok(()),
        other => other,
    };
    // The domain may end by itself in the meantime.
    ignore_missing(domain.destroy(), ErrorNumber::OperationInvalid)?;
    let flags = sys::VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
        | sys::VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
        | sys::VIR_DOMAIN_UNDEFINE_NVRAM;
    ignore_missing(domain.undefine_flags(flags), ErrorNumber::NoDomain)
}
