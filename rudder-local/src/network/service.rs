//! What the gateway serves to guests over TCP.

use super::stream::GuestStream;
use std::{collections::HashMap, sync::Arc};
use tokio::sync::mpsc;

/// Connections that may wait to be taken.
const BACKLOG: usize = 64;

/// A connection that a machine opened.
pub(crate) type Caller = (Arc<str>, GuestStream);

/// Services by their ports.
#[derive(Debug, Default)]
pub(crate) struct Services(HashMap<u16, Service>);

impl Services {
    /// Opens a port; where its connections come out. The port is closed when that is dropped.
    pub(crate) fn open(&mut self, port: u16) -> mpsc::Receiver<Caller> {
        let (callers, receiver) = mpsc::channel(BACKLOG);
        self.0.insert(port, Service(callers));
        receiver
    }

    /// The service at a port.
    pub(crate) fn at(&mut self, port: u16) -> Option<Service> {
        self.0.retain(|_, service| !service.0.is_closed());
        self.0.get(&port).cloned()
    }

    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }
}

/// A service of the gateway.
#[derive(Debug, Clone)]
pub(crate) struct Service(mpsc::Sender<Caller>);

impl Service {
    /// Hands a connection over; when nobody takes it, it is reset.
    pub(crate) fn take(&self, machine: Arc<str>, stream: GuestStream) {
        if let Err(
            mpsc::error::TrySendError::Full((_, stream)) | mpsc::error::TrySendError::Closed((_, stream)),
        ) = self.0.try_send((machine, stream))
        {
            stream.abort();
        }
    }
}
