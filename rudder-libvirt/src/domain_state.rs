//! Translates the state of a domain into an observation of the machine. Performs no I/O.

use rudder_core::backend::{Death, Exit};
use rudder_local::lifecycle::{Observation, Shutdown};
use virt::sys;

/// The observed state of a domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum DomainState {
    /// Known completely.
    Observed(Observation),
    /// A disk could not be read or written. Libvirt does not report whether the host's disk is full.
    DiskFailed,
}

impl DomainState {
    /// Converts a state and its reason (virDomainState, virDomainPausedReason, virDomainShutoffReason).
    pub(crate) fn of(state: sys::virDomainState, reason: i32) -> Self {
        Self::Observed(match state {
            sys::VIR_DOMAIN_CRASHED => Observation::Panicked,
            sys::VIR_DOMAIN_PAUSED if is(reason, sys::VIR_DOMAIN_PAUSED_IOERROR) => return Self::DiskFailed,
            sys::VIR_DOMAIN_PAUSED if is(reason, sys::VIR_DOMAIN_PAUSED_CRASHED) => Observation::Panicked,
            // QEMU is about to end.
            sys::VIR_DOMAIN_SHUTDOWN => Observation::Shutdown(Shutdown::ByGuest),
            sys::VIR_DOMAIN_SHUTOFF => off(reason),
            _ => Observation::Running,
        })
    }
}

/// A machine that does not run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Inactive {
    /// It has never been started.
    NeverStarted,
    /// It has ended in this way.
    Ended(Exit),
}

/// Returns whether a machine whose domain is shut off was ever started, and how it ended; `None` if the domain is not
/// shut off. Libvirt remembers the reason until it is restarted.
pub(crate) fn inactive(state: sys::virDomainState, reason: i32) -> Option<Inactive> {
    if state != sys::VIR_DOMAIN_SHUTOFF {
        return None;
    }
    Some(match u32::try_from(reason) {
        Ok(sys::VIR_DOMAIN_SHUTOFF_UNKNOWN) => Inactive::NeverStarted,
        Ok(sys::VIR_DOMAIN_SHUTOFF_SHUTDOWN) => Inactive::Ended(Exit::PoweredOff),
        Ok(sys::VIR_DOMAIN_SHUTOFF_DESTROYED) => {
            Inactive::Ended(Exit::Killed { why: "its domain was destroyed".to_owned() })
        }
        Ok(sys::VIR_DOMAIN_SHUTOFF_CRASHED | sys::VIR_DOMAIN_SHUTOFF_FAILED) => {
            let detail = "QEMU ended or was killed while no process watched it".to_owned();
            Inactive::Ended(Exit::Died { cause: Death::Hypervisor, detail })
        }
        _ => Inactive::Ended(Exit::Unobserved),
    })
}

fn is(reason: i32, constant: u32) -> bool {
    u32::try_from(reason) == Ok(constant)
}

/// Returns what libvirt reports about a domain that is shut off.
fn off(reason: i32) -> Observation {
    let detail = match u32::try_from(reason) {
        Ok(sys::VIR_DOMAIN_SHUTOFF_DESTROYED) => "the machine's domain was destroyed from outside",
        Ok(sys::VIR_DOMAIN_SHUTOFF_CRASHED) => "QEMU ended or was killed; see libvirt's log of the domain",
        Ok(sys::VIR_DOMAIN_SHUTOFF_DAEMON) => "QEMU ended while libvirt was not watching it",
        Ok(sys::VIR_DOMAIN_SHUTOFF_SAVED) => "the machine's domain was saved from outside",
        Ok(sys::VIR_DOMAIN_SHUTOFF_MIGRATED) => "the machine's domain was moved to another host",
        _ => "QEMU ended; libvirt does not report why",
    };
    Observation::Off { powered_off: is(reason, sys::VIR_DOMAIN_SHUTOFF_SHUTDOWN), detail: detail.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn observed(state: sys::virDomainState, reason: u32) -> DomainState {
        DomainState::of(state, i32::try_from(reason).unwrap_or(-1))
    }

    #[test]
    fn a_domain_that_is_off_reports_why() {
        let off = |reason: u32| match observed(sys::VIR_DOMAIN_SHUTOFF, reason) {
            DomainState::Observed(Observation::Off { powered_off, detail }) => (powered_off, detail),
            other => panic!("{other:?}"),
        };
        assert!(off(sys::VIR_DOMAIN_SHUTOFF_SHUTDOWN).0);
        let (powered_off, detail) = off(sys::VIR_DOMAIN_SHUTOFF_DESTROYED);
        assert!(!powered_off && detail.contains("was destroyed from outside"), "{detail}");
        let (powered_off, detail) = off(sys::VIR_DOMAIN_SHUTOFF_CRASHED);
        assert!(!powered_off && detail.contains("was killed"), "{detail}");
    }

    #[test]
    fn libvirt_remembers_how_a_machine_ended() {
        let inactive = |reason: u32| inactive(sys::VIR_DOMAIN_SHUTOFF, i32::try_from(reason).unwrap_or(-1));
        assert_eq!(inactive(sys::VIR_DOMAIN_SHUTOFF_UNKNOWN), Some(Inactive::NeverStarted));
        assert_eq!(inactive(sys::VIR_DOMAIN_SHUTOFF_SHUTDOWN), Some(Inactive::Ended(Exit::PoweredOff)));
        assert!(matches!(
            inactive(sys::VIR_DOMAIN_SHUTOFF_DESTROYED),
            Some(Inactive::Ended(Exit::Killed { .. }))
        ));
        assert_eq!(inactive(sys::VIR_DOMAIN_SHUTOFF_DAEMON), Some(Inactive::Ended(Exit::Unobserved)));
        assert_eq!(super::inactive(sys::VIR_DOMAIN_RUNNING, 1), None);
    }

    #[test]
    fn a_paused_machine_has_failed_only_for_some_reasons() {
        let paused = |reason: u32| observed(sys::VIR_DOMAIN_PAUSED, reason);
        assert_eq!(paused(sys::VIR_DOMAIN_PAUSED_IOERROR), DomainState::DiskFailed);
        assert_eq!(paused(sys::VIR_DOMAIN_PAUSED_CRASHED), DomainState::Observed(Observation::Panicked));
        assert_eq!(paused(sys::VIR_DOMAIN_PAUSED_USER), DomainState::Observed(Observation::Running));
        assert_eq!(observed(sys::VIR_DOMAIN_CRASHED, 0), DomainState::Observed(Observation::Panicked));
        assert_eq!(observed(sys::VIR_DOMAIN_RUNNING, 1), DomainState::Observed(Observation::Running));
        let shutting_down = DomainState::Observed(Observation::Shutdown(Shutdown::ByGuest));
        assert_eq!(observed(sys::VIR_DOMAIN_SHUTDOWN, 1), shutting_down);
    }
}
