//! A machine in a lab: a QEMU process while it runs, disks in the lab while it does not.

use crate::{
    command_line::{self, Extras, Files},
    qmp::Qmp,
    run::{QemuControl, QemuRun},
};
use async_trait::async_trait;
use rudder_core::{
    Error, ErrorKind, Result,
    backend::{Exit, MachineSpec},
};
use rudder_local::{
    lab_storage::LabStorage,
    lan::Lan,
    lifecycle::Observation,
    log_tail::last_lines,
    machine::{Definition, Found, Hypervisor, LocalMachine, MachineRecord},
    process::{Invocation, OwnedChild, describe},
    store::LAB_VARIABLE,
};
use std::{fs::File, process::Stdio, sync::Arc, time::Duration};
use tokio::sync::mpsc;

/// How long QEMU may take from its start until it accepts connections.
const LAUNCH_LIMIT: Duration = Duration::from_secs(60);
/// Interval between connection attempts.
const LAUNCH_POLL_INTERVAL: Duration = Duration::from_millis(5);

/// The name of QEMU's process in the ledger of a lab.
const PROCESS: &str = "qemu";

/// A machine on QEMU.
pub(crate) type QemuMachine = LocalMachine<Qemu>;

/// What is particular to a machine on QEMU: its command line.
#[derive(Debug)]
pub(crate) struct Qemu {
    arguments: Vec<String>,
}

/// Defines a machine; `number` is unique in the lab.
pub(crate) async fn define(
    storage: &Arc<LabStorage>,
    lan: &Arc<Lan>,
    spec: &MachineSpec,
    number: usize,
) -> Result<QemuMachine> {
    for device in command_line::devices(spec) {
        storage.host().require_device(device)?;
    }
    let extras = Extras {
        panic: storage.host().has_device("pvpanic"),
        random: storage.host().has_device("virtio-rng-pci"),
    };
    let definition = Definition::prepare(storage, lan, spec, number).await?;
    let mut files = Files::new(number);
    files.nics.truncate(spec.nics.len());
    let mark = format!("rudder-{}", storage.id());
    let machine = command_line::Machine {
        mark: &mark,
        spec,
        network: storage.network()?,
        files: &files,
        accelerator: storage.host().accelerator(),
        flash: definition.state.flash(),
        tpm_socket: definition.state.tpm_socket(),
    };
    let arguments = command_line::arguments(&machine, extras)?;
    // Last, so that a machine that could not be defined is not on the network.
    LocalMachine::new(definition, Qemu { arguments })
}

/// Attaches to a machine of a kept lab.
pub(crate) async fn attach(
    storage: &Arc<LabStorage>,
    lan: &Arc<Lan>,
    record: MachineRecord,
    number: usize,
) -> Result<QemuMachine> {
    let definition = Definition::attach(storage, lan, &record, number)?;
    LocalMachine::attach(definition, Qemu { arguments: record.arguments }).await
}

#[async_trait]
impl Hypervisor for Qemu {
    type Run = QemuRun;

    const BACKEND: &'static str = crate::NAME;

    const SOCKETS: &'static [&'static str] = &[command_line::QMP, command_line::DISPLAY];

    async fn power_on(&self, machine: &Definition) -> Result<QemuRun> {
        let storage = &machine.storage;
        let log_path = machine.path(command_line::LOG);
        let failed = |error| Error::io(format_args!("write {}", log_path.display()), error);
        let log = File::create(&log_path).map_err(failed)?;
        let mut child = Invocation::new(storage.host().qemu(), storage.lifetime())
            .args(&self.arguments)
            .directory(storage.dir().path())
            .variable(LAB_VARIABLE, storage.id().as_str())
            .spawn(Stdio::null(), log.try_clone().map_err(failed)?.into(), log.into())
            .await?;
        storage.record_process(child.pid(), PROCESS, &machine.spec.name).await?;
        let connected = tokio::time::timeout(LAUNCH_LIMIT, connect(machine, &mut child)).await;
        let (qmp, reports) = connected.unwrap_or_else(|_| {
            let limit = LAUNCH_LIMIT.as_secs();
            let message = format!("expected QEMU to answer within {limit} s, but it did not");
            Err(Error::new(ErrorKind::LaunchFailed, message))
        })?;
        let control = QemuControl::new(qmp, machine);
        Ok(QemuRun::new(child, control, reports, log_path))
    }

    async fn find(&self, machine: &Definition) -> Result<Found<QemuRun>> {
        let name = &machine.spec.name;
        let Some(mut child) = machine.storage.adopt(PROCESS, name)? else {
            return Ok(match machine.storage.was_started(PROCESS, name) {
                true => Found::Ended(Exit::Unobserved),
                false => Found::Defined,
            });
        };
        let connected = tokio::time::timeout(LAUNCH_LIMIT, connect_or_end(machine, &mut child)).await;
        let connected = connected.map_err(|_| {
            let limit = LAUNCH_LIMIT.as_secs();
            let message = format!("expected QEMU to answer within {limit} s, but it did not");
            Error::new(ErrorKind::Protocol, message)
                .with_help("end the program that holds its control socket, or remove the lab")
        })?;
        let Ok((qmp, reports)) = connected else { return Ok(Found::Ended(Exit::Unobserved)) };
        let log = machine.path(command_line::LOG);
        Ok(Found::Running(QemuRun::new(child, QemuControl::new(qmp, machine), reports, log)))
    }

    fn arguments(&self) -> &[String] {
        &self.arguments
    }
}

/// Waits until QEMU accepts a connection or has ended.
async fn connect(
    machine: &Definition,
    child: &mut OwnedChild,
) -> Result<(Qmp, mpsc::UnboundedReceiver<Observation>)> {
    let ended = match connect_or_end(machine, child).await {
        Ok(connected) => return Ok(connected),
        Err(ended) => ended,
    };
    let output = last_lines(&machine.path(command_line::LOG)).await;
    let output = if output.is_empty() { ended } else { output };
    Err(Error::new(ErrorKind::LaunchFailed, format!("QEMU refused to start: {output}")))
}

/// Waits until QEMU accepts a connection. If it ends first, returns how it ended.
async fn connect_or_end(
    machine: &Definition,
    child: &mut OwnedChild,
) -> Result<(Qmp, mpsc::UnboundedReceiver<Observation>), String> {
    let socket = machine.socket(command_line::QMP);
    loop {
        let attempt = async {
            match Qmp::connect(&socket).await {
                Ok(connected) => Some(connected),
                Err(_) => {
                    tokio::time::sleep(LAUNCH_POLL_INTERVAL).await;
                    None
                }
            }
        };
        tokio::select! {
            status = child.wait() => return Err(status.map_or_else(|error| error.to_string(), describe)),
            connected = attempt => if let Some(connected) = connected {
                return Ok(connected);
            }
        }
    }
}
