//! Programs of the host: finding them, starting them so that they end with their owner, and running them to completion.
//!
//! The kernel can kill a child when its parent dies (`PR_SET_PDEATHSIG`, prctl(2)), but it treats the *thread* that
//! forked as the parent. So all children are started by one thread that lives as long as the library, never by a thread of
//! a runtime, and through setpriv(1), which performs the system call without unsafe code of ours.

use rudder_core::{Error, ErrorKind, Result};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::{
    ffi::OsString,
    fs::File,
    io,
    os::{fd::OwnedFd, unix::process::ExitStatusExt},
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    sync::{
        Arc, LazyLock,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
};
use tokio::{
    io::{AsyncRead, AsyncReadExt},
    net::unix::pipe,
    process::{Child, ChildStderr, ChildStdin, ChildStdout, Command},
    runtime::Handle,
    sync::oneshot,
};

/// Number of bytes of a program's output that are kept.
const KEPT_OUTPUT: u64 = 1 << 20;

/// What ends a process, apart from itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Lifetime {
    /// The death of its owner, however the owner dies, if this program (setpriv) exists to set that up;
    /// and dropping its handle.
    WithOwner(Option<PathBuf>),
    /// Dropping its handle, but not the death of its owner.
    Kept,
}

/// Escapes a value in a QEMU option: commas are doubled (qemu(1), "-drive"), and nothing else is special.
#[must_use]
pub fn escape(value: &str) -> String {
    value.replace(',', ",,")
}

/// A program with its arguments.
#[derive(Debug)]
pub struct Invocation {
    /// Its path.
    pub program: PathBuf,
    /// Its arguments, passed verbatim.
    pub args: Vec<OsString>,
    /// The working directory.
    pub directory: Option<PathBuf>,
    /// Variables added to its environment.
    pub variables: Vec<(&'static str, OsString)>,
    /// What ends it.
    pub lifetime: Lifetime,
}

impl Invocation {
    /// Returns an invocation without arguments.
    #[must_use]
    pub fn new(program: &Path, lifetime: Lifetime) -> Self {
        Self {
            program: program.to_owned(),
            args: Vec::new(),
            directory: None,
            variables: Vec::new(),
            lifetime,
        }
    }

    /// Adds a variable to its environment.
    #[must_use]
    pub fn variable(mut self, name: &'static str, value: impl Into<OsString>) -> Self {
        self.variables.push((name, value.into()));
        self
    }

    /// Sets the working directory.
    #[must_use]
    pub fn directory(mut self, directory: &Path) -> Self {
        self.directory = Some(directory.to_owned());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<I: IntoIterator<Item: Into<OsString>>>(mut self, args: I) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Returns its name, for messages.
    pub fn name(&self) -> String {
        self.program.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned())
    }

    fn command(&self) -> Command {
        let mut command = match &self.lifetime {
            Lifetime::WithOwner(Some(setpriv)) => {
                let mut command = Command::new(setpriv);
                command.args(["--pdeathsig", "KILL", "--"]).arg(&self.program);
                command
            }
            Lifetime::WithOwner(None) | Lifetime::Kept => Command::new(&self.program),
        };
        command.args(&self.args);
        // Its messages are parsed here, so they must be in one language, whatever the user's is.
        command.env("LC_ALL", "C").envs(self.variables.iter().map(|(name, value)| (name, value)));
        // Ctrl-C in the terminal is for the owner, which then ends its children in order.
        command.process_group(0);
        if let Some(directory) = &self.directory {
            command.current_dir(directory);
        }
        command
    }

    /// Starts the program.
    pub async fn spawn(self, stdin: Stdio, stdout: Stdio, stderr: Stdio) -> Result<OwnedChild> {
        let mut command = self.command();
        command.stdin(stdin).stdout(stdout).stderr(stderr);
        let failed = |error: io::Error| {
            let kind = match error.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied => ErrorKind::HostMissing,
                _ => ErrorKind::LaunchFailed,
            };
            Error::new(kind, format!("cannot start {}", self.program.display())).with_source(error)
        };
        let (reply, answer) = oneshot::channel();
        let job = Job { command, runtime: Handle::current(), reply };
        let starter = STARTER.as_ref().map_err(|kind| failed((*kind).into()))?;
        starter.send(job).map_err(|_| failed(io::ErrorKind::BrokenPipe.into()))?;
        answer.await.map_err(|_| failed(io::ErrorKind::BrokenPipe.into()))?.map_err(failed)
    }

    /// Runs it to completion with this input; dropping the future kills it.
    pub async fn run(self, input: Option<&[u8]>) -> Result<Finished> {
        self.run_watched(input, |_| {}).await
    }

    /// Runs it like [`run`](Self::run), and calls a function with every piece of its standard output.
    pub async fn run_watched(
        self,
        input: Option<&[u8]>,
        mut visit: impl FnMut(&[u8]) + Send,
    ) -> Result<Finished> {
        let name = self.name();
        let failed = |error| Error::io(format_args!("communicate with {name}"), error);
        let stdin = if input.is_some() { Stdio::piped() } else { Stdio::null() };
        let mut child = self.spawn(stdin, Stdio::piped(), Stdio::piped()).await?;
        let (stdin, stdout, stderr) = child.streams();
        let write = async {
            if let (Some(mut stdin), Some(input)) = (stdin, input) {
                use tokio::io::AsyncWriteExt;
                // A program that does not read all its input reports why in its status.
                let _ = stdin.write_all(input).await;
            }
            Ok(())
        };
        let ((), stdout, stderr) =
            tokio::try_join!(write, read(stdout, &mut visit), read(stderr, |_| {})).map_err(failed)?;
        let status = child.wait().await.map_err(failed)?;
        Ok(Finished { name, status, stdout, stderr })
    }
}

/// Reads to the end, keeping the first [`KEPT_OUTPUT`] bytes.
async fn read(stream: Option<impl AsyncRead + Unpin>, mut visit: impl FnMut(&[u8])) -> io::Result<Vec<u8>> {
    let mut kept = Vec::new();
    let Some(mut stream) = stream else { return Ok(kept) };
    let mut buffer = [0; 4096];
    loop {
        let count = stream.read(&mut buffer).await?;
        if count == 0 {
            return Ok(kept);
        }
        visit(&buffer[..count]);
        if (kept.len() as u64) < KEPT_OUTPUT {
            kept.extend_from_slice(&buffer[..count]);
        }
    }
}

/// The result of a program that ran to completion.
#[derive(Debug)]
pub struct Finished {
    name: String,
    /// Its exit status.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error.
    pub stderr: Vec<u8>,
}

impl Finished {
    /// Returns itself on success, else its standard error as an error that begins with `what` ("create the overlay of disk x").
    pub fn success(self, what: &str) -> Result<Self> {
        if self.status.success() { Ok(self) } else { Err(self.failure(what)) }
    }

    /// Returns its standard error as an error.
    pub fn failure(&self, what: &str) -> Error {
        let output = without_advice(&String::from_utf8_lossy(&self.stderr));
        let output = output.trim();
        // strerror(3) in the C locale; qemu-img has no other way to report it.
        let full = output.contains("No space left on device") || output.contains("Disk quota exceeded");
        let kind = if full { ErrorKind::HostDiskFull } else { ErrorKind::Io };
        let output = if output.is_empty() { describe(self.status) } else { output.to_owned() };
        let error = Error::new(kind, format!("cannot {what}: {}: {output}", self.name));
        if full {
            error.with_help("free some space on the disk of the store, or use a store on a larger disk")
        } else {
            error
        }
    }
}

/// Removes advice from messages of QEMU's programs: they suggest repairing a file in place, but the files are
/// those of the store, which must never change.
#[must_use]
pub fn without_advice(output: &str) -> String {
    let advice = |line: &&str| {
        let line = line.to_ascii_lowercase();
        ["qemu-img check", "qemu-img amend", "qemu-img rebase", "-r all", "-r leaks", "to replay the log"]
            .iter()
            .any(|part| line.contains(part))
    };
    output.lines().filter(|line| !advice(line)).collect::<Vec<_>>().join("\n")
}

/// Describes how a process ended, for people.
pub fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exited with code {code}"),
        (None, Some(signal)) => match signal_name(signal) {
            Some(name) => format!("was ended by signal {signal} ({name})"),
            None => format!("was ended by signal {signal}"),
        },
        (None, None) => "ended".to_owned(),
    }
}

/// Returns the names of signals (signal(7)) that end processes in ways that need an explanation.
fn signal_name(signal: i32) -> Option<&'static str> {
    Some(match signal {
        1 => "SIGHUP",
        2 => "SIGINT",
        6 => "SIGABRT",
        7 => "SIGBUS",
        9 => "SIGKILL",
        11 => "SIGSEGV",
        15 => "SIGTERM",
        _ => return None,
    })
}

/// A process that is killed when dropped, unless it was released.
#[derive(Debug)]
pub struct OwnedChild {
    process: Process,
    released: Arc<AtomicBool>,
}

#[derive(Debug)]
enum Process {
    Child(Child),
    /// A process that this one did not start.
    Adopted {
        pid: u32,
        handle: OwnedFd,
        /// Another handle, for the runtime: a pidfd becomes readable when its process ends (pidfd_open(2)), and so does a pipe.
        end: pipe::Receiver,
    },
}

impl OwnedChild {
    fn new(child: Child) -> Self {
        Self { process: Process::Child(child), released: Arc::default() }
    }

    /// Adopts a process that another process started and that is not killed when this is dropped; `None` if it has ended.
    /// `is_same` returns whether the process with this ID is still the expected one.
    ///
    /// # Errors
    /// The process cannot be observed.
    pub fn adopt(pid: u32, is_same: impl FnOnce() -> bool) -> io::Result<Option<Self>> {
        let Some(number) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return Ok(None) };
        let handle = match pidfd_open(number, PidfdFlags::empty()) {
            Err(rustix::io::Errno::SRCH) => return Ok(None),
            handle => handle?,
        };
        // The handle always refers to the same process: what is checked from here on is what is adopted.
        if !is_same() {
            return Ok(None);
        }
        let end = pipe::Receiver::from_file_unchecked(File::from(handle.try_clone()?))?;
        let process = Process::Adopted { pid, handle, end };
        Ok(Some(Self { process, released: Arc::new(AtomicBool::new(true)) }))
    }

    /// Takes its standard input, output and error, as far as they are pipes.
    fn streams(&mut self) -> (Option<ChildStdin>, Option<ChildStdout>, Option<ChildStderr>) {
        match &mut self.process {
            Process::Child(child) => (child.stdin.take(), child.stdout.take(), child.stderr.take()),
            Process::Adopted { .. } => (None, None, None),
        }
    }

    /// Returns its process ID; `None` once it ended and was waited for.
    pub fn pid(&self) -> Option<u32> {
        match &self.process {
            Process::Child(child) => child.id(),
            Process::Adopted { pid, .. } => Some(*pid),
        }
    }

    /// Waits until it ends. May be repeated.
    ///
    /// # Errors
    /// The status of an adopted process is known only until its parent has reaped it.
    pub async fn wait(&mut self) -> io::Result<ExitStatus> {
        match &mut self.process {
            Process::Child(child) => child.wait().await,
            Process::Adopted { pid, end, .. } => {
                end.readable().await?;
                ended_status(*pid).ok_or_else(|| io::Error::other("ended with an unknown status"))
            }
        }
    }

    /// Kills the process.
    pub fn kill(&mut self) {
        // The only failure is that it has already ended.
        match &mut self.process {
            Process::Child(child) => drop(child.start_kill()),
            Process::Adopted { handle, .. } => drop(pidfd_send_signal(&*handle, Signal::KILL)),
        }
    }

    /// Returns a switch that, once set, lets the process outlive this value.
    pub fn release_switch(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.released)
    }
}

/// Returns the exit status of a process that has ended and that its parent has not waited for yet, from its line in /proc
/// (proc_pid_stat(5)); `None` if there is no such process or this user may not read the status.
pub fn ended_status(pid: u32) -> Option<ExitStatus> {
    status_in(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

fn status_in(stat: &str) -> Option<ExitStatus> {
    // The name in the second field may contain anything. The state is the third field, the exit status the 52nd.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    if !matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    fields.nth(48)?.parse().ok().map(ExitStatus::from_raw)
}

impl Drop for OwnedChild {
    fn drop(&mut self) {
        if !self.released.load(Ordering::Relaxed) {
            self.kill();
        }
    }
}

struct Job {
    command: Command,
    runtime: Handle,
    reply: oneshot::Sender<io::Result<OwnedChild>>,
}

/// The thread that starts all children.
static STARTER: LazyLock<Result<mpsc::Sender<Job>, io::ErrorKind>> = LazyLock::new(|| {
    let (sender, receiver) = mpsc::channel::<Job>();
    std::thread::Builder::new()
        .name("rudder-starter".to_owned())
        .spawn(move || {
            for Job { mut command, runtime, reply } in receiver {
                let _context = runtime.enter();
                let child = command.spawn().map(OwnedChild::new);
                // Without a receiver, the child is dropped, which kills it.
                let _ = reply.send(child);
            }
        })
        .map(|_| sender)
        .map_err(|error| error.kind())
});

/// Returns the path of a program: the given one, else the first of this name in `PATH`.
pub fn find(given: Option<&Path>, name: &str) -> Option<PathBuf> {
    let is_program =
        |path: &Path| rustix::fs::access(path, rustix::fs::Access::EXEC_OK).is_ok() && path.is_file();
    match given {
        Some(path) => is_program(path).then(|| path.to_owned()),
        None => std::env::split_paths(&std::env::var_os("PATH")?)
            .filter(|directory| directory.is_absolute())
            .map(|directory| directory.join(name))
            .find(|path| is_program(path)),
    }
}

#[cfg(test)]
mod tests;
