//! What the controllers and the server of a double share.

use super::{
    Options,
    faults::Faults,
    importing::Imports,
    node::Node,
    objects::{self, Key},
    runs::Runs,
    streams::Sessions,
    volumes::Volumes,
};
use futures::channel::mpsc::{UnboundedReceiver, UnboundedSender, unbounded};
use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use kube::{
    Api, Client, Resource,
    core::{ApiResource, DynamicObject},
    runtime::reflector::{Lookup, Store, store::Writer},
};
use rudder_core::{Error, ErrorKind};
use std::{fmt, future::Future, hash::Hash, sync::Arc};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// State shared by the controllers and the server.
pub(super) struct Shared {
    pub(super) client: Client,
    pub(super) node: Node,
    pub(super) options: Options,
    pub(super) volumes: Volumes,
    pub(super) faults: Faults,
    pub(super) runs: Runs,
    pub(super) sessions: Sessions,
    pub(super) imports: Imports,
    pub(super) data_volumes: Work<DynamicObject>,
    pub(super) claims: Work<PersistentVolumeClaim>,
    pub(super) machines: Work<DynamicObject>,
    pub(super) instances: Work<DynamicObject>,
    shutdown: CancellationToken,
    tasks: TaskTracker,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("node", &self.node).finish_non_exhaustive()
    }
}

/// The objects that a controller knows, and a way to ask it to reconcile one again.
pub(super) struct Work<K: Lookup + Clone + 'static>
where
    K::DynamicType: Hash + Eq,
{
    pub(super) known: Store<K>,
    retries: UnboundedSender<Key>,
}

impl<K: Resource + Clone> Work<K>
where
    <K as Resource>::DynamicType: Hash + Eq + Clone,
{
    fn new(kind: <K as Resource>::DynamicType) -> (Self, Queue<K>) {
        let writer = Writer::new(kind);
        let (sender, retries) = unbounded();
        (Self { known: writer.as_reader(), retries: sender }, Queue { writer, retries })
    }

    /// Asks the controller to reconcile an object.
    pub(super) fn retry(&self, key: Key) {
        // Nobody listens once the double is being stopped.
        let _ = self.retries.unbounded_send(key);
    }

    /// Asks the controller to reconcile all objects.
    pub(super) fn retry_all(&self) {
        self.known.state().iter().for_each(|object| self.retry(Key::of(&**object)));
    }
}

/// The other end of a [`Work`]: what a controller runs on.
pub(super) struct Queue<K: Lookup + Clone + 'static>
where
    K::DynamicType: Hash + Eq + Clone,
{
    pub(super) writer: Writer<K>,
    pub(super) retries: UnboundedReceiver<Key>,
}

/// The queues of all controllers.
pub(super) struct Queues {
    pub(super) data_volumes: Queue<DynamicObject>,
    pub(super) claims: Queue<PersistentVolumeClaim>,
    pub(super) machines: Queue<DynamicObject>,
    pub(super) instances: Queue<DynamicObject>,
}

impl Shared {
    pub(super) fn new(client: Client, node: Node, options: Options) -> (Arc<Self>, Queues) {
        let (data_volumes, of_data_volumes) = Work::new(objects::data_volumes());
        let (claims, of_claims) = Work::new(());
        let (machines, of_machines) = Work::new(objects::virtual_machines());
        let (instances, of_instances) = Work::new(objects::instances());
        let shared = Self {
            client,
            node,
            options,
            volumes: Volumes::default(),
            faults: Faults::default(),
            runs: Runs::default(),
            sessions: Sessions::default(),
            imports: Imports::default(),
            data_volumes,
            claims,
            machines,
            instances,
            shutdown: CancellationToken::new(),
            tasks: TaskTracker::new(),
        };
        let queues = Queues {
            data_volumes: of_data_volumes,
            claims: of_claims,
            machines: of_machines,
            instances: of_instances,
        };
        (Arc::new(shared), queues)
    }

    /// Runs a task until it ends or the double is stopped.
    pub(super) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let shutdown = self.shutdown.clone();
        self.tasks.spawn(async move {
            tokio::select! {
                () = shutdown.cancelled() => {}
                () = task => {}
            }
        });
    }

    /// Makes all tasks end.
    pub(super) fn cancel(&self) {
        self.shutdown.cancel();
    }

    /// Waits until all tasks have ended.
    pub(super) async fn stop(&self) {
        self.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Reconciles everything again.
    pub(super) fn retry_all(&self) {
        self.data_volumes.retry_all();
        self.machines.retry_all();
        self.instances.retry_all();
    }

    /// Returns access to the custom resources of this kind in a namespace.
    pub(super) fn api(&self, kind: &ApiResource, namespace: &str) -> Api<DynamicObject> {
        Api::namespaced_with(self.client.clone(), namespace, kind)
    }

    pub(super) fn claims_in(&self, namespace: &str) -> Api<PersistentVolumeClaim> {
        Api::namespaced(self.client.clone(), namespace)
    }
}

/// Converts an error of the API server. Only that of a concurrent change is a `Conflict`.
pub(super) fn failed(what: &'static str) -> impl Fn(kube::Error) -> Error {
    move |error| {
        let kind = if code(&error) == Some(409) { ErrorKind::Conflict } else { ErrorKind::Protocol };
        Error::new(kind, format!("cannot {what}")).with_source(error)
    }
}

/// Returns the status code of an error that the API server answered.
pub(super) fn code(error: &kube::Error) -> Option<u16> {
    match error {
        kube::Error::Api(status) => Some(status.code),
        _ => None,
    }
}
