//! A machine with one fault.

use super::{Shared, Wrong, error, lock, stream::Crooked};
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
const LATE: Duration = Duration::from_secs(6);

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
    old_words: Mutex<Vec<u8>>,
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
        let (readers, old_words, turn) = (Arc::default(), Mutex::default(), tokio::sync::Mutex::default());
        Self { inner, shared, key, disk, variables, readers, old_words, turn }
    }

    fn is(&self, wrong: Wrong) -> bool {
        self.shared.is(wrong)
    }

    /// Returns the machine whose consoles are shown.
    fn shown(&self, wrong: Wrong) -> Arc<dyn Machine> {
        let other = self.shared.last_machine().filter(|_| self.is(wrong));
        other.unwrap_or_else(|| Arc::clone(&self.inner))
    }

    async fn told(&self, exit: Exit) -> Exit {
        match (self.shared.wrong, exit) {
            (Wrong::SeesDeathLate, exit @ Exit::Died { .. })
            | (Wrong::TellsPowerOffLate, exit @ Exit::PoweredOff) => {
                tokio::time::sleep(LATE).await;
                exit
            }
            (Wrong::SwapsExits, Exit::PoweredOff) => Exit::Killed { why: "was told to".to_owned() },
            (Wrong::SwapsExits, Exit::Killed { .. }) => Exit::PoweredOff,
            (Wrong::SwapsDeaths, Exit::Died { cause: Death::Hypervisor, detail }) => {
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
        *lock(&self.old_words) = self.inner.serial_tail(usize::MAX).await?;
        match self.inner.start().await {
            Err(error) if error.kind() == ErrorKind::Conflict && self.is(Wrong::StartsTwice) => Ok(()),
            started => started,
        }
    }

    async fn wait(&self) -> Result<Exit> {
        let _turn = match self.is(Wrong::TellsOneWaiter) {
            true => match self.turn.try_lock() {
                Ok(turn) => Some(turn),
                Err(_) => std::future::pending().await,
            },
            false => None,
        };
        let exit = self.inner.wait().await?;
        Ok(self.told(exit).await)
    }

    async fn stop(&self, how: Stop) -> Result<Exit> {
        if self.is(Wrong::MixesLabsUp) {
            let all: Vec<_> = lock(&self.shared.machines).iter().filter_map(Weak::upgrade).collect();
            for machine in all.iter().filter(|machine| machine.name() == self.inner.name()) {
                // A machine that was never started cannot be stopped.
                let _ = machine.stop(how).await;
            }
        }
        let how = match (self.shared.wrong, how) {
            (Wrong::KillsAtOnce, _) => Stop::Kill,
            (Wrong::NeverKills, Stop::Graceful { .. }) => {
                self.inner.wait().await?;
                Stop::Kill
            }
            (_, how) => how,
        };
        match self.inner.stop(how).await {
            Err(error) if error.kind() == ErrorKind::Conflict && self.is(Wrong::StopsWhatNeverRan) => {
                Ok(Exit::PoweredOff)
            }
            stopped => Ok(self.told(stopped?).await),
        }
    }

    async fn dial(&self, port: u16) -> Result<BoxedStream> {
        if self.is(Wrong::DialsTheHost)
            && let Ok(stream) = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await
        {
            return Ok(Box::new(stream));
        }
        let stream = self.inner.dial(port).await.map_err(|found| match self.shared.wrong {
            Wrong::CannotSayRefused if port == 9 => error(ErrorKind::Internal, "it did not work"),
            Wrong::CannotSayOff if found.kind() == ErrorKind::Conflict => {
                error(ErrorKind::GuestUnreachable, "nobody answers")
            }
            _ => found,
        })?;
        Ok(Box::new(Crooked::new(stream, Arc::clone(&self.shared), None)))
    }

    async fn display(&self) -> Result<BoxedStream> {
        let stream = self.shown(Wrong::MixesDisplays).display().await?;
        Ok(match self.is(Wrong::PromisesCompression) {
            true => Box::new(Crooked::new(stream, Arc::clone(&self.shared), None)),
            false => stream,
        })
    }

    fn display_encoding(&self) -> DisplayEncoding {
        match self.is(Wrong::PromisesCompression) {
            true => DisplayEncoding::Compressed,
            false => self.inner.display_encoding(),
        }
    }

    async fn serial(&self) -> Result<BoxedStream> {
        if self.is(Wrong::HasOneReader) && Arc::strong_count(&self.readers) > 1 {
            return Err(error(ErrorKind::Conflict, "somebody reads the serial console"));
        }
        let hold = Some(Arc::clone(&self.readers));
        let stream = self.shown(Wrong::MixesSerials).serial().await?;
        Ok(Box::new(Crooked::new(stream, Arc::clone(&self.shared), hold)))
    }

    async fn serial_log(&self, from: u64) -> Result<SerialLog> {
        let log = self.shown(Wrong::MixesSerials).serial_log(from).await?;
        let power_on = log.power_on;
        let of = |bytes: Vec<u8>| SerialLog::new(power_on, 0, bytes.len() as u64, io::Cursor::new(bytes));
        Ok(match self.shared.wrong {
            Wrong::KeepsFewWords => of(log.tail(1000).await?),
            Wrong::ForgetsLastWords if self.inner.display().await.is_err() => of(Vec::new()),
            Wrong::KeepsOldWords => {
                let old = lock(&self.old_words).clone();
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
        if self.is(Wrong::CapturesTheFirstDisk) {
            let first = self.inner.capture(&self.disk, &Progress::none()).await?;
            captured.file = first.file;
            captured.content = first.content.clone();
        }
        if self.is(Wrong::CapturesOnce) {
            let key = format!("{} {disk}", self.key);
            captured = lock(&self.shared.captured).entry(key).or_insert(captured).clone();
        }
        Ok(captured)
    }

    async fn capture_state(&self) -> Result<Vec<CapturedState>> {
        let mut captured = self.inner.capture_state().await?;
        let variables = self.variables.filter(|_| !self.is(Wrong::DropsState));
        captured.extend(variables.map(|sha256| CapturedState {
            kind: StateKind::FirmwareVariables,
            file: format!("{sha256}.variables"),
            format: "memory".to_owned(),
            content: Content::of_bytes(1, sha256),
        }));
        Ok(captured)
    }
}
