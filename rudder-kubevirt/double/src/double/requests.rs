//! Requests about the life of machines: start, stop and restart of VirtualMachines, pause of instances.

use super::{
    answers::{Body, Refusal, empty},
    conditions::Conditions,
    machines::{StateAction, StateChange, is_final, strategy},
    objects::{self, Key, phase, uid},
    shared::{Shared, code},
    status,
};
use http::{Response, StatusCode};
use kube::{
    Api,
    api::{Patch, PatchParams},
    core::DynamicObject,
};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::json;

/// The names of the kinds in messages.
pub(super) const MACHINE: &str = "virtualmachine";
pub(super) const INSTANCE: &str = "virtualmachineinstance";
/// How often a request is tried again when someone else changed the machine meanwhile.
const ATTEMPTS: usize = 20;

/// Body of a request to stop or restart.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct StopOptions {
    grace_period: Option<u64>,
    grace_period_seconds: Option<u64>,
}

fn decode<T: DeserializeOwned + Default>(body: &[u8]) -> Result<T, Refusal> {
    if body.iter().all(u8::is_ascii_whitespace) {
        return Ok(T::default());
    }
    serde_json::from_slice(body).map_err(|error| {
        Refusal::bad_request(format!("Can not unmarshal Request body to struct, error: {error}"))
    })
}

/// Reads a machine or an instance.
async fn fetch(api: &Api<DynamicObject>, name: &str) -> Result<Option<DynamicObject>, Refusal> {
    api.get_opt(name).await.map_err(Refusal::internal)
}

/// Reads an instance.
pub(super) async fn instance(shared: &Shared, key: &Key) -> Result<DynamicObject, Refusal> {
    let found = fetch(&shared.api(&objects::instances(), &key.namespace), &key.name).await?;
    found.ok_or_else(|| Refusal::not_found(INSTANCE, &key.name))
}

/// Replaces the requests of a machine, if nobody has changed the machine meanwhile.
pub(super) async fn set_state_changes(
    api: &Api<DynamicObject>,
    machine: &DynamicObject,
    changes: &[StateChange],
) -> Result<DynamicObject, kube::Error> {
    let changes = if changes.is_empty() { None } else { Some(changes) };
    let patch = json!({
        "metadata": {"resourceVersion": machine.metadata.resource_version},
        "status": {"stateChangeRequests": changes},
    });
    api.patch_status(&Key::of(machine).name, &PatchParams::default(), &Patch::Merge(&patch)).await
}

/// What to do with a machine.
enum Change {
    /// Write these requests into its status.
    Requests(Vec<StateChange>),
    /// Give it another run strategy.
    Strategy(&'static str),
}

/// Starts, stops or restarts a machine.
pub(super) async fn machine(
    shared: &Shared,
    key: &Key,
    verb: &str,
    body: &[u8],
) -> Result<Response<Body>, Refusal> {
    let machines = shared.api(&objects::virtual_machines(), &key.namespace);
    let instances = shared.api(&objects::instances(), &key.namespace);
    let conflict = |why: &str| Refusal::conflict(MACHINE, &key.name, why);
    for _ in 0..ATTEMPTS {
        let machine =
            fetch(&machines, &key.name).await?.ok_or_else(|| Refusal::not_found(MACHINE, &key.name))?;
        let instance = fetch(&instances, &key.name).await?;
        let change = match verb {
            "start" => start(&machine, instance.as_ref()),
            "stop" => stop(&instances, &machine, instance.as_ref(), &decode(body)?).await?,
            _ => restart(&machine, instance.as_ref(), &decode(body)?),
        };
        let changed = match change.map_err(|why| conflict(&why))? {
            Change::Requests(changes) => {
                let pending: Vec<StateChange> =
                    objects::read(&machine, "/status/stateChangeRequests").map_err(Refusal::internal)?;
                let only_stops = matches!(&changes[..], [StateChange { action: StateAction::Stop, .. }]);
                if !pending.is_empty() && !only_stops {
                    return Err(Refusal::internal("unable to complete request: stop/start already underway"));
                }
                set_state_changes(&machines, &machine, &changes).await
            }
            Change::Strategy(strategy) => {
                let patch = match machine.data.pointer("/spec/running") {
                    Some(_) => json!({"spec": {"running": strategy == "Always"}}),
                    None => json!({"spec": {"runStrategy": strategy}}),
                };
                machines.patch(&key.name, &PatchParams::default(), &Patch::Merge(&patch)).await
            }
        };
        match changed {
            Ok(_) => return Ok(empty(StatusCode::ACCEPTED)),
            Err(error) if code(&error) == Some(409) => {}
            Err(error) => return Err(Refusal::internal(error)),
        }
    }
    Err(conflict("the object has been modified"))
}

fn request(action: StateAction, instance: Option<&DynamicObject>) -> StateChange {
    StateChange { action, uid: instance.map(|instance| uid(instance).to_owned()) }
}

fn start(machine: &DynamicObject, instance: Option<&DynamicObject>) -> Result<Change, String> {
    if instance.is_some_and(|instance| !is_final(instance) && !phase(instance).is_empty()) {
        return Err("VM is already running".to_owned());
    }
    let start = request(StateAction::Start, None);
    match (strategy(machine), instance) {
        ("Halted", _) => Ok(Change::Strategy("Always")),
        ("Manual", Some(instance)) if is_final(instance) => {
            Ok(Change::Requests(vec![request(StateAction::Stop, Some(instance)), start]))
        }
        ("Manual" | "RerunOnFailure", _) => Ok(Change::Requests(vec![start])),
        (other, _) => Err(format!("{other} does not support manual start requests")),
    }
}

async fn stop(
    instances: &Api<DynamicObject>,
    machine: &DynamicObject,
    instance: Option<&DynamicObject>,
    options: &StopOptions,
) -> Result<Result<Change, String>, Refusal> {
    let running = instance.filter(|instance| !is_final(instance));
    if let (Some(instance), Some(seconds)) = (running, options.grace_period) {
        let patch = json!({"spec": {"terminationGracePeriodSeconds": seconds}});
        let name = Key::of(instance).name;
        let patched = status::persist(|| async {
            instances.patch(&name, &PatchParams::default(), &Patch::Merge(&patch)).await
        });
        patched.await.map_err(Refusal::internal)?;
    }
    Ok(match (strategy(machine), running) {
        ("Always" | "Once", _) => Ok(Change::Strategy("Halted")),
        ("Halted", Some(_)) if options.grace_period.is_none() => {
            Err("Halted only supports manual stop requests with a shorter graceperiod".to_owned())
        }
        (_, Some(_)) => Ok(Change::Requests(vec![request(StateAction::Stop, running)])),
        (_, None) => Err("VM is not running".to_owned()),
    })
}

fn restart(
    machine: &DynamicObject,
    instance: Option<&DynamicObject>,
    options: &StopOptions,
) -> Result<Change, String> {
    if options.grace_period_seconds.is_some_and(|seconds| seconds > 0) {
        return Err("For force restart, only gracePeriod=0 is supported for now".to_owned());
    }
    match (strategy(machine), instance) {
        (strategy @ ("Halted" | "Once"), _) => {
            Err(format!("RunStategy {strategy} does not support manual restart requests"))
        }
        (_, None) => Err("VM is not running: Halted".to_owned()),
        (_, instance) => Ok(Change::Requests(vec![
            request(StateAction::Stop, instance),
            request(StateAction::Start, None),
        ])),
    }
}

/// Pauses or unpauses an instance: the condition only.
pub(super) async fn pause(shared: &Shared, key: &Key, pause: bool) -> Result<Response<Body>, Refusal> {
    let instance = instance(shared, key).await?;
    let conflict = |why: &str| Refusal::conflict(INSTANCE, &key.name, why);
    if phase(&instance) != "Running" {
        return Err(conflict("VMI is not running"));
    }
    let mut conditions = Conditions::of(&instance);
    match (pause, conditions.holds("Paused")) {
        (true, true) => return Err(conflict("VMI is already paused")),
        (false, false) => return Err(conflict("VMI is not paused")),
        (true, false) => conditions.set("Paused", "True", "PausedByUser", "VMI was paused by user"),
        (false, true) => conditions.remove("Paused"),
    }
    let changed = json!({"conditions": conditions.into_value()});
    status::of_instance(shared, key, changed).await.map_err(Refusal::internal)?;
    Ok(empty(StatusCode::OK))
}

/// Refuses to reboot a guest, as without a guest agent and ACPI.
pub(super) async fn soft_reboot(shared: &Shared, key: &Key) -> Result<Response<Body>, Refusal> {
    let instance = instance(shared, key).await?;
    let why = match phase(&instance) {
        "Running" => "VMI neither have the agent connected nor the ACPI feature enabled",
        _ => "VMI is not running",
    };
    Err(Refusal::conflict(INSTANCE, &key.name, why))
}
