//! Differences between operating systems: the only module of this crate that depends on the target, except for URLs of
//! directories (`plan::urls`), which need no engine.

use std::{
    fs::{File, OpenOptions},
    io,
    path::Path,
};

/// Creates a file for writing, and fails if it exists. On Unix only its owner can read it (mode 0600); elsewhere it
/// inherits the permissions of its directory, which in a user's profile on Windows are limited to that user.
pub(crate) fn create_private(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(path)
}

/// Creates a directory, as private as the files of [`create_private`] (mode 0700 on Unix).
#[cfg(feature = "memory")]
pub(crate) fn create_private_directory(path: &Path) -> io::Result<()> {
    #[cfg_attr(not(unix), expect(unused_mut))]
    let mut builder = std::fs::DirBuilder::new();
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(path)
}

/// Registers something with the I/O driver of the current Tokio runtime, and drops it. Panics if there is no driver.
pub(crate) fn use_io_driver() {
    #[cfg(unix)]
    drop(tokio::net::UnixDatagram::unbound());
    #[cfg(not(unix))]
    if let Ok(socket) = std::net::UdpSocket::bind((std::net::Ipv4Addr::LOCALHOST, 0)) {
        drop(socket.set_nonblocking(true).and_then(|()| tokio::net::UdpSocket::from_std(socket)));
    }
}
