//! The machines that run on the node for instances.

use super::{objects::Key, shared::Shared, volumes::StoredVolume};
use rudder_core::backend::{Exit, Machine, Stop};
use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokio_util::sync::CancellationToken;

/// The runs of all instances, and the machines that can be started again.
#[derive(Debug, Default)]
pub(super) struct Runs {
    by_uid: Mutex<HashMap<String, Arc<Run>>>,
    definitions: Mutex<HashMap<String, Definition>>,
    /// Instances that wait for the content of a claim.
    waiting: Mutex<HashSet<Key>>,
}

/// A machine that was defined on the node, and for what.
#[derive(Debug, Clone)]
pub(super) struct Definition {
    pub(super) machine: Arc<dyn Machine>,
    /// What it was made from.
    pub(super) fingerprint: String,
}

impl Runs {
    fn by_uid(&self) -> MutexGuard<'_, HashMap<String, Arc<Run>>> {
        self.by_uid.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn definitions(&self) -> MutexGuard<'_, HashMap<String, Definition>> {
        self.definitions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the run of the instance with this UID, also after it has ended.
    pub(super) fn get(&self, uid: &str) -> Option<Arc<Run>> {
        self.by_uid().get(uid).cloned()
    }

    pub(super) fn all(&self) -> Vec<Arc<Run>> {
        self.by_uid().values().cloned().collect()
    }

    pub(super) fn insert(&self, run: Arc<Run>) {
        self.by_uid().insert(run.uid.clone(), run);
    }

    /// Forgets the run of an instance that does not exist any more.
    pub(super) fn forget(&self, uid: &str) {
        self.by_uid().remove(uid);
    }

    /// Returns the machine that was defined for an owner: a VirtualMachine, or an instance without one.
    pub(super) fn definition(&self, owner: &str) -> Option<Definition> {
        self.definitions().get(owner).cloned()
    }

    pub(super) fn define(&self, owner: &str, definition: Definition) {
        self.definitions().insert(owner.to_owned(), definition);
    }

    /// Returns whether an instance begins to wait for the content of a claim.
    pub(super) fn waits(&self, instance: &Key) -> bool {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).insert(instance.clone())
    }

    /// Records that an instance waits no more.
    pub(super) fn waited(&self, instance: &Key) {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).remove(instance);
    }

    /// Forgets the machine of an owner that does not exist any more. The node keeps it until its lab is destroyed.
    pub(super) fn undefine(&self, owner: &str) {
        self.definitions().remove(owner);
    }
}

/// One run of an instance: from the start of its machine to the end.
#[derive(Debug)]
pub(super) struct Run {
    pub(super) key: Key,
    /// The UID of the instance.
    pub(super) uid: String,
    /// The name of the pod.
    pub(super) pod: String,
    pub(super) machine: Arc<dyn Machine>,
    /// The volumes that the pod uses.
    pub(super) volumes: Vec<Arc<StoredVolume>>,
    /// The address of the first interface.
    pub(super) address: String,
    /// How the machine ended.
    pub(super) exit: OnceLock<Exit>,
    /// Cancelled when the machine has ended.
    pub(super) ended: CancellationToken,
    /// Whether the end was written into the status.
    pub(super) reported: AtomicBool,
    lost: AtomicBool,
    /// The shortest time that the guest was given to power off.
    stopping: Mutex<Option<u64>>,
}

impl Run {
    pub(super) fn new(
        (key, uid, pod): (Key, &str, &str),
        machine: Arc<dyn Machine>,
        volumes: Vec<Arc<StoredVolume>>,
        address: String,
    ) -> Self {
        Self {
            key,
            uid: uid.to_owned(),
            pod: pod.to_owned(),
            machine,
            volumes,
            address,
            exit: OnceLock::new(),
            ended: CancellationToken::new(),
            reported: AtomicBool::new(false),
            lost: AtomicBool::new(false),
            stopping: Mutex::new(None),
        }
    }

    /// Waits for the end of the machine, releases its volumes, and has the instance reconciled.
    pub(super) async fn watch(self: Arc<Self>, shared: Arc<Shared>) {
        let exit = self.machine.wait().await.unwrap_or(Exit::Unobserved);
        let _ = self.exit.set(exit);
        self.ended.cancel();
        for volume in &self.volumes {
            volume.released_by(&self.pod);
        }
        shared.instances.retry(self.key.clone());
    }

    /// Has the machine stopped within a number of seconds. A shorter time than before counts, a longer one does not.
    pub(super) fn stop(self: &Arc<Self>, shared: &Shared, seconds: u64) {
        let mut stopping = self.stopping.lock().unwrap_or_else(PoisonError::into_inner);
        if stopping.is_some_and(|before| before <= seconds) {
            return;
        }
        *stopping = Some(seconds);
        let how = match seconds {
            0 => Stop::Kill,
            seconds => Stop::Graceful { limit: Duration::from_secs(seconds) },
        };
        let run = self.clone();
        shared.spawn(async move {
            if let Err(error) = run.machine.stop(how).await {
                tracing::debug!(%error, instance = %run.key, "a machine could not be stopped");
            }
        });
    }

    /// Returns whether the machine ended because its node was lost.
    pub(super) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Relaxed)
    }

    /// Loses the node under the machine.
    pub(super) async fn lose(self: Arc<Self>, shared: &Arc<Shared>) {
        if self.exit.get().is_none() {
            self.lost.store(true, Ordering::Relaxed);
            self.stop(shared, 0);
        }
    }
}
