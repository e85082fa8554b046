//! The checked-in JSON Schema is the one generated from the types.
#![allow(clippy::unwrap_used)]

use rudder_core::manifest::json_schema;

#[test]
fn the_schema_in_docs_is_current() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/manifest.schema.json");
    let current = format!("{}\n", serde_json::to_string_pretty(&json_schema()).unwrap());
    if std::env::var_os("RUDDER_UPDATE").is_some() {
        std::fs::write(path, &current).unwrap();
    }
    let found = std::fs::read_to_string(path).unwrap_or_default();
    assert!(
        found == current,
        "docs/manifest.schema.json is not what the types say; regenerate it with\n\
         RUDDER_UPDATE=1 cargo test -p rudder-core --test manifest_schema"
    );
}

/// Editors use the schema for completion and explanations, so every field has a description.
#[test]
fn every_field_is_described() {
    let schema = json_schema();
    for (name, definition) in schema["$defs"].as_object().unwrap() {
        for (field, schema) in definition["properties"].as_object().into_iter().flatten() {
            assert!(schema["description"].is_string(), "{name}.{field}");
        }
    }
}
