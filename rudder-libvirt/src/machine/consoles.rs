//! The consoles of a machine: its serial console, and descriptions of how people access it.

use super::{Inner, launch::Ways};
use rudder_core::{Error, ErrorKind, Result, backend::BoxedStream};
use rudder_local::serial::{SerialConsole, SerialPaths};
use std::sync::{Arc, PoisonError};

impl Inner {
    /// Returns the serial console of the last run.
    pub(super) fn console(&self) -> Option<Arc<SerialConsole>> {
        self.console.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Connects to the serial console of a domain whose guest is not running yet.
    pub(super) async fn attach_console(&self) -> Result<Arc<SerialConsole>> {
        let storage = &self.context.storage;
        let paths = SerialPaths {
            socket: storage.socket(&self.file("serial")),
            people: storage.socket(&self.file("console")),
            record: storage.path(&self.file("serial.log")),
        };
        let attached = SerialConsole::attach(paths).await;
        attached.map(Arc::new).map_err(|error| Error::io("connect to the serial console", error))
    }

    /// Connects a reader to the serial console.
    pub(super) async fn connect_console(&self) -> Result<BoxedStream> {
        self.ways()?;
        let console = self.console().ok_or_else(|| {
            self.error(ErrorKind::Conflict, "expected a running machine, but found that it does not run")
        })?;
        console.connect().await.map_err(|error| {
            self.error(ErrorKind::Protocol, "cannot connect to the serial console").with_source(error)
        })
    }

    /// Describes how to access the machine, with the serial console on this socket.
    pub(super) fn access_by(&self, console: &str) -> Vec<String> {
        let Ok(ways) = self.ways() else { return Vec::new() };
        let (name, domain, uri) = (&self.spec.name, &self.domain, self.context.connection.uri());
        let ports = self.spec.ports.iter();
        let reached = ports.filter_map(|port| Some((port, ways.to(*port)?)));
        let mut lines: Vec<String> = reached
            .map(|(port, at)| {
                let (host, way) = (at.ip(), at.port());
                format!("{name}: port {port} of the guest: {at} (ssh -p {way} USER@{host})")
            })
            .collect();
        if matches!(ways, Ways::Switched) {
            lines.extend(self.context.lan.access(&self.context.storage, &self.spec));
        }
        let serial = self.context.storage.path(&self.file(console));
        lines.push(format!("{name}: display: virt-viewer --connect '{uri}' --attach {domain}"));
        lines.push(format!("{name}: serial console: nc -U {}", serial.display()));
        lines
    }
}
