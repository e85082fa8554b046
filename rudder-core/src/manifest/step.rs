//! The provisioners of a VM.

use super::{Scalar, Unknown, YamlMapping};
use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize, de};
use std::fmt;

/// A step of provisioning: `type`, and the block of that name.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Provisioner {
    /// shell, file, reboot, windows-update or handbuild.
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub r#type: Option<String>,
    /// The name of the step in events and errors.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Limit of the step, a Go duration; by default only the limit of the build applies.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub step_timeout: Option<Scalar>,
    /// A script run in the guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shell: Option<ShellStep>,
    /// A file to upload to the guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<FileStep>,
    /// A reboot of the guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reboot: Option<RebootStep>,
    /// Windows updates.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub windows_update: Option<WindowsUpdateStep>,
    /// Manual work by a person.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub handbuild: Option<HandbuildStep>,
    /// Keys that Rudder does not know.
    #[serde(flatten)]
    #[schemars(skip)]
    pub unknown: Unknown,
}

/// A script: `inline`, or `scriptFrom`.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ShellStep {
    /// The script as text or as a list of lines.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub inline: Option<ScriptLines>,
    /// The script from a named input.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub script_from: Option<ValueFrom>,
    /// Environment of the script: names to text, numbers or booleans.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("additionalProperties" = {"type": ["string", "number", "boolean"]}), with = "Option<std::collections::BTreeMap<String, Scalar>>")]
    pub env: Option<YamlMapping>,
    /// The command that runs the script; `{{ .Command }}` is the path of the script.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub execute_command: Option<String>,
    /// Keys that Rudder does not know.
    #[serde(flatten)]
    #[schemars(skip)]
    pub unknown: Unknown,
}

/// A file to upload to the guest: exactly one of `fileRef` and `source`.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct FileStep {
    /// The name of an entry in the top-level `files`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file_ref: Option<String>,
    /// A named input.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<ValueFrom>,
    /// An absolute path in the guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub destination: Option<String>,
    /// Keys that Rudder does not know.
    #[serde(flatten)]
    #[schemars(skip)]
    pub unknown: Unknown,
}

/// A reboot of the guest.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct RebootStep {
    /// The command; default `sudo reboot`, with PowerShell `shutdown /r /f /t 0`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub command: Option<String>,
    /// Keys that Rudder does not know.
    #[serde(flatten)]
    #[schemars(skip)]
    pub unknown: Unknown,
}

/// Windows updates: search, install, reboot, until nothing matches.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct WindowsUpdateStep {
    /// The search criteria for the Windows Update Agent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub search_criteria: Option<String>,
    /// `include:` or `exclude:` and a PowerShell expression.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub filters: Vec<String>,
    /// Maximum number of updates per round; default 1000.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub update_limit: Option<i64>,
    /// Keys that Rudder does not know.
    #[serde(flatten)]
    #[schemars(skip)]
    pub unknown: Unknown,
}

/// Manual work by a person.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct HandbuildStep {
    /// Required: instructions with every click, key and value.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub instructions: Option<String>,
    /// Keys that Rudder does not know.
    #[serde(flatten)]
    #[schemars(skip)]
    pub unknown: Unknown,
}

/// A value from a ConfigMap or Secret: exactly one.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ValueFrom {
    /// A key of a ConfigMap.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub config_map_ref: Option<KeyRef>,
    /// A key of a Secret.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub secret_ref: Option<KeyRef>,
    /// Keys that Rudder does not know.
    #[serde(flatten)]
    #[schemars(skip)]
    pub unknown: Unknown,
}

/// A key of a ConfigMap or Secret.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct KeyRef {
    /// The object.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The key in the object.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// Its namespace.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// Keys that Rudder does not know.
    #[serde(flatten)]
    #[schemars(skip)]
    pub unknown: Unknown,
}

/// Text, or a list of lines that are joined with newlines.
#[derive(Clone, PartialEq, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum ScriptLines {
    /// The text as written.
    Text(String),
    /// The lines of the text.
    List(Vec<String>),
}

impl ScriptLines {
    /// Returns the whole text.
    #[must_use]
    pub fn text(&self) -> std::borrow::Cow<'_, str> {
        match self {
            Self::Text(text) => text.into(),
            Self::List(lines) => lines.join("\n").into(),
        }
    }
}

/// Implemented by hand, because an untagged enum buffers its input first and loses the location.
impl<'de> Deserialize<'de> for ScriptLines {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_newtype_struct(LINES, LinesVisitor)
    }
}

/// Name of the newtype for which a deserializer may pass a text or a list as written.
pub(super) const LINES: &str = "$rudder::Lines";

struct LinesVisitor;

impl<'de> de::Visitor<'de> for LinesVisitor {
    type Value = ScriptLines;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("text or a list of lines")
    }

    fn visit_newtype_struct<D: Deserializer<'de>>(self, deserializer: D) -> Result<ScriptLines, D::Error> {
        deserializer.deserialize_any(self)
    }

    fn visit_str<E: de::Error>(self, value: &str) -> Result<ScriptLines, E> {
        Ok(ScriptLines::Text(value.to_owned()))
    }

    fn visit_seq<A: de::SeqAccess<'de>>(self, list: A) -> Result<ScriptLines, A::Error> {
        Vec::deserialize(de::value::SeqAccessDeserializer::new(list)).map(ScriptLines::List)
    }
}
