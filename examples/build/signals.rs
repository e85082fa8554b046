//! SIGINT, SIGTERM and SIGHUP: the first cancels the build before anything is printed, and the program ends when the build has
//! cleaned up, whether or not anybody still reads what it prints.

use crate::output::tell;
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

/// The exit code of a build that was cancelled.
pub(crate) const CANCELLED: u8 = 130;
/// How long the end of a cancelled build may take to be printed. Only a stream that nobody reads takes so long.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Listens to signals for the whole life of the program.
pub(crate) struct Signals(Arc<Mutex<Option<Canceller>>>);

impl Signals {
    /// Listens from now on. A signal that is ignored stays ignored: `nohup` and shells that start a job in the background mean
    /// it.
    ///
    /// # Errors
    /// When the operating system refuses.
    pub(crate) fn listen() -> io::Result<Self> {
        let ignored = ignored();
        let kinds = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()];
        let heard = kinds.into_iter().filter(|kind| ignored & (1 << (kind.as_raw_value() - 1)) == 0);
        let heard: Vec<_> = heard.map(signal).collect::<io::Result<_>>()?;
        let heard = heard.into_iter().map(|mut signal| stream::poll_fn(move |cx| signal.poll_recv(cx)));
        let building = Arc::default();
        tokio::spawn(obey(stream::select_all(heard), Arc::clone(&building)));
        Ok(Self(building))
    }

    /// Lets the first signal cancel this build; with `None`, end the program.
    pub(crate) fn cancel(&self, build: Option<Canceller>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = build;
    }
}

async fn obey(mut signals: impl Stream<Item = ()> + Unpin, building: Arc<Mutex<Option<Canceller>>>) {
    if signals.next().await.is_none() {
        // All of them are ignored.
        return;
    }
    let build = building.lock().unwrap_or_else(PoisonError::into_inner).take();
    let Some(build) = build else { exit(CANCELLED.into()) };
    build.cancel();
    tell_aside("cancelling: machines are ended and removed");
    let mut ended = pin!(async {
        build.ended().await;
        sleep(LAST_WORDS).await;
    });
    for further in 1.. {
        tokio::select! {
            () = &mut ended => break,
            _ = signals.next() => {}
        }
        if further > 1 {
            break;
        }
        tell_aside("still cleaning up; once more leaves at once, and the rest to the next start");
    }
    exit(CANCELLED.into())
}

/// Tells something from a thread of its own: a stream that is stuck must not hold up signals.
fn tell_aside(text: &'static str) {
    thread::spawn(move || tell(text));
}

/// The signals that this process was told to ignore, bit `n - 1` for signal `n`: `SigIgn` of proc_pid_status(5).
fn ignored() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}
