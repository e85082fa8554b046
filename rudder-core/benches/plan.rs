//! Parses, checks and plans a manifest of 10,000 lines, compared in the same run with `serde_yaml` alone into the same
//! types. The last line of output is the ratio of the two; the goal is at most 2.
#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs)]

use criterion::Criterion;
use rudder_core::{
    capability::{Capabilities, Capability},
    check::check,
    manifest::{BareBuild, parse},
    plan::{PlanContext, prepare},
};
use std::{fmt::Write as _, hint::black_box, time::Instant};

/// Returns a manifest of at least this many lines, with every kind of field that a build has today.
fn manifest(lines: usize) -> String {
    let mut text = "name: bench\nfiles:\n- {name: motd, inline: hello}\nvms:\n".to_owned();
    let mut written = 4;
    for vm in 0.. {
        if written >= lines {
            break;
        }
        let one = format!(
            r#"- name: vm-{vm}
  source:
    url: https://example.org/images/debian-12-20250214.qcow2
    checksum: "{vm:064x}"
  resources:
    cpu: 2
    memory: 2Gi
  disks:
  - name: rootdisk
    size: 20Gi
    bus: virtio
  - name: data
    size: 10Gi
  communicator:
    sshUsername: debian
    sshTimeout: 10m
  cloudInit:
    userData: |
      #cloud-config
      packages:
      - nginx
      - postgresql
  nics:
  - name: lan
    model: virtio
    slot: 1
  provisioners:
  - type: shell
    name: install
    stepTimeout: 5m
    shell:
      inline:
      - apt-get update
      - apt-get install -y nginx
      env:
        DEBIAN_FRONTEND: noninteractive
        INDEX: {vm}
  - type: file
    file:
      fileRef: motd
      destination: /etc/motd
  - type: reboot
"#
        );
        written += one.lines().count();
        write!(text, "{one}").unwrap();
    }
    text
}

fn context() -> PlanContext {
    use Capability as C;
    let capabilities = [C::SourceUrl, C::DiskVirtio, C::NicModels, C::NicSlots, C::CloudInit];
    PlanContext::new(&Capabilities::new("bench", capabilities))
}

/// Returns the fastest of `runs` runs, in seconds: the time it takes on an otherwise idle machine.
fn fastest(runs: u32, mut work: impl FnMut()) -> f64 {
    (0..runs)
        .map(|_| {
            let start = Instant::now();
            work();
            start.elapsed().as_secs_f64()
        })
        .fold(f64::INFINITY, f64::min)
}

fn main() {
    let text = manifest(10_000);
    let context = context();
    let prepared = prepare("bench.yaml", text.as_bytes(), &context);
    assert!(!prepared.has_errors(), "{}", prepared.render());
    assert_eq!(prepared.plans.len(), 1);

    let ours = || drop(black_box(prepare("bench.yaml", black_box(text.as_bytes()), &context)));
    let parsing = || drop(black_box(parse(black_box(text.as_bytes()))));
    let document = parse(text.as_bytes()).documents.remove(0);
    let checking = || drop(black_box(check(black_box(&document))));
    let serde = || drop(black_box(serde_yaml::from_slice::<BareBuild>(black_box(text.as_bytes())).unwrap()));

    let mut criterion = Criterion::default().sample_size(20).configure_from_args();
    criterion.bench_function("parse + check + plan", |bencher| bencher.iter(ours));
    criterion.bench_function("parse", |bencher| bencher.iter(parsing));
    criterion.bench_function("check", |bencher| bencher.iter(checking));
    criterion.bench_function("serde_yaml", |bencher| bencher.iter(serde));
    criterion.final_summary();

    let (ours, serde) = (fastest(30, ours), fastest(30, serde));
    println!(
        "{} lines: parse + check + plan {:.1} ms, serde_yaml alone {:.1} ms, ratio {:.2} (goal: at most 2)",
        text.lines().count(),
        ours * 1e3,
        serde * 1e3,
        ours / serde
    );
}
