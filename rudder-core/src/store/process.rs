//! Who a process is, so that it is never mistaken for a later one of the same number; ending one that is ours.

use crate::{Error, ErrorKind, Result};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};
use serde::{Deserialize, Serialize};
use std::{fs, io, path::Path};

/// How long a killed process may take to be gone.
const KILL_LIMIT_SECONDS: i64 = 10;

/// A process of this or an earlier boot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessIdentity {
    /// Its number.
    pub pid: u32,
    /// When it started, in clock ticks since boot (proc(5), `/proc/PID/stat` field 22).
    pub start_time: u64,
    /// The boot it ran in (`/proc/sys/kernel/random/boot_id`).
    pub boot_id: String,
}

impl ProcessIdentity {
    /// The process that runs this code.
    ///
    /// # Errors
    /// `Io` where `/proc` cannot be read.
    pub fn current() -> Result<Self> {
        Self::of(std::process::id())
    }

    /// The process that has this number now.
    ///
    /// # Errors
    /// `NotFound` when there is none.
    pub fn of(pid: u32) -> Result<Self> {
        let start_time = start_time(pid)
            .ok_or_else(|| Error::new(ErrorKind::NotFound, format!("there is no process {pid}")))?;
        Ok(Self { pid, start_time, boot_id: boot_id()? })
    }

    /// Whether it still runs. A zombie does not.
    #[must_use]
    pub fn is_running(&self) -> bool {
        boot_id().is_ok_and(|boot| boot == self.boot_id) && start_time(self.pid) == Some(self.start_time)
    }

    /// Kills it, if it is still the same process and its command line, directory or environment names `marker`, and
    /// waits until it is gone. Says whether there was anything to kill.
    pub(super) fn kill(&self, marker: &str) -> Result<bool> {
        let Some(pid) = i32::try_from(self.pid).ok().and_then(Pid::from_raw) else { return Ok(false) };
        let failed = |error: rustix::io::Errno| {
            Error::io(format_args!("kill process {}", self.pid), io::Error::from(error))
        };
        let handle = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(handle) => handle,
            Err(rustix::io::Errno::SRCH) => return Ok(false),
            Err(error) => return Err(failed(error)),
        };
        // The handle names one process for good: what is looked at from here on is what is killed.
        if !self.is_running() {
            return Ok(false);
        }
        if !names(self.pid, marker) {
            return Err(Error::new(
                ErrorKind::Conflict,
                format!("process {} was recorded as part of {marker}, but nothing of it says so", self.pid),
            )
            .with_help("look at the process, and end it by hand if it is a left-over"));
        }
        match pidfd_send_signal(&handle, Signal::KILL) {
            Ok(()) => {}
            Err(rustix::io::Errno::SRCH) => return Ok(false),
            Err(error) => return Err(failed(error)),
        }
        let limit = Timespec { tv_sec: KILL_LIMIT_SECONDS, tv_nsec: 0 };
        let gone = poll(&mut [PollFd::new(&handle, PollFlags::IN)], Some(&limit)).map_err(failed)?;
        if gone == 0 && self.is_running() {
            return Err(Error::new(
                ErrorKind::TimedOut,
                format!("process {} was killed, and is still there after {KILL_LIMIT_SECONDS} s", self.pid),
            ));
        }
        Ok(true)
    }
}

/// The id of this boot.
pub(super) fn boot_id() -> Result<String> {
    let path = "/proc/sys/kernel/random/boot_id";
    let text = fs::read_to_string(path).map_err(|error| Error::io(format_args!("read {path}"), error))?;
    Ok(text.trim().to_owned())
}

/// When a process started; `None` when there is none, or it is a zombie.
fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read(format!("/proc/{pid}/stat")).ok()?;
    // The name of the program may hold anything, also brackets and blanks: what follows its last bracket is plain.
    let text = String::from_utf8_lossy(&stat);
    let mut fields = text.rsplit_once(')')?.1.split_ascii_whitespace();
    let state = fields.next()?; // field 3
    if matches!(state, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok() // field 22
}

/// Whether a process carries this text in its command line, working directory or environment.
fn names(pid: u32, marker: &str) -> bool {
    let holds = |bytes: &[u8]| bytes.windows(marker.len()).any(|window| window == marker.as_bytes());
    let dir = Path::new("/proc").join(pid.to_string());
    ["cmdline", "environ"].iter().any(|file| fs::read(dir.join(file)).is_ok_and(|bytes| holds(&bytes)))
        || fs::read_link(dir.join("cwd")).is_ok_and(|cwd| holds(cwd.as_os_str().as_encoded_bytes()))
}

/// The processes, other than this one, whose environment has this variable with exactly this value.
pub(super) fn carrying(variable: &str, value: &str) -> Vec<ProcessIdentity> {
    let wanted = format!("{variable}={value}");
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid| *pid != std::process::id())
        .filter(|pid| {
            fs::read(format!("/proc/{pid}/environ"))
                .is_ok_and(|bytes| bytes.split(|byte| *byte == 0).any(|entry| entry == wanted.as_bytes()))
        })
        .filter_map(|pid| ProcessIdentity::of(pid).ok())
        .collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::process::{Child, Command};

    struct Sleeper(Child);

    impl Sleeper {
        fn new(marker: &str) -> Self {
            Self(Command::new("sleep").arg("600").env("RUDDER_LAB", marker).spawn().unwrap())
        }
    }

    impl Drop for Sleeper {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn a_process_of_ours_is_killed() {
        let mut child = Sleeper::new("lab-a1");
        let identity = ProcessIdentity::of(child.0.id()).unwrap();
        assert!(identity.is_running());
        // Exec may still be under way: the environment is the child's own once sleep runs.
        while !names(identity.pid, "lab-a1") {
            std::thread::yield_now();
        }
        assert!(identity.kill("lab-a1").unwrap());
        assert!(!identity.is_running());
        assert!(!identity.kill("lab-a1").unwrap());
        child.0.wait().unwrap();
    }

    #[test]
    fn a_process_that_only_has_the_number_is_left_alone() {
        let child = Sleeper::new("lab-b2");
        let identity = ProcessIdentity::of(child.0.id()).unwrap();
        let earlier = ProcessIdentity { start_time: identity.start_time - 1, ..identity.clone() };
        assert!(!earlier.kill("lab-b2").unwrap());
        let other_boot = ProcessIdentity { boot_id: "another".into(), ..identity.clone() };
        assert!(!other_boot.kill("lab-b2").unwrap());
        assert_eq!(identity.kill("lab-nobody-has-this").unwrap_err().kind(), ErrorKind::Conflict);
        assert!(identity.is_running());
    }
}
