//! The consoles of a machine: its serial console, its display, and screenshots.

use super::QemuMachine;
use rudder_core::{Error, ErrorKind, Result, backend::BoxedStream};
use rudder_local::serial::{SerialConsole, SerialPaths};
use std::sync::{Arc, PoisonError, atomic::Ordering};
use tokio::net::UnixStream;

impl QemuMachine {
    /// Returns the serial console of the last run.
    pub(super) fn console(&self) -> Option<Arc<SerialConsole>> {
        self.console.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Connects to the serial console of a QEMU whose guest is not running yet.
    pub(super) async fn attach_console(&self) -> Result<Arc<SerialConsole>> {
        let paths = SerialPaths {
            socket: self.storage.socket(&self.files.serial),
            people: self.storage.socket(&self.files.console),
            record: self.storage.path(&self.files.serial_log),
        };
        let attached = SerialConsole::attach(paths).await;
        attached.map(Arc::new).map_err(|error| Error::io("connect to the serial console", error))
    }

    /// Returns the socket on which people currently reach the serial console.
    pub(super) fn console_socket(&self) -> &str {
        match self.console() {
            Some(console) if console.is_let_go() => &self.files.serial,
            _ => &self.files.console,
        }
    }

    /// Connects a reader to the serial console.
    pub(super) async fn connect_console(&self) -> Result<BoxedStream> {
        self.with_running(|_| ())?;
        let console = self.console().ok_or_else(|| {
            self.error(ErrorKind::Conflict, "expected a running machine, but found that it does not run")
        })?;
        console.connect().await.map_err(|error| {
            self.error(ErrorKind::Protocol, "cannot connect to the serial console").with_source(error)
        })
    }

    /// Connects to one of QEMU's sockets.
    pub(super) async fn open_socket(&self, file: &str, what: &str) -> Result<BoxedStream> {
        self.with_running(|_| ())?;
        let stream = UnixStream::connect(self.storage.socket(file)).await;
        let stream = stream.map_err(|error| {
            self.error(ErrorKind::Protocol, format!("cannot connect to the {what}")).with_source(error)
        })?;
        Ok(Box::new(stream))
    }

    /// Takes a screenshot as PNG; returns the last one if the machine has ended.
    pub(super) async fn picture(&self) -> Result<Vec<u8>> {
        let last = self.storage.path(&self.files.picture);
        let failed = |error| Error::io(format_args!("read {}", last.display()), error);
        match self.with_running(|running| running.qmp.clone()) {
            Ok(qmp) => {
                // Two screenshots may be taken at once, so each is complete before it gets the name of the last one.
                let number = self.pictures.fetch_add(1, Ordering::Relaxed);
                let file = format!("{number}.{}", self.files.picture);
                qmp.screendump(&file).await?;
                let path = self.storage.path(&file);
                let picture = tokio::fs::read(&path).await.map_err(failed)?;
                tokio::fs::rename(&path, &last).await.map_err(failed)?;
                Ok(picture)
            }
            // The watcher took a last screenshot of a machine that failed.
            Err(error) if !last.exists() => Err(error),
            Err(_) => tokio::fs::read(&last).await.map_err(failed),
        }
    }
}
