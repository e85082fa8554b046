//! Provisioning of real guests: what steps do, and how they fail.

use crate::support::{Bench, tiny, tiny_manifest};

#[test]
fn a_failed_step_reports_its_exit_code() {
    let bench = Bench::new();
    let steps = "- {type: shell, name: good, shell: {inline: 'echo fine'}}\n- {type: shell, name: bad, shell: {inline: 'echo almost; echo oh no >&2; exit 3'}}\n- {type: shell, name: never, shell: {inline: 'echo never'}}";
    let ended = bench.build(&tiny_manifest("steps", steps));
    ended.expect_code(1).expect_text(&["vm vm", "step 2 (bad)", "exit code 3", "oh no"]);
    assert_eq!(ended.outcome()["kind"], "step_failed");
    assert_eq!(ended.outcome()["exit"]["code"], 3);
    assert!(ended.event(|event| event["event"] == "step_started" && event["name"] == "never").is_none());
    bench.expect_clean();
}

#[test]
fn a_step_over_its_limit_fails() {
    let bench = Bench::new();
    let steps = "- {type: shell, name: slow, stepTimeout: 4s, shell: {inline: 'echo started; sleep 600'}}";
    let ended = bench.build(&tiny_manifest("steps", steps));
    ended.expect_code(1).expect_text(&["step 1 (slow)", "4 s", "stepTimeout", "started"]);
    assert_eq!(ended.outcome()["kind"], "timed_out");
    bench.expect_clean();
}

#[test]
fn a_guest_that_powers_off_in_a_step_is_reported() {
    let bench = Bench::new();
    let ended = bench
        .build(&tiny_manifest("steps", "- {type: shell, name: off, shell: {inline: 'poweroff; sleep 600'}}"));
    ended.expect_code(1).expect_text(&["step 1 (off)", "powered itself off"]);
    assert_eq!(ended.outcome()["kind"], "machine_died");
    bench.expect_clean();
}

#[test]
fn a_build_over_its_limit_fails() {
    let bench = Bench::new();
    let steps = "- {type: shell, name: slow, shell: {inline: 'echo started; sleep 600'}}";
    let ended = bench.build(&format!("{}timeout: 40s\n", tiny_manifest("steps", steps)));
    ended.expect_code(1).expect_text(&["40s", "timeout"]);
    assert_eq!(ended.outcome()["kind"], "timed_out");
    bench.expect_clean();
}

#[test]
fn two_machines_are_provisioned_concurrently() {
    let bench = Bench::new();
    let vm = |name: &str| {
        format!(
            "  - name: {name}\n    source: {{url: '{}'}}\n    resources: {{cpu: 1, memory: 256Mi}}\n    cloudInit: {{}}\n    \
             communicator: {{sshTimeout: 3m}}\n    provisioners:\n      - {{type: shell, name: work, shell: {{inline: 'hostname; sleep 20'}}}}\n",
            tiny()
        )
    };
    let ended = bench.build(&format!("name: pair\nvms:\n{}{}", vm("left"), vm("right")));
    ended.expect_code(0);
    let at = |event: &str, vm: &str| {
        ended
            .events
            .iter()
            .position(|e| e["event"] == event && e["vm"] == vm)
            .unwrap_or_else(|| panic!("{event} of {vm}"))
    };
    assert!(at("step_started", "left") < at("step_finished", "right"), "they overlap");
    assert!(at("step_started", "right") < at("step_finished", "left"), "they overlap");
    for vm in ["left", "right"] {
        let line = ended.event(|e| e["event"] == "step_output" && e["vm"] == vm).unwrap();
        assert_eq!(line["line"], vm, "its host name");
    }
    bench.expect_clean();
}

#[test]
fn every_kind_of_step_on_the_tiny_guest() {
    let bench = Bench::new();
    let manifest = format!(
        "files:\n  - {{name: hello.txt, inline: \"hello\\n\"}}\n{}",
        tiny_manifest(
            "steps",
            "- {type: file, file: {fileRef: hello.txt, destination: /deep/er/hello.txt}}\n\
             - {type: shell, name: look, shell: {inline: [cat /deep/er/hello.txt, 'echo \"$WHAT\"', touch /before], env: {WHAT: \"it's \\\"quoted\\\" $HOME é\"}}}\n\
             - {type: reboot, name: again, reboot: {command: reboot}}\n\
             - {type: shell, name: after, shell: {inline: \"#!/bin/sh\\ntest -e /before && ls -A /tmp && echo tmp-is-listed\", executeCommand: 'sh {{ .Command }}'}}",
        )
    );
    let ended = bench.build(&manifest);
    ended.expect_code(0);
    let lines: Vec<&str> = ended
        .events
        .iter()
        .filter(|e| e["event"] == "step_output")
        .filter_map(|e| e["line"].as_str())
        .collect();
    assert!(
        lines.contains(&"hello")
            && lines.contains(&"it's \"quoted\" $HOME é")
            && lines.contains(&"tmp-is-listed"),
        "{lines:?}"
    );
    bench.expect_clean();
}
