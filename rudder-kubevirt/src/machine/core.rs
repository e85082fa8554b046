//! What the handles of a machine share with the tasks that watch it: what is known of its life, the requests to power it on and off, and
//! its consoles.

use crate::{
    cluster::Cluster,
    errors::{is_conflict, is_not_found, request_failed},
    lab_context::LabContext,
    life::{Life, Phase, Stopping},
    names::MACHINE,
    objects::{VirtualMachine, VirtualMachineInstance},
    specification::{MachineRecord, machine_name},
    streams::{DisplayHub, SerialHub, Subresource, connector},
};
use futures::StreamExt as _;
use k8s_openapi::api::core::v1::Event;
use kube::{
    Api,
    api::ListParams,
    runtime::{WatchStreamExt as _, watcher},
};
use rudder_core::{Error, ErrorKind, Result, backend::Exit};
use serde_json::{Value, json};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::watch;

#[derive(Debug)]
pub(super) struct Core {
    pub(super) lab: Arc<LabContext>,
    pub(super) record: MachineRecord,
    /// The name of its objects.
    pub(super) object: String,
    pub(super) life: watch::Sender<Life>,
    /// Held while the cluster is requested to power the machine on or off: one request after the other.
    requests: tokio::sync::Mutex<()>,
    /// The serial console of this power-on, or of the last.
    serial: Mutex<Option<Arc<SerialHub>>>,
    /// The display of this power-on, or of the last: its last screen stays.
    display: Mutex<Arc<DisplayHub>>,
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
    pub(super) fn new(lab: &Arc<LabContext>, record: MachineRecord, life: Life) -> Self {
        let object = machine_name(&lab.id, &record.name);
        Self {
            lab: Arc::clone(lab),
            display: Mutex::new(Arc::new(new_display(lab, &object))),
            object,
            record,
            life: watch::Sender::new(life),
            requests: tokio::sync::Mutex::default(),
            serial: Mutex::default(),
        }
    }

    /// Forgets the consoles of the last power-on.
    pub(super) fn new_consoles(&self) {
        *self.serial.lock().unwrap_or_else(PoisonError::into_inner) = None;
        *self.display.lock().unwrap_or_else(PoisonError::into_inner) =
            Arc::new(new_display(&self.lab, &self.object));
    }

    pub(super) fn cluster(&self) -> &Cluster {
        &self.lab.cluster
    }

    fn path(&self, what: &str) -> String {
        format!("virtualmachines/{}/{what}", self.object)
    }

    /// Follows the instance until it has ended.
    pub(super) async fn follow(&self) {
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
    pub(super) async fn launch(self: Arc<Self>, before: Life) -> Result<()> {
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

    pub(super) fn modify(&self, change: impl FnOnce(&mut Life)) {
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

    pub(super) fn display(&self) -> Arc<DisplayHub> {
        Arc::clone(&self.display.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn serial(&self) -> Option<Arc<SerialHub>> {
        self.serial.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Connects to the serial console of this power-on, if that has not happened yet.
    pub(super) fn attach_serial(&self) -> Arc<SerialHub> {
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
    pub(super) async fn why_waiting(&self) -> Option<String> {
        let fields = format!("involvedObject.name={},type=Warning", self.object);
        let events: Api<Event> = self.cluster().api();
        let found = events.list(&ListParams::default().fields(&fields)).await.ok()?;
        let latest =
            found.items.into_iter().max_by_key(|event| event.last_timestamp.as_ref().map(|time| time.0));
        latest.and_then(|event| event.message)
    }

    /// Kills the machine. One that does not run is not an error.
    pub(super) async fn kill(&self, why: &str) -> Result<()> {
        self.modify(|life| life.stop(Stopping::Kill(why.to_owned())));
        self.stop(0).await
    }

    /// Requests that the machine ends within a number of seconds. One that does not run is not an error.
    pub(super) async fn stop(&self, grace: u64) -> Result<()> {
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

    pub(super) fn ended(&self) {
        if let Some(serial) = self.serial() {
            serial.end();
        }
        self.display().end();
    }

    /// Waits until the machine has ended. `None` if it turns out that it was never started.
    pub(super) async fn wait(&self) -> Option<Exit> {
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
