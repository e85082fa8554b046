//! The results of each test and of the run.

use crate::capability::Capability;
use std::{fmt, time::Duration};

/// How a test ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The backend keeps the contract.
    Passed,
    /// The backend does not; contains what was expected and what was found.
    Failed(String),
    /// The test was not run, for this reason.
    Skipped(String),
}

impl Outcome {
    /// Returns `passed`, `FAILED` or `skipped`.
    #[must_use]
    pub fn label(&self) -> &'static str {
        match self {
            Self::Passed => "passed",
            Self::Failed(_) => "FAILED",
            Self::Skipped(_) => "skipped",
        }
    }
}

/// The result of a test.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct TestReport {
    /// The group of the test: the part of the contract that it covers.
    pub group: &'static str,
    /// What the test proves, as a sentence.
    pub name: String,
    /// How the test ended.
    pub outcome: Outcome,
    /// How long the test took.
    pub took: Duration,
}

/// The result of a run of the suite on one backend.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Report {
    /// The name of the backend.
    pub backend: String,
    /// The tests, in the order of the suite.
    pub tests: Vec<TestReport>,
    /// Capabilities that the backend claims and that no test proved.
    pub unproven: Vec<Capability>,
    /// Why nothing was tested, if so.
    pub unavailable: Option<String>,
    /// Whether the backend had to be tested.
    pub required: bool,
    /// Whether only some tests were selected.
    pub partial: bool,
}

impl Report {
    /// Whether everything that the backend claims was tested and passed.
    #[must_use]
    pub fn is_passed(&self) -> bool {
        self.problems().is_empty()
    }

    /// Returns the problems, one per item.
    #[must_use]
    pub fn problems(&self) -> Vec<String> {
        let mut problems: Vec<String> = self
            .tests
            .iter()
            .filter_map(|test| match &test.outcome {
                Outcome::Failed(why) => Some(format!("{}: {}: {why}", test.group, test.name)),
                _ => None,
            })
            .collect();
        problems.extend(
            self.unproven.iter().map(|capability| format!("{capability} is claimed, and no test proved it")),
        );
        if let Some(why) = self.unavailable.as_ref().filter(|_| self.required) {
            problems
                .push(format!("expected {} to be ready on this host, but it is not: {why}", self.backend));
        }
        problems
    }

    /// Returns the names of the tests that failed.
    pub fn failed(&self) -> impl Iterator<Item = &str> {
        let failed = self.tests.iter().filter(|test| matches!(test.outcome, Outcome::Failed(_)));
        failed.map(|test| test.name.as_str())
    }

    /// Asserts, in a test, that there are no problems.
    ///
    /// # Panics
    /// With the table and the problems, if the run [did not pass](Self::is_passed).
    #[track_caller]
    pub fn assert_passed(&self) {
        assert!(self.is_passed(), "the backend {} breaks its contract:\n{self}", self.backend);
    }
}

/// Writes a table with a line for each test, by group, followed by the problems.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.tests.iter().map(|test| test.name.chars().count()).max().unwrap_or_default();
        let mut group = "";
        for test in &self.tests {
            if test.group != group {
                group = test.group;
                writeln!(f, "{group}")?;
            }
            let took = test.took.as_secs_f64();
            write!(f, "  {:<width$}  {:<7} {took:>7.2} s", test.name, test.outcome.label())?;
            match &test.outcome {
                Outcome::Skipped(why) => writeln!(f, "  {why}")?,
                _ => writeln!(f)?,
            }
        }
        let count = |label: &str| self.tests.iter().filter(|test| test.outcome.label() == label).count();
        let took: f64 = self.tests.iter().map(|test| test.took.as_secs_f64()).sum();
        let (passed, failed, skipped) = (count("passed"), count("FAILED"), count("skipped"));
        write!(f, "{}: {passed} passed, {failed} failed, {skipped} skipped in {took:.1} s", self.backend)?;
        for problem in self.problems() {
            write!(f, "\n- {}", problem.replace('\n', "\n  "))?;
        }
        Ok(())
    }
}
