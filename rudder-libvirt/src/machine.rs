//! A machine in a lab: a libvirt domain, with its disks in the lab.

mod bridged;
mod name;

pub(crate) use self::bridged::has_address;
use self::name::domain_name;
use crate::{
    connection::domain,
    devices::{self, Disk, Serial, Uefi, Variables},
    domain::{Domain, Nics},
    domain_state::{Inactive, inactive},
    lab_context::LabContext,
    network, process,
    run::{DomainControl, LibvirtRun},
};
use async_trait::async_trait;
use rudder_core::{
    ErrorKind, Result,
    backend::{BoxedStream, Exit, MachineSpec},
};
use rudder_local::{
    lan::Lan,
    lifecycle::Run as _,
    machine::{Definition, FLOPPY, Found, Hypervisor, LocalMachine, MachineRecord, SEED, SERIAL, Start},
    nic_arguments::nic_arguments,
    pci_layout::{Chipset, cdrom_bus},
};
use std::{
    net::{IpAddr, Ipv4Addr},
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::time::{Instant, sleep, timeout_at};
use virt::{connect::Connect, sys};

/// How long libvirt may take to release a machine that has ended before it is started again.
const RELEASE_LIMIT: Duration = Duration::from_secs(30);
/// Interval between checks whether it has.
const RELEASE_POLL_INTERVAL: Duration = Duration::from_millis(20);

/// A machine on libvirt.
pub(crate) type LibvirtMachine = LocalMachine<Libvirt>;

/// What is particular to a machine on libvirt: its domain, and how its guest is reached on a bridge.
#[derive(Debug)]
pub(crate) struct Libvirt {
    context: Arc<LabContext>,
    /// The name of the domain.
    domain: String,
    /// The guest's address on a bridge, once that is known.
    address: Mutex<Option<Ipv4Addr>>,
}

/// Defines a machine; `number` is unique in the lab.
pub(crate) async fn define(
    context: &Arc<LabContext>,
    spec: &MachineSpec,
    number: usize,
) -> Result<LibvirtMachine> {
    let definition = Definition::prepare(&context.storage, &context.lan, spec, number).await?;
    let domain = domain_name(context.storage.id().as_str(), number, &spec.name);
    let libvirt = Libvirt { context: Arc::clone(context), domain, address: Mutex::default() };
    let xml = libvirt.xml(&definition)?;
    tracing::debug!(domain = libvirt.domain, xml, "defining a domain");
    let define = move |connect: &Connect| virt::domain::Domain::define_xml(connect, &xml).map(drop);
    let defined = Arc::clone(context).detached(|context| async move {
        let defined = context.connection.command(define).await;
        defined.map_err(|failure| failure.into_error(ErrorKind::LaunchFailed, "define the domain"))
    });
    defined.await?;
    // Last, so that a machine that could not be defined is not on the network.
    LocalMachine::new(definition, libvirt)
}

/// Attaches to a machine of a kept lab.
pub(crate) async fn attach(
    context: &Arc<LabContext>,
    record: &MachineRecord,
    number: usize,
) -> Result<LibvirtMachine> {
    let definition = Definition::attach(&context.storage, &context.lan, record, number)?;
    let domain = domain_name(context.storage.id().as_str(), number, &definition.spec.name);
    let libvirt = Libvirt { context: Arc::clone(context), domain, address: Mutex::default() };
    LocalMachine::attach(definition, libvirt).await
}

impl Libvirt {
    fn xml(&self, machine: &Definition) -> Result<String> {
        let Definition { storage, spec, state, .. } = machine;
        let nics = match self.context.bridges() {
            Some(bridges) => Nics::Bridged(network::nics(spec, bridges)?),
            None => {
                let sockets = Lan::sockets(machine.number, spec).into_iter().map(|file| storage.path(&file));
                // Absolute paths, because libvirt starts QEMU in another directory. They are shorter than the path of
                // the serial console, whose length is checked.
                let paths: Vec<String> = sockets.map(|socket| socket.display().to_string()).collect();
                Nics::Arguments(nic_arguments(spec, storage.network()?, &paths)?)
            }
        };
        let disks = spec.disks.iter();
        Domain {
            name: &self.domain,
            title: &format!("{} of {}", spec.name, storage.id()),
            label: &self.context.label(&spec.name),
            host_capabilities: &self.context.host_capabilities,
            cpus: spec.cpus,
            memory: spec.memory,
            disks: disks
                .map(|disk| Disk { path: storage.path(&disk.volume.id), bus: disk.bus, transient: false })
                .collect(),
            chipset: Chipset::of(spec),
            cdrom_bus: cdrom_bus(spec),
            uefi: state.flash().map(|(flash, file)| Uefi {
                flash: flash.clone(),
                variables: Variables::Own(storage.path(file)),
            }),
            tpm: state.tpm_socket().map(|socket| devices::Tpm::At(storage.path(socket))),
            cdroms: spec.cdroms.iter().map(|cdrom| (&cdrom.id).into()).collect(),
            floppy: spec.floppy.as_ref().map(|_| machine.path(FLOPPY)),
            seed: spec.seed.as_ref().map(|_| machine.path(SEED)),
            serial: Serial::Socket(machine.path(SERIAL)),
            nics,
            owner: self.context.host_capabilities.owner(),
            lab: Some(storage.id()),
        }
        .xml()
    }

    fn control(&self) -> DomainControl {
        DomainControl::new(&self.context.connection, &self.domain)
    }
}

#[async_trait]
impl Hypervisor for Libvirt {
    type Run = LibvirtRun;

    const BACKEND: &'static str = crate::NAME;

    async fn await_release(&self, machine: &Definition) -> Result<()> {
        let held = |what: &str| {
            let limit = RELEASE_LIMIT.as_secs();
            let message = format!(
                "expected libvirt to release the machine's previous run within {limit} s, but it {what}"
            );
            machine
                .error(ErrorKind::LaunchFailed, message)
                .with_help("check with virsh and ps whether the host's init has reaped the machine's process")
        };
        let deadline = Instant::now() + RELEASE_LIMIT;
        loop {
            let name = self.domain.clone();
            let query = move |connect: &Connect| domain(connect, &name)?.is_active();
            let state = timeout_at(deadline, self.context.connection.query(query)).await;
            let state = state.map_err(|_| held("does not answer"))?;
            let active =
                state.map_err(|failure| failure.into_error(ErrorKind::LaunchFailed, "query the domain"))?;
            if !active {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(held("still runs"));
            }
            sleep(RELEASE_POLL_INTERVAL).await;
        }
    }

    async fn power_on(&self, machine: &Definition) -> Result<LibvirtRun> {
        self.keep_address(None);
        let flags = match machine.storage.dir().may_be_kept() {
            true => 0,
            false => sys::VIR_DOMAIN_START_AUTODESTROY,
        };
        let name = self.domain.clone();
        let flags = flags | sys::VIR_DOMAIN_START_PAUSED;
        let start = move |connect: &Connect| domain(connect, &name)?.create_with_flags(flags).map(drop);
        let started = self.context.connection.command(start).await;
        started.map_err(|failure| failure.into_error(ErrorKind::LaunchFailed, "start the domain"))?;
        let process = process::find(self.domain.clone(), machine.storage.id().clone()).await;
        Ok(LibvirtRun::new(self.control(), process))
    }

    async fn find(&self, machine: &Definition) -> Result<Found<LibvirtRun>> {
        let name = self.domain.clone();
        let query = move |connect: &Connect| domain(connect, &name)?.get_state();
        let (state, reason) = match self.context.connection.query(query).await {
            Ok(found) => found,
            Err(failure) if failure.is_no_domain() => return Ok(Found::Ended(Exit::Unobserved)),
            Err(failure) => return Err(failure.into_error(ErrorKind::Protocol, "find the domain")),
        };
        Ok(match inactive(state, reason) {
            Some(Inactive::NeverStarted) => Found::Defined,
            Some(Inactive::Ended(exit)) => Found::Ended(exit),
            None => {
                let process = process::find(self.domain.clone(), machine.storage.id().clone()).await;
                Found::Running(LibvirtRun::new(self.control(), process))
            }
        })
    }

    async fn discard(&self, run: LibvirtRun) {
        run.control().destroy().await;
    }

    async fn complete(&self, start: Start) -> Result<()> {
        // Libvirt completes what was requested even if the caller is dropped.
        Arc::clone(&self.context).detached(|_| start).await
    }

    fn uses_lan(&self) -> bool {
        self.context.bridges().is_none()
    }

    fn address(&self) -> Option<IpAddr> {
        self.known_address().map(IpAddr::V4)
    }

    async fn dial(&self, machine: &Definition, port: u16) -> Result<BoxedStream> {
        match self.uses_lan() {
            true => machine.lan.dial(&machine.storage, &machine.spec, port).await,
            false => self.dial_bridged(machine, port).await,
        }
    }

    fn port_access(&self, machine: &Definition) -> Vec<String> {
        match self.uses_lan() {
            true => machine.lan.access(&machine.storage, &machine.spec),
            false => self.bridged_access(machine),
        }
    }
}
