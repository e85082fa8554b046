//! The manifest as the author wrote it, without defaults filled in.
//!
//! The types describe the schema, not the meaning: every scalar with a grammar of its own (names, quantities,
//! addresses) is kept as written, and is interpreted by `crate::check` and [`crate::plan`]. Every field is optional
//! here, so that a missing field never hides other findings. Keys that Rudder does not know are kept in `unknown` and
//! written back when the manifest is serialised.
//!
//! Field names and meanings follow the RudderVirt `VirtualMachineBuild` resource (`ruddervirt.io/v1alpha1`); see
//! `docs/manifest.md`.

mod debug;
mod document;
mod file;
mod keys;
mod network;
mod parse;
mod path;
mod scalar;
mod schema;
mod step;
mod value;
mod vm;
mod yaml;

pub use document::{Document, Parsed};
pub use file::{MAX_BYTES, read_file};
pub use network::{BuildOverrides, Network, Subnet, SubnetOverride, VmOverride, Vpc, VpcOverride};
pub use parse::{UnknownKeys, parse, parse_named, parse_with};
pub use path::{PathSegment, ValuePath};
pub use scalar::Scalar;
pub use schema::json_schema;
pub use step::{
    FileStep, HandbuildStep, KeyRef, Provisioner, RebootStep, ScriptLines, ShellStep, ValueFrom,
    WindowsUpdateStep,
};
pub use value::{YamlMapping, YamlValue};
pub use vm::{
    BuildRef, CloudInit, Communicator, Disk, EfiFirmware, FileNames, FileRef, Iso, Nic, Resources, Source,
    SourcePvc, Vm,
};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Keys that Rudder does not know, in the order in which they were written.
pub type Unknown = YamlMapping;

/// The `apiVersion` of the resource form.
pub const API_VERSION: &str = "ruddervirt.io/v1alpha1";

/// One document of a manifest file, in the form in which it was written.
#[derive(Clone, PartialEq, Serialize)]
#[serde(untagged)]
#[non_exhaustive]
pub enum Manifest {
    /// The resource form of a build: `apiVersion`, `kind: VirtualMachineBuild`, `metadata`, `spec`.
    Resource(Box<Resource<BuildSpec>>),
    /// The bare form: the spec itself, with an optional name.
    Bare(Box<BareBuild>),
    /// The resource form of a clone, with `kind: VirtualMachineClone`.
    Clone(Box<Resource<CloneSpec>>),
}

/// The Kubernetes resource form around a spec.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, bound(deserialize = "S: Default + Deserialize<'de>"))]
#[schemars(rename = "{S}Resource", bound = "S: Default + Serialize + JsonSchema")]
pub struct Resource<S> {
    /// `ruddervirt.io/v1alpha1`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub api_version: Option<String>,
    /// `VirtualMachineBuild` or `VirtualMachineClone`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
    /// Name, namespace, labels, annotations.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metadata: Option<Metadata>,
    /// The desired build or clone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub spec: Option<S>,
    /// The status reported by a cluster; read and ignored.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<std::collections::BTreeMap<String, serde_json::Value>>")]
    pub status: Option<YamlValue>,
    /// Keys that Rudder does not know.
    #[serde(flatten)]
    #[schemars(skip)]
    pub unknown: Unknown,
}

/// The metadata of a resource.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Metadata {
    /// The name of the build and of the resulting module.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The namespace for cluster backends; kept but not used by others.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// Labels; kept but not used.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<std::collections::BTreeMap<String, String>>")]
    pub labels: Option<YamlMapping>,
    /// Annotations; kept but not used.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<std::collections::BTreeMap<String, String>>")]
    pub annotations: Option<YamlMapping>,
    /// Keys that Rudder does not know.
    #[serde(flatten)]
    #[schemars(skip)]
    pub unknown: Unknown,
}

/// The bare form: a [`BuildSpec`] with an optional name on top.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct BareBuild {
    /// The name of the build; by default the stem of the file name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The rest.
    #[serde(flatten)]
    pub spec: BuildSpec,
}

/// The specification of a build.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct BuildSpec {
    /// The VMs, at least one. They boot and are provisioned side by side.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub vms: Vec<Vm>,
    /// Files that VMs, floppies, the HTTP server and steps can refer to.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<File>,
    /// VPCs and subnets.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network: Option<Network>,
    /// Files served over HTTP while the VMs boot.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub http_directory: Option<FileNames>,
    /// Settings that apply during the build only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub build_overrides: Option<BuildOverrides>,
    /// Limit of the whole build, a Go duration; default 30m.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout: Option<Scalar>,
    /// How many times the whole build is retried after a retryable failure; default 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retries: Option<i64>,
    /// How long an unused ISO stays cached, a Go duration; default 24h.
    #[serde(rename = "isoCacheTTL", skip_serializing_if = "Option::is_none")]
    pub iso_cache_ttl: Option<Scalar>,
    /// The namespace for cluster backends.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// Prefix of the namespaces that a cluster backend creates.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespace_prefix: Option<String>,
    /// Ignored, with a warning: every VM is captured.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<serde_json::Value>")]
    pub output: Option<YamlValue>,
    /// Keys that Rudder does not know.
    #[serde(flatten)]
    #[schemars(skip)]
    pub unknown: Unknown,
}

/// A file of the build: its name, and exactly one of `inline` and `url`.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct File {
    /// A unique name; also the name on the floppy and the path on the HTTP server.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The content of the file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub inline: Option<String>,
    /// An http, https or file URL of the content.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// sha256 of the bytes at `url`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub checksum: Option<String>,
    /// Keys that Rudder does not know.
    #[serde(flatten)]
    #[schemars(skip)]
    pub unknown: Unknown,
}

/// A running copy of a module.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct CloneSpec {
    /// The module to clone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub template_name: Option<String>,
    /// The network that replaces that of the template.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network: Option<Network>,
    /// Differences from the template, for each VM.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub vm_overrides: Vec<VmOverride>,
    /// Limit for creating the clone; default 15m.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout: Option<Scalar>,
    /// Lifetime of the clone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ttl: Option<Scalar>,
    /// The time from which the age of the clone is counted (RFC 3339).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub age_anchor: Option<String>,
    /// The clone that this one replaces.
    #[serde(rename = "replacesCloneID", skip_serializing_if = "Option::is_none")]
    pub replaces_clone_id: Option<String>,
    /// The egress gateway, which provides access to the internet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub egress_gateway: Option<EgressGateway>,
    /// The namespace for cluster backends.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// Prefix of the namespaces that a cluster backend creates.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespace_prefix: Option<String>,
    /// Keys that Rudder does not know.
    #[serde(flatten)]
    #[schemars(skip)]
    pub unknown: Unknown,
}

/// The egress gateway of a clone.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct EgressGateway {
    /// Whether the clone has an egress gateway.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub enabled: Option<bool>,
    /// Keys that Rudder does not know.
    #[serde(flatten)]
    #[schemars(skip)]
    pub unknown: Unknown,
}

impl Manifest {
    /// Returns the name as written. A bare manifest without a name is named after its file when it is planned.
    #[must_use]
    pub fn name(&self) -> Option<&str> {
        match self {
            Self::Resource(resource) => resource.metadata.as_ref()?.name.as_deref(),
            Self::Clone(resource) => resource.metadata.as_ref()?.name.as_deref(),
            Self::Bare(bare) => bare.name.as_deref(),
        }
    }

    /// Returns the spec of a build; `None` for a clone, or a resource without `spec`.
    #[must_use]
    pub fn build_spec(&self) -> Option<&BuildSpec> {
        match self {
            Self::Resource(resource) => resource.spec.as_ref(),
            Self::Bare(bare) => Some(&bare.spec),
            Self::Clone(_) => None,
        }
    }

    /// Writes the manifest as YAML, in its original form: unknown keys, the order of lists and the kind of every scalar
    /// are kept. Comments, anchors and empty lists are not.
    ///
    /// # Errors
    /// When `unknown` fields that a program has set contain what no parsed manifest does: tags, and keys that are lists
    /// or mappings.
    pub fn to_yaml(&self) -> crate::Result<String> {
        let value = serde_yaml::to_value(self).map_err(|error| {
            crate::Error::new(crate::ErrorKind::InvalidInput, "cannot write the manifest as YAML")
                .with_source(error)
        })?;
        yaml::write::write(&value).ok_or_else(|| {
            crate::Error::new(
                crate::ErrorKind::InvalidInput,
                "cannot write the manifest as YAML: expected scalars as keys and no tags, but found others",
            )
        })
    }
}
