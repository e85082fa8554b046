//! The phases of one VM, as types: each consumes the previous one and holds exactly what the next needs.
//!
//! ```text
//! Planned ──import──▶ Defined ──boot──▶ Booted ──provision──▶ Provisioned ──shut_down──▶ Halted ──capture──▶ template
//!  SourceImporting     Booting           Provisioning          (stands by)  ShuttingDown   DiskCaptured
//!                    [BootCommand]
//! ```
//!
//! Any failure ends in [`Failure`], with evidence gathered while the machine still existed. What it leaves behind:
//!
//! | failed in | what the lab holds |
//! |---|---|
//! | import | volumes, no machine |
//! | boot, provision | a machine that is running or has died |
//! | shut down | a machine that is running or was killed |
//! | capture | a powered-off machine, some captured disks |
//!
//! All of it belongs to the lab and is removed with it; a VM removes nothing itself.

use super::{
    attempt::{Attempt, Failure},
    boot::BootCommand,
    evidence,
    guard::ended,
    guest_session::{self, StepFailure},
    machines::BuildMachine,
};
use crate::{
    Error, ErrorKind, Result,
    backend::{Exit, ImportRequest, Machine, MachineDisk, MachineSpec, Stop, Volume},
    event::{EventKind, FailureReport, VmPhase},
    guest::Session,
    module::TemplateMachine,
    plan::{PlannedDisk, PlannedMachine, PlannedSource},
    units::human_duration,
};
use std::sync::Arc;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

/// A VM of an attempt.
#[derive(Debug, Clone)]
pub(super) struct Vm {
    pub(super) attempt: Arc<Attempt>,
    index: usize,
}

/// A VM of which nothing exists yet.
#[derive(Debug)]
pub(super) struct Planned(Vm);

/// A VM whose disks are imported and whose machine is defined.
#[derive(Debug)]
pub(super) struct Defined(Vm, BuildMachine);

/// A VM that is running, with a session in its guest.
#[derive(Debug)]
pub(super) struct Booted(Vm, Arc<dyn Machine>, Session);

/// A VM whose steps have run. It keeps running until those of the other VMs have, too.
#[derive(Debug)]
pub(super) struct Provisioned(Vm, Arc<dyn Machine>, Session);

/// A VM that is powered off.
#[derive(Debug)]
pub(super) struct Halted(Vm, Arc<dyn Machine>);

impl Vm {
    pub(super) fn planned(&self) -> &PlannedMachine {
        &self.attempt.plan.machines[self.index]
    }

    pub(super) fn name(&self) -> &str {
        &self.planned().name
    }

    fn enter(&self, phase: VmPhase) {
        self.attempt.sink.vm_phase(self.name(), phase);
    }

    /// Turns an error of this VM into a failure: gathers the evidence, and enters the phase `Failed`.
    async fn failed(&self, machine: Option<&Arc<dyn Machine>>, error: Error) -> Failure {
        let error = error.with_context("vm", self.name());
        let phase = Some(self.attempt.sink.phase_of(self.name()));
        let report = FailureReport { vm: Some(self.name().to_owned()), phase, ..FailureReport::default() };
        self.gathered(machine, Failure { error, report: Box::new(report) }).await
    }

    /// Turns the failure of a step into a failure, as `failed` does.
    async fn step_failed(&self, machine: &Arc<dyn Machine>, index: usize, failure: StepFailure) -> Failure {
        let StepFailure { error, exit } = failure;
        let step = format!("{} ({})", index + 1, self.planned().steps[index].name);
        let error = error.with_context("step", &step).with_context("vm", self.name());
        let sink = &self.attempt.sink;
        let report = FailureReport {
            vm: Some(self.name().to_owned()),
            phase: Some(VmPhase::Provisioning),
            step: Some(step),
            exit,
            output_tail: sink.output_tail(self.name()),
            ..FailureReport::default()
        };
        self.gathered(Some(machine), Failure { error, report: Box::new(report) }).await
    }

    async fn gathered(&self, machine: Option<&Arc<dyn Machine>>, failure: Failure) -> Failure {
        let Failure { error, mut report } = failure;
        self.announce(&error);
        if error.kind() != ErrorKind::Cancelled
            && let Some(machine) = machine
        {
            let attempt = &self.attempt;
            let dir = attempt.options.report_dir.as_deref();
            let id = attempt.lab.id().as_str();
            let screenshot = dir.map(|dir| dir.join(format!("{id}-{}.png", self.name())));
            let capabilities = attempt.backend.capabilities();
            if matches!(report.phase, Some(VmPhase::Booting | VmPhase::BootCommand)) {
                report.served = attempt.served_to(self.name());
            }
            evidence::gather(&mut report, machine, capabilities, screenshot.as_deref(), &attempt.sink).await;
        }
        Failure { error, report }
    }

    /// Reports that this VM has failed, and why, and stops the others: at once, and only once. Gathering evidence takes its time
    /// afterwards.
    pub(super) fn announce(&self, error: &Error) {
        let sink = &self.attempt.sink;
        if sink.phase_of(self.name()) == VmPhase::Failed {
            return;
        }
        self.enter(VmPhase::Failed);
        if error.kind() != ErrorKind::Cancelled {
            self.attempt.guard.halt.cancel();
            let message = format!("failed: {error}");
            sink.emit(Some(self.name()), EventKind::Notice { message });
        }
    }
}

impl Planned {
    pub(super) fn all(attempt: &Arc<Attempt>) -> Vec<Self> {
        let vms = 0..attempt.plan.machines.len();
        vms.map(|index| Self(Vm { attempt: Arc::clone(attempt), index })).collect()
    }

    /// Imports its sources into the lab, and defines the machine.
    pub(super) async fn import(self) -> Result<Defined, Failure> {
        let Self(vm) = self;
        vm.enter(VmPhase::SourceImporting);
        match Self::define(&vm).await {
            Ok(defined) => Ok(Defined(vm, defined)),
            Err(error) => Err(vm.failed(None, error).await),
        }
    }

    async fn define(vm: &Vm) -> Result<BuildMachine> {
        let (attempt, planned) = (&vm.attempt, vm.planned());
        let hardware = &planned.hardware;
        let mut spec = MachineSpec::new(&planned.name, hardware.cpus, hardware.memory);
        spec.firmware = hardware.firmware;
        spec.tpm = hardware.tpm;
        if let PlannedSource::BuildRef(parent) = &planned.source {
            spec.state_of = Some(parent.clone());
        }
        spec.nics.clone_from(&hardware.nics);
        spec.ports = vec![planned.communicator.port];
        spec.seed = guest_session::seed(attempt, planned)?;
        spec.cdroms = attempt.cdroms(planned).await?;
        spec.floppy = attempt.floppy(planned).await?;
        for (place, disk) in hardware.disks.iter().enumerate() {
            let volume = Self::volume(vm, place, disk)
                .await
                .map_err(|error| error.with_context("disk", &disk.name))?;
            spec.disks.push(MachineDisk { name: disk.name.clone(), bus: disk.bus, volume });
        }
        let machine = attempt.guard.wait(attempt.lab.create_machine(&spec)).await?;
        let defined = guest_session::reachable(attempt, planned, machine)?;
        attempt.machines.add(defined.clone());
        Ok(defined)
    }

    async fn volume(vm: &Vm, place: usize, disk: &PlannedDisk) -> Result<Volume> {
        let (attempt, planned) = (&vm.attempt, vm.planned());
        // The source becomes the first disk. Of the others, those of a parent module are imported from it, and the rest are blank.
        let source = if place == 0 || disk.inherited { planned.source.clone() } else { PlannedSource::Blank };
        let mut request = ImportRequest::new(&planned.name, &disk.name, source, disk.size);
        request.parent_disk = disk.inherited.then(|| disk.name.clone());
        let progress = attempt.sink.progress(Some(&planned.name));
        let imported = attempt.guard.wait(attempt.lab.import(&request, &progress)).await?;
        if let Some(input) = imported.input {
            attempt.input(Some(&planned.name), input)?;
        }
        Ok(imported.volume)
    }
}

impl Defined {
    /// Powers the machine on, types its boot command, and logs in.
    pub(super) async fn boot(self) -> Result<Booted, Failure> {
        let Self(vm, defined) = self;
        let machine = Arc::clone(defined.machine());
        match Self::log_in(&vm, &defined).await {
            Ok(session) => Ok(Booted(vm, machine, session)),
            Err(error) => Err(vm.failed(Some(&machine), error).await),
        }
    }

    async fn log_in(vm: &Vm, defined: &BuildMachine) -> Result<Session> {
        vm.enter(VmPhase::Booting);
        let (guard, machine) = (&vm.attempt.guard, defined.machine());
        let boot_command = BootCommand::of(&vm.attempt, vm.planned())?;
        vm.attempt.started.store(true, std::sync::atomic::Ordering::Relaxed);
        guard.wait(machine.start()).await?;
        let powered_on = Instant::now();
        if let Some(boot_command) = boot_command {
            vm.enter(VmPhase::BootCommand);
            boot_command.run(vm, machine).await?;
        }
        let session = guest_session::log_in(vm, defined).await?;
        let millis = u64::try_from(powered_on.elapsed().as_millis()).unwrap_or(u64::MAX);
        vm.attempt.sink.emit(Some(vm.name()), EventKind::GuestReady { millis });
        Ok(session)
    }
}

impl Booted {
    /// Runs the steps, in order.
    pub(super) async fn provision(self) -> Result<Provisioned, Failure> {
        let Self(vm, machine, mut session) = self;
        vm.enter(VmPhase::Provisioning);
        for step in 0..vm.planned().steps.len() {
            if let Err(failure) = guest_session::run_step(&vm, &machine, &mut session, step).await {
                return Err(vm.step_failed(&machine, step, failure).await);
            }
        }
        Ok(Provisioned(vm, machine, session))
    }
}

impl Provisioned {
    /// Watches the machine until all VMs are provisioned, since the steps of the others may need it.
    ///
    /// A guest may power itself off in this time: its last step has ended, and it is about to be shut down anyway.
    pub(super) async fn stand_by(self, all: &CancellationToken) -> Result<Self, Failure> {
        let Self(vm, machine, _) = &self;
        let all = async {
            tokio::select! {
                biased;
                () = all.cancelled() => Ok(()),
                exit = machine.wait() => match exit? {
                    Exit::PoweredOff => {
                        all.cancelled().await;
                        Ok(())
                    }
                    exit => Err(ended(&exit, "waiting for the other VMs")),
                },
            }
        };
        match vm.attempt.guard.wait(all).await {
            Ok(()) => Ok(self),
            Err(error) => Err(vm.failed(Some(machine), error).await),
        }
    }

    /// Shuts the machine down: from within the guest, or by its power button, or by killing it, which is reported.
    pub(super) async fn shut_down(self) -> Result<Halted, Failure> {
        let Self(vm, machine, session) = self;
        vm.enter(VmPhase::ShuttingDown);
        match Self::power_off(&vm, &machine, session).await {
            Ok(()) => Ok(Halted(vm, machine)),
            Err(error) => Err(vm.failed(Some(&machine), error).await),
        }
    }

    async fn power_off(vm: &Vm, machine: &Arc<dyn Machine>, session: Session) -> Result<()> {
        let limit = vm.attempt.options.shutdown_limit;
        let stopping = async {
            tokio::select! {
                biased;
                exit = machine.wait() => return exit,
                error = guest_session::power_off(&session) => {
                    tracing::debug!(vm = vm.name(), %error, "the guest cannot be powered off from within");
                }
                () = sleep(limit / 2) => {}
            }
            machine.stop(Stop::Graceful { limit: limit / 2 }).await
        };
        match vm.attempt.guard.wait(stopping).await? {
            Exit::PoweredOff => {}
            Exit::Killed { why } => vm.attempt.sink.warn(
                Some(vm.name()),
                format!(
                    "the guest did not shut down within {} and was killed ({why}): files that it had not yet written \
                     may be missing from its disks",
                    human_duration(limit)
                ),
            ),
            exit => return Err(ended(&exit, "shutting down")),
        }
        Ok(())
    }
}

impl Halted {
    /// Captures all disks.
    pub(super) async fn capture(self) -> Result<TemplateMachine, Failure> {
        let Self(vm, machine) = self;
        match Self::disks(&vm, &machine).await {
            Ok(template) => {
                vm.enter(VmPhase::DiskCaptured);
                Ok(template)
            }
            Err(error) => Err(vm.failed(None, error).await),
        }
    }

    async fn disks(vm: &Vm, machine: &Arc<dyn Machine>) -> Result<TemplateMachine> {
        let (attempt, planned) = (&vm.attempt, vm.planned());
        let template = &planned.template;
        let progress = attempt.sink.progress(Some(&planned.name));
        let mut disks = Vec::new();
        for disk in &planned.hardware.disks {
            let captured = attempt.guard.wait(machine.capture(&disk.name, &progress)).await;
            disks.push(captured.map_err(|error| error.with_context("disk", &disk.name))?);
        }
        let state = attempt.guard.wait(machine.capture_state()).await?;
        Ok(TemplateMachine {
            name: planned.name.clone(),
            cpus: template.cpus,
            memory: template.memory,
            firmware: template.firmware,
            tpm: template.tpm,
            nics: template.nics.iter().cloned().map(Into::into).collect(),
            disks,
            state,
            invisible: planned.invisible,
        })
    }
}
