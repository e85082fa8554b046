//! One process of the control plane: started so that it cannot outlive this process, with a log that errors quote.

use super::error::{Context, Error, Result};
use std::{
    fs::{self, OpenOptions},
    io,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc,
    thread,
};

/// Number of lines of a log that an error quotes.
const QUOTED: usize = 15;

/// A running component.
#[derive(Debug)]
pub(super) struct Component {
    name: &'static str,
    log: PathBuf,
    child: Child,
    /// Dropped with the component, which ends the thread that started it.
    _parent: mpsc::Sender<()>,
}

impl Component {
    /// Starts the command `name` of the program `kube`, with its log in `directory`.
    pub(super) fn start(
        kube: &Path,
        name: &'static str,
        options: &[String],
        directory: &Path,
    ) -> Result<Self> {
        let log = directory.join(format!("{name}.log"));
        // Appended, so that the log of a component that is restarted is complete.
        let output = OpenOptions::new().create(true).append(true).open(&log);
        let output = output.context(|| format!("cannot create {}", log.display()))?;
        let errors = output.try_clone().context(|| format!("cannot write {}", log.display()))?;
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]).arg(kube).arg(name).args(options);
        command.current_dir(directory).stdin(Stdio::null()).stdout(output).stderr(errors);
        let (child, parent) = spawn(command)
            .context(|| format!("cannot start {name} through setpriv, which is part of util-linux"))?;
        Ok(Self { name, log, child, _parent: parent })
    }

    /// Fails if the component has ended.
    pub(super) fn check(&mut self) -> Result<()> {
        match self.child.try_wait().context(|| format!("cannot wait for {}", self.name))? {
            None => Ok(()),
            Some(status) => Err(Error::new(format!("{} ended by itself ({status})", self.name))
                .with_lines(&self.last_lines())),
        }
    }

    /// Returns the last lines of the log.
    pub(super) fn last_lines(&self) -> String {
        let text = fs::read(&self.log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        let text = text.unwrap_or_else(|error| format!("no log: {error}"));
        let lines: Vec<_> = text.lines().collect();
        let last = &lines[lines.len().saturating_sub(QUOTED)..];
        let mut quoted = format!("the last lines of {}:", self.name);
        for line in last {
            quoted.push_str("\n    ");
            quoted.push_str(line);
        }
        quoted
    }
}

impl Drop for Component {
    /// Kills the process: nothing of what it would write on a clean exit is used again.
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Starts a process from a thread of its own, which lives until the returned sender is dropped: the kernel sends
/// the signal of `--pdeathsig` when the thread that started the process ends, and threads of tests and of thread
/// pools end early.
fn spawn(mut command: Command) -> io::Result<(Child, mpsc::Sender<()>)> {
    let (started, child) = mpsc::channel();
    let (parent, dropped) = mpsc::channel::<()>();
    thread::Builder::new().name("parent".into()).spawn(move || {
        if started.send(command.spawn()).is_ok() {
            let _ = dropped.recv();
        }
    })?;
    let child = child.recv().map_err(io::Error::other)??;
    Ok((child, parent))
}
