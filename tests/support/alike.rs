//! Compares two builds of one manifest: the same events in the same order, and the same record of the module, except
//! for what is specific to one build.

use super::Ended;
use serde_json::Value;
use std::fs;

/// Fields that may differ between two builds wherever they occur in events and records: times, durations, locations,
/// programs.
const OWN: [&str; 10] =
    ["build_id", "seq", "time", "millis", "created", "timings", "backend", "versions", "digest", "outcome"];

/// Fails unless both builds succeeded, reported the same, and wrote the same record. Lines of output are compared only
/// if `counts` returns true.
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
        // The number of progress events depends on how long things take.
        event["event"] != "progress" && event["line"].as_str().is_none_or(&counts)
    });
    all.map(without_own).collect()
}

/// Returns the `module.json` that a build wrote.
fn record(ended: &Ended) -> Value {
    let path = ended.outcome()["path"].as_str().unwrap_or_else(|| panic!("a module: {}", ended.stdout));
    let mut record: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    for machine in record["machines"].as_array_mut().unwrap() {
        for disk in machine["disks"].as_array_mut().unwrap() {
            let disk = disk.as_object_mut().unwrap();
            // The guest writes its own times and keys.
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
