//! A machine of a lab: a VirtualMachine, and its VirtualMachineInstance while it is powered on.

mod core;

use self::core::Core;
use crate::{
    lab_context::LabContext,
    life::{Life, Phase, Stopping},
    objects::VirtualMachineInstance,
    specification::MachineRecord,
    streams::{Subresource, socket},
};
use async_trait::async_trait;
use rudder_core::{
    Error, ErrorKind, Result,
    backend::{BoxedStream, Exit, Machine, Progress, SerialLog, Stop},
    module::{CapturedDisk, CapturedState},
};
use std::sync::{Arc, Mutex, PoisonError};
use tokio_util::sync::{CancellationToken, DropGuard};

/// A machine on a cluster.
#[derive(Debug)]
pub(crate) struct KubevirtMachine {
    core: Arc<Core>,
    /// Ends the watcher with the last handle.
    watcher: Mutex<Option<DropGuard>>,
}

impl KubevirtMachine {
    /// Returns a machine that was just created.
    pub(crate) fn new(lab: &Arc<LabContext>, record: MachineRecord) -> Arc<Self> {
        Self::with(lab, record, Life::new())
    }

    /// Returns a machine that another process created.
    pub(crate) fn attached(
        lab: &Arc<LabContext>,
        record: MachineRecord,
        instance: Option<&VirtualMachineInstance>,
    ) -> Arc<Self> {
        let life = Life::attached(instance, record.started);
        let machine = Self::with(lab, record, life);
        if machine.core.life.borrow().is_up() {
            machine.watch();
        }
        machine
    }

    fn with(lab: &Arc<LabContext>, record: MachineRecord, life: Life) -> Arc<Self> {
        let core = Core::new(lab, record, life);
        Arc::new(Self { core: Arc::new(core), watcher: Mutex::default() })
    }

    /// Watches the instance of this power-on until it has ended.
    fn watch(&self) {
        let cancel = CancellationToken::new();
        let core = Arc::clone(&self.core);
        let cancelled = cancel.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = cancelled.cancelled() => {}
                () = core.follow() => {}
            }
        });
        *self.watcher.lock().unwrap_or_else(PoisonError::into_inner) = Some(cancel.drop_guard());
    }

    /// Ends the machine for its handles, because its lab is at its end.
    pub(crate) fn lab_ended(&self, why: &str) {
        self.core.life.send_modify(|life| {
            life.stop(Stopping::Kill(why.to_owned()));
            life.gone();
        });
        self.core.ended();
    }

    fn error(&self, kind: ErrorKind, message: impl Into<String>) -> Error {
        Error::new(kind, message.into()).with_context("vm", &self.core.record.name)
    }

    fn never_started(&self) -> Error {
        self.error(ErrorKind::Conflict, "expected the machine to have been started, but it was not")
    }

    fn check_running(&self) -> Result<()> {
        self.core.lab.check_open()?;
        match self.core.life.borrow().phase() {
            Phase::Running => Ok(()),
            Phase::Starting(_) => {
                Err(self.error(ErrorKind::Conflict, "expected the machine to run, but it is still starting"))
            }
            Phase::New => {
                Err(self.error(ErrorKind::Conflict, "expected the machine to run, but it was never started"))
            }
            Phase::Ended(_) => {
                Err(self.error(ErrorKind::Conflict, "expected the machine to run, but it has ended"))
            }
        }
    }

    fn check_ended(&self) -> Result<()> {
        self.core.lab.check_open()?;
        if self.core.life.borrow().is_up() {
            return Err(
                self.error(ErrorKind::Conflict, "expected the machine to have ended, but it is running")
            );
        }
        Ok(())
    }

    /// Waits until the machine runs or has ended.
    async fn runs(&self) -> Result<()> {
        let mut life = self.core.life.subscribe();
        let up = life.wait_for(|life| !matches!(life.phase(), Phase::Starting(_)));
        let Ok(up) = tokio::time::timeout(self.core.lab.start_limit, up).await else {
            let waited = self.core.lab.start_limit;
            let reason = match self.core.life.borrow().phase() {
                Phase::Starting(Some(reason)) => reason.clone(),
                _ => "the cluster does not say why".to_owned(),
            };
            let reason = self.core.why_waiting().await.unwrap_or(reason);
            self.core.kill("it did not start in time").await?;
            let message = format!("the machine does not run after {waited:?}: {reason}");
            return Err(self.error(ErrorKind::LaunchFailed, message).with_help(
                "check the resources of the cluster's nodes, and the events of the machine: kubectl get events",
            ));
        };
        match up.map(|life| life.phase().clone()) {
            Ok(Phase::Ended(Exit::Died { detail, .. })) => {
                Err(self.error(ErrorKind::LaunchFailed, format!("the machine ended before it ran: {detail}")))
            }
            _ => Ok(()),
        }
    }
}

#[async_trait]
impl Machine for KubevirtMachine {
    fn name(&self) -> &str {
        &self.core.record.name
    }

    async fn start(&self) -> Result<()> {
        let core = &self.core;
        core.lab.check_open()?;
        let mut before = None;
        core.life.send_modify(|life| {
            if !life.is_up() {
                before = Some(life.clone());
                life.start();
            }
        });
        let Some(before) = before else {
            return Err(self.error(ErrorKind::Conflict, "expected the machine not to run, but it runs"));
        };
        core.new_consoles();
        self.watch();
        let launched = tokio::spawn(Arc::clone(core).launch(before)).await;
        launched
            .map_err(|error| self.error(ErrorKind::Internal, "the start ended early").with_source(error))??;
        self.runs().await
    }

    async fn wait(&self) -> Result<Exit> {
        if self.core.life.borrow().phase() == &Phase::New {
            return Err(self.never_started());
        }
        self.core.wait().await.ok_or_else(|| self.never_started())
    }

    async fn stop(&self, how: Stop) -> Result<Exit> {
        let core = &self.core;
        match core.life.borrow().phase() {
            Phase::New => return Err(self.never_started()),
            Phase::Ended(exit) => return Ok(exit.clone()),
            _ => {}
        }
        match how {
            Stop::Kill => core.kill("an immediate stop was requested").await?,
            Stop::Graceful { limit } => {
                let why = format!("did not power off within {limit:?}");
                core.modify(|life| life.stop(Stopping::Graceful(why)));
                core.stop(limit.as_secs().max(1)).await?;
            }
        }
        core.wait().await.ok_or_else(|| self.never_started())
    }

    async fn dial(&self, port: u16) -> Result<BoxedStream> {
        if !self.core.record.ports.contains(&port) {
            let message = format!("expected one of the machine's ports, but found {port}");
            return Err(self
                .error(ErrorKind::InvalidInput, message)
                .with_help("add the port to MachineSpec::ports"));
        }
        self.check_running()?;
        let core = &self.core;
        let subresource = Subresource::PortForward(port);
        let path = subresource.path(core.cluster().namespace(), &core.object);
        match socket::open(core.cluster().client(), &path).await {
            Ok(stream) => Ok(Box::new(stream)),
            Err(error) => Err(error.into_error(subresource.purpose()).with_context("vm", &core.record.name)),
        }
    }

    async fn display(&self) -> Result<BoxedStream> {
        self.check_running()?;
        self.core.display().connect().await.map_err(|error| error.with_context("vm", &self.core.record.name))
    }

    async fn serial(&self) -> Result<BoxedStream> {
        self.check_running()?;
        // The machine may be known to run before its console is connected.
        let serial = self.core.attach_serial();
        serial.connect().await.map_err(|error| error.with_context("vm", &self.core.record.name))
    }

    async fn serial_log(&self, from: u64) -> Result<SerialLog> {
        Ok(self.core.serial().map_or_else(SerialLog::empty, |serial| serial.log(from)))
    }

    async fn screenshot(&self) -> Result<Vec<u8>> {
        let core = &self.core;
        if core.life.borrow().phase() == &Phase::New {
            self.check_running()?;
        }
        core.display().screenshot().await.map_err(|error| error.with_context("vm", &core.record.name))
    }

    fn access(&self) -> Vec<String> {
        let (core, namespace) = (&self.core, self.core.cluster().namespace());
        let name = &core.record.name;
        let mut lines = vec![
            format!("{name}: serial console: virtctl console -n {namespace} {}", core.object),
            format!("{name}: display: virtctl vnc -n {namespace} {}", core.object),
        ];
        lines.extend(core.record.ports.iter().map(|port| {
            format!(
                "{name}: port {port} of the guest: virtctl port-forward -n {namespace} vmi/{} {port}",
                core.object
            )
        }));
        lines
    }

    async fn capture(&self, disk: &str, progress: &Progress) -> Result<CapturedDisk> {
        self.check_ended()?;
        let core = &self.core;
        let found = core.record.disks.iter().find(|found| found.name == disk);
        let found = found.ok_or_else(|| {
            self.error(ErrorKind::NotFound, format!("expected a disk {disk}, but the machine has none"))
        })?;
        core.lab
            .capture(&core.record.name, found, progress)
            .await
            .map_err(|error| error.with_context("vm", &core.record.name))
    }

    async fn capture_state(&self) -> Result<Vec<CapturedState>> {
        self.check_ended()?;
        Ok(Vec::new())
    }
}
