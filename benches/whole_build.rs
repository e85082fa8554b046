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
#[path = "../rudder-libvirt/tests/common/daemon.rs"]
mod daemon;

use std::{
    collections::VecDeque,
    fs,
    io::{Read as _, read_to_string},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

const STEP: &str = "echo built | sudo tee /etc/built";
const DISK: &str = "4G";
const MEMORY_MIB: u32 = 1024;
const CPUS: u32 = 2;

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
    let place = tempfile::tempdir().unwrap(); // The names of sockets must be short.
    #[cfg(feature = "libvirt")]
    let daemon = chosen.contains(&Contender::Libvirt).then(|| daemon::Daemon::start(place.path()));
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
    let of = |wanted| {
        results.iter().find(|(contender, _)| *contender == wanted).map(|(_, figures)| whole(figures))
    };
    for (contender, figures) in &results {
        let whole = whole(figures);
        let ratios = [Contender::Floor, Contender::Qemu].into_iter().filter(|it| it != contender);
        let ratios: String =
            ratios.filter_map(|it| Some(format!("   {:.2} × {}", whole / of(it)?, it.name()))).collect();
        println!("  {:8}{whole:6.1} s{ratios}", contender.name());
        for (place, (what, unit, _)) in figures[0].parts.iter().enumerate() {
            let part = median(figures.iter().map(|one| one.parts[place].2));
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

/// The state that all runs share.
struct Bench {
    /// The directory of all files that are written; removed at the end.
    dir: tempfile::TempDir,
    image: PathBuf,
    build: PathBuf,
    kvm: bool,
}

impl Bench {
    fn prepare() -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let image = root.join("target/guests/debian-12.qcow2");
        assert!(image.exists(), "this bench needs {}: make guests", image.display());
        // …/target/release/deps/whole_build-…
        let program = std::env::current_exe().unwrap();
        let build = program.ancestors().nth(2).unwrap().join("examples/build");
        assert!(
            build.exists(),
            "this bench needs {}: cargo build --release --features libvirt --example build",
            build.display()
        );
        let dir = tempfile::Builder::new().prefix("bench.").tempdir_in(root.join("target")).unwrap();
        let bench = Self { dir, image, build, kvm: kvm() };
        run(Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(bench.path("key")));
        bench.make_seed();
        fs::write(bench.path("manifest.yaml"), bench.manifest()).unwrap();
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn machine(&self) -> String {
        let version = Command::new("qemu-system-x86_64").arg("--version").output().unwrap().stdout;
        let version = String::from_utf8_lossy(&version).lines().next().unwrap_or_default().to_owned();
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        format!("{version}, {}, {cores} cores", if self.kvm { "KVM" } else { "TCG" })
    }

    fn manifest(&self) -> String {
        format!(
            "name: bench\nvms:\n  - name: debian\n    source: {{url: 'file://{}'}}\n    resources: {{cpu: {CPUS}, memory: {MEMORY_MIB}Mi}}\n    \
             disks: [{{name: rootdisk, size: {DISK}i}}]\n    communicator: {{sshUsername: debian, sshTimeout: 10m}}\n    cloudInit: {{}}\n    \
             provisioners:\n      - {{type: shell, shell: {{inline: '{STEP}'}}}}\n",
            self.image.display()
        )
    }

    /// Makes the seed of the floor and of Packer, equivalent to the one that Rudder makes.
    fn make_seed(&self) {
        let key = fs::read_to_string(self.path("key.pub")).unwrap();
        fs::write(self.path("meta-data"), "instance-id: bench\nlocal-hostname: debian\n").unwrap();
        fs::write(
            self.path("user-data"),
            format!("#cloud-config\nssh_authorized_keys:\n  - {}\n", key.trim()),
        )
        .unwrap();
        let seed = self.path("seed.img");
        fs::File::create(&seed).unwrap().set_len(1440 << 10).unwrap();
        run(Command::new("/usr/sbin/mkfs.vfat").args(["-n", "CIDATA"]).arg(&seed));
        run(Command::new("mcopy")
            .arg("-i")
            .arg(&seed)
            .arg(self.path("meta-data"))
            .arg(self.path("user-data"))
            .arg("::"));
    }

    /// Returns the accelerator options that every contender gets: those that Rudder chooses by itself.
    fn accelerator(&self) -> [&'static str; 4] {
        if self.kvm {
            ["-accel", "kvm", "-cpu", "host"]
        } else {
            ["-accel", "tcg,thread=multi", "-cpu", "max"]
        }
    }

    fn convert_flags(&self) -> Vec<String> {
        let jobs = std::thread::available_parallelism().map_or(2, usize::from).clamp(2, 16).to_string();
        ["-c", "-W", "-m", &jobs, "-o", "compression_type=zstd"].map(str::to_owned).to_vec()
    }

    fn floor(&self) -> Figures {
        let disk = self.path("floor.qcow2");
        let start = Instant::now();
        run(Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"])
            .arg(&self.image)
            .arg(&disk)
            .arg(DISK));
        let port = free_port();
        let mut qemu = Process::start(
            Command::new("qemu-system-x86_64")
                .args([
                    "-nodefaults",
                    "-display",
                    "none",
                    "-machine",
                    "pc,usb=off",
                    "-m",
                    &MEMORY_MIB.to_string(),
                ])
                .args(self.accelerator())
                .args([
                    "-smp",
                    &CPUS.to_string(),
                    "-vga",
                    "std",
                    "-device",
                    "pvpanic",
                    "-device",
                    "virtio-rng-pci",
                ])
                .arg("-serial")
                .arg(format!("file:{}", self.path("floor.log").display()))
                .arg("-drive")
                .arg(format!(
                    "if=virtio,file={},cache=unsafe,discard=unmap,detect-zeroes=unmap",
                    disk.display()
                ))
                .arg("-drive")
                .arg(format!("if=virtio,format=raw,readonly=on,file={}", self.path("seed.img").display()))
                .args(["-netdev", &format!("user,id=n0,hostfwd=tcp:127.0.0.1:{port}-:22")])
                .args(["-device", "e1000,netdev=n0"]),
        );
        await_banner(port, &mut qemu);
        let login = start.elapsed();
        // The guest may cut the connection before it sends the exit code; what counts is that it powers off.
        let _ = Command::new("ssh")
            .args([
                "-F",
                "none",
                "-q",
                "-o",
                "StrictHostKeyChecking=no",
                "-o",
                "UserKnownHostsFile=/dev/null",
            ])
            .args(["-o", "BatchMode=yes", "-o", "ConnectTimeout=60", "-p", &port.to_string(), "-i"])
            .arg(self.path("key"))
            .args(["debian@127.0.0.1", &format!("{STEP} && sudo systemctl poweroff")])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .status()
            .unwrap();
        // A failed login leaves the guest running, and then there is nothing to measure.
        while qemu.0.try_wait().unwrap().is_none() {
            assert!(start.elapsed() < Duration::from_secs(900), "the guest of the floor did not power off");
            std::thread::sleep(Duration::from_millis(10));
        }
        let off = start.elapsed();
        let convert = self.convert();
        let whole = start.elapsed().as_secs_f64();
        let parts = vec![
            ("greets after", "s", login.as_secs_f64()),
            ("login to off", "s", (off - login).as_secs_f64()),
            ("convert", "s", convert),
        ];
        Figures { whole, parts }
    }

    /// Measures how many seconds `qemu-img convert` takes for the disk of the floor's last run.
    fn convert(&self) -> f64 {
        let start = Instant::now();
        run(Command::new("qemu-img")
            .args(["convert", "-f", "qcow2", "-O", "qcow2"])
            .args(self.convert_flags())
            .arg(self.path("floor.qcow2"))
            .arg(self.path("converted.qcow2")));
        let took = start.elapsed().as_secs_f64();
        fs::remove_file(self.path("converted.qcow2")).unwrap();
        took
    }

    /// Runs the build example on one of its backends; `uri` is that of libvirt.
    fn rudder(&self, contender: Contender, uri: &str, run: &str) -> Figures {
        let backend = contender.name();
        let start = Instant::now();
        let mut child = Process::start(
            Command::new(&self.build)
                .args(["--backend", backend, "--events", "json", "--store"])
                .arg(self.path(&format!("store-{backend}")))
                .arg(self.path("manifest.yaml"))
                .stdout(Stdio::piped())
                .env("LIBVIRT_DEFAULT_URI", uri)
                .stderr(fs::File::create(self.path("rudder.log")).unwrap()),
        );
        let output = child.0.stdout.take().unwrap();
        let reader = std::thread::spawn(move || read_to_string(output).unwrap_or_default());
        // The figures of a process are gone once it has ended, so they are read until it does.
        let (mut peak_mib, mut cpu) = (0.0, 0.0);
        let status = loop {
            if let Some((memory, time)) = own_use(child.0.id()) {
                (peak_mib, cpu) = (memory, time);
            }
            if let Some(status) = child.0.try_wait().unwrap() {
                break status;
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        let whole = start.elapsed().as_secs_f64();
        let log = reader.join().unwrap();
        assert!(
            status.success(),
            "run {run} of the build example on {backend} failed ({status}):\n{}\n{log}",
            fs::read_to_string(self.path("rudder.log")).unwrap_or_default()
        );
        Figures { whole, parts: vec![("own peak of memory", "MiB", peak_mib), ("own CPU time", "s", cpu)] }
    }

    fn packer(&self) -> f64 {
        let output = self.path("packer");
        let _ = fs::remove_dir_all(&output);
        let [_, accelerator, _, cpu] = self.accelerator();
        let template = serde_json::json!({"builders": [{
            "type": "qemu",
            "accelerator": accelerator.split(',').next(),
            "machine_type": "pc",
            "cpus": CPUS,
            "memory": MEMORY_MIB,
            "headless": true,
            "disk_image": true,
            "iso_url": self.image,
            "iso_checksum": "none",
            "disk_size": DISK,
            "disk_compression": true,
            "format": "qcow2",
            "vm_name": "disk.qcow2",
            "output_directory": output,
            "net_device": "e1000",
            "boot_wait": "0s",
            "communicator": "ssh",
            "ssh_username": "debian",
            "ssh_private_key_file": self.path("key"),
            "ssh_timeout": "10m",
            "shutdown_command": "sudo systemctl poweroff",
            // Drives that are given here replace Packer's own.
            "qemuargs": [
                ["-cpu", cpu],
                // By default Packer opens the port to the whole network.
                ["-netdev", "user,id=user.0,hostfwd=tcp:127.0.0.1:{{ .SSHHostPort }}-:22"],
                ["-drive", format!("if=virtio,format=qcow2,cache=unsafe,discard=unmap,file={}", output.join("disk.qcow2").display())],
                ["-drive", format!("if=virtio,format=raw,readonly=on,file={}", self.path("seed.img").display())],
            ],
        }], "provisioners": [{"type": "shell", "inline": [STEP]}]});
        fs::write(self.path("packer.json"), template.to_string()).unwrap();
        let start = Instant::now();
        run(Command::new("packer")
            .args(["build", "-color=false"])
            .arg(self.path("packer.json"))
            .env("PACKER_CACHE_DIR", self.path("packer-cache"))
            .env("CHECKPOINT_DISABLE", "1") // No calls to its maker.
            .env("HOME", self.dir.path()));
        start.elapsed().as_secs_f64()
    }
}

/// A process that does not outlive the bench.
struct Process(Child);

impl Process {
    fn start(command: &mut Command) -> Self {
        Self(
            command
                .stdin(Stdio::null())
                .spawn()
                .unwrap_or_else(|error| panic!("cannot run {command:?}: {error}")),
        )
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !matches!(self.0.try_wait(), Ok(Some(_))) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }
}

/// Runs a command to completion, and shows its output if it failed.
fn run(command: &mut Command) {
    let output = command
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|error| panic!("cannot run {command:?}: {error}"));
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Returns whether an ordinary guest can run on KVM here: the device exists, and the processor supports it (see
/// `docs/design.md`).
fn kvm() -> bool {
    let flags = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let able = flags.split_ascii_whitespace().any(|flag| flag == "vmx" || flag == "svm");
    able && fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok()
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Waits for the banner of an SSH server on this port. The forwarded port accepts a connection before the guest does,
/// and one that was made too early may stay silent for long, so there are always several connections of different ages.
fn await_banner(port: u16, qemu: &mut Process) {
    let mut streams = VecDeque::<(Instant, TcpStream)>::new();
    loop {
        // Without hardware acceleration, an SSH server may need seconds until it greets.
        streams.retain(|(start, _)| start.elapsed() < Duration::from_secs(5));
        if streams.len() < 8
            && let Ok(stream) = TcpStream::connect(("127.0.0.1", port))
        {
            stream.set_nonblocking(true).unwrap();
            streams.push_back((Instant::now(), stream));
        }
        for _ in 0..20 {
            let mut banner = [0; 4];
            if streams.iter_mut().any(|(_, stream)| stream.read(&mut banner).is_ok_and(|length| length > 0)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(25));
        }
        assert!(matches!(qemu.0.try_wait(), Ok(None)), "the guest of the floor ended before it answered");
    }
}

/// Returns the peak memory of a process in MiB and its CPU time in seconds, both without its children (proc(5)).
fn own_use(pid: u32) -> Option<(f64, f64)> {
    const TICKS: f64 = 100.0; // USER_HZ, which is 100 on x86-64.
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let peak: f64 = peak.trim().strip_suffix("kB")?.trim().parse().ok()?;
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    let user: f64 = fields.nth(11)?.parse().ok()?;
    let system: f64 = fields.next()?.parse().ok()?;
    Some((peak / 1024.0, (user + system) / TICKS))
}
