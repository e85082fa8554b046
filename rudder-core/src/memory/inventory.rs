//! What a test can inspect of a backend: what exists in it, and what its machines were asked to do.

use super::{Execution, LabRecord, MemoryBackend, Typed};
use crate::backend::{Death, LabId};
use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

/// Counts something for as long as the value exists.
#[derive(Debug)]
pub(super) struct Counted(Arc<AtomicUsize>);

impl Counted {
    pub(super) fn new(counter: &Arc<AtomicUsize>) -> Self {
        counter.fetch_add(1, Ordering::SeqCst);
        Self(counter.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// What exists in a [`MemoryBackend`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Inventory {
    /// Labs that were not destroyed; the entry of a lab whose owner is gone says so.
    pub labs: Vec<String>,
    /// Running machines, as `LAB/VM`.
    pub running: Vec<String>,
    /// Number of open connections to guests.
    pub connections: usize,
    /// Number of running commands and of pending actions of guests.
    pub tasks: usize,
    /// Modules.
    pub modules: Vec<String>,
}

impl Inventory {
    /// Returns everything but modules, one per line; empty if nothing was left behind.
    #[must_use]
    pub fn leftovers(&self) -> Vec<String> {
        let mut all: Vec<String> = self.labs.iter().map(|lab| format!("lab {lab}")).collect();
        all.extend(self.running.iter().map(|machine| format!("machine {machine}")));
        for (count, what) in [(self.connections, "connections"), (self.tasks, "tasks")] {
            if count > 0 {
                all.push(format!("{count} {what}"));
            }
        }
        all
    }
}

impl MemoryBackend {
    /// Returns what exists now.
    #[must_use]
    pub fn inventory(&self) -> Inventory {
        let registry = self.shared.registry();
        let mut inventory = Inventory {
            connections: self.shared.connections.load(Ordering::SeqCst),
            tasks: self.shared.tasks.load(Ordering::SeqCst),
            modules: registry.modules.keys().cloned().collect(),
            ..Inventory::default()
        };
        for (id, record) in &registry.labs {
            inventory.labs.push(match record {
                LabRecord::Owned(_) => id.to_string(),
                LabRecord::Kept(_) => format!("{id} (kept)"),
                LabRecord::Orphaned(_) => format!("{id} (its owner has ended)"),
            });
            for machine in record.core().iter().flat_map(|core| core.machines()) {
                if machine.is_running() {
                    inventory.running.push(format!("{}/{}", machine.lab, machine.spec.name));
                }
            }
        }
        inventory
    }

    /// Returns everything that still exists and is not a module, one per line. Connections end a moment after their
    /// machine: this lets their tasks run, and returns at once when nothing is left.
    pub async fn leftovers(&self) -> Vec<String> {
        for _ in 0..1000 {
            if self.inventory().leftovers().is_empty() {
                break;
            }
            tokio::task::yield_now().await;
        }
        self.inventory().leftovers()
    }

    /// Kills a running machine of a lab from outside, like killing the hypervisor's process. Returns whether there was
    /// one.
    pub fn kill_machine(&self, lab: &LabId, name: &str, cause: Death) -> bool {
        let core = self.shared.registry().labs.get(lab).and_then(LabRecord::core);
        let machines = core.map(|core| core.machines()).unwrap_or_default();
        let running = machines.iter().find(|machine| machine.spec.name == name && machine.is_running());
        running.inspect(|machine| machine.die(cause)).is_some()
    }

    /// Takes a lab away from its living owner, as a backend does whose owner has not renewed its lease in time. Returns
    /// whether there was such a lab.
    pub fn take_lab(&self, lab: &LabId) -> bool {
        let core = self.shared.registry().labs.remove(lab).and_then(|record| record.core());
        core.inspect(|core| core.take_away()).is_some()
    }

    /// Returns what was typed on the keyboard of the machine with this name that was powered on last; `None` when there
    /// was none.
    #[must_use]
    pub fn typed(&self, machine: &str) -> Option<Typed> {
        self.shared.script().terminals.get(machine).map(|terminal| terminal.typed())
    }

    /// Returns what the machines with this name were asked to run, in order, with the environment of each script.
    /// Scripts that Rudder runs for itself are not included.
    #[must_use]
    pub fn executions(&self, machine: &str) -> Vec<Execution> {
        self.shared.script().executions.get(machine).cloned().unwrap_or_default()
    }

    /// Returns the content of a file of a module's VM; `None` when there is no such module, VM or file.
    #[must_use]
    pub fn read_file(&self, module: &str, vm: &str, path: &str) -> Option<Vec<u8>> {
        let kept = self.shared.module(module)?;
        let machine = kept.module.machines.iter().find(|machine| machine.name == vm)?;
        let files = kept.disks.get(&machine.disks.first()?.file)?;
        files.read(path).map(<[u8]>::to_vec)
    }
}
