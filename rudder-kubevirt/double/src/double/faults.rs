//! Faults that a test orders.

use super::shared::Shared;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::watch;

/// A fault of the cluster, as a test [orders](super::Double::order) it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fault {
    /// The pods of instances cannot be scheduled, until [relieved](super::Double::relieve).
    Unschedulable {
        /// The scheduler's message: `0/3 nodes are available: 3 Insufficient memory.`
        message: String,
    },
    /// The image of pods cannot be pulled, until relieved.
    ImagePull {
        /// The container runtime's message.
        message: String,
    },
    /// The node is lost: all instances that run now fail with the reason `NodeUnresponsive`.
    NodeLost,
    /// Every attempt to import the next DataVolume with an HTTP source fails, because the server answers with this status code.
    ImportFails {
        /// The status code: 404, 503…
        status: u16,
    },
    /// Imports and copies begin, but do not end until relieved.
    SlowStorage,
    /// All web sockets that are open now are cut.
    StreamsCut,
    /// The next request to start a VirtualMachine is accepted and has no effect.
    StartIgnored,
    /// The next attempt to start a machine on the node fails; the attempt after it does not.
    LaunchFails {
        /// The hypervisor's message.
        message: String,
    },
}

/// A fault, and the namespace that it is limited to.
type Order = (Option<String>, Fault);

/// The faults that were ordered.
#[derive(Debug, Default)]
pub(super) struct Faults {
    orders: Mutex<Vec<Order>>,
    relieved: watch::Sender<()>,
}

impl Faults {
    fn orders(&self) -> MutexGuard<'_, Vec<Order>> {
        self.orders.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns what `which` selects among the faults of a namespace. The fault stays.
    pub(super) fn standing<T>(&self, namespace: &str, which: impl Fn(&Fault) -> Option<T>) -> Option<T> {
        let orders = self.orders();
        let mut of_namespace = orders.iter().filter(|(scope, _)| applies(scope.as_deref(), namespace));
        of_namespace.find_map(|(_, fault)| which(fault))
    }

    /// Returns what `which` selects among the faults of a namespace. The fault has happened then.
    pub(super) fn take<T>(&self, namespace: &str, which: impl Fn(&Fault) -> Option<T>) -> Option<T> {
        let mut orders = self.orders();
        let selected = |(scope, fault): &Order| {
            if applies(scope.as_deref(), namespace) { which(fault) } else { None }
        };
        let (index, value) =
            orders.iter().enumerate().find_map(|(index, order)| Some((index, selected(order)?)))?;
        orders.remove(index);
        Some(value)
    }

    /// Waits until the storage of a namespace is not slow.
    pub(super) async fn storage(&self, namespace: &str) {
        let mut relieved = self.relieved.subscribe();
        while self.standing(namespace, |fault| (*fault == Fault::SlowStorage).then_some(())).is_some() {
            if relieved.changed().await.is_err() {
                return;
            }
        }
    }

    /// Removes the faults whose namespaces `which` selects.
    pub(super) fn relieve(&self, which: impl Fn(Option<&str>) -> bool) {
        self.orders().retain(|(scope, _)| !which(scope.as_deref()));
        self.relieved.send_replace(());
    }
}

fn applies(scope: Option<&str>, namespace: &str) -> bool {
    scope.is_none_or(|scope| scope == namespace)
}

/// Orders a fault. One that happens now does not wait for anything.
pub(super) fn order(shared: &Arc<Shared>, namespace: Option<String>, fault: Fault) {
    match fault {
        Fault::StreamsCut => shared.sessions.cut(|of| applies(namespace.as_deref(), of)),
        Fault::NodeLost => {
            for run in shared.runs.all() {
                if applies(namespace.as_deref(), &run.key.namespace) {
                    let lost = shared.clone();
                    shared.spawn(async move { run.lose(&lost).await });
                }
            }
        }
        fault => shared.faults.orders().push((namespace, fault)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(fault: &Fault) -> Option<u16> {
        match fault {
            Fault::ImportFails { status } => Some(*status),
            _ => None,
        }
    }

    #[test]
    fn a_fault_happens_once_and_in_its_namespace() {
        let faults = Faults::default();
        faults.orders().push((Some("a".to_owned()), Fault::ImportFails { status: 404 }));
        faults.orders().push((None, Fault::ImportFails { status: 503 }));
        assert_eq!(faults.take("b", status), Some(503));
        assert_eq!(faults.take("b", status), None);
        assert_eq!(faults.standing("a", status), Some(404));
        assert_eq!(faults.take("a", status), Some(404));
        assert_eq!(faults.take("a", status), None);
    }
}
