//! Drives the [`Kernel`] of a running machine: feeds it what is observed, and carries out its actions.

use super::{Action, HANG_UP_LIMIT, Input, Kernel, Observation, Reporter, Running};
use crate::{lab_storage::blocking, serial::SerialConsole, tpm::Tpm};
use async_trait::async_trait;
use futures::future::{BoxFuture, Fuse, FusedFuture as _, FutureExt as _};
use rudder_core::{
    Result,
    backend::{BoxedStream, Stop},
    files::replace_file,
};
use std::{
    fmt,
    path::PathBuf,
    sync::{Arc, atomic::AtomicBool},
};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep, timeout},
};

/// A running machine, in the terms of its hypervisor. Dropping it ends the machine, unless it was released or a daemon
/// ends it.
///
/// The process of the machine need not be a child of this one.
pub trait Run: Send + 'static {
    /// How requests reach it.
    type Control: Control;
    /// Who reports what happens to it.
    const REPORTER: Reporter;

    /// Returns how requests reach it.
    fn control(&self) -> Self::Control;

    /// Waits for the next observation. Dropping the future loses none.
    fn observe(&mut self) -> impl Future<Output = Observation> + Send;

    /// Asks the hypervisor to end the machine cleanly. Does not wait.
    fn quit(&mut self);

    /// Ends the machine immediately. Does not wait. May be repeated.
    fn kill(&mut self);

    /// Returns a switch that, once set, lets the machine outlive this value; `None` if dropping this value does not end
    /// it.
    fn release_switch(&self) -> Option<Arc<AtomicBool>> {
        None
    }
}

/// How requests reach a running machine.
#[async_trait]
pub trait Control: fmt::Debug + Clone + Send + Sync + 'static {
    /// Lets the guest run, which was paused when the machine was powered on.
    ///
    /// # Errors
    /// `LaunchFailed`; `Protocol`.
    async fn resume(&self) -> Result<()>;

    /// Presses the power button.
    ///
    /// # Errors
    /// `Protocol`.
    async fn press_power_button(&self) -> Result<()>;

    /// Takes a screenshot as PNG.
    ///
    /// # Errors
    /// As [`Machine::screenshot`](rudder_core::backend::Machine::screenshot).
    async fn screenshot(&self) -> Result<Vec<u8>>;

    /// Connects to the display.
    ///
    /// # Errors
    /// As [`Machine::display`](rudder_core::backend::Machine::display).
    async fn display(&self) -> Result<BoxedStream>;

    /// Returns a command with which a person opens the display.
    fn display_command(&self) -> String;
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
    pub stop_requests: mpsc::UnboundedReceiver<Stop>,
    /// The file for a last screenshot.
    pub screenshot: PathBuf,
    /// Publishes how it ended. The last field, so that a dropped machine is killed before its end is published.
    pub running: Running,
}

impl<R: Run> Watcher<R> {
    /// Watches until the machine has ended, and publishes how it ended.
    pub async fn run(self) {
        // Bound first, so that it is dropped last.
        let Self { running, mut run, mut tpm, console, mut stop_requests, screenshot: path } = self;
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
                Some(how) = stop_requests.recv() => Input::Stop(how),
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
                    Action::PressPowerButton => {
                        let control = run.control();
                        // Not awaited: the guest may end before the hypervisor replies.
                        tokio::spawn(async move { control.press_power_button().await });
                    }
                    Action::Quit => run.quit(),
                    Action::Kill => run.kill(),
                    Action::TakeScreenshot => {
                        screenshot = keep(run.control(), path.clone()).boxed().fuse();
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

/// Stores a screenshot. An incomplete one, interrupted by the end of the machine, is discarded.
async fn keep(control: impl Control, path: PathBuf) {
    let kept = match control.screenshot().await {
        Ok(bytes) => blocking(move || replace_file(&path, &bytes)).await,
        Err(error) => Err(error),
    };
    if let Err(error) = kept {
        tracing::debug!(error = error.report(), "cannot keep the last screenshot of a machine");
    }
}
