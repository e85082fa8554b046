//! Whole builds on QEMU whose inputs are wrong or break: what is reported, and that nothing is left behind.

#[path = "../../rudder-local/tests/common/small_disk.rs"]
mod small_disk;
use crate::support::{
    Bench, Running, guest_path,
    http::{Answer, Server},
    one_vm, tiny_manifest,
};
use small_disk::{SmallDisk, may_mount};
use std::{fs, process::Command, sync::Arc};

fn image() -> Arc<[u8]> {
    fs::read(guest_path("tiny.qcow2")).unwrap().into()
}

fn from_url(url: &str, more: &str) -> String {
    one_vm("input", &format!("{{url: '{url}'{more}}}"), "")
}

#[test]
fn a_missing_image_is_reported() {
    let bench = Bench::new();
    let server = Server::start(Answer::Status(404, "Not Found"));
    let url = server.url("gone.qcow2");
    let ended = bench.build(&from_url(&url, ""));
    ended.expect_code(1).expect_text(&[&url, "404", "vm vm"]);
    assert_eq!(ended.outcome()["kind"], "not_found");
    assert_eq!(server.requests().len(), 1, "a 404 is final");
    bench.expect_clean();
}

#[test]
fn a_corrected_checksum_needs_no_second_download() {
    let bench = Bench::new();
    let image = image();
    let digest = rudder::digest::Digest::of(&image).to_string();
    let server = Server::start(Answer::Bytes(image));
    let url = server.url("tiny.qcow2");
    let wrong = "0".repeat(64);
    let ended = bench.build(&from_url(&url, &format!(", checksum: '{wrong}'")));
    ended.expect_code(1).expect_text(&[&wrong, &digest, &url]);
    assert_eq!(ended.outcome()["kind"], "checksum_mismatch");
    bench.expect_clean();
    bench.built(&from_url(&url, &format!(", checksum: '{digest}'")));
    assert_eq!(
        server.requests().iter().filter(|request| request.sent > 0).count(),
        1,
        "one download: {:?}",
        server.requests()
    );
    bench.expect_clean();
}

#[test]
fn an_interrupted_download_is_resumed() {
    let bench = Bench::new();
    let image = image();
    let half = image.len() / 2;
    let total = image.len();
    let server = Server::start(Answer::CutOnce(image, half));
    let module = bench.built(&from_url(&server.url("tiny.qcow2"), ""));
    let requests = server.requests();
    assert_eq!(requests[0].sent, half);
    let range = requests[1].range.as_deref().expect("the second request asks for the rest");
    let from: usize = range.trim_start_matches("bytes=").trim_end_matches('-').parse().unwrap();
    assert!(from > 0 && from <= half, "resumed at {from} of {half}");
    assert_eq!(requests[1].sent, total - from);
    assert_eq!(module["provenance"]["inputs"][0]["size"], total);
    bench.expect_clean();
}

#[test]
fn an_html_page_is_refused_as_a_disk() {
    let bench = Bench::new();
    let page = "<!DOCTYPE html><html><body>Please log in</body></html>\n".repeat(40);
    let server = Server::start(Answer::Bytes(page.into_bytes().into()));
    let url = server.url("image.qcow2");
    let ended = bench.build(&from_url(&url, ""));
    ended.expect_code(1).expect_text(&[&url, "expected a disk image, but found a web page"]);
    assert_eq!(ended.outcome()["kind"], "invalid_image");
    bench.expect_clean();
}

#[test]
fn an_image_larger_than_its_disk_is_refused() {
    let bench = Bench::new();
    let manifest = tiny_manifest("input", "")
        .replace("    cloudInit", "    disks: [{name: rootdisk, size: 1Mi}]\n    cloudInit");
    let ended = bench.build(&manifest);
    ended.expect_code(1).expect_text(&["1Mi", "rootdisk", "vm vm"]);
    assert_eq!(ended.outcome()["kind"], "invalid_input");
    bench.expect_clean();
}

#[test]
fn an_unknown_parent_is_reported() {
    let bench = Bench::new();
    let ended = bench.build(&one_vm("child", "{buildRef: {name: unknown-module}}", ""));
    ended.expect_code(2).expect_text(&["manifest.yaml:4:", "unknown-module", "help"]);
    bench.expect_clean();
}

#[test]
fn unsupported_features_are_refused_at_their_line() {
    let bench = Bench::new();
    let manifest = tiny_manifest("refused", "- {type: windows-update}");
    let ended = bench.build(&manifest);
    ended.expect_code(2).expect_text(&["manifest.yaml:9:", "windows-update"]);
    bench.expect_clean();
}

#[test]
fn a_full_disk_of_the_store_is_reported() {
    if !may_mount("a_full_disk_of_the_store_is_reported") {
        return;
    }
    let bench = Bench::new();
    let small = SmallDisk::mount(&bench.store(), 8);
    let ended = bench.build(&tiny_manifest("input", ""));
    ended.expect_code(1).expect_text(&["No space left", &bench.store().display().to_string()]);
    assert_eq!(ended.outcome()["kind"], "host_disk_full");
    bench.expect_clean();
    drop(small);
}

#[test]
fn a_host_disk_that_fills_while_a_machine_runs_is_reported() {
    if !may_mount("a_host_disk_that_fills_while_a_machine_runs_is_reported") {
        return;
    }
    let bench = Bench::new();
    let room = fs::metadata(guest_path("tiny.qcow2")).unwrap().len() / 1024 / 1024 + 64;
    let small = SmallDisk::mount(&bench.store(), room);
    let manifest = tiny_manifest(
        "input",
        "- {type: shell, name: fill, stepTimeout: 5m, shell: {inline: 'dd if=/dev/urandom of=/fill bs=1M count=300; sync'}}",
    )
    .replace("    cloudInit", "    disks: [{name: rootdisk, size: 2Gi}]\n    cloudInit");
    let ended = bench.build(&manifest);
    ended.expect_code(1).expect_text(&["vm vm", "space"]);
    assert_eq!(ended.outcome()["kind"], "host_disk_full");
    bench.expect_clean();
    drop(small);
}

#[test]
fn concurrent_builds_share_one_download() {
    let bench = Bench::new();
    let server = Server::start(Answer::Bytes(image()));
    let url = server.url("tiny.qcow2");
    let other = Bench::new();
    let first = Running::start(bench.command(&from_url(&url, "")));
    let mut command = Command::new(crate::support::example("build"));
    let file = other.write("manifest.yaml", &from_url(&url, "").replace("name: input", "name: other"));
    command.arg("--store").arg(bench.store()).args(["--events", "json"]).arg(file).env("TMPDIR", other.tmp());
    let second = Running::start(command);
    first.end().expect_code(0);
    second.end().expect_code(0);
    assert_eq!(
        server.requests().iter().filter(|request| request.sent > 0).count(),
        1,
        "{:?}",
        server.requests()
    );
    bench.expect_clean();
    other.expect_clean();
}
