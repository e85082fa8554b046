//! Round trips lose nothing: what was written is read back, key by key, in every form.
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use rudder_core::manifest::{Parsed, json_schema, parse};
use serde_yaml::{Mapping, Value};

/// Text of all kinds, especially text that looks like something else.
fn text() -> impl Strategy<Value = String> {
    let special = prop::sample::select(vec![
        "",
        "~",
        "null",
        "Null",
        "true",
        "False",
        "yes",
        "no",
        "on",
        "off",
        "y",
        "n",
        "123",
        "-1",
        "+1",
        "0x1F",
        "0o17",
        "0b1",
        "007",
        "1_000",
        "1.5",
        ".5",
        "1e3",
        ".inf",
        "-.inf",
        ".nan",
        "99999999999999999999999",
        "2001-01-01",
        "12:30:45",
        "<<",
        "=",
        "- a",
        "a: b",
        "a:",
        ":a",
        "# x",
        "a # x",
        "a #x",
        " lead",
        "trail ",
        "\ttab",
        "a\tb",
        "%x",
        "@x",
        "`x`",
        "!x",
        "&a",
        "*a",
        "|",
        ">",
        "|-",
        "?",
        "? x",
        "-",
        "--",
        "---",
        "...",
        "--- a",
        "{",
        "}",
        "[a]",
        "{a: b}",
        ",",
        "'",
        "''",
        "\"",
        "\\",
        "\\n",
        "a\nb",
        "a\nb\n",
        "a\n\nb\n\n",
        "\na",
        "\n",
        "\n\n",
        "  a\nb",
        "a\n  b\n c",
        "a \nb",
        "a\r\nb",
        "a\rb",
        "#!/bin/sh\nset -e\n\techo hi\n",
        "é",
        "漢字",
        "🦀",
        "\u{85}",
        "\u{2028}",
        "a\u{a0}b",
        "\u{feff}x",
        "\u{7f}",
        "\u{1}",
        "\u{1b}[0m",
        "\u{0}",
        "{{ .HTTPIP }}",
        "<wait5s><leftCtrlOn>c<leftCtrlOff>",
        "25Gi",
        "52:54:00:12:34:56",
        "10.0.0.0/24",
        "https://a.b/c?d=e#f",
    ]);
    prop_oneof![
        4 => special.prop_map(str::to_owned),
        2 => "[a-z0-9-]{1,12}",
        1 => "\\PC{0,40}",
        1 => "[ -~\n\t]{0,200}",
        1 => ".{0,20}",
    ]
}

fn scalar() -> impl Strategy<Value = Value> {
    prop_oneof![
        3 => text().prop_map(Value::from),
        1 => any::<i64>().prop_map(Value::from),
        1 => any::<u64>().prop_map(Value::from),
        1 => any::<f64>().prop_filter("a number", |value| value.is_finite()).prop_map(Value::from),
        1 => any::<bool>().prop_map(Value::from),
    ]
}

/// A value for a key that Rudder does not know.
fn anything() -> BoxedStrategy<Value> {
    let leaf = prop_oneof![6 => scalar(), 1 => Just(Value::Null)];
    let tree = leaf.prop_recursive(3, 12, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::Sequence),
            prop::collection::vec((scalar(), inner), 0..4)
                .prop_map(|entries| Value::Mapping(entries.into_iter().collect())),
        ]
    });
    tree.boxed()
}

/// Values that a schema allows. Objects have some of their fields, and some others.
fn following(schema: &serde_json::Value, definitions: &serde_json::Value) -> BoxedStrategy<Value> {
    if let Some(name) = schema["$ref"].as_str() {
        return following(&definitions[name.rsplit('/').next().unwrap()], definitions);
    }
    if let Some(choices) = schema["anyOf"].as_array().or(schema["oneOf"].as_array()) {
        let choices = choices.iter().filter(|choice| choice["type"] != "null");
        return prop::strategy::Union::new(choices.map(|choice| following(choice, definitions))).boxed();
    }
    let kind = match &schema["type"] {
        serde_json::Value::Array(kinds) => kinds.iter().find(|kind| *kind != "null").unwrap(),
        kind => kind,
    };
    match kind.as_str() {
        Some("string") => text().prop_map(Value::from).boxed(),
        Some("integer") => any::<i64>().prop_map(Value::from).boxed(),
        Some("number") => any::<i32>().prop_map(|value| Value::from(f64::from(value) / 8.0)).boxed(),
        Some("boolean") => any::<bool>().prop_map(Value::from).boxed(),
        Some("array") => {
            let items = following(&schema["items"], definitions);
            prop::collection::vec(items, 1..4).prop_map(Value::Sequence).boxed()
        }
        Some("object") if schema["properties"].is_object() => {
            let fields = schema["properties"].as_object().unwrap();
            // A null field counts as absent; only fields without a type keep null.
            let fields = fields.iter().map(|(key, schema)| {
                let value = following(schema, definitions).prop_filter("not null", |value| !value.is_null());
                let key = key.clone();
                prop::option::weighted(0.2, value)
                    .prop_map(move |value| value.map(|value| (key.clone().into(), value)))
            });
            let fields: Vec<_> = fields.collect();
            let unknown_key = prop_oneof![
                4 => "[ -~é]{0,8}".prop_map(|key| Value::from(format!("x{key}"))),
                1 => any::<i64>().prop_map(Value::from),
                1 => any::<bool>().prop_map(Value::from),
            ];
            let unknown = prop::collection::vec((unknown_key, anything()), 0..2);
            let object = (fields, unknown).prop_map(|(fields, unknown)| {
                let entries = fields.into_iter().flatten().chain(unknown);
                Value::Mapping(entries.collect())
            });
            object.boxed()
        }
        Some("object") => {
            let entries = prop::collection::vec((text(), scalar()), 0..4);
            entries
                .prop_map(|entries| {
                    entries.into_iter().map(|(key, value)| (key.into(), value)).collect::<Mapping>().into()
                })
                .boxed()
        }
        _ => anything(),
    }
}

/// A complete document in one of the forms.
fn document() -> BoxedStrategy<Value> {
    let schema = json_schema();
    let [resource, bare, clone] = [0, 1, 2].map(|form| following(&schema["anyOf"][form], &schema["$defs"]));
    let head = |kind: &'static str| {
        move |value: Value| {
            let Value::Mapping(mut fields) = value else { panic!("a mapping") };
            fields.insert("apiVersion".into(), "ruddervirt.io/v1alpha1".into());
            fields.insert("kind".into(), kind.into());
            Value::Mapping(fields)
        }
    };
    prop_oneof![
        resource.prop_map(head("VirtualMachineBuild")),
        bare,
        clone.prop_map(head("VirtualMachineClone")),
    ]
    .boxed()
}

/// Writes a document in flow style, with all text in double quotes with escapes.
fn flow(value: &Value) -> String {
    let list = |items: Vec<String>| items.join(", ");
    match value {
        Value::String(text) => {
            let character = |c: char| match c {
                '"' | '\\' => format!("\\{c}"),
                ' '..='~' => c.to_string(),
                c => format!("\\U{:08x}", u32::from(c)),
            };
            format!("\"{}\"", text.chars().map(character).collect::<String>())
        }
        Value::Sequence(items) => format!("[{}]", list(items.iter().map(flow).collect())),
        Value::Mapping(entries) => {
            let entry = |(key, value): (&Value, &Value)| format!("? {} : {}", flow(key), flow(value));
            format!("{{{}}}", list(entries.iter().map(entry).collect()))
        }
        scalar => serde_yaml::to_string(scalar).unwrap().trim_end().to_owned(),
    }
}

/// Whether there is any error other than a misspelt key: keys are random here.
fn is_refused(parsed: &Parsed) -> bool {
    parsed.diagnostics.iter().any(|finding| finding.is_error() && finding.code != "unknown-key")
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_written_manifest_is_read_back_unchanged(document in document()) {
        let text = flow(&document);
        let first = parse(text.as_bytes());
        prop_assert!(!is_refused(&first), "{:#?}\n{text}", first.diagnostics);
        prop_assert_eq!(first.documents.len(), 1);
        let again = first.documents[0].manifest().to_yaml().unwrap();
        // Nothing is lost, nothing is added, no type changes …
        let value: Value = serde_yaml::from_str(&again).unwrap();
        prop_assert_eq!(&value, &document, "{}\n{}", text, again);
        // … and the result is the same manifest, which is written in the same way.
        let second = parse(again.as_bytes());
        prop_assert!(!is_refused(&second), "{:#?}\n{again}", second.diagnostics);
        prop_assert_eq!(first.documents[0].manifest(), second.documents[0].manifest());
        prop_assert_eq!(&second.documents[0].manifest().to_yaml().unwrap(), &again);
    }

    #[test]
    fn any_manifest_that_can_be_read_can_be_written_and_read_again(text in "([a-z<&*!|>'\"#:,?{}\\[\\]%@ 0-9\n\t-]|vms:|- name: |: |\n  |&a |\\*a){0,60}") {
        for document in parse(text.as_bytes()).documents {
            let again = document.manifest().to_yaml().unwrap();
            let second = parse(again.as_bytes());
            prop_assert!(!is_refused(&second), "{:#?}\n{again}", second.diagnostics);
            for second in second.documents {
                prop_assert_eq!(document.manifest(), second.manifest());
            }
        }
    }
}

#[test]
fn keys_and_lists_keep_their_order() {
    let text = "name: a\nvms:\n- name: z\n  bootCommand:\n  - b\n  - a\n  zulu: 1\n  alpha:\n    z: 1\n    b: 2\n- name: a\nmike: 1\nkilo: 2\n";
    let parsed = parse(text.as_bytes());
    assert_eq!(parsed.documents[0].manifest().to_yaml().unwrap(), text);
}

#[test]
fn an_empty_list_of_vms_keeps_the_form() {
    for vms in ["vms:", "vms: []", "vms: no list"] {
        let parsed = parse(format!("{vms}\nspec: {{network: {{subnets: [{{cidr: 10.1}}]}}}}\n").as_bytes());
        let written = parsed.documents[0].manifest().to_yaml().unwrap();
        let again = parse(written.as_bytes());
        assert_eq!(again.documents[0].manifest(), parsed.documents[0].manifest(), "{vms}: {written}");
        assert!(!again.diagnostics.iter().any(|finding| finding.code == "wrong-type"), "{written}");
    }
}

#[test]
fn a_refused_value_keeps_the_form() {
    for text in [
        "vms:\nspec:\n",
        "vms:\nspec: text\nmetadata: {name: web}\n",
        "vms:\nspec: text\nspec: {timeout: 5m}\n",
        "apiVersion: [1]\nvms: [{name: web}]\n",
        "kind: {}\nspec: {}\nvms: [{name: web}]\n",
        "kind: {}\nspec: {}\n",
    ] {
        let parsed = parse(text.as_bytes());
        let written = parsed.documents[0].manifest().to_yaml().unwrap();
        let again = parse(written.as_bytes());
        assert_eq!(again.documents[0].manifest(), parsed.documents[0].manifest(), "{text}: {written}");
    }
}
