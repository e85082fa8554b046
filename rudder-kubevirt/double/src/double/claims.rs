//! Watches PersistentVolumeClaims: forgets the volumes of those that are gone, and lets go of deleted ones that no machine uses.

use super::{
    objects::{self, Key, uid},
    shared::{Shared, failed},
    texts::CLAIM_FINALIZER,
};
use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use kube::{
    Resource as _,
    api::{Patch, PatchParams},
    runtime::{controller::Action, reflector::ObjectRef, watcher::Event},
};
use rudder_core::Result;
use serde_json::json;
use std::sync::Arc;

pub(super) fn noticed(shared: &Shared, event: &Event<PersistentVolumeClaim>) {
    match event {
        Event::Delete(claim) => shared.volumes.forget(&Key::of(claim), uid(claim)),
        // Deletions may have been missed before the list was made.
        Event::InitDone => shared.volumes.retain(|key, of| {
            let object = ObjectRef::new(&key.name).within(&key.namespace);
            shared.claims.known.get(&object).is_some_and(|claim| uid(&*claim) == of)
        }),
        Event::Apply(claim) => {
            if let Some(owner) = objects::controller(claim, "DataVolume") {
                shared.data_volumes.retry(Key::new(Key::of(claim).namespace, owner));
            }
        }
        Event::Init | Event::InitApply(_) => {}
    }
}

/// Removes the finalizer of a deleted claim that nothing uses, as the controller for the protection of claims does. The pods of the
/// double have no node, so that this controller might not count them.
pub(super) async fn reconcile(claim: Arc<PersistentVolumeClaim>, shared: Arc<Shared>) -> Result<Action> {
    let finalizers = claim.meta().finalizers.clone().unwrap_or_default();
    let protected = finalizers.iter().any(|finalizer| finalizer == CLAIM_FINALIZER);
    let key = Key::of(&*claim);
    let in_use = shared.volumes.get(&key).is_some_and(|volume| volume.user().is_some());
    if !objects::is_deleted(&*claim) || !protected || in_use {
        return Ok(Action::await_change());
    }
    let left: Vec<_> = finalizers.into_iter().filter(|finalizer| finalizer != CLAIM_FINALIZER).collect();
    let patch = json!({"metadata": {"finalizers": left, "resourceVersion": claim.meta().resource_version}});
    let api = shared.claims_in(&key.namespace);
    match api.patch_metadata(&key.name, &PatchParams::default(), &Patch::Merge(&patch)).await {
        Err(error) if super::shared::code(&error) != Some(404) => {
            Err(failed("release a claim")(error))
        }
        _ => Ok(Action::await_change()),
    }
}
