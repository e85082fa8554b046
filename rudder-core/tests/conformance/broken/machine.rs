//! A machine with one fault.

use super::{Defect, Shared, error, lock, stream::DefectiveStream};
use async_trait::async_trait;
use rudder_core::{
    ErrorKind, Result,
    backend::{BoxedStream, Death, DisplayEncoding, Exit, Machine, Progress, SerialLog, Stop},
    content::Content,
    digest::Digest,
    module::{CapturedDisk, CapturedState, StateKind},
};
use std::{
    io,
    net::Ipv4Addr,
    sync::{Arc, Mutex, Weak},
    time::Duration,
};
use tokio::net::TcpStream;

/// Delay of late reports.
const DELAY: Duration = Duration::from_secs(6);

#[derive(Debug)]
pub(super) struct BrokenMachine {
    inner: Arc<dyn Machine>,
    shared: Arc<Shared>,
    /// Its lab and its name.
    key: String,
    /// Name of its first disk.
    disk: String,
    /// Digest of its firmware variables; `None` with BIOS.
    variables: Option<Digest>,
    /// Shared by all readers of the serial console.
    readers: Arc<()>,
    /// Serial output from before the last start.
    old_output: Mutex<Vec<u8>>,
    /// Held by the only caller that learns how the machine ended.
    turn: tokio::sync::Mutex<()>,
}

impl BrokenMachine {
    pub(super) fn new(
        inner: Arc<dyn Machine>,
        shared: Arc<Shared>,
        key: String,
        disk: String,
        variables: Option<Digest>,
    ) -> Self {
        let (readers, old_output, turn) = (Arc::default(), Mutex::default(), tokio::sync::Mutex::default());
        Self { inner, shared, key, disk, variables, readers, old_output, turn }
    }

    fn is(&self, defect: Defect) -> bool {
        self.shared.is(defect)
    }

    /// Returns the machine whose consoles are shown.
    fn shown(&self, defect: Defect) -> Arc<dyn Machine> {
        let other = self.shared.last_machine().filter(|_| self.is(defect));
        other.unwrap_or_else(|| Arc::clone(&self.inner))
    }

    async fn notified(&self, exit: Exit) -> Exit {
        match (self.shared.defect, exit) {
            (Defect::ReportsDeathLate, exit @ Exit::Died { .. })
            | (Defect::ReportsPowerOffLate, exit @ Exit::PoweredOff) => {
                tokio::time::sleep(DELAY).await;
                exit
            }
            (Defect::SwapsExits, Exit::PoweredOff) => Exit::Killed { why: "on request".to_owned() },
            (Defect::SwapsExits, Exit::Killed { .. }) => Exit::PoweredOff,
            (Defect::SwapsDeaths, Exit::Died { cause: Death::Hypervisor, detail }) => {
                Exit::Died { cause: Death::GuestPanic, detail }
            }
            (_, exit) => exit,
        }
    }
}

#[async_trait]
impl Machine for BrokenMachine {
    fn name(&self) -> &str {
        self.inner.name()
    }

    async fn start(&self) -> Result<()> {
        *lock(&self.old_output) = self.inner.serial_tail(usize::MAX).await?;
        match self.inner.start().await {
            Err(error) if error.kind() == ErrorKind::Conflict && self.is(Defect::StartsTwice) => Ok(()),
            started => started,
        }
    }

    async fn wait(&self) -> Result<Exit> {
        let _turn = match self.is(Defect::NotifiesOneWaiter) {
            true => match self.turn.try_lock() {
                Ok(turn) => Some(turn),
                Err(_) => std::future::pending().await,
            },
            false => None,
        };
        let exit = self.inner.wait().await?;
        Ok(self.notified(exit).await)
    }

    async fn stop(&self, how: Stop) -> Result<Exit> {
        if self.is(Defect::MixesLabs) {
            let all: Vec<_> = lock(&self.shared.machines).iter().filter_map(Weak::upgrade).collect();
            for machine in all.iter().filter(|machine| machine.name() == self.inner.name()) {
                // A machine that was never started cannot be stopped.
                let _ = machine.stop(how).await;
            }
        }
        let how = match (self.shared.defect, how) {
            (Defect::KillsAtOnce, _) => Stop::Kill,
            (Defect::NeverKills, Stop::Graceful { .. }) => {
                self.inner.wait().await?;
                Stop::Kill
            }
            (_, how) => how,
        };
        match self.inner.stop(how).await {
            Err(error) if error.kind() == ErrorKind::Conflict && self.is(Defect::StopsUnstartedMachines) => {
                Ok(Exit::PoweredOff)
            }
            stopped => Ok(self.notified(stopped?).await),
        }
    }

    async fn dial(&self, port: u16) -> Result<BoxedStream> {
        if self.is(Defect::DialsTheHost)
            && let Ok(stream) = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await
        {
            return Ok(Box::new(stream));
        }
        let stream = self.inner.dial(port).await.map_err(|found| match self.shared.defect {
            Defect::ReportsRefusedAsUnknown if port == 9 => error(ErrorKind::Internal, "it did not work"),
            Defect::ReportsOffAsRetryable if found.kind() == ErrorKind::Conflict => {
                error(ErrorKind::GuestUnreachable, "there was no answer")
            }
            _ => found,
        })?;
        Ok(Box::new(DefectiveStream::new(stream, Arc::clone(&self.shared), None)))
    }

    async fn display(&self) -> Result<BoxedStream> {
        let stream = self.shown(Defect::MixesDisplays).display().await?;
        Ok(match self.is(Defect::PromisesCompression) {
            true => Box::new(DefectiveStream::new(stream, Arc::clone(&self.shared), None)),
            false => stream,
        })
    }

    fn display_encoding(&self) -> DisplayEncoding {
        match self.is(Defect::PromisesCompression) {
            true => DisplayEncoding::Compressed,
            false => self.inner.display_encoding(),
        }
    }

    async fn serial(&self) -> Result<BoxedStream> {
        if self.is(Defect::HasOneReader) && Arc::strong_count(&self.readers) > 1 {
            return Err(error(ErrorKind::Conflict, "the serial console has a reader already"));
        }
        let hold = Some(Arc::clone(&self.readers));
        let stream = self.shown(Defect::MixesSerials).serial().await?;
        Ok(Box::new(DefectiveStream::new(stream, Arc::clone(&self.shared), hold)))
    }

    async fn serial_log(&self, from: u64) -> Result<SerialLog> {
        let log = self.shown(Defect::MixesSerials).serial_log(from).await?;
        let power_on = log.power_on;
        let of = |bytes: Vec<u8>| SerialLog::new(power_on, 0, bytes.len() as u64, io::Cursor::new(bytes));
        Ok(match self.shared.defect {
            Defect::KeepsLittleSerialOutput => of(log.tail(1000).await?),
            Defect::LosesSerialOutputAtTheEnd if self.inner.display().await.is_err() => of(Vec::new()),
            Defect::KeepsOldSerialOutput => {
                let old = lock(&self.old_output).clone();
                let all = [old, log.tail(usize::MAX).await?].concat();
                of(all)
            }
            _ => log,
        })
    }

    async fn screenshot(&self) -> Result<Vec<u8>> {
        self.inner.screenshot().await
    }

    fn access(&self) -> Vec<String> {
        self.inner.access()
    }

    async fn capture(&self, disk: &str, progress: &Progress) -> Result<CapturedDisk> {
        let progress = self.shared.progress(progress);
        let mut captured = self.inner.capture(disk, &progress).await?;
        if self.is(Defect::CapturesTheFirstDisk) {
            let first = self.inner.capture(&self.disk, &Progress::none()).await?;
            captured.file = first.file;
            captured.content = first.content.clone();
        }
        if self.is(Defect::CapturesOnce) {
            let key = format!("{} {disk}", self.key);
            captured = lock(&self.shared.captured).entry(key).or_insert(captured).clone();
        }
        Ok(captured)
    }

    async fn capture_state(&self) -> Result<Vec<CapturedState>> {
        let mut captured = self.inner.capture_state().await?;
        let variables = self.variables.filter(|_| !self.is(Defect::DropsState));
        captured.extend(variables.map(|sha256| {
            CapturedState::new(
                StateKind::FirmwareVariables,
                format!("{sha256}.variables"),
                "memory",
                Content::of_bytes(1, sha256),
            )
        }));
        Ok(captured)
    }
}
