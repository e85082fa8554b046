//! Looks after the modules of a store.
//!
//! ```text
//! cargo run --example modules -- [--backend qemu|libvirt|memory] [--store DIR] list | show NAME | remove NAME | gc |
//!     repair NAME DIGEST
//! ```
//!
//! `remove` also takes the id of a lab that a failed build kept. `gc` removes what dead builds left behind, and cached
//! inputs that nothing needs; what it does not know it leaves alone, and says so. `repair` says which version a module has, when
//! that was lost. Exit code 0: done; 1: it failed, or a module is damaged, standard error says why; 2: wrong usage.
#![allow(clippy::print_stdout, clippy::print_stderr)]

#[path = "build/hypervisor.rs"]
mod hypervisor;

use clap::{Parser, Subcommand};
use hypervisor::Hypervisor;
use rudder::{
    Error, ErrorKind, Result,
    backend::{Backend, LabId},
    module::Module,
    store::Store,
    units::human_bytes,
};
use std::{path::PathBuf, process::ExitCode};

/// Looks after the modules of a store.
#[derive(Parser)]
struct Arguments {
    /// Where modules are kept; left out, the user's own store.
    #[arg(long)]
    store: Option<PathBuf>,
    /// The backend that built them: libvirt also removes their domains.
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
        /// Prints `module.json` as it stands.
        #[arg(long)]
        json: bool,
    },
    /// Removes a module, or a lab that was kept.
    Remove {
        /// The name of the module, or the id of the lab.
        name: String,
    },
    /// Removes what dead builds left behind, and cached inputs that nothing needs.
    Gc,
    /// Says which version a module has, when that is not known any more.
    Repair {
        /// The name of the module.
        name: String,
        /// The digest of the version, or how it begins.
        digest: String,
    },
}

#[tokio::main]
async fn main() -> ExitCode {
    match run(Arguments::parse()).await {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {}", error.report());
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: Arguments) -> Result<ExitCode> {
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

async fn repair(store: &Store, name: &str, digest: &str) -> Result<ExitCode> {
    let module = store.repair_module(name, digest).await?;
    eprintln!("the version of module {name} is {} now", module.digest.short());
    Ok(ExitCode::SUCCESS)
}

/// Tells of the modules that cannot be used. Success when there are none.
async fn tell_damaged(backend: &dyn Backend) -> Result<ExitCode> {
    let damaged = backend.damaged_modules().await?;
    for module in &damaged {
        eprintln!("error: module {} cannot be used: {}", module.name, module.reason);
    }
    Ok(if damaged.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn list(backend: &dyn Backend) -> Result<ExitCode> {
    let modules = backend.modules().await?;
    if modules.is_empty() && backend.damaged_modules().await?.is_empty() {
        eprintln!("no modules yet: build one with `cargo run --example build -- FILE`");
    }
    for module in modules {
        let size: u64 = module.machines.iter().flat_map(|machine| &machine.disks).map(|disk| disk.size).sum();
        let machines = module.machines.len();
        println!(
            "{:<24} {}  {machines} VM{}  {:>10}  {}",
            module.name,
            module.digest.short(),
            if machines == 1 { " " } else { "s" },
            human_bytes(size),
            module.created.strftime("%Y-%m-%d %H:%M:%S")
        );
    }
    for lab in backend.kept_labs().await? {
        println!("kept lab {}", lab.id);
        for line in lab.access {
            println!("    {line}");
        }
    }
    tell_damaged(backend).await
}

async fn show(backend: &dyn Backend, name: &str, json: bool) -> Result<ExitCode> {
    if let Some(module) = backend.damaged_modules().await?.into_iter().find(|module| module.name == name) {
        eprintln!("error: module {name} cannot be used: {}", module.reason);
        return Ok(ExitCode::FAILURE);
    }
    let module = backend.modules().await?.into_iter().find(|module| module.name == name);
    let module = module.ok_or_else(|| {
        Error::new(ErrorKind::NotFound, format!("there is no module {name:?}"))
            .with_help("`modules list` shows those that are there")
    })?;
    if json {
        println!("{:#}", serde_json::json!(module));
        return Ok(ExitCode::SUCCESS);
    }
    describe(&module);
    Ok(ExitCode::SUCCESS)
}

fn describe(module: &Module) {
    println!("module   {}", module.name);
    println!("digest   {}", module.digest);
    println!("created  {}", module.created.strftime("%Y-%m-%d %H:%M:%S UTC"));
    if let Some(path) = &module.path {
        println!("record   {}", path.display());
    }
    for machine in &module.machines {
        println!("machine  {} ({} cores, {})", machine.name, machine.cpus, human_bytes(machine.memory));
        for disk in &machine.disks {
            let (size, virtual_size) = (human_bytes(disk.size), human_bytes(disk.virtual_size));
            println!(
                "  disk   {} {} of {virtual_size}, {}  sha256 {}",
                disk.name, size, disk.file, disk.sha256
            );
        }
        for state in &machine.state {
            let (kind, size) = (state.kind.name(), human_bytes(state.size));
            println!("  state  {kind} {size}, {}  sha256 {}", state.file, state.sha256);
        }
    }
    for input in &module.provenance.inputs {
        println!(
            "input    {}: {}  {}  sha256 {}",
            input.role,
            input.url,
            human_bytes(input.size),
            input.sha256
        );
    }
    for (what, version) in &module.provenance.versions {
        println!("version  {what} {version}");
    }
    for timing in &module.provenance.timings {
        let of = timing.vm.as_deref().unwrap_or("build");
        println!("timing   {of} {} {}.{:03} s", timing.phase, timing.millis / 1000, timing.millis % 1000);
    }
    for reason in &module.provenance.not_repeatable {
        println!("not repeatable: {reason}");
    }
}

async fn remove(backend: &dyn Backend, name: &str) -> Result<ExitCode> {
    if let Ok(id) = LabId::parse(name)
        && backend.kept_labs().await?.iter().any(|lab| lab.id == id)
    {
        backend.remove_lab(&id).await?;
        eprintln!("removed lab {id}");
    } else {
        backend.remove_module(name).await?;
        eprintln!("removed module {name}");
    }
    Ok(ExitCode::SUCCESS)
}

async fn gc(backend: &dyn Backend) -> Result<ExitCode> {
    let mut report = backend.reap().await?;
    report.merge(backend.collect().await?);
    for line in &report.removed {
        println!("removed {line}");
    }
    for line in &report.failed {
        eprintln!("could not remove {line}");
    }
    for line in &report.warnings {
        eprintln!("warning: {line}");
    }
    println!("{} freed", human_bytes(report.freed));
    let code =
        if backend.damaged_modules().await?.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    Ok(if report.failed.is_empty() { code } else { ExitCode::FAILURE })
}
