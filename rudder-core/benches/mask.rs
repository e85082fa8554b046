//! Removes a secret of 400 lines from a log: times creating the masker and masking, compared in the same run with
//! replacing each line of the secret by `str::replace`, which finds no other form of it. The last lines of output show
//! how the time grows with the length of the text and with the number of secrets; the factors should be near 2 and 1.
#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs)]

use criterion::Criterion;
use rudder_core::secret::{Masker, Secret};
use std::{hint::black_box, time::Instant};

fn secret(lines: u32) -> Secret {
    let line =
        |n: u32| format!("{:08x}{:08x}-line-of-a-secret-{n}", n.wrapping_mul(2_654_435_761), n ^ 0x5bd1_e995);
    Secret::new((0..lines).map(line).collect::<Vec<_>>().join("\n"))
}

/// Returns lines like those of package managers and compilers, with some colours and escapes.
fn log(lines: usize) -> Vec<String> {
    let line = |n| match n % 4 {
        0 => format!(
            "Get:{n} http://deb.debian.org/debian bookworm/main amd64 package-{n} all 1.2.3-{n} [{n} kB]"
        ),
        1 => format!("\u{1b}[32m   Compiling\u{1b}[0m crate-{n} v0.{n}.1 (/build/{n})"),
        2 => {
            format!("{{\"level\":\"info\",\"message\":\"step {n} \\\"done\\\"\",\"path\":\"/var/lib/{n}\"}}")
        }
        _ => format!("[{n:>8}.123456] pci 0000:00:{:02x}.0: [8086:100e] type 00 class 0x020000", n % 32),
    };
    (0..lines).map(line).collect()
}

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
    let (secret_400, secret_100) = (secret(400), secret(100));
    let (text, half) = (log(8000), log(4000));
    let bytes: usize = text.iter().map(|line| line.len() + 1).sum();

    let make = || drop(black_box(Masker::new([black_box(&secret_400)])));
    let masker = Masker::new([&secret_400]);
    let small = Masker::new([&secret_100]);
    let mask = |masker: &Masker, text: &[String]| {
        let mut pieces = masker.pieces();
        for line in text {
            pieces.push(black_box(line), false, &mut |line| {
                black_box(line.len());
            });
        }
        pieces.finish(&mut |line| {
            black_box(line.len());
        });
    };
    let parts: Vec<&str> = secret_400.expose().lines().collect();
    let replace = |text: &[String]| {
        for line in text {
            let masked = parts.iter().fold(line.clone(), |line, part| line.replace(part, "***"));
            drop(black_box(masked));
        }
    };

    let mut criterion = Criterion::default().sample_size(10).configure_from_args();
    criterion.bench_function("make a masker of 400 lines", |bencher| bencher.iter(make));
    criterion.bench_function("mask a log of 8000 lines", |bencher| bencher.iter(|| mask(&masker, &text)));
    criterion.bench_function("str::replace, as it is only", |bencher| bencher.iter(|| replace(&text)));
    criterion.final_summary();

    let (making, masking, replacing) =
        (fastest(5, make), fastest(5, || mask(&masker, &text)), fastest(5, || replace(&text)));
    let (half, few) = (fastest(5, || mask(&masker, &half)), fastest(5, || mask(&small, &text)));
    println!("masker of 400 lines: {:.1} ms", making * 1e3);
    println!(
        "log of {:.1} MB: {:.1} ms ({:.0} MB/s), str::replace {:.1} ms, ratio {:.2} (goal: at most 1)",
        bytes as f64 / 1e6,
        masking * 1e3,
        bytes as f64 / 1e6 / masking,
        replacing * 1e3,
        masking / replacing
    );
    println!(
        "twice the text: {:.2} times as long; four times the secrets: {:.2} times as long",
        masking / half,
        masking / few
    );
}
