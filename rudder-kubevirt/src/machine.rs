//! A machine of a lab: a VirtualMachine, and its VirtualMachineInstance while it is powered on.

use crate::{
    cluster::Cluster,
    errors::{is_conflict, is_not_found, request_failed},
    lab_context::LabContext,
    life::{Life, Phase, Stopping},
    names::MACHINE,
    objects::{VirtualMachine, VirtualMachineInstance},
    specification::{MachineRecord, machine_name},
    streams::{DisplayHub, SerialHub, Subresource, connector, socket},
};
use async_trait::async_trait;
use futures::StreamExt as _;
use k8s_openapi::api::core::v1::Event;
use kube::{
    Api,
    api::ListParams,
    runtime::{WatchStreamExt as _, watcher},
};
use rudder_core::{
    Error, ErrorKind, Result,
    backend::{BoxedStream, Exit, Machine, Progress, SerialLog, Stop},
    module::{CapturedDisk, CapturedState},
};
use serde_json::{Value, json};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

/// A machine on a cluster.
#[derive(Debug)]
pub(crate) struct KubevirtMachine {
    core: Arc<Core>,
    /// Ends the watcher with the last handle.
    watcher: Mutex<Option<DropGuard>>,
}

#[derive(Debug)]
struct Core {
    lab: Arc<LabContext>,
    record: MachineRecord,
    /// The name of its objects.
    object: String,
    life: watch::Sender<Life>,
    /// Held while the cluster is requested to power the machine on or off: one request after the other.
    requests: tokio::sync::Mutex<()>,
    /// The serial console of this power-on, or of the last.
    serial: Mutex<Option<Arc<SerialHub>>>,
    /// The display of this power-on, or of the last: its last screen stays.
    display: Mutex<Arc<DisplayHub>>,
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
        let object = machine_name(&lab.id, &record.name);
        let display = Mutex::new(Arc::new(new_display(lab, &object)));
        let (life, serial) = (watch::Sender::new(life), Mutex::default());
        let requests = tokio::sync::Mutex::default();
        let core = Core { lab: Arc::clone(lab), record, object, life, requests, serial, display };
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

fn new_display(lab: &LabContext, object: &str) -> DisplayHub {
    DisplayHub::new(connector(
        lab.cluster.client().clone(),
        lab.cluster.namespace(),
        object,
        Subresource::Vnc,
    ))
}

impl Core {
    fn cluster(&self) -> &Cluster {
        &self.lab.cluster
    }

    fn path(&self, what: &str) -> String {
        format!("virtualmachines/{}/{what}", self.object)
    }

    /// Follows the instance until it has ended.
    async fn follow(&self) {
        let config = watcher::Config::default().fields(&format!("metadata.name={}", self.object));
        let instances = watcher(self.cluster().api::<VirtualMachineInstance>(), config).default_backoff();
        let mut instances = std::pin::pin!(instances);
        let mut exists = false;
        while let Some(event) = instances.next().await {
            match event {
                Ok(watcher::Event::Init) => exists = false,
                Ok(watcher::Event::InitApply(instance) | watcher::Event::Apply(instance)) => {
                    exists = true;
                    self.observe(&instance).await;
                }
                Ok(watcher::Event::InitDone) if !exists => self.modify(Life::gone),
                Ok(watcher::Event::InitDone) => {}
                Ok(watcher::Event::Delete(instance)) => {
                    self.observe(&instance).await;
                    self.modify(Life::gone);
                }
                Err(error) => tracing::debug!(%error, object = self.object, "cannot watch a machine"),
            }
            if !self.life.borrow().is_up() {
                break;
            }
        }
        self.ended();
    }

    /// Requests that the machine is powered on or off. While an earlier request is carried out, KubeVirt refuses; the request is then
    /// repeated whenever the machine has changed, as long as `is_wanted`.
    async fn request(
        &self,
        verb: &str,
        body: &Value,
        is_wanted: impl Fn(&kube::Error) -> bool,
    ) -> Result<(), kube::Error> {
        let config = watcher::Config::default().fields(&format!("metadata.name={}", self.object));
        let changes = watcher(self.cluster().api::<VirtualMachine>(), config).default_backoff();
        let mut changes = std::pin::pin!(changes);
        let deadline = tokio::time::Instant::now() + self.lab.start_limit;
        loop {
            let refused = match self.cluster().put(&self.path(verb), body).await {
                Err(error) if is_wanted(&error) => error,
                other => return other,
            };
            if tokio::time::timeout_at(deadline, changes.next()).await.is_err() {
                return Err(refused);
            }
        }
    }

    /// Powers the machine on, from the state `before`. Runs to its end even if the caller does not: whether the cluster starts the
    /// machine must be known.
    async fn launch(self: Arc<Self>, before: Life) -> Result<()> {
        let _alone = self.requests.lock().await;
        let launched = async {
            if before.phase() == &Phase::New {
                let record = MachineRecord { started: true, ..self.record.clone() };
                let text = serde_json::to_string(&record).unwrap_or_default();
                let patch = json!({"metadata": {"annotations": {MACHINE: text}}});
                let what = "the record of a machine";
                self.cluster().patch::<VirtualMachine>(&self.object, &patch, what).await?;
            }
            let repeat = |error: &kube::Error| is_conflict(error) || is_underway(error);
            let started = self.request("start", &json!({}), repeat).await;
            started.map_err(|error| request_failed(error, "start the machine"))
        };
        let launched = launched.await;
        if launched.is_err() {
            self.life.send_replace(before);
        }
        launched.map_err(|error| {
            let message = error.to_string();
            Error::new(ErrorKind::LaunchFailed, message)
                .with_source(error)
                .with_context("vm", &self.record.name)
        })
    }

    fn modify(&self, change: impl FnOnce(&mut Life)) {
        self.life.send_if_modified(|life| {
            let before = life.clone();
            change(life);
            *life != before
        });
    }

    async fn observe(&self, instance: &VirtualMachineInstance) {
        let failed = instance.status.as_ref().is_some_and(|status| status.phase == "Failed");
        if failed && let Some(panic) = self.event_of(instance, "GuestPanicked").await {
            self.modify(|life| life.panicked(&panic));
        }
        self.modify(|life| life.observe(instance));
        let paused = match self.life.borrow().phase() {
            Phase::Ended(_) => instance.status.as_ref().is_some_and(|status| status.phase == "Running"),
            _ => false,
        };
        if matches!(self.life.borrow().phase(), Phase::Running) {
            self.attach_serial();
        }
        if paused {
            // A machine that the hypervisor has paused for good still uses the node.
            if let Err(error) = self.kill("a disk failed").await {
                tracing::debug!(error = %error.report(), object = self.object, "cannot stop a machine");
            }
        }
    }

    fn display(&self) -> Arc<DisplayHub> {
        Arc::clone(&self.display.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn serial(&self) -> Option<Arc<SerialHub>> {
        self.serial.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Connects to the serial console of this power-on, if that has not happened yet.
    fn attach_serial(&self) -> Arc<SerialHub> {
        let cluster = self.cluster();
        let connect =
            || connector(cluster.client().clone(), cluster.namespace(), &self.object, Subresource::Console);
        let mut serial = self.serial.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(serial.get_or_insert_with(|| Arc::new(SerialHub::start(connect()))))
    }

    /// Returns the message of an event of the instance.
    async fn event_of(&self, instance: &VirtualMachineInstance, reason: &str) -> Option<String> {
        let uid = instance.metadata.uid.as_deref()?;
        let fields = format!("involvedObject.uid={uid},reason={reason}");
        let events: Api<Event> = self.cluster().api();
        let found = events.list(&ListParams::default().fields(&fields)).await.ok()?;
        found.items.into_iter().find_map(|event| event.message)
    }

    /// Returns what keeps the machine from running, as its latest event of a warning says.
    async fn why_waiting(&self) -> Option<String> {
        let fields = format!("involvedObject.name={},type=Warning", self.object);
        let events: Api<Event> = self.cluster().api();
        let found = events.list(&ListParams::default().fields(&fields)).await.ok()?;
        let latest =
            found.items.into_iter().max_by_key(|event| event.last_timestamp.as_ref().map(|time| time.0));
        latest.and_then(|event| event.message)
    }

    /// Kills the machine. One that does not run is not an error.
    async fn kill(&self, why: &str) -> Result<()> {
        self.modify(|life| life.stop(Stopping::Kill(why.to_owned())));
        self.stop(0).await
    }

    /// Requests that the machine ends within a number of seconds. One that does not run is not an error.
    async fn stop(&self, grace: u64) -> Result<()> {
        let _alone = self.requests.lock().await;
        // A machine whose start was accepted will have an instance.
        let starts = || matches!(self.life.borrow().phase(), Phase::Starting(_));
        let repeat = |error: &kube::Error| is_underway(error) || is_conflict(error) && starts();
        match self.request("stop", &json!({"gracePeriod": grace}), repeat).await {
            Ok(()) => Ok(()),
            Err(error) if is_conflict(&error) || is_not_found(&error) => Ok(()),
            Err(error) => Err(request_failed(error, "stop a machine").with_context("vm", &self.record.name)),
        }
    }

    fn ended(&self) {
        if let Some(serial) = self.serial() {
            serial.end();
        }
        self.display().end();
    }

    /// Waits until the machine has ended. `None` if it turns out that it was never started.
    async fn wait(&self) -> Option<Exit> {
        let mut life = self.life.subscribe();
        let over = life.wait_for(|life| !life.is_up()).await;
        match over.map(|life| life.phase().clone()) {
            Ok(Phase::Ended(exit)) => Some(exit),
            Ok(_) => None,
            Err(_) => Some(Exit::Unobserved),
        }
    }
}

/// Returns whether KubeVirt refused a request because an earlier one is not carried out yet.
fn is_underway(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.message.contains("already underway"))
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
        *core.serial.lock().unwrap_or_else(PoisonError::into_inner) = None;
        *core.display.lock().unwrap_or_else(PoisonError::into_inner) =
            Arc::new(new_display(&core.lab, &core.object));
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
        let serial = self
            .core
            .serial()
            .ok_or_else(|| self.error(ErrorKind::Conflict, "expected the machine to run, but it does not"))?;
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
