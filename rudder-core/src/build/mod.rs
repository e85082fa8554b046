//! The engine: drives a plan to a module, and reports its progress.
//!
//! ```text
//! build    Pending ▶ Networking ▶ Building ▶ CapturingDisks ▶ TemplateProvisioning ▶ Succeeded
//! each VM  Pending ▶ SourceImporting ▶ Booting ▶ [BootCommand] ▶ Provisioning ▶ ShuttingDown ▶ DiskCaptured ▶ Succeeded
//! ```
//!
//! and from every phase to `Failed`. VMs are built in parallel; the first failure stops the others. Every VM is defined before the
//! first is powered on, and every VM is provisioned before the first is shut down, since the steps of one may need the others.
//!
//! - **Limits.** `timeout` covers the whole build with all its attempts, until the module exists; `sshTimeout` runs from power-on,
//!   or the end of the boot command, to a working login; `stepTimeout` covers a step. Each failure names the limit that was
//!   exceeded and the field that raises it.
//! - **Death.** A machine that ends before its last step has ended fails the build within two seconds, with the cause.
//! - **Cancellation.** [`BuildHandle::cancel`], or dropping the handle. Work in progress is stopped and cleaned up before the
//!   outcome is returned. A cancellation that arrives while the module is being published is too late, and the build succeeds.
//! - **Pauses.** A `handbuild` step waits for a person: [`EventKind::Paused`](crate::event::EventKind::Paused) says what to do,
//!   [`BuildHandle::paused`] returns the machine, and [`BuildHandle::resume`] continues the build. Without a call to it, only the
//!   step's own `stepTimeout` ends a pause: the build's limit is suspended meanwhile, unless [`Build::paused_deadline`] says
//!   otherwise.
//! - **Retries.** After a failure that [a retry could fix](crate::Error::is_retryable), the whole build starts again in a new lab,
//!   up to `retries` times.
//! - **Cleanup** is not subject to the build's limit but to [`Build::cleanup_limit`]. What cannot be removed is reported as a
//!   warning, and left to [`Backend::reap`].
//! - **Secrets** of the plan are masked in every event, error, report and record.
//!
//! # Example
//! ```
//! # use rudder_core::{backend::Backend, build::Build, module::Module, plan::Plan};
//! # use std::sync::Arc;
//! async fn build(plan: Plan, backend: Arc<dyn Backend>) -> rudder_core::Result<Module> {
//!     let build = Build::new(plan, backend).start();
//!     let mut events = build.events();
//!     while let Some(event) = events.next().await {
//!         println!("{event:?}");
//!     }
//!     build.outcome().await
//! }
//! ```

mod attempt;
mod boot;
mod engine;
mod evidence;
mod failure;
mod guard;
mod guest_session;
mod keep;
mod limit;
mod locked;
mod log;
mod machines;
mod media;
mod panic;
mod pause;
mod sink;
mod vm;

pub use failure::BuildFailure;
pub use keep::{kept_labs, kept_machines};
pub use log::Events;
pub use machines::BuildMachine;
pub use pause::PausedVm;

use crate::{
    Error, ErrorKind, Result,
    backend::Backend,
    event::{BuildId, Event, FailureReport},
    fetch::Fetch,
    module::Module,
    plan::Plan,
    secret::Masker,
};
use locked::Lock;
use machines::Machines;
use pause::Pauses;
use sink::Sink;
use std::{
    path::{self, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::sync::{oneshot, watch};
use tokio_util::sync::CancellationToken;

/// What happens to the machines of a failed build.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FailurePolicy {
    /// The machines are removed.
    #[default]
    Destroy,
    /// The machines are kept for inspection, and an event says how to access and how to remove them. Nothing is kept of a build
    /// that was cancelled, or of an attempt that is followed by another.
    Keep,
}

/// What happens to the limit of the whole build while one of its VMs waits for a person.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PausedDeadline {
    /// The limit is suspended, for all VMs of the build.
    #[default]
    Suspended,
    /// The limit keeps running.
    Runs,
}

/// Options of a build apart from its plan.
#[derive(Debug, Clone)]
struct BuildOptions {
    on_failure: FailurePolicy,
    keep_for: Option<Duration>,
    locked: Option<Lock>,
    fetcher: Option<Arc<dyn Fetch>>,
    report_dir: Option<PathBuf>,
    shutdown_limit: Duration,
    cleanup_limit: Duration,
    event_capacity: usize,
    paused_deadline: PausedDeadline,
}

/// A build that has not been started.
#[derive(Debug, Clone)]
#[must_use = "a build does nothing until it is started"]
pub struct Build {
    plan: Arc<Plan>,
    backend: Arc<dyn Backend>,
    options: BuildOptions,
}

impl Build {
    /// Creates a build of this plan on this backend.
    pub fn new(plan: impl Into<Arc<Plan>>, backend: Arc<dyn Backend>) -> Self {
        let options = BuildOptions {
            on_failure: FailurePolicy::default(),
            keep_for: None,
            locked: None,
            fetcher: None,
            report_dir: None,
            shutdown_limit: Duration::from_secs(120),
            cleanup_limit: Duration::from_secs(60),
            event_capacity: 4096,
            paused_deadline: PausedDeadline::default(),
        };
        Self { plan: plan.into(), backend, options }
    }

    /// Sets what happens to the machines when the build fails; they are destroyed by default.
    pub fn on_failure(mut self, policy: FailurePolicy) -> Self {
        self.options.on_failure = policy;
        self
    }

    /// Sets how long the machines of a failed build are kept, with [`FailurePolicy::Keep`]: after that time, the next clean-up of the
    /// backend removes them. By default, they are kept until they are removed.
    pub fn keep_for(mut self, time: Duration) -> Self {
        self.options.keep_for = Some(time);
        self
    }

    /// Compares the inputs with the record of an earlier build: an input (image, file, parent module) whose bytes have changed, or
    /// that the record does not contain, fails the build before any machine boots.
    pub fn locked(mut self, earlier: &Module) -> Self {
        self.options.locked = Some(Lock::new(earlier));
        self
    }

    /// Fetches the files that the build reads with `fetcher` instead of [`Backend::fetcher`].
    pub fn fetcher(mut self, fetcher: Arc<dyn Fetch>) -> Self {
        self.options.fetcher = Some(fetcher);
        self
    }

    /// Sets the directory for what belongs to the report of a failed build: screenshots (PNG) and, with [`FailurePolicy::Keep`],
    /// the key to log in, where programs on this host do not find the files of the lab. Created when needed. The files are readable
    /// by their owner only, and the caller is responsible for removing them.
    ///
    /// A relative path is resolved against the current working directory at the time of this call. Without a directory, no
    /// screenshots are taken.
    pub fn report_dir(mut self, dir: impl Into<PathBuf>) -> Self {
        let dir = dir.into();
        // Fails only for an empty path or a working directory that no longer exists.
        self.options.report_dir = Some(path::absolute(PathBuf::from(".").join(&dir)).unwrap_or(dir));
        self
    }

    /// Sets how long a guest may take to shut down before it is killed; 2 minutes by default. For the first half of the time the
    /// guest is asked from within, for the second half with its power button. Killing a guest is a warning, which is also recorded
    /// in the provenance.
    pub fn shutdown_limit(mut self, limit: Duration) -> Self {
        self.options.shutdown_limit = limit;
        self
    }

    /// Sets how long cleanup may take; 1 minute by default. What is left after that is reported as a warning.
    pub fn cleanup_limit(mut self, limit: Duration) -> Self {
        self.options.cleanup_limit = limit;
        self
    }

    /// Sets what happens to the build's limit while a VM waits for a person; it is suspended by default.
    pub fn paused_deadline(mut self, policy: PausedDeadline) -> Self {
        self.options.paused_deadline = policy;
        self
    }

    /// Sets how many events of progress and output are kept for slow readers; 4096 by default, at least 1.
    pub fn event_capacity(mut self, events: usize) -> Self {
        self.options.event_capacity = events.max(1);
        self
    }

    /// Starts the build as a task of the current Tokio runtime. Without a runtime, or on one that was built without I/O or time,
    /// the build fails at once, and its outcome says what is missing.
    pub fn start(self) -> BuildHandle {
        let id = BuildId::random();
        let masker = Masker::new(&self.plan.secrets);
        let (sink, log, pulse) = Sink::new(id.clone(), masker, self.options.event_capacity);
        let canceller = Canceller::default();
        let (sender, outcome) = oneshot::channel();
        let shared = Arc::new(Shared { id, pauses: Arc::default(), machines: Arc::default() });
        let ended = canceller.ended.clone().drop_guard();
        if let Err(error) = crate::runtime::check() {
            let _ = sender.send(Err(engine::cannot_start(&self, &shared, &sink, error)));
            return BuildHandle { log, pulse, canceller, shared, outcome };
        }
        let span = tracing::info_span!("build", id = %shared.id, name = %self.plan.name, backend = self.backend.name());
        let (token, state) = (canceller.cancel.clone(), Arc::clone(&shared));
        let work = async move {
            // The receiver may be gone: the build was cancelled by dropping its handle.
            let _ = sender.send(engine::run(self, sink, token, &state).await);
            // Also when the runtime drops this task, since nothing of the build is left then either.
            drop(ended);
        };
        tokio::spawn(tracing::Instrument::instrument(work, span));
        BuildHandle { log, pulse, canceller, shared, outcome }
    }
}

/// State shared between a running build and its handle.
#[derive(Debug)]
struct Shared {
    id: BuildId,
    pauses: Arc<Pauses>,
    machines: Arc<Machines>,
}

/// A running build. Dropping the handle cancels the build, which then cleans up on its own; [`Canceller::ended`] waits for that.
#[derive(Debug)]
#[must_use = "dropping the handle cancels the build"]
pub struct BuildHandle {
    log: Arc<Mutex<log::Log>>,
    pulse: watch::Receiver<()>,
    canceller: Canceller,
    shared: Arc<Shared>,
    outcome: oneshot::Receiver<Result<Module>>,
}

impl BuildHandle {
    /// Returns the id of the build, which its events and its report carry.
    #[must_use]
    pub fn id(&self) -> &BuildId {
        &self.shared.id
    }

    /// Returns the events from the first one on, whenever it is called. Any number of readers; no reader keeps the build alive, and
    /// a slow one does not stall it.
    #[must_use]
    pub fn events(&self) -> Events {
        Events::new(Arc::clone(&self.log), self.pulse.clone())
    }

    /// Cancels the build. The build cleans up before it ends. May be repeated.
    pub fn cancel(&self) {
        self.canceller.cancel();
    }

    /// Returns a way to cancel the build from elsewhere, such as a signal handler, and to wait for its end. Does not keep the build
    /// alive.
    #[must_use]
    pub fn canceller(&self) -> Canceller {
        self.canceller.clone()
    }

    /// Returns the machines that the current attempt has defined so far, running or not, for access to their consoles and guests.
    /// Empty before the first is defined and after the build has ended.
    #[must_use]
    pub fn machines(&self) -> Vec<BuildMachine> {
        self.shared.machines.list()
    }

    /// Returns the machine of a VM.
    ///
    /// # Errors
    /// `NotFound` when the current attempt has not defined a machine of this name.
    pub fn machine(&self, vm: &str) -> Result<BuildMachine> {
        self.machines().into_iter().find(|machine| machine.name() == vm).ok_or_else(|| {
            Error::new(
                ErrorKind::NotFound,
                format!("expected VM {vm} to have a machine by now, but it has none"),
            )
            .with_help("wait for its phase `Booting`")
        })
    }

    /// Returns the VMs that are waiting for a person, longest wait first.
    #[must_use]
    pub fn paused(&self) -> Vec<PausedVm> {
        self.shared.pauses.list()
    }

    /// Resumes a VM that is waiting for a person.
    ///
    /// # Errors
    /// `Conflict` when no VM of this name is waiting for a person.
    pub fn resume(&self, vm: &str) -> Result<()> {
        self.shared.pauses.resume(vm)
    }

    /// Waits for the end of the build, including cleanup. Dropping the future cancels the build.
    ///
    /// # Errors
    /// When the build failed, or was cancelled (`Cancelled`). The error has the details as its [`BuildFailure`].
    pub async fn outcome(mut self) -> Result<Module> {
        (&mut self.outcome).await.unwrap_or_else(|_| {
            let error =
                Error::new(ErrorKind::Internal, "the Tokio runtime was shut down while the build ran");
            let report = FailureReport { build_id: Some(self.id().clone()), ..FailureReport::default() };
            Err(error.with_detail(BuildFailure { report, kept: None, machines: Vec::new() }))
        })
    }
}

impl Drop for BuildHandle {
    fn drop(&mut self) {
        self.cancel();
    }
}

/// Cancels a build from elsewhere, and waits for its end.
#[derive(Debug, Clone, Default)]
pub struct Canceller {
    cancel: CancellationToken,
    ended: CancellationToken,
}

impl Canceller {
    /// Cancels the build. The build cleans up before it ends. May be repeated.
    pub fn cancel(&self) {
        self.cancel.cancel();
    }

    /// Waits until the build has ended and has cleaned up, even if its handle was dropped. Any number of callers may wait; returns
    /// at once if the build has already ended.
    ///
    /// ```
    /// # use rudder_core::build::BuildHandle;
    /// async fn abandon(build: BuildHandle) {
    ///     let canceller = build.canceller();
    ///     drop(build);
    ///     canceller.ended().await;
    /// }
    /// ```
    pub async fn ended(&self) {
        self.ended.cancelled().await;
    }
}

impl Event {
    /// Returns the event as one line of JSON, without the line ending.
    #[must_use]
    pub fn to_json(&self) -> String {
        // Serialisation cannot fail: an event contains no map with non-text keys and no fallible type.
        serde_json::to_string(self).unwrap_or_default()
    }
}
