//! The JSON Schema of events, generated from the types and checked in as `docs/events.schema.json`.

use super::Event;
use serde_json::Value;

/// Returns the JSON Schema (draft 2020-12) of an event as a line of JSON. Later versions may add kinds of events and fields;
/// existing ones stay.
#[must_use]
pub fn json_schema() -> Value {
    let mut schema = schemars::generate::SchemaSettings::draft2020_12()
        .for_serialize()
        .into_generator()
        .into_root_schema_for::<Event>()
        .to_value();
    if let Some(schema) = schema.as_object_mut() {
        schema.insert("title".into(), "Rudder event".into());
    }
    schema
}
