//! The process that runs the network of a lab that outlives its owner.
//!
//! A program that embeds Rudder can act as this process: it calls [`run`] first in its `main`. For programs that do not, the
//! program `rudder-helper` is searched for in the same directory and in `PATH`.

use crate::network::{Network, NetworkOptions, NetworkRecord};
use std::{
    env,
    ffi::OsString,
    fs,
    io::{self, Write as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

/// The environment variable that names the file with the [`NetworkRecord`] to run, in the helper's initial working directory.
pub const VARIABLE: &str = "RUDDER_HELPER";
/// The name of the helper program.
const PROGRAM: &str = "rudder-helper";

/// Interval between checks whether the lab's directory still exists.
const CHECK_INTERVAL: Duration = Duration::from_secs(2);

/// Whether this program calls [`run`].
static IS_HELPER: AtomicBool = AtomicBool::new(false);

/// Acts as the helper process and does not return, if this process was started as one; otherwise does nothing. Call it first in
/// `main`.
pub fn run() {
    IS_HELPER.store(true, Ordering::Relaxed);
    let Some(record) = env::var_os(VARIABLE) else { return };
    // On a separate thread, where a runtime can be started even if `main` already runs on one.
    let ended = std::thread::spawn(move || run_network(Path::new(&record))).join();
    if let Ok(Err(error)) = &ended {
        // There is no subscriber yet; standard error goes to a file in the lab.
        let _ = writeln!(io::stderr(), "the network of the lab has ended: {error}");
    }
    process::exit(1);
}

/// A program that acts as the helper process when started with [`VARIABLE`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HelperProgram {
    /// Its path.
    pub path: PathBuf,
    /// Its arguments.
    pub arguments: Vec<OsString>,
}

impl HelperProgram {
    /// Returns a program without arguments.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), arguments: Vec::new() }
    }

    /// Sets the arguments.
    #[must_use]
    pub fn arguments(mut self, arguments: impl IntoIterator<Item: Into<OsString>>) -> Self {
        self.arguments = arguments.into_iter().map(Into::into).collect();
        self
    }

    /// Finds the helper program of this host: this program if it calls [`run`], else `rudder-helper` beside it or in `PATH`.
    #[must_use]
    pub fn find() -> Option<Self> {
        let own = env::current_exe().ok();
        if IS_HELPER.load(Ordering::Relaxed) {
            return own.map(Self::new);
        }
        let beside = own.as_deref().and_then(Path::parent).map(|directory| directory.join(PROGRAM));
        let path = env::var_os("PATH").unwrap_or_default();
        let in_path = env::split_paths(&path).map(|directory| directory.join(PROGRAM)).collect::<Vec<_>>();
        beside.into_iter().chain(in_path).find(|path| path.is_file()).map(Self::new)
    }
}

/// Runs a network until the process is killed, or the directory of its lab is gone.
fn run_network(record: &Path) -> io::Result<std::convert::Infallible> {
    let record = NetworkRecord::from_json(record, &fs::read(record)?).map_err(io::Error::other)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let network = Arc::new(Network::new(&record.network, &NetworkOptions::new(&record.name)));
        let mut open = Vec::new();
        for machine in &record.machines {
            network.add_machine(&machine.name, &machine.nics).map_err(io::Error::other)?;
        }
        for machine in &record.machines {
            let forwards = machine.port_forwards.iter().map(|(port, file)| (*port, PathBuf::from(file)));
            open.push((
                network.plug(&machine.name, machine.sockets.iter().map(PathBuf::from)),
                network.forward_ports(&machine.name, forwards)?,
            ));
        }
        let _open = open;
        loop {
            tokio::time::sleep(CHECK_INTERVAL).await;
            // A directory without a name has no links (stat(2)): the lab was removed by hand.
            if fs::metadata(".")?.nlink() == 0 {
                return Err(io::Error::new(io::ErrorKind::NotFound, "the directory of the lab was removed"));
            }
        }
    })
}
