//! CDI's controller of DataVolumes: creates the claim of each, binds it, and has it filled.

use super::{
    conditions::Conditions,
    events::{self, Reporter, Severity},
    importing,
    objects::{self, DataVolumeSpec, Key, is_deleted, phase, uid},
    shared::{Shared, code, failed},
    status,
};
use k8s_openapi::api::{core::v1::PersistentVolumeClaim, storage::v1::StorageClass};
use kube::{
    Api, Resource as _,
    api::{Patch, PatchParams, PostParams},
    core::DynamicObject,
    runtime::{controller::Action, watcher::Event},
};
use rudder_core::{Error, ErrorKind, Result};
use serde_json::{Value, from_value, json};
use std::{collections::HashSet, sync::Arc, time::Duration};

/// Time until a claim is requested again that a quota did not allow.
const QUOTA_RETRY: Duration = Duration::from_secs(3);

/// A DataVolume that is being filled.
#[derive(Debug, Clone)]
pub(super) struct DataVolume {
    pub(super) key: Key,
    pub(super) uid: String,
    pub(super) spec: DataVolumeSpec,
    pub(super) object: Arc<DynamicObject>,
}

pub(super) fn noticed(shared: &Shared, event: &Event<DynamicObject>) {
    match event {
        Event::Delete(object) => shared.imports.cancel(uid(object)),
        Event::Apply(object) | Event::InitApply(object) if is_deleted(object) => {
            shared.imports.cancel(uid(object));
        }
        // Deletions may have been missed before the list was made.
        Event::InitDone => {
            let known = shared.data_volumes.known.state();
            let uids: HashSet<&str> = known.iter().map(|object| uid(&**object)).collect();
            shared.imports.retain(|of| uids.contains(of));
        }
        _ => {}
    }
}

pub(super) async fn reconcile(object: Arc<DynamicObject>, shared: Arc<Shared>) -> Result<Action> {
    let wait = Ok(Action::await_change());
    if is_deleted(&*object) || matches!(phase(&object), "Succeeded" | "Failed") {
        return wait;
    }
    let (key, uid) = (Key::of(&*object), uid(&*object).to_owned());
    if shared.imports.runs(&uid) {
        return wait;
    }
    let volume = DataVolume { spec: objects::read(&object, "/spec")?, object, key, uid };
    let Some(claim) = claim_of(&shared, &volume).await? else { return Ok(Action::requeue(QUOTA_RETRY)) };
    let Some(claim) = bound(&shared, &volume, claim).await? else { return wait };
    let claim_uid = objects::uid(&claim).to_owned();
    let size = capacity(&claim)?;
    // What is known of the DataVolume may be older than its claim's content.
    let filled = shared.volumes.get(&volume.key).is_some_and(|stored| stored.uid == claim_uid);
    if !filled && shared.imports.begin(&volume.uid) {
        let task = importing::run(shared.clone(), volume.clone(), claim_uid, size);
        shared.imports.spawn(&shared, &volume.uid, task);
    }
    wait
}

/// Returns the claim of a DataVolume; creates it if it does not exist. `None` when that is not allowed now.
async fn claim_of(shared: &Shared, volume: &DataVolume) -> Result<Option<PersistentVolumeClaim>> {
    let api = shared.claims_in(&volume.key.namespace);
    let found = api.get_opt(&volume.key.name).await.map_err(failed("read a claim"))?;
    if let Some(claim) = found {
        let owned = objects::controller(&claim, "DataVolume") == Some(&volume.key.name);
        if owned && !is_deleted(&claim) {
            return Ok(Some(claim));
        }
        let message =
            format!("Resource \"{}\" already exists and is not managed by DataVolume", volume.key.name);
        pending(shared, volume, "ErrResourceExists", &message).await?;
        return Ok(None);
    }
    let claim = from_value(new_claim(shared, volume)?).map_err(|error| {
        Error::new(ErrorKind::InvalidInput, "cannot make a claim of a DataVolume").with_source(error)
    })?;
    match api.create(&PostParams::default(), &claim).await {
        Ok(claim) => Ok(Some(claim)),
        Err(kube::Error::Api(refusal)) if refusal.message.contains("exceeded quota") => {
            pending(shared, volume, "ErrExceededQuota", &refusal.message).await?;
            Ok(None)
        }
        Err(error) if matches!(code(&error), Some(400 | 422)) => {
            pending(shared, volume, "ErrClaimNotValid", &error.to_string()).await?;
            Ok(None)
        }
        Err(error) => Err(failed("create a claim")(error)),
    }
}

fn new_claim(shared: &Shared, volume: &DataVolume) -> Result<Value> {
    let refused = |why: &str| Error::new(ErrorKind::InvalidInput, format!("{}: {why}", volume.key));
    let spec = volume.spec.claim().ok_or_else(|| refused("there is neither pvc nor storage"))?;
    // A copy may leave its size to its source.
    let source = volume.spec.source.pvc.as_ref().map(|source| {
        let namespace = source.namespace.as_ref().unwrap_or(&volume.key.namespace);
        Key::new(namespace, &source.name)
    });
    let of_source = source.and_then(|key| shared.volumes.get(&key)).map(|source| source.size);
    let size = spec.size()?.or(of_source).ok_or_else(|| refused("there is no size"))?;
    let meta = volume.object.meta();
    let mut labels = meta.labels.clone().unwrap_or_default();
    labels.insert("app".to_owned(), "containerized-data-importer".to_owned());
    let modes = match spec.access_modes.is_empty() {
        true => vec!["ReadWriteOnce".to_owned()],
        false => spec.access_modes.clone(),
    };
    Ok(json!({
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {
            "name": volume.key.name,
            "namespace": volume.key.namespace,
            "labels": labels,
            "annotations": meta.annotations,
            "ownerReferences": [volume.object.controller_owner_ref(&objects::data_volumes())],
        },
        "spec": {
            "accessModes": modes,
            "volumeMode": spec.volume_mode,
            "storageClassName": spec.storage_class_name,
            "resources": {"requests": {"storage": size.to_string()}},
        },
    }))
}

/// Binds a claim, if its storage class exists. The double is the provisioner of all classes.
async fn bound(
    shared: &Shared,
    volume: &DataVolume,
    claim: PersistentVolumeClaim,
) -> Result<Option<PersistentVolumeClaim>> {
    let is_bound = |claim: &PersistentVolumeClaim| {
        claim.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Bound")
    };
    if is_bound(&claim) {
        return Ok(Some(claim));
    }
    let class = claim.spec.as_ref().and_then(|spec| spec.storage_class_name.clone());
    let classes: Api<StorageClass> = Api::all(shared.client.clone());
    let exists = match &class {
        Some(class) => classes.get_opt(class).await.map_err(failed("read a storage class"))?.is_some(),
        None => false,
    };
    if !exists {
        // The claim changes when it gets a class.
        pending(shared, volume, "Pending", &format!("PVC {} Pending", volume.key.name)).await?;
        return Ok(None);
    }
    bind(shared, &claim).await
}

/// Writes into the status of a claim that it is bound.
pub(super) async fn bind(
    shared: &Shared,
    claim: &PersistentVolumeClaim,
) -> Result<Option<PersistentVolumeClaim>> {
    let spec = claim.spec.clone().unwrap_or_default();
    let capacity = spec.resources.and_then(|resources| resources.requests);
    let status =
        json!({"status": {"phase": "Bound", "accessModes": spec.access_modes, "capacity": capacity}});
    let key = Key::of(claim);
    let api = shared.claims_in(&key.namespace);
    let parameters = PatchParams::default();
    status::persist(|| async { api.patch_status(&key.name, &parameters, &Patch::Merge(&status)).await }).await
}

/// Returns the size of a claim in bytes.
pub(super) fn capacity(claim: &PersistentVolumeClaim) -> Result<u64> {
    let requests = claim.spec.as_ref().and_then(|spec| spec.resources.as_ref()?.requests.as_ref());
    match requests.and_then(|requests| requests.get("storage")) {
        Some(quantity) => objects::bytes(&quantity.0),
        None => Err(Error::new(ErrorKind::InvalidInput, "expected a claim with a size, but found none")),
    }
}

/// Writes that a DataVolume waits, for this reason. Publishes an event when the reason is new.
pub(super) async fn pending(shared: &Shared, volume: &DataVolume, reason: &str, message: &str) -> Result<()> {
    let mut conditions = Conditions::of(&volume.object);
    let known = conditions.get("Bound").is_some_and(|bound| bound["message"] == message);
    conditions.set("Bound", "False", reason, message);
    conditions.set("Ready", "False", "", "");
    conditions.set("Running", "False", "", "");
    let status = json!({
        "phase": "Pending",
        "progress": "N/A",
        "claimName": volume.key.name,
        "conditions": conditions.into_value(),
    });
    status::of_data_volume(shared, &volume.key, status).await?;
    if !known {
        let severity = if reason == "Pending" { Severity::Normal } else { Severity::Warning };
        let event = (severity, reason, message);
        let kind = objects::data_volumes();
        events::publish(shared, &*volume.object, &kind, Reporter::DataVolumes, event).await;
    }
    Ok(())
}
