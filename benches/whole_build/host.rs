//! Processes of this host, and what it reports about them.

use std::{
    collections::VecDeque,
    fs,
    io::Read as _,
    net::{TcpListener, TcpStream},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

/// A process that does not outlive the bench.
pub(super) struct Process(pub(super) Child);

impl Process {
    pub(super) fn start(command: &mut Command) -> Self {
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
pub(super) fn run(command: &mut Command) {
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
/// `docs/backends.md`).
pub(super) fn kvm() -> bool {
    let flags = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let able = flags.split_ascii_whitespace().any(|flag| flag == "vmx" || flag == "svm");
    able && fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok()
}

pub(super) fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Waits for the banner of an SSH server on this port. The forwarded port accepts a connection before the guest does,
/// and one that was made too early may stay silent for long, so there are always several connections of different ages.
pub(super) fn await_banner(port: u16, qemu: &mut Process) {
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
pub(super) fn own_use(pid: u32) -> Option<(f64, f64)> {
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
