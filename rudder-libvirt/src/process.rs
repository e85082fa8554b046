//! Finds the process of a domain on this host, and how it ended. Libvirt does not report either, but QEMU's command
//! line contains the name of the domain, and its environment contains the lab's id (`domain`).

use rudder_core::backend::LabId;
use rudder_local::store::LAB_VARIABLE;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::{
    fmt,
    fs::{self, File},
    path::{Path, PathBuf},
};
use tokio::net::unix::pipe;

/// How a process ended that did not exit successfully.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Broke {
    Signal(u32),
    Code(u32),
}

impl fmt::Display for Broke {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Signal(signal) => write!(f, "was killed by signal {signal}"),
            Self::Code(code) => write!(f, "ended with exit code {code}"),
        }
    }
}

/// Returns the process id of a domain of a lab; `None` if there is no such process or it belongs to another user.
pub(crate) fn of_domain(domain: &str, lab: &LabId) -> Option<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.find(|pid: &u32| runs(&place(*pid), domain, lab))
}

/// A process that was found running. The kernel reports its end, so nothing is polled.
#[derive(Debug)]
pub(crate) struct Found {
    pid: u32,
    handle: pipe::Receiver,
}

/// Finds the process of a domain that was just started. It must still run: a process that has ended has no command
/// line.
pub(crate) async fn find(domain: String, lab: LabId) -> Option<Found> {
    let open = move || {
        let pid = of_domain(&domain, &lab)?;
        let handle = pidfd_open(Pid::from_raw(i32::try_from(pid).ok()?)?, PidfdFlags::empty()).ok()?;
        // Check again, in case the process id was reused in the meantime.
        runs(&place(pid), &domain, &lab).then_some((pid, handle))
    };
    let (pid, handle) = tokio::task::spawn_blocking(open).await.ok().flatten()?;
    // A pidfd becomes readable when its process ends (pidfd_open(2)), and so does a pipe: the runtime treats both the
    // same.
    let handle = pipe::Receiver::from_file_unchecked(File::from(handle)).ok()?;
    Some(Found { pid, handle })
}

/// Waits until a process has ended, and returns how it failed, if it did and its status can still be read. Never
/// completes if no process was found.
pub(crate) async fn ended(found: Option<Found>) -> Option<Broke> {
    if let Some(Found { pid, handle }) = found
        && handle.readable().await.is_ok()
    {
        return fs::read_to_string(place(pid).join("stat")).ok().and_then(|stat| broke(&stat));
    }
    std::future::pending().await
}

/// Returns how a process that was not reaped yet failed, from its line in /proc (proc_pid_stat(5)). `None` if it exited
/// successfully or this user may not read the status.
fn broke(stat: &str) -> Option<Broke> {
    // The name in the second field may contain anything. The state is the third field, the exit status the 52nd.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    if !matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    let status: u32 = fields.nth(48)?.parse().ok()?;
    // Encoded as by wait(2).
    match (status & 0x7f, status >> 8 & 0xff) {
        (0, 0) => None,
        (0, code) => Some(Broke::Code(code)),
        (signal, _) => Some(Broke::Signal(signal)),
    }
}

fn place(pid: u32) -> PathBuf {
    Path::new("/proc").join(pid.to_string())
}

fn runs(process: &Path, domain: &str, lab: &LabId) -> bool {
    let name = format!("guest={domain},");
    let variable = format!("{LAB_VARIABLE}={lab}");
    has(&process.join("cmdline"), |argument| argument.starts_with(name.as_bytes()))
        && has(&process.join("environ"), |one| one == variable.as_bytes())
}

fn has(list: &Path, wanted: impl Fn(&[u8]) -> bool) -> bool {
    fs::read(list).unwrap_or_default().split(|byte| *byte == 0).any(wanted)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::process::Command;

    #[test]
    fn how_a_process_broke_is_read_before_anybody_takes_note_of_it() {
        for (script, expected) in
            [("kill -9 $$", Some(Broke::Signal(9))), ("exit 3", Some(Broke::Code(3))), ("exit 0", None)]
        {
            let mut child = Command::new("sh").args(["-c", script]).spawn().unwrap();
            let stat = place(child.id()).join("stat");
            let read = loop {
                let stat = fs::read_to_string(&stat).unwrap();
                if stat.contains(") Z ") {
                    break stat;
                }
                std::thread::yield_now();
            };
            assert_eq!(broke(&read), expected, "{read}");
            child.wait().unwrap();
        }
    }

    #[test]
    fn a_process_that_runs_did_not_break() {
        let stat = fs::read_to_string("/proc/self/stat").unwrap();
        assert_eq!(broke(&stat), None);
        assert_eq!(broke("1 (a) b) Z 1"), None);
    }
}
