//! Whole builds, compared with the alternatives in the same run and on the same host.
//!
//! ```text
//! make bench [RUNS=5]
//! cargo bench --features libvirt --bench whole_build -- [--only qemu,libvirt] [--runs 5]
//! ```
//!
//! One Debian VM with one trivial step, from nothing to a self-contained compressed disk:
//!
//! - *floor*: the same guest started by a plain qemu command line, one ssh login, the same step, poweroff, the same
//!   `qemu-img convert`. No tool that boots the guest once can be faster.
//! - *qemu*: the build example, in the release profile.
//! - *libvirt*: the same with `--backend libvirt`, on a libvirtd that is started for this run and ends with it.
//!   Needs the feature `libvirt`.
//! - *packer*: Packer from Debian's packages, with its QEMU builder.
//!
//! The runs are interleaved, so that a host that becomes slower or warmer affects all of them; the figures are medians.
//! Also printed is what Rudder's own process uses (peak resident memory and CPU time, without its children). Captures
//! are measured separately in `capture.rs`.

#![allow(missing_docs, clippy::print_stdout, clippy::unwrap_used)] // A program that prints, and ends where it cannot go on.

#[cfg(feature = "libvirt")]
#[path = "../../rudder-libvirt/tests/common/daemon.rs"]
mod daemon;

mod contenders;
mod host;

use contenders::Bench;

/// The programs that build, in the order of the runs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Contender {
    Floor,
    Qemu,
    Libvirt,
    Packer,
}

impl Contender {
    const ALL: [Self; 4] = [Self::Floor, Self::Qemu, Self::Libvirt, Self::Packer];

    fn name(self) -> &'static str {
        match self {
            Self::Floor => "floor",
            Self::Qemu => "qemu",
            Self::Libvirt => "libvirt",
            Self::Packer => "packer",
        }
    }
}

/// Reads the number of runs and the contenders from the command line.
fn options() -> (usize, Vec<Contender>) {
    let (mut runs, mut chosen) = (5, Contender::ALL.to_vec());
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--bench" => {} // Cargo's own.
            "--runs" => runs = arguments.next().expect("a number").parse().expect("a number"),
            "--only" => {
                let names = arguments.next().expect("names, with commas between them");
                let find = |name| Contender::ALL.into_iter().find(|it| it.name() == name);
                chosen = names
                    .split(',')
                    .map(|name| find(name).unwrap_or_else(|| panic!("no {name:?}")))
                    .collect();
            }
            other => panic!("expected --runs N or --only NAME,…, but found {other:?}"),
        }
    }
    if cfg!(not(feature = "libvirt")) && chosen.contains(&Contender::Libvirt) {
        println!("libvirt is left out: this bench is compiled without the feature `libvirt`");
        chosen.retain(|it| *it != Contender::Libvirt);
    }
    (runs, chosen)
}

fn main() {
    let (runs, chosen) = options();
    let bench = Bench::prepare();
    #[cfg(feature = "libvirt")]
    let sockets = tempfile::tempdir().unwrap(); // The names of sockets must be short.
    #[cfg(feature = "libvirt")]
    let daemon = chosen.contains(&Contender::Libvirt).then(|| daemon::Daemon::start(sockets.path()));
    #[cfg(feature = "libvirt")]
    let uri = daemon.as_ref().map(daemon::Daemon::uri).unwrap_or_default();
    #[cfg(not(feature = "libvirt"))]
    let uri = String::new();
    println!("{}; {runs} runs of each, interleaved", bench.machine());

    println!("warming up: Rudder takes the image into its store, the system its files into memory");
    for contender in [Contender::Qemu, Contender::Libvirt] {
        if chosen.contains(&contender) {
            bench.rudder(contender, &uri, "warm-up");
        }
    }
    let mut results: Vec<(Contender, Vec<Figures>)> =
        chosen.into_iter().map(|contender| (contender, Vec::new())).collect();
    for run in 1..=runs {
        let mut line = Vec::new();
        for (contender, results) in &mut results {
            let figures = match contender {
                Contender::Floor => bench.floor(),
                Contender::Packer => Figures { whole: bench.packer(), parts: Vec::new() },
                Contender::Qemu | Contender::Libvirt => bench.rudder(*contender, &uri, &run.to_string()),
            };
            line.push(format!("{} {:.1} s", contender.name(), figures.whole));
            results.push(figures);
        }
        println!("run {run}: {}", line.join(" · "));
    }

    println!("\nwhole build of one Debian VM, median of {runs}");
    let of =
        |name| results.iter().find(|(contender, _)| *contender == name).map(|(_, figures)| whole(figures));
    for (contender, figures) in &results {
        let whole = whole(figures);
        let ratios = [Contender::Floor, Contender::Qemu].into_iter().filter(|it| it != contender);
        let ratios: String =
            ratios.filter_map(|it| Some(format!("   {:.2} × {}", whole / of(it)?, it.name()))).collect();
        println!("  {:8}{whole:6.1} s{ratios}", contender.name());
        for (index, (what, unit, _)) in figures[0].parts.iter().enumerate() {
            let part = median(figures.iter().map(|one| one.parts[index].2));
            println!("            {what} {part:.2} {unit}");
        }
    }
}

/// Returns the median duration of whole builds.
fn whole(figures: &[Figures]) -> f64 {
    median(figures.iter().map(|one| one.whole))
}

/// Returns the middle value; with an even number of values, the mean of the two in the middle. The unit is that of the
/// values.
fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 { values[middle] } else { (values[middle - 1] + values[middle]) / 2.0 }
}

/// The duration of one build in seconds, and other figures with their units.
struct Figures {
    whole: f64,
    parts: Vec<(&'static str, &'static str, f64)>,
}
