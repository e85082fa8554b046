//! A machine in a lab on this host: its disks and sockets in the lab's directory, and its life, whatever hypervisor runs
//! it.
//!
//! [`LocalMachine`] implements the contract's [`Machine`]. What is particular to a hypervisor is behind [`Hypervisor`]
//! (how a machine is started), [`Run`] (what happens to a running machine, and how it is killed) and [`Control`] (what
//! is requested of a running machine).

mod definition;
mod hypervisor;
mod record;

pub use self::{
    definition::{Definition, FLOPPY, SEED},
    hypervisor::{Found, Hypervisor, Start},
    record::MachineRecord,
};
use crate::{
    capture,
    lab_storage::blocking,
    lifecycle::{Control, Lifecycle, Run, Starting, Watcher},
    serial::{Attachment, SerialConsole, SerialPaths},
    tpm::Tpm,
};
use async_trait::async_trait;
use rudder_core::{
    Error, ErrorKind, Result,
    backend::{BoxedStream, Exit, Machine, Progress, SerialLog, Stop},
    content::Content,
    files::replace_file,
    module::{CapturedDisk, CapturedState},
};
use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};
use tokio::sync::mpsc;
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

/// The hypervisor's socket of the serial console, which serves one client at a time.
pub const SERIAL: &str = "serial";
/// The socket through which any number of clients share the serial console.
const CONSOLE: &str = "console";
/// The record of the serial console.
const SERIAL_LOG: &str = "serial.log";
/// The last screenshot.
const SCREENSHOT: &str = "screen.png";

/// A machine in a lab on this host.
#[derive(Debug)]
pub struct LocalMachine<H: Hypervisor>(Arc<Inner<H>>);

#[derive(Debug)]
struct Inner<H: Hypervisor> {
    definition: Definition,
    hypervisor: H,
    lifecycle: Lifecycle,
    running: Mutex<Option<Running<H>>>,
    /// The serial console of the most recent run.
    console: Mutex<Option<Arc<SerialConsole>>>,
}

/// What exists of a machine only while it runs.
#[derive(Debug)]
struct Running<H: Hypervisor> {
    control: ControlOf<H>,
    stop_requests: mpsc::UnboundedSender<Stop>,
    /// The release switch of each of its processes.
    released: Vec<Arc<AtomicBool>>,
    _watcher: AbortOnDropHandle<()>,
}

type ControlOf<H> = <<H as Hypervisor>::Run as Run>::Control;

/// A machine whose guest has just started to run.
struct Launched<H: Hypervisor> {
    run: H::Run,
    tpm: Option<Tpm>,
    console: Arc<SerialConsole>,
}

impl<H: Hypervisor> LocalMachine<H> {
    /// Defines a machine, and adds it to the network of its lab.
    ///
    /// # Errors
    /// As [`Lan::add`](crate::lan::Lan::add); file errors.
    pub fn new(definition: Definition, hypervisor: H) -> Result<Self> {
        definition.record(H::BACKEND, hypervisor.arguments())?;
        if hypervisor.uses_lan() {
            definition.lan.add(&definition.spec, definition.number)?;
        }
        Ok(Self::at_rest(definition, hypervisor))
    }

    /// Attaches to a machine of a kept lab, which another process may have defined and started.
    ///
    /// # Errors
    /// The machine runs and cannot be controlled.
    pub async fn attach(definition: Definition, hypervisor: H) -> Result<Self> {
        if hypervisor.uses_lan() {
            definition.lan.adopt(&definition.spec, definition.number);
        }
        let machine = Self::at_rest(definition, hypervisor);
        let this = &machine.0;
        let found = this.hypervisor.find(&this.definition).await;
        match found.map_err(|error| this.in_context(error))? {
            Found::Defined => {}
            Found::Ended(exit) => this.lifecycle.start()?.finish().end(exit),
            Found::Running(run) => {
                let tpm = this.definition.state.adopt_tpm()?;
                let console = this.console_of(Attachment::Again).await?;
                this.run(this.lifecycle.start()?, Launched { run, tpm, console });
            }
        }
        Ok(machine)
    }

    fn at_rest(definition: Definition, hypervisor: H) -> Self {
        let lifecycle = Lifecycle::new(&definition.spec.name);
        let (running, console) = (Mutex::new(None), Mutex::new(None));
        Self(Arc::new(Inner { definition, hypervisor, lifecycle, running, console }))
    }

    /// Returns what it was defined as.
    #[must_use]
    pub fn definition(&self) -> &Definition {
        &self.0.definition
    }

    /// Returns what is particular to its hypervisor.
    #[must_use]
    pub fn hypervisor(&self) -> &H {
        &self.0.hypervisor
    }

    /// Ends the machine if it is running or starting.
    pub async fn end(&self) {
        self.0.lifecycle.started().await;
        self.0.request_stop(Stop::Kill);
        self.0.lifecycle.rest().await;
    }

    /// Lets its processes outlive this one, and releases its serial console.
    pub fn release(&self) {
        if let Some(running) = &*self.0.running() {
            for switch in &running.released {
                switch.store(true, Ordering::Relaxed);
            }
        }
        if let Some(console) = self.0.console() {
            console.release();
        }
    }

    /// Drops its watcher without waiting, which ends the machine unless it was released or a daemon ends it.
    pub fn abandon(&self) {
        drop(self.0.running().take());
    }
}

impl<H: Hypervisor> Inner<H> {
    fn running(&self) -> MutexGuard<'_, Option<Running<H>>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the serial console of the last run.
    fn console(&self) -> Option<Arc<SerialConsole>> {
        self.console.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Returns how to control the machine while it runs.
    fn control(&self) -> Result<ControlOf<H>> {
        self.lifecycle.check_running()?;
        self.running().as_ref().map(|running| running.control.clone()).ok_or_else(|| {
            // It has been abandoned.
            self.definition
                .error(ErrorKind::Conflict, "expected a running machine, but found that it does not run")
        })
    }

    fn request_stop(&self, how: Stop) {
        if let Some(running) = &*self.running() {
            // The watcher does not receive it if the machine has just ended.
            let _ = running.stop_requests.send(how);
        }
    }

    fn in_context(&self, error: Error) -> Error {
        error.with_context("vm", &self.definition.spec.name)
    }

    /// Powers on the machine.
    async fn launch(&self) -> Result<Launched<H>> {
        let machine = &self.definition;
        self.hypervisor.await_release(machine).await?;
        for suffix in H::SOCKETS.iter().chain(&[SERIAL, CONSOLE, SCREENSHOT]) {
            let path = machine.path(suffix);
            match tokio::fs::remove_file(&path).await {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(Error::io(
                        format_args!("remove {} of the previous run", path.display()),
                        error,
                    ));
                }
                _ => {}
            }
        }
        machine.lan.clear(&machine.storage, &machine.spec.name)?;
        let tpm = machine.state.start_tpm().await?;
        let run = self.hypervisor.power_on(machine).await?;
        let control = run.control();
        let connected = async {
            // Before the guest runs, so that none of its output is lost.
            let console = self.console_of(Attachment::First).await?;
            if self.hypervisor.uses_lan() {
                machine.lan.connect(&machine.storage, &machine.spec.name, self.lifecycle.rest()).await?;
            }
            control.resume().await?;
            Ok(console)
        };
        match connected.await {
            Ok(console) => Ok(Launched { run, tpm, console }),
            Err(error) => {
                self.hypervisor.discard(run).await;
                Err(error)
            }
        }
    }

    /// Connects to the serial console.
    async fn console_of(&self, attachment: Attachment) -> Result<Arc<SerialConsole>> {
        let machine = &self.definition;
        let paths = SerialPaths {
            socket: machine.socket(SERIAL),
            client_socket: machine.socket(CONSOLE),
            record: machine.path(SERIAL_LOG),
        };
        let attached = SerialConsole::attach(paths, attachment).await;
        attached.map(Arc::new).map_err(|error| Error::io("connect to the serial console", error))
    }

    /// Publishes that the machine runs, and starts its watcher.
    fn run(&self, starting: Starting, launched: Launched<H>) {
        let Launched { run, tpm, console } = launched;
        let control = run.control();
        let released: Vec<Arc<AtomicBool>> =
            run.release_switch().into_iter().chain(tpm.as_ref().map(Tpm::release_switch)).collect();
        if self.definition.storage.dir().is_kept() {
            released.iter().for_each(|switch| switch.store(true, Ordering::Relaxed));
        }
        let (stop_requests, received) = mpsc::unbounded_channel();
        *self.console.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&console));
        // Locked until its watcher can be reached: a caller that observes that it runs may stop it.
        let mut running = self.running();
        let watcher = Watcher {
            run,
            tpm,
            console,
            stop_requests: received,
            screenshot: self.definition.path(SCREENSHOT),
            running: starting.finish(),
        };
        let watcher = AbortOnDropHandle::new(tokio::spawn(watcher.run()));
        *running = Some(Running { control, stop_requests, released, _watcher: watcher });
    }

    /// Describes how to access the machine.
    fn access(&self) -> Vec<String> {
        let Ok(control) = self.control() else { return Vec::new() };
        let (machine, name) = (&self.definition, &self.definition.spec.name);
        let is_free = self.console().is_some_and(|console| console.is_released());
        let console = if is_free { SERIAL } else { CONSOLE };
        let mut lines = self.hypervisor.port_access(machine);
        lines.push(format!("{name}: display: {}", control.display_command()));
        lines.push(format!("{name}: serial console: nc -U {}", machine.path(console).display()));
        lines
    }
}

#[async_trait]
impl<H: Hypervisor> Machine for LocalMachine<H> {
    fn name(&self) -> &str {
        &self.0.definition.spec.name
    }

    async fn start(&self) -> Result<()> {
        let (inner, starting) = (Arc::clone(&self.0), self.0.lifecycle.start()?);
        let caller_gone = CancellationToken::new();
        let calling = caller_gone.clone().drop_guard();
        let start: Start = Box::pin(async move {
            let launched = inner.launch().await?;
            inner.run(starting, launched);
            if caller_gone.is_cancelled() {
                inner.request_stop(Stop::Kill);
            }
            Ok(())
        });
        let outcome = self.0.hypervisor.complete(start).await;
        drop(calling.disarm());
        outcome.map_err(|error| self.0.in_context(error))
    }

    async fn wait(&self) -> Result<Exit> {
        self.0.lifecycle.wait().await
    }

    async fn stop(&self, how: Stop) -> Result<Exit> {
        // A machine that is being started is stopped once it runs.
        self.0.lifecycle.started().await;
        self.0.request_stop(how);
        self.0.lifecycle.wait().await
    }

    async fn dial(&self, port: u16) -> Result<BoxedStream> {
        self.0.control()?;
        self.0.hypervisor.dial(&self.0.definition, port).await
    }

    async fn display(&self) -> Result<BoxedStream> {
        let control = self.0.control()?;
        control.display().await.map_err(|error| self.0.in_context(error))
    }

    async fn serial(&self) -> Result<BoxedStream> {
        self.0.control()?;
        let machine = &self.0.definition;
        let console = self.0.console().ok_or_else(|| {
            machine.error(ErrorKind::Conflict, "expected a running machine, but found that it does not run")
        })?;
        console.connect().await.map_err(|error| {
            machine.error(ErrorKind::Protocol, "cannot connect to the serial console").with_source(error)
        })
    }

    async fn serial_log(&self, from: u64) -> Result<SerialLog> {
        Ok(self.0.console().map_or_else(SerialLog::empty, |console| console.log(from)))
    }

    async fn screenshot(&self) -> Result<Vec<u8>> {
        let last = self.0.definition.path(SCREENSHOT);
        match self.0.control() {
            Ok(control) => {
                let screenshot = control.screenshot().await.map_err(|error| self.0.in_context(error))?;
                let kept = screenshot.clone();
                blocking(move || replace_file(&last, &kept)).await?;
                Ok(screenshot)
            }
            // Of a machine that has ended, the last one is kept.
            Err(not_running) => match tokio::fs::read(&last).await {
                Err(error) if error.kind() == io::ErrorKind::NotFound => Err(not_running),
                read => read.map_err(|error| Error::io(format_args!("read {}", last.display()), error)),
            },
        }
    }

    fn reachable_at(&self, port: u16) -> Option<SocketAddr> {
        self.0.control().ok()?;
        let address = self.0.hypervisor.address()?;
        self.0.definition.spec.ports.contains(&port).then(|| SocketAddr::from((address, port)))
    }

    fn proxy_command(&self, port: u16) -> Option<String> {
        self.0.control().ok()?;
        let machine = &self.0.definition;
        // `None` for a machine that is not on the lab's own network.
        machine.lan.proxy_command(&machine.storage, &machine.spec.name, port)
    }

    fn access(&self) -> Vec<String> {
        self.0.access()
    }

    async fn capture(&self, disk: &str, progress: &Progress) -> Result<CapturedDisk> {
        let machine = &self.0.definition;
        let (index, disk) = machine.disk(disk)?;
        let _at_rest = self.0.lifecycle.at_rest()?;
        let file = machine.file(&format!("d{index}.captured.qcow2"));
        let captured = capture::capture(&machine.storage, &disk.volume.id, &file, &disk.name, progress).await;
        let captured = captured.map_err(|error| self.0.in_context(error.with_context("disk", &disk.name)))?;
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
        let _at_rest = self.0.lifecycle.at_rest()?;
        self.0.definition.state.capture().await.map_err(|error| self.0.in_context(error))
    }
}
