//! Reaps orphaned processes at once.
//!
//! The QEMU processes of libvirt are orphans: the process that adopts them reaps them, and libvirt waits for that
//! before it reports that a machine has ended. The init of a container may take seconds for it. So this process adopts
//! them itself, like an init, and a test can simulate a slow one.
#![allow(clippy::unwrap_used, dead_code, missing_docs, unreachable_pub)]

use rustix::process::{
    Pid, WaitId, WaitIdOptions, WaitOptions, getpid, set_child_subreaper, waitid, waitpid,
};
use std::{
    collections::BTreeSet,
    fs,
    sync::{Mutex, Once},
    thread,
    time::Duration,
};

/// Orphans that are deliberately not reaped.
static HELD: Mutex<BTreeSet<i32>> = Mutex::new(BTreeSet::new());
/// Interval between checks for orphans that have ended, for as long as another child waits to be reaped.
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Adopts orphans below this process from now on.
pub fn adopt() {
    static ADOPTING: Once = Once::new();
    ADOPTING.call_once(|| {
        set_child_subreaper(Some(getpid())).unwrap();
        thread::spawn(|| {
            loop {
                // Waits until a child has ended, but does not reap it.
                if waitid(WaitId::All, WaitIdOptions::EXITED | WaitIdOptions::NOWAIT).is_ok() {
                    ended().into_iter().for_each(reap);
                }
                thread::sleep(POLL_INTERVAL);
            }
        });
    });
}

/// Does not reap this orphan when it ends, until it is [released](release).
pub fn hold(pid: i32) {
    HELD.lock().unwrap().insert(pid);
}

/// Lets a held orphan be reaped after all.
pub fn release(pid: i32) {
    HELD.lock().unwrap().remove(&pid);
}

/// Returns the orphans that have ended and may be reaped. A process in a session of its own was not started by this
/// process, which waits for its own children itself.
fn ended() -> Vec<i32> {
    let held = HELD.lock().unwrap();
    let (_, _, own_session) = state_of("self").unwrap();
    let own = getpid().as_raw_nonzero().get();
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let orphans = pids.filter(|pid| {
        state_of(&pid.to_string())
            .is_some_and(|(ended, parent, session)| ended && parent == own && session != own_session)
    });
    orphans.filter(|pid| !held.contains(pid)).collect()
}

/// Returns whether a process has ended, its parent, and its session, which is 0 if it is not visible from here
/// (proc_pid_stat(5)).
fn state_of(process: &str) -> Option<(bool, i32, i32)> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    let (state, parent, _group, session) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
    Some((state == "Z", parent.parse().ok()?, session.parse().ok()?))
}

fn reap(pid: i32) {
    // It is a child of this process and has ended, so this does not block.
    let _ = waitpid(Pid::from_raw(pid), WaitOptions::NOHANG);
}
