//! An in-memory machine: its life cycle from power-on to its end, and its connections.
//!
//! ```text
//! NeverStarted ──start──▶ Running ──power off · death · kill──▶ Ended ──start──▶ Running …
//!                          └ reboot: another boot of the same power-on ┘
//! ```
//! Every connection and task of a machine depends on two tokens: `boot` is cancelled by a reboot, `power` by the end of
//! the machine.

use super::{
    Shared,
    display::Terminal,
    files::FileTree,
    lab::{LabCore, Volumes},
    script::{Guest, Operation, Silence},
    ssh, streams,
};
use crate::{
    Error, ErrorKind, Result,
    backend::{
        BoxedStream, Death, DisplayEncoding, Exit, Machine, MachineSpec, Progress, SerialLog, SerialRecord,
        Stop,
    },
    capability::Capability,
    content::{Content, ContentId},
    digest::Digest,
    module::{CapturedDisk, CapturedState},
};
use async_trait::async_trait;
use russh::keys::{Algorithm, PrivateKey};
use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;

/// How much of the serial console is kept, in bytes.
const SERIAL_LIMIT: usize = 1 << 20;
/// What a guest writes to the serial console at boot by default.
const BANNER: &[u8] = b"Booting in memory\n";
/// Time from a request to power off or reboot until it happens: long enough for the requesting command to report its
/// exit code, as on a real system.
const COMMAND_GRACE: Duration = Duration::from_millis(5);

/// The state of a machine's life cycle.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Life {
    NeverStarted,
    Running,
    Ended(Exit),
}

/// One boot of a guest.
#[derive(Debug, Clone)]
pub(super) struct Boot {
    /// The content of `/proc/sys/kernel/random/boot_id`.
    pub(super) id: String,
    /// When the SSH server begins to answer.
    ready: Instant,
    /// Cancelled by a reboot.
    pub(super) token: CancellationToken,
    /// Cancelled by the end of the machine.
    power: CancellationToken,
    /// The behaviour of the guest, including the faults of this power-on.
    pub(super) guest: Arc<Guest>,
    /// The screen and keyboard, which stay the same from power-on to power-off.
    terminal: Arc<Terminal>,
    pub(super) host_key: Arc<PrivateKey>,
}

#[derive(Debug)]
struct State {
    boot: Option<Boot>,
    serial: Option<SerialRecord>,
}

/// State shared by the handles of a machine.
#[derive(Debug)]
pub(super) struct MachineCore {
    pub(super) spec: MachineSpec,
    pub(super) shared: Arc<Shared>,
    pub(super) volumes: Volumes,
    pub(super) lab: String,
    host_key: Arc<PrivateKey>,
    life: watch::Sender<Life>,
    state: Mutex<State>,
}

impl MachineCore {
    pub(super) fn new(spec: MachineSpec, shared: Arc<Shared>, volumes: Volumes, lab: String) -> Result<Self> {
        Ok(Self {
            spec,
            shared,
            volumes,
            lab,
            host_key: Arc::new(new_host_key()?),
            life: watch::Sender::new(Life::NeverStarted),
            state: Mutex::new(State { boot: None, serial: None }),
        })
    }

    pub(super) fn is_running(&self) -> bool {
        *self.life.borrow() == Life::Running
    }

    /// Returns what was written to the serial console since power-on, from a position on.
    pub(super) fn serial_log(&self, from: u64) -> SerialLog {
        self.state().serial.as_ref().map_or_else(SerialLog::empty, |record| record.log(from))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the current boot, if there is one.
    pub(super) fn boot(&self) -> Option<Boot> {
        self.state().boot.clone()
    }

    /// Calls a function with the files of the boot disk.
    pub(super) fn with_files<T>(&self, what: impl FnOnce(&mut FileTree) -> T) -> Option<T> {
        let disk = self.spec.disks.first()?;
        let mut volumes = self.volumes.lock().unwrap_or_else(PoisonError::into_inner);
        volumes.get_mut(&disk.volume.id).map(|volume| what(&mut volume.files))
    }

    /// Ends the machine, if it runs. The first caller determines the reason.
    pub(super) fn end(&self, exit: Exit) {
        let mut state = self.state();
        let Some(boot) = state.boot.take() else { return };
        if let Some(record) = &state.serial {
            if let Exit::Died { cause: Death::GuestPanic, .. } = exit {
                record.write(b"Kernel panic - not syncing\n");
            }
            record.close();
        }
        boot.power.cancel();
        self.life.send_replace(Life::Ended(exit));
    }

    /// Writes to the serial console, if the machine runs.
    pub(super) fn say(&self, bytes: &[u8]) {
        let state = self.state();
        if let (Some(_), Some(record)) = (&state.boot, &state.serial) {
            record.write(bytes);
        }
    }

    /// Shows a text on the screen, if the machine runs.
    pub(super) fn show(&self, text: &str) {
        if let Some(boot) = self.boot() {
            boot.terminal.show(text);
        }
    }

    pub(super) fn die(&self, cause: Death) {
        let detail = match cause {
            Death::Hypervisor => "the hypervisor was killed by signal 9",
            Death::GuestPanic => "the kernel of the guest panicked",
            Death::IoError => "a disk could not be written",
            Death::HostDiskFull => "no space left on device",
        };
        self.end(Exit::Died { cause, detail: detail.to_owned() });
    }

    fn new_boot(
        &self,
        guest: Arc<Guest>,
        terminal: Arc<Terminal>,
        power: &CancellationToken,
    ) -> Result<Boot> {
        let random: u128 = rand::random();
        let hex = format!("{random:032x}");
        let host_key =
            if guest.faults.changes_host_key { Arc::new(new_host_key()?) } else { self.host_key.clone() };
        Ok(Boot {
            id: [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-"),
            ready: Instant::now() + guest.boot_delay,
            token: power.child_token(),
            power: power.clone(),
            guest,
            terminal,
            host_key,
        })
    }

    fn power_on(self: &Arc<Self>) -> Result<()> {
        let guest = self.shared.guest_for_power_on(&self.spec.name);
        let mut state = self.state();
        if state.boot.is_some() {
            return Err(Error::new(
                ErrorKind::Conflict,
                format!("expected VM {} to be off, but found it running", self.spec.name),
            ));
        }
        let power = CancellationToken::new();
        let guest = Arc::new(guest);
        let terminal = Arc::new(Terminal::new(guest.clone()));
        self.shared.script().terminals.insert(self.spec.name.clone(), terminal.clone());
        let boot = self.new_boot(guest, terminal, &power)?;
        let record = SerialRecord::new(SERIAL_LIMIT);
        record.write(boot.guest.serial.as_deref().unwrap_or(BANNER));
        state.serial = Some(record);
        let dies = boot.guest.faults.dies_in_boot;
        let files = boot.guest.files.clone();
        state.boot = Some(boot);
        drop(state);
        self.with_files(|tree| {
            for (path, content) in files {
                if tree.get(&path).is_none() {
                    tree.put(&path, content, 0o644);
                }
            }
        });
        self.life.send_replace(Life::Running);
        if let Some((cause, delay)) = dies {
            self.later(delay, power, move |machine| machine.die(cause));
        }
        Ok(())
    }

    /// Does something to the machine after a delay, unless the token is cancelled first.
    fn later(
        self: &Arc<Self>,
        delay: Duration,
        token: CancellationToken,
        what: impl FnOnce(&Arc<Self>) + Send + 'static,
    ) {
        let machine = self.clone();
        let task = self.shared.task();
        tokio::spawn(async move {
            let _task = task;
            tokio::select! {
                () = token.cancelled() => {}
                () = tokio::time::sleep(delay) => what(&machine),
            }
        });
    }

    /// Handles a request to power off.
    pub(super) fn begin_power_off(self: &Arc<Self>) {
        let Some(boot) = self.boot() else { return };
        if boot.guest.faults.ignores_shutdown {
            return;
        }
        let cause = boot.guest.faults.dies_in_shutdown;
        self.later(
            boot.guest.shutdown_delay.unwrap_or(COMMAND_GRACE),
            boot.power,
            move |machine| match cause {
                Some(cause) => machine.die(cause),
                None => machine.end(Exit::PoweredOff),
            },
        );
    }

    /// Handles a request to reboot: the SSH server continues for a while, then all connections are cut.
    pub(super) fn begin_reboot(self: &Arc<Self>) {
        let Some(old) = self.boot() else { return };
        let linger = old.guest.reboot_linger.unwrap_or(COMMAND_GRACE);
        self.later(linger, old.token.clone(), move |machine| {
            match machine.new_boot(old.guest.clone(), old.terminal.clone(), &old.power) {
                Ok(new) => {
                    let mut state = machine.state();
                    if state.boot.as_ref().is_some_and(|boot| boot.id == old.id) {
                        if let Some(record) = &state.serial {
                            record.write(new.guest.serial.as_deref().unwrap_or(BANNER));
                        }
                        state.boot = Some(new);
                    }
                    drop(state);
                    old.terminal.boot();
                    old.token.cancel();
                }
                Err(error) => machine.end(Exit::Died { cause: Death::Hypervisor, detail: error.to_string() }),
            }
        });
    }

    async fn ended(&self) -> Result<Exit> {
        let mut life = self.life.subscribe();
        let ended = life.wait_for(|life| *life != Life::Running).await;
        match ended.as_deref() {
            Ok(Life::Ended(exit)) => Ok(exit.clone()),
            _ => Err(Error::new(
                ErrorKind::Conflict,
                format!("expected VM {} to have been started, but it never was", self.spec.name),
            )),
        }
    }
}

fn new_host_key() -> Result<PrivateKey> {
    PrivateKey::random(&mut rand::rng(), Algorithm::Ed25519)
        .map_err(|error| Error::new(ErrorKind::Internal, "cannot generate a host key").with_source(error))
}

/// A machine of a [`MemoryBackend`](super::MemoryBackend).
#[derive(Debug, Clone)]
pub(super) struct MemoryMachine {
    pub(super) core: Arc<MachineCore>,
    pub(super) lab: Arc<LabCore>,
}

#[async_trait]
impl Machine for MemoryMachine {
    fn name(&self) -> &str {
        &self.core.spec.name
    }

    async fn start(&self) -> Result<()> {
        self.core.shared.check(Operation::Start)?;
        self.lab.check_alive()?;
        self.core.power_on()
    }

    async fn wait(&self) -> Result<Exit> {
        self.core.ended().await
    }

    async fn stop(&self, how: Stop) -> Result<Exit> {
        match how {
            Stop::Kill => self.core.end(Exit::Killed { why: "on request".into() }),
            Stop::Graceful { limit } => {
                self.core.begin_power_off();
                if tokio::time::timeout(limit, self.core.ended()).await.is_err() {
                    self.core
                        .end(Exit::Killed { why: format!("did not power off within {} s", limit.as_secs()) });
                }
            }
        }
        self.core.ended().await
    }

    async fn dial(&self, port: u16) -> Result<BoxedStream> {
        let error = |kind, message: String| Error::new(kind, message).with_context("port", port);
        let name = self.name();
        let boot = self.core.boot().ok_or_else(|| {
            error(ErrorKind::Conflict, format!("expected VM {name} to run, but it does not"))
        })?;
        if !self.core.spec.ports.contains(&port) {
            let message =
                format!("expected one of the ports that VM {name} was created with, but found {port}");
            return Err(error(ErrorKind::InvalidInput, message));
        }
        let is_ssh = self.core.spec.ports.first() == Some(&port);
        let echoes = boot.guest.echoes.contains(&port);
        let listens = (is_ssh || echoes) && boot.guest.faults.silence != Some(Silence::Refuses);
        if Instant::now() < boot.ready || !listens {
            let message = format!("expected VM {name} to listen, but the connection was refused");
            return Err(error(ErrorKind::GuestUnreachable, message));
        }
        let (near, far) = tokio::io::duplex(64 << 10);
        let connection = self.core.shared.connection();
        if boot.guest.faults.silence == Some(Silence::Accepts) {
            streams::hold(far, boot.token.clone(), connection);
        } else if echoes {
            streams::echo(far, boot.token.clone(), connection);
        } else {
            ssh::serve(self.core.clone(), boot, far);
        }
        Ok(Box::new(near))
    }

    async fn display(&self) -> Result<BoxedStream> {
        let boot = self.core.boot().ok_or_else(|| {
            Error::new(ErrorKind::Conflict, format!("expected VM {} to run, but it is off", self.name()))
        })?;
        if !boot.terminal.is_there() {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!("the display of VM {} has ended", self.name()),
            ));
        }
        let (near, far) = tokio::io::duplex(64 << 10);
        boot.terminal.serve(far, boot.power, self.core.shared.connection());
        Ok(Box::new(near))
    }

    fn display_encoding(&self) -> DisplayEncoding {
        match self.core.shared.is_remote() {
            true => DisplayEncoding::Compressed,
            false => DisplayEncoding::Raw,
        }
    }

    async fn serial(&self) -> Result<BoxedStream> {
        self.core.boot().ok_or_else(|| {
            Error::new(ErrorKind::Conflict, format!("expected VM {} to run, but it is off", self.name()))
        })?;
        let (near, far) = tokio::io::duplex(64 << 10);
        streams::console(self.core.clone(), far);
        Ok(Box::new(near))
    }

    async fn serial_log(&self, from: u64) -> Result<SerialLog> {
        Ok(self.core.serial_log(from))
    }

    async fn screenshot(&self) -> Result<Vec<u8>> {
        Err(unsupported(Capability::Screenshot))
    }

    fn access(&self) -> Vec<String> {
        vec![format!("VM {} is in the memory of this process: Machine::dial reaches it", self.name())]
    }

    async fn capture(&self, disk: &str, progress: &Progress) -> Result<CapturedDisk> {
        self.core.shared.check(Operation::Capture)?;
        if self.core.is_running() {
            return Err(Error::new(
                ErrorKind::Conflict,
                format!("expected VM {} to have ended, but it runs", self.name()),
            ));
        }
        let spec = self.core.spec.disks.iter().find(|spec| spec.name == disk).ok_or_else(|| {
            Error::new(
                ErrorKind::NotFound,
                format!("expected VM {} to have a disk {disk}, but it does not", self.name()),
            )
        })?;
        let files = {
            let volumes = self.core.volumes.lock().unwrap_or_else(PoisonError::into_inner);
            volumes.get(&spec.volume.id).map(|volume| volume.files.clone()).unwrap_or_default()
        };
        let bytes = serde_json::to_vec(&files)
            .map_err(|error| Error::new(ErrorKind::Internal, "cannot encode a disk").with_source(error))?;
        let (sha256, size) = (Digest::of(&bytes), bytes.len() as u64);
        let file = format!("{sha256}.json");
        let content = match self.core.shared.is_remote() {
            true => Content::identified(ContentId::Cluster(file.clone())),
            false => Content::of_bytes(size, sha256),
        };
        let task = format!("convert {disk}");
        let total = content.size;
        progress.bytes(&task, 0, total);
        progress.bytes(&task, size, total);
        let captured = CapturedDisk {
            name: disk.to_owned(),
            bus: spec.bus,
            file,
            format: "memory".into(),
            virtual_size: spec.volume.virtual_size,
            content,
        };
        self.lab.captured(&captured, Arc::new(files));
        Ok(captured)
    }

    async fn capture_state(&self) -> Result<Vec<CapturedState>> {
        if self.core.is_running() {
            let message = format!("expected VM {} to be off, but it runs", self.name());
            return Err(Error::new(ErrorKind::Conflict, message));
        }
        Ok(Vec::new())
    }
}

fn unsupported(capability: Capability) -> Error {
    Error::new(ErrorKind::Unsupported, format!("the memory backend does not support {capability}"))
}
