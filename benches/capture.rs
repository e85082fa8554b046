//! Capturing a disk, compared with `qemu-img convert -c` of the same disk in the same run, on the same host.
//!
//! ```text
//! cargo bench --bench capture [-- RUNS]
//! ```
//!
//! The disk is that of a machine based on the Debian guest of `make guests`. A capture comprises everything:
//! compressing and hashing the disk, checking its structure, and reading it again to verify that it holds what the
//! machine left. The runs are interleaved; the figures are medians.

#![allow(missing_docs, clippy::print_stdout, clippy::unwrap_used)] // A program that prints, and ends where it cannot go on.

use rudder::{
    backend::{Backend, ImportRequest, LabSpec, MachineDisk, MachineSpec, Progress, Stop},
    hardware::Bus,
    plan::{PlannedNetwork, PlannedSource, PlannedUrl},
    qemu::QemuBackend,
    store::Store,
};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

fn main() {
    // `cargo bench` passes flags of its own.
    let runs = std::env::args().skip(1).find_map(|argument| argument.parse().ok()).unwrap_or(5_usize);
    tokio::runtime::Runtime::new().unwrap().block_on(compare(runs));
}

async fn compare(runs: usize) {
    let guest = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/guests/debian-12.qcow2");
    assert!(guest.exists(), "expected {}: run make guests", guest.display());
    let dir = tempfile::Builder::new().prefix("rudder-bench-").tempdir().unwrap();
    let backend = QemuBackend::builder(Store::open(dir.path()).unwrap()).build();
    let network = PlannedNetwork::default();
    let lab = backend.open_lab(&LabSpec::new("bench", network)).await.unwrap();
    let url = format!("file://{}", guest.display()).parse().unwrap();
    let source = PlannedSource::Url(PlannedUrl::new(url));
    let volume = lab.import(&ImportRequest::new("vm", "disk0", source, None), &Progress::none()).await;
    let volume = volume.unwrap().volume;
    let disk = disk_of(dir.path(), &volume.id);
    let mut spec = MachineSpec::new("vm", 1, 512 << 20);
    spec.disks.push(MachineDisk::new("disk0", Bus::Virtio, volume));
    let machine = lab.create_machine(&spec).await.unwrap();
    machine.start().await.unwrap();
    machine.stop(Stop::Kill).await.unwrap();

    let converted = dir.path().join("converted.qcow2");
    let (mut plain, mut whole) = (Vec::new(), Vec::new());
    let mut sizes = (0, 0);
    println!("{runs} runs of each, interleaved, after one that warms up");
    for run in 0..=runs {
        let start = Instant::now();
        convert(&disk, &converted);
        let by_qemu = start.elapsed().as_secs_f64();
        sizes.0 = fs::metadata(&converted).unwrap().len();
        fs::remove_file(&converted).unwrap();
        let start = Instant::now();
        sizes.1 = machine.capture("disk0", &Progress::none()).await.unwrap().content.size.unwrap();
        let by_rudder = start.elapsed().as_secs_f64();
        if run > 0 {
            println!("run {run}: qemu-img convert -c {by_qemu:.2} s · rudder {by_rudder:.2} s");
            plain.push(by_qemu);
            whole.push(by_rudder);
        }
    }
    let (plain, whole) = (median(plain), median(whole));
    let mebibytes = |size| size >> 20;
    println!("\ncapture of one disk, median of {runs}");
    println!("  qemu-img convert -c              {plain:6.2} s   {} MiB", mebibytes(sizes.0));
    println!(
        "  Rudder, verification included    {whole:6.2} s   {} MiB   {:.1} × as fast",
        mebibytes(sizes.1),
        plain / whole
    );
    lab.destroy().await.unwrap();
}

/// Returns the file of a volume of the only lab.
fn disk_of(store: &Path, volume: &str) -> PathBuf {
    let labs = fs::read_dir(store.join("labs")).unwrap().flatten();
    labs.map(|lab| lab.path().join(volume)).find(|path| path.exists()).unwrap()
}

fn convert(from: &Path, to: &Path) {
    let output = Command::new("qemu-img")
        .args(["convert", "-c", "-f", "qcow2", "-O", "qcow2"])
        .args([from, to])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 { values[middle] } else { f64::midpoint(values[middle - 1], values[middle]) }
}
