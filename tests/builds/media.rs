//! CD-ROMs, floppies and served files in whole builds on QEMU: what arrives in the guest, what is reported if it
//! cannot, and that nothing is downloaded twice.

use crate::support::{
    Bench, Ended, Running,
    http::{Answer, Server},
    one_vm, rescue, tiny,
};
use rudder::digest::Digest;
use serde_json::Value;
use std::{fs, process::Command};

/// Returns bytes that do not occur by accident.
fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    let next = |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    (0..length).map(next).collect()
}

/// Returns the manifest of one tiny VM, with additional fields of the VM and of the build.
fn manifest(name: &str, of_vm: &str, of_build: &str) -> String {
    let url = tiny();
    let of_vm: String = of_vm.lines().map(|line| format!("    {line}\n")).collect();
    format!(
        "name: {name}\nvms:\n  - name: vm\n    source: {{url: '{url}'}}\n    resources: {{cpu: 1, memory: 256Mi}}\n    \
         cloudInit: {{}}\n    communicator: {{sshTimeout: 3m}}\n{of_vm}{of_build}"
    )
}

/// Returns the lines that the steps wrote.
fn output(ended: &Ended) -> Vec<&str> {
    let lines = ended.events.iter().filter(|event| event["event"] == "step_output");
    lines.map(|event| event["line"].as_str().unwrap()).collect()
}

/// Returns the number of response bodies that a server sent.
fn sent(server: &Server) -> usize {
    server.requests().iter().filter(|request| request.sent > 0).count()
}

#[test]
fn attached_and_served_files_arrive_byte_for_byte() {
    const LONG: &str = "A long name, with blanks and ümläuts - 0123456789.config.xml";
    let bench = Bench::new();
    let (first, second) = (noise(2048 * 700, 1), noise(2048 * 3, 2));
    let driver = noise(1_400_001, 3);
    let server = Server::start(Answer::Bytes(first.clone().into()));
    fs::write(bench.path("second.iso"), &second).unwrap();
    fs::write(bench.path("driver.sys"), &driver).unwrap();
    let of_vm = format!(
        r#"
isos: [{{url: '{}', checksum: {}}}, {{url: 'file:second.iso'}}]
floppy: {{files: [{{name: '{LONG}'}}, {{name: driver.sys}}, {{name: empty}}]}}
provisioners:
- type: shell
  shell:
    inline:
    - sha256sum < /dev/sr0
    - sha256sum < /dev/sr1
    - mount -t vfat -o ro,iocharset=utf8 /dev/fd0 /mnt
    - cd /mnt
    - for file in *; do echo "$file"; sha256sum < "$file"; done
- type: shell
  shell:
    inline:
    - wget -q -O - http://$RUDDER_HTTP_ADDR/driver.sys | sha256sum
    - wget -O - http://$RUDDER_HTTP_ADDR/Driver.sys || echo not there
"#,
        server.url("first.iso"),
        Digest::of(&first),
    );
    let of_build = format!(
        r#"
httpDirectory: {{files: [{{name: driver.sys}}]}}
files:
- {{name: '{LONG}', inline: "<config/>\r\n"}}
- {{name: driver.sys, url: 'file:driver.sys'}}
- {{name: empty, inline: ''}}
"#
    );
    let ended = bench.build(&manifest("media", &of_vm, &of_build));
    ended.expect_code(0);
    let sum = |bytes: &[u8]| format!("{}  -", Digest::of(bytes));
    let lines = output(&ended);
    let expected = [
        &sum(&first),
        &sum(&second),
        LONG,
        &sum(b"<config/>\r\n"),
        "driver.sys",
        &sum(&driver),
        "empty",
        &sum(b""),
        &sum(&driver),
    ];
    assert_eq!(lines[..expected.len()], expected, "{lines:#?}");
    assert_eq!(lines.last(), Some(&"not there"));

    // The events report every request, including one for a file that does not exist.
    let requests: Vec<(&str, &str, u64, u64)> = ended
        .events
        .iter()
        .filter(|event| event["event"] == "http_request")
        .map(|event| {
            let text = |field: &str| event[field].as_str().unwrap();
            let number = |field: &str| event[field].as_u64().unwrap();
            (text("method"), text("path"), number("status"), number("bytes"))
        })
        .collect();
    assert_eq!(requests, [("GET", "/driver.sys", 200, driver.len() as u64), ("GET", "/Driver.sys", 404, 0)]);
    bench.expect_clean();
}

#[test]
fn a_disk_repaired_from_a_cd_boots() {
    let bench = Bench::new();
    bench.built(&rescue::manifest(&bench));
    bench.expect_clean();

    // The captured disk boots by itself.
    let ended = bench.build(&one_vm("child", "{buildRef: {name: rescued}}", rescue::CHECK));
    ended.expect_code(0);
    assert_eq!(output(&ended), ["repaired"]);
    bench.expect_clean();
}

#[test]
fn a_corrected_iso_checksum_needs_no_second_download() {
    let bench = Bench::new();
    let iso = noise(2048 * 50, 4);
    let digest = Digest::of(&iso).to_string();
    let server = Server::start(Answer::Bytes(iso.into()));
    let url = server.url("install.iso");
    let of_vm = |checksum: &str| format!("isos: [{{url: '{url}', checksum: '{checksum}'}}]");
    let wrong = "0".repeat(64);
    let ended = bench.build(&manifest("media", &of_vm(&wrong), ""));
    ended.expect_code(1).expect_text(&["vm vm", "cdrom iso1", &url, &wrong, &digest]);
    assert_eq!(ended.outcome()["kind"], "checksum_mismatch");
    assert!(ended.event(|event| event["phase"] == "booting").is_none(), "nothing boots");
    bench.expect_clean();
    bench.built(&manifest("media", &of_vm(&digest), ""));
    assert_eq!(sent(&server), 1, "one download: {:?}", server.requests());
    bench.expect_clean();
}

#[test]
fn concurrent_builds_share_an_iso_that_stays_cached_for_its_ttl() {
    let bench = Bench::new();
    let iso = noise(2048 * 20_000, 5);
    let digest = Digest::of(&iso);
    let server = Server::start(Answer::Bytes(iso.into()));
    let url = server.url("install.iso");
    let short_lived = noise(2048, 6);
    let text = |name: &str, more: &str, ttl: &str| {
        let isos = format!("isos: [{{url: '{url}', checksum: {digest}}}{more}]");
        manifest(name, &isos, &format!("isoCacheTTL: {ttl}\n"))
    };
    let other = Bench::new();
    let first = Running::start(bench.command(&text("first", "", "1h")));
    let mut command = Command::new(crate::support::example("build"));
    command.arg("--store").arg(bench.store()).args(["--events", "json"]);
    fs::write(other.path("other.iso"), &short_lived).unwrap();
    command
        .arg(other.write("manifest.yaml", &text("second", ", {url: 'file:other.iso'}", "0s")))
        .env("TMPDIR", other.tmp());
    let second = Running::start(command);
    first.end().expect_code(0);
    second.end().expect_code(0);
    assert_eq!(sent(&server), 1, "{:?}", server.requests());
    bench.expect_clean();
    other.expect_clean();

    // The first build asked for an hour, and the second, which did not, does not shorten that. What only the second
    // used is removed, although a module was made with it.
    let blob = |digest: &Digest| {
        let hex = digest.to_string();
        bench.store().join("blobs/sha256").join(&hex[..2]).join(hex)
    };
    let gone = blob(&Digest::of(&short_lived));
    assert!(gone.is_file());
    let (code, said, error) = bench.run("modules", &["gc"]);
    assert_eq!((code, error.as_str()), (0, ""), "{said}");
    assert!(blob(&digest).is_file() && !gone.exists(), "{said}");
}

#[test]
fn a_served_file_that_is_missing_from_files_is_refused_at_its_line() {
    let bench = Bench::new();
    let of_build = "httpDirectory:\n  files:\n  - {name: preseed.cfg}\n  - {name: postinst.sh}\nfiles:\n- {name: preseed.cfg, inline: x}\n";
    let ended = bench.build(&manifest("media", "", of_build));
    ended.expect_code(2).expect_text(&["manifest.yaml:11:", "unknown-file", "postinst.sh", "preseed.cfg"]);
    assert_eq!(ended.events, Vec::<Value>::new(), "nothing starts");
    bench.expect_clean();
}

#[test]
fn a_floppy_that_is_too_large_is_refused_with_the_excess() {
    let bench = Bench::new();
    fs::write(bench.path("driver.sys"), noise(1_500_000, 6)).unwrap();
    let ended = bench.build(&manifest(
        "media",
        "floppy: {files: [{name: driver.sys}]}",
        "files:\n- {name: driver.sys, url: 'file:driver.sys'}\n",
    ));
    ended.expect_code(1).expect_text(&[
        "vm vm",
        "expected at most 1457664 bytes",
        "42496 too many",
        "httpDirectory",
    ]);
    assert!(ended.event(|event| event["phase"] == "booting").is_none(), "nothing boots");
    bench.expect_clean();
}
