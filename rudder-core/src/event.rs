//! Events of a running build, serialisable as JSON lines (`docs/events.md`).
//!
//! Steps, actions and attempts are numbered from 1 everywhere, for programs as for people.

mod build_id;
mod schema;

pub use build_id::BuildId;
pub use schema::json_schema;

use crate::{
    error::ErrorKind,
    module::{InputRecord, Timing},
    timestamp::Timestamp,
    units::human_bytes,
    visible::{Visible, visible_line, visible_output},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::{
    fmt::{self, Write as _},
    path::PathBuf,
};

/// An event of a build.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[non_exhaustive]
pub struct Event {
    /// The build that the event belongs to.
    pub build_id: BuildId,
    /// Counts from 0 without gaps within a build; a reader that sees a gap was too slow for the missing events.
    pub seq: u64,
    /// When the event happened (RFC 3339, UTC).
    #[schemars(with = "String", extend("format" = "date-time"))]
    pub time: Timestamp,
    /// The VM that the event is about; absent: the build.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<String>,
    /// What happened.
    #[serde(flatten)]
    pub kind: EventKind,
}

/// Phases of a build, named as in the VirtualMachineBuild resource.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[non_exhaustive]
#[allow(missing_docs)] // The names are the documentation: see docs/design.md.
pub enum BuildPhase {
    Pending,
    Networking,
    Building,
    CapturingDisks,
    TemplateProvisioning,
    Succeeded,
    Failed,
}

/// Phases of a VM, named as in the VirtualMachineBuild resource.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[non_exhaustive]
#[allow(missing_docs)]
pub enum VmPhase {
    Pending,
    SourceImporting,
    Booting,
    /// From power-on to the login, for a VM that has a boot command.
    BootCommand,
    Provisioning,
    ShuttingDown,
    DiskCaptured,
    Succeeded,
    Failed,
}

/// The stream that a line of output was written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum OutputStream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// How a command in a guest ended.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum CommandStatus {
    /// It exited with this code.
    Code(u32),
    /// A signal ended it: `KILL`, `TERM`… (RFC 4254, 6.10).
    Signal(String),
}

impl CommandStatus {
    /// Returns whether the command exited with code 0.
    #[must_use]
    pub fn success(&self) -> bool {
        *self == Self::Code(0)
    }
}

impl std::fmt::Display for CommandStatus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exit code {code}"),
            Self::Signal(name) => write!(f, "signal {name}"),
        }
    }
}

/// The kind of an event, with its data.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "event", rename_all = "snake_case")]
#[non_exhaustive]
pub enum EventKind {
    /// The build starts. First event of each attempt.
    BuildStarted {
        /// The name of the build.
        build: String,
        /// The digest of its plan.
        plan: String,
        /// The backend it runs on.
        backend: String,
        /// 1 for the first attempt.
        attempt: u32,
    },
    /// The build entered a phase.
    BuildPhase {
        /// The phase.
        phase: BuildPhase,
    },
    /// A VM entered a phase.
    VmPhase {
        /// The phase.
        phase: VmPhase,
    },
    /// Progress of an operation whose size may be unknown.
    Progress {
        /// The operation: `download URL`, `convert DISK`…
        task: String,
        /// Bytes done.
        done: u64,
        /// Total bytes, where known.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        total: Option<u64>,
    },
    /// An input was read and verified.
    Input(InputRecord),
    /// Something the user should know that does not stop the build.
    Notice {
        /// The message.
        message: String,
    },
    /// Something is probably wrong, but does not stop the build.
    Warning {
        /// The message.
        message: String,
    },
    /// An action of the boot command starts.
    BootAction {
        /// Its number in the boot command, from 1.
        action: usize,
        /// The number of actions in the boot command.
        of: usize,
        /// What the action does: `type "linux"`, `press <enter>`, `wait up to 1m for "login:" on the screen`.
        doing: String,
    },
    /// The boot command has ended; login attempts start.
    BootCommandDone {
        /// How long it took, in milliseconds.
        millis: u64,
    },
    /// The guest answered and the login works.
    GuestReady {
        /// Milliseconds since power-on.
        millis: u64,
    },
    /// A file served by the build was requested. The VM is the one that sent the request, where the backend can tell.
    HttpRequest {
        /// `GET`, `HEAD`…
        method: String,
        /// The requested path as it was sent, truncated if it is long.
        path: String,
        /// The status of the response (RFC 9110, 15): 200 and 206 for a file, 404 for a name under which nothing is served.
        status: u16,
        /// Bytes of the file that were sent; fewer than its size when the guest closed the connection early.
        bytes: u64,
    },
    /// A step starts.
    StepStarted {
        /// Its number among the steps of its VM, from 1.
        step: usize,
        /// Its name, or its type if it has none.
        name: String,
    },
    /// A step wrote a line of output.
    StepOutput {
        /// The number of the step, from 1.
        step: usize,
        /// The stream that the line was written to.
        stream: OutputStream,
        /// The line without its line ending. Bytes that are not UTF-8 are replaced, and a line longer than the limit is split into
        /// pieces.
        line: String,
    },
    /// A step ended.
    StepFinished {
        /// The number of the step, from 1.
        step: usize,
        /// Its name, or its type if it has none.
        name: String,
        /// How long it took, in milliseconds.
        millis: u64,
        /// Whether the step succeeded.
        success: bool,
        /// How its command ended, where the step has one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        exit: Option<CommandStatus>,
    },
    /// A step waits for a person, until [`BuildHandle::resume`](crate::build::BuildHandle::resume).
    Paused {
        /// The number of the step, from 1.
        step: usize,
        /// What the person is asked to do, as written in the manifest.
        instructions: String,
        /// How the person reaches the machine, starting with its display: command lines and addresses, one per line.
        access: Vec<String>,
    },
    /// The person is done, and the build continues.
    Resumed {
        /// The number of the step, from 1.
        step: usize,
        /// How long it was paused, in milliseconds.
        millis: u64,
    },
    /// An attempt failed, and another follows.
    Retrying {
        /// The number of the next attempt.
        attempt: u32,
        /// The maximum number of attempts.
        of: u32,
        /// Why the previous attempt failed.
        reason: String,
    },
    /// The build failed and its machines were kept for inspection.
    Kept {
        /// How to access the machines, one line each.
        access: Vec<String>,
        /// The id of the lab, needed to remove what was kept.
        lab: String,
    },
    /// Events were dropped because the reader was too slow.
    Lagged {
        /// The number of dropped events.
        missed: u64,
    },
    /// The last event of a build.
    Finished {
        /// How the build ended.
        outcome: Outcome,
        /// How long each phase took.
        timings: Vec<Timing>,
    },
}

/// How a build ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "result", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Outcome {
    /// The build produced a module.
    Built {
        /// The name of the module.
        module: String,
        /// The path of its `module.json`, for backends that have files.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        path: Option<PathBuf>,
    },
    /// The build failed.
    Failed(Box<FailureReport>),
    /// The caller cancelled the build.
    Cancelled,
}

/// Report of a failed build: what a person needs at once to understand the failure.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[non_exhaustive]
pub struct FailureReport {
    /// The build that failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub build_id: Option<BuildId>,
    /// The kind of the error, for programs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<ErrorKind>,
    /// The full error: [`Error::report`](crate::Error::report), masked.
    pub message: String,
    /// The VM that failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<String>,
    /// The phase that the VM was in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<VmPhase>,
    /// The step by number and name: "2 (install)".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub step: Option<String>,
    /// How the command of the step ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit: Option<CommandStatus>,
    /// The last lines of output of the step.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub output_tail: Vec<String>,
    /// The last lines of the serial console.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub serial_tail: Vec<String>,
    /// The files of `httpDirectory`, for a VM that failed while booting.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub served: Vec<ServedFile>,
    /// What the screen showed, read as text: see [`console::text`](crate::console::text) for what can be read.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub screen: Vec<String>,
    /// A screenshot (PNG). It contains any secrets that the screen shows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub screenshot: Option<PathBuf>,
}

/// A file that a build served.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[non_exhaustive]
pub struct ServedFile {
    /// The name of the file.
    pub name: String,
    /// How often the VM received the file or a part of it. An installer that restarts receives its files again.
    pub requests: u64,
}

impl ServedFile {
    /// A file, and how often the VM received it.
    pub fn new(name: impl Into<String>, requests: u64) -> Self {
        Self { name: name.into(), requests }
    }
}

/// Formats milliseconds for people: `250 ms`, `3.2 s`, `2m5s`.
fn human_millis(millis: u64) -> String {
    match millis {
        0..1000 => format!("{millis} ms"),
        1000..60_000 => format!("{}.{} s", millis / 1000, millis % 1000 / 100),
        _ => crate::units::human_duration(std::time::Duration::from_secs(millis / 1000)),
    }
}

/// Formats the event for people as one line (a failure: several), without time and number.
impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(vm) = &self.vm {
            write!(f, "{}: ", visible_line(vm))?;
        }
        self.kind.fmt(f)
    }
}

/// Formats the event for people as one line (a failure: several). Control characters are made visible rather than emitted: see
/// [`visible`](crate::visible).
impl fmt::Display for EventKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Applies to everything written below: no control character reaches a terminal, and no value can end its line.
        let f = &mut Visible(f);
        match self {
            Self::BuildStarted { build, plan, backend, attempt } => {
                let plan = visible_line(plan.get(..12).unwrap_or(plan));
                write!(f, "building {} on {} (plan {plan})", visible_line(build), visible_line(backend))?;
                if *attempt > 1 { write!(f, ", attempt {attempt}") } else { Ok(()) }
            }
            Self::BuildPhase { phase } => write!(f, "{phase:?}"),
            Self::VmPhase { phase } => write!(f, "{phase:?}"),
            Self::Progress { task, done, total } => match total {
                Some(total) if *total > 0 => {
                    let percent = u128::from(*done) * 100 / u128::from(*total);
                    write!(
                        f,
                        "{}: {} of {} ({percent} %)",
                        visible_line(task),
                        human_bytes(*done),
                        human_bytes(*total)
                    )
                }
                _ => write!(f, "{}: {}", visible_line(task), human_bytes(*done)),
            },
            Self::Input(input) => {
                let role = input.role.to_string();
                let (role, url) = (visible_line(&role), visible_line(&input.url));
                let content = input.content.to_string();
                write!(f, "{role}: {url} ({})", visible_line(&content))
            }
            Self::Notice { message } => f.write_str(message),
            Self::Warning { message } => write!(f, "warning: {message}"),
            Self::BootAction { action, of, doing } => {
                write!(f, "boot command {action} of {of}: {}", visible_line(doing))
            }
            Self::BootCommandDone { millis } => write!(f, "boot command done in {}", human_millis(*millis)),
            Self::GuestReady { millis } => write!(f, "logged in {} after power-on", human_millis(*millis)),
            Self::HttpRequest { method, path, status, bytes } => {
                let (method, path) = (visible_line(method), visible_line(path));
                write!(f, "{method} {path}: {status}, {}B", human_bytes(*bytes))
            }
            Self::StepStarted { step, name } => write!(f, "step {step} ({})", visible_line(name)),
            Self::StepOutput { line, .. } => write!(f, "| {}", visible_output(line)),
            Self::StepFinished { step, name, millis, success, exit } => {
                write!(f, "step {step} ({}) ", visible_line(name))?;
                match exit {
                    _ if *success => write!(f, "done in {}", human_millis(*millis)),
                    Some(exit) => write!(f, "failed after {} with {exit}", human_millis(*millis)),
                    None => write!(f, "failed after {}", human_millis(*millis)),
                }
            }
            Self::Paused { step, instructions, access } => {
                write!(f, "step {step} is paused until a person has done the following:")?;
                instructions
                    .trim_end()
                    .lines()
                    .try_for_each(|line| write!(f, "\n  {}", visible_line(line)))?;
                access.iter().try_for_each(|line| write!(f, "\n  {}", visible_line(line)))
            }
            Self::Resumed { step, millis } => {
                write!(f, "step {step} resumed after {}", human_millis(*millis))
            }
            Self::Retrying { attempt, of, reason } => {
                write!(f, "starting attempt {attempt} of {of}; the previous one failed: {reason}")
            }
            Self::Kept { lab, access } => {
                write!(f, "kept for inspection as lab {}", visible_line(lab))?;
                access.iter().try_for_each(|line| write!(f, "\n  {}", visible_line(line)))
            }
            Self::Lagged { missed } => write!(f, "… {missed} events omitted …"),
            Self::Finished { outcome, .. } => match outcome {
                Outcome::Built { module, path: Some(path) } => {
                    let path = path.display().to_string();
                    write!(f, "built module {}: {}", visible_line(module), visible_line(&path))
                }
                Outcome::Built { module, path: None } => write!(f, "built module {}", visible_line(module)),
                Outcome::Failed(report) => write!(f, "failed: {report}"),
                Outcome::Cancelled => f.write_str("cancelled"),
            },
        }
    }
}

/// Formats the whole report for people, on several lines, without a trailing newline.
impl fmt::Display for FailureReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let f = &mut Visible(f);
        f.write_str(&self.message)?;
        if let Some(phase) = self.phase {
            write!(f, "\n  phase: {phase:?}")?;
        }
        if let Some(exit) = &self.exit {
            write!(f, "\n  the command ended with {exit}")?;
        }
        for (what, lines) in
            [("output of the step", &self.output_tail), ("serial console", &self.serial_tail)]
        {
            if !lines.is_empty() {
                write!(f, "\n  {what}, last lines:")?;
                lines.iter().try_for_each(|line| write!(f, "\n    | {}", visible_output(line)))?;
            }
        }
        if !self.served.is_empty() {
            f.write_str("\n  served files:")?;
        }
        for ServedFile { name, requests } in &self.served {
            let name = visible_line(name);
            match requests {
                0 => write!(f, "\n    | {name}: never requested")?,
                1 => write!(f, "\n    | {name}: once")?,
                _ => write!(f, "\n    | {name}: {requests} times")?,
            }
        }
        // The error of a wait for text already contains what the screen showed instead.
        if !self.screen.is_empty() && !self.message.contains(&self.screen.join("\n")) {
            f.write_str("\n  screen:")?;
            self.screen.iter().try_for_each(|line| write!(f, "\n    | {}", visible_line(line)))?;
        }
        self.screenshot
            .iter()
            .try_for_each(|path| write!(f, "\n  screenshot: {}", visible_line(&path.display().to_string())))
    }
}

#[cfg(test)]
mod tests;
