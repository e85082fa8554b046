//! The contract: what a hypervisor must give. A backend gives streams and disks; the core does the talking.
//!
//! # Contract
//! The conformance suite (`rudder_core::testing`) asks for what is written here and in the documentation of each method, and for
//! nothing else.
//!
//! - **Cancel safety.** Dropping the future of any method leaves only what [`Lab::destroy`] or [`Backend::reap`] removes.
//! - **Ownership.** Everything a backend makes carries the id of its lab and of its owner (the process), so that `reap`
//!   finds what dead owners left, and never touches what living ones use.
//! - **Errors** say what a person can do; a machine's death is reported by [`Machine::wait`], not by timeouts. Their kinds are
//!   part of the contract:
//!
//!   | kind | of what |
//!   |---|---|
//!   | `Conflict` | what cannot be done in this state: an id or a name that is taken, a machine that runs or does not, a module or a lab in use, a lab that was destroyed |
//!   | `NotFound` | a module, lab, VM or disk that does not exist |
//!   | `InvalidInput` | what can never be done: a name that the backend cannot hold, a port that the machine was not made with, a lab that was not opened to be kept |
//!   | `Unsupported` | what the backend does not claim among its capabilities |
//!   | `GuestUnreachable` | a guest that cannot be reached yet; the caller tries again |
//! - **Time.** Every end of a machine, whoever brought it about, is reported within [`END_TOLD_WITHIN`].
//! - **Progress** of one call: what is done of a task never decreases and never exceeds its total, the total never changes once it
//!   is known, and the last that is reported of each task is that all of it is done.
//! - **Names** and other text of a manifest reach the hypervisor escaped, never as part of a command line. Two names that
//!   differ stay two, also when they are 63 characters long and differ in the last one only. A name that the backend cannot
//!   hold is `InvalidInput`; it is never changed.

mod kept;
mod lab_id;
mod serial_log;
mod serial_ring;
mod site;
mod types;

pub use crate::progress::{Progress, ProgressEvent};
pub use kept::{KeptLab, KeptLogin};
pub use lab_id::LabId;
pub use serial_log::{SerialLog, SerialRecord};
pub use serial_ring::SerialRing;
pub use site::{FileSource, Served, Site, SiteFile, SiteRequest};
pub use types::*;

use crate::{
    Error, ErrorKind, Result,
    capability::Capabilities,
    fetch::Fetch,
    module::{CapturedDisk, CapturedState, DamagedModule, Module},
};
use async_trait::async_trait;
use std::{fmt::Debug, path::PathBuf, sync::Arc, time::Duration};
use tokio::io::{AsyncRead, AsyncWrite};

/// How long after a machine has ended [`Machine::wait`] must have returned: after its guest powered off, after
/// [`Machine::stop`] killed it, after what runs it died.
pub const END_TOLD_WITHIN: Duration = Duration::from_secs(2);

/// How much of the end of a serial console is kept at least, in bytes. A backend also bounds what it keeps, in memory and on disk,
/// whatever the guest writes and however fast.
pub const SERIAL_KEPT: usize = 64 << 10;

/// A stream of bytes in both directions. Either side may end its own half and go on reading: what the other side sends after that
/// arrives.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin + 'static {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin + 'static> Stream for T {}

/// A boxed [`Stream`].
pub type BoxedStream = Box<dyn Stream>;

/// A hypervisor that can open labs and keep modules.
#[async_trait]
pub trait Backend: Debug + Send + Sync + 'static {
    /// Its name, as users write it: `qemu`, `libvirt`, `memory`.
    fn name(&self) -> &str;

    /// What it can do. Constant for the life of the value; what depends on the host is found when it is made.
    fn capabilities(&self) -> &Capabilities;

    /// What exists on this host, what is missing, and how to fix it: at least one finding. Starts nothing; may be repeated.
    async fn diagnose(&self) -> Result<HostReport>;

    /// What brings files that the engine reads to this host, unless the build names another
    /// ([`Build::fetcher`](crate::build::Build::fetcher)). A backend that caches sources on this host shares its cache.
    fn fetcher(&self) -> Arc<dyn Fetch>;

    /// Opens the isolated place of one build or one clone. Also reaps what dead owners left, where that is cheap.
    ///
    /// # Errors
    /// `HostMissing` when something the lab needs is missing; `Conflict` when the id is that of a lab that exists, also one
    /// that was kept. Nothing is left behind then.
    async fn open_lab(&self, spec: &LabSpec) -> Result<Arc<dyn Lab>>;

    /// All modules that can be used, in the order of their names. May be repeated.
    async fn modules(&self) -> Result<Vec<Module>>;

    /// The modules that are there and cannot be used, since their records or files are damaged or of a later version, in the order
    /// of their names. May be repeated. A backend that cannot have any needs not say so.
    async fn damaged_modules(&self) -> Result<Vec<DamagedModule>> {
        Ok(Vec::new())
    }

    /// Removes a module and all its files.
    ///
    /// # Errors
    /// `NotFound` when there is none of this name; `Conflict` when a living lab builds on it.
    async fn remove_module(&self, name: &str) -> Result<()>;

    /// The labs that were [kept](Lab::keep) for inspection and not yet removed. May be repeated.
    async fn kept_labs(&self) -> Result<Vec<KeptLab>>;

    /// The machines of a lab that was [kept](Lab::keep), by this process or by another, in their order: their displays,
    /// consoles and ports, as far as they run. May be repeated. A lab that is not there is `NotFound`; a backend that cannot
    /// find machines again says `Unsupported`, as this default does.
    async fn kept_machines(&self, id: &LabId) -> Result<Vec<Arc<dyn Machine>>> {
        let message = format!("the backend {} cannot reach the machines of the kept lab {id}", self.name());
        Err(Error::new(ErrorKind::Unsupported, message).with_help("use the command lines of `access`"))
    }

    /// Removes a lab that was kept, all of it.
    ///
    /// # Errors
    /// `NotFound` when there is no such lab; `Conflict` when a living owner works in it.
    async fn remove_lab(&self, id: &LabId) -> Result<()>;

    /// Removes what dead owners left behind, except labs that were kept: processes, files, networks, objects. Never
    /// touches what a living owner has.
    /// May be repeated, and run by several processes at once.
    async fn reap(&self) -> Result<ReapReport>;

    /// Removes cached inputs that nothing needs. Never touches what a module or a living lab needs. May be repeated.
    async fn collect(&self) -> Result<ReapReport>;
}

/// The isolated place of one build or one clone: its networks, volumes and machines.
#[async_trait]
pub trait Lab: Debug + Send + Sync {
    /// Its id: that of the [`LabSpec`] it was opened with. Unique among all labs of the backend.
    fn id(&self) -> &LabId;

    /// Versions that belong into the provenance: `qemu` → `7.2.22`… At least one: the hypervisor's own.
    fn versions(&self) -> std::collections::BTreeMap<String, String>;

    /// Brings a source into the lab, without changing what it came from: as a disk that a machine may write to, or as a
    /// CD-ROM. A source that cannot be one, such as a blank CD-ROM, is `Unsupported`.
    ///
    /// Requests of the same URL, in this or another process, share one download. Progress is reported in bytes as served.
    /// May be repeated: each call makes a volume of its own.
    ///
    /// # Errors
    /// `Download`, `NotFound` (also of a module of another digest, and of a VM or a disk that a module does not have),
    /// `ChecksumMismatch`, `InvalidImage`, `HostDiskFull`, and `InvalidInput` when `request.size` is smaller than the image or
    /// a blank disk has none.
    async fn import(&self, request: &ImportRequest, progress: &Progress) -> Result<Imported>;

    /// Serves files over HTTP to the machines of the lab and to nobody else, until the returned value is dropped or the
    /// lab is destroyed, whichever comes first. No other process of the host is answered, on whatever address. Needs [`Capability::HttpDirectory`](crate::capability::Capability::HttpDirectory).
    ///
    /// A backend whose machines reach the host hands the site to the core's own server.
    async fn serve(&self, site: Site) -> Result<Served>;

    /// Defines a machine with the processors, memory, disks and NICs of the specification, also several at once. Does not
    /// start it.
    ///
    /// # Errors
    /// `Conflict` when the lab has a machine of this name or was destroyed; `InvalidInput` when the machine cannot be made.
    async fn create_machine(&self, spec: &MachineSpec) -> Result<Arc<dyn Machine>>;

    /// Makes a module of captured disks, all or nothing: readers see either the old module of that name or the new one, never
    /// a partial one, and the old one stays when this fails. The disks belong to the module afterwards.
    ///
    /// # Errors
    /// An error, whatever its kind but `Internal`, when a disk or state was not captured in this lab.
    async fn publish(&self, draft: ModuleDraft) -> Result<Module>;

    /// Lets the lab outlive its owner, for inspection: its machines keep running if they run. Says how to get in: at least a line
    /// where a machine runs. May be repeated.
    ///
    /// # Errors
    /// `InvalidInput` when the lab was not opened with [`Retention::MayBeKept`]; `Conflict` when it was destroyed.
    async fn keep(&self) -> Result<KeptLab>;

    /// The directory of the host that lives as long as the lab does, also when it is kept, and that only its owner can read:
    /// the build leaves the key to a kept lab there, and [`KeptLab::read`] finds it. `None` where there is none.
    fn directory(&self) -> Option<PathBuf> {
        None
    }

    /// Ends every machine and removes everything of the lab. May be repeated; works from every state. A lab that was
    /// kept is destroyed too.
    async fn destroy(&self) -> Result<()>;
}

/// One VM in a lab.
#[async_trait]
pub trait Machine: Debug + Send + Sync {
    /// Its name in the lab.
    fn name(&self) -> &str;

    /// Powers it on. After it ended, it may be started again.
    ///
    /// # Errors
    /// `Conflict` when it runs, or when its lab was destroyed; `LaunchFailed`, with what the hypervisor said.
    async fn start(&self) -> Result<()>;

    /// Waits until it ends, and says why; of a machine that has ended, at once. Any number of callers, all of whom are told the
    /// same, within [`END_TOLD_WITHIN`].
    ///
    /// # Errors
    /// `Conflict` when it was never started.
    async fn wait(&self) -> Result<Exit>;

    /// Makes it end, and says how it ended, as [`wait`](Self::wait) does. Of a machine that has ended: its exit, at once. Several
    /// may ask at once, in different ways.
    ///
    /// # Errors
    /// `Conflict` when it was never started.
    async fn stop(&self, how: Stop) -> Result<Exit>;

    /// Connects to a TCP port of the guest, one of [`MachineSpec::ports`]; never to a port of the host. Where nobody listens in
    /// the guest, the stream ends early, unless the hypervisor can tell; the caller tries again. Streams end with the machine.
    ///
    /// # Errors
    /// `GuestUnreachable`, at once, when nobody listens and the hypervisor can tell; `Conflict` when the machine does not run;
    /// `InvalidInput` when the port is not one of [`MachineSpec::ports`].
    async fn dial(&self, port: u16) -> Result<BoxedStream>;

    /// Connects to the display, speaking RFB (RFC 6143) without authentication; any number at once. Needs
    /// [`Capability::Display`](crate::capability::Capability::Display).
    ///
    /// # Errors
    /// `Conflict` when the machine does not run; `Unsupported` when this is not claimed.
    async fn display(&self) -> Result<BoxedStream>;

    /// Connects to the serial console; any number at once. Each gets everything that the guest writes from then on, at least;
    /// what is typed reaches the guest. One that does not read loses the oldest of more than [`SERIAL_KEPT`] bytes, and holds up
    /// neither the guest nor other readers. Needs [`Capability::Serial`](crate::capability::Capability::Serial).
    ///
    /// # Errors
    /// `Conflict` when the machine does not run; `Unsupported` when this is not claimed.
    async fn serial(&self) -> Result<BoxedStream>;

    /// What the guest wrote on its serial console since it was last powered on, from position `from` (in bytes) or the oldest byte
    /// that is kept, and what it goes on writing. The stream ends once the machine has ended and all of it is read. After the
    /// end, what was kept of the last power-on is still there; of a machine that was never powered on, there is nothing.
    /// At least [`SERIAL_KEPT`] bytes are kept. Any number of readers at once. Needs
    /// [`Capability::Serial`](crate::capability::Capability::Serial).
    ///
    /// # Errors
    /// `Unsupported` when this is not claimed. Never `Conflict`.
    async fn serial_log(&self, from: u64) -> Result<SerialLog>;

    /// At most the last `limit` bytes that the guest wrote on its serial console since it was last powered on.
    ///
    /// # Errors
    /// As [`serial_log`](Self::serial_log).
    async fn serial_tail(&self, limit: usize) -> Result<Vec<u8>> {
        self.serial_log(0).await?.tail(limit).await
    }

    /// A picture of the screen, as PNG, also several at once. Of a machine that has ended: the last that exists of it. Needs
    /// [`Capability::Screenshot`](crate::capability::Capability::Screenshot).
    ///
    /// # Errors
    /// `Conflict` when the machine does not run and there is no last picture; `Unsupported` when this is not claimed.
    async fn screenshot(&self) -> Result<Vec<u8>>;

    /// Where programs of the host reach a TCP port of the guest while it runs, also after its owner is gone; `None` where only
    /// [`dial`](Self::dial) does. For telling a person how to log in.
    fn reachable_at(&self, port: u16) -> Option<std::net::SocketAddr> {
        let _ = port;
        None
    }

    /// A command for a shell of this host whose standard input and output lead to a TCP port of the guest while it runs, also after
    /// its owner is gone: what `ssh -o ProxyCommand=…` takes. `None` where there is none.
    fn proxy_command(&self, port: u16) -> Option<String> {
        let _ = port;
        None
    }

    /// How a person gets in while it runs: command lines and addresses, a line each.
    fn access(&self) -> Vec<String>;

    /// Captures a disk of a machine that has ended: self-contained, compressed, verified against what the VM wrote, which
    /// includes everything that its guest synchronised before it was killed. It stays in the lab until [`Lab::publish`]. May be
    /// repeated, also after the machine has run again: each time the disk as it is then, and the last counts. Tells its progress.
    ///
    /// # Errors
    /// `Conflict` while the machine runs; `NotFound` when it has no such disk; `HostDiskFull`.
    async fn capture(&self, disk: &str, progress: &Progress) -> Result<CapturedDisk>;

    /// Captures what a machine that does not run keeps outside its disks: firmware variables, the state of its TPM. What it
    /// has none of is not in the list. Of one that has not run yet: what it starts with, which is that of
    /// [`MachineSpec::state_of`], byte for byte. Each stays in the lab until [`Lab::publish`]. May be repeated; the last counts.
    ///
    /// # Errors
    /// `Conflict` while the machine runs.
    async fn capture_state(&self) -> Result<Vec<CapturedState>>;
}

/// How a machine is made to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// Presses the power button, and waits; after the limit, and not before, kills. What happened is in the [`Exit`].
    Graceful {
        /// How long the guest may take.
        limit: Duration,
    },
    /// Pulls the plug.
    Kill,
}
