//! What the adapters of the conformance suite share on this host: the tiny guest, unusable images, and the processes and
//! files that a store leaves behind. Included by the tests of several crates.
#![allow(clippy::unwrap_used, missing_docs, unreachable_pub)]

use super::common::command_line;
use rudder_core::{
    Error, ErrorKind, Result,
    plan::PlannedUrl,
    testing::{BadImages, Echo, GuestImage},
};
use rudder_local::helper::HelperProgram;
use rustix::process::{Pid, Signal, kill_process};
use std::{
    fs,
    path::{Path, PathBuf},
};
use url::Url;

/// The port of the guest's echo service.
const ECHO: u16 = 7;

/// Returns the path of the tiny guest, made by `make guests`.
pub fn tiny() -> PathBuf {
    let made = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/guests");
    let path = std::env::var_os("RUDDER_GUESTS").map_or_else(made, PathBuf::from).join("tiny.qcow2");
    assert!(path.is_file(), "{} is missing: run `make guests`", path.display());
    path.canonicalize().unwrap()
}

/// Acts as the helper process, if this process was started as one; in a normal test run this does nothing.
#[test]
fn the_helper_process() {
    if std::env::var_os(rudder_local::helper::VARIABLE).is_some() {
        rudder_local::helper::run();
    }
}

/// Returns this program as the one that runs the networks of labs that outlive their owners.
pub fn helper() -> HelperProgram {
    HelperProgram::new(std::env::current_exe().unwrap()).arguments(["--exact", "suite::the_helper_process"])
}

/// Returns what the suite needs to know about the tiny guest.
pub fn tiny_guest(path: &Path) -> GuestImage {
    let url = Url::from_file_path(path).unwrap();
    let mut guest = GuestImage::new(PlannedUrl::new(url));
    guest.echo = Some(Echo::new(ECHO, Some(format!("nc -ll -p {ECHO} -e cat >/dev/null 2>&1 &"))));
    let command = [
        "<waitText 'login:' 3m>tester<enter>",
        "<waitText 'assword:' 1m>tester<enter>",
        "<waitText '$' 1m>echo typed on the screen >/tmp/typed<enter>",
    ];
    guest.boot_command = Some(command.map(str::to_owned).to_vec());
    // The guest is emulated.
    guest.large = 4 << 20;
    guest.serial_says = Some("login:".to_owned());
    guest
}

/// Returns a missing image and a broken one.
pub fn bad_images(store: &Path) -> BadImages {
    let broken = store.join("broken.qcow2");
    // The magic number of qcow2 (docs/interop/qcow2.txt), followed by nothing valid.
    fs::write(&broken, [b"QFI\xfb".as_slice(), &[0xff; 4096]].concat()).unwrap();
    let url = |path: &Path| Url::from_file_path(path).unwrap();
    BadImages::new(url(&store.join("missing.qcow2")), url(&broken))
}

/// Returns descriptions of these processes, and of the labs and modules in a store.
pub fn traces(store: &Path, processes: Vec<i32>) -> Vec<String> {
    let processes = processes.into_iter().map(|pid| format!("process {pid}: {}", command_line(pid)));
    let mut traces: Vec<String> = processes.collect();
    for directory in ["labs", "modules"] {
        let entries = fs::read_dir(store.join(directory)).into_iter().flatten().flatten();
        traces.extend(entries.map(|entry| entry.path().display().to_string()));
    }
    traces
}

/// Kills the process of a machine.
pub fn kill(process: Option<i32>, machine: &str) -> Result<()> {
    let pid = process.and_then(Pid::from_raw).ok_or_else(|| {
        Error::new(ErrorKind::NotFound, format!("expected a process of {machine}, but found none"))
    })?;
    kill_process(pid, Signal::KILL).map_err(|error| Error::io("kill QEMU", error.into()))
}
