//! What is known about how a machine ends, and what follows from it.

use super::{Outcome, ProcessEnd, Reporter, Shutdown};
use rudder_core::backend::{Death, Exit};

/// What is known about how a machine ends.
#[derive(Debug, Default)]
pub(super) struct Facts {
    pub(super) shutdown: Option<Shutdown>,
    /// The first panic or disk error.
    pub(super) failure: Option<(Death, String)>,
    /// Why it was ended on request.
    pub(super) killed: Option<String>,
    /// Why it was ended without a request.
    pub(super) lost: Option<Lost>,
    pub(super) process: Option<ProcessEnd>,
    /// What a daemon reported about a machine that is off: whether the guest powered off, and details.
    pub(super) off: Option<(bool, String)>,
    /// Why nothing else will be known about it.
    pub(super) abandoned: Option<String>,
}

/// How a machine ended without a request, before its process did.
#[derive(Debug)]
pub(super) enum Lost {
    Tpm(String),
    Connection,
}

impl Facts {
    /// Returns how the machine ended.
    pub(super) fn exit(&self, reporter: Reporter) -> Exit {
        let died = |cause, detail: String| Exit::Died { cause, detail };
        if let Some((cause, detail)) = &self.failure {
            return died(*cause, detail.clone());
        }
        if let Some(why) = &self.abandoned {
            return died(Death::Hypervisor, why.clone());
        }
        if let (Some(Lost::Tpm(how)), None, None) = (&self.lost, &self.shutdown, &self.killed) {
            return died(Death::Hypervisor, format!("the TPM of the machine has ended: swtpm {how}"));
        }
        if self.has_powered_off(reporter) {
            return Exit::PoweredOff;
        }
        if let Some(why) = &self.killed {
            return Exit::Killed { why: why.clone() };
        }
        died(Death::Hypervisor, self.detail())
    }

    fn has_powered_off(&self, reporter: Reporter) -> bool {
        if let Some((powered_off, _)) = self.off {
            return powered_off;
        }
        let failed = self.process.as_ref().is_some_and(|process| process.outcome == Outcome::Failure);
        self.shutdown == Some(Shutdown::ByGuest) && (reporter == Reporter::Daemon || !failed)
    }

    /// Describes an end that nothing else explains.
    fn detail(&self) -> String {
        if let Some((_, detail)) = &self.off {
            return detail.clone();
        }
        let (end, last_lines) =
            self.process.as_ref().map_or(("the machine's process has ended", ""), |end| {
                (end.detail.as_str(), end.last_lines.as_str())
            });
        let mut detail = match (&self.lost, &self.shutdown) {
            (Some(Lost::Connection), _) => format!("{end} after it had closed its control connection"),
            (_, Some(Shutdown::ByGuest)) => format!("{end} while its guest was powering off"),
            (_, Some(Shutdown::Other(reason))) => format!("{end} (reported reason: {reason})"),
            (_, None) => end.to_owned(),
        };
        if !last_lines.is_empty() {
            detail = format!("{detail}; its last output: {last_lines}");
        }
        detail
    }
}
