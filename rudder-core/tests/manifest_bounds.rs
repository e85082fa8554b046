//! For any manifest, the size of the output is bounded, and so is the work. Time is not measured here: quadratic work
//! would visibly hang at these sizes.
#![allow(clippy::unwrap_used)]

use rudder_core::{
    capability::Capabilities,
    diagnostic::MAX_FINDINGS,
    manifest::parse,
    plan::{PlanContext, Prepared, prepare},
};
use std::fmt::Write as _;

fn prepared(text: &str) -> Prepared {
    prepare("m.yaml", text.as_bytes(), &PlanContext::new(&Capabilities::engine()))
}

/// Asserts that the findings and the text about them are bounded, and that a refused manifest stays refused.
fn assert_bounded(text: &str) -> Prepared {
    let prepared = prepared(text);
    assert!(prepared.has_errors());
    assert!(prepared.diagnostics.len() <= MAX_FINDINGS + 1, "{}", prepared.diagnostics.len());
    let shown = prepared.render();
    assert!(shown.len() < 2 << 20, "{} bytes", shown.len());
    for finding in &prepared.diagnostics {
        assert!(finding.message.len() <= 8100 && finding.path.len() <= 8100, "{finding:?}");
    }
    prepared
}

#[test]
fn many_findings_are_counted_but_not_listed() {
    let mut vms = "vms:\n".to_owned();
    for _ in 0..20_000 {
        vms.push_str("- {}\n");
    }
    let prepared = assert_bounded(&vms);
    let last = prepared.diagnostics.last().unwrap();
    assert_eq!(last.code, "too-many");
    assert!(
        last.message.starts_with("and ") && last.message.ends_with(" more, which are not shown"),
        "{}",
        last.message
    );
    assert!(last.is_error());
}

#[test]
fn warnings_do_not_displace_an_error() {
    let mut files = "files:\n".to_owned();
    for n in 0..3000 {
        // The file is unused and has no checksum.
        writeln!(files, "- {{name: f{n}, url: 'https://example.org/{n}'}}").unwrap();
    }
    let prepared = assert_bounded(&format!("{files}vms:\n- name: A\n"));
    assert!(prepared.diagnostics.iter().any(|finding| finding.code == "invalid-name"));
    // Only the number of warnings is too high: the manifest is still planned.
    let text =
        format!("{files}vms:\n- {{name: a, source: {{blank: true}}, resources: {{cpu: 1, memory: 1Gi}}}}\n");
    let warned = prepare("m.yaml", text.as_bytes(), &PlanContext::new(&Capabilities::engine()));
    let errors: Vec<_> = warned.diagnostics.iter().filter(|finding| finding.is_error()).collect();
    assert!(
        errors.iter().all(|finding| matches!(finding.code.as_str(), "unsupported" | "too-many")),
        "{errors:?}"
    );
}

#[test]
fn long_values_are_truncated_in_every_message() {
    let long = "x".repeat(1 << 20);
    for text in [
        format!("vms:\n- name: {long}\n"),
        format!("vms:\n- &vm {{name: {long}}}\n- *vm\n- *vm\n"),
        format!("vms:\n- {long}: 1\n  x: 1\n  name: A\n"),
        format!("vms:\n- name: [{long}]\n  tpm: {long}\n"),
        format!("vms:\n- source: {{url: {long}}}\n"),
        format!("vms:\n- source: {{url: 'https://a b/{long}'}}\n"),
        format!("vms:\n- bootCommand: ['<{long}>', '{{{{{long}}}}}', '<waitText {long}>']\n"),
        format!("vms:\n- disks: [{{name: a, size: {long}, bus: {long}}}]\n"),
        format!(
            "vms:\n- provisioners: [{{type: {long}, name: {long}, file: {{fileRef: {long}, destination: {long}}}}}]\n"
        ),
        format!("vms:\n- communicator: {{sshUsername: '{long}:', shell: {long}}}\n"),
        format!(
            "vms:\n- nics: [{{subnet: {long}, ip: {long}, mac: {long}, model: {long}, slot: 1, name: {long}}}]\n"
        ),
        format!("files:\n- {{name: {long}/, url: x}}\nvms: []\n"),
        format!("apiVersion: {long}\nkind: {long}\n"),
        format!("vms: *{long}\n"),
        format!("vms: !{long} x\n"),
        format!("timeout: {}\nvms: []\n", "0s".repeat(1 << 18)),
        format!(
            "network: {{subnets: [{{name: {long}, cidr: 10.0.0.0/24}}, {{name: b, cidr: 10.0.0.0/24, vpc: {long}}}]}}\nvms: []\n"
        ),
    ] {
        assert_bounded(&text);
    }
}

#[test]
fn findings_on_one_long_line_cost_no_more_than_on_many() {
    assert_bounded(&format!("vms: [{}]", "{tpm: 5}, ".repeat(10_000)));
    assert_bounded(&format!("vms: [{{bootCommand: ['{}']}}]", "<nokey>".repeat(30_000)));
    assert_bounded(&format!("vms: [{{bootCommand: [{}]}}]", "'<nokey>', ".repeat(10_000)));
}

#[test]
fn comparing_long_lists_of_names_is_bounded() {
    let mut text = "files:\n".to_owned();
    for n in 0..8_000 {
        writeln!(text, "- {{name: file-{n}, inline: x}}").unwrap();
    }
    text.push_str("vms:\n- name: a\n  provisioners:\n");
    for n in 0..8_000 {
        writeln!(text, "  - {{type: file, file: {{fileRef: other-{n}, destination: /x}}}}").unwrap();
    }
    assert_bounded(&text);
}

#[test]
fn subnets_files_and_overrides_are_looked_up_by_index() {
    let mut text = "network:\n  subnets:\n".to_owned();
    for n in 0..12_000u32 {
        writeln!(text, "  - {{name: s{n}, cidr: 10.{}.{}.0/24}}", n >> 8, n & 255).unwrap();
    }
    text.push_str("buildOverrides:\n  subnets:\n");
    for n in 0..12_000 {
        writeln!(text, "  - {{name: s{n}, unmanaged: true}}").unwrap();
    }
    text.push_str("vms: []\n");
    let prepared = prepared(&text);
    assert!(!prepared.diagnostics.iter().any(|finding| finding.code == "subnets-overlap"));
}

#[test]
fn keys_of_a_large_mapping_are_looked_up_by_index() {
    let mut text = String::new();
    for n in 0..20_000 {
        writeln!(text, "x{n}-unknown: 1").unwrap();
    }
    text.push_str("vms:\n");
    for _ in 0..20_000 {
        text.push_str("- {}\n");
    }
    assert!(parse(text.as_bytes()).documents.len() <= 1);
    assert_bounded(&text);
}

#[test]
fn the_time_per_document_does_not_grow_with_their_number() {
    let one = |n: usize| {
        format!(
            "---\nname: m{n}\nvms:\n- {{name: a, source: {{blank: true}}, resources: {{cpu: 1, memory: 1Gi}}, x: 1}}\n"
        )
    };
    let all: String = (0..1000).map(one).collect();
    let prepared = prepared(&all);
    assert!(prepared.diagnostics.len() <= MAX_FINDINGS + 1);
    assert!(
        prepared.plans.iter().all(|plan| plan.manifest.len() < 200),
        "a plan holds its own document only"
    );
}
