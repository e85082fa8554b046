//! The contract between the core and a hypervisor. A backend provides streams and disks; the core does everything else.
//!
//! # Contract
//! The conformance suite (`rudder_core::testing`) tests what is written here and in the documentation of each method, and nothing
//! else.
//!
//! - **Cancel safety.** Dropping the future of any method leaves behind only what [`Lab::destroy`] or [`Backend::reap`] removes.
//! - **Ownership.** A lab belongs to the process that opened it, its owner, until that process destroys it or dies, unless the lab
//!   was [kept](Lab::keep) or opened [to stay](Retention::UntilRemoved). How a backend notices the death of an owner is its own
//!   affair: locks and ledgers on one host, a lease that the owner renews elsewhere. Everything a backend creates carries the id of
//!   its lab, so that `reap` finds what dead owners left behind and never touches what living owners use.
//! - **Errors** say what the user can do. The death of a machine is reported by [`Machine::wait`], not by timeouts. Error kinds are
//!   part of the contract:
//!
//!   | kind | when |
//!   |---|---|
//!   | `Conflict` | the operation is impossible in the current state: an id or a name is taken, a machine is or is not running, a module or a lab is in use, a lab was destroyed |
//!   | `NotFound` | a module, lab, VM or disk does not exist |
//!   | `InvalidInput` | the operation can never succeed: the backend cannot represent a name, the machine was not created with a port, the lab ends with its owner |
//!   | `Unsupported` | the backend does not declare the needed capability |
//!   | `GuestUnreachable` | the guest cannot be reached yet; the caller tries again |
//!
//!   Other kinds are those that the methods name.
//! - **Time.** Every end of a machine, whatever caused it, is reported within [`END_REPORTED_WITHIN`].
//! - **Progress** of one call: the amount done of a task never decreases and never exceeds its total, the total never changes once
//!   it is known, and the last report of each task says that all of it is done.
//! - **Names** and other text of a manifest reach the hypervisor escaped, never as part of a command line. Two different names stay
//!   different, even when they are 63 characters long and differ only in the last one. A name that the backend cannot represent is
//!   `InvalidInput`; it is never changed.

mod kept;
mod lab_file;
mod lab_id;
mod retention;
mod serial_log;
mod serial_ring;
mod site;
mod types;

pub use crate::progress::{Progress, ProgressEvent};
pub use kept::{KeptLab, KeptLogin};
pub use lab_file::check_lab_file;
pub use lab_id::LabId;
pub use retention::{LabInfo, LabState, Retention};
pub use serial_log::{SerialLog, SerialRecord};
pub use serial_ring::SerialRing;
pub use site::{FileSource, Served, Site, SiteFile, SiteRequest};
pub use types::*;

use crate::{
    Error, Result,
    capability::Capabilities,
    fetch::Fetch,
    module::{CapturedDisk, CapturedState, DamagedModule, Module},
};
use async_trait::async_trait;
use std::{
    fmt::Debug,
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};
use tokio::io::{AsyncRead, AsyncWrite};

/// Time within which [`Machine::wait`] must return after a machine has ended: after its guest powered off, after [`Machine::stop`]
/// killed it, or after the process that runs it died.
pub const END_REPORTED_WITHIN: Duration = Duration::from_secs(2);

/// Minimum number of bytes kept from the end of a serial console. A backend also bounds what it keeps, in memory and on disk,
/// however much and however fast the guest writes.
pub const SERIAL_KEPT: usize = 64 << 10;

/// A stream of bytes in both directions. With [`Capability::HalfClose`](crate::capability::Capability::HalfClose), either side may shut
/// down its sending half and continue reading; what the other side sends after that still arrives. Without it, a shutdown ends both
/// directions once what was written before has been sent.
pub trait ByteStream: AsyncRead + AsyncWrite + Send + Unpin + 'static {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin + 'static> ByteStream for T {}

/// A boxed [`ByteStream`].
pub type BoxedStream = Box<dyn ByteStream>;

/// A hypervisor that can open labs and stores modules.
#[async_trait]
pub trait Backend: Debug + Send + Sync + 'static {
    /// Returns the backend's name as users write it: `qemu`, `libvirt`, `memory`.
    fn name(&self) -> &str;

    /// Returns what the backend can do. Constant for the life of the value; what depends on the host is detected when the value is
    /// created.
    fn capabilities(&self) -> &Capabilities;

    /// Reports what exists on this host, what is missing, and how to fix it: at least one finding. Starts nothing; may be repeated.
    async fn diagnose(&self) -> Result<HostReport>;

    /// Returns the fetcher for files that the engine reads, used unless the build sets another
    /// ([`Build::fetcher`](crate::build::Build::fetcher)). A backend that caches sources on this host shares that cache.
    fn fetcher(&self) -> Arc<dyn Fetch>;

    /// Opens the isolated environment of one build or one clone. Also reaps what dead owners left behind, where that is cheap.
    ///
    /// # Errors
    /// `HostMissing` when something the lab needs is missing; `Conflict` when a lab with this id exists, including a kept one.
    /// Nothing is left behind on failure.
    async fn open_lab(&self, spec: &LabSpec) -> Result<Arc<dyn Lab>>;

    /// Returns the labs of all processes, sorted by id. May be repeated.
    async fn labs(&self) -> Result<Vec<LabInfo>>;

    /// Attaches to a kept lab of any process: its machines can be reached, watched and stopped. The caller does not become its
    /// owner. Dropping the lab, or the end of this process, changes nothing: the machines run on. A backend may let one process at
    /// a time attach, and need not let an attached lab grow: [`Lab::import`], [`Lab::create_machine`] and [`Lab::serve`] may be
    /// `Unsupported`.
    ///
    /// # Errors
    /// `NotFound` when there is no such lab; `Conflict` when it is not kept, or another process uses it and the backend allows one.
    async fn attach(&self, id: &LabId) -> Result<Arc<dyn Lab>>;

    /// Returns a file that was [stored](Lab::store_file) with a lab; `None` when it has no file of this name. Does not attach.
    ///
    /// # Errors
    /// `NotFound` when there is no such lab.
    async fn lab_file(&self, id: &LabId, name: &str) -> Result<Option<Vec<u8>>>;

    /// Returns all usable modules, sorted by name. May be repeated.
    async fn modules(&self) -> Result<Vec<Module>>;

    /// Returns the modules that exist but cannot be used, because their records or files are damaged or of a later version, sorted
    /// by name. May be repeated. The default suits a backend that cannot have any.
    async fn damaged_modules(&self) -> Result<Vec<DamagedModule>> {
        Ok(Vec::new())
    }

    /// Removes a module and all its files.
    ///
    /// # Errors
    /// `NotFound` when no module has this name; `Conflict` when a living lab builds on it.
    async fn remove_module(&self, name: &str) -> Result<()>;

    /// Removes a kept lab and everything in it, without attaching: also when another process uses it.
    ///
    /// # Errors
    /// `NotFound` when there is no such lab; `Conflict` when it belongs to a living owner.
    async fn remove_lab(&self, id: &LabId) -> Result<()>;

    /// Removes what dead owners left behind, and kept labs that have expired: processes, files, networks, objects. Never touches
    /// what belongs to a living owner, or a kept lab that has not expired. May be repeated, and run by several processes at once.
    async fn reap(&self) -> Result<ReapReport>;

    /// Removes cached inputs that are not needed. Never touches what a module or a living lab needs. May be repeated.
    async fn collect(&self) -> Result<ReapReport>;
}

/// The isolated environment of one build or one clone: its networks, volumes and machines.
#[async_trait]
pub trait Lab: Debug + Send + Sync {
    /// Returns the id from the [`LabSpec`] the lab was opened with. Unique among all labs of the backend.
    fn id(&self) -> &LabId;

    /// Returns the versions to record in the provenance, such as `qemu` → `7.2.22`. At least one: the hypervisor's own.
    fn versions(&self) -> std::collections::BTreeMap<String, String>;

    /// Imports a source into the lab without changing the original: as a disk that a machine may write to, or as a CD-ROM. A source
    /// that cannot be imported as this kind, such as a blank CD-ROM, is `Unsupported`.
    ///
    /// Requests for the same URL, in this or another process, share one download. Progress is reported in bytes as served. May be
    /// repeated: each call creates a volume of its own.
    ///
    /// # Errors
    /// `Download`, `NotFound` (also for a module whose digest differs, and for a VM or a disk that a module does not have),
    /// `ChecksumMismatch`, `InvalidImage`, `HostDiskFull`, and `InvalidInput` when `request.size` is smaller than the image or
    /// missing for a blank disk.
    async fn import(&self, request: &ImportRequest, progress: &Progress) -> Result<Imported>;

    /// Serves files over HTTP to the machines of the lab and to no one else, until the returned value is dropped or the lab is
    /// destroyed, whichever happens first. Requests from other processes of the host are never answered, on any address. Needs
    /// [`Capability::HttpDirectory`](crate::capability::Capability::HttpDirectory).
    ///
    /// A backend whose machines can reach the host passes the site to the core's own server.
    ///
    /// # Errors
    /// `Unsupported` in a lab that outlives this process, if the files would be served from this process.
    async fn serve(&self, site: Site) -> Result<Served>;

    /// Defines a machine with the processors, memory, disks and NICs of the specification. Does not start it. May be called for
    /// several machines at once.
    ///
    /// # Errors
    /// `Conflict` when the lab already has a machine of this name or was destroyed; `InvalidInput` when the machine cannot be
    /// created; `Unsupported` in a lab that was kept or attached to and takes no new machines.
    async fn create_machine(&self, spec: &MachineSpec) -> Result<Arc<dyn Machine>>;

    /// Creates a module from captured disks, all or nothing: readers see either the old module of that name or the new one, never a
    /// partial one, and the old one stays when this fails. The disks belong to the module afterwards.
    ///
    /// # Errors
    /// An error of any kind except `Internal` when a disk or state was not captured in this lab.
    async fn publish(&self, draft: ModuleDraft) -> Result<Module>;

    /// Returns the machines, in the order in which they were created. In an [attached](Backend::attach) lab, these are the machines
    /// that were created before. The exit of a machine that ended while no process watched it may be
    /// [unknown](Exit::Unobserved), and what it wrote to its serial console in that time may be missing from the log.
    async fn machines(&self) -> Result<Vec<Arc<dyn Machine>>>;

    /// Keeps the lab: it stays until it is removed or has expired, and its machines keep running. Returns what a person should know
    /// about it, such as what ends with this process nevertheless. May be repeated; the last `expires` counts.
    ///
    /// # Errors
    /// `InvalidInput` when the lab was opened with [`Retention::EndWithOwner`]; `Conflict` when it was destroyed.
    async fn keep(&self, expires: Option<SystemTime>) -> Result<Vec<String>>;

    /// Stores a small file with the lab, readable only by the user who opened it, for [`Backend::lab_file`]; replaces an earlier one
    /// of this name. The file lives as long as the lab does. [`check_lab_file`] says what is allowed. Returns where programs on this
    /// host find the file, if they do.
    ///
    /// # Errors
    /// `InvalidInput` for another name or a larger file; `Conflict` when the lab was destroyed.
    async fn store_file(&self, name: &str, content: &[u8]) -> Result<Option<PathBuf>>;

    /// Waits until this process has lost the lab without having destroyed or kept it, and returns why. On a backend whose owners
    /// renew a lease, a process that was suspended or cut off for too long finds its lab taken away. Never completes by default,
    /// which suits a backend whose owners cannot lose a lab while they live.
    async fn ownership_lost(&self) -> Error {
        std::future::pending().await
    }

    /// Ends every machine and removes everything that belongs to the lab, even if it was kept. May be repeated; works in every
    /// state.
    async fn destroy(&self) -> Result<()>;
}

/// One VM in a lab.
#[async_trait]
pub trait Machine: Debug + Send + Sync {
    /// Returns the machine's name in the lab.
    fn name(&self) -> &str;

    /// Powers the machine on. A machine that has ended may be started again.
    ///
    /// # Errors
    /// `Conflict` when the machine is running or its lab was destroyed; `LaunchFailed`, with the hypervisor's message.
    async fn start(&self) -> Result<()>;

    /// Waits until the machine ends, and returns why. Returns at once if it has already ended. Any number of callers may wait, and
    /// all receive the same result within [`END_REPORTED_WITHIN`].
    ///
    /// # Errors
    /// `Conflict` when the machine was never started.
    async fn wait(&self) -> Result<Exit>;

    /// Ends the machine, and returns how it ended, as [`wait`](Self::wait) does. Returns the exit at once if the machine has
    /// already ended. Several callers may stop it at once, in different ways.
    ///
    /// # Errors
    /// `Conflict` when the machine was never started.
    async fn stop(&self, how: Stop) -> Result<Exit>;

    /// Connects to a TCP port of the guest, one of [`MachineSpec::ports`]; never to a port of the host. When nothing listens in the
    /// guest and the hypervisor cannot detect that, the stream ends early, and the caller tries again. Streams end with the
    /// machine.
    ///
    /// # Errors
    /// `GuestUnreachable`, at once, when the hypervisor detects that nothing listens; `Conflict` when the machine is not running;
    /// `InvalidInput` when the port is not one of [`MachineSpec::ports`].
    async fn dial(&self, port: u16) -> Result<BoxedStream>;

    /// Connects to the display, which speaks RFB (RFC 6143) without authentication. Any number of connections may be open at once.
    /// Needs [`Capability::Display`](crate::capability::Capability::Display).
    ///
    /// # Errors
    /// `Conflict` when the machine is not running; `Unsupported` when the backend does not declare the capability.
    async fn display(&self) -> Result<BoxedStream>;

    /// Returns how pixels of the display should be transferred. The default suits a display on this host; a display behind a
    /// network should be [`Compressed`](DisplayEncoding::Compressed), and its server then offers that.
    fn display_encoding(&self) -> DisplayEncoding {
        DisplayEncoding::Raw
    }

    /// Connects to the serial console. Any number of connections may be open at once. Each receives at least everything that the
    /// guest writes from then on, and what is written to it reaches the guest. A connection that is not read loses the oldest bytes
    /// beyond the last [`SERIAL_KEPT`], and holds up neither the guest nor other readers. Needs
    /// [`Capability::Serial`](crate::capability::Capability::Serial).
    ///
    /// # Errors
    /// `Conflict` when the machine is not running; `Unsupported` when the backend does not declare the capability.
    async fn serial(&self) -> Result<BoxedStream>;

    /// Returns what the guest has written to its serial console since it was last powered on, and what it writes from now on. The
    /// log starts at position `from` (in bytes) or at the oldest byte that is kept. The stream ends once the machine has ended and
    /// everything has been read. After the machine has ended, what was kept of the last power-on is still available; the log of a
    /// machine that was never powered on is empty.
    ///
    /// At least [`SERIAL_KEPT`] bytes are kept. Any number of readers at once. Needs
    /// [`Capability::Serial`](crate::capability::Capability::Serial).
    ///
    /// # Errors
    /// `Unsupported` when the backend does not declare the capability. Never `Conflict`.
    async fn serial_log(&self, from: u64) -> Result<SerialLog>;

    /// Returns at most the last `limit` bytes that the guest has written to its serial console since it was last powered on.
    ///
    /// # Errors
    /// As [`serial_log`](Self::serial_log).
    async fn serial_tail(&self, limit: usize) -> Result<Vec<u8>> {
        self.serial_log(0).await?.tail(limit).await
    }

    /// Takes a screenshot, as PNG. May be called several times at once. For a machine that has ended, returns its last screenshot.
    /// Needs [`Capability::Screenshot`](crate::capability::Capability::Screenshot).
    ///
    /// # Errors
    /// `Conflict` when the machine is not running and has no last screenshot; `Unsupported` when the backend does not declare the
    /// capability.
    async fn screenshot(&self) -> Result<Vec<u8>>;

    /// Returns the address at which programs on the host reach a TCP port of the guest while it runs, even after its owner is gone,
    /// for instructions on how to log in. `None` when only [`dial`](Self::dial) reaches it.
    fn reachable_at(&self, port: u16) -> Option<std::net::SocketAddr> {
        let _ = port;
        None
    }

    /// Returns a command for a shell on this host whose standard input and output connect to a TCP port of the guest while it runs,
    /// even after its owner is gone, as `ssh -o ProxyCommand=…` takes. `None` when there is none.
    fn proxy_command(&self, port: u16) -> Option<String> {
        let _ = port;
        None
    }

    /// Returns how to access the machine while it runs: command lines and addresses, one per line.
    fn access(&self) -> Vec<String>;

    /// Captures a disk of a machine that has ended: self-contained, compressed, and verified against what the VM wrote, which
    /// includes everything that its guest synced before it was killed. The result stays in the lab until [`Lab::publish`]. May be
    /// repeated, also after the machine has run again: each call captures the disk as it is then, and the last capture counts.
    /// Reports progress.
    ///
    /// # Errors
    /// `Conflict` while the machine is running; `NotFound` when it has no such disk; `HostDiskFull`.
    async fn capture(&self, disk: &str, progress: &Progress) -> Result<CapturedDisk>;

    /// Captures what a machine that is not running keeps outside its disks: firmware variables and the state of its TPM. The list
    /// omits what the machine does not have. For a machine that has not run yet, this is its initial state, that of
    /// [`MachineSpec::state_of`], byte for byte. Each item stays in the lab until [`Lab::publish`]. May be repeated; the last
    /// capture counts.
    ///
    /// # Errors
    /// `Conflict` while the machine is running.
    async fn capture_state(&self) -> Result<Vec<CapturedState>>;
}

/// How pixels of a [display](Machine::display) are transferred. Both are lossless.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum DisplayEncoding {
    /// Uncompressed (RFC 6143, 7.7.1): the least work for both sides, and megabytes for a whole screen.
    #[default]
    Raw,
    /// Compressed with ZRLE (RFC 6143, 7.7.6), if the server supports it: a few kilobytes for a screen of text.
    Compressed,
}

/// How [`Machine::stop`] ends a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// Presses the power button and waits; kills the machine once the limit has passed, and not before. The [`Exit`] says what
    /// happened.
    Graceful {
        /// How long the guest may take to power off.
        limit: Duration,
    },
    /// Kills the machine at once.
    Kill,
}
