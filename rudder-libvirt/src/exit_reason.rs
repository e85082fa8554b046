//! Derives the state of a machine, and how it ended, from what was observed. Performs no I/O.
//!
//! Libvirt is the best source of how a machine ended, but it can be slow: it waits until the host's init has reaped the
//! process, which may take a while, and does not answer anything about the domain in the meantime. The kernel reports
//! at once that the process has ended. Whatever libvirt has not reported after [`GRACE`] is therefore concluded here. A
//! guest that powered off by itself is never reported as dead: libvirt then ends QEMU, which exits successfully.

use crate::process::Broke;
use rudder_core::backend::{Death, Exit};
use std::time::Duration;
use virt::sys;

/// How long libvirt may take to report how a machine ended, once its process is known to have ended.
pub(crate) const GRACE: Duration = Duration::from_millis(750);
/// The same, for a process that exited successfully or whose exit status is unknown: only libvirt knows whether its
/// guest powered off.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// The observed state of a domain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Seen {
    Running,
    /// The guest powered off, and QEMU is about to end.
    ShuttingDown,
    Panicked,
    IoError,
    Off {
        reason: i32,
    },
}

impl Seen {
    /// Converts a state and its reason (virDomainState, virDomainPausedReason, virDomainCrashedReason).
    pub(crate) fn of(state: sys::virDomainState, reason: i32) -> Self {
        match state {
            sys::VIR_DOMAIN_CRASHED => Self::Panicked,
            sys::VIR_DOMAIN_PAUSED if is(reason, sys::VIR_DOMAIN_PAUSED_IOERROR) => Self::IoError,
            sys::VIR_DOMAIN_PAUSED if is(reason, sys::VIR_DOMAIN_PAUSED_CRASHED) => Self::Panicked,
            sys::VIR_DOMAIN_SHUTDOWN => Self::ShuttingDown,
            sys::VIR_DOMAIN_SHUTOFF => Self::Off { reason },
            _ => Self::Running,
        }
    }
}

fn is(reason: i32, constant: u32) -> bool {
    u32::try_from(reason) == Ok(constant)
}

/// Returns the exit of a machine that died.
pub(crate) fn died(cause: Death, detail: &str) -> Exit {
    Exit::Died { cause, detail: detail.to_owned() }
}

/// Returns how a machine ended that libvirt reports as shut off, from the reason (virDomainShutoffReason).
pub(crate) fn told(reason: i32, killed: Option<&str>) -> Exit {
    if is(reason, sys::VIR_DOMAIN_SHUTOFF_SHUTDOWN) {
        return Exit::PoweredOff;
    }
    if let Some(why) = killed {
        return Exit::Killed { why: why.to_owned() };
    }
    died(
        Death::Hypervisor,
        match u32::try_from(reason) {
            Ok(sys::VIR_DOMAIN_SHUTOFF_DESTROYED) => "somebody destroyed the machine's domain",
            Ok(sys::VIR_DOMAIN_SHUTOFF_CRASHED) => {
                "QEMU ended, or was killed; libvirt's log of the domain says more"
            }
            Ok(sys::VIR_DOMAIN_SHUTOFF_DAEMON) => "QEMU ended while libvirt was not watching it",
            Ok(sys::VIR_DOMAIN_SHUTOFF_SAVED) => "somebody saved the machine's domain",
            Ok(sys::VIR_DOMAIN_SHUTOFF_MIGRATED) => "somebody moved the machine's domain to another host",
            _ => "QEMU ended; libvirt does not say why",
        },
    )
}

/// What is known of a machine whose process has ended before libvirt reported how.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Gone<'a> {
    /// The time since the process ended.
    pub(crate) since: Duration,
    /// How the process failed, if it did and that is known.
    pub(crate) broke: Option<Broke>,
    /// Whether the machine was observed shutting down.
    pub(crate) shutting_down: bool,
    /// Why Rudder ended the machine, if it did so before the process was gone.
    pub(crate) killed: Option<&'a str>,
}

impl Gone<'_> {
    /// How long to wait for libvirt.
    pub(crate) fn patience(&self) -> Duration {
        match (self.shutting_down, self.killed, self.broke) {
            (true, _, _) | (false, None, Some(_)) => GRACE,
            (false, Some(_), _) => Duration::ZERO,
            (false, None, None) => PATIENCE,
        }
    }

    /// Returns how the machine ended, as far as that is known without libvirt; `None` means to keep waiting for
    /// libvirt.
    pub(crate) fn conclude(&self) -> Option<Exit> {
        let over = self.since >= self.patience();
        over.then(|| match (self.shutting_down, self.killed, self.broke) {
            (true, _, _) => Exit::PoweredOff,
            (false, Some(why), _) => Exit::Killed { why: why.to_owned() },
            (false, None, Some(broke)) => died(Death::Hypervisor, &format!("QEMU {broke}")),
            (false, None, None) => died(Death::Hypervisor, "QEMU ended, and libvirt does not say why"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GONE: Gone<'static> =
        Gone { since: Duration::ZERO, broke: None, shutting_down: false, killed: None };
    const BROKE: Option<Broke> = Some(Broke::Signal(9));

    #[test]
    fn an_end_is_told_by_its_reason() {
        let reason = |constant: u32| i32::try_from(constant).unwrap_or(-1);
        let shutdown = reason(sys::VIR_DOMAIN_SHUTOFF_SHUTDOWN);
        let destroyed = reason(sys::VIR_DOMAIN_SHUTOFF_DESTROYED);
        assert_eq!(told(shutdown, Some("late")), Exit::PoweredOff);
        assert_eq!(told(destroyed, Some("ours")), Exit::Killed { why: "ours".to_owned() });
        assert!(
            matches!(told(destroyed, None), Exit::Died { cause: Death::Hypervisor, detail } if detail.contains("somebody"))
        );
        let crashed = told(reason(sys::VIR_DOMAIN_SHUTOFF_CRASHED), None);
        assert!(matches!(crashed, Exit::Died { cause: Death::Hypervisor, .. }));
    }

    #[test]
    fn a_paused_machine_is_in_trouble_only_for_some_reasons() {
        let paused = |reason: u32| Seen::of(sys::VIR_DOMAIN_PAUSED, i32::try_from(reason).unwrap_or(-1));
        assert_eq!(paused(sys::VIR_DOMAIN_PAUSED_IOERROR), Seen::IoError);
        assert_eq!(paused(sys::VIR_DOMAIN_PAUSED_USER), Seen::Running);
        assert_eq!(Seen::of(sys::VIR_DOMAIN_CRASHED, 0), Seen::Panicked);
        assert_eq!(Seen::of(sys::VIR_DOMAIN_RUNNING, 1), Seen::Running);
        assert_eq!(Seen::of(sys::VIR_DOMAIN_SHUTDOWN, 1), Seen::ShuttingDown);
    }

    #[test]
    fn a_process_that_broke_is_a_death_when_libvirt_stays_silent() {
        assert_eq!(Gone { broke: BROKE, ..GONE }.conclude(), None, "libvirt has its grace");
        let exit = Gone { broke: BROKE, since: GRACE, ..GONE }.conclude();
        assert_eq!(exit, Some(died(Death::Hypervisor, "QEMU was killed by signal 9")));
        let exit = Gone { broke: Some(Broke::Code(1)), since: GRACE, ..GONE }.conclude();
        assert_eq!(exit, Some(died(Death::Hypervisor, "QEMU ended with exit code 1")));
    }

    #[test]
    fn what_we_ended_is_told_at_once() {
        for broke in [None, BROKE] {
            let exit = Gone { broke, killed: Some("ours"), ..GONE }.conclude();
            assert_eq!(exit, Some(Exit::Killed { why: "ours".to_owned() }));
        }
    }

    #[test]
    fn a_guest_that_powers_off_is_never_called_dead() {
        for (broke, killed) in [(None, None), (BROKE, None), (None, Some("late")), (BROKE, Some("late"))] {
            let gone = Gone { broke, killed, shutting_down: true, ..GONE };
            assert_eq!(gone.conclude(), None, "libvirt has its grace");
            assert_eq!(Gone { since: GRACE, ..gone }.conclude(), Some(Exit::PoweredOff));
        }
        // It may have powered off between two checks: QEMU exited successfully, and libvirt has to report why.
        for since in [GRACE, PATIENCE - Duration::from_millis(1)] {
            assert_eq!(Gone { since, ..GONE }.conclude(), None);
        }
        let exit = Gone { since: PATIENCE, ..GONE }.conclude();
        assert!(matches!(exit, Some(Exit::Died { cause: Death::Hypervisor, .. })), "{exit:?}");
    }
}
