//! The documentation agrees with the code: it mentions every field, code, capability and dependency.

#![allow(clippy::unwrap_used)]

use rudder_core::{
    backend::{Backend as _, ModuleDraft},
    capability::{Capabilities, Capability},
    check::{check, codes},
    content::Content,
    diagnostic::Severity,
    digest::Digest,
    hardware::Bus,
    manifest::{json_schema, parse},
    memory::MemoryBackend,
    module::{CapturedDisk, Module, Provenance, TemplateMachine},
    plan::{Inputs, PlanContext, PlannedNetwork, prepare},
};
use serde_json::Value;
use std::{collections::BTreeSet, fs, path::Path};

fn read(file: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(file)).unwrap()
}

/// Collects the names of all properties in a schema.
fn properties(schema: &Value, names: &mut BTreeSet<String>) {
    match schema {
        Value::Object(map) => {
            if let Some(Value::Object(properties)) = map.get("properties") {
                names.extend(properties.keys().cloned());
            }
            map.values().for_each(|value| properties(value, names));
        }
        Value::Array(list) => list.iter().for_each(|value| properties(value, names)),
        _ => {}
    }
}

/// Returns the contents of code spans, and the words in them.
fn quoted(page: &str) -> BTreeSet<&str> {
    let split = |text: &'static str| move |c: char| text.contains(c);
    page.split('`').skip(1).step_by(2).flat_map(|code| code.split(split(" .:,{}[]"))).collect()
}

#[test]
fn every_field_of_the_schema_is_in_the_reference() {
    let page = read("docs/manifest.md");
    let mut names = BTreeSet::new();
    properties(&json_schema(), &mut names);
    assert!(names.len() > 60, "{names:?}");
    let known = quoted(&page);
    // An example shows the complete resource form.
    let shown = ["apiVersion", "kind", "metadata", "spec", "labels", "annotations", "status"];
    let missing: Vec<_> = names
        .iter()
        .filter(|name| !known.contains(name.as_str()) && !shown.contains(&name.as_str()))
        .collect();
    assert!(missing.is_empty(), "docs/manifest.md does not have {missing:?}");
    assert!(shown.iter().all(|name| page.contains(name)));
}

#[test]
fn every_diagnostic_is_in_the_reference() {
    let page = read("docs/manifest.md");
    for code in codes::ALL {
        let severity = match code.severity {
            Severity::Error => "error",
            Severity::Warning => "warning",
        };
        let line = format!("| `{}` | {severity} | {} |", code.name, code.meaning);
        assert!(page.contains(&line), "docs/manifest.md lacks this line:\n{line}");
    }
}

#[test]
fn the_table_of_backends_matches_the_memory_backend() {
    let page = read("docs/backends.md");
    let rows = page.lines().filter_map(|line| {
        let cells: Vec<&str> = line.strip_prefix("| `")?.split(" | ").collect();
        Some((cells[0].to_owned(), cells.last()?.starts_with("yes")))
    });
    let table: Vec<(String, bool)> = rows
        .flat_map(|(names, yes)| {
            let names: Vec<String> =
                names.split(", ").map(|name| name.trim_matches('`').to_owned()).collect();
            names.into_iter().map(move |name| (name, yes))
        })
        .collect();
    let memory = MemoryBackend::new();
    let (memory, engine) = (memory.capabilities(), Capabilities::engine());
    // The engine uses these on a display.
    let usable = |capability: &Capability| {
        memory.has(Capability::Display)
            || !matches!(capability, Capability::BootCommand | Capability::HandbuildStep)
    };
    let able = memory.iter().chain(engine.iter().filter(usable));
    let able: BTreeSet<String> = able.map(|capability| capability.to_string()).collect();
    for (name, yes) in &table {
        assert_eq!(*yes, able.contains(name), "docs/backends.md is wrong about {name}");
    }
    let missing: Vec<_> = able.iter().filter(|name| !table.iter().any(|(row, _)| row == *name)).collect();
    assert!(missing.is_empty(), "docs/backends.md does not have {missing:?}");
}

#[test]
fn every_dependency_has_its_line() {
    let manifest = read("Cargo.toml");
    let section = manifest.split("[workspace.dependencies]").nth(1).unwrap().split("\n[").next().unwrap();
    let dependencies: BTreeSet<&str> = section
        .lines()
        .filter_map(|line| Some(line.split_once(" = ")?.0))
        .filter(|name| !name.starts_with("rudder"))
        .collect();
    let page = read("docs/dependencies.md");
    let lines: BTreeSet<&str> =
        page.lines().filter_map(|line| Some(line.strip_prefix("| `")?.split_once('`')?.0)).collect();
    assert_eq!(lines, dependencies);
}

#[test]
fn the_readme_shows_the_embed_example() {
    let example = read("examples/embed.rs");
    let program = &example[example.find("use ").unwrap()..];
    assert!(read("README.md").contains(program), "README.md and examples/embed.rs differ");
}

#[test]
fn the_guide_quotes_the_test_and_the_profile() {
    let guide = read("docs/guide.md");
    let test = read("tests/embedding.rs");
    assert!(
        guide.contains(&test[test.find("use ").unwrap()..]),
        "docs/guide.md and tests/embedding.rs differ"
    );
    let workspace = read("Cargo.toml");
    let optimised: Vec<&str> = workspace
        .split("[profile.dev.package.")
        .skip(1)
        .filter_map(|rest| rest.split_once("]\nopt-level = 2")?.0.lines().next())
        .collect();
    assert!(optimised.len() > 10, "{optimised:?}");
    let shown: Vec<&str> =
        guide.lines().filter_map(|line| line.strip_suffix(" = { opt-level = 2 }")).collect();
    assert_eq!(shown, optimised, "docs/guide.md and Cargo.toml differ");
}

#[test]
fn the_manifests_of_the_readme_and_the_guide_have_no_mistakes() {
    for file in ["README.md", "docs/guide.md"] {
        let page = read(file);
        let blocks: Vec<&str> =
            page.split("```yaml\n").skip(1).filter_map(|block| block.split("```").next()).collect();
        assert!(!blocks.is_empty(), "{file}");
        for block in blocks {
            let parsed = parse(block.as_bytes());
            let found = parsed.documents.iter().flat_map(check).chain(parsed.diagnostics.clone());
            let mistakes: Vec<_> = found.filter(|finding| finding.severity == Severity::Error).collect();
            assert!(mistakes.is_empty(), "{file}: {mistakes:?}");
        }
    }
}

/// Returns a module called `base` with a VM `web`, which the recipes require.
fn base() -> Module {
    let mut machine = TemplateMachine::new("web", 1, 1 << 30);
    machine.disks.push(CapturedDisk::new(
        "rootdisk",
        Bus::Virtio,
        "web.rootdisk.qcow2",
        "qcow2",
        20 << 30,
        Content::of(b"disk"),
    ));
    let network = PlannedNetwork::default();
    let provenance = Provenance::new("", Digest::of(b""));
    ModuleDraft::new("base", vec![machine], network, provenance).into_module(Digest::of(b"base"))
}

#[test]
fn every_manifest_of_the_recipes_is_planned_without_a_finding() {
    use Capability as C;
    let more = [C::NicModels, C::NicSlots, C::Uefi, C::SecureBoot, C::Tpm, C::Display];
    let memory = MemoryBackend::new();
    let capabilities = Capabilities::new("any", memory.capabilities().iter().chain(more));
    let inputs = Inputs::new().config_map("site", "nginx.conf", "events {}").secret(
        "registration",
        "script",
        "register --token 0123456789abcdef",
    );
    let context = PlanContext::new(&capabilities).modules([base()]).inputs(inputs);
    let page = read("docs/recipes.md");
    let recipes = page.split("\n## ").skip(1).filter_map(|recipe| {
        let (title, rest) = recipe.split_once('\n')?;
        Some((title, rest.split_once("```yaml\n")?.1.split_once("```")?.0))
    });
    let mut count = 0;
    for (title, manifest) in recipes {
        let prepared = prepare("recipe.yaml", manifest.as_bytes(), &context);
        assert_eq!(prepared.render_warnings(), "", "{title}");
        let plans = prepared.into_plans().unwrap_or_else(|refused| panic!("{title}:\n{refused}"));
        assert!(!plans.is_empty(), "{title}");
        count += 1;
    }
    assert!(count >= 13, "{count}");
    // The list at the top links to every recipe.
    for title in page.lines().filter_map(|line| line.strip_prefix("## ")) {
        let anchor: String =
            title.to_lowercase().chars().filter(|c| c.is_alphanumeric() || " -".contains(*c)).collect();
        let link = format!("(#{})", anchor.replace(' ', "-"));
        assert!(page.contains(&link), "{title}: {link}");
    }
}

#[test]
fn the_guide_quotes_the_example_backend() {
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("../rudder-local/examples/backend");
    let files =
        ["main.rs", "processes/mod.rs", "processes/lab.rs", "processes/machine.rs", "processes/adapter.rs"];
    let code: String = files.iter().map(|file| fs::read_to_string(example.join(file)).unwrap()).collect();
    let page = read("docs/backends.md");
    let shown: Vec<&str> =
        page.split("```rust\n").skip(1).filter_map(|rest| rest.split("```").next()).collect();
    assert!(shown.len() > 8, "{shown:?}");
    for piece in shown {
        assert!(code.contains(piece), "the example does not have this any more:\n{piece}");
    }
}
