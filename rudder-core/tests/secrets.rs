//! Secrets of a manifest appear neither in findings nor in `Debug` output of documents and plans.
#![allow(clippy::unwrap_used)]

use rudder_core::{
    capability::{Capabilities, Capability},
    diagnostic::render,
    manifest::parse,
    plan::{Inputs, PlanContext, prepare},
    secret::Masker,
};

fn context() -> PlanContext {
    use Capability as C;
    let capabilities =
        [C::SourceUrl, C::SourceBlank, C::DiskVirtio, C::CloudInit, C::Isos, C::Display, C::NicModels];
    let inputs = Inputs::new()
        .secret("s", "script", "#!/bin/sh\nset -e\nmysql --password=scr1ptpw <<'X'\nX\necho done\n")
        .secret("s", "data", "#cloud-config\npassword: us3rdata\n")
        .secret("s", "env", "DB_PASSWORD=f1lesecret\n")
        .secret("s", "key", "-----BEGIN-----\npr1vatekeyline\n-----END-----\n")
        .secret("s", "binary", [0xff, 0xfe, 0x00, 0x01, 0x02, 0x03, 0x04]);
    PlanContext::new(&Capabilities::new("example", capabilities)).inputs(inputs)
}

const MANIFEST: &str = r#"
name: build
files:
- name: tool
  url: https://cdn.example.org/tool?X-Amz-Expires=3600&X-Amz-Signature=s1gnature0123456789&arch=arm64
  checksum: "0000000000000000000000000000000000000000000000000000000000000000"
- {name: text, inline: "inl1ne hunter2"}
vms:
- name: web
  source:
    url: https://deploy:hunter2@images.example.org/disk.qcow2
    checksum: "0000000000000000000000000000000000000000000000000000000000000000"
  isos:
  - url: https://t0kenalone@images.example.org/setup.iso?sig=q%2Buery
    checksum: "0000000000000000000000000000000000000000000000000000000000000000"
  resources: {cpu: 1, memory: 1Gi}
  communicator:
    sshPassword: &password "hunter2"
    sshPrivateKeySecret: {name: s, key: key}
  cloudInit:
    userDataFrom: {secretRef: {name: s, key: data}}
    networkData: "wifi: hunter2"
  bootCommand: ["<wait>root<enter>", *password, "<enter>", "<waitText 'hunter2'>"]
  provisioners:
  - type: shell
    shell:
      scriptFrom: {secretRef: {name: s, key: script}}
      env: {TOKEN: hunter2}
      executeCommand: echo hunter2 | sudo -S sh {{ .Command }}
  - type: shell
    shell: {inline: [echo hunter2]}
  - type: file
    file: {source: {secretRef: {name: s, key: env}}, destination: /etc/env}
  - type: file
    file: {source: {secretRef: {name: s, key: binary}}, destination: /etc/keytab}
  - type: file
    file: {fileRef: tool, destination: /usr/bin/tool}
  - type: file
    file: {fileRef: text, destination: /etc/text}
  - type: reboot
    reboot: {command: echo hunter2 | sudo -S reboot}
"#;

const SECRETS: [&str; 9] = [
    "hunter2",
    "scr1ptpw",
    "us3rdata",
    "f1lesecret",
    "pr1vatekeyline",
    "s1gnature0123456789",
    "t0kenalone",
    "q%2Buery",
    "q+uery",
];

fn assert_none(text: &str) {
    for secret in SECRETS {
        assert!(!text.contains(secret), "{secret} in {text}");
    }
}

#[test]
fn debug_output_of_manifests_and_plans_shows_no_secret() {
    let prepared = prepare("build.yaml", MANIFEST.as_bytes(), &context());
    assert!(!prepared.has_errors(), "{}", prepared.render());
    assert_none(&format!("{prepared:?} {prepared:#?}"));
    let plan = &prepared.plans[0];
    assert_none(&format!("{plan:?}"));
    assert_none(&format!("{:?} {:?} {:?}", plan.machines[0], plan.files, plan.secrets));
    assert!(
        format!("{plan:?}").contains("images.example.org/disk.qcow2"),
        "values that are not secret are shown"
    );
    let parsed = parse(MANIFEST.as_bytes());
    assert_none(&format!("{parsed:?}"));
    let spec = parsed.documents[0].manifest().build_spec().unwrap();
    let vm = &spec.vms[0];
    assert_none(&format!("{spec:?} {vm:#?} {:?} {:?}", vm.communicator, vm.provisioners));
}

#[test]
fn secrets_are_masked_in_the_kept_manifest_and_in_output() {
    let plan = prepare("build.yaml", MANIFEST.as_bytes(), &context()).plans.remove(0);
    let masker = Masker::new(&plan.secrets);
    let kept = masker.mask(&plan.manifest).into_owned();
    assert_none(&kept);
    for part in ["images.example.org/disk.qcow2", "cdn.example.org/tool", "setup.iso", "set up", "name: web"]
    {
        assert!(kept.contains(part) || part == "set up", "{part}: {kept}");
    }
    // The values in secret scripts, files and user data are output on their own.
    for output in [
        "login: scr1ptpw",
        "password is us3rdata",
        "f1lesecret",
        "GET /tool?X-Amz-Signature=s1gnature0123456789",
        "//4AAQIDBA==",
    ] {
        assert!(masker.mask(output).contains("***"), "{output}");
    }
    for harmless in ["done", "set -e", "mysql", "3600", "arm64", "web"] {
        assert_eq!(masker.mask(harmless), harmless);
    }
}

/// Every line of these manifests is quoted by a finding; none shows the password.
#[test]
fn lines_quoted_by_findings_show_no_password() {
    for source in [
        "vms:\n- communicator: {sshPassword: \"a\\\"hunter2\", sshprot: 22}\n",
        "vms:\n- communicator: {sshUser: me, sshPassword: 'it''s hunter2', x: 1}\n",
        "vms:\n- communicator:\n    sshPasword: hunter2\n",
        "vms:\n- communicator:\n    sshpassword: hunter2\n",
        "vms:\n- communicator:\n    sshPassword: {a: hunter2}\n",
        "vms:\n- communicator:\n    sshPassword: [hunter2]\n",
        "vms:\n- communicator:\n    sshPassword: hunter2: x\n",
        "vms:\n- communicator:\n    sshPassword: |\n      hunter2\n     x: [\n",
        "vms:\n- communicator:\n    sshPassword: \"hunter2\n",
        "vms:\n- communicator:\n    sshPassword: \"hunter2\" hunter2\n",
        "vms:\n- communicator:\n    sshPassword: !secret hunter2\n",
        "vms:\n- communicator:\n    sshPassword: @hunter2\n",
        "vms:\n- communicator:\n    sshPassword: *hunter2\n",
        "vms:\n- communicator:\n    sshPassword:hunter2\n",
        "x: &pw hunter2\nvms:\n- communicator: {sshPassword: *pw, y: *pw}\n",
        "vms:\n- source: {url: 'htps://me:hunter2@example.org/x'}\n",
        "vms:\n- source: {url: 'me:hunter2@example.org/x'}\n",
        "vms:\n- source: {url: 'https://me:hun/hunter2@example.org/x'}\n",
        "vms:\n- source: {url: 'ftp://example.org/x?sig=hunter2'}\n",
        "vms:\n- source: {url: 'https://example.org/latest/x?token=hunter2'}\n",
        "vms:\n- isos: [{url: 'https://me:hunter2@example.org/latest/x', checksum: nonsense, extra: 1}]\n",
        "vms:\n- provisioners:\n  - type: shell\n    shell: {inline: x, env: {DB_PASSWORD: [hunter2], UID: 1, API_TOKEN: hunter2}}\n",
        "vms:\n- provisioners:\n  - type: shell\n    shell: {inline: \"export PASSWORD=hunter2\\r\\necho\"}\n",
        "vms:\n- cloudInit: {userData: \"password: hunter2\"}\n",
        "vms:\n- cloudInit:\n    userData: |\n      #cloud-config\n      password: hunter2\n      users: [\n",
    ] {
        let prepared = prepare("m.yaml", source.as_bytes(), &context());
        assert!(!prepared.diagnostics.is_empty(), "{source}");
        let json = serde_json::to_string(&prepared.diagnostics).unwrap();
        for shown in [prepared.render(), json, format!("{:?}", prepared.diagnostics)] {
            // The name of an alias is not a value.
            if !source.contains("*hunter2") {
                assert!(!shown.contains("hunter2"), "{source}\n{shown}");
            }
        }
        let parsed = parse(source.as_bytes());
        let shown = render(&parsed.diagnostics, "m.yaml", source);
        assert!(source.contains("*hunter2") || !shown.contains("hunter2"), "{source}\n{shown}");
    }
}
