//! The JSON Schema of the manifest, generated from the types and checked in at `docs/manifest.schema.json`.

use super::{BareBuild, BuildSpec, CloneSpec, Resource};
use serde_json::{Map, Value, json};

/// The three forms of a document, and the structs they are made of.
pub(super) struct Types {
    pub(super) build: Value,
    pub(super) bare: Value,
    pub(super) clone: Value,
    pub(super) definitions: Map<String, Value>,
}

/// The schemas as the types give them.
pub(super) fn types() -> Types {
    let mut generator = schemars::generate::SchemaSettings::draft2020_12().into_generator();
    let build = generator.subschema_for::<Resource<BuildSpec>>().to_value();
    let bare = generator.subschema_for::<BareBuild>().to_value();
    let clone = generator.subschema_for::<Resource<CloneSpec>>().to_value();
    Types { build, bare, clone, definitions: generator.take_definitions(true) }
}

/// The JSON Schema (draft 2020-12) of a manifest in any of its forms.
#[must_use]
pub fn json_schema() -> Value {
    let Types { build, bare, clone, definitions } = types();
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Rudder manifest",
        "description": "A build of virtual machines, as a resource or as the bare spec; or a clone of a module.",
        "anyOf": [build, bare, clone],
        "$defs": definitions,
    })
}
