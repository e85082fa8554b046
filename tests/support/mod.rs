//! Shared by the whole-build tests: guests, the `build` example as a user runs it, and the check for leftovers.
#![allow(dead_code, clippy::unwrap_used, clippy::print_stderr, unreachable_pub)]

pub mod alike;
pub mod http;
pub mod install;
pub mod rescue;
pub mod typing;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::{
    collections::BTreeSet,
    fs,
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, mpsc},
    thread,
    time::{Duration, Instant},
};

/// Longer than any build of these tests takes, on any machine that they are meant for.
const PATIENCE: Duration = Duration::from_secs(1800);

/// Returns the image of the tiny guest as a `file:` URL. Made by `make guests`.
pub fn tiny() -> String {
    guest("tiny.qcow2")
}

/// Returns the image of the Debian guest as a `file:` URL. Made by `make guests`.
pub fn debian() -> String {
    guest("debian-12.qcow2")
}

fn guest(file: &str) -> String {
    let path = guest_path(file);
    format!("file://{}", path.display())
}

/// Returns the path of a guest image.
pub fn guest_path(file: &str) -> PathBuf {
    let directory = std::env::var_os("RUDDER_GUESTS")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("target/guests"), PathBuf::from);
    let path = directory.join(file);
    assert!(path.is_file(), "{} is missing: run `make guests`", path.display());
    path
}

/// Returns the path of a program of `examples/`, which cargo builds before it runs the tests.
pub fn example(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let path = test.parent().unwrap().parent().unwrap().join("examples").join(name);
    assert!(
        path.is_file(),
        "{} is missing: run the tests with `cargo test`, which builds examples",
        path.display()
    );
    path
}

/// A directory for one test, with a store in it; checked for leftovers when the test asks for it.
pub struct Bench {
    root: tempfile::TempDir,
}

impl Bench {
    pub fn new() -> Self {
        Self { root: tempfile::Builder::new().prefix("rudder-test-").tempdir().unwrap() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    pub fn store(&self) -> PathBuf {
        self.path("store")
    }

    /// Writes a file and returns its path.
    pub fn write(&self, name: &str, content: &str) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, content).unwrap();
        path
    }

    /// Returns the command `build --store STORE --events json MANIFEST`, not yet started.
    pub fn command(&self, manifest: &str) -> Command {
        let mut command = Command::new(example("build"));
        let file = self.write("manifest.yaml", manifest);
        command.arg("--store").arg(self.store()).args(["--events", "json"]).arg(file);
        command.current_dir(self.root.path()).env("TMPDIR", self.tmp()).stdin(Stdio::null());
        command
    }

    /// Returns the directory in which the programs under test put temporary files, so that the test can see what is
    /// left.
    pub fn tmp(&self) -> PathBuf {
        let tmp = self.path("tmp");
        fs::create_dir_all(&tmp).unwrap();
        tmp
    }

    /// Builds a manifest to completion.
    pub fn build(&self, manifest: &str) -> Ended {
        Running::start(self.command(manifest)).end()
    }

    /// Builds a manifest, which must succeed; returns its `module.json`.
    pub fn built(&self, manifest: &str) -> Value {
        let ended = self.build(manifest);
        ended.expect_code(0);
        let path = ended.stdout.lines().last().unwrap().to_owned();
        serde_json::from_slice(&fs::read(&path).unwrap_or_else(|error| panic!("{path}: {error}"))).unwrap()
    }

    /// Runs an example with `--store`, and returns what it printed.
    pub fn run(&self, program: &str, args: &[&str]) -> (i32, String, String) {
        let output = Command::new(example(program))
            .arg("--store")
            .arg(self.store())
            .args(args)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        (
            output.status.code().unwrap_or(-1),
            String::from_utf8_lossy(&output.stdout).into_owned(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        )
    }

    /// Returns everything in this bench that a finished or failed build must not leave behind: processes, labs,
    /// sockets, locks, partial and temporary files.
    pub fn leftovers(&self) -> Vec<String> {
        let mut left: Vec<String> = processes_naming(self.root.path())
            .into_iter()
            .map(|(pid, line)| format!("process {pid}: {line}"))
            .collect();
        let list = |directory: &Path| -> Vec<PathBuf> {
            fs::read_dir(directory)
                .map(|entries| entries.map(|entry| entry.unwrap().path()).collect())
                .unwrap_or_default()
        };
        left.extend(list(&self.store().join("labs")).iter().map(|path| format!("lab {}", path.display())));
        left.extend(list(&self.tmp()).iter().map(|path| format!("temporary file {}", path.display())));
        for file in walk(self.root.path()) {
            let name = file.file_name().unwrap().to_string_lossy().into_owned();
            let kind = file.symlink_metadata().unwrap().file_type();
            if std::os::unix::fs::FileTypeExt::is_socket(&kind) {
                left.push(format!("socket {}", file.display()));
            }
            if name.ends_with(".partial") || name.ends_with(".tmp") || name.starts_with(".tmp") {
                left.push(format!("partial file {}", file.display()));
            }
        }
        let inodes: BTreeSet<u64> = walk(self.root.path())
            .iter()
            .filter_map(|file| file.metadata().ok())
            .map(|metadata| std::os::unix::fs::MetadataExt::ino(&metadata))
            .collect();
        let locks = fs::read_to_string("/proc/locks").unwrap();
        for lock in locks.lines() {
            let inode = lock
                .split_whitespace()
                .find_map(|word| word.rsplit_once(':').filter(|(dev, _)| dev.contains(':')));
            if inode.is_some_and(|(_, inode)| inode.parse().is_ok_and(|inode: u64| inodes.contains(&inode))) {
                left.push(format!("lock {lock}"));
            }
        }
        left
    }

    /// Fails if anything is left.
    #[track_caller]
    pub fn expect_clean(&self) {
        let left = self.leftovers();
        assert!(left.is_empty(), "left behind:\n  {}", left.join("\n  "));
    }

    /// Waits until no process of this bench runs, for at most `limit`.
    #[track_caller]
    pub fn expect_no_process_within(&self, limit: Duration) {
        let deadline = Instant::now() + limit;
        loop {
            let left = processes_naming(self.root.path());
            if left.is_empty() {
                return;
            }
            assert!(Instant::now() < deadline, "still running after {limit:?}: {left:?}");
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// Returns the QEMU processes of this bench.
    pub fn machines(&self) -> Vec<i32> {
        processes_naming(self.root.path())
            .into_iter()
            .filter(|(pid, _)| {
                let exe = fs::read_link(format!("/proc/{pid}/exe"));
                exe.is_ok_and(|exe| exe.to_string_lossy().contains("qemu-system"))
            })
            .map(|(pid, _)| pid)
            .collect()
    }
}

/// Kills machines that a failed test left running.
impl Drop for Bench {
    fn drop(&mut self) {
        for pid in self.machines() {
            let _ = kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL);
        }
    }
}

/// Returns all files, directories and sockets below a directory.
pub fn walk(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.extend(walk(&path));
        }
        found.push(path);
    }
    found
}

/// Returns the running processes whose command line, working directory or open files name a path.
pub fn processes_naming(path: &Path) -> Vec<(i32, String)> {
    let path = path.to_string_lossy();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<i32>() else { continue };
        if pid == i32::try_from(std::process::id()).unwrap() {
            continue;
        }
        let Ok(line) = fs::read(entry.path().join("cmdline")) else { continue };
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        let zombie = fs::read_to_string(entry.path().join("stat")).is_ok_and(|stat| {
            stat.rsplit_once(')').is_some_and(|(_, rest)| rest.trim_start().starts_with('Z'))
        });
        let cwd = fs::read_link(entry.path().join("cwd")).unwrap_or_default();
        if !zombie && (line.contains(&*path) || cwd.to_string_lossy().contains(&*path)) {
            found.push((pid, line));
        }
    }
    found
}

/// A running build.
pub struct Running {
    child: Child,
    events: mpsc::Receiver<String>,
    stderr: Option<thread::JoinHandle<()>>,
    said: Arc<Mutex<String>>,
    seen: Vec<String>,
}

/// Ends a build that a failed test left running.
impl Drop for Running {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// A build that has ended.
#[derive(Debug)]
pub struct Ended {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
    pub events: Vec<Value>,
}

impl Running {
    pub fn start(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let errors = BufReader::new(child.stderr.take().unwrap());
        let (send, events) = mpsc::channel();
        thread::spawn(move || stdout.lines().map_while(Result::ok).try_for_each(|line| send.send(line)));
        let said = Arc::new(Mutex::new(String::new()));
        let text = Arc::clone(&said);
        let stderr = Some(thread::spawn(move || {
            for line in errors.split(b'\n').map_while(Result::ok) {
                let mut text = text.lock().unwrap();
                text.push_str(&String::from_utf8_lossy(&line));
                text.push('\n');
            }
        }));
        Self { child, events, stderr, said, seen: Vec::new() }
    }

    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap()
    }

    /// Reads events until one satisfies the condition; fails if the build ends first.
    #[track_caller]
    pub fn until(&mut self, what: &str, mut wanted: impl FnMut(&Value) -> bool) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let Ok(line) = self.events.recv_timeout(deadline.saturating_duration_since(Instant::now()))
            else {
                let _ = self.child.kill();
                panic!("the build ended, or said nothing, before {what}; it said:\n{}", self.seen.join("\n"));
            };
            self.seen.push(line.clone());
            if let Ok(event) = serde_json::from_str::<Value>(&line)
                && wanted(&event)
            {
                return event;
            }
        }
    }

    /// Reads events until a VM or the build enters a phase.
    #[track_caller]
    pub fn until_phase(&mut self, phase: &str) -> Value {
        self.until(&format!("phase {phase}"), |event| event["phase"] == phase)
    }

    /// Reads events until a step writes a line that contains a text.
    #[track_caller]
    pub fn until_output(&mut self, text: &str) -> Value {
        self.until(&format!("output {text:?}"), |event| {
            event["event"] == "step_output" && event["line"].as_str().is_some_and(|line| line.contains(text))
        })
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_raw(self.pid()).unwrap(), signal).unwrap();
    }

    /// Waits until the messages for people contain a text; returns the rest of that line.
    #[track_caller]
    pub fn until_printed(&self, text: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let said = self.said.lock().unwrap().clone();
            let rest = said.split_once(text).map(|(_, rest)| rest);
            if let Some((line, _)) = rest.and_then(|rest| rest.split_once('\n')) {
                return line.to_owned();
            }
            assert!(
                Instant::now() < deadline,
                "expected {text:?} in what a person reads, but found:\n{said}"
            );
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Presses Enter, if standard input is a pipe.
    #[track_caller]
    pub fn press_enter(&mut self) {
        self.child.stdin.as_mut().expect("standard input is a pipe").write_all(b"\n").unwrap();
    }

    /// Closes standard input, if it is a pipe.
    pub fn close_input(&mut self) {
        drop(self.child.stdin.take());
    }

    /// Waits until the build has ended.
    #[track_caller]
    pub fn end(mut self) -> Ended {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.events.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => self.seen.push(line),
                Err(mpsc::RecvTimeoutError::Disconnected) => break,
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    let _ = self.child.kill();
                    panic!("the build did not end; it said:\n{}", self.seen.join("\n"));
                }
            }
        }
        let status = self.child.wait().unwrap();
        let events = self.seen.iter().filter_map(|line| serde_json::from_str(line).ok()).collect();
        let code = status.code().unwrap_or(-1);
        self.stderr.take().unwrap().join().unwrap();
        let stderr = self.said.lock().unwrap().clone();
        Ended { code, stdout: self.seen.join("\n"), stderr, events }
    }
}

impl Ended {
    #[track_caller]
    pub fn expect_code(&self, code: i32) -> &Self {
        assert_eq!(self.code, code, "exit code; events:\n{}\nstandard error:\n{}", self.stdout, self.stderr);
        self
    }

    /// Asserts that the messages for people contain all of these texts.
    #[track_caller]
    pub fn expect_text(&self, texts: &[&str]) -> &Self {
        for text in texts {
            assert!(
                self.stderr.contains(text),
                "expected {text:?} in what a person reads, but found:\n{}",
                self.stderr
            );
        }
        self
    }

    /// Returns the last event.
    #[track_caller]
    pub fn outcome(&self) -> &Value {
        let last = self.events.last().expect("at least one event");
        assert_eq!(last["event"], "finished", "the last event; all:\n{}", self.stdout);
        &last["outcome"]
    }

    /// Returns the first event that satisfies a condition.
    pub fn event(&self, wanted: impl Fn(&Value) -> bool) -> Option<&Value> {
        self.events.iter().find(|event| wanted(event))
    }
}

/// Returns a manifest of one tiny VM with these provisioners (YAML list items, each line verbatim).
pub fn tiny_manifest(name: &str, provisioners: &str) -> String {
    one_vm(name, &format!("{{url: '{}'}}", tiny()), provisioners)
}

/// Returns a manifest of one VM with this source and these provisioners.
pub fn one_vm(name: &str, source: &str, provisioners: &str) -> String {
    let steps: String = provisioners.lines().map(|line| format!("      {line}\n")).collect();
    let steps = if steps.is_empty() { String::new() } else { format!("    provisioners:\n{steps}") };
    format!(
        "name: {name}\nvms:\n  - name: vm\n    source: {source}\n    resources: {{cpu: 1, memory: 256Mi}}\n    cloudInit: {{}}\n    \
         communicator: {{sshTimeout: 3m}}\n{steps}"
    )
}
