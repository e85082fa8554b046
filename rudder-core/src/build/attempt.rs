//! The phases of one attempt at a build, as types, and the state that its VMs share.
//!
//! ```text
//! Pending ──open──▶ Opened ──build──▶ Built ──capture──▶ Captured ──publish──▶ Module
//!          Networking        Building         CapturingDisks       TemplateProvisioning
//! ```
//!
//! | failed in | what is left behind |
//! |---|---|
//! | open | nothing |
//! | build, capture | the lab; no module |
//! | publish | the lab; no module, or (when the failure came after publishing) the whole module |
//!
//! The caller that runs the attempt holds the lab, and removes or keeps it afterwards: see `engine`.

use super::{
    BuildOptions,
    guard::Guard,
    locked::Lock,
    machines::Machines,
    media::Media,
    pause::Pauses,
    sink::Sink,
    vm::{Halted, Planned, Provisioned},
};
use crate::{
    Error, ErrorKind, Result,
    backend::{Backend, Lab, LabSpec, ModuleDraft, Retention},
    capability::{Capabilities, Capability},
    event::{BuildPhase, EventKind, FailureReport, VmPhase},
    fetch::Fetch,
    guest::BuildKey,
    hardware::{Firmware, GuestShell},
    module::{InputRecord, Module, Provenance, TemplateMachine},
    plan::{Hardware, Plan, PlannedContent, PlannedUrl, StepAction},
};
use futures::{StreamExt as _, stream::FuturesUnordered};
use std::{
    collections::HashSet,
    future::Future,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

/// How long an operation that must not be interrupted (opening a lab, publishing) may continue after a cancellation, and after the
/// build's deadline.
const ATOMIC_LIMIT: Duration = Duration::from_secs(10);
const ATOMIC_LIMIT_AT_DEADLINE: Duration = Duration::from_millis(750);

/// A failed attempt.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) error: Error,
    pub(super) report: Box<FailureReport>,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self { error, report: Box::default() }
    }
}

/// State shared by the VMs of an attempt.
#[derive(Debug)]
pub(super) struct Attempt {
    pub(super) plan: Arc<Plan>,
    pub(super) backend: Arc<dyn Backend>,
    pub(super) lab: Arc<dyn Lab>,
    pub(super) fetcher: Arc<dyn Fetch>,
    pub(super) options: Arc<BuildOptions>,
    pub(super) sink: Sink,
    pub(super) guard: Guard,
    pub(super) pauses: Arc<Pauses>,
    pub(super) key: BuildKey,
    pub(super) media: Media,
    /// The machines defined so far.
    pub(super) machines: Arc<Machines>,
    /// Whether any machine was powered on.
    pub(super) started: AtomicBool,
    inputs: Mutex<Vec<InputRecord>>,
}

impl Attempt {
    /// Records an input. A locked build rejects it when its bytes are not those of the record.
    pub(super) fn input(&self, vm: Option<&str>, input: InputRecord) -> Result<()> {
        let input = self.sink.masked_input(input);
        self.options.locked.as_ref().map_or(Ok(()), |lock: &Lock| lock.check(&input))?;
        let mut inputs = super::log::lock(&self.inputs);
        if !inputs.contains(&input) {
            inputs.push(input.clone());
            drop(inputs);
            self.sink.emit(vm, EventKind::Input(input));
        }
        Ok(())
    }
}

/// An attempt that has not started; nothing exists yet.
#[derive(Debug)]
pub(super) struct Pending {
    pub(super) plan: Arc<Plan>,
    pub(super) backend: Arc<dyn Backend>,
    pub(super) options: Arc<BuildOptions>,
    pub(super) sink: Sink,
    pub(super) guard: Guard,
    pub(super) pauses: Arc<Pauses>,
    pub(super) machines: Arc<Machines>,
}

/// An attempt whose lab is open.
#[derive(Debug)]
pub(super) struct Opened(pub(super) Arc<Attempt>);

/// An attempt whose VMs are all provisioned and powered off.
#[derive(Debug)]
pub(super) struct Built(Arc<Attempt>, Vec<Halted>);

/// An attempt whose disks are all captured.
#[derive(Debug)]
pub(super) struct Captured(Arc<Attempt>, Vec<TemplateMachine>);

/// Returns the capabilities that a machine needs and not every host has.
fn needs(hardware: &Hardware) -> impl Iterator<Item = Capability> {
    let firmware = match hardware.firmware {
        Firmware::Bios => None,
        Firmware::Uefi => Some(Capability::Uefi),
        Firmware::UefiSecureBoot => Some(Capability::SecureBoot),
    };
    firmware.into_iter().chain(hardware.tpm.then_some(Capability::Tpm))
}

impl Pending {
    /// Opens the lab.
    pub(super) async fn open(self) -> Result<Opened, Failure> {
        supported(&self.plan, self.backend.capabilities())?;
        if self.options.locked.is_some() {
            for (vm, warning) in super::locked::not_lockable(&self.plan) {
                self.sink.warn(Some(vm), warning);
            }
        }
        for planned in &self.plan.machines {
            self.sink.vm_phase(&planned.name, VmPhase::Pending);
        }
        self.sink.build_phase(BuildPhase::Networking);
        let mut spec = LabSpec::new(&self.plan.name, self.plan.network.clone());
        spec.retention = match self.options.on_failure {
            super::FailurePolicy::Keep => Retention::MayBeKept,
            super::FailurePolicy::Destroy => Retention::EndWithOwner,
        };
        spec.needs = self.plan.machines.iter().flat_map(|planned| needs(&planned.hardware)).collect();
        // An interruption would leave half a lab that has no owner.
        let lab = atomically(&self.guard, self.backend.open_lab(&spec)).await?;
        let Self { plan, backend, options, sink, guard, pauses, machines } = self;
        Ok(Opened(Arc::new(Attempt {
            plan,
            fetcher: options.fetcher.clone().unwrap_or_else(|| backend.fetcher()),
            backend,
            lab,
            options,
            sink,
            guard,
            pauses,
            key: BuildKey::generate(),
            media: Media::default(),
            machines,
            started: AtomicBool::new(false),
            inputs: Mutex::default(),
        })))
    }
}

impl Opened {
    /// Imports, boots, provisions and shuts down all VMs, in parallel.
    ///
    /// All VMs are defined before the first is powered on, and all are provisioned before the first is shut down: the steps of one
    /// may need the others.
    pub(super) async fn build(self) -> Result<Built, Failure> {
        let Self(attempt) = self;
        attempt.guard.halted()?;
        attempt.sink.build_phase(BuildPhase::Building);
        let halt = &attempt.guard.halt;

        let fetching = concurrently(
            halt,
            urls_to_fetch(&attempt.plan).into_iter().map(|(name, url)| {
                let attempt = &attempt;
                async move {
                    let fetched = attempt.fetch(url).await;
                    fetched.map(drop).map_err(|error| Failure::from(error.with_context("file", name)))
                }
            }),
        );
        let importing = concurrently(halt, Planned::all(&attempt).into_iter().map(Planned::import));
        let (fetched, imported) = futures::join!(fetching, importing);
        let defined = first_of(imported, fetched)?;
        attempt.start_serving().await?;

        let (waiting, all_done) = (AtomicUsize::new(defined.len()), CancellationToken::new());
        let provisioned = concurrently(
            halt,
            defined.into_iter().map(|vm| async {
                let provisioned = vm.boot().await?.provision().await?;
                if waiting.fetch_sub(1, Ordering::AcqRel) == 1 {
                    all_done.cancel();
                }
                provisioned.stand_by(&all_done).await
            }),
        )
        .await?;
        attempt.stop_serving();
        let halted = concurrently(halt, provisioned.into_iter().map(Provisioned::shut_down)).await?;
        Ok(Built(attempt, halted))
    }
}

impl Built {
    /// Captures all disks of all VMs, in parallel.
    pub(super) async fn capture(self) -> Result<Captured, Failure> {
        let Self(attempt, halted) = self;
        attempt.guard.halted()?;
        attempt.sink.build_phase(BuildPhase::CapturingDisks);
        let templates = concurrently(&attempt.guard.halt, halted.into_iter().map(Halted::capture)).await?;
        Ok(Captured(attempt, templates))
    }
}

impl Captured {
    /// Publishes the module. A cancellation at this point is too late, unless publishing hangs.
    pub(super) async fn publish(self) -> Result<Module, Failure> {
        let Self(attempt, templates) = self;
        attempt.guard.halted()?;
        attempt.sink.build_phase(BuildPhase::TemplateProvisioning);
        let (plan, sink) = (&attempt.plan, &attempt.sink);
        let mut provenance = Provenance::new(sink.mask(&plan.manifest), plan.digest);
        provenance.inputs = super::log::lock(&attempt.inputs).clone();
        provenance.inputs.sort_by(|a, b| (&a.role, &a.url).cmp(&(&b.role, &b.url)));
        provenance.versions = attempt.lab.versions();
        provenance.versions.insert("rudder".into(), env!("CARGO_PKG_VERSION").into());
        provenance.versions.insert("backend".into(), attempt.backend.name().to_owned());
        provenance.timings = sink.timings();
        provenance.not_repeatable.clone_from(&plan.not_repeatable);
        provenance.warnings = sink.warnings();
        let draft = ModuleDraft::new(&plan.name, templates, plan.template_network.clone(), provenance);
        let module = atomically(&attempt.guard, attempt.lab.publish(draft)).await?;
        for planned in &plan.machines {
            sink.vm_phase(&planned.name, VmPhase::Succeeded);
        }
        Ok(module)
    }
}

/// Rejects what this engine does not support, for plans that were made without checking. Nothing is ignored silently.
fn supported(plan: &Plan, backend: &Capabilities) -> Result<()> {
    let refuse = |what: &str, vm: &str| {
        let message = format!("this version of rudder does not support what the plan requires: {what}");
        Err(Error::new(ErrorKind::Unsupported, message).with_context("vm", vm))
    };
    for machine in &plan.machines {
        let vm = machine.name.as_str();
        if !machine.boot_command.is_empty() && !backend.has(Capability::Display) {
            return refuse("a boot command, on a backend without displays", vm);
        }
        if machine.communicator.shell != GuestShell::Bash {
            return refuse("a PowerShell guest", vm);
        }
        for step in &machine.steps {
            match &step.action {
                StepAction::Shell { .. } | StepAction::File { .. } | StepAction::Reboot { .. } => {}
                StepAction::Handbuild { .. } => {}
                StepAction::WindowsUpdate { .. } => return refuse("a windows-update step", vm),
            }
        }
    }
    Ok(())
}

/// Returns the files behind URLs that are served or that steps put into guests, each URL once, with its name for messages.
fn urls_to_fetch(plan: &Plan) -> Vec<(&str, &PlannedUrl)> {
    let served = plan.files.iter().filter(|file| plan.http_files.contains(&file.name));
    let served = served.map(|file| (file.name.as_str(), &file.content));
    let steps = plan.machines.iter().flat_map(|machine| &machine.steps);
    let put = steps.filter_map(|step| match &step.action {
        StepAction::File { content, label, .. } => Some((label.as_str(), content)),
        _ => None,
    });
    let mut urls_to_fetch: Vec<(&str, &PlannedUrl)> = Vec::new();
    let mut known = HashSet::new();
    for (name, content) in served.chain(put) {
        if let PlannedContent::Url(url) = content
            && known.insert(url)
        {
            urls_to_fetch.push((name, url));
        }
    }
    urls_to_fetch
}

/// Runs the same phase of several VMs in parallel. The first failure cancels the rest and is returned when all have ended;
/// otherwise the results are in the order of the VMs.
async fn concurrently<T, F>(
    halt: &CancellationToken,
    work: impl Iterator<Item = F>,
) -> Result<Vec<T>, Failure>
where
    F: Future<Output = Result<T, Failure>>,
{
    let mut running: FuturesUnordered<_> =
        work.enumerate().map(|(index, work)| async move { (index, work.await) }).collect();
    let mut done = Vec::new();
    let mut first: Option<Failure> = None;
    while let Some((index, result)) = running.next().await {
        match result {
            Ok(value) => done.push((index, value)),
            Err(failure) => {
                halt.cancel();
                first = Some(match first {
                    None => failure,
                    Some(known) => more_relevant(known, failure),
                });
            }
        }
    }
    done.sort_by_key(|(index, _)| *index);
    first.map_or_else(|| Ok(done.into_iter().map(|(_, value)| value).collect()), Err)
}

/// Returns the first of two failures, unless it is a mere cancellation, which explains nothing.
fn more_relevant(first: Failure, second: Failure) -> Failure {
    if first.error.kind() == ErrorKind::Cancelled { second } else { first }
}

/// Returns the first value if both succeeded, otherwise the failure that explains more.
fn first_of<T, U>(one: Result<T, Failure>, other: Result<U, Failure>) -> Result<T, Failure> {
    match (one, other) {
        (Ok(value), Ok(_)) => Ok(value),
        (Err(one), Err(other)) => Err(more_relevant(one, other)),
        (Err(one), Ok(_)) => Err(one),
        (Ok(_), Err(other)) => Err(other),
    }
}

/// Waits for an operation that should not be interrupted: it may continue for a moment after a cancellation or the deadline, and if
/// it succeeds in that time, its result counts.
async fn atomically<T>(guard: &Guard, operation: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::pin!(operation);
    match guard.wait(async { Ok(operation.as_mut().await) }).await {
        Ok(result) => result,
        Err(stopped) => {
            let grace =
                if stopped.kind() == ErrorKind::TimedOut { ATOMIC_LIMIT_AT_DEADLINE } else { ATOMIC_LIMIT };
            match timeout(grace, operation).await {
                Ok(Ok(value)) => Ok(value),
                _ => Err(stopped),
            }
        }
    }
}
