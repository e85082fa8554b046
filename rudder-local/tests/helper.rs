//! The process that runs the network of a kept lab.
#![allow(clippy::unwrap_used)]

use rudder_local::helper::VARIABLE;
use rustix::fs::{CWD, FileType, Mode, mknodat};
use std::{
    fs,
    process::{Command, Stdio},
};

const RECORD: &str = r#"{"format": 1, "name": "kept", "network": {"declared": false, "vpcs": [], "subnets": []}, "machines": []}"#;

#[test]
fn it_ends_when_its_lab_is_removed_by_hand() {
    let lab = tempfile::tempdir().unwrap();
    let record = lab.path().join("network.json");
    mknodat(CWD, &record, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    let mut helper = Command::new(env!("CARGO_BIN_EXE_rudder-helper"))
        .env(VARIABLE, "network.json")
        .current_dir(lab.path())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // Returns once the helper has opened the pipe, so that it runs the network before its directory is removed.
    fs::write(&record, RECORD).unwrap();
    lab.close().unwrap();
    assert_eq!(helper.wait().unwrap().code(), Some(1));
    let said = std::io::read_to_string(helper.stderr.take().unwrap()).unwrap();
    assert!(said.contains("the directory of the lab was removed"), "{said}");
}
