//! The controller of VirtualMachines: creates and deletes their instances as the run strategy and requests say.

use super::{
    conditions::Conditions,
    events::{self, Reporter, Severity},
    faults::Fault,
    objects::{self, Key, controller, is_deleted, phase, uid},
    requests,
    shared::{Shared, code, failed},
    status,
    texts::{INSTANCE_FINALIZER, MACHINE_FINALIZER},
};
use kube::{
    Resource as _,
    api::{DeleteParams, PostParams, Preconditions},
    core::DynamicObject,
    runtime::{controller::Action, watcher::Event},
};
use rudder_core::Result;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::sync::Arc;

/// An entry of `status.stateChangeRequests`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct StateChange {
    pub(super) action: StateAction,
    /// The UID of the instance to stop.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) uid: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum StateAction {
    Start,
    Stop,
}

/// Does nothing: all that changes with a machine is done when it is reconciled.
pub(super) fn noticed(_: &Shared, _: &Event<DynamicObject>) {}

/// Returns the run strategy of a VirtualMachine, also of one that only has the older field `running`.
pub(super) fn strategy(machine: &DynamicObject) -> &str {
    match machine.data.pointer("/spec/running").and_then(Value::as_bool) {
        Some(true) => "Always",
        Some(false) => "Halted",
        None => objects::text(machine, "/spec/runStrategy"),
    }
}

pub(super) fn is_final(instance: &DynamicObject) -> bool {
    matches!(phase(instance), "Succeeded" | "Failed")
}

pub(super) async fn reconcile(machine: Arc<DynamicObject>, shared: Arc<Shared>) -> Result<Action> {
    let key = Key::of(&*machine);
    let api = shared.api(&objects::virtual_machines(), &key.namespace);
    let has_finalizer = |finalizers: &Vec<String>| finalizers.iter().any(|name| name == MACHINE_FINALIZER);
    let has_finalizer = machine.metadata.finalizers.as_ref().is_some_and(has_finalizer);
    let instances = shared.api(&objects::instances(), &key.namespace);
    let instance = instances.get_opt(&key.name).await.map_err(failed("read an instance"))?;
    let instance =
        instance.filter(|instance| controller(instance, "VirtualMachine") == Some(key.name.as_str()));
    if is_deleted(&*machine) {
        match &instance {
            Some(instance) => delete(&shared, &machine, instance).await?,
            None if has_finalizer => {
                shared.runs.undefine(uid(&*machine));
                status::finalizers(&api, &machine, |names| names.retain(|name| name != MACHINE_FINALIZER))
                    .await?;
                return Ok(Action::await_change());
            }
            None => return Ok(Action::await_change()),
        }
    } else if !has_finalizer {
        status::finalizers(&api, &machine, |names| names.push(MACHINE_FINALIZER.to_owned())).await?;
        // The change brings it here again.
        return Ok(Action::await_change());
    } else {
        create_data_volumes(&shared, &machine).await?;
        follow_strategy(&shared, &machine, instance.as_ref()).await?;
    }
    write_status(&shared, &machine, instance.as_ref()).await?;
    Ok(Action::await_change())
}

/// Creates and deletes the instance as the run strategy wants it.
async fn follow_strategy(
    shared: &Arc<Shared>,
    machine: &DynamicObject,
    instance: Option<&DynamicObject>,
) -> Result<()> {
    match (strategy(machine), instance) {
        ("Manual", _) => follow_requests(shared, machine, instance).await,
        ("Always", None) => create(shared, machine).await,
        ("Always", Some(instance)) if is_final(instance) => delete(shared, machine, instance).await,
        ("Halted", Some(instance)) => delete(shared, machine, instance).await,
        _ => Ok(()),
    }
}

/// Does what was requested: start, stop, or both one after the other.
async fn follow_requests(
    shared: &Arc<Shared>,
    machine: &DynamicObject,
    instance: Option<&DynamicObject>,
) -> Result<()> {
    let requests: Vec<StateChange> = objects::read(machine, "/status/stateChangeRequests")?;
    let Some(first) = requests.first() else { return Ok(()) };
    let namespace = Key::of(machine).namespace;
    let is_ignored = |fault: &Fault| (*fault == Fault::StartIgnored).then_some(());
    let ignored =
        first.action == StateAction::Start && shared.faults.standing(&namespace, is_ignored).is_some();
    match (first.action, instance) {
        (StateAction::Stop, Some(instance))
            if first.uid.as_deref().is_none_or(|wanted| wanted == uid(instance)) =>
        {
            // The request stays until the instance is gone.
            return delete(shared, machine, instance).await;
        }
        (StateAction::Start, None) if !ignored => create(shared, machine).await?,
        _ => {}
    }
    // Requests that arrive meanwhile must not be lost: this version has exactly these.
    let api = shared.api(&objects::virtual_machines(), &namespace);
    requests::set_state_changes(&api, machine, &requests[1..]).await.map_err(failed("complete a request"))?;
    if ignored {
        shared.faults.take(&namespace, is_ignored);
    }
    Ok(())
}

/// Creates the instance of a VirtualMachine from its template.
async fn create(shared: &Shared, machine: &DynamicObject) -> Result<()> {
    let (key, kind) = (Key::of(machine), objects::virtual_machines());
    let template = machine.data.pointer("/spec/template").cloned().unwrap_or_default();
    let instance = json!({
        "apiVersion": "kubevirt.io/v1",
        "kind": "VirtualMachineInstance",
        "metadata": {
            "name": key.name,
            "namespace": key.namespace,
            "labels": template["metadata"]["labels"],
            "annotations": template["metadata"]["annotations"],
            "ownerReferences": [machine.controller_owner_ref(&kind)],
            "finalizers": [INSTANCE_FINALIZER],
        },
        "spec": template["spec"],
    });
    let instance: DynamicObject = serde_json::from_value(instance).map_err(|error| {
        let message = format!("cannot make an instance of {key}");
        rudder_core::Error::new(rudder_core::ErrorKind::InvalidInput, message).with_source(error)
    })?;
    let api = shared.api(&objects::instances(), &key.namespace);
    match api.create(&PostParams::default(), &instance).await {
        Ok(_) => {
            let message = format!(
                "Started the virtual machine by creating the new virtual machine instance {}",
                key.name
            );
            let event = (Severity::Normal, "SuccessfulCreate", message.as_str());
            events::publish(shared, machine, &kind, Reporter::VirtController, event).await;
            Ok(())
        }
        Err(error) if code(&error) == Some(409) => Ok(()),
        Err(error) => {
            let message = format!("Error creating virtual machine instance: {error}");
            let event = (Severity::Warning, "FailedCreate", message.as_str());
            events::publish(shared, machine, &kind, Reporter::VirtController, event).await;
            Err(failed("create an instance")(error))
        }
    }
}

/// Deletes the instance of a VirtualMachine, unless that was done before.
async fn delete(shared: &Shared, machine: &DynamicObject, instance: &DynamicObject) -> Result<()> {
    if is_deleted(instance) {
        return Ok(());
    }
    let key = Key::of(instance);
    let api = shared.api(&objects::instances(), &key.namespace);
    let this_one = Preconditions { uid: instance.metadata.uid.clone(), resource_version: None };
    let parameters = DeleteParams::default().preconditions(this_one);
    match api.delete(&key.name, &parameters).await {
        Err(error) if !matches!(code(&error), Some(404 | 409)) => {
            return Err(failed("delete an instance")(error));
        }
        _ => {}
    }
    let message =
        format!("Stopped the virtual machine by deleting the virtual machine instance {}", uid(instance));
    let event = (Severity::Normal, "SuccessfulDelete", message.as_str());
    events::publish(shared, machine, &objects::virtual_machines(), Reporter::VirtController, event).await;
    Ok(())
}

/// Creates the DataVolumes of `spec.dataVolumeTemplates` that do not exist.
async fn create_data_volumes(shared: &Shared, machine: &DynamicObject) -> Result<()> {
    let key = Key::of(machine);
    let templates: Vec<Value> = objects::read(machine, "/spec/dataVolumeTemplates")?;
    for template in templates {
        let name = template["metadata"]["name"].as_str().unwrap_or_default();
        let kind = objects::data_volumes();
        let known = kube::runtime::reflector::ObjectRef::new_with(name, kind.clone()).within(&key.namespace);
        if shared.data_volumes.known.get(&known).is_some() {
            continue;
        }
        let mut volume = DynamicObject::new(name, &kind).within(&key.namespace);
        volume.metadata.labels = serde_json::from_value(template["metadata"]["labels"].clone()).ok();
        volume.metadata.annotations =
            serde_json::from_value(template["metadata"]["annotations"].clone()).ok();
        volume.metadata.owner_references =
            machine.controller_owner_ref(&objects::virtual_machines()).map(|owner| vec![owner]);
        volume.data = json!({"spec": template["spec"]});
        let created = shared.api(&kind, &key.namespace).create(&PostParams::default(), &volume).await;
        match created {
            Err(error) if code(&error) != Some(409) => return Err(failed("create a DataVolume")(error)),
            _ => {}
        }
    }
    Ok(())
}

/// Writes the status of a VirtualMachine if it has changed.
async fn write_status(
    shared: &Shared,
    machine: &DynamicObject,
    instance: Option<&DynamicObject>,
) -> Result<()> {
    let mut conditions = Conditions::of(machine);
    let of_instance = instance.map(Conditions::of);
    let ready = of_instance.as_ref().is_some_and(|conditions| conditions.holds("Ready"));
    for kind in ["Ready", "Paused", "PodScheduled", "Synchronized"] {
        match of_instance.as_ref().and_then(|conditions| conditions.get(kind)) {
            Some(condition) => {
                let field = |name: &str| condition[name].as_str().unwrap_or_default();
                conditions.set(kind, field("status"), field("reason"), field("message"));
            }
            None if kind == "Ready" => {
                conditions.set(kind, "False", "VMINotExists", "VMI does not exist");
            }
            None => conditions.remove(kind),
        }
    }
    if !matches!(strategy(machine), "Manual" | "Halted" | "Always") {
        let message =
            format!("the double of KubeVirt does not run machines with the strategy {}", strategy(machine));
        let (reason, is_new) = ("UnsupportedRunStrategy", conditions.get("Failure").is_none());
        conditions.set("Failure", "True", reason, &message);
        if is_new {
            let event = (Severity::Warning, reason, message.as_str());
            events::publish(shared, machine, &objects::virtual_machines(), Reporter::VirtController, event)
                .await;
        }
    }
    let mut status = json!({
        "created": instance.is_some(),
        "ready": ready,
        "runStrategy": strategy(machine),
        "printableStatus": printable_status(machine, instance),
        "observedGeneration": machine.metadata.generation,
        "conditions": conditions.into_value(),
    });
    let current = machine.data.get("status").cloned().unwrap_or_default();
    let changes = status.as_object_mut().into_iter().flatten();
    if changes.into_iter().any(|(field, value)| current[field.as_str()] != *value) {
        status::of_machine(shared, &Key::of(machine), status).await?;
    }
    Ok(())
}

/// Returns the state of a VirtualMachine in one word.
fn printable_status(machine: &DynamicObject, instance: Option<&DynamicObject>) -> &'static str {
    if is_deleted(machine) {
        return "Terminating";
    }
    let Some(instance) = instance else { return "Stopped" };
    if is_final(instance) && !is_deleted(instance) {
        return "Stopped";
    }
    if is_deleted(instance) {
        return "Stopping";
    }
    let conditions = Conditions::of(instance);
    let reason = |kind: &str| conditions.get(kind).and_then(|condition| condition["reason"].as_str());
    match (phase(instance), reason("PodScheduled"), reason("Synchronized")) {
        ("Running", ..) if conditions.holds("Paused") => "Paused",
        ("Running", ..) => "Running",
        (_, Some("Unschedulable"), _) => "ErrorUnschedulable",
        (_, _, Some("FailedPvcNotFound")) => "ErrorPvcNotFound",
        (_, _, Some("ErrImagePull")) => "ErrImagePull",
        ("Pending" | "", ..) => "Provisioning",
        _ => "Starting",
    }
}
