//! The types of a plan. Everything in them is resolved: no default is left to fill in, no name left to look up.

use crate::{
    digest::Digest,
    hardware::{Bus, Firmware, GuestShell, NicModel},
    secret::Secret,
    units::{Cidr, MacAddress},
};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, net::Ipv4Addr, sync::Arc, time::Duration};

/// What a build will do.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Plan {
    /// Name of the build and of the module it produces.
    pub name: String,
    /// sha256 over everything in the plan that shapes the result. Equal manifests, inputs and parents give equal
    /// digests.
    pub digest: Digest,
    /// The manifest as given, in YAML; secrets are not masked.
    pub manifest: String,
    /// VMs, in manifest order.
    pub machines: Vec<PlannedMachine>,
    /// Networks while the build runs.
    pub network: PlannedNetwork,
    /// Networks that clones get.
    pub template_network: PlannedNetwork,
    /// Names of the files served over HTTP while the VMs boot.
    pub http_files: Vec<String>,
    /// Files of the build.
    pub files: Vec<PlannedFile>,
    /// Limit of the whole build.
    #[serde(with = "millis")]
    pub timeout: Duration,
    /// Number of times that the whole build is retried.
    pub retries: u32,
    /// How long an unused ISO stays cached.
    #[serde(with = "millis")]
    pub iso_cache_ttl: Duration,
    /// All values that must never be shown.
    pub secrets: Vec<Secret>,
    /// Reasons why the build cannot be repeated from its manifest alone; empty if it can.
    pub not_repeatable: Vec<String>,
}

/// A VM of a plan.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct PlannedMachine {
    /// Name of the VM.
    pub name: String,
    /// Source of the boot disk.
    pub source: PlannedSource,
    /// Hardware while the build runs.
    pub hardware: Hardware,
    /// Hardware of clones: the same, without `buildOverrides`.
    pub template: Hardware,
    /// CD-ROMs, in order.
    pub isos: Vec<PlannedUrl>,
    /// Names of the files on the floppy; empty for no floppy.
    pub floppy: Vec<String>,
    /// Contents of the NoCloud seed; `None` for no seed.
    pub cloud_init: Option<PlannedCloudInit>,
    /// How to connect to the guest.
    pub communicator: PlannedCommunicator,
    /// Actions on the keyboard and the display before SSH is tried.
    pub boot_command: Vec<BootAction>,
    /// Provisioning steps, in order.
    pub steps: Vec<PlannedStep>,
    /// Passed through for user interfaces.
    pub invisible: bool,
}

/// The hardware of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Hardware {
    /// Cores visible to the guest.
    pub cpus: u32,
    /// Memory in bytes.
    pub memory: u64,
    /// Firmware.
    pub firmware: Firmware,
    /// Whether it has a TPM 2.0.
    pub tpm: bool,
    /// Disks; the first is the boot disk and receives the source.
    pub disks: Vec<PlannedDisk>,
    /// NICs, at most 9.
    pub nics: Vec<PlannedNic>,
}

/// A disk of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct PlannedDisk {
    /// Name, unique in the VM.
    pub name: String,
    /// Size in bytes; `None`: as large as the source (an inherited boot disk).
    pub size: Option<u64>,
    /// Bus that it is attached to.
    pub bus: Bus,
    /// Storage class, for cluster backends.
    pub storage_class: Option<String>,
    /// Whether the content is that of the disk with the same name of the parent module's VM; otherwise the disk is new.
    pub inherited: bool,
}

/// A NIC of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedNic {
    /// Name in the manifest, else `nic1`, `nic2`…
    pub name: String,
    /// Name of its subnet, one of the plan's.
    pub subnet: String,
    /// Slot, 1–9; determines the PCI slot.
    pub slot: u8,
    /// Whether the manifest pins the slot.
    pub slot_pinned: bool,
    /// Fixed IP address.
    pub ip: Option<Ipv4Addr>,
    /// Hardware address: as in the manifest, else derived from the names of build, VM and NIC.
    pub mac: MacAddress,
    /// Model that the guest sees.
    pub model: NicModel,
}

/// The networks of a build or of its clones.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedNetwork {
    /// Whether the manifest declares it; otherwise it is one VPC with one subnet, DHCP and internet access.
    pub declared: bool,
    /// Networks that cannot reach each other.
    pub vpcs: Vec<PlannedVpc>,
    /// Segments of the VPCs.
    pub subnets: Vec<PlannedSubnet>,
}

/// A private network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedVpc {
    /// Name of the VPC.
    pub name: String,
    /// Whether its VMs can reach the internet.
    pub internet: bool,
}

/// A segment of a VPC.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedSubnet {
    /// Name of the subnet.
    pub name: String,
    /// Name of its VPC.
    pub vpc: String,
    /// Address range.
    pub cidr: Cidr,
    /// Whether DHCP assigns addresses.
    pub dhcp: bool,
    /// DNS servers announced to guests; empty: the backend's own.
    pub dns: Vec<Ipv4Addr>,
    /// Whether it is a bare layer-2 segment that a guest serves.
    pub unmanaged: bool,
}

/// The source of a boot disk.
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
    /// An OCI image that contains a disk.
    ContainerDisk {
        /// Reference of the image.
        image: String,
    },
    /// A volume in the cluster.
    SourcePvc {
        /// Name of the PersistentVolumeClaim.
        name: String,
        /// Namespace of the PersistentVolumeClaim.
        namespace: Option<String>,
    },
}

/// A VM of an existing module.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct PlannedBuildRef {
    /// Name of the module.
    pub module: String,
    /// Digest of the module when the plan was made. Only this version is imported.
    pub digest: Digest,
    /// Name of the VM.
    pub vm: String,
}

impl PlannedBuildRef {
    /// Creates a reference to a VM of this version of a module.
    pub fn new(module: impl Into<String>, digest: Digest, vm: impl Into<String>) -> Self {
        Self { module: module.into(), digest, vm: vm.into() }
    }
}

/// A download.
#[derive(Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub struct PlannedUrl {
    /// http, https or file URL.
    pub url: url::Url,
    /// sha256 of the bytes as served.
    pub sha256: Option<Digest>,
}

impl PlannedUrl {
    /// Creates a download of any content.
    #[must_use]
    pub fn new(url: url::Url) -> Self {
        Self { url, sha256: None }
    }

    /// Sets the sha256 that the bytes must have, as served; `None` for any.
    #[must_use]
    pub fn sha256(mut self, sha256: impl Into<Option<Digest>>) -> Self {
        self.sha256 = sha256.into();
        self
    }
}

/// A file of the build.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct PlannedFile {
    /// Name of the file.
    pub name: String,
    /// Content, or its location.
    pub content: PlannedContent,
}

/// Bytes, or their location.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[non_exhaustive]
pub enum PlannedContent {
    /// The bytes themselves.
    Inline(Arc<[u8]>),
    /// A download.
    Url(PlannedUrl),
}

/// The contents of a NoCloud seed, as in the manifest.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct PlannedCloudInit {
    /// User data, delivered as written.
    pub user_data: Option<Arc<str>>,
    /// The network-config of the seed.
    pub network_data: Option<String>,
}

/// How to connect to a guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct PlannedCommunicator {
    /// Shell of the guest.
    pub shell: GuestShell,
    /// User to log in as.
    pub username: String,
    /// TCP port of the guest's SSH server.
    pub port: u16,
    /// Password, tried in addition to the key.
    pub password: Option<Secret>,
    /// Private key to log in with (OpenSSH or PEM); `None`: a new ed25519 pair per build.
    pub private_key: Option<Secret>,
    /// Limit from power-on (or from the end of the boot command) to a working login.
    #[serde(with = "millis")]
    pub timeout: Duration,
}

/// A provisioning step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct PlannedStep {
    /// Name of the step, else its type.
    pub name: String,
    /// Limit of the step; `None`: the build's deadline.
    #[serde(with = "millis_option")]
    pub timeout: Option<Duration>,
    /// What the step does.
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
        /// Environment of the script.
        env: BTreeMap<String, String>,
        /// Command that runs the script; `{{ .Command }}` is the path of the script.
        execute_command: Option<String>,
    },
    /// Copies a file into the guest.
    File {
        /// Content, or its location.
        content: PlannedContent,
        /// Name of the file in messages.
        label: String,
        /// Absolute path in the guest.
        destination: String,
    },
    /// Restarts the guest.
    Reboot {
        /// Command that restarts it.
        command: String,
    },
    /// Installs Windows updates.
    WindowsUpdate {
        /// Search criteria for the Windows Update Agent.
        search_criteria: Option<String>,
        /// `include:` and `exclude:` filters.
        filters: Vec<String>,
        /// Maximum number of updates per round.
        update_limit: u32,
    },
    /// Waits for a person.
    Handbuild {
        /// Instructions for the person.
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
    /// Releases a held key.
    Release(u32),
    /// Waits for a fixed time.
    Wait(#[serde(with = "millis")] Duration),
    /// Waits until a text is on the screen.
    WaitText {
        /// The text; templates in it are resolved as in typed text.
        text: String,
        /// Maximum time to wait.
        #[serde(with = "millis")]
        limit: Duration,
    },
    /// Waits until a text appears on the serial console, from where the last such wait ended.
    WaitSerial {
        /// The text; templates in it are resolved as in typed text.
        text: String,
        /// Maximum time to wait.
        #[serde(with = "millis")]
        limit: Duration,
    },
}

/// Serialises durations as whole milliseconds.
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

/// Serialises optional durations as whole milliseconds.
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
