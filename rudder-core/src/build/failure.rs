//! What the error of a failed build carries.

use super::BuildMachine;
use crate::{Error, backend::KeptLab, error::Detail, event::FailureReport, visible::visible_line};
use std::fmt::Write as _;

/// Why a build produced no module: what its [`Error`] carries, returned by [`Error::build_failure`].
#[derive(Debug)]
#[non_exhaustive]
pub struct BuildFailure {
    /// What a person needs at once to understand the failure; empty when the build was cancelled.
    pub report: FailureReport,
    /// The lab that was kept for inspection.
    pub kept: Option<KeptLab>,
    /// The machines of the kept lab, for this process.
    pub machines: Vec<BuildMachine>,
}

impl Error {
    /// Returns the details of a failed build, if this is the error of one or was caused by one.
    ///
    /// ```
    /// # use rudder_core::Error;
    /// fn explain(error: &Error) {
    ///     if let Some(failure) = error.build_failure() {
    ///         println!("the last lines of the step: {:?}", failure.report.output_tail);
    ///     }
    /// }
    /// ```
    #[must_use]
    pub fn build_failure(&self) -> Option<&BuildFailure> {
        self.detail()
    }
}

impl Detail for BuildFailure {
    fn report(&self) -> Option<String> {
        let Self { report, kept, .. } = self;
        // A build that was cancelled, or lost its runtime, has no report other than its error.
        if report.message.is_empty() {
            return None;
        }
        let mut text = report.to_string();
        if let Some(KeptLab { id, access, .. }) = kept {
            let _ = write!(text, "\n  kept for inspection as lab {id}:");
            for line in access {
                let _ = write!(text, "\n    {}", visible_line(line));
            }
        }
        Some(text)
    }
}
