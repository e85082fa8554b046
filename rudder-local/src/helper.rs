//! The process that runs the network of a lab that outlives its owner.
//!
//! A program that embeds Rudder can act as this process: it calls [`run`] first in its `main`. For programs that do not, the
//! program `rudder-helper` is searched for in the same directory and in `PATH`.

use crate::network::{MachineRecord, Network, NetworkOptions, NetworkRecord, Plugged, PortForwards};
use std::{
    collections::BTreeMap,
    env,
    ffi::OsString,
    fs,
    io::{self, Write as _},
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    process,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{UnixListener, UnixStream},
    time::{sleep, timeout},
};

/// The environment variable that names the file with the [`NetworkRecord`] to run, in the helper's initial working directory.
pub const VARIABLE: &str = "RUDDER_HELPER";
/// The name of the helper program.
const PROGRAM: &str = "rudder-helper";

/// Interval between checks whether the lab's directory still exists.
const CHECK_INTERVAL: Duration = Duration::from_secs(2);

/// The socket, in the lab's directory, on which the helper process listens. A client connects after it has written a new record,
/// and receives [`DONE`] once the network runs as recorded, or an error message.
pub(crate) const CONTROL: &str = "network.ctl";
const DONE: &str = "done\n";
/// How long the helper process may take to answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

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

/// Runs a network until the process is killed, or the directory of its lab is removed.
fn run_network(record: &Path) -> io::Result<std::convert::Infallible> {
    let first = read_record(record)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut running = Running::new(&first);
        let control = running.add(first).and_then(|()| listen());
        let control = control.or_else(|error| expect_directory().and(Err(error)))?;
        loop {
            tokio::select! {
                caller = control.accept() => if let Ok((caller, _)) = caller {
                    let added = read_record(record).and_then(|record| running.add(record));
                    let _ = timeout(ANSWER_LIMIT, answer(caller, added)).await;
                },
                () = sleep(CHECK_INTERVAL) => {}
            }
            expect_directory()?;
        }
    })
}

/// Listens on the control socket.
fn listen() -> io::Result<UnixListener> {
    let _ = fs::remove_file(CONTROL);
    let control = UnixListener::bind(CONTROL)?;
    fs::set_permissions(CONTROL, fs::Permissions::from_mode(0o600))?;
    Ok(control)
}

/// Checks that the directory of the lab was not removed by hand.
fn expect_directory() -> io::Result<()> {
    // A directory without a name has no links (stat(2)).
    if fs::metadata(".")?.nlink() == 0 {
        return Err(io::Error::new(io::ErrorKind::NotFound, "the directory of the lab was removed"));
    }
    Ok(())
}

fn read_record(path: &Path) -> io::Result<NetworkRecord> {
    NetworkRecord::from_json(path, &fs::read(path)?).map_err(io::Error::other)
}

/// Reports to a process that wrote the record whether the network now runs as recorded.
async fn answer(mut caller: UnixStream, added: io::Result<()>) -> io::Result<()> {
    let text = added.map_or_else(|error| error.to_string(), |()| DONE.to_owned());
    caller.write_all(text.as_bytes()).await?;
    caller.shutdown().await
}

/// The network, and the handles that keep its cables and port forwards open.
struct Running {
    network: Arc<Network>,
    machines: BTreeMap<String, (Plugged, PortForwards)>,
}

impl Running {
    fn new(record: &NetworkRecord) -> Self {
        let network = Network::new(&record.network, &NetworkOptions::new(&record.name));
        Self { network: Arc::new(network), machines: BTreeMap::new() }
    }

    /// Adds the machines of a record that the network does not have yet.
    fn add(&mut self, record: NetworkRecord) -> io::Result<()> {
        let is_new = |machine: &MachineRecord| !self.machines.contains_key(&machine.name);
        let new: Vec<_> = record.machines.into_iter().filter(is_new).collect();
        for machine in &new {
            self.network.add_machine(&machine.name, &machine.nics).map_err(io::Error::other)?;
        }
        for machine in new {
            let plugged = self.network.plug(&machine.name, machine.sockets.iter().map(PathBuf::from));
            let forwards = machine.port_forwards.iter().map(|(port, file)| (*port, PathBuf::from(file)));
            let forwards = self.network.forward_ports(&machine.name, forwards)?;
            self.machines.insert(machine.name, (plugged, forwards));
        }
        Ok(())
    }
}

/// Requests over the [control socket](CONTROL) that the helper process run the network as now recorded.
///
/// # Errors
/// `NotFound` and `ConnectionRefused` when there is no helper process; `TimedOut` when it does not answer; `Other` with its message
/// when it cannot.
pub(crate) async fn update(control: &Path) -> io::Result<()> {
    let mut text = String::new();
    let request = async { UnixStream::connect(control).await?.read_to_string(&mut text).await };
    timeout(ANSWER_LIMIT, request).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    if text == DONE { Ok(()) } else { Err(io::Error::other(text)) }
}
