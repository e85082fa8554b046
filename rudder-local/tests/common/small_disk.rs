//! A small file system in memory: a disk that is soon full.
#![allow(clippy::unwrap_used, missing_docs, unreachable_pub)]

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// Set in a process that runs in its own namespaces.
const INSIDE: &str = "RUDDER_TEST_MAY_MOUNT";

/// Returns whether this process may mount. If not, runs this one test again to completion, as root of its own
/// namespaces.
pub fn may_mount(test: &str) -> bool {
    if rustix::process::geteuid().is_root() || std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--mount", "--"]).arg(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture"]).env(INSIDE, "1").stdin(Stdio::null());
    let status = command.status().unwrap();
    assert!(status.success(), "{test} in namespaces of its own: {status}");
    false
}

/// A mounted file system, which is unmounted when this is dropped.
pub struct SmallDisk(PathBuf);

impl SmallDisk {
    /// Mounts a file system of `mebibytes` MiB at this directory.
    pub fn mount(at: &Path, mebibytes: u64) -> Self {
        fs::create_dir_all(at).unwrap();
        let mut command = Command::new("mount");
        command.args(["-t", "tmpfs", "-o", &format!("size={mebibytes}m,mode=0700"), "tmpfs"]).arg(at);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Self(at.to_owned())
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}
