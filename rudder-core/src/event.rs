//! What a build says while it runs; serialisable as JSON lines (`docs/events.md`).
//!
//! Steps, actions and attempts count from 1 everywhere, for programs as for people.

mod build_id;
mod schema;

pub use build_id::BuildId;
pub use schema::json_schema;

use crate::{
    error::ErrorKind,
    module::{InputRecord, Timing},
    units::human_bytes,
    visible::{Visible, visible_line, visible_output},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::{
    fmt::{self, Write as _},
    path::PathBuf,
};

/// One thing that happened.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Event {
    /// The build that it happened in.
    pub build_id: BuildId,
    /// Counts from 0 without gaps within a build; a gap in what a reader sees is what it was too slow for.
    pub seq: u64,
    /// When it happened (RFC 3339, UTC).
    #[schemars(with = "String", extend("format" = "date-time"))]
    pub time: jiff::Timestamp,
    /// The VM it is about; absent: the build.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<String>,
    /// What happened.
    #[serde(flatten)]
    pub kind: EventKind,
}

/// Phases of a build, with the names of the VirtualMachineBuild resource.
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

/// Phases of a VM, with the names of the VirtualMachineBuild resource.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[non_exhaustive]
#[allow(missing_docs)]
pub enum VmPhase {
    Pending,
    SourceImporting,
    Booting,
    /// From power-on to the login, of a VM that has a boot command.
    BootCommand,
    Provisioning,
    ShuttingDown,
    DiskCaptured,
    Succeeded,
    Failed,
}

/// Where a line of output came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OutputStream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// How a command in a guest ended.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ExitStatus {
    /// It exited with this code.
    Code(u32),
    /// A signal ended it: `KILL`, `TERM`… (RFC 4254, 6.10).
    Signal(String),
}

impl ExitStatus {
    /// Whether it exited with code 0.
    #[must_use]
    pub fn success(&self) -> bool {
        *self == Self::Code(0)
    }
}

impl std::fmt::Display for ExitStatus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exit code {code}"),
            Self::Signal(name) => write!(f, "signal {name}"),
        }
    }
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "event", rename_all = "snake_case")]
#[non_exhaustive]
pub enum EventKind {
    /// The build begins. First event of each attempt.
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
    /// Something with a known or unknown size goes on.
    Progress {
        /// What: `download URL`, `convert DISK`…
        task: String,
        /// Bytes done.
        done: u64,
        /// Bytes in all, where known.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        total: Option<u64>,
    },
    /// An input was read and verified.
    Input(InputRecord),
    /// Something that the reader should know, and that does not stop the build.
    Notice {
        /// What.
        message: String,
    },
    /// Something is likely wrong, and does not stop the build.
    Warning {
        /// What.
        message: String,
    },
    /// An action of the boot command begins.
    BootAction {
        /// Its number in the boot command, from 1.
        action: usize,
        /// How many there are.
        of: usize,
        /// What is done: `type "linux"`, `press <enter>`, `wait up to 1m for "login:" on the screen`.
        doing: String,
    },
    /// The boot command has ended; from now on the login is tried.
    BootCommandDone {
        /// How long it took, in milliseconds.
        millis: u64,
    },
    /// The guest answered and the login works.
    GuestReady {
        /// Milliseconds since power-on.
        millis: u64,
    },
    /// A file that the build serves was asked for. The VM is the one that asked, where the backend can tell.
    HttpRequest {
        /// `GET`, `HEAD`…
        method: String,
        /// What was asked for, as it was sent; cut where it is long.
        path: String,
        /// The status of the answer (RFC 9110, 15): 200 and 206 are files, 404 is a name that nothing is served under.
        status: u16,
        /// Bytes of the file that were sent; fewer than it has when the guest hung up.
        bytes: u64,
    },
    /// A step begins.
    StepStarted {
        /// Its number among the steps of its VM, from 1.
        step: usize,
        /// Its name, else its type.
        name: String,
    },
    /// A step wrote a line.
    StepOutput {
        /// The number of the step, from 1.
        step: usize,
        /// Where it wrote.
        stream: OutputStream,
        /// The line, without its end; bytes that are not UTF-8 are replaced; a line over the limit comes in pieces.
        line: String,
    },
    /// A step ended.
    StepFinished {
        /// The number of the step, from 1.
        step: usize,
        /// Its name, else its type.
        name: String,
        /// How long it took, in milliseconds.
        millis: u64,
        /// Whether it did what it should.
        success: bool,
        /// How its command ended, where it has one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        exit: Option<ExitStatus>,
    },
    /// A step waits for a person, until [`BuildHandle::resume`](crate::build::BuildHandle::resume).
    Paused {
        /// The number of the step, from 1.
        step: usize,
        /// What the person is to do, as the manifest says it.
        instructions: String,
        /// How the person reaches the machine, its display first of all: command lines and addresses, a line each.
        access: Vec<String>,
    },
    /// The person is done, and the build goes on.
    Resumed {
        /// The number of the step, from 1.
        step: usize,
        /// How long it was paused, in milliseconds.
        millis: u64,
    },
    /// An attempt failed, and another follows.
    Retrying {
        /// The number of the attempt that follows.
        attempt: u32,
        /// How many there may be.
        of: u32,
        /// Why the one before failed.
        reason: String,
    },
    /// The build failed and its machines were kept for inspection.
    Kept {
        /// How to get in, a line each.
        access: Vec<String>,
        /// The id of the lab, by which what was kept can be removed.
        lab: String,
    },
    /// Events were left out because the reader was too slow.
    Lagged {
        /// How many.
        missed: u64,
    },
    /// The last event of a build.
    Finished {
        /// How it ended.
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
    /// A module stands.
    Built {
        /// Its name.
        module: String,
        /// Its `module.json`, for backends that have files.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        path: Option<PathBuf>,
    },
    /// It failed.
    Failed(Box<FailureReport>),
    /// The caller cancelled it.
    Cancelled,
}

/// What a person needs at once to understand a failure.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[non_exhaustive]
pub struct FailureReport {
    /// The build that failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub build_id: Option<BuildId>,
    /// What went wrong, for programs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<ErrorKind>,
    /// The whole story: [`Error::report`](crate::Error::report), masked.
    pub message: String,
    /// The VM it happened to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<String>,
    /// The phase the VM was in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<VmPhase>,
    /// The step by number and name: "2 (install)".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub step: Option<String>,
    /// How its command ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit: Option<ExitStatus>,
    /// The last lines it wrote.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub output_tail: Vec<String>,
    /// The last lines of the serial console.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub serial_tail: Vec<String>,
    /// The files of `httpDirectory`, of a VM that failed while it booted.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub served: Vec<ServedFile>,
    /// What the screen showed, read as text: see [`console::text`](crate::console::text) for what can be read.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub screen: Vec<String>,
    /// A picture of the screen (PNG). Secrets that the screen shows are in it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub screenshot: Option<PathBuf>,
}

/// A file that a build served.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[non_exhaustive]
pub struct ServedFile {
    /// Its name.
    pub name: String,
    /// How often the VM got it, or a part of it. An installer that starts over and over gets its files again.
    pub requests: u64,
}

impl ServedFile {
    /// A file, and how often it was got.
    pub fn new(name: impl Into<String>, requests: u64) -> Self {
        Self { name: name.into(), requests }
    }
}

/// Milliseconds for people: `250 ms`, `3.2 s`, `2m5s`.
fn human_millis(millis: u64) -> String {
    match millis {
        0..1000 => format!("{millis} ms"),
        1000..60_000 => format!("{}.{} s", millis / 1000, millis % 1000 / 100),
        _ => crate::units::human_duration(std::time::Duration::from_secs(millis / 1000)),
    }
}

/// One line for a person (a failure: several), without time and number.
impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(vm) = &self.vm {
            write!(f, "{}: ", visible_line(vm))?;
        }
        self.kind.fmt(f)
    }
}

/// One line for a person (a failure: several). Control characters are shown, not obeyed: see [`visible`](crate::visible).
impl fmt::Display for EventKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Whatever is written: nothing reaches a terminal that is not shown. Values in a line do not end it.
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
                write!(f, "step {step} is paused for a person to do this:")?;
                instructions
                    .trim_end()
                    .lines()
                    .try_for_each(|line| write!(f, "\n  {}", visible_line(line)))?;
                access.iter().try_for_each(|line| write!(f, "\n  {}", visible_line(line)))
            }
            Self::Resumed { step, millis } => {
                write!(f, "step {step} goes on after {}", human_millis(*millis))
            }
            Self::Retrying { attempt, of, reason } => {
                write!(f, "starting attempt {attempt} of {of}; the one before failed: {reason}")
            }
            Self::Kept { lab, access } => {
                write!(f, "kept for inspection as lab {}", visible_line(lab))?;
                access.iter().try_for_each(|line| write!(f, "\n  {}", visible_line(line)))
            }
            Self::Lagged { missed } => write!(f, "… {missed} events left out …"),
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

/// The whole of it for a person, on several lines, without a trailing newline.
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
                0 => write!(f, "\n    | {name}: never asked for")?,
                1 => write!(f, "\n    | {name}: once")?,
                _ => write!(f, "\n    | {name}: {requests} times")?,
            }
        }
        // A wait for a text says itself what it saw instead.
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
