//! SIGINT, SIGTERM and SIGHUP: the first one cancels the build before anything is printed, and the program ends when
//! the build has cleaned up, whether or not its output is still read.

use crate::output::report;
use futures::{Stream, StreamExt as _, stream};
use rudder::build::Canceller;
use std::{
    fs, io,
    pin::pin,
    process::exit,
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Duration,
};
use tokio::{
    signal::unix::{SignalKind, signal},
    time::sleep,
};

/// The exit code of a cancelled build.
pub(crate) const CANCELLED: u8 = 130;
/// How long printing the end of a cancelled build may take. Only a stream that is not read takes that long.
const FINAL_OUTPUT_LIMIT: Duration = Duration::from_secs(2);

/// Listens for signals during the whole life of the program.
pub(crate) struct Signals(Arc<Mutex<Option<Canceller>>>);

impl Signals {
    /// Starts to listen. A signal that is ignored stays ignored: `nohup`, and shells that start a job in the
    /// background, rely on that.
    ///
    /// # Errors
    /// Returns an error if the operating system refuses.
    pub(crate) fn listen() -> io::Result<Self> {
        let ignored = ignored();
        let kinds = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()];
        let handled = kinds.into_iter().filter(|kind| ignored & (1 << (kind.as_raw_value() - 1)) == 0);
        let handled: Vec<_> = handled.map(signal).collect::<io::Result<_>>()?;
        let handled = handled.into_iter().map(|mut signal| stream::poll_fn(move |cx| signal.poll_recv(cx)));
        let building = Arc::default();
        tokio::spawn(handle_signals(stream::select_all(handled), Arc::clone(&building)));
        Ok(Self(building))
    }

    /// Makes the first signal cancel this build; with `None`, it ends the program.
    pub(crate) fn cancel(&self, build: Option<Canceller>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = build;
    }
}

async fn handle_signals(
    mut signals: impl Stream<Item = ()> + Unpin,
    building: Arc<Mutex<Option<Canceller>>>,
) {
    if signals.next().await.is_none() {
        // All of them are ignored.
        return;
    }
    let build = building.lock().unwrap_or_else(PoisonError::into_inner).take();
    let Some(build) = build else { exit(CANCELLED.into()) };
    build.cancel();
    report_from_thread("cancelling: machines are ended and removed");
    let mut ended = pin!(async {
        build.ended().await;
        sleep(FINAL_OUTPUT_LIMIT).await;
    });
    for further in 1.. {
        tokio::select! {
            () = &mut ended => break,
            _ = signals.next() => {}
        }
        if further > 1 {
            break;
        }
        report_from_thread(
            "still cleaning up; one more signal exits at once and leaves the rest to the next start",
        );
    }
    exit(CANCELLED.into())
}

/// Prints a text from a thread of its own: a stream that is stuck must not delay the handling of signals.
fn report_from_thread(text: &'static str) {
    thread::spawn(move || report(text));
}

/// Returns the signals that this process ignores, bit `n - 1` for signal `n`: `SigIgn` of proc_pid_status(5).
fn ignored() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}
