//! The network of a lab: its switches and routers, the cables to QEMU's NICs, the sockets through which a person connects to
//! machines, and the process that runs all of it once the lab was kept.

use crate::{
    helper::{self, HelperProgram},
    lab_storage::{LabStorage, blocking},
    network::{Network, NetworkOptions, Plugged, PortForwards},
    nic_arguments::nic_socket,
    process::{Invocation, Lifetime, OwnedChild, describe},
    store::LAB_VARIABLE,
};
use rudder_core::{
    Error, ErrorKind, Result,
    backend::{BoxedStream, MachineSpec, Served, Site},
    plan::PlannedNetwork,
};
use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::Path,
    process::Stdio,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::Ordering},
    time::Duration,
};
use tokio::net::UnixStream;
use tokio_util::task::AbortOnDropHandle;

/// The file, in a kept lab's directory, with the network that the helper process runs.
const RECORD: &str = "network.json";
/// The file with the output of the helper process.
const LOG: &str = "network.log";
/// Time limit for the helper process to run the network, and the interval between checks whether it does.
const HELPER_LIMIT: Duration = Duration::from_secs(30);
const HELPER_LOOK: Duration = Duration::from_millis(5);
/// Time limit for QEMU to listen for its NICs.
const CONNECT_LIMIT: Duration = Duration::from_secs(30);

/// The network of a lab.
#[derive(Debug)]
pub struct Lan {
    running: Mutex<Running>,
}

#[derive(Debug)]
struct Running {
    /// `None` once another process runs it.
    network: Option<Arc<Network>>,
    machines: BTreeMap<String, Machine>,
    /// What a person should know about a network that was handed over.
    told: Vec<String>,
}

/// A machine on the network.
#[derive(Debug)]
struct Machine {
    number: usize,
    nics: usize,
    ports: Vec<u16>,
    /// The task that holds its cables and doors while it runs.
    connected: Option<AbortOnDropHandle<()>>,
}

impl Machine {
    fn sockets(&self) -> impl Iterator<Item = String> {
        let number = self.number;
        (0..self.nics).map(move |index| nic_socket(number, index))
    }

    fn doors(&self) -> impl Iterator<Item = (u16, String)> {
        let number = self.number;
        // Without a NIC no port can be reached.
        self.ports.iter().filter(|_| self.nics > 0).map(move |port| (*port, door(number, *port)))
    }
}

/// Returns the file of the socket that leads to a port of a machine.
fn door(number: usize, port: u16) -> String {
    format!("m{number}.p{port}")
}

impl Lan {
    /// Creates the network of a lab of this name.
    #[must_use]
    pub fn new(plan: &PlannedNetwork, name: &str) -> Self {
        let network = Some(Arc::new(Network::new(plan, &NetworkOptions::new(name))));
        Self { running: Mutex::new(Running { network, machines: BTreeMap::new(), told: Vec::new() }) }
    }

    fn running(&self) -> MutexGuard<'_, Running> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the files of the sockets on which QEMU listens for the NICs of the machine with this number, in order.
    #[must_use]
    pub fn sockets(number: usize, spec: &MachineSpec) -> Vec<String> {
        (0..spec.nics.len()).map(|index| nic_socket(number, index)).collect()
    }

    /// Adds a machine with this number in the lab.
    ///
    /// # Errors
    /// `InvalidInput` for a NIC in no subnet of the lab; `Conflict` when the network has a machine of this name, or is run by
    /// another process.
    pub fn add(&self, spec: &MachineSpec, number: usize) -> Result<()> {
        let mut running = self.running();
        let Some(network) = &running.network else {
            return Err(Error::new(
                ErrorKind::Conflict,
                "expected a lab that was not kept, but found a kept one",
            ));
        };
        network.add_machine(&spec.name, &spec.nics).map_err(|error| error.with_context("vm", &spec.name))?;
        let machine = Machine { number, nics: spec.nics.len(), ports: spec.ports.clone(), connected: None };
        running.machines.insert(spec.name.clone(), machine);
        Ok(())
    }

    /// Removes a machine that could not be defined.
    pub fn remove(&self, name: &str) {
        let mut running = self.running();
        running.machines.remove(name);
        if let Some(network) = &running.network {
            network.remove_machine(name);
        }
    }

    /// Removes the sockets of the last run of a machine, on which nothing listens any more.
    ///
    /// # Errors
    /// File errors.
    pub fn clear(&self, storage: &LabStorage, name: &str) -> Result<()> {
        let mut running = self.running();
        let Some(machine) = running.machines.get_mut(name) else { return Ok(()) };
        machine.connected = None;
        let files: Vec<String> = machine.sockets().chain(machine.doors().map(|(_, file)| file)).collect();
        files.iter().try_for_each(|file| remove_file(&storage.path(file)))
    }

    /// Connects a machine whose process was started and whose guest does not run yet, until `ended` completes.
    ///
    /// # Errors
    /// `LaunchFailed` when QEMU does not listen for a NIC; `Io` when the sockets for people cannot be made.
    pub async fn connect(
        &self,
        storage: &LabStorage,
        name: &str,
        ended: impl Future<Output = ()> + Send + 'static,
    ) -> Result<()> {
        let Some((mut plugged, doors)) = self.plug(storage, name)? else { return Ok(()) };
        if tokio::time::timeout(CONNECT_LIMIT, plugged.connected()).await.is_err() {
            let limit = CONNECT_LIMIT.as_secs();
            let message = format!("expected QEMU to listen for each NIC within {limit} s, but it does not");
            return Err(Error::new(ErrorKind::LaunchFailed, message));
        }
        let connected = async move {
            let _connected = (plugged, doors);
            ended.await;
        };
        if let Some(machine) = self.running().machines.get_mut(name) {
            machine.connected = Some(AbortOnDropHandle::new(tokio::spawn(connected)));
        }
        Ok(())
    }

    /// Plugs in the cables of a machine, and opens its doors; `None` when the network does not run in this process.
    fn plug(&self, storage: &LabStorage, name: &str) -> Result<Option<(Plugged, PortForwards)>> {
        let running = self.running();
        let Some(network) = &running.network else { return Ok(None) };
        let Some(machine) = running.machines.get(name) else { return Ok(None) };
        for file in machine.sockets() {
            // QEMU creates them with permissions according to the umask. The directory is closed to others anyway.
            let _ = fs::set_permissions(storage.path(&file), fs::Permissions::from_mode(0o600));
        }
        let plugged = network.plug(name, machine.sockets().map(|file| storage.socket(&file)));
        let doors = machine.doors().map(|(port, file)| (port, storage.socket(&file)));
        let doors = network.forward_ports(name, doors);
        let doors = doors.map_err(|error| Error::io("make the sockets that lead to the machine", error))?;
        Ok(Some((plugged, doors)))
    }

    /// Connects to a port of a running machine, as [`Machine::dial`](rudder_core::backend::Machine::dial) promises.
    ///
    /// # Errors
    /// As `Machine::dial`.
    pub async fn dial(&self, storage: &LabStorage, spec: &MachineSpec, port: u16) -> Result<BoxedStream> {
        let error =
            |kind: ErrorKind, message: String| Error::new(kind, message).with_context("vm", &spec.name);
        let not_reached = || {
            error(ErrorKind::InvalidInput, format!("expected one of the machine's ports, but found {port}"))
                .with_help(
                    "add the port to MachineSpec::ports, and a NIC on a subnet that is not unmanaged to the machine",
                )
        };
        if !spec.ports.contains(&port) || spec.nics.is_empty() {
            return Err(not_reached());
        }
        let network = self.running().network.clone();
        let dialled: io::Result<BoxedStream> = match network {
            Some(network) => {
                network.dial(&spec.name, port).await.map(|stream| Box::new(stream) as BoxedStream)
            }
            None => {
                let door = self.running().machines.get(&spec.name).map(|machine| door(machine.number, port));
                let connected = UnixStream::connect(storage.socket(&door.unwrap_or_default())).await;
                connected.map(|stream| Box::new(stream) as BoxedStream)
            }
        };
        dialled.map_err(|source| match source.kind() {
            io::ErrorKind::NotConnected => not_reached(),
            _ => error(ErrorKind::GuestUnreachable, format!("cannot connect to port {port} of the guest"))
                .with_source(source),
        })
    }

    /// Serves files to the machines of the lab, as [`Lab::serve`](rudder_core::backend::Lab::serve) promises.
    ///
    /// # Errors
    /// `Conflict` when the lab was kept.
    pub fn serve(&self, site: Site) -> Result<Served> {
        match self.running().network.clone() {
            Some(network) => Ok(network.serve(site)),
            None => {
                let message = "expected a lab that was not kept, but found a kept one";
                Err(Error::new(ErrorKind::Conflict, message))
            }
        }
    }

    /// Returns a shell command for this host whose standard input and output are connected to a port of a machine.
    #[must_use]
    pub fn proxy_command(&self, storage: &LabStorage, name: &str, port: u16) -> Option<String> {
        let running = self.running();
        let (_, file) = running.machines.get(name)?.doors().find(|(known, _)| *known == port)?;
        // Runs in the directory, because a socket's address has at most 107 bytes (unix(7)). A single command instead of a list,
        // because ssh runs it behind `exec` (ssh_config(5), ProxyCommand).
        Some(format!("env --chdir={} nc -U {file}", quoted(&storage.dir().path().display().to_string())))
    }

    /// Returns how a person connects to the ports of a machine, one line per port.
    #[must_use]
    pub fn access(&self, storage: &LabStorage, spec: &MachineSpec) -> Vec<String> {
        let lines = spec.ports.iter().filter_map(|port| {
            let command = self.proxy_command(storage, &spec.name, *port)?;
            let name = &spec.name;
            // OpenSSH replaces tokens that begin with a percent sign (ssh_config(5)).
            let option = quoted(&format!("ProxyCommand={}", command.replace('%', "%%")));
            Some(format!("{name}: port {port} of the guest: {command} (ssh -o {option} USER@{name})"))
        });
        lines.collect()
    }

    /// Hands the network over to the helper process, which outlives this one; returns what a person should know. May be repeated.
    ///
    /// # Errors
    /// File errors.
    pub async fn hand_over(&self, storage: &Arc<LabStorage>) -> Result<Vec<String>> {
        let told = self.hand_over_once(storage).await?;
        let mut running = self.running();
        running.told.extend(told);
        Ok(running.told.clone())
    }

    async fn hand_over_once(&self, storage: &Arc<LabStorage>) -> Result<Vec<String>> {
        let (record, doors) = {
            let mut running = self.running();
            let Some(network) = running.network.take() else { return Ok(Vec::new()) };
            let mut record = network.record();
            let mut doors = Vec::new();
            for recorded in &mut record.machines {
                let Some(machine) = running.machines.get_mut(&recorded.name) else { continue };
                recorded.sockets = machine.sockets().collect();
                // A machine that is not running has no doors.
                if machine.connected.take().is_some_and(|connected| !connected.is_finished()) {
                    recorded.port_forwards = machine.doors().collect();
                }
                doors.extend(machine.doors().map(|(_, file)| storage.path(&file)));
            }
            (record, doors)
        };
        doors.iter().try_for_each(|door| remove_file(door))?;
        let text = serde_json::to_vec_pretty(&record).unwrap_or_default();
        let path = storage.path(RECORD);
        blocking(move || write_new(&path, &text)).await?;
        let Some(program) = storage.host().helper.clone().or_else(HelperProgram::find) else {
            return Ok(vec![
                "the network of the lab has ended, and its machines are reached over their consoles only: to keep it, call \
                 rudder::helper::run() first in main, or install rudder-helper"
                    .to_owned(),
            ]);
        };
        let waited: Vec<_> = record.machines.iter().flat_map(|machine| &machine.port_forwards).collect();
        let waited: Vec<_> = waited.iter().map(|(_, file)| storage.path(file)).collect();
        match start_helper(storage, &program, &waited).await {
            Ok(()) => Ok(Vec::new()),
            Err(error) => {
                tracing::warn!(error = error.report(), "cannot keep the network of a lab");
                Ok(vec![format!("the network of the lab has ended: {error}")])
            }
        }
    }
}

/// Starts the helper process, and waits until it runs the network.
async fn start_helper(
    storage: &Arc<LabStorage>,
    program: &HelperProgram,
    doors: &[std::path::PathBuf],
) -> Result<()> {
    let path = storage.path(LOG);
    let failed = |error| Error::io(format_args!("write {}", path.display()), error);
    let log = fs::File::create(&path).map_err(failed)?;
    let mut child = Invocation::new(&program.path, Lifetime::Kept)
        .args(program.arguments.iter().cloned())
        .directory(storage.dir().path())
        .variable(LAB_VARIABLE, storage.id().as_str())
        .variable(helper::VARIABLE, RECORD)
        .spawn(Stdio::null(), log.try_clone().map_err(failed)?.into(), log.into())
        .await?;
    if let Some(pid) = child.pid() {
        let recorded = Arc::clone(storage);
        blocking(move || recorded.dir().record_process(pid, "network of the lab")).await?;
    }
    let ready = await_doors(&mut child, doors);
    tokio::time::timeout(HELPER_LIMIT, ready).await.map_err(|_| {
        let limit = HELPER_LIMIT.as_secs();
        let message =
            format!("expected the helper process to run the network within {limit} s, but it did not");
        Error::new(ErrorKind::LaunchFailed, message)
    })??;
    child.release_switch().store(true, Ordering::Relaxed);
    Ok(())
}

async fn await_doors(child: &mut OwnedChild, doors: &[std::path::PathBuf]) -> Result<()> {
    while !doors.iter().all(|door| door.exists()) {
        tokio::select! {
            ended = child.wait() => {
                let ended = ended.map_or_else(|error| error.to_string(), describe);
                return Err(Error::new(ErrorKind::LaunchFailed, format!("the helper process {ended}")));
            }
            () = tokio::time::sleep(HELPER_LOOK) => {}
        }
    }
    Ok(())
}

fn remove_file(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::io(format_args!("remove {}", path.display()), error))
        }
        _ => Ok(()),
    }
}

/// Writes a new file that only its owner can read.
fn write_new(path: &Path, bytes: &[u8]) -> Result<()> {
    use io::Write as _;
    let file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path);
    file.and_then(|mut file| file.write_all(bytes))
        .map_err(|error| Error::io(format_args!("write {}", path.display()), error))
}

/// Quotes a text as one word for a POSIX shell.
fn quoted(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        return text.to_owned();
    }
    format!("'{}'", text.replace('\'', r"'\''"))
}
