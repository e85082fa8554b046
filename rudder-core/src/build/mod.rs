//! The engine: drives a plan to a module, and tells how it goes.
//!
//! ```text
//! build    Pending ▶ Networking ▶ Building ▶ CapturingDisks ▶ TemplateProvisioning ▶ Succeeded
//! each VM  Pending ▶ SourceImporting ▶ Booting ▶ [BootCommand] ▶ Provisioning ▶ ShuttingDown ▶ DiskCaptured ▶ Succeeded
//! ```
//!
//! and from every phase to `Failed`. VMs run side by side; the first failure stops the others. Every VM is defined
//! before the first is powered on, and every VM is provisioned before the first is shut down, since the steps of one may
//! need the others.
//!
//! - **Limits.** `timeout` spans the whole build with all its attempts and ends with the module; `sshTimeout` runs from
//!   power-on, or the end of the boot command, to a working login; `stepTimeout` spans a step. Each failure says which limit it was and which field raises it.
//! - **Death.** A machine that ends before its last step has ended fails the build within two seconds, with how it died.
//! - **Cancellation.** [`BuildHandle::cancel`], or dropping the handle. What was begun is ended and removed before the outcome
//!   is told; a cancellation that comes while the module is being published comes too late, and the build succeeds.
//! - **Pauses.** A `handbuild` step waits for a person: [`EventKind::Paused`](crate::event::EventKind::Paused) says what is
//!   to be done, [`BuildHandle::paused`] gives the machine, and [`BuildHandle::resume`] goes on. Nothing but the step's own
//!   `stepTimeout` ends a pause that nobody ends: the build's limit stands still meanwhile, unless
//!   [`Build::paused_deadline`] says otherwise.
//! - **Retries.** After a failure that [another try could help](crate::Error::is_retryable), the whole build starts again in a
//!   new lab, up to `retries` times.
//! - **Cleaning up** is not under the build's limit but under [`Build::cleanup_limit`]; what cannot be removed is a
//!   warning, and what [`Backend::reap`] is for.
//! - **Secrets** of the plan are masked in every event, error, report and record.
//!
//! # Example
//! ```
//! # use rudder_core::{backend::Backend, build::{Build, BuildFailure}, module::Module, plan::Plan};
//! # use std::sync::Arc;
//! async fn build(plan: Plan, backend: Arc<dyn Backend>) -> Result<Module, Box<BuildFailure>> {
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

pub use keep::kept_machines;
pub use log::Events;
pub use machines::BuildMachine;
pub use pause::PausedVm;

use crate::{
    Error, ErrorKind, Result,
    backend::{Backend, KeptLab},
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
    fmt,
    path::{self, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::sync::{oneshot, watch};
use tokio_util::sync::CancellationToken;

/// What becomes of the machines of a build that failed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FailurePolicy {
    /// They are removed.
    #[default]
    Destroy,
    /// They are kept for inspection, and an event says how to get in and how to remove them. A build that was
    /// cancelled, or that another attempt follows, keeps nothing.
    Keep,
}

/// What becomes of the limit of the whole build while one of its VMs waits for a person.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PausedDeadline {
    /// It stands still, for all VMs of the build.
    #[default]
    StandsStill,
    /// It runs on.
    Runs,
}

/// What a build was asked to do beside its plan.
#[derive(Debug, Clone)]
struct BuildOptions {
    on_failure: FailurePolicy,
    locked: Option<Lock>,
    fetcher: Option<Arc<dyn Fetch>>,
    report_dir: Option<PathBuf>,
    shutdown_limit: Duration,
    cleanup_limit: Duration,
    event_capacity: usize,
    paused_deadline: PausedDeadline,
}

/// A build that is about to start.
#[derive(Debug, Clone)]
#[must_use = "a build does nothing until it is started"]
pub struct Build {
    plan: Arc<Plan>,
    backend: Arc<dyn Backend>,
    options: BuildOptions,
}

impl Build {
    /// A build of this plan on this backend.
    pub fn new(plan: impl Into<Arc<Plan>>, backend: Arc<dyn Backend>) -> Self {
        let options = BuildOptions {
            on_failure: FailurePolicy::default(),
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

    /// What becomes of the machines when the build fails; they are destroyed by default.
    pub fn on_failure(mut self, policy: FailurePolicy) -> Self {
        self.options.on_failure = policy;
        self
    }

    /// Builds against the record of an earlier build: an input (image, file, parent module) whose bytes changed since, or
    /// that it does not know, fails the build before anything boots.
    pub fn locked(mut self, earlier: &Module) -> Self {
        self.options.locked = Some(Lock::new(earlier));
        self
    }

    /// Brings the files that the build reads to this host with `fetcher`, instead of [`Backend::fetcher`].
    pub fn fetcher(mut self, fetcher: Arc<dyn Fetch>) -> Self {
        self.options.fetcher = Some(fetcher);
        self
    }

    /// The directory for what belongs to the report of a failed build: screenshots (PNG), and with [`FailurePolicy::Keep`] the
    /// key to get in, where the backend has no directory for it. Created when needed; what is written is readable by its
    /// owner only, and is the caller's to remove.
    ///
    /// A relative path starts from the working directory of this moment, wherever the process goes later. Without a directory,
    /// no screenshots are taken.
    pub fn report_dir(mut self, dir: impl Into<PathBuf>) -> Self {
        let dir = dir.into();
        // Only an empty path, or a working directory that is gone, cannot be made absolute.
        self.options.report_dir = Some(path::absolute(PathBuf::from(".").join(&dir)).unwrap_or(dir));
        self
    }

    /// How long a guest may take to shut down before it is killed; 2 minutes by default. Half of the time it is asked from
    /// within, the other half by its power button. A guest that was killed is a warning, also in the provenance.
    pub fn shutdown_limit(mut self, limit: Duration) -> Self {
        self.options.shutdown_limit = limit;
        self
    }

    /// How long cleaning up may take; 1 minute by default. What is left then is a warning.
    pub fn cleanup_limit(mut self, limit: Duration) -> Self {
        self.options.cleanup_limit = limit;
        self
    }

    /// What becomes of the build's limit while a VM waits for a person; it stands still by default.
    pub fn paused_deadline(mut self, policy: PausedDeadline) -> Self {
        self.options.paused_deadline = policy;
        self
    }

    /// How many events of progress and output are kept for slow readers; 4096 by default, at least 1.
    pub fn event_capacity(mut self, events: usize) -> Self {
        self.options.event_capacity = events.max(1);
        self
    }

    /// Starts it, as a task of the current Tokio runtime. Without a runtime, or on one that was built without I/O or time,
    /// the build fails at once, and its outcome says what is missing.
    pub fn start(self) -> BuildHandle {
        let id = BuildId::random();
        let masker = Masker::new(&self.plan.secrets);
        let (sink, log, pulse) = Sink::new(id.clone(), masker, self.options.event_capacity);
        let canceller = Canceller::default();
        let (tell, outcome) = oneshot::channel();
        let shared = Arc::new(Shared { id, pauses: Arc::default(), machines: Arc::default() });
        let ended = canceller.ended.clone().drop_guard();
        if let Err(error) = crate::runtime::check() {
            let _ = tell.send(Err(engine::unable(&self, &shared, &sink, error)));
            return BuildHandle { log, pulse, canceller, shared, outcome };
        }
        let span = tracing::info_span!("build", id = %shared.id, name = %self.plan.name, backend = self.backend.name());
        let (token, told) = (canceller.cancel.clone(), Arc::clone(&shared));
        let work = async move {
            // Nobody may be listening any more: the build was cancelled by dropping its handle.
            let _ = tell.send(engine::run(self, sink, token, &told).await);
            // Also when the runtime drops this task: then nothing of it is left either.
            drop(ended);
        };
        tokio::spawn(tracing::Instrument::instrument(work, span));
        BuildHandle { log, pulse, canceller, shared, outcome }
    }
}

/// What a build that runs shares with its handle.
#[derive(Debug)]
struct Shared {
    id: BuildId,
    pauses: Arc<Pauses>,
    machines: Arc<Machines>,
}

/// A build that runs. Dropping it cancels the build, which then cleans up on its own; [`Canceller::ended`] waits for that.
#[derive(Debug)]
#[must_use = "dropping the handle cancels the build"]
pub struct BuildHandle {
    log: Arc<Mutex<log::Log>>,
    pulse: watch::Receiver<()>,
    canceller: Canceller,
    shared: Arc<Shared>,
    outcome: oneshot::Receiver<Result<Module, Box<BuildFailure>>>,
}

impl BuildHandle {
    /// The id of the build: its events and its report carry it.
    #[must_use]
    pub fn id(&self) -> &BuildId {
        &self.shared.id
    }

    /// What happens, from the first event on, whenever it is asked for. Any number of readers; none keeps the build alive,
    /// and none that is slow stalls it.
    #[must_use]
    pub fn events(&self) -> Events {
        Events::new(Arc::clone(&self.log), self.pulse.clone())
    }

    /// Cancels the build. It cleans up before it ends. May be repeated.
    pub fn cancel(&self) {
        self.canceller.cancel();
    }

    /// A way to cancel the build from elsewhere, a signal handler for instance, and to wait for its end. Does not keep the
    /// build alive.
    #[must_use]
    pub fn canceller(&self) -> Canceller {
        self.canceller.clone()
    }

    /// The machines of the current attempt that are defined by now, running or not: for their consoles, and for logging in
    /// to their guests. Empty before the first is defined and after the build has ended.
    #[must_use]
    pub fn machines(&self) -> Vec<BuildMachine> {
        self.shared.machines.list()
    }

    /// The machine of a VM.
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

    /// The VMs that wait for a person now, longest first.
    #[must_use]
    pub fn paused(&self) -> Vec<PausedVm> {
        self.shared.pauses.list()
    }

    /// Lets a VM that waits for a person go on.
    ///
    /// # Errors
    /// `Conflict` when no VM of this name waits for a person now.
    pub fn resume(&self, vm: &str) -> Result<()> {
        self.shared.pauses.resume(vm)
    }

    /// Waits for the end, cleaning up included. Dropping the future cancels the build.
    ///
    /// # Errors
    /// When the build failed or was cancelled.
    pub async fn outcome(mut self) -> Result<Module, Box<BuildFailure>> {
        (&mut self.outcome).await.unwrap_or_else(|_| {
            let error =
                Error::new(ErrorKind::Internal, "the Tokio runtime was shut down while the build ran");
            let report = FailureReport { build_id: Some(self.id().clone()), ..FailureReport::default() };
            Err(Box::new(BuildFailure { error, report, kept: None, machines: Vec::new() }))
        })
    }
}

impl Drop for BuildHandle {
    fn drop(&mut self) {
        self.cancel();
    }
}

/// Cancels a build from elsewhere, and knows when it has ended.
#[derive(Debug, Clone, Default)]
pub struct Canceller {
    cancel: CancellationToken,
    ended: CancellationToken,
}

impl Canceller {
    /// Cancels the build. It cleans up before it ends. May be repeated.
    pub fn cancel(&self) {
        self.cancel.cancel();
    }

    /// Waits until the build has ended and has cleaned up, whatever became of its handle. Any number of callers, also after
    /// the fact.
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

/// Why a build made no module. `Display` and `source` are those of its error; `Debug` (`{:?}`) is the whole report, because that
/// is what Rust prints of an error that `main` returns.
#[non_exhaustive]
pub struct BuildFailure {
    /// What went wrong, without secrets.
    pub error: Error,
    /// What a person needs at once to understand it; empty when the build was cancelled.
    pub report: FailureReport,
    /// What was kept for inspection.
    pub kept: Option<KeptLab>,
    /// The machines of what was kept, for this process.
    pub machines: Vec<BuildMachine>,
}

impl BuildFailure {
    /// Whether the caller cancelled the build.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.error.kind() == ErrorKind::Cancelled
    }
}

impl fmt::Debug for BuildFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { error, report, kept, machines } = self;
        if f.alternate() {
            let mut all = f.debug_struct("BuildFailure");
            return all
                .field("error", error)
                .field("report", report)
                .field("kept", kept)
                .field("machines", machines)
                .finish();
        }
        // A build that was cancelled, or lost its runtime, has no report beyond its error.
        if report.message.is_empty() {
            write!(f, "{error:?}")?;
        } else {
            write!(f, "{report}")?;
        }
        let Some(KeptLab { id, access, .. }) = kept else { return Ok(()) };
        write!(f, "\n  kept for inspection as lab {id}:")?;
        access.iter().try_for_each(|line| write!(f, "\n    {}", crate::visible::visible_line(line)))
    }
}

impl fmt::Display for BuildFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.error, f)
    }
}

impl std::error::Error for BuildFailure {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        std::error::Error::source(&self.error)
    }
}

impl Event {
    /// The event as one line of JSON, without its end.
    #[must_use]
    pub fn to_json(&self) -> String {
        // Nothing in an event can fail to serialise: no map with keys that are not text, no fallible type.
        serde_json::to_string(self).unwrap_or_default()
    }
}
