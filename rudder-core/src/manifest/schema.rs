//! The JSON Schema of the manifest, generated from the types and checked in at `docs/manifest.schema.json`.

use super::{
    API_VERSION, BareBuild, BuildSpec, CloneSpec, Resource,
    parse::{BUILD_KIND, CLONE_KIND},
};
use serde_json::{Map, Value, json};

/// The three forms of a document, and the structs that they consist of.
pub(super) struct Types {
    pub(super) build: Value,
    pub(super) bare: Value,
    pub(super) clone: Value,
    pub(super) definitions: Map<String, Value>,
}

/// Generates the schemas from the types.
pub(super) fn types() -> Types {
    let mut generator = schemars::generate::SchemaSettings::draft2020_12().into_generator();
    let build = generator.subschema_for::<Resource<BuildSpec>>().to_value();
    let bare = generator.subschema_for::<BareBuild>().to_value();
    let clone = generator.subschema_for::<Resource<CloneSpec>>().to_value();
    Types { build, bare, clone, definitions: generator.take_definitions(true) }
}

/// Returns the JSON Schema (draft 2020-12) of a manifest in any of its forms. Further keys are allowed, as in the
/// parser.
#[must_use]
pub fn json_schema() -> Value {
    let Types { build, bare, clone, mut definitions } = types();
    for (name, field, rule) in rules() {
        if let Some(schema) = definitions.get_mut(name).and_then(|schema| schema["properties"].get_mut(field))
        {
            tighten(schema, &rule);
        }
    }
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Rudder manifest",
        "description": "A build of virtual machines, as a resource or as the bare spec, or a clone of a module.",
        "anyOf": [
            resource(build, BUILD_KIND),
            // Otherwise anything would be a bare build with unknown keys.
            with(bare, json!({
                "required": ["vms"],
                "not": { "anyOf": [{ "required": ["apiVersion"] }, { "required": ["kind"] }] },
            })),
            resource(clone, CLONE_KIND),
        ],
        "$defs": definitions,
    })
}

/// Rules of `docs/manifest.md` that the types do not express: struct, field, rule.
fn rules() -> Vec<(&'static str, &'static str, Value)> {
    let name = || json!({ "pattern": "^[a-z0-9]([a-z0-9-]*[a-z0-9])?$", "maxLength": 63 });
    let checksum = || json!({ "pattern": "^(sha256:)?[0-9a-fA-F]{64}$" });
    vec![
        ("BareBuild", "name", name()),
        ("Metadata", "name", name()),
        ("Vm", "name", name()),
        ("Disk", "name", name()),
        ("Vpc", "name", name()),
        ("Subnet", "name", name()),
        ("File", "checksum", checksum()),
        ("Source", "checksum", checksum()),
        ("Iso", "checksum", checksum()),
        ("Disk", "bus", json!({ "enum": ["virtio", "scsi", "sata", "usb", "ide", null] })),
        (
            "Nic",
            "model",
            json!({ "enum": ["e1000", "virtio", "e1000e", "rtl8139", "pcnet", "ne2k_pci", null] }),
        ),
        ("Nic", "slot", json!({ "minimum": 1, "maximum": 9 })),
        ("Communicator", "type", json!({ "enum": ["ssh", null] })),
        ("Communicator", "shell", json!({ "enum": ["bash", "powershell", null] })),
        ("Communicator", "sshPort", json!({ "minimum": 1, "maximum": 65535 })),
        (
            "Provisioner",
            "type",
            json!({ "enum": ["shell", "file", "reboot", "windows-update", "handbuild", null] }),
        ),
        ("Vm", "nics", json!({ "maxItems": 9 })),
    ]
}

fn resource(schema: Value, kind: &str) -> Value {
    let head = json!({ "apiVersion": { "const": API_VERSION }, "kind": { "const": kind } });
    with(schema, json!({ "required": ["apiVersion", "kind", "spec"], "properties": head }))
}

fn with(mut schema: Value, rule: Value) -> Value {
    tighten(&mut schema, &rule);
    schema
}

fn tighten(schema: &mut Value, rule: &Value) {
    if let (Some(schema), Some(rule)) = (schema.as_object_mut(), rule.as_object()) {
        schema.extend(rule.clone());
    }
}
