//! The choice of firmware among made-up descriptors.
#![allow(clippy::unwrap_used)]
use super::*;

/// Made-up directories of descriptors, the most specific first, and firmware for them.
struct Shelf(tempfile::TempDir);

impl Shelf {
    fn new() -> Self {
        let shelf = Self(tempfile::tempdir().unwrap());
        for name in ["user", "etc", "share"] {
            fs::create_dir(shelf.0.path().join(name)).unwrap();
        }
        shelf
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
    fn choose(&self, wanted: Wanted<'_>) -> Result<String> {
        let uefi = self.catalog().choose(wanted)?;
        Ok(uefi.code.path.file_stem().unwrap().to_string_lossy().into_owned())
    }
}

const PLAIN: Wanted<'_> = Wanted { machine: "pc-q35-7.2", secure: false, variables: None };
const SECURE: Wanted<'_> = Wanted { secure: true, ..PLAIN };
const ENROLLED: &[&str] = &["acpi-s3", "enrolled-keys", "requires-smm", "secure-boot"];

#[test]
fn the_first_that_does_what_is_asked_is_taken() {
    let shelf = Shelf::new();
    shelf.put("share/40-enrolled.json", "enrolled", ENROLLED);
    shelf.put("share/50-empty.json", "empty", &["requires-smm", "secure-boot"]);
    shelf.put("share/60-plain.json", "plain", &["acpi-s3"]);
    shelf.put("share/70-other.json", "other", &[]);
    assert_eq!(shelf.choose(PLAIN).unwrap(), "plain");
    assert_eq!(shelf.choose(SECURE).unwrap(), "enrolled");
    assert!(shelf.catalog().choose(SECURE).unwrap().smm);
    // Nothing that would enforce Secure Boot, even if there is nothing else.
    for name in ["60-plain", "70-other"] {
        fs::remove_file(shelf.path(&format!("share/{name}.json"))).unwrap();
    }
    assert_eq!(shelf.choose(PLAIN).unwrap(), "empty");
    fs::remove_file(shelf.path("share/50-empty.json")).unwrap();
    assert_eq!(shelf.choose(PLAIN).unwrap_err().kind(), ErrorKind::HostMissing);
}

#[test]
fn a_more_specific_directory_goes_first_and_hides() {
    let shelf = Shelf::new();
    shelf.put("share/60-a.json", "of-share", &[]);
    shelf.put("share/70-b.json", "second", &[]);
    shelf.put("etc/60-a.json", "of-etc", &[]);
    assert_eq!(shelf.choose(PLAIN).unwrap(), "of-etc");
    shelf.put("user/60-a.json", "of-user", &[]);
    assert_eq!(shelf.choose(PLAIN).unwrap(), "of-user");
    // File names take precedence over directories.
    shelf.put("share/10-c.json", "early", &[]);
    assert_eq!(shelf.choose(PLAIN).unwrap(), "early");
    // An empty file hides those of the same name.
    fs::write(shelf.path("etc/10-c.json"), "").unwrap();
    fs::write(shelf.path("user/60-a.json"), "").unwrap();
    assert_eq!(shelf.choose(PLAIN).unwrap(), "second");
    // A file that is not a descriptor is ignored.
    shelf.put("share/20-notes.txt", "text", &[]);
    assert_eq!(shelf.choose(PLAIN).unwrap(), "second");
}

#[test]
fn firmware_is_for_its_machines_and_has_variables() {
    let shelf = Shelf::new();
    shelf.put("share/60-a.json", "a", &[]);
    let text = fs::read_to_string(shelf.path("share/60-a.json")).unwrap();
    assert_eq!(
        shelf.choose(Wanted { machine: "microvm", ..PLAIN }).unwrap_err().kind(),
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
        fs::write(shelf.path("share/60-a.json"), changed).unwrap();
        assert!(shelf.choose(PLAIN).is_err(), "{to}");
    }
    fs::write(shelf.path("share/60-a.json"), text.replace("\"device\"", "\"mode\":\"split\",\"device\""))
        .unwrap();
    assert_eq!(shelf.choose(PLAIN).unwrap(), "a");
}

#[test]
fn what_is_there_and_cannot_be_used_is_told() {
    let shelf = Shelf::new();
    fs::write(shelf.path("etc/10-bad.json"), "{").unwrap();
    shelf.put("share/60-a.json", "a", &[]);
    fs::remove_file(shelf.path("a.vars")).unwrap();
    let error = shelf.choose(PLAIN).unwrap_err().report();
    let expected = format!(
        "expected UEFI firmware for pc-q35-7.2 among the firmware descriptors of QEMU ({0}/user, {0}/etc, {0}/share), but \
         found none; {0}/etc/10-bad.json: EOF while parsing an object at line 1 column 1; {0}/share/60-a.json: \
         {0}/a.vars: No such file or directory (os error 2)\n  help: install it: {INSTALL}",
        shelf.0.path().display()
    );
    assert_eq!(error, expected);
}

#[test]
fn variables_that_are_there_already_decide() {
    let shelf = Shelf::new();
    shelf.put("share/60-a.json", "a", &[]);
    shelf.put("share/70-b.json", "b", &[]);
    fs::write(shelf.path("b.vars"), [0; 128]).unwrap();
    let having = |size| Wanted { variables: Some(("raw", size)), ..PLAIN };
    assert_eq!(shelf.choose(having(64)).unwrap(), "a");
    assert_eq!(shelf.choose(having(128)).unwrap(), "b");
    let error = shelf.choose(having(1)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::HostMissing);
    assert!(error.to_string().contains("it has 64 bytes for variables, and there are already 1;"), "{error}");
    assert!(shelf.choose(Wanted { variables: Some(("qcow2", 64)), ..PLAIN }).is_err());
}

#[test]
fn patterns_are_those_of_file_names() {
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
