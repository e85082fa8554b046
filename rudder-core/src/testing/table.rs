//! The table of results in the documentation: a row for each test, a column for each backend.

use super::{Outcome, Report, tests};
use std::{collections::BTreeMap, env, fs, path::Path};

/// Marks the beginning and the end of the table in a page.
const BEGIN: &str = "<!-- conformance -->\n";
const END: &str = "<!-- end of conformance -->\n";
/// The environment variable that makes the table be written instead of compared.
const UPDATE: &str = "RUDDER_UPDATE";
/// The columns before those of backends.
const LEGEND: [&str; 2] = ["test", "needs"];
/// Marks a test that has not been run on a backend since it was added.
const UNKNOWN: &str = "?";

impl Report {
    /// Asserts, in a test, that the column of this backend in the table of a documentation page, between `<!--
    /// conformance -->` and `<!-- end of conformance -->`, matches the results; with `RUDDER_UPDATE=1` in the
    /// environment, writes the column instead. The columns of other backends stay as they are. A run of only some tests
    /// is not compared.
    ///
    /// # Panics
    /// When the page differs, or has no such table.
    #[track_caller]
    pub fn assert_documented(&self, page: &Path) {
        if self.partial || self.unavailable.is_some() {
            return;
        }
        let text = fs::read_to_string(page).unwrap_or_default();
        let parts = text.split_once(BEGIN).and_then(|(before, rest)| Some((before, rest.split_once(END)?)));
        let Some((before, (table, after))) = parts else {
            panic!("expected a table between {BEGIN:?} and {END:?} in {}", page.display())
        };
        let updated = self.updated(table);
        if updated == table {
            return;
        }
        let wrong = updated.lines().find(|line| !table.contains(line)).unwrap_or_default();
        assert!(
            env::var_os(UPDATE).is_some(),
            "the results of {} in {} differ from this run, for instance {wrong:?}: run the test with {UPDATE}=1",
            self.backend,
            page.display()
        );
        let written = fs::write(page, format!("{before}{BEGIN}{updated}{END}{after}"));
        assert!(written.is_ok(), "cannot write {}: {written:?}", page.display());
    }

    /// Returns the table with the results of this run in the column of its backend.
    fn updated(&self, table: &str) -> String {
        let cells = |line: &str| -> Vec<String> {
            let inner = line.trim().trim_start_matches('|').trim_end_matches('|');
            inner.split('|').map(|cell| cell.trim().to_owned()).collect()
        };
        let mut lines = table.lines().filter(|line| line.starts_with('|')).map(cells);
        let mut backends: Vec<String> = lines.next().into_iter().flatten().skip(LEGEND.len()).collect();
        let rows: BTreeMap<String, Vec<String>> = lines
            .filter_map(|row| Some((row.first()?.clone(), row[LEGEND.len().min(row.len())..].to_vec())))
            .collect();
        let place = backends.iter().position(|backend| *backend == self.backend).unwrap_or(backends.len());
        if place == backends.len() {
            backends.push(self.backend.clone());
        }
        let mut text = format!("\n| {} | {} |\n", LEGEND.join(" | "), backends.join(" | "));
        text.push_str(&format!("|{}\n", "---|".repeat(LEGEND.len() + backends.len())));
        for test in tests() {
            let label = format!("{}: {}", test.group, test.name());
            let needs: Vec<String> = test.needs.iter().map(|need| format!("`{need}`")).collect();
            let mut results = rows.get(&label).cloned().unwrap_or_default();
            results.resize(backends.len(), UNKNOWN.to_owned());
            let found =
                self.tests.iter().find(|found| found.group == test.group && found.name == test.name());
            results[place] = found.map_or(UNKNOWN, |found| mark(&found.outcome)).to_owned();
            text.push_str(&format!("| {label} | {} | {} |\n", needs.join(", "), results.join(" | ")));
        }
        text.push('\n');
        text
    }
}

/// Returns the cell for an outcome.
fn mark(outcome: &Outcome) -> &'static str {
    match outcome {
        Outcome::Passed => "passed",
        Outcome::Failed(_) => "**failed**",
        Outcome::Skipped(why) if why.ends_with("is not claimed") => "—",
        Outcome::Skipped(_) => "skipped",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TestReport;
    use std::time::Duration;

    fn report(backend: &str, outcome: &Outcome) -> Report {
        let of = |test: &super::super::Test| TestReport {
            group: test.group,
            name: test.name(),
            outcome: outcome.clone(),
            took: Duration::ZERO,
        };
        Report {
            backend: backend.to_owned(),
            tests: tests().iter().map(of).collect(),
            unproven: Vec::new(),
            unavailable: None,
            required: true,
            partial: false,
        }
    }

    #[test]
    fn writing_a_column_keeps_the_others() {
        let one = report("one", &Outcome::Passed).updated("");
        assert!(one.contains(
            "| test | needs | one |\n|---|---|---|\n| labs: diagnosis may be repeated |  | passed |\n"
        ));
        let two = report("two", &Outcome::Skipped("serial is not claimed".to_owned())).updated(&one);
        assert!(two.contains("| labs: diagnosis may be repeated |  | passed | — |\n"));
        assert_eq!(report("one", &Outcome::Passed).updated(&two), two);
        let three = report("one", &Outcome::Failed("why".to_owned())).updated(&two);
        assert!(three.contains("| labs: diagnosis may be repeated |  | **failed** | — |\n"));
        let short = one.replace("| labs: diagnosis may be repeated |  | passed |\n", "");
        assert!(
            report("two", &Outcome::Passed)
                .updated(&short)
                .contains("| labs: diagnosis may be repeated |  | ? | passed |\n")
        );
    }
}
