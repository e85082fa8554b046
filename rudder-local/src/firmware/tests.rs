//! The choice of firmware among made-up descriptors.
#![allow(clippy::unwrap_used)]
use super::*;

/// Made-up directories of descriptors, the most specific first, and firmware for them.
struct Fixture(tempfile::TempDir);

impl Fixture {
    fn new() -> Self {
        let fixture = Self(tempfile::tempdir().unwrap());
        for name in ["user", "etc", "share"] {
            fs::create_dir(fixture.0.path().join(name)).unwrap();
        }
        fixture
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Adds a descriptor whose files are named after it.
    fn put(&self, file: &str, name: &str, features: &[&str]) {
        fs::write(self.path(&format!("{name}.code")), name).unwrap();
        fs::write(self.path(&format!("{name}.vars")), [0; 64]).unwrap();
        let image = |suffix: &str| serde_json::json!({"filename": self.path(&format!("{name}.{suffix}")), "format": "raw"});
        let text = serde_json::json!({
            "description": name, "interface-types": ["uefi"], "tags": [], "features": features,
            "mapping": {"device": "flash", "executable": image("code"), "nvram-template": image("vars")},
            "targets": [{"architecture": "x86_64", "machines": ["pc-i440fx-*", "pc-q35-*"]}],
        });
        fs::write(self.path(file), text.to_string()).unwrap();
    }

    fn catalog(&self) -> Catalog {
        Catalog::read(["user", "etc", "share"].map(|name| self.path(name)).to_vec())
    }

    /// Returns the name of the chosen firmware.
    fn choose(&self, wanted: Requirements<'_>) -> Result<String> {
        let uefi = self.catalog().choose(wanted)?;
        Ok(uefi.code.path.file_stem().unwrap().to_string_lossy().into_owned())
    }
}

const PLAIN: Requirements<'_> = Requirements { machine: "pc-q35-7.2", secure: false, variables: None };
const SECURE: Requirements<'_> = Requirements { secure: true, ..PLAIN };
const ENROLLED: &[&str] = &["acpi-s3", "enrolled-keys", "requires-smm", "secure-boot"];

#[test]
fn the_first_suitable_firmware_is_chosen() {
    let fixture = Fixture::new();
    fixture.put("share/40-enrolled.json", "enrolled", ENROLLED);
    fixture.put("share/50-empty.json", "empty", &["requires-smm", "secure-boot"]);
    fixture.put("share/60-plain.json", "plain", &["acpi-s3"]);
    fixture.put("share/70-other.json", "other", &[]);
    assert_eq!(fixture.choose(PLAIN).unwrap(), "plain");
    assert_eq!(fixture.choose(SECURE).unwrap(), "enrolled");
    assert!(fixture.catalog().choose(SECURE).unwrap().smm);
    // Nothing that would enforce Secure Boot, even if there is nothing else.
    for name in ["60-plain", "70-other"] {
        fs::remove_file(fixture.path(&format!("share/{name}.json"))).unwrap();
    }
    assert_eq!(fixture.choose(PLAIN).unwrap(), "empty");
    fs::remove_file(fixture.path("share/50-empty.json")).unwrap();
    assert_eq!(fixture.choose(PLAIN).unwrap_err().kind(), ErrorKind::HostMissing);
}

#[test]
fn a_more_specific_directory_takes_precedence() {
    let fixture = Fixture::new();
    fixture.put("share/60-a.json", "of-share", &[]);
    fixture.put("share/70-b.json", "second", &[]);
    fixture.put("etc/60-a.json", "of-etc", &[]);
    assert_eq!(fixture.choose(PLAIN).unwrap(), "of-etc");
    fixture.put("user/60-a.json", "of-user", &[]);
    assert_eq!(fixture.choose(PLAIN).unwrap(), "of-user");
    // File names take precedence over directories.
    fixture.put("share/10-c.json", "early", &[]);
    assert_eq!(fixture.choose(PLAIN).unwrap(), "early");
    // An empty file hides those of the same name.
    fs::write(fixture.path("etc/10-c.json"), "").unwrap();
    fs::write(fixture.path("user/60-a.json"), "").unwrap();
    assert_eq!(fixture.choose(PLAIN).unwrap(), "second");
    // A file that is not a descriptor is ignored.
    fixture.put("share/20-notes.txt", "text", &[]);
    assert_eq!(fixture.choose(PLAIN).unwrap(), "second");
}

#[test]
fn firmware_must_support_the_machine_and_have_variables() {
    let fixture = Fixture::new();
    fixture.put("share/60-a.json", "a", &[]);
    let text = fs::read_to_string(fixture.path("share/60-a.json")).unwrap();
    assert_eq!(
        fixture.choose(Requirements { machine: "microvm", ..PLAIN }).unwrap_err().kind(),
        ErrorKind::HostMissing
    );
    for (from, to) in [
        ("\"uefi\"", "\"bios\""),
        ("x86_64", "aarch64"),
        ("\"flash\"", "\"memory\""),
        ("\"device\"", "\"mode\":\"stateless\",\"device\""),
        ("nvram-template", "something-else"),
        ("pc-q35-*", "pc-q35-rhel*"),
    ] {
        let changed = text.replace(from, to);
        assert_ne!(changed, text);
        fs::write(fixture.path("share/60-a.json"), changed).unwrap();
        assert!(fixture.choose(PLAIN).is_err(), "{to}");
    }
    fs::write(fixture.path("share/60-a.json"), text.replace("\"device\"", "\"mode\":\"split\",\"device\""))
        .unwrap();
    assert_eq!(fixture.choose(PLAIN).unwrap(), "a");
}

#[test]
fn unusable_firmware_is_reported() {
    let fixture = Fixture::new();
    fs::write(fixture.path("etc/10-bad.json"), "{").unwrap();
    fixture.put("share/60-a.json", "a", &[]);
    fs::remove_file(fixture.path("a.vars")).unwrap();
    let error = fixture.choose(PLAIN).unwrap_err().report();
    let expected = format!(
        "expected UEFI firmware for pc-q35-7.2 among the firmware descriptors of QEMU ({0}/user, {0}/etc, {0}/share), but \
         found none; {0}/etc/10-bad.json: EOF while parsing an object at line 1 column 1; {0}/share/60-a.json: \
         {0}/a.vars: No such file or directory (os error 2)\n  help: install it: {INSTALL}",
        fixture.0.path().display()
    );
    assert_eq!(error, expected);
}

#[test]
fn existing_variables_restrict_the_choice() {
    let fixture = Fixture::new();
    fixture.put("share/60-a.json", "a", &[]);
    fixture.put("share/70-b.json", "b", &[]);
    fs::write(fixture.path("b.vars"), [0; 128]).unwrap();
    let having = |size| Requirements { variables: Some(("raw", size)), ..PLAIN };
    assert_eq!(fixture.choose(having(64)).unwrap(), "a");
    assert_eq!(fixture.choose(having(128)).unwrap(), "b");
    let error = fixture.choose(having(1)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::HostMissing);
    assert!(
        error.to_string().contains("it has 64 bytes for variables, but the existing ones take 1"),
        "{error}"
    );
    assert!(fixture.choose(Requirements { variables: Some(("qcow2", 64)), ..PLAIN }).is_err());
}

#[test]
fn patterns_match_like_file_name_patterns() {
    for (pattern, name, expected) in [
        ("pc-q35-*", "pc-q35-7.2", true),
        ("pc-q35-*", "pc-i440fx-7.2", false),
        ("pc-*-7.?", "pc-q35-7.2", true),
        ("pc", "pc-q35", false),
        ("*", "", true),
    ] {
        assert_eq!(matches(pattern.as_bytes(), name.as_bytes()), expected, "{pattern} {name}");
    }
}
