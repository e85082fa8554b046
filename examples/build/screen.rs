//! The display of a build for people, on standard error: bars and colours on a terminal, otherwise plain lines.

use crate::output::report;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use rudder::{
    event::{Event, EventKind, Outcome},
    visible::visible_line,
};
use std::{
    collections::HashMap,
    io::{IsTerminal, stderr},
};

/// Shows events.
pub(crate) struct Screen {
    style: Style,
    /// Progress by VM and task: its bar on a terminal, otherwise the last tenth that was printed.
    bars: HashMap<(Option<String>, String), ProgressBar>,
    tenths: HashMap<(Option<String>, String), u64>,
}

enum Style {
    Terminal(MultiProgress),
    Plain,
    /// Only how the build ended, and what a person has to do: the events go elsewhere.
    Quiet,
}

impl Screen {
    /// Returns a screen; a quiet one shows only failures and pauses.
    pub(crate) fn new(quiet: bool) -> Self {
        let style = match (quiet, stderr().is_terminal()) {
            (true, _) => Style::Quiet,
            (false, true) => Style::Terminal(MultiProgress::new()),
            (false, false) => Style::Plain,
        };
        Self { style, bars: HashMap::new(), tenths: HashMap::new() }
    }

    /// Shows an event.
    pub(crate) fn show(&mut self, event: &Event) {
        match (&self.style, &event.kind) {
            (Style::Quiet, EventKind::Finished { outcome: Outcome::Failed(_) | Outcome::Cancelled, .. })
            | (Style::Quiet, EventKind::Paused { .. } | EventKind::Resumed { .. }) => report(event),
            (Style::Quiet, _) => {}
            (_, EventKind::Progress { task, done, total }) => self.progress(event, task, *done, *total),
            (Style::Terminal(bars), kind) => {
                if let EventKind::Finished { .. } = kind {
                    self.bars.drain().for_each(|(_, bar)| bar.finish_and_clear());
                }
                // A screen that is gone is no reason to stop building.
                let _ = bars.println(event.to_string());
            }
            (Style::Plain, _) => report(event),
        }
    }

    /// Shows a text.
    pub(crate) fn say(&self, text: &str) {
        match &self.style {
            Style::Terminal(bars) => drop(bars.println(text)),
            Style::Plain | Style::Quiet => report(text),
        }
    }

    fn progress(&mut self, event: &Event, task: &str, done: u64, total: Option<u64>) {
        let key = (event.vm.clone(), task.to_owned());
        let complete = total.is_some_and(|total| done >= total);
        match &self.style {
            Style::Terminal(bars) => {
                let bar = self.bars.entry(key.clone()).or_insert_with(|| {
                    let bar = bars.add(ProgressBar::new(0).with_style(style()));
                    bar.set_prefix(visible_line(event.vm.as_deref().unwrap_or_default()).into_owned());
                    bar.set_message(visible_line(task).into_owned());
                    bar
                });
                bar.set_length(total.unwrap_or(done));
                bar.set_position(done);
                if complete {
                    bar.finish_and_clear();
                    self.bars.remove(&key);
                }
            }
            _ => {
                let tenth = total.map_or(0, |total| done.saturating_mul(10) / total.max(1));
                let reported = self.tenths.entry(key).or_insert(0);
                if complete || tenth > *reported {
                    *reported = tenth;
                    report(event);
                }
            }
        }
    }
}

fn style() -> ProgressStyle {
    ProgressStyle::with_template(
        "{prefix} {wide_msg} {bar:24} {binary_bytes:>10} of {binary_total_bytes:>10}",
    )
    .unwrap_or_else(|_| ProgressStyle::default_bar())
}
