//! Results of parsing valid and invalid manifests: documents, forms, types, keys, locations.
#![allow(clippy::unwrap_used)]

use rudder_core::manifest::{Manifest, Parsed, ValuePath, parse, parse_named};

/// Returns one line per finding: `line:column path severity[code]: message (help)`.
fn findings(parsed: &Parsed) -> String {
    let line = |finding: &rudder_core::diagnostic::Diagnostic| {
        let location = finding.span.map_or("-".to_owned(), |span| format!("{}:{}", span.line, span.column));
        let help = finding.help.as_ref().map(|help| format!(" ({help})")).unwrap_or_default();
        let severity = if finding.is_error() { "error" } else { "warning" };
        format!("{location} `{}` {severity}[{}]: {}{help}\n", finding.path, finding.code, finding.message)
    };
    parsed.diagnostics.iter().map(line).collect()
}

fn of(text: &str) -> String {
    findings(&parse(text.as_bytes()))
}

#[test]
fn every_wrong_type_is_found_at_once() {
    let text = r#"
name: 123
vms:
- name: true
  source: nope
  resources: {cpu: [1], memory: {a: b}}
  disks: {name: a}
  communicator: {sshPort: "22", sshPassword: 12345}
  bootCommand: [1, ok, null]
  tpm: yes
  provisioners:
  - type: shell
    shell: {inline: {a: 1}, env: [a]}
  - just text
- null
- name: good
  cpuu: 3
retries: 1.5
timeout: 99999999999999999999999
files: ~
"#;
    insta::assert_snapshot!(of(text), @r#"
    2:7 `name` error[wrong-type]: expected text, but found the integer 123 (write it in quotes: "123")
    4:9 `vms[0].name` error[wrong-type]: expected text, but found true (write it in quotes: "true")
    5:11 `vms[0].source` error[wrong-type]: expected a mapping, but found the text "nope"
    6:20 `vms[0].resources.cpu` error[wrong-type]: expected text or a number, but found a list
    6:33 `vms[0].resources.memory` error[wrong-type]: expected text or a number, but found a mapping
    7:10 `vms[0].disks` error[wrong-type]: expected a list, but found a mapping (begin each element with `- `)
    8:27 `vms[0].communicator.sshPort` error[wrong-type]: expected an integer, but found the text "22" (write it without quotes: 22)
    8:46 `vms[0].communicator.sshPassword` error[wrong-type]: expected text, but found an integer (write it in quotes)
    9:17 `vms[0].bootCommand[0]` error[wrong-type]: expected text, but found the integer 1 (write it in quotes: "1")
    9:24 `vms[0].bootCommand[2]` error[wrong-type]: expected text, but found nothing (write empty text as `""`; put text that begins with `#` in quotes)
    10:8 `vms[0].tpm` error[wrong-type]: expected `true` or `false`, but found the text "yes" (write `true`, without quotes)
    13:21 `vms[0].provisioners[0].shell.inline` error[wrong-type]: expected text or a list of lines, but found a mapping (text that begins with a bracket is a list or a mapping: put the whole value in quotes, '{a: 1}')
    13:34 `vms[0].provisioners[0].shell.env` error[wrong-type]: expected a mapping, but found a list
    14:5 `vms[0].provisioners[1]` error[wrong-type]: expected a mapping, but found the text "just text"
    15:3 `vms[1]` error[wrong-type]: expected a mapping, but found nothing
    17:3 `vms[2].cpuu` warning[unknown-key]: unknown key `cpuu`, which is ignored
    18:10 `retries` error[wrong-type]: expected an integer, but found the number 1.5
    "#);
}

#[test]
fn documents_keep_the_locations_of_values() {
    let text = "# first\nvms:\n- name: wéb\n  disks: [{size: 5Gi}]\n---\napiVersion: ruddervirt.io/v1alpha1\nkind: VirtualMachineBuild\nspec:\n  vms: []\n";
    let parsed = parse_named("a.yaml", text.as_bytes());
    assert_eq!(findings(&parsed), "");
    let [bare, resource] = &parsed.documents[..] else { panic!("two documents") };
    assert_eq!(bare.source(), Some(&text[..text.find("---").unwrap()]));
    assert_eq!(resource.source(), Some(&text[text.find("---").unwrap()..]));
    assert!(
        matches!(bare.manifest(), Manifest::Bare(_)) && matches!(resource.manifest(), Manifest::Resource(_))
    );
    let vms = bare.spec_path().key("vms");
    let vm = vms.index(0);
    let span = bare.locate(&vm.key("name")).unwrap();
    assert_eq!((span.line, span.column, &text[span.start..span.end]), (3, 9, "wéb"));
    let span = bare.locate_key(&vm.key("disks")).unwrap();
    assert_eq!((span.line, span.column, &text[span.start..span.end]), (4, 3, "disks"));
    let span = bare.locate(&vm.key("disks").index(0).key("size")).unwrap();
    assert_eq!((span.line, span.column, &text[span.start..span.end]), (4, 18, "5Gi"));
    let span = bare.locate(&vm).unwrap();
    assert_eq!(&text[span.start..span.end], "name: wéb\n  disks: [{size: 5Gi}]");
    assert_eq!(bare.locate(&vm.key("nothing")), None);
    assert_eq!(bare.locate_nearest(&vm.key("nothing")), bare.locate(&vm));
    let spec = resource.spec_path().key("vms");
    assert_eq!(spec.to_string(), "spec.vms");
    assert_eq!(resource.locate(&spec).map(|span| (span.line, span.column)), Some((9, 8)));
    assert_eq!(ValuePath::root().to_string(), "");
}
