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
mod keep;
mod limit;
mod locked;
mod log;
mod media;
mod panic;
mod pause;
mod sink;
mod talk;
mod vm;

pub use log::Events;
pub use pause::PausedVm;

use crate::{
    Error, ErrorKind, Result,
    backend::{Backend, KeptLab},
    event::{Event, FailureReport},
    module::Module,
    plan::Plan,
    secret::Masker,
};
use locked::Lock;
use pause::Pauses;
use sink::Sink;
use std::{
    fmt,
    path::PathBuf,
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

    /// Where a failed build leaves what belongs to its report: screenshots (PNG), and with [`FailurePolicy::Keep`] the key to
    /// get in. Made when needed; what is written is readable by its owner only, and is the caller's to remove.
    ///
    /// Without one, no screenshots are taken, and the key of a kept build goes to the directory for temporary files.
    pub fn report_dir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.options.report_dir = Some(dir.into());
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

    /// Starts it, as a task of the current Tokio runtime.
    ///
    /// # Panics
    /// Outside a Tokio runtime.
    pub fn start(self) -> BuildHandle {
        let (sink, log, pulse) = Sink::new(Masker::new(&self.plan.secrets), self.options.event_capacity);
        let cancel = CancellationToken::new();
        let (tell, outcome) = oneshot::channel();
        let (token, pauses) = (cancel.clone(), Arc::new(Pauses::default()));
        let paused = Arc::clone(&pauses);
        let span = tracing::info_span!("build", name = %self.plan.name, backend = self.backend.name());
        let work = async move {
            // Nobody may be listening any more: the build was cancelled by dropping its handle.
            let _ = tell.send(engine::run(self, sink, token, paused).await);
        };
        tokio::spawn(tracing::Instrument::instrument(work, span));
        BuildHandle { log, pulse, cancel, pauses, outcome }
    }
}

/// A build that runs. Dropping it cancels the build, which then cleans up on its own.
#[derive(Debug)]
#[must_use = "dropping the handle cancels the build"]
pub struct BuildHandle {
    log: Arc<Mutex<log::Log>>,
    pulse: watch::Receiver<()>,
    cancel: CancellationToken,
    pauses: Arc<Pauses>,
    outcome: oneshot::Receiver<Result<Module, Box<BuildFailure>>>,
}

impl BuildHandle {
    /// What happens, from the first event on, whenever it is asked for. Any number of readers; none keeps the build alive,
    /// and none that is slow stalls it.
    #[must_use]
    pub fn events(&self) -> Events {
        Events::new(Arc::clone(&self.log), self.pulse.clone())
    }

    /// Cancels the build. It cleans up before it ends. May be repeated.
    pub fn cancel(&self) {
        self.cancel.cancel();
    }

    /// A way to cancel the build from elsewhere, a signal handler for instance. Does not keep the build alive.
    #[must_use]
    pub fn canceller(&self) -> Canceller {
        Canceller(self.cancel.clone())
    }

    /// The VMs that wait for a person now, longest first.
    #[must_use]
    pub fn paused(&self) -> Vec<PausedVm> {
        self.pauses.list()
    }

    /// Lets a VM that waits for a person go on.
    ///
    /// # Errors
    /// `Conflict` when no VM of this name waits for a person now.
    pub fn resume(&self, vm: &str) -> Result<()> {
        self.pauses.resume(vm)
    }

    /// Waits for the end, cleaning up included. Dropping the future cancels the build.
    ///
    /// # Errors
    /// When the build failed or was cancelled.
    pub async fn outcome(mut self) -> Result<Module, Box<BuildFailure>> {
        (&mut self.outcome).await.unwrap_or_else(|_| {
            let error =
                Error::new(ErrorKind::Internal, "the Tokio runtime was shut down while the build ran");
            Err(Box::new(BuildFailure { error, report: FailureReport::default(), kept: None }))
        })
    }
}

impl Drop for BuildHandle {
    fn drop(&mut self) {
        self.cancel.cancel();
    }
}

/// Cancels a build from elsewhere.
#[derive(Debug, Clone)]
pub struct Canceller(CancellationToken);

impl Canceller {
    /// Cancels the build. It cleans up before it ends. May be repeated.
    pub fn cancel(&self) {
        self.0.cancel();
    }
}

/// Why a build made no module. `Display` and `source` are those of its error.
#[derive(Debug)]
#[non_exhaustive]
pub struct BuildFailure {
    /// What went wrong, without secrets.
    pub error: Error,
    /// What a person needs at once to understand it; empty when the build was cancelled.
    pub report: FailureReport,
    /// What was kept for inspection.
    pub kept: Option<KeptLab>,
}

impl BuildFailure {
    /// Whether the caller cancelled the build.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.error.kind() == ErrorKind::Cancelled
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
