//! Events about objects, as `kubectl describe` lists them.

use super::{conditions::now, objects::Key, shared::Shared};
use k8s_openapi::api::core::v1::{Event, ObjectReference};
use kube::{Api, Resource, api::PostParams};
use serde_json::{from_value, json};

/// Whether an event is about something normal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Severity {
    Normal,
    Warning,
}

/// Who reports an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reporter {
    DataVolumes,
    VirtController,
    VirtHandler,
    Scheduler,
    Kubelet,
}

impl Reporter {
    fn name(self) -> &'static str {
        match self {
            Self::DataVolumes => "datavolume-import-controller",
            Self::VirtController => "virtualmachine-controller",
            Self::VirtHandler => "virt-handler",
            Self::Scheduler => "default-scheduler",
            Self::Kubelet => "kubelet",
        }
    }
}

/// Publishes an event about an object.
pub(super) async fn publish<K: Resource>(
    shared: &Shared,
    about: &K,
    kind: &K::DynamicType,
    reporter: Reporter,
    (severity, reason, message): (Severity, &str, &str),
) {
    publish_about(shared, &about.object_ref(kind), reporter, (severity, reason, message)).await;
}

/// Publishes an event about an object that is known by its reference. An event that cannot be published, as in a namespace that is
/// being deleted, is lost, as in a cluster.
pub(super) async fn publish_about(
    shared: &Shared,
    about: &ObjectReference,
    reporter: Reporter,
    (severity, reason, message): (Severity, &str, &str),
) {
    let namespace = about.namespace.clone().unwrap_or_default();
    let name = about.name.clone().unwrap_or_default();
    let event = json!({
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"namespace": namespace, "generateName": format!("{name}.")},
        "involvedObject": about,
        "type": match severity { Severity::Normal => "Normal", Severity::Warning => "Warning" },
        "reason": reason,
        "message": message,
        "source": {"component": reporter.name()},
        "reportingComponent": reporter.name(),
        "reportingInstance": "",
        "firstTimestamp": now(),
        "lastTimestamp": now(),
        "count": 1,
    });
    let Ok(event) = from_value::<Event>(event) else { return };
    let api: Api<Event> = Api::namespaced(shared.client.clone(), &namespace);
    if let Err(error) = api.create(&PostParams::default(), &event).await {
        tracing::debug!(%error, object = %Key::new(namespace, name), reason, "an event was lost");
    }
}
