//! A complete backend in three small files, and the conformance suite that checks whether it keeps the contract: the example of
//! the guide "Write a backend" (`docs/backends.md`). Prints the table of results.

#![allow(clippy::print_stdout)] // A program prints.

mod processes;

use processes::ProcessesAdapter;
use rudder_core::testing::{OWNER_VARIABLE, Options, own, run};
use std::{error::Error, process::Command, sync::Arc};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let owner = Command::new(std::env::current_exe()?);
    // The suite starts this program again to act as another process, which owns a lab and is killed.
    if std::env::var_os(OWNER_VARIABLE).is_some() {
        return Err(format!("{:?}", own(Arc::new(ProcessesAdapter::another(owner)?)).await).into());
    }
    let report = run(Arc::new(ProcessesAdapter::new(owner)?), &Options::new()).await;
    println!("{report}");
    if report.is_passed() { Ok(()) } else { Err("the backend breaks its contract".into()) }
}
