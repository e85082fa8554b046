//! Manages the modules of a store.
//!
//! ```text
//! cargo run --example modules -- [--backend qemu|libvirt|memory] [--store DIR] list | show NAME | remove NAME | gc |
//!     repair NAME DIGEST
//! ```
//!
//! `remove` also accepts the id of a lab that a failed build kept. `gc` removes what dead builds left behind, and
//! cached inputs that are not needed any more; it reports what it does not recognise, and leaves it alone. `repair`
//! records which version of a module is the current one, if that was lost.
//!
//! Exit codes: 0 done · 1 it failed or a module is damaged, see standard error · 2 wrong usage · 141 standard output
//! has no reader any more.

#[path = "build/hypervisor.rs"]
mod hypervisor;
#[path = "build/output.rs"]
mod output;

use clap::{Parser, Subcommand};
use hypervisor::Hypervisor;
use output::{print, report};
use rudder::{
    Error, ErrorKind, Result,
    backend::{Backend, LabId, LabState},
    build::kept_labs,
    module::Module,
    store::Store,
    units::human_bytes,
    visible::visible_line,
};
use std::{path::PathBuf, process::ExitCode};

/// Manages the modules of a store.
#[derive(Parser)]
struct Arguments {
    /// Where modules are stored; by default, the store of this user.
    #[arg(long)]
    store: Option<PathBuf>,
    /// The backend that built the modules: libvirt also removes their domains.
    #[arg(long, value_enum, default_value = "qemu")]
    backend: Hypervisor,
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Lists modules, and labs that failed builds kept.
    List,
    /// Shows a module: its machines, disks, inputs and timings.
    Show {
        /// The name of the module.
        name: String,
        /// Prints `module.json` verbatim.
        #[arg(long)]
        json: bool,
    },
    /// Removes a module, or a lab that was kept.
    Remove {
        /// The name of the module, or the id of the lab.
        name: String,
    },
    /// Removes what dead builds left behind, and cached inputs that are not needed any more.
    Gc,
    /// Records which version of a module is the current one, if that is not known any more.
    Repair {
        /// The name of the module.
        name: String,
        /// The digest of the version, or a prefix of it.
        digest: String,
    },
}

#[tokio::main]
async fn main() -> ExitCode {
    let Done { shown, failed } = match run(Arguments::parse()).await {
        Ok(done) => done,
        Err(error) => {
            report(format_args!("error: {}", error.report()));
            return ExitCode::FAILURE;
        }
    };
    if !shown.is_empty()
        && let Err(unwritten) = print(shown.trim_end())
    {
        return unwritten.report(1).into();
    }
    if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// What an action prints to standard output, and whether a part of it failed.
#[derive(Default)]
struct Done {
    shown: String,
    failed: bool,
}

/// Adds a line.
macro_rules! line {
    ($done:expr, $($text:tt)+) => {
        // A record may contain text from a server or a guest: control characters are made visible, so that a terminal
        // does not obey them.
        $done.shown.push_str(&visible_line(&format!($($text)+)));
        $done.shown.push('\n');
    };
}

async fn run(arguments: Arguments) -> Result<Done> {
    let store = arguments.store.unwrap_or_else(Store::default_root);
    let backend = || arguments.backend.open(&store);
    match arguments.action {
        Action::List => list(&*backend()?).await,
        Action::Show { name, json } => show(&*backend()?, &name, json).await,
        Action::Remove { name } => remove(&*backend()?, &name).await,
        Action::Gc => gc(&*backend()?).await,
        Action::Repair { name, digest } => repair(&Store::open(&store)?, &name, &digest).await,
    }
}

async fn repair(store: &Store, name: &str, digest: &str) -> Result<Done> {
    let module = store.repair_module(name, digest).await?;
    report(format_args!("module {name} now refers to version {}", module.digest.short()));
    Ok(Done::default())
}

/// Reports the modules that cannot be used; returns whether there are any.
async fn report_damaged(backend: &dyn Backend) -> Result<bool> {
    let damaged = backend.damaged_modules().await?;
    for module in &damaged {
        report(format_args!("error: module {} cannot be used: {}", module.name, module.reason));
    }
    Ok(!damaged.is_empty())
}

async fn list(backend: &dyn Backend) -> Result<Done> {
    let mut done = Done::default();
    let modules = backend.modules().await?;
    if modules.is_empty() && backend.damaged_modules().await?.is_empty() {
        report("no modules yet: build one with `cargo run --example build -- FILE`");
    }
    for module in modules {
        let size: u64 = module
            .machines
            .iter()
            .flat_map(|machine| &machine.disks)
            .filter_map(|disk| disk.content.size)
            .sum();
        let machines = module.machines.len();
        line!(
            done,
            "{:<24} {}  {machines} VM{}  {:>10}  {}",
            module.name,
            module.digest.short(),
            if machines == 1 { " " } else { "s" },
            human_bytes(size),
            formatted(module.created, "%Y-%m-%d %H:%M:%S")
        );
    }
    let kept = kept_labs(backend).await?;
    for lab in backend.labs().await? {
        let LabState::Kept { expires } = lab.state else { continue };
        let until = expires.map(|time| formatted(time, " until %Y-%m-%d %H:%M:%S UTC"));
        line!(done, "kept lab {}{}", lab.id, until.unwrap_or_default());
        for access in kept.iter().filter(|kept| kept.id == lab.id).flat_map(|kept| &kept.access) {
            line!(done, "    {access}");
        }
    }
    done.failed = report_damaged(backend).await?;
    Ok(done)
}

async fn show(backend: &dyn Backend, name: &str, json: bool) -> Result<Done> {
    if let Some(module) = backend.damaged_modules().await?.into_iter().find(|module| module.name == name) {
        report(format_args!("error: module {name} cannot be used: {}", module.reason));
        return Ok(Done { failed: true, ..Done::default() });
    }
    let module = backend.modules().await?.into_iter().find(|module| module.name == name);
    let module = module.ok_or_else(|| {
        Error::new(ErrorKind::NotFound, format!("there is no module {name:?}"))
            .with_help("run `modules list` to see the existing modules")
    })?;
    if json {
        return Ok(Done { shown: module.to_record()?.trim_end().to_owned(), ..Done::default() });
    }
    Ok(describe(&module))
}

fn describe(module: &Module) -> Done {
    let mut done = Done::default();
    line!(done, "module   {}", module.name);
    line!(done, "digest   {}", module.digest);
    line!(done, "created  {}", formatted(module.created, "%Y-%m-%d %H:%M:%S UTC"));
    if let Some(path) = &module.path {
        line!(done, "record   {}", path.display());
    }
    for machine in &module.machines {
        line!(done, "machine  {} ({} cores, {})", machine.name, machine.cpus, human_bytes(machine.memory));
        for disk in &machine.disks {
            let (name, virtual_size) = (&disk.name, human_bytes(disk.virtual_size));
            line!(done, "  disk   {name} of {virtual_size}, {}: {}", disk.file, disk.content);
        }
        for state in &machine.state {
            line!(done, "  state  {}, {}: {}", state.kind.name(), state.file, state.content);
        }
    }
    for input in &module.provenance.inputs {
        line!(done, "input    {}: {}  {}", input.role, input.url, input.content);
    }
    for (what, version) in &module.provenance.versions {
        line!(done, "version  {what} {version}");
    }
    for timing in &module.provenance.timings {
        let (of, phase) = (timing.vm.as_deref().unwrap_or("build"), &timing.phase);
        line!(done, "timing   {of} {phase} {}.{:03} s", timing.millis / 1000, timing.millis % 1000);
    }
    for reason in &module.provenance.not_repeatable {
        line!(done, "not repeatable: {reason}");
    }
    done
}

async fn remove(backend: &dyn Backend, name: &str) -> Result<Done> {
    if let Ok(id) = LabId::parse(name)
        && backend.labs().await?.iter().any(|lab| lab.id == id && lab.is_kept())
    {
        backend.remove_lab(&id).await?;
        report(format_args!("removed lab {id}"));
    } else {
        backend.remove_module(name).await?;
        report(format_args!("removed module {name}"));
    }
    Ok(Done::default())
}

async fn gc(backend: &dyn Backend) -> Result<Done> {
    let mut reaped = backend.reap().await?;
    reaped.merge(backend.collect().await?);
    let mut done = Done { failed: !reaped.failed.is_empty(), ..Done::default() };
    for removed in &reaped.removed {
        line!(done, "removed {removed}");
    }
    for failed in &reaped.failed {
        report(format_args!("could not remove {failed}"));
    }
    for warning in &reaped.warnings {
        report(format_args!("warning: {warning}"));
    }
    line!(done, "{} freed", human_bytes(reaped.freed));
    done.failed |= !backend.damaged_modules().await?.is_empty();
    Ok(done)
}

/// Formats a time in UTC; empty if it is too far away to be written.
fn formatted(time: impl Into<std::time::SystemTime>, format: &str) -> String {
    let time = jiff::Timestamp::try_from(time.into());
    time.map(|time| time.strftime(format).to_string()).unwrap_or_default()
}
