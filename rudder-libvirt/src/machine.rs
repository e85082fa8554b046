//! A machine in a lab: a libvirt domain, with its disks in the lab.

mod consoles;
mod launch;
mod name;

use self::{
    launch::{Launched, Ways},
    name::domain_name,
};
use crate::{
    connection::{Failure, domain},
    devices::{self, Disk, Serial, Uefi, Variables},
    domain::{Cards, Domain},
    lab_context::LabContext,
    network,
    picture::picture,
    watch::LibvirtRun,
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
    lan::Lan,
    lifecycle::{Lifecycle, Starting, Watcher},
    machine_state::MachineState,
    nic_arguments::nic_arguments,
    pci_layout::{Chipset, cdrom_bus},
    serial::SerialConsole,
    tpm::Tpm,
};
use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    os::{fd::AsRawFd, unix::net::UnixStream as StdUnixStream},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokio::{
    net::{TcpStream, UnixStream},
    sync::{mpsc, oneshot},
    time::timeout,
};
use tokio_util::task::AbortOnDropHandle;
use virt::{connect::Connect, sys};

/// How long a guest may take to accept a connection.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// A machine on libvirt.
#[derive(Debug)]
pub(crate) struct LibvirtMachine(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    context: Arc<LabContext>,
    spec: MachineSpec,
    /// Its number, unique in the lab.
    number: usize,
    /// The name of the domain.
    domain: String,
    /// The state that the machine keeps outside its disks.
    state: MachineState,
    lifecycle: Lifecycle,
    running: Mutex<Option<Running>>,
    /// The serial console of the last run.
    console: Mutex<Option<Arc<SerialConsole>>>,
}

/// The state of a machine that exists only while it runs.
#[derive(Debug)]
struct Running {
    orders: mpsc::UnboundedSender<Stop>,
    ways: Ways,
    /// The release switch of its TPM.
    released: Option<Arc<AtomicBool>>,
    _watcher: AbortOnDropHandle<()>,
}

impl LibvirtMachine {
    /// Defines a machine; `number` is unique in the lab.
    pub(crate) async fn define(context: &Arc<LabContext>, spec: &MachineSpec, number: usize) -> Result<Self> {
        let inner = Inner {
            context: Arc::clone(context),
            spec: spec.clone(),
            number,
            domain: domain_name(context.storage.id().as_str(), number, &spec.name),
            state: MachineState::prepare(&context.storage, spec, number).await?,
            lifecycle: Lifecycle::new(&spec.name),
            running: Mutex::default(),
            console: Mutex::default(),
        };
        let seed = spec.seed.as_ref().map(|seed| ("seed.img", &seed.image));
        let floppy = spec.floppy.as_ref().map(|image| ("floppy.img", image));
        for (file, image) in seed.into_iter().chain(floppy) {
            let path = context.storage.path(&inner.file(file));
            let written = tokio::fs::write(&path, image).await;
            written.map_err(|error| Error::io(format_args!("write {}", path.display()), error))?;
        }
        let xml = inner.xml()?;
        tracing::debug!(domain = inner.domain, xml, "defining a domain");
        let define = move |connect: &Connect| virt::domain::Domain::define_xml(connect, &xml).map(drop);
        let order = Arc::clone(context).detached(|context| async move {
            let defined = context.connection.order(define).await;
            defined.map_err(|failure| failure.into_error(ErrorKind::LaunchFailed, "define the domain"))
        });
        order.await?;
        if context.bridges().is_none() {
            // Last, so that a machine that could not be defined is not on the network.
            context.lan.add(spec, number)?;
        }
        Ok(Self(Arc::new(inner)))
    }

    /// Ends the machine if it is running or starting.
    pub(crate) async fn end(&self) {
        self.0.lifecycle.started().await;
        self.0.order(Stop::Kill);
        self.0.lifecycle.rest().await;
    }

    /// Returns whether the machine has this address in a subnet. Blocks.
    pub(crate) fn has_address(&self, subnet: &str, address: Ipv4Addr) -> bool {
        let nics = self.0.spec.nics.iter().filter(|nic| nic.subnet == subnet);
        let macs: Vec<String> = nics.map(|nic| nic.mac.to_string()).collect();
        let found = self.0.context.connection.ask_blocking(|connect| {
            let domain = domain(connect, &self.0.domain)?;
            macs.iter().map(|mac| network::address(&domain, mac)).collect::<Result<Vec<_>, _>>()
        });
        found.is_ok_and(|found| found.contains(&Some(address)))
    }

    /// Lets its TPM outlive this process, as its domain does, and releases its serial console.
    pub(crate) fn release(&self) {
        if let Some(console) = self.0.console() {
            console.let_go();
        }
        if let Some(Running { released: Some(switch), .. }) = &*self.0.running() {
            switch.store(true, Ordering::Relaxed);
        }
    }

    /// Drops its watcher without waiting.
    pub(crate) fn abandon(&self) {
        drop(self.0.running().take());
    }
}

impl Inner {
    /// Returns the name of one of its files in the lab. Short, because the path of a socket has at most 107 bytes
    /// (unix(7)).
    fn file(&self, suffix: &str) -> String {
        format!("m{}.{suffix}", self.number)
    }

    fn xml(&self) -> Result<String> {
        let storage = &self.context.storage;
        let cards = match self.context.bridges() {
            Some(bridges) => Cards::Bridged(network::cards(&self.spec, bridges)?),
            None => {
                let sockets =
                    Lan::sockets(self.number, &self.spec).into_iter().map(|file| storage.path(&file));
                // Absolute paths, because libvirt starts QEMU in another directory. They are shorter than the path of
                // the serial console, whose length is checked.
                let paths: Vec<String> = sockets.map(|socket| socket.display().to_string()).collect();
                Cards::Arguments(nic_arguments(&self.spec, storage.network()?, &paths)?)
            }
        };
        Domain {
            name: &self.domain,
            title: &format!("{} of {}", self.spec.name, storage.id()),
            label: &self.context.label(&self.spec.name),
            host_capabilities: &self.context.host_capabilities,
            cpus: self.spec.cpus,
            memory: self.spec.memory,
            disks: self
                .spec
                .disks
                .iter()
                .map(|disk| Disk { path: storage.path(&disk.volume.id), bus: disk.bus, transient: false })
                .collect(),
            chipset: Chipset::of(&self.spec),
            cdrom_bus: cdrom_bus(&self.spec),
            uefi: self.state.flash().map(|(flash, file)| Uefi {
                flash: flash.clone(),
                variables: Variables::Own(storage.path(file)),
            }),
            tpm: self.state.tpm_socket().map(|socket| devices::Tpm::At(storage.path(socket))),
            cdroms: self.spec.cdroms.iter().map(|cdrom| (&cdrom.id).into()).collect(),
            floppy: self.spec.floppy.as_ref().map(|_| storage.path(&self.file("floppy.img"))),
            seed: self.spec.seed.as_ref().map(|_| storage.path(&self.file("seed.img"))),
            serial: Serial::Socket(storage.path(&self.file("serial"))),
            cards,
            owner: self.context.host_capabilities.owner(),
            lab: Some(storage.id()),
        }
        .xml()
    }

    fn running(&self) -> MutexGuard<'_, Option<Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns how to reach the machine's ports while it runs.
    fn ways(&self) -> Result<Ways> {
        self.lifecycle.check_running()?;
        self.running().as_ref().map(|running| running.ways.clone()).ok_or_else(|| {
            self.error(ErrorKind::Conflict, "expected a running machine, but found that it does not run")
        })
    }

    fn error(&self, kind: ErrorKind, message: impl Into<std::borrow::Cow<'static, str>>) -> Error {
        Error::new(kind, message).with_context("vm", &self.spec.name)
    }

    fn refused(&self, failure: Failure, kind: ErrorKind, what: &str) -> Error {
        failure.into_error(kind, what).with_context("vm", &self.spec.name)
    }

    fn order(&self, order: Stop) {
        if let Some(running) = &*self.running() {
            // The watcher does not receive it if the machine has just ended.
            let _ = running.orders.send(order);
        }
    }

    /// Returns the guest's current address on the bridge of its first NIC, as libvirt knows it.
    async fn find_address(&self) -> Result<Option<Ipv4Addr>> {
        let Some(mac) = self.spec.nics.first().map(|nic| nic.mac.to_string()) else { return Ok(None) };
        let name = self.domain.clone();
        let ask = move |connect: &Connect| network::address(&domain(connect, &name)?, &mac);
        let found = self.context.connection.ask(ask).await;
        let found = found.map_err(|failure| {
            self.refused(failure, ErrorKind::GuestUnreachable, "find the guest's address")
        })?;
        self.keep_address(found);
        Ok(found)
    }

    fn keep_address(&self, found: Option<Ipv4Addr>) {
        if let Some(Running { ways: Ways::Bridged(address), .. }) = &mut *self.running() {
            *address = found;
        }
    }

    /// Publishes that the machine runs, and starts its watcher.
    fn run(&self, starting: Starting, launched: Launched) {
        let Launched { ways, process, tpm, console } = launched;
        let released = tpm.as_ref().map(Tpm::release_switch);
        let (orders, received) = mpsc::unbounded_channel();
        *self.console.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&console));
        let mut running = self.running();
        let watcher = Watcher {
            run: LibvirtRun::new(Arc::clone(&self.context.connection), self.domain.clone(), process),
            tpm,
            console,
            orders: received,
            screenshot: self.context.storage.path(&self.file("screen.png")),
            running: starting.finish(),
        };
        let watcher = AbortOnDropHandle::new(tokio::spawn(watcher.run()));
        *running = Some(Running { orders, ways, released, _watcher: watcher });
    }
}

#[async_trait]
impl Machine for LibvirtMachine {
    fn name(&self) -> &str {
        &self.0.spec.name
    }

    async fn start(&self) -> Result<()> {
        let this = &self.0;
        let starting = this.lifecycle.start()?;
        // Libvirt completes what was requested even if the caller is dropped, so the remaining steps run in a task of
        // their own.
        let (reply, answer) = oneshot::channel();
        let (inner, context) = (Arc::clone(this), Arc::clone(&this.context));
        tokio::spawn(async move {
            let machine = Arc::clone(&inner);
            let launched = context.detached(|_| async move { machine.launch().await }).await;
            let outcome = match launched {
                Ok(launched) => {
                    inner.run(starting, launched);
                    Ok(())
                }
                Err(error) => {
                    drop(starting);
                    Err(error)
                }
            };
            if reply.send(outcome).is_err() {
                inner.order(Stop::Kill);
            }
        });
        let outcome = answer.await.unwrap_or_else(|_| {
            Err(Error::new(ErrorKind::Cancelled, "the program is ending: the machine was not started"))
        });
        outcome.map_err(|error| error.with_context("vm", &this.spec.name))
    }

    async fn wait(&self) -> Result<Exit> {
        self.0.lifecycle.wait().await
    }

    async fn stop(&self, how: Stop) -> Result<Exit> {
        // A machine that is being started is stopped once it runs.
        self.0.lifecycle.started().await;
        self.0.order(how);
        self.0.lifecycle.wait().await
    }

    async fn dial(&self, port: u16) -> Result<BoxedStream> {
        let ways = self.0.ways()?;
        let Ways::Bridged(known) = ways else {
            let context = &self.0.context;
            return context.lan.dial(&context.storage, &self.0.spec, port).await;
        };
        if !self.0.spec.ports.contains(&port) || self.0.spec.nics.is_empty() {
            let message = format!("expected one of the machine's ports, but found {port}");
            return Err(self
                .0
                .error(ErrorKind::InvalidInput, message)
                .with_help("a port is reached when it is in MachineSpec::ports and the machine has a card"));
        }
        let unreachable = |what: String| self.0.error(ErrorKind::GuestUnreachable, what);
        let address = match known {
            Some(address) => address,
            None => {
                let found = self.0.find_address().await?;
                found.ok_or_else(|| unreachable("the guest has no address yet".to_owned()))?
            }
        };
        let connected = timeout(CONNECT_LIMIT, TcpStream::connect((address, port))).await;
        let connected = connected.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
        let stream = connected.map_err(|error| {
            // The guest may have a different address next time.
            self.0.keep_address(None);
            unreachable(format!("cannot connect to port {port} of the guest")).with_source(error)
        })?;
        // Keystrokes and SSH packets are small, and each is waited for.
        let _ = stream.set_nodelay(true);
        Ok(Box::new(stream))
    }

    async fn display(&self) -> Result<BoxedStream> {
        self.0.ways()?;
        let failed = |error| Error::io("make a pair of sockets", error);
        let (ours, theirs) = StdUnixStream::pair().map_err(failed)?;
        ours.set_nonblocking(true).map_err(failed)?;
        let name = self.0.domain.clone();
        let hand_over = move |connect: &Connect| {
            let domain = domain(connect, &name)?;
            domain.open_graphics(0, theirs.as_raw_fd(), sys::VIR_DOMAIN_OPEN_GRAPHICS_SKIPAUTH).map(drop)
        };
        let handed = self.0.context.connection.order(hand_over).await;
        handed.map_err(|failure| self.0.refused(failure, ErrorKind::Protocol, "connect to the display"))?;
        Ok(Box::new(UnixStream::from_std(ours).map_err(failed)?))
    }

    async fn serial(&self) -> Result<BoxedStream> {
        self.0.connect_console().await
    }

    async fn serial_log(&self, from: u64) -> Result<SerialLog> {
        Ok(self.0.console().map_or_else(SerialLog::empty, |console| console.log(from)))
    }

    async fn screenshot(&self) -> Result<Vec<u8>> {
        match self.0.ways() {
            Ok(_) => {
                let taken = picture(&self.0.context.connection, &self.0.domain).await;
                taken.map_err(|error| error.with_context("vm", &self.0.spec.name))
            }
            // The watcher took a last screenshot of a machine that failed.
            Err(error) => {
                let path = self.0.context.storage.path(&self.0.file("screen.png"));
                tokio::fs::read(path).await.map_err(|_| error)
            }
        }
    }

    fn reachable_at(&self, port: u16) -> Option<SocketAddr> {
        self.0.ways().ok()?.to(port).filter(|_| self.0.spec.ports.contains(&port))
    }

    fn proxy_command(&self, port: u16) -> Option<String> {
        let Ways::Switched = self.0.ways().ok()? else { return None };
        let context = &self.0.context;
        context.lan.proxy_command(&context.storage, &self.0.spec.name, port)
    }

    fn access(&self) -> Vec<String> {
        let is_free = self.0.console().is_some_and(|console| console.is_let_go());
        self.0.access_by(if is_free { "serial" } else { "console" })
    }

    async fn capture(&self, disk: &str, progress: &Progress) -> Result<CapturedDisk> {
        let this = &self.0;
        let index = this.spec.disks.iter().position(|one| one.name == disk).ok_or_else(|| {
            this.error(ErrorKind::NotFound, format!("expected a disk of the machine, but found {disk:?}"))
        })?;
        let _disks = this.lifecycle.at_rest()?;
        let disk = &this.spec.disks[index];
        let file = format!("m{}.d{index}.captured.qcow2", this.number);
        let captured =
            capture::capture(&this.context.storage, &disk.volume.id, &file, &disk.name, progress).await;
        let captured = captured
            .map_err(|error| error.with_context("disk", &disk.name).with_context("vm", &this.spec.name))?;
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
        let _disks = self.0.lifecycle.at_rest()?;
        self.0.state.capture().await.map_err(|error| error.with_context("vm", &self.0.spec.name))
    }
}
