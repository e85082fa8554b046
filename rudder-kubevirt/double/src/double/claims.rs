//! Watches PersistentVolumeClaims: forgets the volumes of those that are gone, and tells the DataVolumes of those that changed.
//! Claims in use are protected by Kubernetes itself: the pods of instances list them.

use super::{
    objects::{self, Key, uid},
    shared::Shared,
};
use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use kube::runtime::{controller::Action, reflector::ObjectRef, watcher::Event};
use rudder_core::Result;
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

/// Does nothing: the controllers of DataVolumes and instances write to claims.
pub(super) async fn reconcile(_: Arc<PersistentVolumeClaim>, _: Arc<Shared>) -> Result<Action> {
    Ok(Action::await_change())
}
