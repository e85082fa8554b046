//! Steps that wait for a person: the instructions, the display for a VNC viewer, and Enter to continue.

use rudder::{
    build::BuildHandle,
    console::Viewer,
    plan::{Plan, StepAction},
};
use std::{
    collections::VecDeque,
    io::{BufRead as _, IsTerminal as _, stdin},
    pin::pin,
};
use tokio::sync::mpsc;

/// The pauses of a build, oldest first.
#[derive(Default)]
pub(crate) struct ByHand {
    pauses: VecDeque<Pause>,
    /// Lines of standard input, which is read from the first pause on.
    lines: Option<mpsc::UnboundedReceiver<()>>,
}

struct Pause {
    vm: String,
    /// `None` if the display cannot be opened for a viewer.
    viewer: Option<Viewer>,
}

/// What can happen while VMs are paused.
pub(crate) enum Input {
    /// The person has finished with this VM.
    Done(String),
    /// Standard input has ended, so that no step can be finished any more.
    Closed,
    /// A message for the person.
    Show(String),
}

/// Returns an error message if a step of this plan waits for Enter but standard input cannot provide it.
pub(crate) fn missing_input(plan: &Plan) -> Option<String> {
    let steps = plan.machines.iter().flat_map(|vm| vm.steps.iter().enumerate().map(move |step| (vm, step)));
    let (vm, (index, step)) =
        steps.into_iter().find(|(_, (_, step))| matches!(step.action, StepAction::Handbuild { .. }))?;
    // A terminal, a pipe or a file can provide the line. Other devices cannot; the usual one is /dev/null.
    let stat = rustix::fs::fstat(stdin());
    let is_device =
        stat.map_or(true, |stat| rustix::fs::FileType::from_raw_mode(stat.st_mode).is_char_device());
    (is_device && !stdin().is_terminal()).then(|| {
        format!(
            "error: step {} ({}) of VM {} waits for a person to press Enter, but standard input is neither a terminal \
             nor a pipe",
            index + 1,
            step.name,
            vm.name
        )
    })
}

impl ByHand {
    /// Begins a pause of a VM: opens its display. Returns a message that says how to continue.
    pub(crate) async fn begin(&mut self, build: &BuildHandle, vm: &str) -> String {
        let Some(paused) = build.paused().into_iter().find(|paused| paused.vm() == vm) else {
            return String::new();
        };
        let lines = self.lines.get_or_insert_with(read_lines);
        if self.pauses.is_empty() && stdin().is_terminal() {
            // Lines typed before the first question are meaningless.
            while lines.try_recv().is_ok() {}
        }
        let (viewer, text) = match Viewer::open(paused.machine().clone()).await {
            Ok(viewer) => {
                let text = viewer_line(vm, &viewer);
                (Some(viewer), text)
            }
            Err(error) => (None, format!("{vm}: no display for VNC viewers: {}", error.report())),
        };
        self.pauses.push_back(Pause { vm: vm.to_owned(), viewer });
        format!("{text}\n{}", self.prompt())
    }

    /// Ends the pause of a VM: closes its display. Returns the question about the next paused VM.
    pub(crate) fn end(&mut self, vm: &str) -> Option<String> {
        self.pauses.retain(|pause| pause.vm != vm);
        (!self.pauses.is_empty()).then(|| self.prompt())
    }

    fn prompt(&self) -> String {
        let next = self.pauses.front().map_or("", |pause| pause.vm.as_str());
        format!("{next}: press Enter when you are done; Ctrl-C cancels the build")
    }

    /// Waits for the person or for a change of a viewer; never completes while nothing is paused.
    pub(crate) async fn next(&mut self) -> Input {
        let (Some(lines), Some(first)) = (&mut self.lines, self.pauses.front()) else {
            return std::future::pending().await;
        };
        let done = first.vm.clone();
        let viewers = self.pauses.iter_mut().filter_map(|pause| {
            let (vm, viewer) = (&pause.vm, pause.viewer.as_mut()?);
            Some(Box::pin(async move {
                viewer.changed().await;
                match viewer.password() {
                    Some(_) => viewer_line(vm, viewer),
                    None => format!("{vm}: a viewer is connected"),
                }
            }))
        });
        let viewers: Vec<_> = viewers.collect();
        let any = async {
            if viewers.is_empty() {
                std::future::pending().await
            } else {
                futures::future::select_all(viewers).await.0
            }
        };
        let next = {
            let (mut any, mut line) = (pin!(any), pin!(lines.recv()));
            tokio::select! {
                text = &mut any => Input::Show(text),
                line = &mut line => match line {
                    Some(()) => Input::Done(done),
                    None => Input::Closed,
                },
            }
        };
        if let Input::Done(_) = next {
            // Standard input may end right after the line, which no longer concerns this VM.
            self.pauses.pop_front();
        }
        next
    }
}

fn viewer_line(vm: &str, viewer: &Viewer) -> String {
    let (address, password) = (viewer.address(), viewer.password().unwrap_or_default());
    let (ip, port) = (address.ip(), address.port());
    format!("{vm}: display: vncviewer {ip}::{port}, password {password} (works once)")
}

/// Reads lines of standard input on a thread: a read cannot be cancelled, and must not delay the end of the program.
fn read_lines() -> mpsc::UnboundedReceiver<()> {
    let (send, lines) = mpsc::unbounded_channel();
    std::thread::spawn(move || stdin().lock().lines().map_while(Result::ok).try_for_each(|_| send.send(())));
    lines
}
