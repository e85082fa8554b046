//! Hostile and broken input results in findings, never in a panic, an overflow or a hang. Memory and time are bounded
//! by limits on the input, so these tests need no clock: a hang would be noticed.
#![allow(clippy::unwrap_used)]

use rudder_core::{
    diagnostic::render,
    manifest::{Manifest, parse},
};

/// Renders all findings about a text.
fn shown(text: impl AsRef<[u8]>) -> String {
    let bytes = text.as_ref();
    render(&parse(bytes).diagnostics, "m.yaml", &String::from_utf8_lossy(bytes))
}

/// Returns the code, line and column of each finding.
fn codes(text: impl AsRef<[u8]>) -> Vec<String> {
    let location = |span: Option<rudder_core::diagnostic::Span>| {
        span.map_or(String::new(), |span| format!(" {}:{}", span.line, span.column))
    };
    let parsed = parse(text.as_ref());
    parsed.diagnostics.iter().map(|finding| format!("{}{}", finding.code, location(finding.span))).collect()
}

#[test]
fn invalid_yaml_is_reported_with_its_location() {
    insta::assert_snapshot!(shown("vms:\n- name: a\n  disks: [\n"), @r#"
    error[yaml-syntax]: invalid YAML: unclosed bracket '['
     --> m.yaml:3:10 (vms[0].disks[0])
      |
    3 |   disks: [
      |          ^
    "#);
    insta::assert_snapshot!(shown("vms:\n\t- name: a\n"), @r#"
    error[yaml-syntax]: invalid YAML: tabs disallowed within this context (block indentation)
     --> m.yaml:2:2 (vms)
      |
    2 |     - name: a
      |     ^
      = help: indent with spaces: YAML does not allow tabs here
    "#);
    insta::assert_snapshot!(shown("vms:\n- name: \"a\n"), @r#"
    error[yaml-syntax]: invalid YAML: invalid indentation in multiline quoted scalar
     --> m.yaml:3:1 (vms[0].name)
      |
    3 |
      | ^
      = help: text in quotes ends at the closing quote: put the whole value in quotes, '"a'
    "#);
    insta::assert_snapshot!(shown("vms: a: b\n"), @r#"
    error[yaml-syntax]: invalid YAML: mapping values are not allowed in this context
     --> m.yaml:1:7
      |
    1 | vms: a: b
      |       ^
      = help: `: ` in text turns it into a mapping: put the whole value in quotes, 'a: b'
    "#);
    insta::assert_snapshot!(shown("%YAML 3.0\n---\nvms: []\n"), @r#"
    error[yaml-syntax]: invalid YAML: unsupported YAML major version
     --> m.yaml:1:1
      |
    1 | %YAML 3.0
      | ^
    "#);
}

#[test]
fn other_encodings_are_named() {
    insta::assert_snapshot!(shown(b"vms:\n- name: caf\xe9\n"), @r#"
    error[encoding]: expected text in UTF-8, but found the byte 0xe9
     --> m.yaml:2:12
      |
    2 | - name: caf�
      |            ^
      = help: save the file as UTF-8
    "#);
    insta::assert_snapshot!(shown(b"\xff\xfev\0m\0s\0"), @r#"
    error[encoding]: expected text in UTF-8, but found UTF-16
     --> m.yaml:1:1
      |
    1 | ��v␀m␀s␀
      | ^
      = help: save the file as UTF-8
    "#);
    assert_eq!(codes(b"v\0m\0s\0:\0"), ["encoding 1:1"]);
    assert_eq!(codes(b"\0\0\xfe\xff\0\0\0v"), ["encoding 1:1"]);
    insta::assert_snapshot!(shown("vms:\n- name: a\0b\n"), @r#"
    error[encoding]: expected text, but found a NUL character
     --> m.yaml:2:10
      |
    2 | - name: a␀b
      |          ^
      = help: use a text file; this may be a binary file
    "#);
}

#[test]
fn a_byte_order_mark_and_carriage_returns_are_accepted() {
    let text = "\u{feff}vms:\r\n- name: web\r\n  tmp: true\r\n";
    insta::assert_snapshot!(shown(text), @r#"
    error[unknown-key]: unknown key `tmp`
     --> m.yaml:3:3 (vms[0].tmp)
      |
    3 |   tmp: true
      |   ^^^
      = help: did you mean `tpm`?
    "#);
    let parsed = parse(text.as_bytes());
    let vms = parsed.documents[0].spec_path().key("vms");
    let span = parsed.documents[0].locate(&vms.index(0).key("name")).unwrap();
    assert_eq!((span.line, span.column, &text[span.start..span.end]), (2, 9, "web"));
    assert_eq!(codes("\u{feff}tmp: true\n"), ["unknown-key 1:1"]);
}

#[test]
fn empty_files_and_documents_are_refused() {
    insta::assert_snapshot!(shown(""), @r#"
    error[no-document]: expected a manifest, but found an empty file
     --> m.yaml
      = help: a manifest begins with `vms:`, or with `apiVersion:`, `kind:` and `spec:`
    "#);
    assert_eq!(codes("# only a comment\n"), ["no-document"]);
    assert_eq!(codes("---\n...\n---\n"), ["no-document"]);
    let parsed = parse(b"---\n# nothing\n---\nvms: []\n---\n");
    assert_eq!((parsed.documents.len(), parsed.diagnostics.len()), (1, 0));
    insta::assert_snapshot!(shown("- vms\n"), @r#"
    error[wrong-type]: expected a manifest, which is a mapping, but found a list
     --> m.yaml:1:1
      |
    1 | - vms
      | ^^^^^
      = help: a manifest begins with `vms:`, or with `apiVersion:`, `kind:` and `spec:`
    "#);
    insta::assert_snapshot!(shown("just text\n"), @r#"
    error[wrong-type]: expected a manifest, which is a mapping, but found text
     --> m.yaml:1:1
      |
    1 | just text
      | ^^^^^^^^^
      = help: a manifest begins with `vms:`, or with `apiVersion:`, `kind:` and `spec:`
    "#);
}

#[test]
fn the_form_of_a_document_is_checked() {
    insta::assert_snapshot!(shown("apiVersion: ruddervirt.io/v1\nkind: VirtualMachine\nspec: {vms: []}\n"), @r#"
    error[unknown-api-version]: expected `ruddervirt.io/v1alpha1`, but found `ruddervirt.io/v1`
     --> m.yaml:1:13 (apiVersion)
      |
    1 | apiVersion: ruddervirt.io/v1
      |             ^^^^^^^^^^^^^^^^

    error[unknown-kind]: expected `VirtualMachineBuild` or `VirtualMachineClone`, but found `VirtualMachine`
     --> m.yaml:2:7 (kind)
      |
    2 | kind: VirtualMachine
      |       ^^^^^^^^^^^^^^
    "#);
    insta::assert_snapshot!(shown("metadata: {name: a}\nspec: {vms: []}\n"), @r#"
    error[missing-field]: expected `apiVersion: ruddervirt.io/v1alpha1`, but found none
     --> m.yaml:1:1 (apiVersion)
      |
    1 | metadata: {name: a}
      | ^^^^^^^^^^^^^^^^^^^

    error[missing-field]: expected `kind: VirtualMachineBuild`, but found none
     --> m.yaml:1:1 (kind)
      |
    1 | metadata: {name: a}
      | ^^^^^^^^^^^^^^^^^^^
    "#);
    insta::assert_snapshot!(shown("apiVersion: [1]\nkind:\nspec: {vms: []}\n"), @r#"
    error[wrong-type]: expected text, but found a list
     --> m.yaml:1:13 (apiVersion)
      |
    1 | apiVersion: [1]
      |             ^^^
      = help: text that begins with a bracket is a list or a mapping: put the whole value in quotes, '[1]'

    error[missing-field]: expected `kind: VirtualMachineBuild`, but found none
     --> m.yaml:2:1 (kind)
      |
    2 | kind:
      | ^^^^
    "#);
    let clone =
        parse(b"apiVersion: ruddervirt.io/v1alpha1\nkind: VirtualMachineClone\nspec: {templateName: t}\n");
    assert!(matches!(clone.documents[0].manifest(), Manifest::Clone(_)) && clone.diagnostics.is_empty());
}

#[test]
fn a_duplicate_key_is_an_error_that_names_both_locations() {
    insta::assert_snapshot!(shown("vms:\n- name: a\n  tpm: true\n  name: b\n"), @r#"
    error[duplicate-key]: expected a unique key, but found `name` again; the first is at line 2, column 3
     --> m.yaml:4:3 (vms[0].name)
      |
    4 |   name: b
      |   ^^^^
      = help: remove one of them
    "#);
    // Keys are compared by value, not by text; in large mappings as well.
    assert_eq!(codes("x: {1: a, 0x1: b, '1': c}\n"), ["unknown-key 1:1", "duplicate-key 1:11"]);
    let many: String = (0..40).map(|n| format!("k{}: 1\n", n % 39)).collect();
    assert!(codes(many).contains(&"duplicate-key 40:1".to_owned()));
}

#[test]
fn invalid_tags_keys_and_aliases_are_reported() {
    insta::assert_snapshot!(shown("vms: !list\n- name: !!python/object:os.system a\n"), @r#"
    error[yaml-tag]: expected a value that needs no tag, but found the tag `!list`
     --> m.yaml:1:6 (vms)
      |
    1 | vms: !list
      |      ^^^^^
      = help: leave the tag out; put text that begins with `!` or looks like a number in quotes

    error[yaml-tag]: expected a value that needs no tag, but found the tag `!!python/object:os.system`
     --> m.yaml:2:9 (vms[0].name)
      |
    2 | - name: !!python/object:os.system a
      |         ^^^^^^^^^^^^^^^^^^^^^^^^^
      = help: leave the tag out; put text that begins with `!` or looks like a number in quotes
    "#);
    insta::assert_snapshot!(shown("vms:\n- ? [a, b]\n  : c\n  name: a\n"), @r#"
    error[yaml-key]: expected a scalar as the key, but found a list or mapping
     --> m.yaml:2:5 (vms[0]["?"])
      |
    2 | - ? [a, b]
      |     ^^^^^^
      = help: use text as the key
    "#);
    insta::assert_snapshot!(shown("vms: *there\nfiles: &here [*here]\n"), @r#"
    error[yaml-alias]: expected an anchor `&there` before this alias, but found none
     --> m.yaml:1:6 (vms)
      |
    1 | vms: *there
      |      ^^^^^^
      = help: put text that begins with `*` in quotes: '*there…'

    error[yaml-alias]: expected a value, but found an alias inside the value that it refers to
     --> m.yaml:2:15 (files[0])
      |
    2 | files: &here [*here]
      |               ^^^^^
    "#);
    // Tags of the core schema have their standard meaning.
    let parsed = parse(b"name: !!str 123\nretries: !!int \"3\"\nvms: !!seq [!!map {name: ! 5}]\n");
    assert_eq!(parsed.diagnostics, []);
    let spec = parsed.documents[0].manifest().build_spec().unwrap();
    assert_eq!((spec.retries, spec.vms[0].name.as_deref()), (Some(3), Some("5")));
    assert_eq!(parsed.documents[0].manifest().name(), Some("123"));
}

#[test]
fn merge_keys_are_merged() {
    let text = "
x: &small {resources: {cpu: 1, memory: 1Gi}, tpm: false}
y: &other {tpm: true, invisible: true}
vms:
- {<<: *small, name: a}
- {name: b, <<: [*small, *other], tpm: true}
";
    let parsed = parse(text.as_bytes());
    let spec = parsed.documents[0].manifest().build_spec().unwrap();
    let [a, b] = &spec.vms[..] else { panic!("two VMs") };
    assert_eq!((a.name.as_deref(), a.tpm, a.resources.is_some()), (Some("a"), Some(false), true));
    assert_eq!((b.tpm, b.invisible, b.resources.is_some()), (Some(true), Some(true), true));
    insta::assert_snapshot!(shown("vms:\n- <<: 5\n  name: a\n- '<<': 5\n"), @r#"
    error[yaml-merge]: expected a mapping or a list of mappings after the merge key `<<`, but found another value
     --> m.yaml:2:3 (vms[0])
      |
    2 | - <<: 5
      |   ^^
      = help: write `<<: *name`, or put the key in quotes

    warning[unknown-key]: unknown key `<<`, which is ignored
     --> m.yaml:4:3 (vms[1]["<<"])
      |
    4 | - '<<': 5
      |   ^^^^
    "#);
}

#[test]
fn the_expansion_of_aliases_is_bounded() {
    let mut bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
    for n in 1..60 {
        bomb += &format!("a{n}: &a{n} [{}]\n", vec![format!("*a{}", n - 1); 10].join(", "));
    }
    insta::assert_snapshot!(shown(&bomb), @r#"
    error[too-large]: expected a manifest that takes at most 128 MiB with its aliases expanded, but found more
     --> m.yaml:7:9 (a6)
      |
    7 | a6: &a6 [*a5, *a5, *a5, *a5, *a5, *a5, *a5, *a5, *a5, *a5]
      |         ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
    "#);
    let text = format!("a: &a {}\nb: [{}]\n", "x".repeat(1 << 20), "*a, ".repeat(1000));
    assert_eq!(codes(text), ["too-large 2:4"]);
    // A few bytes expand to many mappings.
    let vms = "*v, ".repeat(1000);
    let text = format!("v: &v {{name: a}}\nb: &b [{vms}]\nc: [{}]\n", "*b, ".repeat(200));
    assert_eq!(codes(text), ["too-large 3:4"]);
    // Merges of merges.
    let mut merges = format!("m0: &m0 {{{}}}\n", (0..1000).map(|n| format!("k{n}: 1, ")).collect::<String>());
    for n in 1..1000 {
        merges += &format!("m{n}: &m{n} {{<<: [*m{}, *m0], x{n}: 1}}\n", n - 1);
    }
    assert!(codes(merges).iter().any(|code| code.starts_with("too-large")));
}

#[test]
fn the_depth_of_nesting_is_bounded() {
    insta::assert_snapshot!(shown(format!("x: {}\n", "[".repeat(100_000))), @r#"
    error[too-deep]: expected at most 64 levels of nested lists and mappings, but found more
     --> m.yaml:1:68 (x[0])
      |
    1 | …[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[…
      |                                                    ^
    "#);
    assert_eq!(codes("{a: ".repeat(100_000)), ["too-deep 1:257"]);
    assert_eq!(codes("- ".repeat(100_000)), ["too-deep 1:129"]);
    assert_eq!(codes("? ".repeat(100_000)), ["too-deep 1:129"]);
    let steps: String = (0..2000).map(|n| format!("{}a:\n", " ".repeat(n))).collect();
    assert_eq!(codes(steps), ["too-deep 65:65"]);
    // Nested aliases count as well.
    let mut text = "a0: &a0 [x]\n".to_owned();
    for n in 1..100 {
        text += &format!("a{n}: &a{n} [*a{}]\n", n - 1);
    }
    assert_eq!(codes(text), ["too-deep 64:12"]);
    // The next document is still read.
    let parsed = parse(format!("{}\n---\nvms: []\n", "[".repeat(1000)).as_bytes());
    assert_eq!((parsed.documents.len(), parsed.diagnostics.len()), (1, 1));
}

#[test]
fn large_input_is_read_up_to_a_limit() {
    insta::assert_snapshot!(shown(vec![b' '; (16 << 20) + 1]), @r#"
    error[too-large]: expected a file of at most 16 MiB, but found more
     --> m.yaml
      = help: provide large files with `url` in `files`
    "#);
    let script = "x".repeat(8 << 20);
    let parsed = parse(format!("files:\n- name: big\n  inline: {script}\n").as_bytes());
    assert_eq!(parsed.diagnostics, []);
    assert_eq!(parsed.documents[0].manifest().build_spec().unwrap().files[0].inline, Some(script));
    assert_eq!(codes("- \n".repeat(500_000)), ["too-large 400001:3"]);
    assert_eq!(codes(format!("vms: [{}]", "{},".repeat(300_000))), ["too-large 1:6"]);
    assert_eq!(codes("--- {}\n".repeat(2000)), ["too-large 1001:1"]);
    let wrong = parse(format!("vms: [{}]", "1,".repeat(5000)).as_bytes());
    assert_eq!(wrong.diagnostics.len(), 1001);
    insta::assert_snapshot!(wrong.diagnostics[1000].message, @r#"there are more findings than are shown here"#);
}

#[test]
fn input_that_is_slow_in_other_parsers_is_read_quickly() {
    for piece in [
        "[", "{", "a: ", "? ", "- ", "!", "&a ", "*a ", "'", "\"", "\\", "|\n", "#", "%", ",", "]", "\t",
        "\r", "a\n", ": ", "'' ",
    ] {
        for head in ["", "a: ", "- ", "[", "{", "\"", "|\n "] {
            let text = format!("{head}{}", piece.repeat((1 << 18) / piece.len()));
            let parsed = parse(text.as_bytes());
            let shown = render(&parsed.diagnostics, "m.yaml", &text);
            assert!(shown.len() <= parsed.diagnostics.len() * 4096, "{head:?} {piece:?}");
        }
    }
}
