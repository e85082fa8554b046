//! Child processes: this test program run again, performing one task on a store until it is killed or done.

use super::*;
use rudder_core::backend::Retention;
use std::{
    env,
    io::{BufRead, BufReader, Write},
    process::{self, ChildStdout, Command, Stdio},
};

const STORE: &str = "RUDDER_TEST_STORE";
const TASK: &str = "RUDDER_TEST_TASK";

/// A child process; killed on drop.
pub(super) struct Child {
    process: process::Child,
    lines: std::io::Lines<BufReader<ChildStdout>>,
}

impl Child {
    pub(super) fn download(store: &Path, url: &url::Url) -> Self {
        Self::start(store, &format!("download {url}"))
    }

    pub(super) fn start(store: &Path, task: &str) -> Self {
        Self::start_in(store, task, &[])
    }

    /// Starts a child with this umask, which removes permissions from new files and directories.
    pub(super) fn start_with_umask(store: &Path, task: &str, umask: &str) -> Self {
        let mut command = Command::new("sh");
        command.args(["-c", &format!("umask {umask}; exec \"$0\" \"$@\"")]).arg(env::current_exe().unwrap());
        Self::start_as(command, store, task, &[])
    }

    /// Starts a child with additional environment variables.
    pub(super) fn start_in(store: &Path, task: &str, variables: &[(&str, &str)]) -> Self {
        Self::start_as(Command::new(env::current_exe().unwrap()), store, task, variables)
    }

    fn start_as(mut command: Command, store: &Path, task: &str, variables: &[(&str, &str)]) -> Self {
        let mut process = command
            .args(["--exact", "store::tests::child::as_a_child", "--nocapture", "--test-threads=1"])
            .env(STORE, store)
            .env(TASK, task)
            .env_remove("NO_PROXY")
            .env_remove("no_proxy")
            .envs(variables.iter().copied())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(process.stdout.take().unwrap()).lines();
        Self { process, lines }
    }

    /// Reads its output until a line contains this text; returns the line.
    pub(super) fn wait_for(&mut self, text: &str) -> String {
        let mut seen = Vec::new();
        for line in self.lines.by_ref() {
            let line = line.unwrap();
            if line.contains(text) {
                return line;
            }
            seen.push(line);
        }
        panic!("the child ended without saying {text:?}; it said {seen:#?}");
    }

    /// Waits until a condition holds; the child must live until then.
    pub(super) fn wait_until(&mut self, so: impl Fn() -> bool) {
        while !so() {
            assert!(self.process.try_wait().unwrap().is_none(), "the child ended");
            std::thread::yield_now();
        }
    }

    /// Kills it with SIGKILL.
    pub(super) fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn say(line: impl std::fmt::Display) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "\n{line}").unwrap();
    out.flush().unwrap();
}

/// Returns the peak memory use of this process so far, in KiB (proc(5), `VmHWM`).
fn peak_memory() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_ascii_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Runs the task of a child. Without a task this is the parent's own test run, and there is nothing to do.
#[tokio::test]
#[allow(clippy::zombie_processes, reason = "it is killed while its children run: that is what is tested")]
async fn as_a_child() {
    let (Ok(task), Some(root)) = (env::var(TASK), env::var_os(STORE)) else { return };
    let store = open(Path::new(&root));
    let (what, argument) = task.split_once(' ').unwrap();
    match what {
        "download" => {
            let progress = Progress::new(|event| match event {
                ProgressEvent::Bytes { done, .. } => say(format_args!("bytes {done}")),
                ProgressEvent::Notice(text) => say(format_args!("notice {text}")),
                other => panic!("{other:?}"),
            });
            // Longer than a test waits for its server.
            let options = StoreOptions { stall_timeout: Duration::from_secs(600), ..StoreOptions::default() };
            let store = Store::open_with(store.root(), options).unwrap();
            let image = store.image(&planned(&argument.parse().unwrap(), None), &progress).await.unwrap();
            say(format_args!("done {}", image.path.display()));
        }
        "measure" => {
            // Includes everything that is set up only once, before the first measurement.
            store.client().unwrap();
            let before = peak_memory();
            store.image(&planned(&argument.parse().unwrap(), None), &Progress::none()).await.unwrap();
            say(format_args!("grew by {}", peak_memory() - before));
        }
        "lab" => {
            let id = rudder_core::backend::LabId::new(argument);
            let lab = store.create_lab(&id, argument, Retention::EndWithOwner).unwrap();
            let process = Command::new("sleep").arg("600").env(LAB_VARIABLE, id.as_str()).spawn().unwrap();
            lab.record_process(process.id(), "sleeper").unwrap();
            // Its owner is killed before it can record this one.
            let unrecorded = Command::new("sleep").arg("600").env(LAB_VARIABLE, id.as_str()).spawn().unwrap();
            say(format_args!("lab {id} {} {}", process.id(), unrecorded.id()));
            std::future::pending::<()>().await;
        }
        "publish-once" => {
            collect::publish(&store, argument, b"once").await.unwrap();
            say("published");
        }
        "publish" => {
            for round in 0u64.. {
                collect::publish(&store, argument, &round.to_le_bytes().repeat(10_000)).await.unwrap();
                say(format_args!("published {round}"));
            }
        }
        _ => panic!("what is {what}?"),
    }
}
