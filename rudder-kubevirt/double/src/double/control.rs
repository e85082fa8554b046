//! Runs the controllers: each watches its kind of object, and reconciles an object whenever it changes or when it is asked to.

use super::{
    claims, datavolumes, instances, machines,
    objects::{self, Key},
    shared::{Queue, Queues, Shared},
};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use kube::{
    Api, Resource,
    runtime::{
        Config, WatchStreamExt as _, applier,
        controller::{self, Action, ReconcileRequest},
        reflector::ObjectRef,
        watcher::{self, Event, watcher},
    },
};
use rudder_core::{Error, ErrorKind, Result};
use serde::de::DeserializeOwned;
use std::{fmt::Debug, future::Future, hash::Hash, sync::Arc, time::Duration};

/// Time until an object is reconciled again after that failed.
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// The same when someone else changed the object meanwhile.
const CONFLICT_RETRY_AFTER: Duration = Duration::from_millis(50);

/// Starts all controllers.
pub(super) fn start(shared: &Arc<Shared>, queues: Queues) {
    let client = &shared.client;
    let kind = objects::data_volumes();
    let api = Api::all_with(client.clone(), &kind);
    shared.spawn(run(
        shared.clone(),
        api,
        kind,
        queues.data_volumes,
        datavolumes::noticed,
        datavolumes::reconcile,
    ));
    let api = Api::all(client.clone());
    shared.spawn(run(shared.clone(), api, (), queues.claims, claims::noticed, claims::reconcile));
    let kind = objects::virtual_machines();
    let api = Api::all_with(client.clone(), &kind);
    shared.spawn(run(shared.clone(), api, kind, queues.machines, machines::noticed, machines::reconcile));
    let kind = objects::instances();
    let api = Api::all_with(client.clone(), &kind);
    shared.spawn(run(shared.clone(), api, kind, queues.instances, instances::noticed, instances::reconcile));
}

/// Runs one controller. `noticed` sees every event of the watch after the store has; `reconcile` never runs twice at once for one
/// object.
async fn run<K, F>(
    shared: Arc<Shared>,
    api: Api<K>,
    kind: K::DynamicType,
    queue: Queue<K>,
    noticed: fn(&Shared, &Event<K>),
    reconcile: fn(Arc<K>, Arc<Shared>) -> F,
) where
    K: Resource + Clone + DeserializeOwned + Debug + Send + Sync + 'static,
    K::DynamicType: Debug + Eq + Hash + Clone + Unpin + Send + Sync + 'static,
    F: Future<Output = Result<Action>> + Send + 'static,
{
    let Queue { writer, retries } = queue;
    let known = writer.as_reader();
    let observer = shared.clone();
    let changed = {
        let kind = kind.clone();
        watcher(api, watcher::Config::default())
            .default_backoff()
            .reflect(writer)
            .inspect_ok(move |event| noticed(&observer, event))
            .applied_objects()
            .map_ok(move |object| ReconcileRequest::from(ObjectRef::from_obj_with(&object, kind.clone())))
    };
    let asked = retries.map(move |Key { namespace, name }| {
        let object = ObjectRef::<K>::new_with(&name, kind.clone()).within(&namespace);
        Ok::<_, watcher::Error>(ReconcileRequest::from(object))
    });
    applier(
        move |object, shared| Box::pin(reconcile(object, shared)),
        |_, error: &Error, _| {
            Action::requeue(match error.kind() {
                ErrorKind::Conflict => CONFLICT_RETRY_AFTER,
                _ => RETRY_AFTER,
            })
        },
        shared,
        known,
        Box::pin(stream::select(changed, asked)),
        Config::default(),
    )
    .for_each(|outcome| {
        match outcome {
            Ok(_) | Err(controller::Error::ObjectNotFound(_)) => {}
            Err(error) => tracing::debug!(%error, "the double tries again"),
        }
        std::future::ready(())
    })
    .await;
}
