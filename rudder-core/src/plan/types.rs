//! The nouns of a plan. Everything here is resolved: no default is left to fill, no name left to look up.

use crate::{
    digest::Digest,
    hardware::{Bus, Firmware, GuestShell, NicModel},
    secret::Secret,
    units::{Cidr, MacAddress},
};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, net::Ipv4Addr, sync::Arc, time::Duration};

/// What will be done.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Plan {
    /// The name of the build and of the module it makes.
    pub name: String,
    /// sha256 over everything in the plan that shapes the result. The same manifest, inputs and parents give the same.
    pub digest: Digest,
    /// The manifest as given, in YAML; secrets not masked.
    pub manifest: String,
    /// The VMs, in the manifest's order.
    pub machines: Vec<PlannedMachine>,
    /// The networks while the build runs.
    pub network: PlannedNetwork,
    /// The networks that clones get.
    pub template_network: PlannedNetwork,
    /// Names of files served over HTTP while the VMs boot.
    pub http_files: Vec<String>,
    /// The files of the build.
    pub files: Vec<PlannedFile>,
    /// Limit of the whole build.
    #[serde(with = "millis")]
    pub timeout: Duration,
    /// How often the whole build is started again.
    pub retries: u32,
    /// How long an ISO that nothing uses stays cached.
    #[serde(with = "millis")]
    pub iso_cache_ttl: Duration,
    /// Every value that must never be shown.
    pub secrets: Vec<Secret>,
    /// Why the build cannot be repeated from its manifest alone; empty: it can.
    pub not_repeatable: Vec<String>,
}

/// A VM of a plan.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct PlannedMachine {
    /// Its name.
    pub name: String,
    /// What its boot disk starts from.
    pub source: PlannedSource,
    /// What it is while the build runs.
    pub hardware: Hardware,
    /// What its clones get: the same, without `buildOverrides`.
    pub template: Hardware,
    /// CD-ROMs, in order.
    pub isos: Vec<PlannedUrl>,
    /// Names of files on the floppy; empty: no floppy.
    pub floppy: Vec<String>,
    /// Present: a NoCloud seed is attached.
    pub cloud_init: Option<PlannedCloudInit>,
    /// How to talk to the guest.
    pub communicator: PlannedCommunicator,
    /// What is typed on the display before SSH is tried.
    pub boot_command: Vec<BootAction>,
    /// The steps, in order.
    pub steps: Vec<PlannedStep>,
    /// Carried along for user interfaces.
    pub invisible: bool,
}

/// The hardware of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hardware {
    /// Cores the guest sees.
    pub cpus: u32,
    /// Memory in bytes.
    pub memory: u64,
    /// Firmware.
    pub firmware: Firmware,
    /// Whether it has a TPM 2.0.
    pub tpm: bool,
    /// Its disks; the first boots and receives the source.
    pub disks: Vec<PlannedDisk>,
    /// Its cards, at most 9.
    pub nics: Vec<PlannedNic>,
}

/// A disk of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedDisk {
    /// Unique in the VM.
    pub name: String,
    /// Bytes; `None`: as large as the source (an inherited boot disk).
    pub size: Option<u64>,
    /// How it is attached.
    pub bus: Bus,
    /// For cluster backends.
    pub storage_class: Option<String>,
    /// Where its content comes from, when it is not new: the disk of this name of the parent module's VM.
    pub inherited: bool,
}

/// A network card of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedNic {
    /// Its name: what was written, else `nic1`, `nic2`…
    pub name: String,
    /// The name of its subnet, one of the plan's.
    pub subnet: String,
    /// Its place among the cards, 1–9: pins the PCI slot.
    pub slot: u8,
    /// Whether the author pinned the slot.
    pub slot_pinned: bool,
    /// A fixed address.
    pub ip: Option<Ipv4Addr>,
    /// Its hardware address: what was written, else derived from build, VM and card.
    pub mac: MacAddress,
    /// What the guest sees.
    pub model: NicModel,
}

/// The networks of a build or of its clones.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedNetwork {
    /// Whether the author declared it; otherwise it is one VPC with one subnet, DHCP and internet.
    pub declared: bool,
    /// Networks that do not reach each other.
    pub vpcs: Vec<PlannedVpc>,
    /// Their segments.
    pub subnets: Vec<PlannedSubnet>,
}

/// A private network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedVpc {
    /// Its name.
    pub name: String,
    /// Whether its VMs reach the internet.
    pub internet: bool,
}

/// A segment of a VPC.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedSubnet {
    /// Its name.
    pub name: String,
    /// The name of its VPC.
    pub vpc: String,
    /// Its addresses.
    pub cidr: Cidr,
    /// Whether addresses are handed out.
    pub dhcp: bool,
    /// DNS servers handed out; empty: the backend's own.
    pub dns: Vec<Ipv4Addr>,
    /// A bare layer-2 segment that a guest serves.
    pub unmanaged: bool,
}

/// What a boot disk starts from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[non_exhaustive]
pub enum PlannedSource {
    /// A disk image.
    Url(PlannedUrl),
    /// An empty disk.
    Blank,
    /// The disks of a VM of a module.
    BuildRef(PlannedBuildRef),
    /// An OCI image with a disk in it.
    ContainerDisk {
        /// The reference of the image.
        image: String,
    },
    /// A volume in the cluster.
    SourcePvc {
        /// Its name.
        name: String,
        /// Its namespace.
        namespace: Option<String>,
    },
}

/// A VM of a module that was built before.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedBuildRef {
    /// The module.
    pub module: String,
    /// Its digest when the plan was made: what is imported is this, or nothing.
    pub digest: Digest,
    /// The VM.
    pub vm: String,
}

/// Bytes behind a URL.
#[derive(Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PlannedUrl {
    /// http, https or file.
    pub url: url::Url,
    /// sha256 of the bytes as served.
    pub sha256: Option<Digest>,
}

/// A file of the build.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PlannedFile {
    /// Its name.
    pub name: String,
    /// Its bytes, or where they are.
    pub content: PlannedContent,
}

/// Bytes, or where they are.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum PlannedContent {
    /// The bytes themselves.
    Inline(Arc<[u8]>),
    /// Behind a URL.
    Url(PlannedUrl),
}

/// A NoCloud seed, as the author wants it.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedCloudInit {
    /// Delivered as written.
    pub user_data: Option<Arc<str>>,
    /// The network-config of the seed.
    pub network_data: Option<String>,
}

/// How to talk to a guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedCommunicator {
    /// The shell.
    pub shell: GuestShell,
    /// The user that logs in.
    pub username: String,
    /// The port that its SSH server listens on.
    pub port: u16,
    /// Tried beside the key.
    pub password: Option<Secret>,
    /// The private key to log in with (OpenSSH or PEM); `None`: a fresh ed25519 pair per build.
    pub private_key: Option<Secret>,
    /// From power-on (after the boot command) to a working login.
    #[serde(with = "millis")]
    pub timeout: Duration,
}

/// A step of provisioning.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PlannedStep {
    /// What it is called: its name, else its type.
    pub name: String,
    /// Its own limit; `None`: the build's deadline.
    #[serde(with = "millis_option")]
    pub timeout: Option<Duration>,
    /// What it does.
    pub action: StepAction,
}

/// What a step does.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum StepAction {
    /// Runs a script in the guest.
    Shell {
        /// The script, as written.
        script: Arc<str>,
        /// Its environment.
        env: BTreeMap<String, String>,
        /// How it is run; `{{ .Command }}` is its path.
        execute_command: Option<String>,
    },
    /// Puts a file into the guest.
    File {
        /// Its bytes, or where they are.
        content: PlannedContent,
        /// What it is called in messages.
        label: String,
        /// An absolute path in the guest.
        destination: String,
    },
    /// Restarts the guest.
    Reboot {
        /// The command that does it.
        command: String,
    },
    /// Installs Windows updates.
    WindowsUpdate {
        /// The search of the Windows Update Agent.
        search_criteria: Option<String>,
        /// `include:` and `exclude:` filters.
        filters: Vec<String>,
        /// How many in one round.
        update_limit: u32,
    },
    /// Waits for a person.
    Handbuild {
        /// What the person is to do.
        instructions: String,
    },
}

/// An action of a boot command. Keys are X11 keysyms, as RFB sends them (RFC 6143, 7.5.4).
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum BootAction {
    /// Types a text on a US keyboard; templates in it are resolved when it is typed.
    Type(String),
    /// Presses and releases a key.
    Press(u32),
    /// Holds a key down.
    Hold(u32),
    /// Releases a key that is held.
    Release(u32),
    /// Waits.
    Wait(#[serde(with = "millis")] Duration),
    /// Waits until a text stands on the screen.
    WaitText {
        /// The text; templates in it are resolved as in what is typed.
        text: String,
        /// How long at most.
        #[serde(with = "millis")]
        limit: Duration,
    },
    /// Waits until a text comes on the serial line, from where the last such wait ended.
    WaitSerial {
        /// The text; templates in it are resolved as in what is typed.
        text: String,
        /// How long at most.
        #[serde(with = "millis")]
        limit: Duration,
    },
}

/// Durations as whole milliseconds.
mod millis {
    use serde::{Deserialize, Deserializer, Serializer};
    use std::time::Duration;

    pub(super) fn serialize<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(u64::try_from(duration.as_millis()).unwrap_or(u64::MAX))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
        u64::deserialize(deserializer).map(Duration::from_millis)
    }
}

/// Durations as whole milliseconds, or nothing.
mod millis_option {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};
    use std::time::Duration;

    pub(super) fn serialize<S: Serializer>(
        duration: &Option<Duration>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        duration.map(|d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX)).serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Duration>, D::Error> {
        Ok(Option::<u64>::deserialize(deserializer)?.map(Duration::from_millis))
    }
}
