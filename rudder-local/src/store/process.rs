//! Identifies processes, so that none is mistaken for a later one with the same number, and kills those that belong to a lab.

use super::identity::DirectoryIdentity;
use rudder_core::{Error, ErrorKind, Result};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};
use serde::{Deserialize, Serialize};
use std::{
    fs, io,
    os::fd::OwnedFd,
    path::Path,
    time::{Duration, Instant},
};

/// Time limit for a killed process to be gone.
const KILL_LIMIT: Duration = Duration::from_secs(10);

/// Interval between checks of a process whose command line cannot be read yet, or no longer.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// The identity of a process of this or an earlier boot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessIdentity {
    /// Its process ID.
    pub pid: u32,
    /// Its start time, in clock ticks since boot (proc(5), `/proc/PID/stat` field 22).
    pub start_time: u64,
    /// The boot it ran in (`/proc/sys/kernel/random/boot_id`).
    pub boot_id: String,
}

impl ProcessIdentity {
    /// Returns the identity of the calling process.
    ///
    /// # Errors
    /// `Io` where `/proc` cannot be read.
    pub fn current() -> Result<Self> {
        Self::of(std::process::id())
    }

    /// Returns the identity of the process that has this ID now.
    ///
    /// # Errors
    /// `NotFound` when there is none.
    pub fn of(pid: u32) -> Result<Self> {
        let start_time = start_time(pid)
            .ok_or_else(|| Error::new(ErrorKind::NotFound, format!("there is no process {pid}")))?;
        Ok(Self { pid, start_time, boot_id: boot_id()? })
    }

    /// Returns whether it is still running. A zombie is not.
    #[must_use]
    pub fn is_running(&self) -> bool {
        boot_id().is_ok_and(|boot| boot == self.boot_id) && start_time(self.pid) == Some(self.start_time)
    }

    /// Kills the process, if it is still the same one and belongs to this lab, and waits until it is gone. Returns whether there
    /// was anything to kill.
    pub(super) fn kill(&self, lab: &ExpectedLab<'_>) -> Result<bool> {
        let Some(pid) = i32::try_from(self.pid).ok().and_then(Pid::from_raw) else { return Ok(false) };
        let failed = |error: rustix::io::Errno| {
            Error::io(format_args!("kill process {}", self.pid), io::Error::from(error))
        };
        let handle = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(handle) => handle,
            Err(rustix::io::Errno::SRCH) => return Ok(false),
            Err(error) => return Err(failed(error)),
        };
        // The handle always refers to the same process: what is checked from here on is what is killed.
        if !self.is_running() {
            return Ok(false);
        }
        let deadline = Instant::now() + KILL_LIMIT;
        loop {
            match membership(self.pid, lab) {
                Membership::Member => break,
                Membership::Unreadable if Instant::now() < deadline => {
                    if ends_within(&handle, POLL_INTERVAL).map_err(failed)? {
                        return Ok(false);
                    }
                }
                // A copy of a ledger names processes of the original.
                Membership::Unreadable | Membership::Other if !lab.recorded => return Ok(false),
                Membership::Unreadable | Membership::Other => return Err(self.unrelated(lab.id)),
            }
        }
        match pidfd_send_signal(&handle, Signal::KILL) {
            Ok(()) => {}
            Err(rustix::io::Errno::SRCH) => return Ok(false),
            Err(error) => return Err(failed(error)),
        }
        if !ends_within(&handle, KILL_LIMIT).map_err(failed)? && self.is_running() {
            return Err(Error::new(
                ErrorKind::TimedOut,
                format!("process {} still exists {KILL_LIMIT:?} after it was killed", self.pid),
            ));
        }
        Ok(true)
    }

    /// Returns the error for a process that was to be killed, but does not look like the one that was recorded.
    fn unrelated(&self, lab: &str) -> Error {
        let message = format!(
            "process {} is recorded as part of lab {lab}, but does not appear to belong to it",
            self.pid
        );
        Error::new(ErrorKind::Conflict, message)
            .with_help("check the process, and end it by hand if it is a leftover")
    }
}

/// Returns the ID of this boot.
pub(super) fn boot_id() -> Result<String> {
    let path = "/proc/sys/kernel/random/boot_id";
    let text = fs::read_to_string(path).map_err(|error| Error::io(format_args!("read {path}"), error))?;
    Ok(text.trim().to_owned())
}

/// Returns the start time of a process; `None` if it does not exist or is a zombie.
fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read(format!("/proc/{pid}/stat")).ok()?;
    // The name of the program may contain anything, including parentheses and spaces: the fields follow its last parenthesis.
    let text = String::from_utf8_lossy(&stat);
    let mut fields = text.rsplit_once(')')?.1.split_ascii_whitespace();
    let state = fields.next()?; // field 3
    if matches!(state, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok() // field 22
}

/// What the command line, environment and working directory of a process say about its lab.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Membership {
    /// One of them contains the text.
    Member,
    /// The process has a command line and an environment, and the text is in neither.
    Other,
    /// The command line or the environment is empty, as it is briefly during exec and while the process exits.
    Unreadable,
}

/// The lab that a process must belong to.
#[derive(Debug, Clone, Copy)]
pub(super) struct ExpectedLab<'a> {
    /// The id of a lab.
    pub(super) id: &'a str,
    /// The directory of the lab.
    pub(super) directory: DirectoryIdentity,
    /// Whether its ledger was written for this very directory. Otherwise a process that names the id may be the original's: it
    /// must have its working directory in this one, or have one of its files open.
    pub(super) recorded: bool,
}

impl ExpectedLab<'_> {
    /// Returns whether the directory at this path is the lab's.
    fn is_at(&self, path: &Path) -> bool {
        fs::metadata(path).is_ok_and(|meta| DirectoryIdentity::from_metadata(&meta) == self.directory)
    }

    /// Returns whether a process has a file of the directory open, even if the directory was moved since.
    fn has_open(&self, process: &Path) -> bool {
        let files = fs::read_dir(process.join("fd")).into_iter().flatten().flatten();
        let mut paths = files.filter_map(|file| fs::read_link(file.path()).ok());
        paths.any(|path| path.is_absolute() && path.ancestors().skip(1).any(|above| self.is_at(above)))
    }
}

/// Searches the working directory, environment and command line of a process for a lab.
fn membership(pid: u32, lab: &ExpectedLab<'_>) -> Membership {
    let holds = |bytes: &[u8]| bytes.windows(lab.id.len()).any(|window| window == lab.id.as_bytes());
    let dir = Path::new("/proc").join(pid.to_string());
    let cwd = dir.join("cwd");
    let named = || fs::read_link(&cwd).is_ok_and(|cwd| holds(cwd.as_os_str().as_encoded_bytes()));
    if lab.is_at(&cwd) || (lab.recorded && named()) {
        return Membership::Member;
    }
    let mut unreadable = false;
    // An environment truncated by the exit of its process is not taken as complete: the command line is empty by then.
    for file in ["environ", "cmdline"] {
        match fs::read(dir.join(file)) {
            Ok(bytes) if lab.recorded && holds(&bytes) => return Membership::Member,
            Ok(bytes) => unreadable |= bytes.is_empty(),
            // Not being allowed to read it is not the same as empty.
            Err(error) => unreadable |= error.kind() != io::ErrorKind::PermissionDenied,
        }
    }
    match unreadable {
        true => Membership::Unreadable,
        false if !lab.recorded && lab.has_open(&dir) => Membership::Member,
        false => Membership::Other,
    }
}

/// Waits until a process has ended, and returns whether it has.
fn ends_within(process: &OwnedFd, limit: Duration) -> rustix::io::Result<bool> {
    let limit = Timespec::try_from(limit).map_err(|_| rustix::io::Errno::INVAL)?;
    poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&limit)).map(|ended| ended > 0)
}

/// Returns the processes, other than this one, whose environment has this variable with exactly this value.
pub(super) fn with_variable(variable: &str, value: &str) -> Vec<ProcessIdentity> {
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

    fn here() -> DirectoryIdentity {
        DirectoryIdentity::of(Path::new("/proc")).unwrap()
    }

    fn lab(id: &str) -> ExpectedLab<'_> {
        ExpectedLab { id, directory: here(), recorded: true }
    }

    /// Waits until a child runs its own program: before that, its environment is its parent's.
    fn await_exec(child: &Child, id: &str) {
        while membership(child.id(), &lab(id)) != Membership::Member {
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_process_of_the_lab_is_killed() {
        let mut child = Sleeper::new("lab-a1");
        let identity = ProcessIdentity::of(child.0.id()).unwrap();
        assert!(identity.is_running());
        // Exec may still be in progress: until the environment is the child's own, it does not count as a stranger.
        assert!(identity.kill(&lab("lab-a1")).unwrap());
        assert!(!identity.is_running());
        assert!(!identity.kill(&lab("lab-a1")).unwrap());
        child.0.wait().unwrap();
    }

    #[test]
    fn an_exiting_process_is_not_reported_as_unrelated() {
        for _ in 0..300 {
            let child = Sleeper::new("lab-c3");
            let identity = ProcessIdentity::of(child.0.id()).unwrap();
            await_exec(&child.0, "lab-c3");
            Command::new("kill").args(["-KILL", &identity.pid.to_string()]).status().unwrap();
            identity.kill(&lab("lab-c3")).unwrap();
            assert!(!identity.is_running());
        }
    }

    #[test]
    fn a_process_that_reuses_the_id_is_left_alone() {
        let child = Sleeper::new("lab-b2");
        let identity = ProcessIdentity::of(child.0.id()).unwrap();
        let earlier = ProcessIdentity { start_time: identity.start_time - 1, ..identity.clone() };
        assert!(!earlier.kill(&lab("lab-b2")).unwrap());
        let other_boot = ProcessIdentity { boot_id: "another".into(), ..identity.clone() };
        assert!(!other_boot.kill(&lab("lab-b2")).unwrap());
        assert_eq!(identity.kill(&lab("lab-of-no-process")).unwrap_err().kind(), ErrorKind::Conflict);
        assert!(identity.is_running());
    }

    #[test]
    fn a_process_of_another_directory_is_left_alone() {
        let child = Sleeper::new("lab-d4");
        await_exec(&child.0, "lab-d4");
        let identity = ProcessIdentity::of(child.0.id()).unwrap();
        assert!(!identity.kill(&ExpectedLab { recorded: false, ..lab("lab-d4") }).unwrap());
        assert!(identity.is_running());
    }

    #[test]
    fn a_process_belongs_to_the_directory_that_it_works_in_or_has_files_open_in() {
        let dir = tempfile::tempdir().unwrap();
        let below = dir.path().join("below");
        fs::create_dir(&below).unwrap();
        let log = fs::File::create(below.join("log")).unwrap();
        let directory = DirectoryIdentity::of(dir.path()).unwrap();
        for inside in [true, false] {
            let mut command = Command::new("sleep");
            match inside {
                true => command.arg("600").current_dir(dir.path()),
                false => command.arg("600").stdout(log.try_clone().unwrap()),
            };
            let mut child = Sleeper(command.spawn().unwrap());
            let identity = ProcessIdentity::of(child.0.id()).unwrap();
            // Neither names the lab.
            while membership(identity.pid, &ExpectedLab { recorded: false, directory, id: "x" })
                == Membership::Unreadable
            {
                std::thread::yield_now();
            }
            let lab = ExpectedLab { id: "lab-e5-in-no-command-line", directory, recorded: false };
            assert!(identity.kill(&lab).unwrap(), "inside: {inside}");
            child.0.wait().unwrap();
        }
    }
}
