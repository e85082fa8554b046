//! Services that the gateway offers to guests over TCP.

use super::stream::GuestStream;
use std::{collections::HashMap, sync::Arc};
use tokio::sync::mpsc;

/// Number of connections that may wait to be accepted.
const BACKLOG: usize = 64;

/// A connection that a machine opened.
pub(crate) type Caller = (Arc<str>, GuestStream);

/// Services by port.
#[derive(Debug, Default)]
pub(crate) struct Services(HashMap<u16, Service>);

impl Services {
    /// Opens a port, and returns the receiver of its connections. Dropping the receiver closes the port.
    pub(crate) fn open(&mut self, port: u16) -> mpsc::Receiver<Caller> {
        let (callers, receiver) = mpsc::channel(BACKLOG);
        self.0.insert(port, Service(callers));
        receiver
    }

    /// Returns the service at a port.
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
    /// Hands a connection over; it is reset if the service does not accept it.
    pub(crate) fn accept(&self, machine: Arc<str>, stream: GuestStream) {
        if let Err(
            mpsc::error::TrySendError::Full((_, stream)) | mpsc::error::TrySendError::Closed((_, stream)),
        ) = self.0.try_send((machine, stream))
        {
            stream.abort();
        }
    }
}
