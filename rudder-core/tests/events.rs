//! The JSON lines of events agree with `docs/events.md` and `docs/events.schema.json`.
#![allow(clippy::unwrap_used)]

use rudder_core::{
    build::Build,
    event::{Event, json_schema},
    memory::{MemoryBackend, Response},
    plan::{PlanContext, prepare},
};
use serde_json::{Map, Value};
use std::{collections::BTreeSet, fs, path::Path, sync::Arc};

fn docs(file: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs").join(file)).unwrap_or_default()
}

/// Returns the lines of the examples.
fn examples() -> Vec<String> {
    let page = docs("events.md");
    let block = page.split("```jsonl\n").nth(1).unwrap().split("```").next().unwrap();
    block.lines().map(str::to_owned).collect()
}

/// Checks a value against the schema.
fn accepts(value: &Value) -> Result<(), String> {
    let mut compiler = boon::Compiler::new();
    let mut schemas = boon::Schemas::new();
    compiler.add_resource("memory:events", json_schema()).unwrap();
    let schema = compiler.compile("memory:events", &mut schemas).unwrap();
    schemas.validate(value, schema).map_err(|error| format!("{value}\n{error:#}"))
}

#[test]
fn the_schema_in_docs_is_current() {
    let current = format!("{}\n", serde_json::to_string_pretty(&json_schema()).unwrap());
    if std::env::var_os("RUDDER_UPDATE").is_some() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/events.schema.json");
        fs::write(path, &current).unwrap();
    }
    assert!(
        docs("events.schema.json") == current,
        "docs/events.schema.json is not what the types say; regenerate it with\n\
         RUDDER_UPDATE=1 cargo test -p rudder-core --test events"
    );
}

/// Collects the constant values of all properties with this name in a schema.
fn constants(schema: &Value, name: &str, found: &mut BTreeSet<String>) {
    match schema {
        Value::Object(map) => {
            let fixed =
                map.get("properties").and_then(|properties| properties.get(name)?.get("const")?.as_str());
            found.extend(fixed.map(str::to_owned));
            map.values().for_each(|value| constants(value, name, found));
        }
        Value::Array(list) => list.iter().for_each(|value| constants(value, name, found)),
        _ => {}
    }
}

#[test]
fn every_kind_of_event_and_outcome_has_an_example() {
    let (page, examples) = (docs("events.md"), examples());
    for name in ["event", "result"] {
        let mut known = BTreeSet::new();
        constants(&json_schema(), name, &mut known);
        assert!(known.len() >= 3, "{known:?}");
        let pick = |line: &String| {
            let value: Value = serde_json::from_str(line).unwrap();
            let value = if name == "event" { value[name].clone() } else { value["outcome"][name].clone() };
            value.as_str().map(str::to_owned)
        };
        let shown: BTreeSet<String> = examples.iter().filter_map(pick).collect();
        assert_eq!(shown, known);
        for name in known {
            assert!(page.contains(&format!("`{name}`")), "docs/events.md does not explain {name}");
        }
    }
}

#[test]
fn the_types_and_the_schema_agree_on_every_example() {
    for line in examples() {
        let event: Event = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"));
        assert_eq!(event.to_json(), line, "an example is as it is written");
        let value: Value = serde_json::from_str(&line).unwrap();
        accepts(&value).unwrap();
        // The schema and the code agree on which fields are optional.
        for key in value.as_object().unwrap().keys() {
            let mut less = value.as_object().unwrap().clone();
            less.remove(key);
            let less = Value::Object(less);
            let read = serde_json::from_value::<Event>(less.clone()).is_ok();
            assert_eq!(read, accepts(&less).is_ok(), "without {key}: {line}");
        }
        let mut unknown: Map<String, Value> = value.as_object().unwrap().clone();
        unknown.insert("event".to_owned(), "not_yet_invented".into());
        assert!(accepts(&Value::Object(unknown)).is_err(), "the schema is of this version");
    }
}

#[tokio::test(start_paused = true)]
async fn the_events_of_builds_match_the_schema() {
    const MANIFEST: &[u8] = b"
name: site
retries: 1
vms:
  - name: web
    source: {url: 'https://images.example/a.qcow2'}
    resources: {cpu: 1, memory: 512Mi}
    cloudInit: {}
    bootCommand: ['x<enter>']
    provisioners:
      - {type: shell, name: first, shell: {inline: says}}
      - {type: shell, shell: {inline: fails}}
";
    let says = Response::ok("one\n").stderr("two\n");
    let backend = MemoryBackend::new()
        .machine("web", |guest| guest.on("says", says).on("fails", Response::fails(3, "no\n")));
    let context = PlanContext::new(rudder_core::backend::Backend::capabilities(&backend));
    let plan = prepare("site.yaml", MANIFEST, &context).into_plans().unwrap().remove(0);
    let build = Build::new(plan, Arc::new(backend)).start();
    let mut events = build.events();
    let mut seen = BTreeSet::new();
    while let Some(event) = events.next().await {
        let value: Value = serde_json::from_str(&event.to_json()).unwrap();
        accepts(&value).unwrap();
        let step = value.get("step").and_then(Value::as_u64);
        assert!(step.is_none_or(|step| step >= 1), "steps count from 1: {value}");
        seen.insert(value["event"].as_str().unwrap().to_owned());
    }
    let error = build.outcome().await.unwrap_err();
    let failure = error.build_failure().unwrap();
    assert_eq!(failure.report.step.as_deref(), Some("2 (shell)"));
    for kind in ["step_output", "boot_action", "retrying", "finished"] {
        assert!(seen.contains(kind), "{seen:?}");
    }
}
