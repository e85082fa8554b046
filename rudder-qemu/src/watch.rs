//! A running QEMU process: what happens to it, and how it is ended. What that means is decided in
//! [`rudder_local::lifecycle`].

use crate::qmp::Qmp;
use rudder_core::{Error, Result};
use rudder_local::{
    lifecycle::{Observation, Outcome, ProcessEnd, Reporter, Run},
    log_tail::last_lines,
    process::{OwnedChild, describe},
};
use std::path::PathBuf;
use tokio::sync::mpsc;

/// A running QEMU process.
#[derive(Debug)]
pub(crate) struct QemuRun {
    child: OwnedChild,
    qmp: Qmp,
    /// What the control connection reports; `None` once it has closed.
    reports: Option<mpsc::UnboundedReceiver<Observation>>,
    process_ended: bool,
    /// The file with QEMU's messages.
    log: PathBuf,
    /// The file for a screenshot, in the directory of the lab.
    screenshot: PathBuf,
}

impl QemuRun {
    pub(crate) fn new(
        child: OwnedChild,
        qmp: Qmp,
        reports: mpsc::UnboundedReceiver<Observation>,
        log: PathBuf,
        screenshot: PathBuf,
    ) -> Self {
        Self { child, qmp, reports: Some(reports), process_ended: false, log, screenshot }
    }
}

impl Run for QemuRun {
    const REPORTER: Reporter = Reporter::Process;

    async fn observe(&mut self) -> Observation {
        tokio::select! {
            // May be repeated: the status is kept.
            status = self.child.wait(), if !self.process_ended => {
                let last_lines = last_lines(&self.log).await;
                self.process_ended = true;
                let (outcome, how) = match status {
                    Ok(status) if status.success() => (Outcome::Success, describe(status)),
                    Ok(status) => (Outcome::Failure, describe(status)),
                    Err(error) => (Outcome::Unknown, format!("could not be waited for: {error}")),
                };
                Observation::ProcessEnded(ProcessEnd { outcome, detail: format!("QEMU {how}"), last_lines })
            }
            report = next(&mut self.reports), if self.reports.is_some() => report,
            else => std::future::pending().await,
        }
    }

    fn press_power_button(&mut self) {
        let qmp = self.qmp.clone();
        tokio::spawn(async move { qmp.press_power_button().await });
    }

    fn quit(&mut self) {
        let qmp = self.qmp.clone();
        tokio::spawn(async move { qmp.quit().await });
    }

    fn kill(&mut self) {
        self.child.kill();
    }

    fn screenshot(&self) -> impl Future<Output = Result<Vec<u8>>> + Send + 'static {
        let (qmp, file) = (self.qmp.clone(), self.screenshot.clone());
        async move { screenshot(&qmp, &file).await }
    }
}

/// Waits for the next report, and notices when the connection closes.
async fn next(reports: &mut Option<mpsc::UnboundedReceiver<Observation>>) -> Observation {
    let Some(receiver) = reports else { return std::future::pending().await };
    match receiver.recv().await {
        Some(report) => report,
        None => {
            *reports = None;
            Observation::Disconnected
        }
    }
}

/// Takes a screenshot as PNG, by way of this new file in QEMU's directory.
pub(crate) async fn screenshot(qmp: &Qmp, file: &std::path::Path) -> Result<Vec<u8>> {
    let name = file.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    qmp.screendump(name).await?;
    let failed = |error| Error::io(format_args!("read {}", file.display()), error);
    let bytes = tokio::fs::read(file).await.map_err(failed)?;
    tokio::fs::remove_file(file).await.map_err(failed)?;
    Ok(bytes)
}
