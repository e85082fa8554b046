//! Modules of real guests: layers, all disks, locked builds, and what is kept of a failed build.

use crate::support::{Bench, Running, debian, one_vm, tiny_manifest};
use serde_json::Value;
use std::{fs, process::Command};

#[test]
fn a_layer_contains_its_own_changes_and_those_of_its_base() {
    let bench = Bench::new();
    let base = format!(
        "name: base\nvms:\n  - name: web\n    source: {{url: '{}'}}\n    resources: {{cpu: 2, memory: 1Gi}}\n    cloudInit: {{}}\n    \
         provisioners:\n      - type: shell\n        name: install\n        shell: {{inline: [apt-get update, 'DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends hello']}}\n",
        debian()
    );
    bench.built(&base);
    bench.expect_clean();
    let layer = "name: layer\nfiles: [{name: note.txt, inline: \"from the layer\\n\"}]\nvms:\n  - name: web\n    source: {buildRef: {name: base}}\n    \
                 resources: {cpu: 2, memory: 1Gi}\n    cloudInit: {}\n    provisioners:\n      - {type: file, file: {fileRef: note.txt, destination: /srv/note.txt}}\n";
    let module = bench.built(layer);
    bench.expect_clean();
    assert_eq!(module["provenance"]["inputs"][0]["url"], "module base/web");

    // Starts the captured disk afresh, as the source of a third build that only inspects it.
    let disk = disk_path(&bench, "layer", &module["machines"][0]["disks"][0]);
    let check = Command::new("qemu-img").arg("info").arg("--output=json").arg(&disk).output().unwrap();
    let info: Value = serde_json::from_slice(&check.stdout).unwrap();
    assert!(info.get("backing-filename").is_none(), "self-contained: {info}");
    let check = one_vm(
        "look",
        &format!("{{url: 'file://{disk}'}}"),
        "- {type: shell, name: look, shell: {inline: [hello, cat /srv/note.txt]}}",
    )
    .replace("256Mi", "1Gi");
    let ended = bench.build(&check);
    ended.expect_code(0);
    let said: Vec<&str> = ended
        .events
        .iter()
        .filter(|e| e["event"] == "step_output")
        .filter_map(|e| e["line"].as_str())
        .collect();
    assert!(said.contains(&"Hello, world!") && said.contains(&"from the layer"), "{said:?}");
    bench.expect_clean();

    let (code, list, _) = bench.run("modules", &["list"]);
    assert_eq!(code, 0);
    assert!(list.contains("base") && list.contains("layer"), "{list}");
    assert_eq!(bench.run("modules", &["remove", "layer"]).0, 0);
    let (code, _, error) = bench.run("modules", &["show", "layer"]);
    assert_eq!(code, 1);
    assert!(error.contains("layer"), "{error}");
}

fn disk_path(bench: &Bench, module: &str, disk: &Value) -> String {
    let (code, shown, error) = bench.run("modules", &["show", module]);
    assert_eq!(code, 0, "{error}");
    let file = disk["file"].as_str().unwrap();
    let found = crate::support::walk(&bench.store().join("modules").join(module))
        .into_iter()
        .find(|path| path.ends_with(file) && !path.to_string_lossy().contains("current"));
    found.unwrap_or_else(|| panic!("{file} of {shown}")).display().to_string()
}

#[test]
fn all_disks_are_captured_and_inherited() {
    let bench = Bench::new();
    let disks = "    disks: [{name: rootdisk, size: 1Gi}, {name: data, size: 64Mi}, {name: more, size: 32Mi, bus: scsi}]\n    cloudInit";
    let write = "- {type: shell, shell: {inline: ['ls /sys/block', 'for d in /sys/block/*; do test $(cat $d/size) = 131072 && printf data-of-data > /dev/${d##*/}; test $(cat $d/size) = 65536 && printf data-of-more > /dev/${d##*/}; done; sync']}}";
    let module = bench.built(&tiny_manifest("disks", write).replace("    cloudInit", disks));
    let names: Vec<_> =
        module["machines"][0]["disks"].as_array().unwrap().iter().map(|disk| &disk["name"]).collect();
    assert_eq!(names, ["rootdisk", "data", "more"]);
    let read = "- {type: shell, shell: {inline: 'for d in /sys/block/*; do case $(cat $d/size) in 131072|65536) head -c 12 /dev/${d##*/}; echo;; esac; done'}}";
    let ended = bench.build(&one_vm("child", "{buildRef: {name: disks}}", read));
    ended.expect_code(0);
    for text in ["data-of-data", "data-of-more"] {
        assert!(ended.event(|event| event["line"] == text).is_some(), "{text}; {}", ended.stdout);
    }
    bench.expect_clean();
}

#[test]
fn a_locked_build_refuses_an_input_that_changed() {
    let bench = Bench::new();
    let file = bench.write("input.txt", "one\n");
    let manifest = format!(
        "files: [{{name: input.txt, url: 'file://{}'}}]\n{}",
        file.display(),
        tiny_manifest("locked", "- {type: file, file: {fileRef: input.txt, destination: /input.txt}}")
    );
    bench.built(&manifest);
    let locked = || {
        let mut command = bench.command(&manifest);
        command.arg("--locked");
        Running::start(command).end()
    };
    locked().expect_code(0);
    fs::write(&file, "two\n").unwrap();
    let ended = locked();
    ended.expect_code(1).expect_text(&["input.txt", "found other bytes"]);
    bench.expect_clean();
}

#[test]
fn a_failed_build_can_be_kept_entered_and_removed() {
    let bench = Bench::new();
    let mut command = bench.command(&tiny_manifest(
        "kept",
        "- {type: shell, name: bad, shell: {inline: 'echo here > /evidence; exit 9'}}",
    ));
    command.args(["--on-failure", "keep"]);
    let ended = Running::start(command).end();
    ended.expect_code(1);
    let kept = ended.event(|event| event["event"] == "kept").expect("an event that says how to get in");
    assert_eq!(bench.machines().len(), 1, "the machine still runs");
    let ssh = kept["access"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(Value::as_str)
        .find_map(|line| line.find("ssh ").map(|at| line[at..].to_owned()))
        .expect("an ssh command line");
    let output = Command::new("sh").arg("-c").arg(format!("{ssh} cat /evidence")).output().unwrap();
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        "here\n",
        "{ssh}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    // `gc` must not remove what was kept…
    assert_eq!(bench.run("modules", &["gc"]).0, 0);
    assert_eq!(bench.machines().len(), 1, "gc leaves it");
    // …but what the event suggests removes it.
    let lab = kept["lab"].as_str().unwrap();
    let (code, _, error) = bench.run("modules", &["remove", lab]);
    assert_eq!(code, 0, "{error}");
    assert!(bench.machines().is_empty());
    bench.expect_clean();
}
