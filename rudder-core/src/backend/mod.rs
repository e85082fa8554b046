//! The contract: what a hypervisor must give. A backend gives streams and disks; the core does the talking.
//!
//! # Contract
//! - **Cancel safety.** Dropping the future of any method leaves only what [`Lab::destroy`] or [`Backend::reap`] removes.
//! - **Ownership.** Everything a backend makes carries the id of its lab and of its owner (the process), so that `reap`
//!   finds what dead owners left, and never touches what living ones use.
//! - **Errors** say what a person can do; a machine's death is reported by [`Machine::wait`], not by timeouts.
//! - **Text** of a manifest reaches the hypervisor escaped, never as part of a command line.

mod kept;
mod serial_ring;
mod types;

pub use kept::{KeptLab, KeptLogin};
pub use serial_ring::SerialRing;
pub use types::*;

use crate::{
    Error, ErrorKind, Result,
    capability::Capabilities,
    module::{CapturedDisk, CapturedState, DamagedModule, Module},
};
use async_trait::async_trait;
use std::{fmt::Debug, path::PathBuf, sync::Arc, time::Duration};
use tokio::io::{AsyncRead, AsyncWrite};

/// A stream of bytes in both directions.
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

    /// What is here, what is missing, and how to mend it. Starts nothing; may be repeated.
    async fn diagnose(&self) -> Result<HostReport>;

    /// Opens the isolated place of one build or one clone. Also reaps what dead owners left, where that is cheap.
    ///
    /// # Errors
    /// `HostMissing` when something the lab needs is not here; nothing is left behind then.
    async fn open_lab(&self, spec: &LabSpec) -> Result<Arc<dyn Lab>>;

    /// All modules that can be used, in the order of their names. May be repeated.
    async fn modules(&self) -> Result<Vec<Module>>;

    /// The modules that are there and cannot be used, since their records or files are damaged or of a later version, in the order
    /// of their names. May be repeated. A backend that cannot have any needs not say so.
    async fn damaged_modules(&self) -> Result<Vec<DamagedModule>> {
        Ok(Vec::new())
    }

    /// Removes a module, all of it. Removing one that is not there is `NotFound`; one that a living lab builds on is `Conflict`.
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

    /// Removes a lab that was kept, all of it. One that is not there is `NotFound`; one that a living owner works in is
    /// `Conflict`.
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
    /// Its id, unique among all labs of the backend.
    fn id(&self) -> &LabId;

    /// Versions that belong into the provenance: `qemu` → `7.2.22`…
    fn versions(&self) -> std::collections::BTreeMap<String, String>;

    /// Brings a source into the lab: as a volume that a machine may write to, without changing what it came from.
    ///
    /// Requests of the same URL, in this or another process, share one download. Progress is reported in bytes as served.
    /// May be repeated: each call makes a volume of its own.
    ///
    /// # Errors
    /// `Download`, `NotFound`, `ChecksumMismatch`, `InvalidImage`, `HostDiskFull`, and `InvalidInput` when `request.size`
    /// is smaller than the image.
    async fn import(&self, request: &ImportRequest, progress: &Progress) -> Result<Imported>;

    /// Brings the bytes of a URL (a file of the manifest, an ISO) to the host: verified, cached, as a path that may be read
    /// as long as the lab lives. Requests of the same URL, in this or another process, share one download.
    async fn fetch(&self, request: &FetchRequest, progress: &Progress) -> Result<Fetched>;

    /// Serves files over HTTP to the machines of the lab and to nobody else, until the returned value is dropped or the
    /// lab is destroyed. Needs [`Capability::HttpDirectory`](crate::capability::Capability::HttpDirectory).
    ///
    /// A backend whose machines reach the host hands the site to the core's own server.
    async fn serve(&self, site: Site) -> Result<Served>;

    /// Defines a machine, also several at once. Does not start it. Its name must be new in the lab: else `Conflict`.
    async fn create_machine(&self, spec: &MachineSpec) -> Result<Arc<dyn Machine>>;

    /// Makes a module of captured disks, all or nothing: whoever looks sees the old module of that name or the new one,
    /// never a part. The disks belong to the module afterwards.
    async fn publish(&self, draft: ModuleDraft) -> Result<Module>;

    /// Lets the lab outlive its owner, for inspection: its machines keep running if they run. Says how to get in and how
    /// to remove it.
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

    /// Powers it on. Of a running machine: `Conflict`. After it ended, it may be started again.
    ///
    /// # Errors
    /// `LaunchFailed`, with what the hypervisor said.
    async fn start(&self) -> Result<()>;

    /// Waits until it ends, and says why; of a machine that has ended, at once. Any number of callers. Reported
    /// within two seconds. A machine that was never started: `Conflict`.
    async fn wait(&self) -> Result<Exit>;

    /// Makes it end. Of a machine that has ended: its exit, at once.
    async fn stop(&self, how: Stop) -> Result<Exit>;

    /// Connects to a TCP port of the guest, one of [`MachineSpec::ports`]. Fails at once (`GuestUnreachable`) when nobody
    /// listens where the hypervisor can tell, otherwise the stream ends early; the caller tries again.
    async fn dial(&self, port: u16) -> Result<BoxedStream>;

    /// Connects to the display, speaking RFB (RFC 6143) without authentication. Needs [`Capability::Display`](crate::capability::Capability::Display).
    async fn display(&self) -> Result<BoxedStream>;

    /// Connects to the serial console. Needs [`Capability::Serial`](crate::capability::Capability::Serial).
    async fn serial(&self) -> Result<BoxedStream>;

    /// The last bytes, at most `limit`, that the guest wrote on its serial console since it was powered on, also after it
    /// ended. Empty where nothing is kept.
    async fn serial_tail(&self, limit: usize) -> Result<Vec<u8>>;

    /// A picture of the screen, as PNG, also several at once. Of a machine that has ended: the last that there is of it, or `Conflict`. Needs [`Capability::Screenshot`](crate::capability::Capability::Screenshot).
    async fn screenshot(&self) -> Result<Vec<u8>>;

    /// Where programs of the host reach a TCP port of the guest while it runs, also after its owner is gone; `None` where only
    /// [`dial`](Self::dial) does. For telling a person how to log in.
    fn reachable_at(&self, port: u16) -> Option<std::net::SocketAddr> {
        let _ = port;
        None
    }

    /// How a person gets in while it runs: command lines and addresses, a line each.
    fn access(&self) -> Vec<String>;

    /// Captures a disk of a machine that has ended: self-contained, compressed, verified against what the VM wrote.
    /// It stays in the lab until [`Lab::publish`]. May be repeated; the last counts.
    async fn capture(&self, disk: &str, progress: &Progress) -> Result<CapturedDisk>;

    /// Captures what a machine that has ended keeps outside its disks: firmware variables, the state of its TPM. What it
    /// has none of is not in the list. Each stays in the lab until [`Lab::publish`]. May be repeated; the last counts.
    async fn capture_state(&self) -> Result<Vec<CapturedState>>;
}

/// How a machine is made to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// Presses the power button, and waits; after the limit, kills. What happened is in the [`Exit`].
    Graceful {
        /// How long the guest may take.
        limit: Duration,
    },
    /// Pulls the plug.
    Kill,
}
