//! What the suite must be told of a backend beyond its traits: how another process sees it, what there is outside, how
//! machines are killed, and a guest that boots.

use crate::{
    Result,
    backend::{Backend, LabId},
    hardware::{Bus, NicModel},
    plan::PlannedUrl,
};
use async_trait::async_trait;
use std::{fmt::Debug, process::Command, sync::Arc, time::Duration};

/// A backend under test, and the hands that the suite lays on it from outside.
///
/// Everything is on one state: a store directory, a daemon, a cluster namespace of its own, which nobody else uses while the
/// suite runs.
#[async_trait]
pub trait Adapter: Debug + Send + Sync + 'static {
    /// The backend.
    fn backend(&self) -> Arc<dyn Backend>;

    /// The same backend as another process sees it: another value on the same state.
    async fn another(&self) -> Result<Arc<dyn Backend>>;

    /// What there is of labs and modules, seen from outside: processes, directories, sockets, networks, domains, a line each. A
    /// line of a lab names it by its id where it can; modules, and what is left of half-made or removed ones, have lines that
    /// stay the same for as long as the module does. Cached inputs and what the host had before are not in it.
    ///
    /// The suite compares: after each test there must be no more than before, and a module that a test published is gone
    /// from it once it was removed.
    async fn traces(&self) -> Result<Vec<String>>;

    /// Kills what runs a machine, as `kill -9` on its process would. Returns when that was asked for.
    async fn kill(&self, lab: &LabId, machine: &str) -> Result<()>;

    /// Whether what runs a machine is there, seen from outside: its process, its pod. False for one that has ended or was never
    /// started. The suite compares when this changes with when [`Machine::wait`](crate::backend::Machine::wait) tells of it.
    async fn is_running(&self, lab: &LabId, machine: &str) -> Result<bool>;

    /// A guest that boots; `None`: what needs one is not tested.
    fn guest(&self) -> Option<GuestImage> {
        None
    }

    /// URLs that are no images; `None`: that they are refused is not tested.
    fn bad_images(&self) -> Option<BadImages> {
        None
    }

    /// How somebody else becomes an owner of labs, and dies.
    fn owners(&self) -> Owners;

    /// Whether a host on which the backend [is not ready](crate::backend::HostReport::is_ready) fails the run. It does,
    /// unless an adapter says otherwise.
    fn is_required(&self) -> bool {
        true
    }
}

/// How somebody else becomes an owner of labs, and dies.
#[derive(Debug)]
#[non_exhaustive]
pub enum Owners {
    /// A process does. This command, once given the [environment](super::OWNER_VARIABLE), must call
    /// [`own`](super::own) on an adapter of the same state; it is killed (`SIGKILL`).
    Process(Command),
    /// Everything of the backend is in this process: an owner is whoever holds the lab, and dies by dropping it.
    Handle,
}

/// A guest of which the suite knows the ways.
///
/// It answers SSH on port 22 and understands a NoCloud seed: the user of its `meta-data` may log in with the key there, and
/// becomes root with `sudo`. It has a POSIX shell, `cat`, `head`, `printf`, `sync` and `poweroff`, and powers off when its
/// power button is pressed.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct GuestImage {
    /// Its disk image.
    pub image: PlannedUrl,
    /// Cores that it needs.
    pub cpus: u32,
    /// Memory that it needs, in bytes.
    pub memory: u64,
    /// The bus that it boots fastest from.
    pub bus: Bus,
    /// The card that it knows.
    pub nic: NicModel,
    /// How long from power-on to a login, at most, on a slow host.
    pub boots_within: Duration,
    /// Where it sends back what it receives.
    pub echo: Option<Echo>,
    /// Text that comes on its serial console when it boots.
    pub serial_says: Option<String>,
    /// A command that prints a line for each network card: its hardware address, a blank, and its place. Places, compared as
    /// text, are in the order of slots. That of Linux with `sysfs`.
    pub cards: String,
    /// The file of its screen: a line that is written there is shown on the display. `None`: that the display is the guest's own
    /// is not tested. That of the first virtual console of Linux.
    pub screen: Option<String>,
    /// A boot command that logs in on its screen and writes the line `typed on the screen` into the file `/tmp/typed`;
    /// `None`: that keys reach it is not tested.
    pub boot_command: Option<Vec<String>>,
    /// How much is sent each way when much is sent, in bytes.
    pub large: usize,
    /// The files of its disks after the first, in order, when they are on virtio: each holds the disk's bytes.
    pub data_disks: Vec<String>,
}

impl GuestImage {
    /// A guest of one core and 256 MiB with this image, on virtio, that boots within two minutes.
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
            cards: "cd /sys/class/net && for c in e*; do echo \"$(cat $c/address) $(readlink -f $c/device)\"; done"
                .to_owned(),
            data_disks: ["/dev/vdb", "/dev/vdc"].map(str::to_owned).to_vec(),
        }
    }
}

/// URLs that are no images.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct BadImages {
    /// Nothing is there.
    pub missing: url::Url,
    /// Something is there that says it is an image, and is broken.
    pub broken: url::Url,
}

impl BadImages {
    /// These.
    #[must_use]
    pub fn new(missing: url::Url, broken: url::Url) -> Self {
        Self { missing, broken }
    }
}

/// A service of a guest that sends back every byte, and ends its side when the other has ended its own.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Echo {
    /// Its port.
    pub port: u16,
    /// The command that starts it, as root, and returns; `None`: it is there by itself.
    pub start: Option<String>,
}

impl Echo {
    /// An echo on this port, started by this command.
    #[must_use]
    pub fn new(port: u16, start: Option<String>) -> Self {
        Self { port, start }
    }
}
