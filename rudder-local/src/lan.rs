//! The network of a lab: its switches and routers, the cables to QEMU's NICs, the sockets through which a person connects to
//! machines, and the process that runs all of it once the lab is kept.

use crate::{
    helper::{self, CONTROL, HelperProgram},
    lab_storage::{LabStorage, blocking},
    network::{Network, NetworkOptions, Plugged, PortForwards},
    nic_arguments::nic_socket,
    process::{Invocation, Lifetime, OwnedChild, describe},
    store::LAB_VARIABLE,
};
use rudder_core::{
    Error, ErrorKind, Result,
    backend::{BoxedStream, LabSpec, MachineSpec, Retention, Served, Site},
    files::replace_file,
};
use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::Stdio,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::Ordering},
    time::Duration,
};
use tokio::{net::UnixStream, time::timeout};
use tokio_util::task::AbortOnDropHandle;

/// The file, in a kept lab's directory, with the network that the helper process runs.
const RECORD: &str = "network.json";
/// The file with the output of the helper process.
const LOG: &str = "network.log";
/// Time limit for the helper process to run the network, and the interval between checks whether it does.
const HELPER_LIMIT: Duration = Duration::from_secs(30);
const HELPER_POLL_INTERVAL: Duration = Duration::from_millis(5);
/// Time limit for QEMU to listen for its NICs.
const CONNECT_LIMIT: Duration = Duration::from_secs(30);

/// The network of a lab.
#[derive(Debug)]
pub struct Lan {
    running: Mutex<Running>,
    /// Held while the helper process is started or updated.
    helper: tokio::sync::Mutex<()>,
}

#[derive(Debug)]
struct Running {
    network: RunBy,
    machines: BTreeMap<String, Machine>,
    /// What a person should know about a network that was handed over.
    notices: Vec<String>,
}

/// The process that runs a network.
#[derive(Debug)]
enum RunBy {
    /// This process.
    This(Arc<Network>),
    /// The helper process. Machines are added to a copy of its network, without cables, so that they get their addresses. There is
    /// no copy of the network of a lab that was kept later, or attached to: no machine can be added to it.
    Helper(Option<Arc<Network>>),
}

impl RunBy {
    fn this(&self) -> Option<Arc<Network>> {
        match self {
            Self::This(network) => Some(Arc::clone(network)),
            Self::Helper(_) => None,
        }
    }

    /// Returns the network that machines are added to.
    fn plan(&self) -> Option<&Arc<Network>> {
        match self {
            Self::This(network) => Some(network),
            Self::Helper(copy) => copy.as_ref(),
        }
    }
}

/// A machine on the network.
#[derive(Debug)]
struct Machine {
    number: usize,
    nics: usize,
    ports: Vec<u16>,
    /// The task that holds its cables and its sockets for ports while it runs.
    connected: Option<AbortOnDropHandle<()>>,
}

impl Machine {
    fn new(spec: &MachineSpec, number: usize) -> Self {
        Self { number, nics: spec.nics.len(), ports: spec.ports.clone(), connected: None }
    }

    fn sockets(&self) -> impl Iterator<Item = String> {
        let number = self.number;
        (0..self.nics).map(move |index| nic_socket(number, index))
    }

    fn port_forwards(&self) -> impl Iterator<Item = (u16, String)> {
        let number = self.number;
        // Without a NIC no port can be reached.
        self.ports.iter().filter(|_| self.nics > 0).map(move |port| (*port, forward_socket(number, *port)))
    }
}

/// Returns the file of the socket that leads to a port of a machine.
fn forward_socket(number: usize, port: u16) -> String {
    format!("m{number}.p{port}")
}

impl Lan {
    /// Creates the network of a lab: this process runs it, unless the lab is to outlive this process.
    #[must_use]
    pub fn new(spec: &LabSpec) -> Self {
        let network = Arc::new(Network::new(&spec.network, &NetworkOptions::new(&spec.name)));
        Self::run_by(match spec.retention {
            Retention::UntilRemoved { .. } => RunBy::Helper(Some(network)),
            _ => RunBy::This(network),
        })
    }

    /// Returns the network of a lab that was attached to. Its machines are then [adopted](Self::adopt).
    #[must_use]
    pub fn attached() -> Self {
        Self::run_by(RunBy::Helper(None))
    }

    fn run_by(network: RunBy) -> Self {
        let running = Running { network, machines: BTreeMap::new(), notices: Vec::new() };
        Self { running: Mutex::new(running), helper: tokio::sync::Mutex::default() }
    }

    /// Checks that the network can outlive this process, if it has to.
    ///
    /// # Errors
    /// `HostMissing` when there is no helper program.
    pub fn check(&self, storage: &LabStorage) -> Result<()> {
        match self.running().network {
            RunBy::This(_) => Ok(()),
            RunBy::Helper(_) => helper_of(storage).map(drop),
        }
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
    /// `InvalidInput` for a NIC in no subnet of the lab; `Conflict` when the network has a machine of this name; `Unsupported` when
    /// the lab was kept or attached to.
    pub fn add(&self, spec: &MachineSpec, number: usize) -> Result<()> {
        let mut running = self.running();
        let Some(network) = running.network.plan() else {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "cannot add a machine to a lab that was kept or attached to",
            ));
        };
        network.add_machine(&spec.name, &spec.nics).map_err(|error| error.with_context("vm", &spec.name))?;
        running.machines.insert(spec.name.clone(), Machine::new(spec, number));
        Ok(())
    }

    /// Adds a machine of an [attached](Self::attached) lab, which the network already contains.
    pub fn adopt(&self, spec: &MachineSpec, number: usize) {
        self.running().machines.insert(spec.name.clone(), Machine::new(spec, number));
    }

    /// Removes a machine that could not be defined.
    pub fn remove(&self, name: &str) {
        let mut running = self.running();
        running.machines.remove(name);
        if let Some(network) = running.network.plan() {
            network.remove_machine(name);
        }
    }

    /// Removes the sockets of the previous run of a machine, on which nothing listens any more.
    ///
    /// # Errors
    /// File errors.
    pub fn clear(&self, storage: &LabStorage, name: &str) -> Result<()> {
        let mut running = self.running();
        let Some(machine) = running.machines.get_mut(name) else { return Ok(()) };
        machine.connected = None;
        let mut files: Vec<String> = machine.sockets().collect();
        // The sockets of a network that the helper process runs stay open.
        if running.network.this().is_some() {
            files.extend(
                running.machines.get(name).into_iter().flat_map(Machine::port_forwards).map(|(_, file)| file),
            );
        }
        files.iter().try_for_each(|file| remove_file(&storage.path(file)))
    }

    /// Connects a machine whose process was started and whose guest does not run yet, until `ended` completes.
    ///
    /// # Errors
    /// `LaunchFailed` when QEMU does not listen for a NIC; `Io` when the sockets for its ports cannot be created.
    pub async fn connect(
        &self,
        storage: &Arc<LabStorage>,
        name: &str,
        ended: impl Future<Output = ()> + Send + 'static,
    ) -> Result<()> {
        let not_listening = |_| {
            let limit = CONNECT_LIMIT.as_secs();
            let message = format!("expected QEMU to listen for each NIC within {limit} s, but it does not");
            Error::new(ErrorKind::LaunchFailed, message)
        };
        let Some((mut plugged, port_forwards)) = self.plug(storage, name)? else {
            let sockets: Vec<_> =
                self.running().machines.get(name).into_iter().flat_map(Machine::sockets).collect();
            timeout(CONNECT_LIMIT, listening(storage, &sockets)).await.map_err(not_listening)?;
            return self.update_helper(storage).await;
        };
        timeout(CONNECT_LIMIT, plugged.connected()).await.map_err(not_listening)?;
        let connected = async move {
            let _connected = (plugged, port_forwards);
            ended.await;
        };
        if let Some(machine) = self.running().machines.get_mut(name) {
            machine.connected = Some(AbortOnDropHandle::new(tokio::spawn(connected)));
        }
        Ok(())
    }

    /// Plugs in the cables of a machine, and opens the sockets for its ports; `None` when the network does not run in this process.
    fn plug(&self, storage: &LabStorage, name: &str) -> Result<Option<(Plugged, PortForwards)>> {
        let running = self.running();
        let Some(network) = running.network.this() else { return Ok(None) };
        let Some(machine) = running.machines.get(name) else { return Ok(None) };
        for file in machine.sockets() {
            // QEMU creates them with permissions according to the umask. The directory is closed to others anyway.
            let _ = fs::set_permissions(storage.path(&file), fs::Permissions::from_mode(0o600));
        }
        let plugged = network.plug(name, machine.sockets().map(|file| storage.socket(&file)));
        let port_forwards = machine.port_forwards().map(|(port, file)| (port, storage.socket(&file)));
        let port_forwards = network.forward_ports(name, port_forwards);
        let port_forwards =
            port_forwards.map_err(|error| Error::io("create the sockets for the machine's ports", error))?;
        Ok(Some((plugged, port_forwards)))
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
        let network = self.running().network.this();
        let dialled: io::Result<BoxedStream> = match network {
            Some(network) => {
                network.dial(&spec.name, port).await.map(|stream| Box::new(stream) as BoxedStream)
            }
            None => {
                let socket = self
                    .running()
                    .machines
                    .get(&spec.name)
                    .map(|machine| forward_socket(machine.number, port));
                let connected = UnixStream::connect(storage.socket(&socket.unwrap_or_default())).await;
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
    /// `Unsupported` when the lab outlives this process.
    pub fn serve(&self, site: Site) -> Result<Served> {
        match self.running().network.this() {
            Some(network) => Ok(network.serve(site)),
            None => {
                let message = "cannot serve files in a lab that outlives this process";
                Err(Error::new(ErrorKind::Unsupported, message))
            }
        }
    }

    /// Returns a shell command for this host whose standard input and output are connected to a port of a machine.
    #[must_use]
    pub fn proxy_command(&self, storage: &LabStorage, name: &str, port: u16) -> Option<String> {
        let running = self.running();
        let (_, file) = running.machines.get(name)?.port_forwards().find(|(known, _)| *known == port)?;
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
        let network = {
            let mut running = self.running();
            let network = running.network.this();
            if network.is_some() {
                running.network = RunBy::Helper(network.clone());
                running.machines.values_mut().for_each(|machine| machine.connected = None);
            }
            network
        };
        if network.is_some() {
            let notice = match helper_of(storage) {
                Err(_) => Some(
                    "the network of the lab has ended, so its machines can be reached only over their consoles; to keep the \
                     network, call rudder::helper::run() first in main, or install rudder-helper"
                        .to_owned(),
                ),
                Ok(_) => self.update_helper(storage).await.err().map(|error| {
                    tracing::warn!(error = error.report(), "cannot keep the network of a lab");
                    format!("the network of the lab has ended: {error}")
                }),
            };
            let mut running = self.running();
            running.notices.extend(notice);
            running.network = RunBy::Helper(None);
        }
        Ok(self.running().notices.clone())
    }

    /// Makes the helper process run the network with all machines. Starts the process if it does not run.
    async fn update_helper(&self, storage: &Arc<LabStorage>) -> Result<()> {
        let _alone = self.helper.lock().await;
        let record = {
            let running = self.running();
            running.network.plan().map(|network| {
                let mut record = network.record();
                for recorded in &mut record.machines {
                    let Some(machine) = running.machines.get(&recorded.name) else { continue };
                    recorded.sockets = machine.sockets().collect();
                    recorded.port_forwards = machine.port_forwards().collect();
                }
                record
            })
        };
        if let Some(record) = record {
            let text = serde_json::to_vec_pretty(&record).unwrap_or_default();
            let path = storage.path(RECORD);
            blocking(move || replace_file(&path, &text)).await?;
        }
        match helper::update(&storage.socket(CONTROL)).await {
            Ok(()) => Ok(()),
            Err(error)
                if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) =>
            {
                start_helper(storage).await
            }
            Err(error) => Err(refused(error)),
        }
    }
}

/// Waits until QEMU listens for every NIC. It may have accepted the helper process already; a further connection then waits.
async fn listening(storage: &LabStorage, sockets: &[String]) {
    for socket in sockets {
        while UnixStream::connect(storage.socket(socket)).await.is_err() {
            tokio::time::sleep(HELPER_POLL_INTERVAL).await;
        }
    }
}

/// Returns the helper program.
fn helper_of(storage: &LabStorage) -> Result<HelperProgram> {
    storage.host().helper.clone().or_else(HelperProgram::find).ok_or_else(|| {
        let message = "expected the program rudder-helper, which runs the network of a lab that outlives this process, but found none";
        Error::new(ErrorKind::HostMissing, message)
            .with_help("call rudder::helper::run() first in main, or install rudder-helper beside this program or in PATH")
    })
}

fn refused(source: io::Error) -> Error {
    Error::new(ErrorKind::LaunchFailed, "the helper process cannot run the network of the lab")
        .with_source(source)
}

/// Starts the helper process, and waits until it runs the network.
async fn start_helper(storage: &Arc<LabStorage>) -> Result<()> {
    let program = helper_of(storage)?;
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
    timeout(HELPER_LIMIT, answers(&mut child, storage)).await.map_err(|_| {
        let limit = HELPER_LIMIT.as_secs();
        let message =
            format!("expected the helper process to run the network within {limit} s, but it did not");
        Error::new(ErrorKind::LaunchFailed, message)
    })??;
    child.release_switch().store(true, Ordering::Relaxed);
    Ok(())
}

/// Waits until the helper process answers.
async fn answers(child: &mut OwnedChild, storage: &LabStorage) -> Result<()> {
    let control = storage.socket(CONTROL);
    loop {
        tokio::select! {
            ended = child.wait() => {
                let ended = ended.map_or_else(|error| error.to_string(), describe);
                return Err(Error::new(ErrorKind::LaunchFailed, format!("the helper process {ended}")));
            }
            answer = helper::update(&control) => match answer {
                Ok(()) => return Ok(()),
                Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
                    tokio::time::sleep(HELPER_POLL_INTERVAL).await;
                }
                Err(error) => return Err(refused(error)),
            },
        }
    }
}

fn remove_file(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::io(format_args!("remove {}", path.display()), error))
        }
        _ => Ok(()),
    }
}

/// Quotes a text as a single argument for a POSIX shell.
fn quoted(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        return text.to_owned();
    }
    format!("'{}'", text.replace('\'', r"'\''"))
}
