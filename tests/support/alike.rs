//! Two builds of one manifest, compared: the same events in the same order, and the same record of the module, but for what is
//! of one build alone.

use super::Ended;
use serde_json::Value;
use std::fs;

/// What two builds need not have in common, wherever it is in their events and records: when, how long, where, by what.
const OWN: [&str; 10] =
    ["build_id", "seq", "time", "millis", "created", "timings", "backend", "versions", "digest", "outcome"];

/// Fails unless both were built, told the same, and wrote the same record. Lines of output count as far as `counts` says.
#[track_caller]
pub fn expect_alike(one: &Ended, other: &Ended, counts: impl Fn(&str) -> bool) {
    for (what, one, other) in [
        ("events", events(one, &counts), events(other, &counts)),
        ("record", vec![record(one)], vec![record(other)]),
    ] {
        for (place, (one, other)) in one.iter().zip(&other).enumerate() {
            assert_eq!(one, other, "{what}, {place}");
        }
        assert_eq!(one.len(), other.len(), "the number of {what}:\n{one:#?}\n{other:#?}");
    }
}

fn events(ended: &Ended, counts: impl Fn(&str) -> bool) -> Vec<Value> {
    let all = ended.events.iter().filter(|event| {
        // How often progress is told depends on how long things take.
        event["event"] != "progress" && event["line"].as_str().is_none_or(&counts)
    });
    all.map(without_own).collect()
}

/// The `module.json` that a build wrote.
fn record(ended: &Ended) -> Value {
    let path = ended.outcome()["path"].as_str().unwrap_or_else(|| panic!("a module: {}", ended.stdout));
    let mut record: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    for machine in record["machines"].as_array_mut().unwrap() {
        for disk in machine["disks"].as_array_mut().unwrap() {
            let disk = disk.as_object_mut().unwrap();
            // The guest writes times and keys of its own.
            disk.remove("size");
            disk.remove("sha256");
        }
    }
    without_own(&record)
}

fn without_own(value: &Value) -> Value {
    match value {
        Value::Object(fields) => {
            let kept = fields.iter().filter(|(name, _)| !OWN.contains(&name.as_str()));
            Value::Object(kept.map(|(name, value)| (name.clone(), without_own(value))).collect())
        }
        Value::Array(values) => Value::Array(values.iter().map(without_own).collect()),
        other => other.clone(),
    }
}
