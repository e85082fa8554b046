//! Sockets on this host that lead to ports of a machine: they let a person connect, while nothing listens on the network.

use super::Network;
use std::{fs, io, os::unix::fs::PermissionsExt as _, path::PathBuf, sync::Arc};
use tokio::{
    io::copy_bidirectional,
    net::{UnixListener, UnixStream},
    task::JoinSet,
};

/// The open doors of a machine.
#[derive(Debug)]
pub struct PortForwards {
    _listeners: JoinSet<()>,
}

pub(super) fn open(
    network: &Arc<Network>,
    machine: &str,
    ports: impl IntoIterator<Item = (u16, PathBuf)>,
) -> io::Result<PortForwards> {
    let mut listeners = JoinSet::new();
    for (port, path) in ports {
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(&path)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
        listeners.spawn(accept_connections(Arc::downgrade(network), machine.to_owned(), port, listener));
    }
    Ok(PortForwards { _listeners: listeners })
}

async fn accept_connections(
    network: std::sync::Weak<Network>,
    machine: String,
    port: u16,
    listener: UnixListener,
) {
    let mut guests = JoinSet::new();
    loop {
        while guests.try_join_next().is_some() {}
        let Ok((mut caller, _)) = listener.accept().await else {
            // Out of file descriptors, which is temporary.
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            continue;
        };
        let Some(network) = network.upgrade() else { return };
        let machine = machine.clone();
        guests.spawn(async move {
            let _ = forward(&network, &machine, port, &mut caller).await;
        });
    }
}

async fn forward(network: &Network, machine: &str, port: u16, caller: &mut UnixStream) -> io::Result<()> {
    let mut guest = network.dial(machine, port).await?;
    copy_bidirectional(caller, &mut guest).await.map(drop)
}
