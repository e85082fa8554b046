//! Tests of the store through its public interface: with a misbehaving server, packed and unusable images, and several processes.

#![allow(clippy::unwrap_used)]

mod child;
mod collect;
mod content;
mod copies;
mod damage;
mod directory;
mod download;

mod image;
mod secure;
mod server;
mod versions;

use super::*;
use rudder_core::backend::ProgressEvent;
use std::{fs, sync::Mutex};

/// A store in a directory of its own, with limits short enough to wait for.
struct Fixture {
    dir: tempfile::TempDir,
    store: Store,
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = open(&dir.path().join("store"));
        Self { dir, store }
    }

    async fn image(&self, url: &url::Url, sha256: Option<Digest>) -> Result<StoredImage> {
        self.store.image(&planned(url, sha256), &Progress::none()).await
    }

    /// Writes a file beside the store, and returns its URL.
    fn write(&self, name: &str, bytes: &[u8]) -> url::Url {
        let path = self.dir.path().join(name);
        fs::write(&path, bytes).unwrap();
        url::Url::from_file_path(path).unwrap()
    }

    /// Returns the names of the entries in a directory of the store.
    fn names(&self, dir: &str) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(self.store.root().join(dir))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    /// Asserts that no download is in progress or left behind, and that no download's lock is held.
    fn assert_no_leftovers(&self) {
        assert_eq!(self.names("downloads"), Vec::<String>::new());
        assert!(!self.names("locks").iter().any(|name| name.starts_with("download-")));
    }
}

fn open(root: &Path) -> Store {
    let options = StoreOptions {
        stall_timeout: Duration::from_millis(500),
        backoff: Duration::from_millis(1),
        attempts: 3,
        ..StoreOptions::default()
    };
    Store::open_with(root, options).unwrap()
}

fn planned(url: &url::Url, sha256: Option<Digest>) -> PlannedUrl {
    PlannedUrl::new(url.clone()).sha256(sha256)
}

/// Returns a raw disk with a boot signature and incompressible content. `size` must be a whole number of sectors.
fn raw_disk(size: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut disk: Vec<u8> = (0..size)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .collect();
    disk[510] = 0x55;
    disk[511] = 0xaa;
    disk
}

fn recording_progress() -> (Progress, Arc<Mutex<Vec<ProgressEvent>>>) {
    let events = Arc::new(Mutex::new(Vec::new()));
    let log = events.clone();
    (Progress::new(move |event| log.lock().unwrap().push(event)), events)
}

#[test]
fn secrets_in_urls_are_masked() {
    let masked = |text: &str| masked(&text.parse().unwrap());
    assert_eq!(
        masked("https://u:geheim@h/x?v=1&X-Amz-Signature=abc#f"),
        "https://***@h/x?v=1&X-Amz-Signature=***"
    );
    assert_eq!(masked("https://h/x.qcow2"), "https://h/x.qcow2");
}

#[test]
fn options_are_set_without_struct_literals() {
    let options = StoreOptions::new()
        .connect_timeout(Duration::from_secs(1))
        .stall_timeout(Duration::from_secs(2))
        .attempts(3)
        .backoff(Duration::from_secs(4))
        .unpacked_limit(5);
    let seconds =
        [options.connect_timeout, options.stall_timeout, options.backoff].map(|limit| limit.as_secs());
    assert_eq!((seconds, options.attempts, options.unpacked_limit), ([1, 2, 4], 3, 5));
}
