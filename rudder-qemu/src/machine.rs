//! A machine in a lab: a QEMU process while it runs, disks in the lab while it does not.

mod consoles;

use crate::{
    command_line::{self, Extras, Files},
    qmp::Qmp,
    watch::QemuRun,
};
use async_trait::async_trait;
use rudder_core::{
    Error, ErrorKind, Result,
    backend::{BoxedStream, Exit, Machine, MachineSpec, Progress, SerialLog, Stop},
    content::Content,
    module::{CapturedDisk, CapturedState},
};
use rudder_local::{
    capture,
    lab_storage::LabStorage,
    lan::Lan,
    lifecycle::{Lifecycle, Observation, Watcher},
    log_tail::last_lines,
    machine_state::MachineState,
    process::{Invocation, OwnedChild, describe},
    serial::SerialConsole,
    store::LAB_VARIABLE,
    tpm::Tpm,
};
use std::{
    fs::File,
    io,
    process::Stdio,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;

/// How long QEMU may take from its start until it accepts connections.
const LAUNCH_LIMIT: Duration = Duration::from_secs(60);
/// Interval between connection attempts.
const LAUNCH_LOOK: Duration = Duration::from_millis(5);

/// A machine on QEMU.
#[derive(Debug)]
pub(crate) struct QemuMachine {
    storage: Arc<LabStorage>,
    lan: Arc<Lan>,
    spec: MachineSpec,
    files: Files,
    state: MachineState,
    arguments: Vec<String>,
    number: usize,
    lifecycle: Lifecycle,
    running: Mutex<Option<Running>>,
    /// The serial console of the last run.
    console: Mutex<Option<Arc<SerialConsole>>>,
    /// Number of screenshots taken, or started.
    pictures: AtomicUsize,
}

/// The state of a machine that exists only while it runs.
#[derive(Debug)]
struct Running {
    qmp: Qmp,
    orders: mpsc::UnboundedSender<Stop>,
    /// The release switch of each of its processes.
    released: Vec<Arc<AtomicBool>>,
    _watcher: AbortOnDropHandle<()>,
}

impl QemuMachine {
    /// Defines a machine; `number` is unique in the lab.
    pub(crate) async fn define(
        storage: Arc<LabStorage>,
        lan: Arc<Lan>,
        spec: &MachineSpec,
        number: usize,
    ) -> Result<Self> {
        let mut files = Files::new(number);
        files.nics.truncate(spec.nics.len());
        for device in command_line::devices(spec) {
            storage.host().require_device(device)?;
        }
        let extras = Extras {
            panic: storage.host().has_device("pvpanic"),
            random: storage.host().has_device("virtio-rng-pci"),
        };
        let state = MachineState::prepare(&storage, spec, number).await?;
        let mark = format!("rudder-{}", storage.id());
        let machine = command_line::Machine {
            mark: &mark,
            spec,
            network: storage.network()?,
            files: &files,
            accelerator: storage.host().accelerator(),
            flash: state.flash(),
            tpm_socket: state.tpm_socket(),
        };
        let arguments = command_line::arguments(&machine, extras)?;
        let seed = spec.seed.as_ref().map(|seed| (&files.seed, &seed.image));
        let floppy = spec.floppy.as_ref().map(|image| (&files.floppy, image));
        for (file, image) in seed.into_iter().chain(floppy) {
            let path = storage.path(file);
            let written = tokio::fs::write(&path, image).await;
            written.map_err(|error| Error::io(format_args!("write {}", path.display()), error))?;
        }
        // Last, so that a machine that could not be defined is not on the network.
        lan.add(spec, number)?;
        let lifecycle = Lifecycle::new(&spec.name);
        let spec = spec.clone();
        let (running, console) = (Mutex::new(None), Mutex::new(None));
        Ok(Self {
            storage,
            lan,
            spec,
            files,
            state,
            arguments,
            number,
            lifecycle,
            running,
            console,
            pictures: AtomicUsize::new(0),
        })
    }

    fn running(&self) -> MutexGuard<'_, Option<Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns something that exists only while the machine runs.
    fn with_running<T>(&self, what: impl FnOnce(&Running) -> T) -> Result<T> {
        self.lifecycle.check_running()?;
        self.running().as_ref().map(what).ok_or_else(|| {
            self.error(ErrorKind::Conflict, "expected a running machine, but found that it does not run")
        })
    }

    fn error(&self, kind: ErrorKind, message: impl Into<std::borrow::Cow<'static, str>>) -> Error {
        Error::new(kind, message).with_context("vm", &self.spec.name)
    }

    fn order(&self, order: Stop) {
        if let Some(running) = &*self.running() {
            // The watcher does not receive it if the machine has just ended.
            let _ = running.orders.send(order);
        }
    }

    /// Lets its processes outlive this one.
    pub(crate) fn release(&self) {
        if let Some(running) = &*self.running() {
            for switch in &running.released {
                switch.store(true, Ordering::Relaxed);
            }
        }
        if let Some(console) = self.console() {
            console.let_go();
        }
    }

    /// Drops its watcher without waiting, which kills its process unless that was released.
    pub(crate) fn abandon(&self) {
        drop(self.running().take());
    }

    /// Ends the machine if it is running or starting.
    pub(crate) async fn end(&self) {
        self.lifecycle.started().await;
        self.order(Stop::Kill);
        self.lifecycle.rest().await;
    }

    async fn launch(&self) -> Result<Launched> {
        let Files { qmp, display, serial, console, picture, .. } = &self.files;
        for file in [qmp, display, serial, console, picture] {
            match tokio::fs::remove_file(self.storage.path(file)).await {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(Error::io(format_args!("remove {file} of the last run"), error));
                }
                _ => {}
            }
        }
        self.lan.clear(&self.storage, &self.spec.name)?;
        let log_path = self.storage.path(&self.files.log);
        let failed = |error| Error::io(format_args!("write {}", log_path.display()), error);
        let log = File::create(&log_path).map_err(failed)?;
        let tpm = self.state.start_tpm().await?;
        let mut child = Invocation::new(self.storage.host().qemu(), self.storage.lifetime())
            .args(&self.arguments)
            .directory(self.storage.dir().path())
            .variable(LAB_VARIABLE, self.storage.id().as_str())
            .spawn(Stdio::null(), log.try_clone().map_err(failed)?.into(), log.into())
            .await?;
        let talk = async {
            self.storage.record_process(child.pid(), "qemu", &self.spec.name).await?;
            let (qmp, reports) = self.connect(&mut child).await?;
            // Before the guest runs, so that none of its output is lost.
            let console = self.attach_console().await?;
            self.lan.connect(&self.storage, &self.spec.name, self.lifecycle.rest()).await?;
            qmp.cont().await?;
            Ok((qmp, reports, console))
        };
        match tokio::time::timeout(LAUNCH_LIMIT, talk).await {
            Ok(Ok((qmp, reports, console))) => Ok(Launched { child, tpm, qmp, reports, console }),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(Error::new(
                ErrorKind::LaunchFailed,
                format!("expected QEMU to answer within {} s, but it did not", LAUNCH_LIMIT.as_secs()),
            )),
        }
    }

    /// Describes how to access the machine, with the serial console on this socket.
    fn access_by(&self, serial: &str) -> Vec<String> {
        if self.with_running(|_| ()).is_err() {
            return Vec::new();
        }
        let name = &self.spec.name;
        let mut lines = self.lan.access(&self.storage, &self.spec);
        let path = |file: &str| self.storage.path(file).display().to_string();
        lines.push(format!("{name}: display: vncviewer {}", path(&self.files.display)));
        lines.push(format!("{name}: serial console: nc -U {}", path(serial)));
        lines
    }

    /// Waits until QEMU accepts a connection or has ended.
    async fn connect(&self, child: &mut OwnedChild) -> Result<(Qmp, mpsc::UnboundedReceiver<Observation>)> {
        let socket = self.storage.socket(&self.files.qmp);
        loop {
            let attempt = async {
                match Qmp::connect(&socket).await {
                    Ok(connected) => Some(connected),
                    Err(_) => {
                        tokio::time::sleep(LAUNCH_LOOK).await;
                        None
                    }
                }
            };
            tokio::select! {
                status = child.wait() => {
                    let ended = status.map_or_else(|error| error.to_string(), describe);
                    let said = last_lines(&self.storage.path(&self.files.log)).await;
                    let said = if said.is_empty() { ended } else { said };
                    return Err(Error::new(ErrorKind::LaunchFailed, format!("QEMU refused to start: {said}")));
                }
                connected = attempt => if let Some(connected) = connected {
                    return Ok(connected);
                }
            }
        }
    }

    fn disk(&self, name: &str) -> Result<usize> {
        self.spec.disks.iter().position(|disk| disk.name == name).ok_or_else(|| {
            self.error(ErrorKind::NotFound, format!("expected a disk of the machine, but found {name:?}"))
        })
    }
}

struct Launched {
    child: OwnedChild,
    tpm: Option<Tpm>,
    qmp: Qmp,
    reports: mpsc::UnboundedReceiver<Observation>,
    console: Arc<SerialConsole>,
}

#[async_trait]
impl Machine for QemuMachine {
    fn name(&self) -> &str {
        &self.spec.name
    }

    async fn start(&self) -> Result<()> {
        let starting = self.lifecycle.start()?;
        let launched = self.launch().await.map_err(|error| error.with_context("vm", &self.spec.name))?;
        let Launched { child, tpm, qmp, reports, console } = launched;
        let (orders, received) = mpsc::unbounded_channel();
        let released = std::iter::once(child.release_switch()).chain(tpm.iter().map(Tpm::release_switch));
        let released = released.collect();
        *self.console.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&console));
        let run = QemuRun::new(
            child,
            qmp.clone(),
            reports,
            self.storage.path(&self.files.log),
            self.storage.path(&format!("last.{}", self.files.picture)),
        );
        let mut running = self.running();
        let watcher = Watcher {
            run,
            tpm,
            console,
            orders: received,
            screenshot: self.storage.path(&self.files.picture),
            running: starting.finish(),
        };
        let watcher = AbortOnDropHandle::new(tokio::spawn(watcher.run()));
        *running = Some(Running { qmp, orders, released, _watcher: watcher });
        Ok(())
    }

    async fn wait(&self) -> Result<Exit> {
        self.lifecycle.wait().await
    }

    async fn stop(&self, how: Stop) -> Result<Exit> {
        // A machine that is being started is stopped once it runs.
        self.lifecycle.started().await;
        self.order(how);
        self.lifecycle.wait().await
    }

    async fn dial(&self, port: u16) -> Result<BoxedStream> {
        self.with_running(|_| ())?;
        self.lan.dial(&self.storage, &self.spec, port).await
    }

    async fn display(&self) -> Result<BoxedStream> {
        self.open_socket(&self.files.display, "display").await
    }

    async fn serial(&self) -> Result<BoxedStream> {
        self.connect_console().await
    }

    async fn serial_log(&self, from: u64) -> Result<SerialLog> {
        Ok(self.console().map_or_else(SerialLog::empty, |console| console.log(from)))
    }

    async fn screenshot(&self) -> Result<Vec<u8>> {
        self.picture().await
    }

    fn proxy_command(&self, port: u16) -> Option<String> {
        self.with_running(|_| ()).ok()?;
        self.lan.proxy_command(&self.storage, &self.spec.name, port)
    }

    fn access(&self) -> Vec<String> {
        self.access_by(self.console_socket())
    }

    async fn capture(&self, disk: &str, progress: &Progress) -> Result<CapturedDisk> {
        let index = self.disk(disk)?;
        let _disks = self.lifecycle.at_rest()?;
        let disk = &self.spec.disks[index];
        let file = format!("m{}.d{index}.captured.qcow2", self.number);
        let captured = capture::capture(&self.storage, &disk.volume.id, &file, &disk.name, progress).await;
        let captured = captured
            .map_err(|error| error.with_context("disk", &disk.name).with_context("vm", &self.spec.name))?;
        Ok(CapturedDisk::new(
            disk.name.clone(),
            disk.bus,
            file,
            "qcow2",
            captured.virtual_size,
            Content::of_bytes(captured.size, captured.sha256),
        ))
    }

    async fn capture_state(&self) -> Result<Vec<CapturedState>> {
        let _disks = self.lifecycle.at_rest()?;
        self.state.capture().await.map_err(|error| error.with_context("vm", &self.spec.name))
    }
}
