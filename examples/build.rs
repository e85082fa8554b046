//! Builds the modules of a manifest file.
//!
//! ```text
//! cargo run --example build -- [--backend qemu|libvirt|kubevirt|memory] [--store DIR] [--events json]
//!                              [--on-failure destroy|keep] [--locked] [--strict] FILE
//! ```
//!
//! The backend `libvirt` needs `--features libvirt`; `LIBVIRT_DEFAULT_URI` selects the libvirt to use. The backend `kubevirt` needs
//! `--features kubevirt`, and uses the cluster, the namespace and the rights that kubectl would use; it has no store here.
//!
//! Standard output is for programs: every event as a line of JSON (with `--events json`), and the path of each
//! `module.json` once its module is built. Everything for people goes to standard error: progress bars and the output
//! of steps on a terminal, otherwise plain lines.
//!
//! A `handbuild` step prints its instructions and the address of the display for a VNC viewer. It continues when Enter
//! is pressed: a line on standard input, which must be a terminal or a pipe.
//!
//! SIGINT (Ctrl-C), SIGTERM and SIGHUP (the terminal was closed) cancel the build, and so does a failure to write to
//! standard output. The program ends once everything is cleaned up; the third signal ends it at once.
//!
//! Exit codes: 0 built · 1 failed · 2 manifest refused, or wrong usage · 130 cancelled by a signal, after cleaning up ·
//! 141 cancelled because standard output has no reader any more.

#[path = "build/by_hand.rs"]
mod by_hand;
#[path = "build/hypervisor.rs"]
mod hypervisor;
#[path = "build/output.rs"]
mod output;
#[path = "build/screen.rs"]
mod screen;
#[path = "build/signals.rs"]
mod signals;

use by_hand::{ByHand, Input};
use clap::{Parser, ValueEnum};
use hypervisor::Hypervisor;
use output::{Unwritten, print, report};
use rudder::{
    Error, ErrorKind, Result,
    build::{Build, FailurePolicy},
    diagnostic::{Diagnostic, render},
    event::EventKind,
    manifest::{UnknownKeys, parse_with, read_file},
    module::Module,
    plan::{PlanContext, plan},
    store::Store,
};
use screen::Screen;
use signals::{CANCELLED, Signals};
use std::{path::PathBuf, process::ExitCode, sync::Arc};

const FAILED: u8 = 1;
const REFUSED: u8 = 2;

/// Builds the modules of a manifest file.
#[derive(Parser)]
struct Args {
    /// The hypervisor to build on.
    #[arg(long, value_enum, default_value = "qemu")]
    backend: Hypervisor,
    /// Where images and modules are stored [default: the store of this user].
    #[arg(long, value_name = "DIR")]
    store: Option<PathBuf>,
    /// Writes every event to standard output, one per line.
    #[arg(long, value_name = "FORMAT")]
    events: Option<EventFormat>,
    /// What happens to the machines of a failed build.
    #[arg(long, value_enum, default_value = "destroy")]
    on_failure: OnFailure,
    /// Refuses inputs that changed since the module of the same name was built.
    #[arg(long)]
    locked: bool,
    /// Refuses unknown keys.
    #[arg(long)]
    strict: bool,
    /// The manifest.
    file: PathBuf,
}

#[derive(Clone, Copy, ValueEnum)]
enum EventFormat {
    Json,
}

#[derive(Clone, Copy, ValueEnum)]
enum OnFailure {
    Destroy,
    Keep,
}

#[tokio::main]
async fn main() -> ExitCode {
    // This program also runs the network of a kept lab.
    rudder::helper::run();
    match run(Args::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(End { code, message }) => {
            if !message.is_empty() {
                report(message.trim_end());
            }
            ExitCode::from(code)
        }
    }
}

/// Why the program ends without having built everything: its exit code, and its last message.
struct End {
    code: u8,
    message: String,
}

impl End {
    fn refused(message: impl Into<String>) -> Self {
        Self { code: REFUSED, message: message.into() }
    }
}

impl From<Error> for End {
    fn from(error: Error) -> Self {
        let code = if error.kind() == ErrorKind::Cancelled { CANCELLED } else { FAILED };
        // The failure of a build was its last event, so it is on the screen already.
        let message = match error.build_failure() {
            Some(_) => String::new(),
            None => format!("error: {}", error.report()),
        };
        Self { code, message }
    }
}

impl From<Unwritten> for End {
    fn from(error: Unwritten) -> Self {
        Self { code: error.report(FAILED), message: String::new() }
    }
}

async fn run(args: Args) -> Result<(), End> {
    let signals = Signals::listen().map_err(|error| Error::io("listen to signals", error))?;
    let store = args.store.clone().unwrap_or_else(Store::default_root);
    let text = read_file(&args.file).map_err(|error| End::refused(format!("error: {}", error.report())))?;
    let file = Source { name: args.file.display().to_string(), text };
    let backend = args.backend.open(&store)?;

    // All documents are checked before the first one is built.
    let unknown_keys = if args.strict { UnknownKeys::Refuse } else { UnknownKeys::Warn };
    let parsed = parse_with(&file.name, &file.text, unknown_keys);
    file.report_findings(&parsed.diagnostics)?;
    let mut context = PlanContext::new(backend.capabilities())
        .modules(backend.modules().await?)
        .damaged_modules(backend.damaged_modules().await?)
        .base_directory(args.file.parent().unwrap_or(&args.file));
    let mut findings = Vec::new();
    for (place, document) in parsed.documents.iter().enumerate() {
        // A module that an earlier document of the file makes does not exist yet.
        let to_come = |finding: &Diagnostic| place > 0 && finding.code == "unknown-module";
        let found = plan(document, &context).diagnostics;
        findings.extend(found.into_iter().filter(|finding| !to_come(finding)));
    }
    file.report_findings(&findings)?;
    if parsed.documents.is_empty() {
        return Err(End::refused(format!("error: {} contains no manifest", file.name)));
    }

    for document in &parsed.documents {
        // Planned again: an earlier document may have built the module that this one is based on.
        let planned = plan(document, &context);
        let Some(plan) = planned.plan else {
            return Err(End::refused(render(&planned.diagnostics, &file.name, &file.text())));
        };
        if let Some(message) = by_hand::missing_input(&plan) {
            return Err(End::refused(message));
        }
        let earlier = if args.locked { Some(earlier(&context, &plan.name)?) } else { None };
        let mut build = Build::new(plan, Arc::clone(&backend)).report_dir(store.join("reports"));
        if let Some(earlier) = earlier {
            build = build.locked(earlier);
        }
        if let OnFailure::Keep = args.on_failure {
            build = build.on_failure(FailurePolicy::Keep);
        }
        let module = follow(build, args.events, &signals).await?;
        match &module.path {
            Some(path) => print(path.display())?,
            None => print(&module.name)?,
        }
        // Later documents may be based on it.
        context = context.modules([module]);
    }
    Ok(())
}

/// Runs a build: shows its events, resumes steps that wait for a person, and cancels when the user asks for it.
async fn follow(build: Build, format: Option<EventFormat>, signals: &Signals) -> Result<Module, End> {
    let build = build.start();
    signals.cancel(Some(build.canceller()));
    let mut unwritten = None;
    let mut events = build.events();
    let mut screen = Screen::new(format.is_some());
    let mut by_hand = ByHand::default();
    loop {
        let event = tokio::select! {
            event = events.next() => event,
            next = by_hand.next() => {
                match next {
                    Input::Show(text) => screen.say(&text),
                    // The build may have failed in the meantime, which the next events report.
                    Input::Done(vm) => drop(build.resume(&vm)),
                    Input::Closed => {
                        screen.say("cancelling: standard input has ended, so no one can resume the build");
                        build.cancel();
                        by_hand = ByHand::default();
                    }
                }
                continue;
            }
        };
        let Some(event) = event else { break };
        if let (Some(EventFormat::Json), None) = (format, &unwritten) {
            unwritten = print(event.to_json()).err();
            if unwritten.is_some() {
                // Without a reader of the events, no one would learn how the build ends.
                build.cancel();
            }
        }
        screen.show(&event);
        let vm = event.vm.as_deref().unwrap_or_default();
        match &event.kind {
            EventKind::Paused { .. } => screen.say(&by_hand.begin(&build, vm).await),
            EventKind::Resumed { .. } => {
                if let Some(prompt) = by_hand.end(vm) {
                    screen.say(&prompt);
                }
            }
            _ => {}
        }
    }
    let outcome = build.outcome().await;
    signals.cancel(None);
    match unwritten {
        Some(unwritten) => Err(unwritten.into()),
        None => Ok(outcome?),
    }
}

/// Returns the module with this name that was built before.
fn earlier<'c>(context: &'c PlanContext, name: &str) -> Result<&'c Module> {
    if let Some(reason) = context.damaged_modules.get(name) {
        let message = format!("expected an earlier module {name} to lock the build to, but it is damaged");
        return Err(Error::new(ErrorKind::InvalidInput, message).with_help(reason.clone()));
    }
    context.modules.get(name).ok_or_else(|| {
        let message = format!("expected an earlier module {name} to lock the build to, but found none");
        Error::new(ErrorKind::NotFound, message).with_help("build once without `--locked`")
    })
}

/// The manifest file.
struct Source {
    name: String,
    text: Vec<u8>,
}

impl Source {
    fn text(&self) -> std::borrow::Cow<'_, str> {
        String::from_utf8_lossy(&self.text)
    }

    /// Shows the diagnostics, and refuses the file if one of them is an error.
    fn report_findings(&self, diagnostics: &[Diagnostic]) -> Result<(), End> {
        let shown = render(diagnostics, &self.name, &self.text());
        if diagnostics.iter().any(Diagnostic::is_error) {
            return Err(End::refused(shown));
        }
        if !shown.is_empty() {
            report(shown.trim_end());
        }
        Ok(())
    }
}
