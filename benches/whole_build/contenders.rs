//! The builds that are compared, and what they share.

use super::{
    Contender, Figures,
    host::{Process, await_banner, free_port, kvm, own_use, run},
};
use std::{
    fs,
    io::read_to_string,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

const STEP: &str = "echo built | sudo tee /etc/built";
const DISK: &str = "4G";
const MEMORY_MIB: u32 = 1024;
const CPUS: u32 = 2;

/// The state that all runs share.
pub(super) struct Bench {
    /// The directory of all files that are written; removed at the end.
    dir: tempfile::TempDir,
    image: PathBuf,
    build: PathBuf,
    kvm: bool,
}

impl Bench {
    pub(super) fn prepare() -> Self {
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

    pub(super) fn machine(&self) -> String {
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

    pub(super) fn floor(&self) -> Figures {
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
    pub(super) fn rudder(&self, contender: Contender, uri: &str, run: &str) -> Figures {
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

    pub(super) fn packer(&self) -> f64 {
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
