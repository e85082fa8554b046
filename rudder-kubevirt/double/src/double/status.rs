//! Writes the status of objects, also across restarts of the API server.

use super::{
    objects::{self, Key},
    shared::{Shared, code, failed},
};
use kube::{
    Api,
    api::{Patch, PatchParams},
    core::DynamicObject,
};
use rudder_core::Result;
use serde_json::{Value, json};
use std::{future::Future, time::Duration};

/// Time between attempts to reach an API server that does not answer.
const RETRY_AFTER: Duration = Duration::from_millis(300);

/// Repeats a request until the API server answers it with something else than its own failure. Returns `None` when the object does
/// not exist any more.
pub(super) async fn persist<T, F: Future<Output = Result<T, kube::Error>>>(
    mut request: impl FnMut() -> F,
) -> Result<Option<T>> {
    loop {
        match request().await {
            Ok(answer) => return Ok(Some(answer)),
            Err(error) => match code(&error) {
                Some(404) => return Ok(None),
                Some(code) if code < 500 && code != 429 => {
                    return Err(failed("write to the API server")(error));
                }
                _ => tokio::time::sleep(RETRY_AFTER).await,
            },
        }
    }
}

/// Merges fields into the status of a DataVolume.
pub(super) async fn of_data_volume(
    shared: &Shared,
    key: &Key,
    status: Value,
) -> Result<Option<DynamicObject>> {
    of(&shared.api(&objects::data_volumes(), &key.namespace), &key.name, status).await
}

/// Merges fields into the status of a VirtualMachine.
pub(super) async fn of_machine(shared: &Shared, key: &Key, status: Value) -> Result<Option<DynamicObject>> {
    of(&shared.api(&objects::virtual_machines(), &key.namespace), &key.name, status).await
}

async fn of(api: &Api<DynamicObject>, name: &str, status: Value) -> Result<Option<DynamicObject>> {
    let patch = json!({"status": status});
    persist(|| async { api.patch_status(name, &PatchParams::default(), &Patch::Merge(&patch)).await }).await
}

/// Merges fields into the status of a VirtualMachineInstance, whose CRD has no subresource for it.
pub(super) async fn of_instance(shared: &Shared, key: &Key, status: Value) -> Result<Option<DynamicObject>> {
    let api = shared.api(&objects::instances(), &key.namespace);
    let patch = json!({"status": status});
    persist(|| async { api.patch(&key.name, &PatchParams::default(), &Patch::Merge(&patch)).await }).await
}

/// Replaces the finalizers of an object.
pub(super) async fn finalizers(
    api: &Api<DynamicObject>,
    object: &DynamicObject,
    change: impl FnOnce(&mut Vec<String>),
) -> Result<()> {
    let mut finalizers = object.metadata.finalizers.clone().unwrap_or_default();
    change(&mut finalizers);
    let name = Key::of(object).name;
    let patch = json!({"metadata": {
        "finalizers": finalizers,
        // Only this version has exactly these finalizers.
        "resourceVersion": object.metadata.resource_version,
    }});
    let patched =
        persist(|| async { api.patch_metadata(&name, &PatchParams::default(), &Patch::Merge(&patch)).await });
    patched.await.map(drop)
}
