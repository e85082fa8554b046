//! What is known of a machine from power-on until it has ended, decided from what the cluster says about its
//! VirtualMachineInstance. No I/O.

use crate::objects::{VirtualMachineInstance, condition};
use rudder_core::backend::{Death, Exit};

/// How far a machine is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Phase {
    /// It was never started.
    New,
    /// It was started, and does not run yet. The text says what it waits for, in the cluster's words.
    Starting(Option<String>),
    /// It runs.
    Running,
    /// It has ended.
    Ended(Exit),
}

/// Why the machine is being stopped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Stopping {
    /// With its power button, and killed after a limit: the reason if that happens.
    Graceful(String),
    /// At once, for this reason.
    Kill(String),
}

/// The life of a machine, as far as it was observed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Life {
    phase: Phase,
    /// The instance of this power-on, once it was seen, by UID.
    instance: Option<String>,
    /// Instances of earlier power-ons.
    earlier: Vec<String>,
    stopping: Option<Stopping>,
    /// The kernel of the guest panicked.
    panicked: Option<String>,
}

impl Life {
    pub(crate) fn new() -> Self {
        Self { phase: Phase::New, instance: None, earlier: Vec::new(), stopping: None, panicked: None }
    }

    /// The life of a machine that an earlier process started, or never did.
    pub(crate) fn attached(instance: Option<&VirtualMachineInstance>, started: bool) -> Self {
        let mut life = Self::new();
        match instance {
            Some(instance) => {
                life.phase = Phase::Starting(None);
                life.observe(instance);
            }
            None if started => life.phase = Phase::Ended(Exit::Unobserved),
            None => {}
        }
        life
    }

    pub(crate) fn phase(&self) -> &Phase {
        &self.phase
    }

    pub(crate) fn is_up(&self) -> bool {
        matches!(self.phase, Phase::Starting(_) | Phase::Running)
    }

    /// Begins a new power-on.
    pub(crate) fn start(&mut self) {
        self.earlier.extend(self.instance.take());
        (self.phase, self.stopping, self.panicked) = (Phase::Starting(None), None, None);
    }

    /// Records that the machine is being stopped. A kill counts more than the power button.
    pub(crate) fn stop(&mut self, how: Stopping) {
        match (&self.stopping, &how) {
            (Some(Stopping::Kill(_)), _) => {}
            (Some(Stopping::Graceful(_)), Stopping::Graceful(_)) => {}
            _ => self.stopping = Some(how),
        }
    }

    /// Records a panic of the guest that an event reports.
    pub(crate) fn panicked(&mut self, message: &str) {
        if self.is_up() {
            self.panicked = Some(message.to_owned());
        }
    }

    /// Takes in what the cluster says about the instance now.
    pub(crate) fn observe(&mut self, instance: &VirtualMachineInstance) {
        let Some(uid) = instance.metadata.uid.as_deref() else { return };
        if self.earlier.iter().any(|earlier| earlier == uid) || !self.is_up() {
            return;
        }
        self.instance = Some(uid.to_owned());
        let status = instance.status.clone().unwrap_or_default();
        let paused = condition(&status.conditions, "Paused").filter(|paused| paused.status == "True");
        self.phase = match status.phase.as_str() {
            "Succeeded" => Phase::Ended(Exit::PoweredOff),
            "Failed" => Phase::Ended(self.failed(&status.reason)),
            "Running" => match paused {
                Some(paused) if paused.reason == "PausedIOError" => Phase::Ended(Exit::Died {
                    cause: if paused.message.to_lowercase().contains("space") {
                        Death::HostDiskFull
                    } else {
                        Death::IoError
                    },
                    detail: paused.message.clone(),
                }),
                _ => Phase::Running,
            },
            // The node that ran it does not answer; it may come back.
            "Unknown" => self.phase.clone(),
            _ if self.phase == Phase::Running => Phase::Running,
            _ => {
                let waiting = ["PodScheduled", "Synchronized", "Ready"].into_iter();
                let waiting = waiting.filter_map(|kind| condition(&status.conditions, kind));
                let waiting =
                    waiting.filter(|condition| condition.status == "False" && !condition.message.is_empty());
                Phase::Starting(waiting.map(|condition| condition.message.clone()).next())
            }
        };
    }

    /// Takes in that the instance does not exist.
    pub(crate) fn gone(&mut self) {
        // An instance that was not seen yet has not been created.
        if self.is_up() && (self.instance.is_some() || self.stopping.is_some()) {
            self.phase = Phase::Ended(match self.stopping.take() {
                Some(Stopping::Kill(why) | Stopping::Graceful(why)) => Exit::Killed { why },
                None => died(Death::Hypervisor, "its VirtualMachineInstance was deleted"),
            });
        }
    }

    fn failed(&mut self, reason: &str) -> Exit {
        if let Some(message) = &self.panicked {
            return died(Death::GuestPanic, message);
        }
        match self.stopping.take() {
            Some(Stopping::Kill(why) | Stopping::Graceful(why)) => Exit::Killed { why },
            None if reason.is_empty() => died(Death::Hypervisor, "its VirtualMachineInstance failed"),
            None => died(Death::Hypervisor, reason),
        }
    }
}

fn died(cause: Death, detail: &str) -> Exit {
    Exit::Died { cause, detail: detail.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objects::{Condition, InstanceStatus};
    use kube::api::ObjectMeta;
    use serde_json::Value;

    fn instance(uid: &str, phase: &str) -> VirtualMachineInstance {
        let metadata = ObjectMeta { uid: Some(uid.to_owned()), ..ObjectMeta::default() };
        let mut instance = VirtualMachineInstance::new(metadata, Value::Null);
        instance.status = Some(InstanceStatus { phase: phase.to_owned(), ..InstanceStatus::default() });
        instance
    }

    fn running() -> Life {
        let mut life = Life::new();
        life.start();
        life.observe(&instance("1", "Running"));
        assert_eq!(life.phase(), &Phase::Running);
        life
    }

    #[test]
    fn an_end_is_told_apart_by_who_wanted_it() {
        let mut life = running();
        life.observe(&instance("1", "Succeeded"));
        assert_eq!(life.phase(), &Phase::Ended(Exit::PoweredOff));

        let mut life = running();
        life.stop(Stopping::Kill("now".to_owned()));
        life.observe(&instance("1", "Failed"));
        assert_eq!(life.phase(), &Phase::Ended(Exit::Killed { why: "now".to_owned() }));

        let mut life = running();
        life.stop(Stopping::Graceful("too slow".to_owned()));
        life.gone();
        assert_eq!(life.phase(), &Phase::Ended(Exit::Killed { why: "too slow".to_owned() }));

        let mut life = running();
        life.panicked("panic");
        life.observe(&instance("1", "Failed"));
        assert_eq!(life.phase(), &Phase::Ended(died(Death::GuestPanic, "panic")));

        let mut life = running();
        life.gone();
        assert!(matches!(life.phase(), Phase::Ended(Exit::Died { cause: Death::Hypervisor, .. })));
    }

    #[test]
    fn a_failed_disk_ends_the_machine() {
        let mut life = running();
        let mut paused = instance("1", "Running");
        let condition = Condition {
            kind: "Paused".to_owned(),
            status: "True".to_owned(),
            reason: "PausedIOError".to_owned(),
            message: "no space left".to_owned(),
        };
        if let Some(status) = &mut paused.status {
            status.conditions.push(condition);
        }
        life.observe(&paused);
        assert_eq!(life.phase(), &Phase::Ended(died(Death::HostDiskFull, "no space left")));
    }

    #[test]
    fn an_earlier_power_on_does_not_end_the_next_one() {
        let mut life = running();
        life.observe(&instance("1", "Succeeded"));
        life.start();
        life.gone();
        life.observe(&instance("1", "Succeeded"));
        assert_eq!(life.phase(), &Phase::Starting(None));
        life.observe(&instance("2", "Running"));
        assert_eq!(life.phase(), &Phase::Running);
    }

    #[test]
    fn what_a_machine_waits_for_is_told() {
        let mut life = Life::new();
        life.start();
        let mut pending = instance("1", "Scheduling");
        if let Some(status) = &mut pending.status {
            status.conditions.push(Condition {
                kind: "PodScheduled".to_owned(),
                status: "False".to_owned(),
                reason: "Unschedulable".to_owned(),
                message: "0/3 nodes are available".to_owned(),
            });
        }
        life.observe(&pending);
        assert_eq!(life.phase(), &Phase::Starting(Some("0/3 nodes are available".to_owned())));
    }
}
