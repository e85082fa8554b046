//! The context of a plan: the backend's capabilities, limits, named inputs, existing modules.

use crate::{
    capability::Capabilities,
    manifest::UnknownKeys,
    module::{DamagedModule, Module},
};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

/// The context of a plan. Planning reads nothing else: no file, no network, no clock.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct PlanContext {
    /// Capabilities of the backend.
    pub capabilities: Capabilities,
    /// Limits set by the embedding program.
    pub limits: Limits,
    /// Keys of ConfigMaps and Secrets, by name.
    pub inputs: Inputs,
    /// Existing modules, by name.
    pub modules: BTreeMap<String, Module>,
    /// Modules that exist but cannot be used, by name, each with the reason.
    pub damaged_modules: BTreeMap<String, String>,
    /// Name for a build that has none of its own. `None`: the stem of the manifest's file name.
    pub default_name: Option<String>,
    /// How [`prepare`](super::prepare) reports keys that Rudder does not know.
    pub unknown_keys: UnknownKeys,
    /// Absolute directory that relative `file:` URLs (`file:images/base.qcow2`) are resolved against.
    pub base_directory: Option<PathBuf>,
}

impl PlanContext {
    /// Creates a context for a backend with these capabilities, with the default limits, no inputs and no modules.
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

    /// Adds modules to build on; see [`Backend::modules`](crate::backend::Backend::modules).
    #[must_use]
    pub fn modules(mut self, modules: impl IntoIterator<Item = Module>) -> Self {
        self.modules.extend(modules.into_iter().map(|module| (module.name.clone(), module)));
        self
    }

    /// Adds modules that cannot be used, so that a manifest that builds on one is refused with the reason; see
    /// [`Backend::damaged_modules`](crate::backend::Backend::damaged_modules).
    #[must_use]
    pub fn damaged_modules(mut self, modules: impl IntoIterator<Item = DamagedModule>) -> Self {
        self.damaged_modules.extend(modules.into_iter().map(|module| (module.name, module.reason)));
        self
    }

    /// Sets the limits.
    #[must_use]
    pub fn limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// Sets the inputs.
    #[must_use]
    pub fn inputs(mut self, inputs: Inputs) -> Self {
        self.inputs = inputs;
        self
    }

    /// Sets the name for a build that has none of its own.
    #[must_use]
    pub fn default_name(mut self, name: impl Into<String>) -> Self {
        self.default_name = Some(name.into());
        self
    }

    /// Sets whether keys that Rudder does not know are errors or warnings.
    #[must_use]
    pub fn unknown_keys(mut self, unknown_keys: UnknownKeys) -> Self {
        self.unknown_keys = unknown_keys;
        self
    }

    /// Sets the directory that relative `file:` URLs are resolved against, usually that of the manifest. An empty path
    /// is the current directory.
    #[must_use]
    pub fn base_directory(mut self, directory: impl AsRef<Path>) -> Self {
        let directory = Path::new(".").join(directory);
        // This fails only if the current directory no longer exists.
        self.base_directory = Some(std::path::absolute(&directory).unwrap_or(directory));
        self
    }
}

/// Limits set by the embedding program. `None` means no limit.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// Maximum cores of a VM.
    pub max_cpu: Option<u64>,
    /// Maximum memory of a VM, in bytes.
    pub max_memory: Option<u64>,
    /// Maximum size of a disk, in bytes; 50Gi by default.
    pub max_disk_size: Option<u64>,
    /// Maximum disks of a VM.
    pub max_disks: Option<usize>,
    /// Maximum VMs of a build.
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

/// Each setter takes a number, or `None` for no limit.
impl Limits {
    /// Creates the default limits: 50Gi for a disk, and no others.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the maximum number of cores of a VM.
    #[must_use]
    pub fn max_cpu(mut self, cores: impl Into<Option<u64>>) -> Self {
        self.max_cpu = cores.into();
        self
    }

    /// Sets the maximum memory of a VM, in bytes.
    #[must_use]
    pub fn max_memory(mut self, bytes: impl Into<Option<u64>>) -> Self {
        self.max_memory = bytes.into();
        self
    }

    /// Sets the maximum size of a disk, in bytes.
    #[must_use]
    pub fn max_disk_size(mut self, bytes: impl Into<Option<u64>>) -> Self {
        self.max_disk_size = bytes.into();
        self
    }

    /// Sets the maximum number of disks of a VM.
    #[must_use]
    pub fn max_disks(mut self, disks: impl Into<Option<usize>>) -> Self {
        self.max_disks = disks.into();
        self
    }

    /// Sets the maximum number of VMs of a build.
    #[must_use]
    pub fn max_vms(mut self, vms: impl Into<Option<usize>>) -> Self {
        self.max_vms = vms.into();
        self
    }
}

/// Keys of ConfigMaps and Secrets, set by the embedding program. Namespaces are meaningful to clusters only.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Inputs {
    config_maps: BTreeMap<(String, String), Vec<u8>>,
    secrets: BTreeMap<(String, String), Vec<u8>>,
}

impl Inputs {
    /// Creates an empty set of inputs.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a key of a ConfigMap.
    #[must_use]
    pub fn config_map(
        mut self,
        name: impl Into<String>,
        key: impl Into<String>,
        value: impl Into<Vec<u8>>,
    ) -> Self {
        self.config_maps.insert((name.into(), key.into()), value.into());
        self
    }

    /// Adds a key of a Secret. Its value is masked in all output.
    #[must_use]
    pub fn secret(
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

    /// Returns the existing inputs of a kind, as `name/key`.
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

/// The kind of object that a reference names.
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
