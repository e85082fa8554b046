//! The virt-launcher pods of instances. They run nothing: the double schedules them and writes their status, so that quotas count
//! them, claims in use are protected, and clients find the events and conditions of a cluster.

use super::{
    conditions::now,
    events::{self, Reporter, Severity},
    objects::{InstanceSpec, Key, SUBRESOURCES, instances, uid},
    shared::{Shared, code, failed},
    status,
    texts::NODE,
};
use k8s_openapi::api::core::v1::{Binding, Pod};
use kube::{
    Api, Resource as _,
    api::{DeleteParams, Patch, PatchParams, PostParams},
    core::DynamicObject,
};
use rudder_core::{Error, ErrorKind, Result};
use serde_json::{Value, from_value, json};

/// What became of a pod that was to be created.
pub(super) enum Created {
    /// It exists.
    Pod(Box<Pod>),
    /// A quota or another policy does not allow it.
    Refused(String),
}

/// Returns the name of the pod of an instance.
pub(super) fn name(instance: &DynamicObject) -> String {
    let suffix: String = uid(instance).chars().filter(char::is_ascii_alphanumeric).take(5).collect();
    format!("virt-launcher-{}-{suffix}", Key::of(instance).name)
}

fn api(shared: &Shared, namespace: &str) -> Api<Pod> {
    Api::namespaced(shared.client.clone(), namespace)
}

/// Creates the pod of an instance, unless it exists.
pub(super) async fn create(
    shared: &Shared,
    instance: &DynamicObject,
    spec: &InstanceSpec,
    memory: &str,
) -> Result<Created> {
    let key = Key::of(instance);
    let api = api(shared, &key.namespace);
    let name = name(instance);
    if let Some(pod) = api.get_opt(&name).await.map_err(failed("read a pod"))? {
        return Ok(Created::Pod(Box::new(pod)));
    }
    let claims = spec.volumes.iter().filter_map(|volume| Some((&volume.name, volume.claim()?)));
    let volumes: Vec<Value> = claims
        .map(|(name, claim)| json!({"name": name, "persistentVolumeClaim": {"claimName": claim}}))
        .collect();
    let pod = json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": key.namespace,
            "labels": {
                "kubevirt.io": "virt-launcher",
                "kubevirt.io/created-by": uid(instance),
                "vm.kubevirt.io/name": key.name,
            },
            "ownerReferences": [instance.controller_owner_ref(&instances())],
        },
        "spec": {
            "containers": [{
                "name": "compute",
                "image": format!("virt-launcher.{SUBRESOURCES}"),
                "resources": {"requests": {"cpu": "100m", "memory": memory}, "limits": {"cpu": "1", "memory": memory}},
            }],
            "volumes": volumes,
            "restartPolicy": "Never",
            "schedulerName": "double",
            "automountServiceAccountToken": false,
        },
    });
    let pod = from_value(pod)
        .map_err(|error| Error::new(ErrorKind::Internal, "cannot make a pod").with_source(error))?;
    match api.create(&PostParams::default(), &pod).await {
        Ok(pod) => Ok(Created::Pod(Box::new(pod))),
        // Until a new namespace has its service account, pods are refused, and soon allowed.
        Err(kube::Error::Api(refusal))
            if refusal.code == 403 && !refusal.message.contains("service account") =>
        {
            Ok(Created::Refused(refusal.message.clone()))
        }
        Err(error) => Err(failed("create a pod")(error)),
    }
}

/// Writes that no node has room for a pod.
pub(super) async fn unschedulable(shared: &Shared, pod: &Pod, message: &str) -> Result<()> {
    let event = (Severity::Warning, "FailedScheduling", message);
    events::publish(shared, pod, &(), Reporter::Scheduler, event).await;
    let condition = json!({
        "type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message,
        "lastTransitionTime": now(),
    });
    write_status(shared, pod, json!({"phase": "Pending", "conditions": [condition]})).await
}

/// Writes that the image of a pod cannot be pulled.
pub(super) async fn image_missing(shared: &Shared, pod: &Pod, message: &str) -> Result<()> {
    let event = (Severity::Warning, "Failed", message);
    events::publish(shared, pod, &(), Reporter::Kubelet, event).await;
    let waiting = json!({"waiting": {"reason": "ErrImagePull", "message": message}});
    write_status(shared, pod, json!({"phase": "Pending", "containerStatuses": [container(&waiting, false)]}))
        .await
}

/// Schedules a pod on the node.
pub(super) async fn schedule(shared: &Shared, pod: &Pod) -> Result<()> {
    let key = Key::of(pod);
    if pod.spec.as_ref().is_some_and(|spec| spec.node_name.is_some()) {
        return Ok(());
    }
    let binding: Binding = from_value(json!({
        "apiVersion": "v1",
        "kind": "Binding",
        "metadata": {"name": key.name, "namespace": key.namespace},
        "target": {"apiVersion": "v1", "kind": "Node", "name": NODE},
    }))
    .map_err(|error| Error::new(ErrorKind::Internal, "cannot make a binding").with_source(error))?;
    let bound = api(shared, &key.namespace)
        .create_subresource::<Binding, Value>("binding", &key.name, &PostParams::default(), &binding)
        .await;
    bound.map(drop).map_err(failed("schedule a pod"))
}

/// Writes that a pod runs and has this address.
pub(super) async fn running(shared: &Shared, pod: &Pod, address: &str) -> Result<()> {
    let condition = |kind: &str| json!({"type": kind, "status": "True", "lastTransitionTime": now()});
    let status = json!({
        "phase": "Running",
        "conditions": [condition("PodScheduled"), condition("Initialized"), condition("ContainersReady"), condition("Ready")],
        "containerStatuses": [container(&json!({"running": {"startedAt": now()}}), true)],
        "podIP": address,
        "podIPs": [{"ip": address}],
        "startTime": now(),
    });
    write_status(shared, pod, status).await
}

/// Writes that the pod of an instance has ended. The pod may be gone.
pub(super) async fn ended(shared: &Shared, key: &Key, name: &str, succeeded: bool) -> Result<()> {
    let (phase, reason, code) =
        if succeeded { ("Succeeded", "Completed", 0) } else { ("Failed", "Error", 1) };
    let state = json!({"terminated": {"exitCode": code, "reason": reason, "finishedAt": now()}});
    let api = api(shared, &key.namespace);
    let patch = json!({"status": {"phase": phase, "containerStatuses": [container(&state, false)]}});
    let parameters = PatchParams::default();
    status::persist(|| async { api.patch_status(name, &parameters, &Patch::Merge(&patch)).await })
        .await
        .map(drop)
}

/// Removes the pod of an instance at once, as the kubelet does when it has stopped. The pod may be gone.
pub(super) async fn remove(shared: &Shared, key: &Key, name: &str) -> Result<()> {
    let parameters = DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() };
    match api(shared, &key.namespace).delete(name, &parameters).await {
        Err(error) if code(&error) != Some(404) => Err(failed("remove a pod")(error)),
        _ => Ok(()),
    }
}

fn container(state: &Value, ready: bool) -> Value {
    json!({
        "name": "compute", "image": "", "imageID": "", "restartCount": 0, "ready": ready, "started": ready, "state": state,
    })
}

async fn write_status(shared: &Shared, pod: &Pod, status: Value) -> Result<()> {
    let key = Key::of(pod);
    let api = api(shared, &key.namespace);
    let (patch, parameters) = (json!({"status": status}), PatchParams::default());
    status::persist(|| async { api.patch_status(&key.name, &parameters, &Patch::Merge(&patch)).await })
        .await
        .map(drop)
}
