//! The life of VirtualMachineInstances: what virt-controller and virt-handler do with them.
//!
//! ```text
//! Pending ──claims filled──▶ Scheduling ──pod scheduled──▶ Scheduled ──machine started──▶ Running ──▶ Succeeded · Failed
//! ```
//! Deletion stops the machine, and removes the object only when the machine has ended.

use super::{
    conditions::{Conditions, now},
    events::{self, Reporter, Severity},
    faults::Fault,
    launchers::{self, Created},
    launching,
    objects::{self, InstanceSpec, Key, controller, is_deleted, phase, uid},
    runs::Run,
    shared::{Shared, failed},
    status,
    texts::{INSTANCE_FINALIZER, NODE, innermost},
    translate::derived_mac,
    volumes::StoredVolume,
};
use k8s_openapi::api::core::v1::Pod;
use kube::{
    core::DynamicObject,
    runtime::{controller::Action, watcher::Event},
};
use rudder_core::{
    Result,
    backend::{Death, Exit},
};
use serde_json::{Value, json};
use std::{
    collections::HashMap,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

/// Time that a guest has to power off, if the instance does not say: KubeVirt's default.
const GRACE_PERIOD: u64 = 30;
/// Time until a machine that did not start, or a pod that was not allowed, is tried again.
const RETRY_AFTER: Duration = Duration::from_secs(3);

pub(super) fn noticed(shared: &Shared, event: &Event<DynamicObject>) {
    match event {
        Event::Apply(instance) | Event::Delete(instance) => {
            if let Some(owner) = controller(instance, "VirtualMachine") {
                shared.machines.retry(Key::new(Key::of(instance).namespace, owner));
            }
        }
        // Deletions may have been missed before the list was made.
        Event::InitDone => shared.machines.retry_all(),
        Event::Init | Event::InitApply(_) => {}
    }
}

pub(super) async fn reconcile(instance: Arc<DynamicObject>, shared: Arc<Shared>) -> Result<Action> {
    if is_deleted(&*instance) {
        return delete(&shared, &instance).await;
    }
    match (phase(&instance), shared.runs.get(uid(&*instance))) {
        ("Succeeded" | "Failed", _) => {}
        (_, Some(run)) if run.exit.get().is_some() => finish(&shared, &instance, &run).await?,
        ("Running", Some(_)) => {}
        // What is known of the instance may be older than its run, or the status could not be written.
        (_, Some(run)) => write_running(&shared, &Key::of(&*instance), &run).await?,
        ("Running", None) => {
            let conditions = Conditions::of(&instance);
            write_phase(&shared, &instance, "Failed", conditions, json!({"reason": "NodeUnresponsive"}))
                .await?;
        }
        _ => return start(&shared, instance).await,
    }
    Ok(Action::await_change())
}

/// Writes a phase with its time, conditions and further fields.
async fn write_phase(
    shared: &Shared,
    instance: &DynamicObject,
    phase: &str,
    conditions: Conditions,
    mut more: Value,
) -> Result<Option<DynamicObject>> {
    more["phase"] = phase.into();
    more["conditions"] = conditions.into_value();
    if objects::phase(instance) != phase {
        let times = instance.data.pointer("/status/phaseTransitionTimestamps");
        let mut times = times.and_then(Value::as_array).cloned().unwrap_or_default();
        times.push(json!({"phase": phase, "phaseTransitionTimestamp": now()}));
        more["phaseTransitionTimestamps"] = times.into();
    }
    status::of_instance(shared, &Key::of(instance), more).await
}

/// Writes that an instance waits, with a condition that says why. Publishes an event when the reason is new.
async fn wait(
    shared: &Shared,
    instance: &DynamicObject,
    phase: &str,
    (condition, reason, message): (&str, &str, &str),
) -> Result<Action> {
    let mut conditions = Conditions::of(instance);
    let known = conditions.get(condition).is_some_and(|old| old["message"] == message);
    conditions.set(condition, "False", reason, message);
    conditions.set("Ready", "False", "GuestNotRunning", "Guest VM is not reported as running");
    write_phase(shared, instance, phase, conditions, json!({})).await?;
    if !known && !reason.is_empty() && condition == "Synchronized" {
        let event = (Severity::Warning, reason, message);
        events::publish(shared, instance, &objects::instances(), Reporter::VirtController, event).await;
    }
    Ok(Action::requeue(RETRY_AFTER))
}

/// Takes an instance as far on its way to `Running` as it gets.
async fn start(shared: &Arc<Shared>, instance: Arc<DynamicObject>) -> Result<Action> {
    let key = Key::of(&*instance);
    let spec: InstanceSpec = objects::read(&instance, "/spec")?;
    let has_finalizer = |finalizers: &Vec<String>| finalizers.iter().any(|name| name == INSTANCE_FINALIZER);
    if !instance.metadata.finalizers.as_ref().is_some_and(has_finalizer) {
        let api = shared.api(&objects::instances(), &key.namespace);
        status::finalizers(&api, &instance, |names| names.push(INSTANCE_FINALIZER.to_owned())).await?;
        // The change brings it here again.
        return Ok(Action::await_change());
    }
    let claims = match claims(shared, &key, &spec) {
        Ok(claims) => claims,
        Err(missing) => return wait_for_claim(shared, &instance, missing).await,
    };
    let memory = spec.domain.memory.guest.as_ref().or(spec.domain.resources.requests.get("memory"));
    let memory = memory.map_or("64Mi", String::as_str);
    let pod = match launchers::create(shared, &instance, &spec, memory).await? {
        Created::Pod(pod) => pod,
        Created::Refused(why) => {
            let why = format!("failed to create virtual machine pod: {why}");
            return wait(shared, &instance, "Pending", ("Synchronized", "FailedCreate", &why)).await;
        }
    };
    if let Some(action) = held_up(shared, &instance, &pod).await? {
        return Ok(action);
    }
    run(shared, &instance, &spec, &claims, &pod).await
}

/// Returns the content of all claims of an instance; else the first claim that has none.
fn claims(
    shared: &Shared,
    key: &Key,
    spec: &InstanceSpec,
) -> Result<HashMap<String, Arc<StoredVolume>>, Key> {
    let mut claims = HashMap::new();
    for name in spec.volumes.iter().filter_map(objects::InstanceVolume::claim) {
        let claim = Key::new(&key.namespace, name);
        let volume = shared.volumes.get(&claim).ok_or(claim)?;
        claims.insert(name.to_owned(), volume);
    }
    Ok(claims)
}

/// Waits until a claim has content.
async fn wait_for_claim(shared: &Arc<Shared>, instance: &DynamicObject, claim: Key) -> Result<Action> {
    let exists = shared.claims_in(&claim.namespace).get_metadata_opt(&claim.name).await;
    let exists = exists.map_err(failed("read a claim"))?.is_some();
    let mut conditions = Conditions::of(instance);
    let known = conditions.get("Synchronized").is_some();
    let message = format!("PVC {claim} does not exist, waiting for it to appear");
    match exists {
        true => conditions.remove("Synchronized"),
        false => conditions.set("Synchronized", "False", "FailedPvcNotFound", &message),
    }
    conditions.set("Ready", "False", "GuestNotRunning", "Guest VM is not reported as running");
    write_phase(shared, instance, "Pending", conditions, json!({})).await?;
    if !exists && !known {
        let event = (Severity::Warning, "FailedPvcNotFound", message.as_str());
        events::publish(shared, instance, &objects::instances(), Reporter::VirtController, event).await;
    }
    let (waiting, of) = (shared.clone(), Key::of(instance));
    if shared.runs.waits(&of) {
        shared.spawn(async move {
            waiting.volumes.wait_for(&claim).await;
            waiting.runs.waited(&of);
            waiting.instances.retry(of);
        });
    }
    Ok(Action::await_change())
}

/// Applies the faults of scheduling.
async fn held_up(shared: &Shared, instance: &DynamicObject, pod: &Pod) -> Result<Option<Action>> {
    let namespace = Key::of(instance).namespace;
    let unschedulable = shared.faults.standing(&namespace, |fault| match fault {
        Fault::Unschedulable { message } => Some(message.clone()),
        _ => None,
    });
    if let Some(message) = unschedulable {
        launchers::unschedulable(shared, pod, &message).await?;
        wait(shared, instance, "Scheduling", ("PodScheduled", "Unschedulable", &message)).await?;
        return Ok(Some(Action::await_change()));
    }
    let missing = shared.faults.standing(&namespace, |fault| match fault {
        Fault::ImagePull { message } => Some(message.clone()),
        _ => None,
    });
    if let Some(message) = missing {
        launchers::schedule(shared, pod).await?;
        launchers::image_missing(shared, pod, &message).await?;
        wait(shared, instance, "Scheduling", ("Synchronized", "ErrImagePull", &message)).await?;
        return Ok(Some(Action::await_change()));
    }
    Ok(None)
}

/// Schedules an instance and starts its machine.
async fn run(
    shared: &Arc<Shared>,
    instance: &DynamicObject,
    spec: &InstanceSpec,
    claims: &HashMap<String, Arc<StoredVolume>>,
    pod: &Pod,
) -> Result<Action> {
    let kind = objects::instances();
    let mut conditions = Conditions::of(instance);
    conditions.remove("PodScheduled");
    conditions.set("Ready", "False", "GuestNotRunning", "Guest VM is not reported as running");
    launchers::schedule(shared, pod).await?;
    let more = json!({"nodeName": NODE, "activePods": {uid(pod): NODE}});
    let Some(scheduled) = write_phase(shared, instance, "Scheduled", conditions.clone(), more).await? else {
        return Ok(Action::await_change());
    };
    let run = match launching::launch(shared, instance, spec, claims, &Key::of(pod).name).await {
        Ok(run) => run,
        Err(error) => {
            let message = format!(
                "server error. command SyncVMI failed: \"LibvirtError(Code=1, Message='{}')\"",
                innermost(&error)
            );
            let reason = ("Synchronized", "SyncFailed", message.as_str());
            return wait(shared, &scheduled, "Scheduled", reason).await;
        }
    };
    launchers::running(shared, pod, &run.address).await?;
    for (reason, message) in
        [("Created", "VirtualMachineInstance defined."), ("Started", "VirtualMachineInstance started.")]
    {
        let event = (Severity::Normal, reason, message);
        events::publish(shared, instance, &kind, Reporter::VirtHandler, event).await;
    }
    write_running(shared, &run.key, &run).await?;
    Ok(Action::await_change())
}

/// Writes that the machine of an instance runs, unless that was written before.
async fn write_running(shared: &Shared, key: &Key, run: &Run) -> Result<()> {
    let api = shared.api(&objects::instances(), &key.namespace);
    let current = api.get_opt(&key.name).await.map_err(failed("read an instance"))?;
    let Some(instance) = current.filter(|instance| uid(instance) == run.uid) else { return Ok(()) };
    if matches!(phase(&instance), "Running" | "Succeeded" | "Failed") {
        return Ok(());
    }
    let spec: InstanceSpec = objects::read(&instance, "/spec")?;
    let mut conditions = Conditions::of(&instance);
    conditions.set("Ready", "True", "", "");
    conditions.set("Synchronized", "True", "", "");
    let more = json!({"interfaces": interfaces(&instance, &spec, &run.address)});
    write_phase(shared, &instance, "Running", conditions, more).await.map(drop)
}

/// Returns the interfaces for the status: the first has the address of the pod.
fn interfaces(instance: &DynamicObject, spec: &InstanceSpec, address: &str) -> Vec<Value> {
    let key = Key::of(instance);
    let interfaces = spec.domain.devices.interfaces.iter().enumerate();
    interfaces
        .map(|(index, interface)| {
            let derived = || derived_mac(&key, &interface.name).to_string();
            let mac = interface.mac_address.clone().unwrap_or_else(derived);
            let mut value =
                json!({"name": interface.name, "mac": mac, "infoSource": "domain", "queueCount": 1});
            if index == 0 {
                value["ipAddress"] = address.into();
                value["ipAddresses"] = json!([address]);
            }
            value
        })
        .collect()
}

/// Writes how an instance ended. Does nothing when that was done before.
async fn finish(shared: &Shared, instance: &DynamicObject, run: &Run) -> Result<()> {
    let Some(exit) = run.exit.get() else { return Ok(()) };
    if run.reported.load(Ordering::Relaxed) {
        return Ok(());
    }
    let mut conditions = Conditions::of(instance);
    let storage_failed = matches!(exit, Exit::Died { cause: Death::IoError | Death::HostDiskFull, .. });
    if storage_failed && !is_deleted(instance) {
        // KubeVirt pauses a guest whose disk fails, and keeps it.
        conditions.set("Paused", "True", "PausedIOError", "VMI was paused, low-level IO error detected");
        write_phase(shared, instance, "Running", conditions, json!({})).await?;
        return Ok(());
    }
    let succeeded = *exit == Exit::PoweredOff && !run.is_lost();
    for (reporter, event) in endings(exit, run.is_lost()) {
        events::publish(shared, instance, &objects::instances(), reporter, event).await;
    }
    launchers::ended(shared, &run.key, &run.pod, succeeded).await?;
    conditions.remove("Paused");
    let reason = if succeeded { "PodCompleted" } else { "PodFailed" };
    conditions.set("Ready", "False", reason, "the virtual machine instance has ended");
    let more = if run.is_lost() { json!({"reason": "NodeUnresponsive"}) } else { json!({}) };
    let phase = if succeeded { "Succeeded" } else { "Failed" };
    write_phase(shared, instance, phase, conditions, more).await?;
    run.reported.store(true, Ordering::Relaxed);
    Ok(())
}

/// Returns the events about the end of a machine.
fn endings(exit: &Exit, lost: bool) -> Vec<(Reporter, (Severity, &'static str, &'static str))> {
    if lost {
        let message = "virt-handler on node double is not responsive, marking VMI as failed";
        return vec![(Reporter::VirtController, (Severity::Warning, "NodeUnresponsive", message))];
    }
    let shut_down = (Severity::Normal, "Stopped", "The VirtualMachineInstance was shut down.");
    let crashed = (Severity::Warning, "Stopped", "The VirtualMachineInstance crashed.");
    let panicked = (Severity::Warning, "GuestPanicked", "Guest has panicked");
    let events = match exit {
        Exit::Died { cause: Death::GuestPanic, .. } => vec![panicked, crashed],
        Exit::Died { .. } => vec![crashed],
        _ => vec![shut_down],
    };
    events.into_iter().map(|event| (Reporter::VirtHandler, event)).collect()
}

/// Stops the machine of a deleted instance; when it has ended, lets the object go.
async fn delete(shared: &Arc<Shared>, instance: &DynamicObject) -> Result<Action> {
    let key = Key::of(instance);
    if let Some(run) = shared.runs.get(uid(instance)) {
        if run.exit.get().is_none() {
            let spec: InstanceSpec = objects::read(instance, "/spec")?;
            run.stop(shared, spec.termination_grace_period_seconds.unwrap_or(GRACE_PERIOD));
            return Ok(Action::await_change());
        }
        finish(shared, instance, &run).await?;
    }
    launchers::remove(shared, &key, &launchers::name(instance)).await?;
    let has_finalizer = |finalizers: &Vec<String>| finalizers.iter().any(|name| name == INSTANCE_FINALIZER);
    if instance.metadata.finalizers.as_ref().is_some_and(has_finalizer) {
        // The status was changed just now.
        let api = shared.api(&objects::instances(), &key.namespace);
        let current = api.get_opt(&key.name).await.map_err(failed("read an instance"))?;
        if let Some(current) = current.filter(|current| uid(current) == uid(instance)) {
            status::finalizers(&api, &current, |names| names.retain(|name| name != INSTANCE_FINALIZER))
                .await?;
        }
    }
    shared.runs.forget(uid(instance));
    if controller(instance, "VirtualMachine").is_none() {
        shared.runs.undefine(uid(instance));
    }
    Ok(Action::await_change())
}
