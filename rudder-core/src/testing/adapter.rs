//! What the suite needs to know of a backend beyond its traits: how another process sees it, what exists of it as seen
//! from outside, how machines are killed, and a guest that boots.

use crate::{
    Result,
    backend::{Backend, LabId},
    hardware::{Bus, NicModel},
    plan::PlannedUrl,
};
use async_trait::async_trait;
use std::{fmt::Debug, process::Command, sync::Arc, time::Duration};

/// A backend under test, and how the suite acts on it from outside.
///
/// All handles work on one state: a store directory, a daemon or a cluster namespace that nothing else uses while the
/// suite runs.
#[async_trait]
pub trait Adapter: Debug + Send + Sync + 'static {
    /// Returns the backend.
    fn backend(&self) -> Arc<dyn Backend>;

    /// Returns the same backend as another process sees it: another value on the same state.
    async fn another(&self) -> Result<Arc<dyn Backend>>;

    /// Lists everything that exists of labs and modules, seen from outside: processes, directories, sockets, networks,
    /// domains, one line each. A line of a lab contains the lab's id where possible. Modules, and remains of incomplete
    /// or removed ones, have lines that stay the same for as long as the module does. Cached inputs and what existed on
    /// the host before are not included.
    ///
    /// The suite compares these lists: after each test there must be no more than before, and a module that a test
    /// published must be gone from it once it was removed.
    async fn traces(&self) -> Result<Vec<String>>;

    /// Kills what runs a machine, as `kill -9` on its process would. Returns once the kill was requested.
    async fn kill(&self, lab: &LabId, machine: &str) -> Result<()>;

    /// Whether what runs a machine (its process, its pod) exists, seen from outside. False if it has ended or was never
    /// started. The suite compares when this changes with when [`Machine::wait`](crate::backend::Machine::wait) reports
    /// the end.
    async fn is_running(&self, lab: &LabId, machine: &str) -> Result<bool>;

    /// Returns a guest that boots. With `None`, tests that need one are skipped.
    fn guest(&self) -> Option<GuestImage> {
        None
    }

    /// Returns URLs that are not images. With `None`, the test that they are refused is skipped.
    fn bad_images(&self) -> Option<BadImages> {
        None
    }

    /// Returns a URL at which the backend can import these bytes, as long as the suite runs. With `None`, the default, the suite
    /// writes them to a file of this host.
    fn published(&self, bytes: &[u8]) -> Option<url::Url> {
        let _ = bytes;
        None
    }

    /// Returns how another owner of labs is created and killed.
    fn owners(&self) -> Owners;

    /// Whether a host on which the backend [is not ready](crate::backend::HostReport::is_ready) fails the run. The
    /// default is `true`.
    fn is_required(&self) -> bool {
        true
    }
}

/// How another owner of labs is created and killed.
#[derive(Debug)]
#[non_exhaustive]
pub enum Owners {
    /// A process owns the labs. This command, run with the [environment variable](super::OWNER_VARIABLE), must call
    /// [`own`](super::own) on an adapter of the same state; it is killed with `SIGKILL`.
    Process(Command),
    /// The whole backend is in this process: the value that holds the lab is the owner, and dropping it is its death.
    Handle,
}

/// A guest with known behaviour.
///
/// It answers SSH on port 22 and understands a NoCloud seed: the user of its `meta-data` may log in with the key there,
/// and becomes root with `sudo`. It has a POSIX shell, `cat`, `head`, `printf`, `sync` and `poweroff`, and powers off
/// when its power button is pressed.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct GuestImage {
    /// The disk image.
    pub image: PlannedUrl,
    /// Number of cores that the guest needs.
    pub cpus: u32,
    /// Memory that the guest needs, in bytes.
    pub memory: u64,
    /// The bus from which the guest boots fastest.
    pub bus: Bus,
    /// The NIC model that the guest supports.
    pub nic: NicModel,
    /// Maximum time from power-on to a login, on a slow host.
    pub boots_within: Duration,
    /// A service that echoes what it receives.
    pub echo: Option<Echo>,
    /// Text that appears on the serial console at boot.
    pub serial_says: Option<String>,
    /// A command that prints a line for each NIC: its hardware address, a space, and its location. Locations, compared
    /// as text, are in the order of slots. The default is for Linux with `sysfs`.
    pub nics: String,
    /// The file of the guest's screen: a line that is written to it appears on the display. With `None`, the test that
    /// the display belongs to the guest is skipped. The default is the first virtual console of Linux.
    pub screen: Option<String>,
    /// A boot command that logs in on the screen and writes the line `typed on the screen` to the file `/tmp/typed`.
    /// With `None`, the test that keys reach the guest is skipped.
    pub boot_command: Option<Vec<String>>,
    /// Number of bytes sent each way by tests of large transfers.
    pub large: usize,
    /// The device files of the disks after the first, in order, when they are on virtio: each contains the disk's
    /// bytes.
    pub data_disks: Vec<String>,
}

impl GuestImage {
    /// Returns a guest with one core and 256 MiB of memory with this image, on virtio, that boots within two minutes.
    #[must_use]
    pub fn new(image: PlannedUrl) -> Self {
        Self {
            image,
            cpus: 1,
            memory: 256 << 20,
            bus: Bus::Virtio,
            nic: NicModel::Virtio,
            boots_within: Duration::from_secs(120),
            echo: None,
            serial_says: None,
            screen: Some("/dev/tty1".to_owned()),
            boot_command: None,
            large: 16 << 20,
            nics: "cd /sys/class/net && for c in e*; do echo \"$(cat $c/address) $(readlink -f $c/device)\"; done"
                .to_owned(),
            data_disks: ["/dev/vdb", "/dev/vdc"].map(str::to_owned).to_vec(),
        }
    }
}

/// URLs that are not images.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct BadImages {
    /// A URL at which nothing exists.
    pub missing: url::Url,
    /// A URL of something that claims to be an image, and is broken.
    pub broken: url::Url,
}

impl BadImages {
    /// Pairs a URL of nothing with a URL of a broken image.
    #[must_use]
    pub fn new(missing: url::Url, broken: url::Url) -> Self {
        Self { missing, broken }
    }
}

/// A service of a guest that echoes every byte, and closes its side once the peer has closed its own.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Echo {
    /// The port of the service.
    pub port: u16,
    /// The command that starts the service, as root, and returns; `None` if the service is already running.
    pub start: Option<String>,
}

impl Echo {
    /// Returns an echo service on this port, started by this command.
    #[must_use]
    pub fn new(port: u16, start: Option<String>) -> Self {
        Self { port, start }
    }
}
