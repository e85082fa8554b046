//! What a plan is made against: the backend's capabilities, limits, named inputs, modules that exist.

use crate::{
    capability::Capabilities,
    manifest::UnknownKeys,
    module::{DamagedModule, Module},
};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

/// What a plan is made against. A plan reads nothing else: no file, no network, no clock.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct PlanContext {
    /// What the backend can do.
    pub capabilities: Capabilities,
    /// What the embedding program allows.
    pub limits: Limits,
    /// Keys of ConfigMaps and Secrets, by name.
    pub inputs: Inputs,
    /// The modules that were built before, by name.
    pub modules: BTreeMap<String, Module>,
    /// The modules that are there and cannot be used: their names, and why not.
    pub damaged_modules: BTreeMap<String, String>,
    /// The name of a build that has none of its own: the stem of its file.
    pub default_name: Option<String>,
    /// What [`prepare`](super::prepare) does about keys that Rudder does not know.
    pub unknown_keys: UnknownKeys,
    /// The absolute directory that relative `file:` URLs (`file:images/base.qcow2`) start from.
    pub base_directory: Option<PathBuf>,
}

impl PlanContext {
    /// A plan for a backend of these capabilities; no limits but the usual one on disks, no inputs, no modules.
    #[must_use]
    pub fn new(capabilities: &Capabilities) -> Self {
        Self {
            capabilities: capabilities.clone(),
            limits: Limits::default(),
            inputs: Inputs::default(),
            modules: BTreeMap::new(),
            damaged_modules: BTreeMap::new(),
            default_name: None,
            unknown_keys: UnknownKeys::default(),
            base_directory: None,
        }
    }

    /// With these modules to build on; see [`Backend::modules`](crate::backend::Backend::modules).
    #[must_use]
    pub fn with_modules(mut self, modules: impl IntoIterator<Item = Module>) -> Self {
        self.modules.extend(modules.into_iter().map(|module| (module.name.clone(), module)));
        self
    }

    /// With these modules that cannot be used, so that a manifest that builds on one learns why; see
    /// [`Backend::damaged_modules`](crate::backend::Backend::damaged_modules).
    #[must_use]
    pub fn with_damaged_modules(mut self, modules: impl IntoIterator<Item = DamagedModule>) -> Self {
        self.damaged_modules.extend(modules.into_iter().map(|module| (module.name, module.reason)));
        self
    }

    /// With these limits.
    #[must_use]
    pub fn with_limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// With these inputs.
    #[must_use]
    pub fn with_inputs(mut self, inputs: Inputs) -> Self {
        self.inputs = inputs;
        self
    }

    /// With a name for a build that has none of its own.
    #[must_use]
    pub fn with_default_name(mut self, name: impl Into<String>) -> Self {
        self.default_name = Some(name.into());
        self
    }

    /// With keys that Rudder does not know as errors, or as warnings.
    #[must_use]
    pub fn with_unknown_keys(mut self, unknown_keys: UnknownKeys) -> Self {
        self.unknown_keys = unknown_keys;
        self
    }

    /// With a directory that relative `file:` URLs start from, usually the manifest's: an empty path is the directory
    /// that the process is in.
    #[must_use]
    pub fn with_base_directory(mut self, directory: impl AsRef<Path>) -> Self {
        let directory = Path::new(".").join(directory);
        // It cannot be made absolute only when the process is in a directory that is gone.
        self.base_directory = Some(std::path::absolute(&directory).unwrap_or(directory));
        self
    }
}

/// What an embedding program allows. `None`: no limit.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// Cores of a VM.
    pub max_cpu: Option<u64>,
    /// Memory of a VM, in bytes.
    pub max_memory: Option<u64>,
    /// Size of a disk, in bytes; 50Gi unless it is set.
    pub max_disk_size: Option<u64>,
    /// Disks of a VM.
    pub max_disks: Option<usize>,
    /// VMs of a build.
    pub max_vms: Option<usize>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_cpu: None,
            max_memory: None,
            max_disk_size: Some(50 << 30),
            max_disks: None,
            max_vms: None,
        }
    }
}

/// Each takes a number, or `None` for no limit.
impl Limits {
    /// The usual limits: 50Gi for a disk, and no others.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Allows a VM at most this many cores.
    #[must_use]
    pub fn with_max_cpu(mut self, cores: impl Into<Option<u64>>) -> Self {
        self.max_cpu = cores.into();
        self
    }

    /// Allows a VM at most this much memory, in bytes.
    #[must_use]
    pub fn with_max_memory(mut self, bytes: impl Into<Option<u64>>) -> Self {
        self.max_memory = bytes.into();
        self
    }

    /// Allows disks of at most this size, in bytes.
    #[must_use]
    pub fn with_max_disk_size(mut self, bytes: impl Into<Option<u64>>) -> Self {
        self.max_disk_size = bytes.into();
        self
    }

    /// Allows a VM at most this many disks.
    #[must_use]
    pub fn with_max_disks(mut self, disks: impl Into<Option<usize>>) -> Self {
        self.max_disks = disks.into();
        self
    }

    /// Allows a build at most this many VMs.
    #[must_use]
    pub fn with_max_vms(mut self, vms: impl Into<Option<usize>>) -> Self {
        self.max_vms = vms.into();
        self
    }
}

/// Keys of ConfigMaps and Secrets, given by the embedding program. Namespaces mean something to clusters only.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Inputs {
    config_maps: BTreeMap<(String, String), Vec<u8>>,
    secrets: BTreeMap<(String, String), Vec<u8>>,
}

impl Inputs {
    /// No inputs.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a key of a ConfigMap.
    #[must_use]
    pub fn with_config_map(
        mut self,
        name: impl Into<String>,
        key: impl Into<String>,
        value: impl Into<Vec<u8>>,
    ) -> Self {
        self.config_maps.insert((name.into(), key.into()), value.into());
        self
    }

    /// Adds a key of a Secret. Its value is masked wherever it would show.
    #[must_use]
    pub fn with_secret(
        mut self,
        name: impl Into<String>,
        key: impl Into<String>,
        value: impl Into<Vec<u8>>,
    ) -> Self {
        self.secrets.insert((name.into(), key.into()), value.into());
        self
    }

    fn map(&self, kind: InputKind) -> &BTreeMap<(String, String), Vec<u8>> {
        match kind {
            InputKind::ConfigMap => &self.config_maps,
            InputKind::Secret => &self.secrets,
        }
    }

    pub(super) fn get(&self, kind: InputKind, name: &str, key: &str) -> Option<&[u8]> {
        self.map(kind).get(&(name.to_owned(), key.to_owned())).map(Vec::as_slice)
    }

    /// Those that exist, as `name/key`.
    pub(super) fn known(&self, kind: InputKind) -> Vec<String> {
        self.map(kind).keys().map(|(name, key)| format!("{name}/{key}")).collect()
    }
}

impl std::fmt::Debug for Inputs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inputs")
            .field("config_maps", &self.config_maps.keys())
            .field("secrets", &self.secrets.keys())
            .finish()
    }
}

/// Which kind of object a reference names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum InputKind {
    ConfigMap,
    Secret,
}

impl InputKind {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::ConfigMap => "ConfigMap",
            Self::Secret => "Secret",
        }
    }
}
