//! Drives the [`Kernel`] of a running machine: feeds it what is observed, and carries out its actions.

use super::{Action, HANG_UP_LIMIT, Input, Kernel, Observation, Reporter, Running};
use crate::{lab_storage::blocking, serial::SerialConsole, tpm::Tpm};
use futures::future::{BoxFuture, Fuse, FusedFuture as _, FutureExt as _};
use rudder_core::{Result, backend::Stop, files::replace_file};
use std::{path::PathBuf, sync::Arc};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep, timeout},
};

/// A running machine, in the terms of its hypervisor. Dropping it ends the machine, unless it was released or a daemon
/// ends it.
pub trait Run: Send + 'static {
    /// Who reports what happens to the machine.
    const REPORTER: Reporter;

    /// Waits for the next observation. Dropping the future loses none.
    fn observe(&mut self) -> impl Future<Output = Observation> + Send;

    /// Presses the power button. Does not wait.
    fn press_power_button(&mut self);

    /// Asks the hypervisor to end the machine cleanly. Does not wait.
    fn quit(&mut self);

    /// Ends the machine immediately. Does not wait. May be repeated.
    fn kill(&mut self);

    /// Takes a screenshot as PNG.
    fn screenshot(&self) -> impl Future<Output = Result<Vec<u8>>> + Send + 'static;
}

/// The watcher of a running machine: ends it on request, and publishes how it ended. Dropping it drops the machine.
#[derive(Debug)]
pub struct Watcher<R> {
    /// The machine.
    pub run: R,
    /// Its TPM.
    pub tpm: Option<Tpm>,
    /// Its serial console.
    pub console: Arc<SerialConsole>,
    /// Requests to end it.
    pub orders: mpsc::UnboundedReceiver<Stop>,
    /// The file for a last screenshot.
    pub screenshot: PathBuf,
    /// Publishes how it ended. The last field, so that a dropped machine is killed before its end is published.
    pub running: Running,
}

impl<R: Run> Watcher<R> {
    /// Watches until the machine has ended, and publishes how it ended.
    pub async fn run(self) {
        // Bound first, so that it is dropped last.
        let Self { running, mut run, mut tpm, console, mut orders, screenshot: path } = self;
        let (started, mut kernel) = (Instant::now(), Kernel::new(R::REPORTER));
        let mut tpm_watched = tpm.is_some();
        let mut screenshot: Fuse<BoxFuture<'static, ()>> = Fuse::terminated();
        let exit = loop {
            if let Some(exit) = kernel.exit() {
                break exit.clone();
            }
            let deadline = kernel.deadline();
            let remaining = deadline.unwrap_or_default().saturating_sub(started.elapsed());
            let input = tokio::select! {
                observed = run.observe() => Input::Observed(observed),
                Some(order) = orders.recv() => Input::Stop(order),
                how = ended(&mut tpm), if tpm_watched => {
                    tpm_watched = false;
                    Input::Observed(Observation::TpmEnded(how))
                }
                () = &mut screenshot, if !screenshot.is_terminated() => {
                    Input::Observed(Observation::ScreenshotTaken)
                }
                () = sleep(remaining), if deadline.is_some() => Input::Time,
            };
            for action in kernel.handle(started.elapsed(), input) {
                match action {
                    Action::PressPowerButton => run.press_power_button(),
                    Action::Quit => run.quit(),
                    Action::Kill => run.kill(),
                    Action::TakeScreenshot => {
                        screenshot = keep(run.screenshot(), path.clone()).boxed().fuse();
                    }
                }
            }
        };
        if let Some(tpm) = &mut tpm {
            // The state of a TPM is complete once it has ended.
            tpm.finish().await;
        }
        // The last output of the guest may still be in transit.
        let _ = timeout(HANG_UP_LIMIT, console.finished()).await;
        drop(run);
        running.end(exit);
    }
}

/// Waits until the TPM has ended, and returns how; never completes if there is none.
async fn ended(tpm: &mut Option<Tpm>) -> String {
    match tpm {
        Some(tpm) => tpm.ended().await,
        None => std::future::pending().await,
    }
}

/// Stores a screenshot. One that is cut short by the end of the machine is discarded.
async fn keep(screenshot: impl Future<Output = Result<Vec<u8>>>, path: PathBuf) {
    let kept = match screenshot.await {
        Ok(bytes) => blocking(move || replace_file(&path, &bytes)).await,
        Err(error) => Err(error),
    };
    if let Err(error) = kept {
        tracing::debug!(error = error.report(), "cannot keep the last screenshot of a machine");
    }
}
