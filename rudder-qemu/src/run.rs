//! A running QEMU process: what happens to it, and how it is ended. What that means is decided in
//! [`rudder_local::lifecycle`].

use crate::{command_line::DISPLAY, qmp::Qmp};
use async_trait::async_trait;
use rudder_core::{Error, ErrorKind, Result, backend::BoxedStream};
use rudder_local::{
    lab_storage::LabStorage,
    lifecycle::{Control, Observation, Outcome, ProcessEnd, Reporter, Run},
    log_tail::last_lines,
    machine::Definition,
    process::{OwnedChild, describe},
};
use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};
use tokio::{net::UnixStream, sync::mpsc};

/// A running QEMU process.
#[derive(Debug)]
pub(crate) struct QemuRun {
    child: OwnedChild,
    control: QemuControl,
    /// What the control connection reports; `None` once it has closed.
    reports: Option<mpsc::UnboundedReceiver<Observation>>,
    process_ended: bool,
    /// The file with QEMU's messages.
    log: PathBuf,
}

impl QemuRun {
    pub(crate) fn new(
        child: OwnedChild,
        control: QemuControl,
        reports: mpsc::UnboundedReceiver<Observation>,
        log: PathBuf,
    ) -> Self {
        Self { child, control, reports: Some(reports), process_ended: false, log }
    }
}

impl Run for QemuRun {
    type Control = QemuControl;
    const REPORTER: Reporter = Reporter::Process;

    fn control(&self) -> QemuControl {
        self.control.clone()
    }

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

    fn quit(&mut self) {
        let qmp = self.control.qmp.clone();
        tokio::spawn(async move { qmp.quit().await });
    }

    fn kill(&mut self) {
        self.child.kill();
    }

    fn release_switch(&self) -> Option<Arc<AtomicBool>> {
        Some(self.child.release_switch())
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

/// The connections to a running QEMU process.
#[derive(Debug, Clone)]
pub(crate) struct QemuControl {
    qmp: Qmp,
    storage: Arc<LabStorage>,
    /// The file name of the display's socket.
    display: String,
    /// Number of screenshots taken, or started: several may be taken at once.
    screenshots: Arc<AtomicUsize>,
}

impl QemuControl {
    pub(crate) fn new(qmp: Qmp, machine: &Definition) -> Self {
        let (storage, display) = (Arc::clone(&machine.storage), machine.file(DISPLAY));
        Self { qmp, storage, display, screenshots: Arc::default() }
    }
}

#[async_trait]
impl Control for QemuControl {
    async fn resume(&self) -> Result<()> {
        self.qmp.cont().await
    }

    async fn press_power_button(&self) -> Result<()> {
        self.qmp.press_power_button().await
    }

    async fn screenshot(&self) -> Result<Vec<u8>> {
        let number = self.screenshots.fetch_add(1, Ordering::Relaxed);
        // In QEMU's directory, which is the lab's.
        let file = format!("{}.{number}.png", self.display);
        self.qmp.screendump(&file).await?;
        let path = self.storage.path(&file);
        let failed = |error| Error::io(format_args!("read {}", path.display()), error);
        let bytes = tokio::fs::read(&path).await.map_err(failed)?;
        tokio::fs::remove_file(&path).await.map_err(failed)?;
        Ok(bytes)
    }

    async fn display(&self) -> Result<BoxedStream> {
        let stream = UnixStream::connect(self.storage.socket(&self.display)).await;
        let stream = stream.map_err(|error| {
            Error::new(ErrorKind::Protocol, "cannot connect to the display").with_source(error)
        })?;
        Ok(Box::new(stream))
    }

    fn display_command(&self) -> String {
        format!("vncviewer {}", self.storage.path(&self.display).display())
    }
}
