//! Orphans are taken note of at once.
//!
//! Libvirt's QEMUs are orphans: whoever adopts them takes note of their end, and libvirt waits for that before it says that
//! a machine has ended. The init of a container may take seconds for it. So this process adopts them itself, as an init
//! of its own, and a test can play one that is slow.
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

/// Those that are left lying.
static LEFT: Mutex<BTreeSet<i32>> = Mutex::new(BTreeSet::new());
/// How often is looked for orphans that ended, while somebody else's child has.
const LOOK: Duration = Duration::from_millis(10);

/// Adopts orphans below this process from now on.
pub fn adopt() {
    static ADOPTING: Once = Once::new();
    ADOPTING.call_once(|| {
        set_child_subreaper(Some(getpid())).unwrap();
        thread::spawn(|| {
            loop {
                // Waits while there is nothing to take note of, and leaves it to be taken note of.
                if waitid(WaitId::All, WaitIdOptions::EXITED | WaitIdOptions::NOWAIT).is_ok() {
                    ended().into_iter().for_each(bury);
                }
                thread::sleep(LOOK);
            }
        });
    });
}

/// Leaves this orphan lying when it ends, until it is [let go](let_go).
pub fn leave(pid: i32) {
    LEFT.lock().unwrap().insert(pid);
}

/// Takes note of an orphan that was left.
pub fn let_go(pid: i32) {
    LEFT.lock().unwrap().remove(&pid);
}

/// Orphans that ended and were not left: what is in a session of its own was not started by this process, which waits for its
/// own children.
fn ended() -> Vec<i32> {
    let left = LEFT.lock().unwrap();
    let (_, _, own_session) = standing("self").unwrap();
    let own = getpid().as_raw_nonzero().get();
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let orphans = pids.filter(|pid| {
        standing(&pid.to_string())
            .is_some_and(|(ended, parent, session)| ended && parent == own && session != own_session)
    });
    orphans.filter(|pid| !left.contains(pid)).collect()
}

/// Whether a process has ended, its parent, and its session, which is 0 where that is not to be seen from here
/// (proc_pid_stat(5)).
fn standing(process: &str) -> Option<(bool, i32, i32)> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    let (state, parent, _group, session) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
    Some((state == "Z", parent.parse().ok()?, session.parse().ok()?))
}

fn bury(pid: i32) {
    // It is a child of this process that has ended: nothing is waited for.
    let _ = waitpid(Pid::from_raw(pid), WaitOptions::NOHANG);
}
