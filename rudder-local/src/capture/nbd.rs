//! Reads the content of a disk as a guest sees it, whatever its format and however many backing files it has, through qemu-nbd
//! and the NBD protocol (<https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>).

use crate::{
    lab_storage::LabStorage,
    process::{OwnedChild, describe, without_advice},
};
use rudder_core::{Error, ErrorKind, Result};
use std::{
    fs,
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    path::PathBuf,
    process::Stdio,
    time::Duration,
};

/// The first bytes that the server sends.
const SERVER_MAGIC: u64 = 0x4e42_444d_4147_4943;
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;
/// Handshake flags of both sides: fixed newstyle negotiation, and no padding at its end.
const FIXED_NEWSTYLE: u16 = 1;
const NO_ZEROES: u16 = 2;
/// The option that ends the negotiation and names the export.
const EXPORT_NAME: u32 = 1;
const READ: u16 = 0;

/// Settings of glibc's malloc (mallopt(3)): qemu-nbd needs the same few buffers for each cluster, and by default would request
/// them from the kernel and return them every time.
const MEMORY: [(&str, &str); 2] =
    [("MALLOC_MMAP_THRESHOLD_", "67108864"), ("MALLOC_TRIM_THRESHOLD_", "268435456")];

/// Time limit for qemu-nbd to open an image and to answer.
const RESPONSE_LIMIT: Duration = Duration::from_secs(60);

/// An image served by a qemu-nbd process, which ends when this is dropped, or with the owner of the lab.
pub(super) struct Export {
    process: OwnedChild,
    /// The files that qemu-nbd leaves behind.
    socket: PathBuf,
    log_path: PathBuf,
    /// A path of the socket that is short enough for an address.
    address: PathBuf,
}

impl Export {
    /// Serves an image in the lab's directory to up to `clients` clients at a time.
    pub(super) async fn open(storage: &LabStorage, image: &str, clients: usize) -> Result<Self> {
        let (socket, log_path) = (format!("{image}.nbd"), format!("{image}.nbd.log"));
        let failed = |error| Error::io(format_args!("write {}", storage.path(&log_path).display()), error);
        let log = fs::File::create(storage.path(&log_path)).map_err(failed)?;
        let mut invocation = storage.qemu_nbd();
        for (name, value) in MEMORY {
            invocation = invocation.variable(name, value);
        }
        let invocation = invocation
            .args(["--read-only", "--persistent", "--format=qcow2"])
            .args([format!("--shared={clients}"), format!("--socket=/proc/self/cwd/{socket}")])
            .args(["--", image]);
        let process = invocation.spawn(Stdio::null(), Stdio::null(), log.into()).await?;
        let address = storage.socket(&socket);
        let mut export =
            Self { process, socket: storage.path(&socket), log_path: storage.path(&log_path), address };
        tokio::time::timeout(RESPONSE_LIMIT, export.ready())
            .await
            .map_err(|_| export.failure("does not answer"))??;
        Ok(export)
    }

    /// Waits until it accepts connections.
    async fn ready(&mut self) -> Result<()> {
        loop {
            if UnixStream::connect(&self.address).is_ok() {
                return Ok(());
            }
            let pause = tokio::time::sleep(Duration::from_millis(2));
            tokio::select! {
                () = pause => {}
                status = self.process.wait() => {
                    let what = status.map_or_else(|error| error.to_string(), describe);
                    return Err(self.failure(&what));
                }
            }
        }
    }

    /// Returns an error that includes the output of qemu-nbd.
    fn failure(&self, what: &str) -> Error {
        let log = without_advice(&fs::read_to_string(&self.log_path).unwrap_or_default());
        let log = log.trim();
        let output = if log.is_empty() { what } else { log };
        Error::new(ErrorKind::Io, format!("cannot read the disk: qemu-nbd: {output}"))
    }

    /// Opens a new connection. Blocks.
    pub(super) fn connect(&self) -> Result<Client> {
        Client::handshake(&self.address).map_err(|error| self.failure("does not answer").with_source(error))
    }

    /// Returns the error for a failed read.
    pub(super) fn unreadable(&self, error: io::Error) -> Error {
        self.failure("a read failed").with_source(error)
    }
}

impl Drop for Export {
    fn drop(&mut self) {
        self.process.kill();
        // Removed with the lab at the latest.
        let _ = fs::remove_file(&self.socket);
        let _ = fs::remove_file(&self.log_path);
    }
}

/// A connection that handles one request at a time.
pub(super) struct Client {
    stream: UnixStream,
}

impl Client {
    fn handshake(address: &PathBuf) -> io::Result<Self> {
        let stream = UnixStream::connect(address)?;
        stream.set_read_timeout(Some(RESPONSE_LIMIT))?;
        stream.set_write_timeout(Some(RESPONSE_LIMIT))?;
        let mut client = Self { stream };
        let (magic, option) = (u64::from_be_bytes(client.take()?), u64::from_be_bytes(client.take()?));
        let flags = u16::from_be_bytes(client.take()?);
        if (magic, option) != (SERVER_MAGIC, OPTION_MAGIC) || flags & FIXED_NEWSTYLE == 0 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "expected an NBD server, but found another protocol",
            ));
        }
        let flags = flags & (FIXED_NEWSTYLE | NO_ZEROES);
        let mut choice = Vec::new();
        choice.extend(u32::from(flags).to_be_bytes());
        choice.extend(OPTION_MAGIC.to_be_bytes());
        choice.extend(EXPORT_NAME.to_be_bytes());
        // The length of the export's name, which is empty.
        choice.extend(0_u32.to_be_bytes());
        client.stream.write_all(&choice)?;
        // Size and flags of the export; padding.
        client.take::<10>()?;
        if flags & NO_ZEROES == 0 {
            client.take::<124>()?;
        }
        Ok(client)
    }

    fn take<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    /// Fills the buffer with the bytes at this offset. At most 32 MiB.
    pub(super) fn read(&mut self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let length = u32::try_from(bytes.len()).map_err(io::Error::other)?;
        let mut request = Vec::with_capacity(28);
        request.extend(REQUEST_MAGIC.to_be_bytes());
        request.extend(0_u16.to_be_bytes());
        request.extend(READ.to_be_bytes());
        // The handle, which the reply repeats.
        request.extend(offset.to_be_bytes());
        request.extend(offset.to_be_bytes());
        request.extend(length.to_be_bytes());
        self.stream.write_all(&request)?;
        let magic = u32::from_be_bytes(self.take()?);
        let error = u32::from_be_bytes(self.take()?);
        let handle = u64::from_be_bytes(self.take()?);
        if magic != REPLY_MAGIC || handle != offset {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "expected the reply of an NBD server, but found other data",
            ));
        }
        if error != 0 {
            // The protocol's error numbers are Linux's.
            let number = i32::try_from(error).unwrap_or(i32::MAX);
            return Err(io::Error::from_raw_os_error(number));
        }
        self.stream.read_exact(bytes)
    }
}
