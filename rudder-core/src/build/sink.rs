//! The single point through which a build reports: every event is masked, numbered and timestamped here, and progress is thinned
//! out.

use super::log::{Log, lock};
use crate::{
    backend::{Progress, ProgressEvent},
    event::{BuildId, BuildPhase, EventKind, FailureReport, Outcome, OutputStream, ServedFile, VmPhase},
    module::{InputRecord, Timing},
    secret::Masker,
    timestamp::Timestamp,
};
use std::{
    collections::{HashMap, VecDeque},
    fmt,
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::{sync::watch, time::Instant};

/// Minimum interval between progress events of one task; its last one is always reported.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);
/// How many of a step's last lines a failure report shows.
const OUTPUT_TAIL: usize = 30;

/// Receiver of everything that the engine reports. Cheap to clone.
#[derive(Clone)]
pub(super) struct Sink(Arc<Inner>);

struct Inner {
    log: Arc<Mutex<Log>>,
    pulse: watch::Sender<()>,
    masker: Masker,
    state: Mutex<State>,
}

/// What the sink remembers about earlier reports.
#[derive(Default)]
struct State {
    /// The phase of the build (`None`) and of each VM, and when it started.
    phases: HashMap<Option<String>, (String, Instant)>,
    vm_phases: HashMap<String, VmPhase>,
    timings: Vec<Timing>,
    warnings: Vec<String>,
    tails: HashMap<String, VecDeque<String>>,
    tasks: HashMap<(Option<String>, String), Task>,
}

/// The reported progress of a task.
struct Task {
    reported: Instant,
    /// Progress held back since.
    held: Option<(u64, Option<u64>)>,
    complete: bool,
}

impl Sink {
    pub(super) fn new(
        build_id: BuildId,
        masker: Masker,
        capacity: usize,
    ) -> (Self, Arc<Mutex<Log>>, watch::Receiver<()>) {
        let log = Arc::new(Mutex::new(Log::new(build_id, capacity)));
        let (pulse, receiver) = watch::channel(());
        let inner = Inner { log: Arc::clone(&log), pulse, masker, state: Mutex::default() };
        (Self(Arc::new(inner)), log, receiver)
    }

    /// Masks the secrets in a text.
    pub(super) fn mask(&self, text: &str) -> String {
        self.0.masker.mask(text).into_owned()
    }

    /// Returns the masker of the secrets.
    pub(super) fn masker(&self) -> &Masker {
        &self.0.masker
    }

    /// Reports that an attempt starts; what was remembered of the previous one is forgotten, including warnings.
    pub(super) fn started(&self, build: &str, plan: &str, backend: &str, attempt: u32) {
        *lock(&self.0.state) = State::default();
        let (build, plan, backend) = (build.to_owned(), plan.to_owned(), backend.to_owned());
        self.emit(None, EventKind::BuildStarted { build, plan, backend, attempt });
    }

    /// Reports that the build entered a phase.
    pub(super) fn build_phase(&self, phase: BuildPhase) {
        tracing::debug!(?phase, "build phase");
        let last = matches!(phase, BuildPhase::Succeeded | BuildPhase::Failed);
        self.clock(None, (!last).then(|| format!("{phase:?}")));
        self.emit(None, EventKind::BuildPhase { phase });
    }

    /// Reports that a VM entered a phase.
    pub(super) fn vm_phase(&self, vm: &str, phase: VmPhase) {
        tracing::debug!(vm, ?phase, "VM phase");
        let last = matches!(phase, VmPhase::Succeeded | VmPhase::Failed);
        self.clock(Some(vm), (!last).then(|| format!("{phase:?}")));
        lock(&self.0.state).vm_phases.insert(vm.to_owned(), phase);
        self.emit(Some(vm), EventKind::VmPhase { phase });
    }

    /// Returns the phase that a VM is in.
    pub(super) fn phase_of(&self, vm: &str) -> VmPhase {
        lock(&self.0.state).vm_phases.get(vm).copied().unwrap_or(VmPhase::Pending)
    }

    /// Reports a warning, and keeps it for the provenance.
    pub(super) fn warn(&self, vm: Option<&str>, message: impl Into<String>) {
        let message = self.mask(&message.into());
        let kept = vm.map_or_else(|| message.clone(), |vm| format!("vm {vm}: {message}"));
        lock(&self.0.state).warnings.push(kept);
        self.emit(vm, EventKind::Warning { message });
    }

    /// Reports a line of a step's output, and keeps the last ones for a failure report.
    pub(super) fn output(&self, vm: &str, step: usize, stream: OutputStream, line: &str) {
        let line = self.mask(line);
        {
            let mut state = lock(&self.0.state);
            let tail = state.tails.entry(vm.to_owned()).or_default();
            if tail.len() == OUTPUT_TAIL {
                tail.pop_front();
            }
            tail.push_back(line.clone());
        }
        self.push(Some(vm), EventKind::StepOutput { step, stream, line });
    }

    /// Reports that a step starts; the output of the previous step is forgotten.
    pub(super) fn step_started(&self, vm: &str, step: usize, name: &str) {
        lock(&self.0.state).tails.remove(vm);
        self.emit(Some(vm), EventKind::StepStarted { step, name: name.to_owned() });
    }

    /// Returns the last lines that the step of a VM wrote.
    pub(super) fn output_tail(&self, vm: &str) -> Vec<String> {
        lock(&self.0.state).tails.get(vm).into_iter().flatten().cloned().collect()
    }

    /// Returns the warnings of this attempt so far.
    pub(super) fn warnings(&self) -> Vec<String> {
        lock(&self.0.state).warnings.clone()
    }

    /// Returns the duration of each phase so far; running phases count until now.
    pub(super) fn timings(&self) -> Vec<Timing> {
        let state = lock(&self.0.state);
        let mut open: Vec<_> = state.phases.iter().collect();
        open.sort_by_key(|(vm, (_, since))| (*since, (*vm).clone()));
        let open = open.into_iter().map(|(vm, (phase, since))| timing(vm.clone(), phase, *since));
        state.timings.iter().cloned().chain(open).collect()
    }

    /// Returns the receiver to which a backend reports progress of a VM (or of the build).
    pub(super) fn progress(&self, vm: Option<&str>) -> Progress {
        let (sink, vm) = (self.clone(), vm.map(str::to_owned));
        Progress::new(move |event| match event {
            ProgressEvent::Bytes { task, done, total } => sink.bytes(vm.as_deref(), task, done, total),
            ProgressEvent::Notice(message) => sink.emit(vm.as_deref(), EventKind::Notice { message }),
        })
    }

    /// Reports how the build ended. No event follows.
    pub(super) fn finished(&self, outcome: Outcome) {
        let timings = self.timings();
        self.emit(None, EventKind::Finished { outcome, timings });
    }

    /// Reports any other event. Progress that was held back is reported before it.
    pub(super) fn emit(&self, vm: Option<&str>, kind: EventKind) {
        self.flush(vm);
        self.push(vm, self.masked(kind));
    }

    /// Numbers an event, and wakes the readers.
    fn push(&self, vm: Option<&str>, kind: EventKind) {
        lock(&self.0.log).push(Timestamp::now(), vm.map(str::to_owned), kind);
        self.0.pulse.send_replace(());
    }

    /// Reports the progress of a task if the last report is old enough or the task is complete; otherwise holds it back.
    fn bytes(&self, vm: Option<&str>, task: String, done: u64, total: Option<u64>) {
        let complete = total.is_some_and(|total| done >= total);
        let now = Instant::now();
        {
            let mut state = lock(&self.0.state);
            let key = (vm.map(str::to_owned), task.clone());
            match state.tasks.get_mut(&key) {
                Some(known) if known.complete && complete => return,
                Some(known) if !complete && now.duration_since(known.reported) < PROGRESS_INTERVAL => {
                    known.held = Some((done, total));
                    return;
                }
                Some(known) => *known = Task { reported: now, held: None, complete },
                None => {
                    state.tasks.insert(key, Task { reported: now, held: None, complete });
                }
            }
        }
        self.push(vm, self.masked(EventKind::Progress { task, done, total }));
    }

    /// Reports the progress of a VM's tasks that was held back.
    fn flush(&self, vm: Option<&str>) {
        let mut held: Vec<(String, u64, Option<u64>)> = {
            let mut state = lock(&self.0.state);
            let tasks = state.tasks.iter_mut().filter(|((of, _), _)| of.as_deref() == vm);
            tasks
                .filter_map(|((_, task), known)| {
                    known.held.take().map(|(done, total)| (task.clone(), done, total))
                })
                .collect()
        };
        held.sort();
        for (task, done, total) in held {
            self.push(vm, self.masked(EventKind::Progress { task, done, total }));
        }
    }

    /// Ends the current phase, and starts the next.
    fn clock(&self, vm: Option<&str>, phase: Option<String>) {
        let mut state = lock(&self.0.state);
        let vm = vm.map(str::to_owned);
        if let Some((phase, since)) = state.phases.remove(&vm) {
            state.timings.push(timing(vm.clone(), &phase, since));
        }
        if let Some(phase) = phase {
            state.phases.insert(vm, (phase, Instant::now()));
        }
    }

    /// Masks the secrets in an event. Every text is listed here, so a new kind of event must declare its texts.
    fn masked(&self, kind: EventKind) -> EventKind {
        use EventKind as K;
        let mask = |text: String| self.mask(&text);
        match kind {
            K::BuildStarted { .. } | K::BuildPhase { .. } | K::VmPhase { .. } => kind,
            K::BootAction { action, of, doing } => K::BootAction { action, of, doing: mask(doing) },
            K::GuestReady { .. } | K::BootCommandDone { .. } | K::Lagged { .. } => kind,
            K::Progress { task, done, total } => K::Progress { task: mask(task), done, total },
            K::Input(input) => K::Input(self.masked_input(input)),
            K::Notice { message } => K::Notice { message: mask(message) },
            K::Warning { message } => K::Warning { message: mask(message) },
            K::HttpRequest { method, path, status, bytes } => {
                K::HttpRequest { method: mask(method), path: mask(path), status, bytes }
            }
            K::StepStarted { step, name } => K::StepStarted { step, name: mask(name) },
            K::StepOutput { step, stream, line } => K::StepOutput { step, stream, line: mask(line) },
            K::StepFinished { step, name, millis, success, exit } => {
                K::StepFinished { step, name: mask(name), millis, success, exit }
            }
            K::Paused { step, instructions, access } => K::Paused {
                step,
                instructions: mask(instructions),
                access: access.into_iter().map(mask).collect(),
            },
            K::Resumed { .. } => kind,
            K::Retrying { attempt, of, reason } => K::Retrying { attempt, of, reason: mask(reason) },
            K::Kept { access, lab } => K::Kept { access: access.into_iter().map(mask).collect(), lab },
            K::Finished { outcome, timings } => {
                let outcome = match outcome {
                    Outcome::Failed(report) => Outcome::Failed(Box::new(self.masked_report(*report))),
                    other => other,
                };
                K::Finished { outcome, timings }
            }
        }
    }

    /// Masks the secrets in an input record.
    pub(super) fn masked_input(&self, input: InputRecord) -> InputRecord {
        InputRecord { url: self.mask(&input.url), ..input }
    }

    /// Masks the secrets in a failure report.
    pub(super) fn masked_report(&self, report: FailureReport) -> FailureReport {
        let lines = |lines: Vec<String>| self.0.masker.mask_lines(lines);
        FailureReport {
            message: self.mask(&report.message),
            step: report.step.map(|step| self.mask(&step)),
            output_tail: lines(report.output_tail),
            serial_tail: lines(report.serial_tail),
            served: report
                .served
                .into_iter()
                .map(|file| ServedFile::new(self.mask(&file.name), file.requests))
                .collect(),
            screen: lines(report.screen),
            ..report
        }
    }
}

fn timing(vm: Option<String>, phase: &str, since: Instant) -> Timing {
    let millis = u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX);
    Timing { vm, phase: phase.to_owned(), millis }
}

impl fmt::Debug for Sink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Sink")
    }
}
