//! The manifests of `examples/` that install Debian from an ISO, and what their installers asked for.

use super::{Ended, guest_path};
use std::{fs, path::Path};

/// An example, with the guests of these tests.
pub fn manifest(file: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/manifests").join(file);
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let kernel = guest_path("installer/linux");
    let guests = kernel.ancestors().nth(2).unwrap();
    let (here, there) = ("file:../../target/guests/", format!("file://{}/", guests.display()));
    assert!(text.contains(here), "{} names the guests of `make guests`", path.display());
    text.replace(here, &there)
}

/// The files that were asked for, with the status of the answers, in order.
pub fn requests(ended: &Ended) -> Vec<(String, u64)> {
    let requests = ended.events.iter().filter(|event| event["event"] == "http_request");
    requests
        .map(|event| (event["path"].as_str().unwrap().to_owned(), event["status"].as_u64().unwrap()))
        .collect()
}
