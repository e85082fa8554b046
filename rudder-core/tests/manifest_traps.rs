//! Text that YAML reads as something else, and keys that are nearly right: the finding says how to fix it.
#![allow(clippy::unwrap_used)]

use rudder_core::{
    capability::Capabilities,
    diagnostic::Diagnostic,
    manifest::{UnknownKeys, parse, parse_with},
    plan::{PlanContext, prepare},
};

/// Returns a manifest with this as a line of a script.
fn inline(line: &str) -> String {
    format!("vms:\n- name: a\n  provisioners:\n  - type: shell\n    shell:\n      inline:\n      - {line}\n")
}

fn helps(text: &str) -> Vec<String> {
    let mut found = parse(text.as_bytes()).diagnostics;
    found.retain(|finding| finding.code != "unknown-key");
    found.into_iter().filter_map(|finding| finding.help).collect()
}

#[test]
fn the_help_for_a_command_that_yaml_does_not_read_as_text_is_to_quote_it() {
    for (line, quoted) in [
        ("echo Hello: world", "'echo Hello: world'"),
        ("echo done:", "'echo done:'"),
        ("curl -H 'A: b' http://x", "'curl -H ''A: b'' http://x'"),
        ("\"$HOME/bin/x\" --now", "'\"$HOME/bin/x\" --now'"),
        ("'x' && y", "'''x'' && y'"),
        ("*.txt", "'*"),
        ("@reboot x", "'@reboot x'"),
        ("`date`", "'`date`'"),
        ("%s", "'%s'"),
        ("!important x", "in quotes"),
        ("[ -f x ]", "'[ -f x ]'"),
        ("[ -f x ] && y", "'[ -f x ] && y'"),
        ("[[ -f x ]]", "'[[ -f x ]]'"),
        ("{ echo a; }", "'{ echo a; }'"),
        ("{{ .Command }}", "in quotes"),
        ("| grep x", "'| grep x'"),
        ("> /etc/motd", "'> /etc/motd'"),
        (", x", "', x'"),
        ("] x", "'] x'"),
        ("&x echo", "in quotes"),
        ("# all", "in quotes"),
        ("123", "\"123\""),
        ("true", "\"true\""),
        ("1.10", "\"1.10\""),
        ("- x", "'- x'"),
    ] {
        let helps = helps(&inline(line));
        assert!(helps.iter().any(|help| help.contains(quoted)), "{line}: {helps:?}");
        // The quoted text that the help suggests is read as text.
        if let Some(quoted) = helps[0]
            .strip_prefix(|_: char| true)
            .and_then(|help| help.split_once("quotes, "))
            .map(|(_, quoted)| quoted)
        {
            assert_eq!(helps_of_line(quoted), Vec::<String>::new(), "{quoted}");
        }
    }
}

fn helps_of_line(line: &str) -> Vec<String> {
    helps(&inline(line))
}

#[test]
fn missing_spaces_and_leading_zeros_are_named_in_the_help() {
    for (text, help) in [
        ("vms:\n- name: a\n  resources: cpu:2\n", "`cpu: 2`"),
        ("vms:\n- name:a\n  tpm: true\n", "`name: a`"),
        ("vms:\n- {name: a, communicator: {sshPort: 022}}\n", "without leading zeros: 22"),
        ("vms:\n- {name: a, tpm: yes}\n", "write `true`"),
        ("vms:\n- {name: a, tpm: 'on'}\n", "write `true`"),
        ("vms:\n- {name: a, invisible: no}\n", "write `false`"),
        ("vms:\n\t- name: a\n", "spaces"),
        ("name: a: b\nvms: []\n", "'a: b'"),
    ] {
        let helps = helps(text);
        assert!(helps.iter().any(|found| found.contains(help)), "{text}: {helps:?}");
    }
}

#[test]
fn the_help_for_file_urls_with_reserved_characters_is_to_encode_them() {
    for url in ["file:///srv/a#b.img", "file:///srv/a?b.img", "file:a#b.img", "file:///srv/a\\b.img"] {
        let text = format!(
            "name: x\nvms:\n- name: a\n  source: {{url: '{url}', checksum: '{}'}}\n  resources: {{cpu: 1, memory: 1Gi}}\n",
            "0".repeat(64)
        );
        let context = PlanContext::new(&Capabilities::engine()).base_directory("/srv");
        let prepared = prepare("x.yaml", text.as_bytes(), &context);
        let finding = prepared.diagnostics.iter().find(|finding| finding.code == "invalid-url").unwrap();
        assert!(finding.is_error() && finding.help.as_deref().unwrap().contains("%23"), "{finding:?}");
    }
}

fn unknown(text: &str, keys: UnknownKeys) -> Vec<Diagnostic> {
    let mut found = parse_with("m.yaml", text.as_bytes(), keys).diagnostics;
    found.retain(|finding| finding.code == "unknown-key");
    found
}

#[test]
fn a_key_one_letter_or_capital_away_is_an_error() {
    for (text, meant) in [
        ("vms: [{efiFirmware: {secureboot: true}}]", "secureBoot"),
        ("vms: [{efiFirmware: {secure_boot: true}}]", "secureBoot"),
        ("vms: [{efifirmware: {}}]", "efiFirmware"),
        ("vms: [{tmp: true}]", "tpm"),
        ("vms: [{Name: a}]", "name"),
        ("vms: [{disk: []}]", "disks"),
        ("vms: [{resources: {cpus: 2}}]", "cpu"),
        ("vms: [{resources: {memroy: 2Gi}}]", "memory"),
        ("vms: [{provisioner: []}]", "provisioners"),
        ("vms: [{nics: [{macs: x}]}]", "mac"),
        ("vms: [{source: {checksums: x}}]", "checksum"),
        ("timeouts: 5m\nvms: []", "timeout"),
        ("apiVersion: ruddervirt.io/v1alpha1\nkind: VirtualMachineBuild\nSpec: {}\nspec: {vms: []}", "spec"),
    ] {
        let found = unknown(text, UnknownKeys::Warn);
        assert_eq!(found.len(), 1, "{text}");
        assert!(found[0].is_error() && !found[0].message.contains("ignored"), "{:?}", found[0]);
        assert_eq!(found[0].help.as_deref(), Some(&*format!("did you mean `{meant}`?")));
    }
}

#[test]
fn other_unknown_keys_are_warnings_and_errors_in_strict_mode() {
    let text = "x-common: &c {tpm: true}\nvms: [{<<: *c, name: a, colour: blue, nics: [{id: 5}]}]\nmetadata: {labels: {nmae: x}}\n";
    let found = unknown(text, UnknownKeys::Warn);
    assert_eq!(found.len(), 4, "{found:?}");
    assert!(found.iter().all(|finding| !finding.is_error() && finding.message.ends_with("which is ignored")));
    assert!(unknown(text, UnknownKeys::Refuse).iter().all(Diagnostic::is_error));

    let context = PlanContext::new(&Capabilities::engine());
    let text = "vms: [{name: a, colour: blue}]";
    let strict = context.clone().unknown_keys(UnknownKeys::Refuse);
    let errors = |context| {
        let found = prepare("m.yaml", text.as_bytes(), context).diagnostics;
        found.iter().filter(|finding| finding.code == "unknown-key" && finding.is_error()).count()
    };
    assert_eq!((errors(&context), errors(&strict)), (0, 1));
}
